"""The showcase: a study of the laboratory as tables in a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from windfall import words
from windfall.spec import Json

COLOURS = {"supported": "green", "refuted": "red", "undecided": "yellow"}  # of verdicts


def laboratory(document: Json) -> RenderableType:
    """A study of the laboratory: the answer, its arms in every metric, its verdicts, notes."""
    answer = [Text(line, style="" if i else "bold") for i, line in enumerate(document["answer"])]
    rows = {(row["metric"], row["arm"]): row for row in document["arms"]}
    names = list(dict.fromkeys(arm for _, arm in rows))
    numbers = sorted({row["num_seeds"] for row in document["arms"]})
    told = ", ".join(map(str, numbers))
    table = Table(title=f"Mean and 95 % interval, n = {told}")
    table.add_column("metric")
    for name in names:
        table.add_column(name, justify="right")
    decided = {row["metric"] for row in document["verdicts"]}
    metrics = list(dict.fromkeys(metric for metric, _ in rows))
    chosen = [metric for metric in metrics if "/" not in metric or metric in decided]
    if len(chosen) < len(metrics):
        table.caption = f"{len(metrics) - len(chosen)} more, layer by layer: the page, or --json"
    for metric in chosen:
        cells = [rows.get((metric, name)) for name in names]
        table.add_row(metric, *("" if row is None else _mean(row) for row in cells))
    notes = [Text(f"Note: {note}", style="dim") for note in document["notes"]]
    failures = [
        Text(f"Failed: {each['arm']} seed {each['seed']}: {each['reason']}", style="red")
        for each in document["failures"]
    ]
    return Group(*answer, Text(), table, contrasts(document["verdicts"]), *notes, *failures)


def _mean(row: Json) -> str:
    if row["mean"] is None:
        return "-"
    ends = row["interval"]
    return f"{row['mean']:.4g}" + (f" [{ends[0]:.3g}, {ends[1]:.3g}]" if ends else "")


def contrasts(rows: list[Json]) -> Table:
    """The verdicts of a study of the laboratory, Holm-adjusted."""
    table = Table(title="Verdicts: Holm-adjusted, each interval at the level that decides")
    for name in ("effect", "compares", "metric"):
        table.add_column(name)
    for name in ("difference", "interval", "n", "p adjusted", "verdict"):
        table.add_column(name, justify="right")
    for row in rows:
        ends, word, p_value = row["interval"], row["verdict"], row["p_adjusted"]
        needed = f" (~{row['seeds_needed']:,} seeds)" if row["seeds_needed"] else ""
        table.add_row(
            row["effect"],
            f"{row['arm']} - {row['against']}",
            row["metric"] + (", lower" if row["is_lower"] else ""),
            "-" if row["difference"] is None else f"{row['difference']:+.4g}",
            "-" if ends is None else f"[{ends[0]:+.3g}, {ends[1]:+.3g}]",
            str(row["num_seeds"]),
            "-" if p_value is None else f"{p_value:.2g}",
            Text(word + needed, style=COLOURS[word]),
        )
    return table


def experiments(document: Json) -> Table:
    """What a study of the laboratory would train."""
    whole, workers = document["seconds"], document["workers"]
    left = "not known" if whole is None else words.duration(whole)
    table = Table(title="Experiments", caption=f"The rest with {workers} processes: {left}")
    for name in ("arm", "runs", "stored", "steps", "FLOPs a run", "a run on one core"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for row in document["laboratory"]:
        flops, seconds = f"{row['flops']:.3g}", row["seconds"]
        took = "-" if seconds is None else words.duration(seconds)
        numbers = (row["runs"], row["stored"], f"{row['steps']:,}", flops, took)
        table.add_row(row["arm"], *map(str, numbers))
    return table
