"""The exhibit: what a study of the laboratory found, as a document.

document = document(study, found, failures={}, address=...)
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from windfall import contingency, foretelling, luck
from windfall.experiments import num_steps, training_flops
from windfall.luck import LaboratoryStudy
from windfall.measures import Outcome
from windfall.spec import Json

Found = Mapping[str, tuple[Outcome, Json]]


def by_place(study: LaboratoryStudy, found: Found) -> dict[tuple[str, int], Outcome]:
    """The courses that there are by (arm, seed)."""
    return {place: found[name][0] for place, name in study.places().items() if name in found}


def document(
    study: LaboratoryStudy, found: Found, failures: Mapping[str, str], address: str
) -> Json:
    """Everything that was found, JSON-able, as of a study of pruned networks.

    Args:
        study: whose it is.
        found: courses and their facts by address.
        failures: reasons by address.
        address: of the study.
    """
    courses = by_place(study, found)
    rows = luck.arms(study, courses)
    decided = luck.verdicts(study, rows)
    versions = {json.dumps(facts["versions"], sort_keys=True) for _, facts in found.values()}
    notes = luck.exceptions(study, courses)
    if len(versions) > 1:
        notes.append(f"runs of different versions: {'; '.join(sorted(versions))}")
    notes += sorted({str(facts["note"]) for _, facts in found.values() if facts.get("note")})
    settings = study.to_json()
    return {
        "study": {
            "name": study.name,
            "address": address,
            "title": study.title or study.name,
            "question": study.question,
        },
        "settings": settings,
        "arms": rows,
        "verdicts": decided,
        "comparisons": [],
        "failures": [
            {"address": name, "arm": arm, "level": 0, "seed": seed, "reason": failures[name]}
            for (arm, seed), name in study.places().items()
            if name in failures
        ],
        "winner": None,
        "notes": notes,
        "answer": [
            *luck.answer(study, decided),
            *contingency.told(rows),
            *foretelling.told(rows),
        ],
        "estimate": None,
        "training_seconds": sum(facts["seconds"] for _, facts in found.values()),
        "versions": next((facts["versions"] for _, facts in found.values()), {}),
    }


def planned(
    study: LaboratoryStudy,
    is_stored: Callable[[str], bool],
    pace: Callable[[Any], float | None],
    workers: int,
) -> Json:
    """What a study needs, arm by arm, what is stored of it, and how long the rest would take.

    Args:
        study: which.
        is_stored: whether the run of an address is.
        pace: seconds of one run on one core, or None where it cannot be told.
        workers: processes that train at once.
    """
    rows: list[Json] = []
    for arm, experiment in study.experiments().items():
        names = [luck.address(experiment, seed) for seed in range(study.num_seeds)]
        rows.append(
            {
                "arm": arm,
                "runs": len(names),
                "stored": sum(map(is_stored, names)),
                "steps": num_steps(experiment),
                "flops": training_flops(experiment),
                "seconds": pace(experiment),
            }
        )
    costs = [(row["runs"] - row["stored"], row["seconds"]) for row in rows]
    known = all(seconds is not None for missing, seconds in costs if missing)
    whole = sum(missing * seconds for missing, seconds in costs if missing) if known else None
    return {
        "study": {"name": study.name},
        "laboratory": rows,
        "workers": workers,
        "seconds": None if whole is None else whole / workers,
    }
