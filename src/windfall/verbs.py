"""Verbs: what a user can ask for, each one call.

result = run("lottery", {"num_seeds": 5})
result.verdicts.to_pandas()
"""

import contextlib
import os
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from windfall import costs, patterns, tables
from windfall import study as studies
from windfall.execute import Watch, execute, num_cores, pick_device
from windfall.findings import Findings, Table
from windfall.spec import Json, SpecError
from windfall.store import Lab, write_whole
from windfall.study import Study

Settings = Mapping[str, Any]
Which = Study | str | Path


@dataclass(frozen=True)
class Result:
    """What a study found.

    Args:
        document: everything, JSON-able; the page is made from it.
        runs: counts: total, reused, trained, failed, diverged.
        seconds: of this call.
        lab: the folder of the runs.
        report: the page's path, or None.
    """

    document: Json
    runs: dict[str, int]
    seconds: float
    lab: Path
    report: Path | None

    @property
    def arms(self) -> Table:
        """Arms by level and metric: mean, interval, and every run's value and address."""
        return Table(self.document["arms"])

    @property
    def verdicts(self) -> Table:
        """One decided row per effect, at the study's level and metric."""
        return Table(self.document["verdicts"])

    @property
    def comparisons(self) -> Table:
        """Effects at other levels and metrics, with plain intervals."""
        return Table(self.document["comparisons"])

    @property
    def failures(self) -> Table:
        """Failed runs and their reasons."""
        return Table(self.document["failures"])

    @property
    def answer(self) -> list[str]:
        """The answer in words, the headline first."""
        return self.document["answer"]

    @property
    def winner(self) -> str | None:
        """Address of the best pruned run by validation accuracy."""
        return self.document["winner"]

    def to_json(self) -> Json:
        """The document that `windfall run --json` prints."""
        study = self.document["study"]
        names = ("arms", "verdicts", "comparisons", "failures", "winner", "notes", "answer")
        return {
            "study": {"name": study["name"], "address": study["address"]},
            "runs": self.runs,
            **{name: self.document[name] for name in names},
            "seconds": self.seconds,
            "estimate": self.document["estimate"],
            "lab": str(self.lab),
            "report": None if self.report is None else str(self.report),
        }


def lab_folder(lab: str | Path | None) -> Path:
    """The lab that is meant: the one given, else `WINDFALL_LAB`, else `./lab`."""
    return Path(lab or os.environ.get("WINDFALL_LAB") or "lab")


def _study(which: Which, settings: Settings | None) -> Study:
    if isinstance(which, Study):
        if settings:
            raise SpecError("settings must come with a study's name or file; got a Study.")
        return which
    return studies.load(which, settings)


def run(
    study: Which,
    settings: Settings | None = None,
    *,
    lab: str | Path | None = None,
    workers: int | None = None,
    device: str = "auto",
    watch: Watch | None = None,
) -> Result:
    """Train what a study lacks and sum it up.

    Args:
        study: a `Study`, a bundled study's name, or the path of a TOML file.
        settings: changes by path, such as `{"num_seeds": 5}`; not with a `Study`.
        lab: the folder of the runs; default `WINDFALL_LAB` or `./lab`.
        workers: number of processes, at least 1; default one a core.
        device: `auto`, `cpu` or `cuda`.
        watch: called with the progress several times a second; None shows it on stderr.

    Raises:
        SpecError: when something given cannot be; nothing was started.
        Interrupted: on Ctrl-C; everything finished is kept.
    """
    begun = time.monotonic()
    chosen = _study(study, settings)
    if workers is not None and workers < 1:
        raise SpecError(f"`--workers` must be at least 1; got {workers}.")
    picked = pick_device(device)
    graph = studies.expand(chosen)
    place = Lab(lab_folder(lab))
    key, plan = studies.key(chosen), tables.outline(graph)
    told = costs.forecast(graph, place, workers or num_cores(), picked)
    before = (place.recall(key) or {}).get("estimate")
    plan["estimate"] = before if told is None else told
    place.remember(key, chosen.name, plan)
    missing, started = set(graph.runs) - place.records(graph.runs).keys(), time.monotonic()
    with _watching(chosen.name, watch) as shown:
        outcome = execute(graph, place, workers=workers, device=device, watch=shown)
    if told is not None:
        records = list(place.records(missing).values())
        plan["estimate"] = costs.measured(told, records, time.monotonic() - started)
        place.remember(key, chosen.name, plan)
    counts = {"reused": outcome.reused, "trained": outcome.trained}
    return _result(plan, place, counts, begun, page=place.folder / f"{chosen.name}.html")


@contextlib.contextmanager
def _watching(name: str, watch: Watch | None) -> Generator[Watch]:
    if watch is not None:
        yield watch
        return
    from windfall.display import watching

    with watching(name) as shown:
        yield shown


def _result(
    plan: Json, lab: Lab, counts: dict[str, int], begun: float, page: Path | None = None
) -> Result:
    document = tables.summary(plan, lab)
    records = document["records"]
    runs = {
        "total": len(plan["flops"]),
        "reused": counts.get("reused", len(records)),
        "trained": counts.get("trained", 0),
        "failed": len({failure["address"] for failure in document["failures"]}),
        "diverged": sum(record["status"] == "diverged" for record in records),
    }
    seconds = time.monotonic() - begun
    document |= {"runs": runs, "seconds": document["training_seconds"]}
    document["created"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    if page is not None:
        _write_page(document, page)
    return Result(document, runs, seconds, lab.folder, page)


def _write_page(document: Json, page: Path) -> None:
    from windfall.page import render

    try:
        write_whole(page, render(document).encode())
    except OSError as problem:
        raise SpecError(f"`-o` must be a file to write; got {page}: {problem.strerror}.") from None


def plan(
    study: Which,
    settings: Settings | None = None,
    *,
    lab: str | Path | None = None,
    workers: int | None = None,
) -> Json:
    """The runs a study needs, which are stored, and what the rest costs; nothing is started.

    Args:
        study: as in `run`.
        settings: as in `run`.
        lab: as in `run`; it need not exist.
        workers: as in `run`; the estimate is for so many.
    """
    graph = studies.expand(_study(study, settings))
    folder = lab_folder(lab)
    known = Lab(folder, readonly=True) if folder.exists() else None
    return costs.estimate(graph, known, workers or num_cores(), pick_device("auto"))


def _from_lab(study: Which, settings: Settings | None, lab: str | Path | None) -> tuple[Json, Lab]:
    chosen = study if isinstance(study, Study) else studies.load(study, settings, code=False)
    place = Lab(lab_folder(lab), readonly=True)
    found = place.recall(studies.key(chosen))
    if found is None:
        raise SpecError(
            f"STUDY must have been run in the lab {place.folder} with these settings; got"
            f" {chosen.name}. Run it: windfall run {study}."
        )
    return found, place


def show(
    study: Which, settings: Settings | None = None, *, lab: str | Path | None = None
) -> Result:
    """What a study found, from the lab alone: no user's code runs, nothing is trained.

    Args:
        study: as in `run`.
        settings: as in `run`.
        lab: as in `run`.
    """
    begun = time.monotonic()
    found, place = _from_lab(study, settings, lab)
    return _result(found, place, {}, begun)


def pattern(
    study: Which, settings: Settings | None = None, *, lab: str | Path | None = None
) -> Json:
    """How much of each stage a study's pruned networks keep, from the lab alone.

    Args:
        study: as in `run`.
        settings: as in `run`.
        lab: as in `run`.

    Returns:
        The study's name and what `patterns.pattern` tells.
    """
    found, place = _from_lab(study, settings, lab)
    return {"study": found["study"]["name"], **patterns.pattern(Findings(found, place))}


def report(
    study: Which,
    output: str | Path,
    settings: Settings | None = None,
    *,
    lab: str | Path | None = None,
) -> Result:
    """Write a study's page, from the lab alone.

    Args:
        study: as in `run`.
        output: the HTML file to write.
        settings: as in `run`.
        lab: as in `run`.
    """
    begun = time.monotonic()
    found, place = _from_lab(study, settings, lab)
    return _result(found, place, {}, begun, page=Path(output))
