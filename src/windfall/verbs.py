"""Verbs: what a user can ask for, each one call.

result = run("lottery", {"num_seeds": 5})
result.verdicts.to_pandas()
"""

import contextlib
import functools
import os
import time
from collections.abc import Generator, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from windfall import (
    checkup,
    costs,
    courses,
    exhibit,
    experiments,
    exports,
    overview,
    patterns,
    tables,
    weights,
    words,
)
from windfall.execute import Watch, execute, num_cores, pick_device
from windfall.exports import Export
from windfall.findings import Findings
from windfall.graph import Graph, expand
from windfall.luck import LaboratoryStudy
from windfall.prospects import prospects
from windfall.results import Result as Result
from windfall.settings import bundled, key, load
from windfall.spec import Json, SpecError, nearest
from windfall.store import Lab, write_whole
from windfall.study import Study
from windfall.suite import Suite, naming

Settings = Mapping[str, Any]
Which = Study | Suite | LaboratoryStudy | str | Path


def lab_folder(lab: str | Path | None) -> Path:
    """The lab that is meant: the one given, else `WINDFALL_LAB`, else `./lab`."""
    return Path(lab or os.environ.get("WINDFALL_LAB") or "lab")


Chosen = Study | Suite | LaboratoryStudy


def _chosen(which: Which, settings: Settings | None, *, code: bool = True) -> Chosen:
    if isinstance(which, Study | Suite | LaboratoryStudy):
        if settings:
            raise SpecError("settings must come with a study's name or file; got a Study.")
        return which
    return load(which, settings, code=code)


def _pruned(chosen: Chosen, verb: str) -> Study | Suite:
    """Refuse a study of the laboratory for a verb that is about pruned networks."""
    if isinstance(chosen, LaboratoryStudy):
        raise SpecError(
            f"STUDY must be one of pruned networks for `{verb}`; {chosen.name} is one of teachers"
            " and students."
        )
    return chosen


def _cases(chosen: Study | Suite) -> dict[str, Study]:
    """The studies by case; a study is the one case of itself, without a name."""
    return dict(chosen.cases) if isinstance(chosen, Suite) else {"": chosen}


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
        study: a `Study` or `Suite`, a bundled one's name, or the path of a TOML file.
        settings: changes by path, such as `{"num_seeds": 5}`; not with a `Study` or `Suite`.
        lab: the folder of the runs; default `WINDFALL_LAB` or `./lab`.
        workers: number of processes, at least 1; default one a core.
        device: `auto`, `cpu` or `cuda`.
        watch: called with the progress several times a second; None shows it on stderr.

    Raises:
        SpecError: when something given cannot be; nothing was started.
        Interrupted: on Ctrl-C; everything finished is kept.
    """
    begun = time.monotonic()
    chosen = _chosen(study, settings)
    if workers is not None and workers < 1:
        raise SpecError(f"`--workers` must be at least 1; got {workers}.")
    picked = pick_device(device)
    if isinstance(chosen, LaboratoryStudy):
        return _experimented(chosen, Lab(lab_folder(lab)), begun, workers or num_cores(), watch)
    graphs = {case: _expanded(case, each) for case, each in _cases(chosen).items()}
    place, plans = Lab(lab_folder(lab)), dict[str, Json]()
    for case, graph in graphs.items():
        before = (place.recall(key(graph.study)) or {}).get("estimate")
        plans[case] = _remembered(graph, tables.outline(graph), place, before)
    trained = dict[str, int]()
    for index, (case, graph) in enumerate(graphs.items(), start=1):
        told = f"{chosen.name}: {case} ({index} of {len(graphs)})" if case else chosen.name
        with _watching(told, watch) as shown:
            trained[case], plans[case] = _trained(graph, plans[case], place, workers, picked, shown)
    page = place.folder / f"{chosen.name}.html"
    return _result(chosen, plans, place, begun, trained=trained, page=page)


def _experimented(
    study: LaboratoryStudy, lab: Lab, begun: float, workers: int, watch: Watch | None
) -> Result:
    """Train what a study of the laboratory lacks, on the CPU."""
    places, each = study.places(), study.experiments()
    for arm, experiment in each.items():
        with naming(arm):
            experiments.check(experiment)
    wanted = {name: (each[arm], seed) for (arm, seed), name in places.items()}
    with _watching(study.name, watch) as shown:
        trained, failures = courses.execute(lab, wanted, workers=workers, watch=shown)
    page = lab.folder / f"{study.name}.html"
    return _exhibited(study, lab, begun, trained=trained, failures=failures, page=page)


def _exhibited(
    study: LaboratoryStudy,
    lab: Lab,
    begun: float,
    *,
    trained: int = 0,
    failures: Mapping[str, str] | None = None,
    page: Path | None = None,
) -> Result:
    places = study.places()
    found = courses.read(lab, places.values())
    if failures is None:
        courses.refuse_missing(found, places.values(), study.name)
    document = exhibit.document(study, found, failures or {}, key(study))
    num = len(set(places.values()))
    diverged = sum(course.diverged for course, _ in found.values())
    reused, failed = len(found) - trained, num - len(found)
    counts = {"total": num, "reused": reused, "trained": trained}
    document["runs"] = counts | {"failed": failed, "diverged": diverged}
    document["created"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    if page is not None:
        from windfall.gallery import render as render_laboratory

        _write(render_laboratory(document, study, found), page)
    return Result(document, document["runs"], time.monotonic() - begun, lab.folder, page)


def _expanded(case: str, study: Study) -> Graph:
    with naming(case):
        return expand(study)


def _remembered(graph: Graph, plan: Json, lab: Lab, estimate: Json | None) -> Json:
    """What a study consists of and what was estimated of it, kept in the lab."""
    plan = plan | {"estimate": estimate}
    lab.remember(key(graph.study), graph.study.name, plan)
    return plan


def _trained(
    graph: Graph, plan: Json, lab: Lab, workers: int | None, device: str, watch: Watch
) -> tuple[int, Json]:
    """Train what a graph lacks; the number of runs that were, and the plan with its estimate."""
    told = costs.forecast(graph, lab, workers or num_cores(), device)
    if told is not None:
        plan = _remembered(graph, plan, lab, told)
    missing, started = set(graph.runs) - lab.records(graph.runs).keys(), time.monotonic()
    outcome = execute(graph, lab, workers=workers, device=device, watch=watch)
    if told is not None:
        records = list(lab.records(missing).values())
        took = costs.measured(told, records, time.monotonic() - started)
        plan = _remembered(graph, plan, lab, took)
    return outcome.trained, plan


@contextlib.contextmanager
def _watching(name: str, watch: Watch | None) -> Generator[Watch]:
    if watch is not None:
        yield watch
        return
    from windfall.display import watching

    with watching(name) as shown:
        yield shown


def _result(
    chosen: Study | Suite,
    plans: Mapping[str, Json],
    lab: Lab,
    begun: float,
    *,
    trained: Mapping[str, int] | None = None,
    page: Path | None = None,
) -> Result:
    """What was found, from the lab; of a suite a page for each case is written beside its own."""
    counted = trained or {}
    documents = {case: tables.summary(plan, lab) for case, plan in plans.items()}
    runs = _counts(plans, lab, documents.values(), sum(counted.values()))
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    for case, document in documents.items():
        own = (
            runs
            if not case
            else _counts({case: plans[case]}, lab, [document], counted.get(case, 0))
        )
        document |= {"runs": own, "seconds": document["training_seconds"], "created": created}
    whole = documents.get("")
    if isinstance(chosen, Suite):
        whole = overview.combined(chosen, documents) | {"runs": runs, "created": created}
    assert whole is not None
    if page is not None:
        pages = {case: page.with_stem(f"{page.stem}-{case}") for case in documents if case}
        _write_page(whole | {"pages": {case: path.name for case, path in pages.items()}}, page)
        for case, path in pages.items():
            _write_page(documents[case], path)
    return Result(whole, runs, time.monotonic() - begun, lab.folder, page)


def _counts(
    plans: Mapping[str, Json], lab: Lab, documents: Iterable[Json], trained: int
) -> dict[str, int]:
    """Of all runs, each counted once however many cases it belongs to."""
    wanted = {address for plan in plans.values() for address in plan["flops"]}
    records = lab.records(wanted)
    failed = {row["address"] for document in documents for row in document["failures"]}
    return {
        "total": len(wanted),
        "reused": len(records) - trained,
        "trained": trained,
        "failed": len(failed),
        "diverged": sum(record.status == "diverged" for record in records.values()),
    }


def _write_page(document: Json, page: Path) -> None:
    from windfall.page import render, render_suite

    _write(render_suite(document) if "cases" in document else render(document), page)


def _write(html: str, page: Path) -> None:
    try:
        write_whole(page, html.encode())
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

    Where channels or blocks are to be removed, also how fast the smaller network would be here.

    Args:
        study: as in `run`.
        settings: as in `run`.
        lab: as in `run`; it need not exist.
        workers: as in `run`; the estimate is for so many.
    """
    chosen, folder = _chosen(study, settings), lab_folder(lab)
    known = Lab(folder, readonly=True) if folder.exists() else None
    if isinstance(chosen, LaboratoryStudy):
        stored = known and functools.partial(courses.is_stored, known)
        pace, num = courses.seconds, workers or num_cores()
        return exhibit.planned(chosen, stored or (lambda _: False), pace, num)
    plans, before = dict[str, Json](), set[str]()
    for case, each in _cases(chosen).items():
        graph = _expanded(case, each)
        num, device = workers or num_cores(), pick_device("auto")
        plans[case] = costs.estimate(graph, known, num, device, beside=before)
        plans[case]["latency"] = prospects(graph)
        before |= graph.runs.keys()
    if not isinstance(chosen, Suite):
        return plans[""]
    return overview.planned(chosen, plans, len(before), len(known.records(before)) if known else 0)


def _from_lab(
    which: Which, settings: Settings | None, lab: str | Path | None, verb: str = "export"
) -> tuple[Study | Suite, dict[str, Json], Lab]:
    chosen = _pruned(_chosen(which, settings, code=False), verb)
    place, plans = Lab(lab_folder(lab), readonly=True), dict[str, Json]()
    for case, each in _cases(chosen).items():
        found = place.recall(key(each))
        if found is None:
            raise SpecError(
                f"STUDY must have been run in the lab {place.folder} with these settings; got"
                f" {each.name}. Run it: windfall run {which}."
            )
        plans[case] = found
    return chosen, plans, place


def show(
    study: Which, settings: Settings | None = None, *, lab: str | Path | None = None
) -> Result:
    """What a study found, from the lab alone: no user's code runs, nothing is trained.

    Args:
        study: as in `run`.
        settings: as in `run`.
        lab: as in `run`.
    """
    return _told(study, settings, lab, None)


def pattern(
    study: Which, settings: Settings | None = None, *, lab: str | Path | None = None
) -> Json:
    """How much of each stage a study's pruned networks keep, from the lab alone.

    Args:
        study: as in `run`.
        settings: as in `run`.
        lab: as in `run`.

    Returns:
        The study's name and what `patterns.pattern` tells; of a suite, for each of its `cases`.
    """
    chosen, plans, place = _from_lab(study, settings, lab, "pattern")
    if not isinstance(chosen, Suite):
        return {"study": chosen.name, **patterns.pattern(Findings(plans[""], place))}
    found = dict[str, Json]()
    for case, plan in plans.items():
        try:
            found[case] = patterns.pattern(Findings(plan, place))
        except SpecError as problem:
            found[case] = {"reason": str(problem)}
    return {"study": chosen.name, "cases": found}


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
    return _told(study, settings, lab, Path(output))


def _told(
    study: Which, settings: Settings | None, lab: str | Path | None, page: Path | None
) -> Result:
    begun, chosen = time.monotonic(), _chosen(study, settings, code=False)
    if isinstance(chosen, LaboratoryStudy):
        return _exhibited(chosen, Lab(lab_folder(lab), readonly=True), begun, page=page)
    chosen, plans, place = _from_lab(study, settings, lab)
    return _result(chosen, plans, place, begun, page=page)


def export(
    which: Which,
    output: str | Path,
    settings: Settings | None = None,
    *,
    lab: str | Path | None = None,
) -> Export:
    """Write a run's network, made smaller, proved equal and measured.

    A network of your own is built by the function that the run names, as `run` does.

    Args:
        which: the beginning of a finished run's address; or a study, as in `run`, for its winner by
            validation accuracy.
        output: a file that ends in .safetensors, .pt2 or .onnx; without a suffix, all of them.
        settings: as in `run`; not with an address.
        lab: as in `run`.

    Raises:
        SpecError: when something given cannot be, or a format cannot say the network; no file is
            left of it.
    """
    if isinstance(which, str) and not _names_study(which):
        if settings:
            raise SpecError(f"`--set` must come with a STUDY; got it with {which!r}.")
        place = Lab(lab_folder(lab), readonly=True)
        return exports.export(place, _address(place, which), output)
    chosen, plans, place = _from_lab(which, settings, lab)
    won = {case: tables.winner(Findings(plan, place)) for case, plan in plans.items()}
    best = overview.winner(chosen, won) if isinstance(chosen, Suite) else won[""]
    if best["winner"] is None:
        raise SpecError(
            f"STUDY must have a finished run at the level of its verdicts, and one data set;"
            f" {chosen.name} has not. Run it, `windfall run {which}`, or name the RUN."
        )
    return exports.export(place, best["winner"], output)


def biases(which: str | Path, *, lab: str | Path | None = None) -> Json:
    """How many of a network's BatchNorm biases are negative, layer by layer.

    Of a run also what each ReLU passes of the validation part's inputs.

    Args:
        which: a file of tensors by name (.safetensors, .pt, .pth); one of `weights.PRETRAINED`; or
            the beginning of a finished run's address.
        lab: as in `run`.

    Returns:
        What `weights.Found.document` tells, and the `answer` in words.
    """
    found = weights.named(which)
    if found is None:
        place = Lab(lab_folder(lab), readonly=True)
        others = "a file of tensors, or a network that torchvision has trained"
        found = weights.trained(place, _address(place, str(which), others, weights.PRETRAINED))
    told = found.document()
    return told | {"answer": words.biases(told)}


def check(
    which: Any,
    settings: Settings | None = None,
    *,
    lab: str | Path | None = None,
    output: str | Path | None = None,
) -> Json:
    """What goes through a network, layer by layer, and what ails it.

    Args:
        which: a network's name in the zoo, a `Model`, a callable that returns an `nn.Module` or its
            name, `package.module:function`; or the beginning of a finished run's address.
        settings: of a `checkup.Checkup` by path, of a run those of a `checkup.Batch`.
        lab: as in `run`; of a run alone.
        output: the HTML file to write besides.

    Returns:
        What `checkup.examined` tells.

    Raises:
        SpecError: when there is no such network, or it cannot be built, called or differentiated.
    """
    if checkup.is_fresh(which):
        subject = checkup.fresh(checkup.checkup(which, settings or {}))
    else:
        place = Lab(lab_folder(lab), readonly=True)
        others = "a network of the zoo, or a function that makes one, `package.module:function`"
        address = _address(place, which, others, checkup.zoo())
        subject = checkup.of_run(place, address, settings or {})
    document = checkup.examined(subject)
    if output is not None:
        from windfall.depths import render as render_checkup

        _write(render_checkup(document), Path(output))
    return document


def _names_study(which: str) -> bool:
    return which in bundled() or Path(which).suffix == ".toml"


def _address(
    lab: Lab,
    prefix: str,
    others: str = "the name or .toml file of a study",
    known: Iterable[str] | None = None,
) -> str:
    """The address of the one finished run that begins with a prefix."""
    found = lab.matching(prefix) if prefix else []
    if len(found) == 1:
        return found[0]
    if found:
        raise SpecError(
            f"RUN must be the beginning of one run's address; {prefix!r} begins those of"
            f" {len(found):,}: {', '.join(address[:12] for address in found[:5])}"
            f"{', ...' if len(found) > 5 else ''}. Give more of it."
        )
    raise SpecError(
        f"RUN must be the beginning of a finished run's address in the lab {lab.folder}, or"
        f" {others}; got {prefix!r}.{nearest(prefix, [*(known or bundled())])}"
    )
