"""Display: progress and tables in a terminal."""

import contextlib
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from windfall import schedule, showcase, words
from windfall.showcase import COLOURS
from windfall.spec import Json
from windfall.words import duration

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal to draw on


def _remaining(progress: schedule.Progress) -> str:
    seconds = progress.remaining_seconds
    return "" if seconds is None else f"about {duration(seconds)} left"


@contextlib.contextmanager
def watching(name: str) -> Generator[Callable[[schedule.Progress], None]]:
    """Progress on standard error: a bar in a terminal, else a line every ten seconds."""
    console = Console(stderr=True)
    show = _bar if console.is_terminal else _lines
    with show(name, console) as update:
        yield update


@contextlib.contextmanager
def _bar(name: str, console: Console) -> Generator[Callable[[schedule.Progress], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=None, told="")

        def update(progress: schedule.Progress) -> None:
            if progress.message:
                bar.console.print(progress.message)
            told = f"{progress.finished} of {progress.total} runs  {_remaining(progress)}"
            bar.update(task, total=max(1, progress.work), completed=progress.worked, told=told)

        yield update


@contextlib.contextmanager
def _lines(name: str, console: Console) -> Generator[Callable[[schedule.Progress], None]]:
    del console
    told = time.monotonic() - LINE_SECONDS + min(2.0, LINE_SECONDS)

    def update(progress: schedule.Progress) -> None:
        nonlocal told
        if progress.message:
            print(f"{name}: {progress.message}", file=sys.stderr, flush=True)
        if time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            line = f"{name}: {progress.finished} of {progress.total} runs, {_remaining(progress)}"
            print(line.removesuffix(", "), file=sys.stderr, flush=True)

    yield update


def _value(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    if metric.startswith("test_accuracy"):
        return f"{100 * value:.2f}"
    return f"{value:,.0f}" if metric == "early_stop_step" else f"{value:.3f}"


def _spread(row: Json) -> str:
    told = _value(row["mean"], row["metric"])
    if row["interval"] is not None:
        ends = [_value(end, row["metric"]) for end in row["interval"]]
        told += f" [{ends[0]}, {ends[1]}]"
    return told + (" *" if row["num_censored"] or row["num_diverged"] else "")


def arms(document: Json) -> Table:
    """The table of arms: one row per level, one column per arm, in the study's metric."""
    metric = document["settings"]["metric"]
    rows = [row for row in document["arms"] if row["metric"] == metric]
    names = list(dict.fromkeys(row["arm"] for row in rows))
    unit = ", %" if metric.startswith("test_accuracy") else ""
    numbers = {row["num_seeds"] for row in rows}
    told = f"n = {', '.join(map(str, sorted(numbers)))}"
    table = Table(title=f"{words.metric_name(metric)}{unit}: mean and 95 % interval, {told}")
    table.add_column("level", justify="right")
    table.add_column("weights", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for level in sorted({row["level"] for row in rows}):
        here = {row["arm"]: row for row in rows if row["level"] == level}
        density = next(iter(here.values()))["density"]
        cells = [_spread(here[name]) if name in here else "" for name in names]
        table.add_row(str(level), words.percent(density), *cells)
    if any(row["num_censored"] or row["num_diverged"] for row in rows):
        table.caption = "* some runs are censored or diverged: see the notes"
    return table


def verdicts(document: Json) -> Table:
    """The table of verdicts, Holm-adjusted."""
    table = Table(title="Verdicts: Holm-adjusted, each interval at the level that decides")
    numbers = ("difference", "interval", "n", "p adjusted", "FLOPs ratio", "verdict")
    is_suite = "cases" in document
    for column in (*(("case",) if is_suite else ()), "effect", "compares"):
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
    for row in document["verdicts"]:
        told = words.interval(row).removesuffix(f", n = {row['num_seeds']}").split(" [")
        word = row["verdict"]
        needed = f" (~{row['seeds_needed']:,} seeds)" if row["seeds_needed"] else ""
        p_value = row["p_adjusted"]
        ratio = row["budget_ratio"]
        table.add_row(
            *((row["case"],) if is_suite else ()),
            row["effect"],
            f"{row['arm']} - {row['against']}",
            told[0],
            f"[{told[1]}" if len(told) > 1 else "-",
            str(row["num_seeds"]),
            "-" if p_value is None else f"{p_value:.2g}",
            "-" if ratio is None else f"{ratio:.3g}",
            Text(word + needed, style=COLOURS[word]),
        )
    return table


def budgets(document: Json) -> Table:
    """What each arm was granted at the level of the verdicts, means over seeds."""
    settings = document["settings"]
    shown = (0, settings["verdict_level"] or settings["levels"])
    table = Table(title="Budgets: what was granted for training, means over seeds")
    for column in ("arm", "weights", "multiply-adds", "steps", "FLOPs", "of dense"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    rows = [row for row in document["arms"] if row["metric"] == settings["metric"]]
    dense = next((row["flops"] for row in rows if row["level"] == 0), None)
    for row in (row for row in rows if row["level"] in shown):
        table.add_row(
            row["arm"],
            words.percent(row["density"]),
            f"{row['multiply_adds']:,.0f}",
            f"{row['steps']:,.0f}",
            f"{row['flops']:.3g}",
            "-" if not dense else f"{row['flops'] / dense:.3g}",
        )
    return table


def result(document: Json) -> RenderableType:
    """The answer in words, the tables behind it, and the notes."""
    if "experiment" in document.get("settings", {}):
        return showcase.laboratory(document)
    answer = [
        Text(sentence, style="bold" if i == 0 else "")
        for i, sentence in enumerate(document["answer"])
    ]
    estimate = words.estimate(document.get("estimate"))
    told = [*document["notes"], *([] if estimate is None else [estimate])]
    notes = [Text(f"Note: {note}", style="dim") for note in told]
    failures = [
        Text(
            f"Failed: {_case(f)}{f['arm']} level {f['level']} seed {f['seed']}: {f['reason']}",
            style="red",
        )
        for f in document["failures"]
    ]
    if "cases" in document:
        each = [
            Group(Text(f"\n{case}", style="bold"), arms(found), budgets(found))
            for case, found in document["cases"].items()
        ]
        return Group(*answer, *each, Text(), verdicts(document), *notes, *failures)
    tables = arms(document), budgets(document), verdicts(document)
    return Group(*answer, Text(), *tables, *notes, *failures)


def _case(row: Json) -> str:
    return f"{row['case']}, " if "case" in row else ""


def plan(document: Json) -> RenderableType:
    """What a study, or suite, needs, what is stored, and what the rest costs."""
    if "laboratory" in document:
        return showcase.experiments(document)
    runs = document["runs"]
    told = (
        f"{runs['missing']} runs to train, {document['flops']:.2e} FLOPs on surviving weights,"
        f" about {duration(document['seconds_estimate'])}"
        f" (an estimate from {document['estimate_from']})."
    )
    reason = document["engine_reason"]
    why = [] if reason is None else [Text(f"Note: {reason}", style="dim")]
    cases = document.get("cases", {"": document})
    tables = [each for one in cases.values() for each in (_planned(one), *_prospects(one))]
    return Group(*tables, Text(told), *why)


def _prospects(document: Json) -> list[RenderableType]:
    """How fast the network would be without its channels, and where that is no faster."""
    rows = document.get("latency", [])
    if not rows:
        return []
    table = Table(
        title="A pass through what would stay, untrained, timed here on one thread",
        caption=Text("median [quartiles], of ratios [95 % interval]"),
    )
    for column in ("level", "batch", "FLOPs ratio", "dense", "smaller", "time ratio", "it is"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["ratio"]["interval"]
        table.add_row(
            str(row["level"]),
            str(row["batch_size"]),
            f"{row['flops_ratio']:.3g}",
            *(escape(_milliseconds(row[name])) for name in ("before", "after")),
            escape(f"{row['ratio']['median']:.3f} [{low:.3f}, {high:.3f}]"),
            "not faster" if row["after_is"] == "same" else row["after_is"],
        )
    return [table]


def _planned(document: Json) -> Table:
    runs = document["runs"]
    table = Table(
        title=f"{document['study']['name']}: {runs['total']} runs, {runs['stored']} stored"
    )
    for column in (
        "level",
        "weights",
        "density",
        "arm",
        "engine",
        "runs",
        "stored",
        "steps",
        "FLOPs",
        "s (est.)",
    ):
        table.add_column(column, justify="left" if column in ("arm", "engine") else "right")
    for row in document["rows"]:
        table.add_row(
            str(row["level"]),
            f"{row['weights']:,}",
            words.percent(row["density"]),
            row["arm"],
            row["engine"],
            str(row["runs"]),
            str(row["stored"]),
            f"{row['steps']:,}",
            f"{row['flops']:.2e}",
            f"{row['seconds_estimate']:,.{1 if row['seconds_estimate'] < 10 else 0}f}",
        )
    return table


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "-"
    return (
        f"{num_bytes / 2**20:,.2f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.1f} KiB"
    )


def _milliseconds(row: Json) -> str:
    low, high = (1e3 * end for end in row["quartiles"])
    return f"{1e3 * row['median']:.3g} ms [{low:.3g}, {high:.3g}]"


def _ratio(before: float | None, after: float | None) -> str:
    return "-" if not before or after is None else f"{after / before:.3f}"


def _pair(row: Json, told: Callable[[Any], str]) -> tuple[str, str, str]:
    before, after = row["before"], row["after"]
    return told(before), told(after), _ratio(before, after)


def export(document: Json) -> RenderableType:
    """What was written, what it was proved to be, and what it costs beside the dense network."""
    run, memory = document["run"], document["memory"]
    title = f"{run['model']}, level {run['level']}, seed {run['seed']}: run {run['address'][:12]}"
    rounds = words.listed(str(row["num_rounds"]) for row in document["latency"])
    caption = (
        f"median [quartiles], of ratios [95 % interval]; {rounds} rounds in turn,"
        f" {document['threads']} thread, CPU"
    )
    table = Table(title=Text(title), caption=Text(caption))
    for column in ("", "dense", "exported", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("weights", *_pair(document["weights"], "{:,}".format))
    table.add_row("FLOPs of an input", *_pair(document["flops"], "{:.2e}".format))
    table.add_row("parameters and buffers", *_pair(memory["tensors"], _size))
    for row in memory["activations"]:
        table.add_row(f"most held in a pass of {row['batch_size']}", *_pair(row, _size))
    for row in document["latency"]:
        told = [_milliseconds(row[name]) for name in ("before", "after")]
        low, high = row["ratio"]["interval"]
        ratio = f"{row['ratio']['median']:.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(f"a pass of {row['batch_size']}", *map(escape, (*told, ratio)))
    return Group(table, *(Text(line) for line in _handed_over(document)), *_dim(document["notes"]))


def _handed_over(document: Json) -> list[str]:
    proofs = [
        f"{row['format']}: loaded again, its outputs differ by at most {row['difference']:.1e}"
        f" on {row['num_inputs']} inputs ({document['inputs']['from']})."
        for row in document["proofs"]
    ]
    return [
        _lost(document["channels"]),
        *proofs,
        *(f"Written: {path}" for path in document["files"]),
    ]


def _lost(groups: list[Json], most: int = 4) -> str:
    lost = [row for row in groups if row["after"] < row["before"]]
    if not lost:
        return "Channels: all are kept."
    if len(lost) <= most:
        told = (f"{row['group']} {row['before']} -> {row['after']}" for row in lost)
        return f"Channels: {', '.join(told)}."
    before, after = (sum(row[side] for row in groups) for side in ("before", "after"))
    return f"Channels: {before:,} -> {after:,}, in {len(lost)} of {len(groups)} groups."


def _dim(notes: list[str]) -> list[Text]:
    return [Text(f"Note: {note}", style="dim") for note in notes]


def biases(document: Json) -> RenderableType:
    """Of every BatchNorm layer the signs of its biases, and what the ReLU that reads it passes."""
    names = ["biases", "negative", "zero", "negative, %", "read by ReLU", "which passes, %"]
    of = document["of"]
    title = f"BatchNorm biases of {of.get('name') or of.get('file') or of['address'][:12]}"
    table = Table("layer", title=Text(title), caption="-: layer and ReLU without the other")
    if not document["relus"]:
        names, table.caption = names[:4], None
    for name in names:
        table.add_column(name, justify="right")
    others = [row for row in document["relus"] if row["norm"] is None]
    for row in [*document["layers"], *others]:
        table.add_row(*map(escape, _signs(row)[: len(names) + 1]))
    return Group(table, *(Text(line) for line in document["answer"]), *_dim(document["notes"]))


def _signs(row: Json) -> list[str]:
    counts = [
        f"{row[name]:,}" for name in ("num_biases", "num_negative", "num_zero") if name in row
    ]
    share = f"{100 * row['negative']:.1f}" if "negative" in row else ""
    relu = [row["relu"], f"{100 * row['passes']:.1f}"] if row["relu"] else ["-", "-"]
    return [row.get("layer", "-"), *(counts or [""] * 3), share, *relu]


def pattern(document: Json) -> RenderableType:
    """What stays of each stage, and the settings that make a design of it."""
    cases = document.get("cases", {})
    if cases:
        return Group(*(pattern({"study": case, **each}) for case, each in cases.items()))
    if "reason" in document:
        return Text(f"{document['study']}: {document['reason']}", style="dim")
    number = len(document["runs"])
    told = f"kept of each stage's {document['unit']} at level {document['level']}, n = {number}"
    table = Table(title=f"{document['study']}: {told}")
    for column in ("stage", "mean", "least", "most"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for part in ("stages", "shared"):
        for row in document[part]:
            name = f"{row['stage']}{', shared' if part == 'shared' else ''}"
            table.add_row(name, *(words.percent(row[key]) for key in ("mean", "low", "high")))
    if document["settings"] is None:
        return Group(table, Text("A design has fewer channels; these networks lost weights."))
    pairs = " ".join(f"--set '{pair}'" for pair in document["settings"])
    return Group(table, Text("As a design, in any study of such a network:"), Text(pairs))


def show(renderable: Any) -> None:
    """Print to standard output, wide enough for the tables when it is not a terminal."""
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(renderable)
