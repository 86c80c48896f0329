"""Display: progress and tables in a terminal."""

import contextlib
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from windfall import schedule, words
from windfall.spec import Json
from windfall.words import duration

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal to draw on
_COLOURS = {"supported": "green", "refuted": "red", "undecided": "yellow"}


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
    for column in ("effect", "compares", "difference", "interval", "n", "p adjusted", "verdict"):
        table.add_column(column, justify="left" if column in ("effect", "compares") else "right")
    for row in document["verdicts"]:
        told = words.interval(row).removesuffix(f", n = {row['num_seeds']}").split(" [")
        word = row["verdict"]
        needed = f" (~{row['seeds_needed']:,} seeds)" if row["seeds_needed"] else ""
        p_value = row["p_adjusted"]
        table.add_row(
            row["effect"],
            f"{row['arm']} - {row['against']}",
            told[0],
            f"[{told[1]}" if len(told) > 1 else "-",
            str(row["num_seeds"]),
            "-" if p_value is None else f"{p_value:.2g}",
            Text(word + needed, style=_COLOURS[word]),
        )
    return table


def result(document: Json) -> RenderableType:
    """The answer in words, the tables behind it, and the notes."""
    answer = [
        Text(sentence, style="bold" if i == 0 else "")
        for i, sentence in enumerate(document["answer"])
    ]
    estimate = words.estimate(document.get("estimate"))
    told = [*document["notes"], *([] if estimate is None else [estimate])]
    notes = [Text(f"Note: {note}", style="dim") for note in told]
    failures = [
        Text(f"Failed: {f['arm']} level {f['level']} seed {f['seed']}: {f['reason']}", style="red")
        for f in document["failures"]
    ]
    return Group(*answer, Text(), arms(document), verdicts(document), *notes, *failures)


def plan(document: Json) -> RenderableType:
    """What a study needs, what is stored, and what the rest costs."""
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
    told = (
        f"{runs['missing']} runs to train, {document['flops']:.2e} FLOPs on surviving weights,"
        f" about {duration(document['seconds_estimate'])}"
        f" (an estimate from {document['estimate_from']})."
    )
    reason = document["engine_reason"]
    why = [] if reason is None else [Text(f"Note: {reason}", style="dim")]
    return Group(table, Text(told), *why)


def pattern(document: Json) -> RenderableType:
    """What stays of each stage, and the settings that make a design of it."""
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
