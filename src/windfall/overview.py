"""Overview: what the cases of a suite found, or will cost, as one document."""

from collections.abc import Mapping
from typing import Any

from windfall import words
from windfall.findings import Table
from windfall.spec import Json
from windfall.suite import Suite

_ROWS = ("arms", "verdicts", "comparisons", "failures")


def combined(suite: Suite, documents: Mapping[str, Json]) -> Json:
    """What a suite found: its cases' documents under `cases`, and their rows with a `case` each."""
    rows = {name: Table(_named(documents, name)) for name in _ROWS}
    for row in rows["verdicts"]:
        row["margin"] = suite.cases[row["case"]].decided_margin
    records = {r["address"]: r for each in documents.values() for r in each["records"]}
    document: Json = {
        "study": {**_told(suite), "question": suite.question},
        "cases": dict(documents),
        **rows,
        "notes": _notes(documents),
        "flops": sum(record["flops"] for record in records.values()),
        "training_seconds": sum(record["seconds"] for record in records.values()),
        "estimate": None,
        **winner(suite, documents),
    }
    document["answer"] = words.across(document["verdicts"], len(documents))
    return document


def planned(suite: Suite, plans: Mapping[str, Json], num_runs: int, num_stored: int) -> Json:
    """What a suite needs: its cases' estimates under `cases`, and the sums of what is missing.

    Args:
        suite: whose cases they are.
        plans: their estimates, each without the runs of those before it.
        num_runs: of all cases, each counted once.
        num_stored: of them.
    """
    sums = ("flops", "seconds_estimate", "total_seconds_estimate")
    reasons = [plan["engine_reason"] for plan in plans.values() if plan["engine_reason"]]
    sources = dict.fromkeys(plan["estimate_from"] for plan in plans.values())
    return {
        "study": _told(suite),
        "cases": dict(plans),
        "runs": {
            "total": num_runs,
            "stored": num_stored,
            "missing": sum(plan["runs"]["missing"] for plan in plans.values()),
        },
        "rows": _named(plans, "rows"),
        **{name: sum(plan[name] for plan in plans.values()) for name in sums},
        "estimate_from": " and ".join(sources),
        "engine_reason": reasons[0] if reasons else None,
    }


def _told(suite: Suite) -> Json:
    return {"name": suite.name, "address": suite.address, "title": suite.title or suite.name}


def _named(documents: Mapping[str, Json], name: str) -> list[Json]:
    return [{"case": case, **row} for case, each in documents.items() for row in each[name]]


def _notes(documents: Mapping[str, Json]) -> list[str]:
    """The notes, each once, with the cases that it is of unless they are all.

    Those on early stops are left to the cases' own pages, which have their tables.
    """
    found: dict[str, list[str]] = {}
    for case, document in documents.items():
        beside = words.censored(document)
        for note in document["notes"]:
            if note not in beside:
                found.setdefault(note, []).append(case)
    everywhere = len(documents)
    return [
        note if len(cases) == everywhere else f"{', '.join(cases)}: {note}"
        for note, cases in found.items()
    ]


def winner(suite: Suite, won: Mapping[str, Json]) -> Json:
    """The best of the cases' winners by validation accuracy, as `tables.winner` tells one.

    None where no case has one, or where the cases' data differ, which no accuracy compares.
    """
    nothing: dict[str, Any] = {"winner": None, "winner_record": None}
    found = [each for each in won.values() if each["winner"] is not None]
    same_data = len({study.data.address for study in suite.cases.values()}) == 1
    if not found or not same_data:
        return nothing
    best = max(found, key=lambda each: each["winner_record"]["validation_accuracy"])
    return {name: best[name] for name in nothing}
