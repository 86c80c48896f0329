"""One function per figure: a plain table in, a matplotlib `Figure` out.

The tables are those of a study's document, as `page.render` takes it. An arm has one color and
one marker in every figure. A missing value (None) leaves a gap, never a guess. Nothing goes through
pyplot, so a figure belongs to its caller alone:

    figure = plots.accuracy(document["arms"])
    figure.savefig("accuracy.pdf")
"""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from windfall import drawing
from windfall.drawing import (
    COLORS,
    NARROW,
    WIDE,
    Number,
    Row,
    Table,
    look,
    percent,
    scaled,
)

_DECIDED = {"supported": "green", "refuted": "vermilion", "undecided": "orange"}
ALONE = ("guided", "transferred", "uniform-width")  # not pruned: no line from the dense network

_FADE = LinearSegmentedColormap.from_list("fade", [COLORS["leaf"] + "00", COLORS["leaf"]])


_WHEN = {
    "test_accuracy_at_early_stop": " at the early stop",
    "test_accuracy_at_start": " before any training",
}


@drawing.styled
def accuracy(rows: Table, *, metric: str = "test_accuracy", width_inches: float = WIDE) -> Figure:
    """Accuracy against the density of the network, one line per arm.

    The dense network is a dashed line across, its interval a band, and every arm's left-most point.

    Source: the form of Figure 1 of The Lottery Ticket Hypothesis (1803.03635).

    Args:
        rows: The document's `arms`: `arm`, `level`, `density` in (0, 1], `metric`, and `mean` and
            `interval` in [0, 1].
        metric: Which of their metrics to draw, an accuracy.
        width_inches: Width of the figure; its height and the number of tick labels follow.
    """
    figure, axes = _against_density(rows, metric, 100.0, width_inches)
    axes.set_title(f"Test accuracy{_WHEN.get(metric, '')} (%)")
    return figure


@drawing.styled
def early_stop(rows: Table, *, width_inches: float = WIDE) -> Figure:
    """The step of lowest validation loss against the density of the network, one line per arm.

    A mean that contains a run whose loss still fell at its last evaluation is a lower bound: its
    marker is hollow, and a footnote says so.

    Source: the form of Figure 4 of The Lottery Ticket Hypothesis (1803.03635).

    Args:
        rows: The document's `arms`, of which those of metric `early_stop_step` are drawn; `mean`
            and `interval` in optimizer steps, `num_censored` the number of lower bounds among them.
        width_inches: Width of the figure.
    """
    figure, axes = _against_density(rows, "early_stop_step", 1.0, width_inches)
    axes.set_title("Step of lowest validation loss")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    chosen = [row for row in rows if row["metric"] == "early_stop_step" and row["num_censored"]]
    for row in chosen:
        color, marker, _ = look(row["arm"])
        hollow: dict[str, Any] = {
            "color": COLORS[color],
            "markerfacecolor": COLORS["paper"],
            "zorder": 4,
        }
        axes.plot(row["density"], scaled([row["mean"]], 1.0), marker, label="_censored", **hollow)
    if chosen:
        note = "Hollow: the loss of some runs still fell at the last evaluation; a lower bound."
        figure.supxlabel(note, x=0.01, ha="left", fontsize=7, color=COLORS["muted"], wrap=True)
    return figure


@drawing.styled
def learning_curves(curves: Table, *, width_inches: float = WIDE) -> Figure:
    """Validation loss and test accuracy against the step, one row of panels per level.

    At most three levels are drawn, the first, the middle and the last of those given; the dense
    network is in every panel. The vertical range is that of the curves after a quarter of the
    evaluations, so the first fall may leave the frame.

    Args:
        curves: The document's `curves`: `arm`, `level`, `density`, `steps`, and for
            `validation_loss` and `test_accuracy` in [0, 1] the lists `mean`, `low` and `high`.
        width_inches: Width of the figure.
    """
    drawn = drawing.spread(sorted({row["level"] for row in curves if row["level"]}), 3) or [0]
    size = (width_inches, 0.6 + len(drawn) * (1.6 if width_inches > NARROW else 1.4))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(drawn), 2, sharex=True, sharey="col", squeeze=False)
    for level, (loss, test) in zip(drawn, panels, strict=True):
        chosen = [row for row in drawing.in_order(curves) if row["level"] in {0, level}]
        _over_steps(loss, chosen, "validation_loss", 1.0)
        _over_steps(test, chosen, "test_accuracy", 100.0)
        for row in ([row for row in chosen if row["level"]] or chosen)[:1]:
            kept = f"{percent(row['density'])} kept"
            loss.text(0.98, 0.92, kept, transform=loss.transAxes, ha="right", va="top")
    panels[0, 0].set_title("Validation loss")
    panels[0, 1].set_title("Test accuracy (%)")
    _frame_late_steps(panels[0, 0], curves, "validation_loss", 1.0)
    _frame_late_steps(panels[0, 1], curves, "test_accuracy", 100.0)
    for axes in panels[-1]:
        axes.set_xlabel("Step")
    drawing.legend(figure, panels[:, 0], width_inches)
    return figure


@drawing.styled
def layer_densities(layers: Table, *, width_inches: float = WIDE) -> Figure:
    """How much of each layer is left, a bar per layer and a panel per level.

    At most four levels are drawn (two where the figure is narrow), evenly chosen from those given.

    Args:
        layers: The document's `layers`: `level`, `layer`, `kept` and `total`, numbers of what
            `unit` says, weights if it is absent.
        width_inches: Width of the figure.
    """
    names = list(dict.fromkeys(row["layer"] for row in layers))
    levels = sorted({row["level"] for row in layers if row["level"]} or {0})
    chosen = drawing.spread(levels, 4 if width_inches > NARROW else 2)
    labels = [drawing.literal(name, int(5 * width_inches)) for name in names]
    height = 0.6 + 0.23 * max(3, len(names))
    figure = Figure(figsize=(width_inches, height), layout="constrained")
    panels = figure.subplots(1, len(chosen), sharex=True, sharey=True, squeeze=False)[0]
    for level, axes in zip(chosen, panels, strict=True):
        rows = [row for row in layers if row["level"] == level]
        places = [names.index(row["layer"]) for row in rows]
        kept = [row["kept"] / max(1, row["total"]) for row in rows]
        axes.barh(places, [100 * each for each in kept], height=0.62, color=COLORS["leaf"])
        for place, each in zip(places, kept, strict=True):
            axes.text(100 * each + 2, place, percent(each), va="center_baseline", fontsize=7)
        total = max(1, sum(row["total"] for row in rows))
        share = percent(sum(row["kept"] for row in rows) / total)
        of = next(
            (f" of {row['unit']}" for row in rows if row.get("unit", "weights") != "weights"), ""
        )
        axes.set_title(f"Level {level}, {share}{of}")
        axes.set(xlim=(0, 125), ylim=(len(names) - 0.4, -0.6), xticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.set_yticks(range(len(names)), labels)
        axes.tick_params(axis="y", length=0, labelcolor=COLORS["ink"])
    return figure


@drawing.styled
def mask_pictures(pictures: Table, *, width_inches: float = WIDE) -> Figure:
    """Where the surviving weights of the first layer are: the stronger the color, the more.

    Each picture has its own scale, from none to the largest count at any position, which is
    printed under it. At most five are drawn (three where the figure is narrow), evenly chosen.

    Args:
        pictures: The document's `pictures`: `level`, `density`, `layer`, and `counts`, the number
            of surviving weights per input position (height, width), or a two-dimensional mask.
        width_inches: Width of the figure.
    """
    columns = 5 if width_inches > NARROW else 3
    chosen = drawing.spread(pictures, columns)
    figure = Figure(figsize=(width_inches, width_inches / columns + 0.35), layout="constrained")
    several_layers = len({picture["layer"] for picture in chosen}) > 1
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.set_axis_off()
    for picture, axes in zip(chosen, panels, strict=False):
        counts = np.asarray(picture["counts"], dtype=float)
        top = counts.max(initial=0.0)
        axes.imshow(counts, cmap=_FADE, vmin=0, vmax=top or 1, interpolation="none")
        layer = drawing.literal(picture["layer"], 17) + "\n" if several_layers else ""
        axes.set_title(f"{layer}Level {picture['level']}, {percent(picture['density'])}")
        muted = {"va": "top", "fontsize": 7, "color": COLORS["muted"]}
        axes.text(0, -0.04, f"most: {top:,.0f}", transform=axes.transAxes, **muted)
    return figure


@drawing.styled
def pattern(layers: Table, *, stages: Table = (), width_inches: float = WIDE) -> Figure:
    """How much of each layer stays, a bar per layer, a line across each stage, a point per seed.

    Stages stand side by side; channels that residual blocks add to are lighter. Points are left out
    where there are more than 40 layers.

    Source: after section 5 of Rethinking the Value of Network Pruning (1810.05270).

    Args:
        layers: The document's `pattern.layers`: `layer`, `stage` from 1, `is_shared`, and `kept`,
            a fraction for each seed.
        stages: The document's `pattern.stages`: `stage` and `mean`, what stays of it in all.
        width_inches: Width of the figure.
    """
    figure = Figure(figsize=(width_inches, 2.4), layout="constrained")
    axes = figure.subplots()
    rows = sorted(layers, key=lambda row: row["stage"])
    means = {row["stage"]: row["mean"] for row in stages}
    ends: dict[int, list[float]] = {}
    for index, row in enumerate(rows):
        place = index + row["stage"]  # a bar's width between two stages
        ends.setdefault(row["stage"], []).append(place)
        _draw_kept(axes, place, row, is_roomy=len(rows) <= 40)
    for stage, places in ends.items():
        span = places[0] - 0.45, places[-1] + 0.45
        if stage in means:
            axes.hlines(100 * means[stage], *span, color=COLORS["ink"], linewidth=1.1, zorder=3)
            bold: dict[str, Any] = {"ha": "center", "fontsize": 7.5, "fontweight": "bold"}
            axes.text(sum(span) / 2, 108, percent(means[stage]), **bold)
    axes.set(ylim=(0, 122), title="Kept of each layer (%)")
    axes.set_axisbelow(True)
    drawing.quiet(axes, 5)
    axes.yaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
    word = "Stage " if width_inches > NARROW else ""
    middles = [(places[0] + places[-1]) / 2 for places in ends.values()]
    axes.set_xticks(middles, [f"{word}{stage}" for stage in ends])
    axes.set_xlabel("" if word else "Stage")
    axes.tick_params(axis="x", length=0, labelcolor=COLORS["ink"])
    return figure


def _draw_kept(axes: Axes, place: float, row: Row, *, is_roomy: bool) -> None:
    alpha = 0.45 if row["is_shared"] else 1.0
    mean = 100 * float(np.mean(row["kept"]))
    axes.bar(place, mean, width=0.8, color=COLORS["leaf"], alpha=alpha, linewidth=0)
    if is_roomy:
        points = [100 * kept for kept in row["kept"]]
        axes.plot([place] * len(points), points, ".", color=COLORS["ink"], markersize=2.6)


@drawing.styled
def kernels(stages: Table, *, width_inches: float = WIDE) -> Figure:
    """How many weights stay at each position of the 3 x 3 kernels, a grid per stage.

    All grids have one scale, from none to the largest fraction.

    Source: the form of Figure 5 of Rethinking the Value of Network Pruning (1810.05270).

    Args:
        stages: The document's `pattern.stages`: `stage` from 1, and `kernel`, three rows of three
            fractions.
        width_inches: Width of the figure.
    """
    size = (width_inches, width_inches / max(5, len(stages)) + 0.35)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, max(5, len(stages)), squeeze=False)[0]
    top = max((value for row in stages for line in row["kernel"] for value in line), default=0)
    for axes in panels:
        axes.set_axis_off()
    for row, axes in zip(stages, panels, strict=False):
        values = np.asarray(row["kernel"], dtype=float)
        axes.imshow(values, cmap=_FADE, vmin=0, vmax=top or 1, interpolation="none")
        axes.set_title(f"Stage {row['stage']}")
        for place, value in np.ndenumerate(values):
            is_dark = value > 0.8 * top
            color = COLORS["paper" if is_dark else "ink"]
            told = {"ha": "center", "va": "center_baseline", "fontsize": 7, "color": color}
            axes.text(place[1], place[0], f"{100 * value:.3g}", **told)
    return figure


@drawing.styled
def overlap(rows: Table, *, width_inches: float = WIDE) -> Figure:
    """How much two masks agree against their density: of the whole network, then of each layer.

    Args:
        rows: The document's `arms` of a study of overlap: metrics `mask_overlap` and
            `mask_overlap/<layer>`, `mean` and `interval` in [0, 1], 1 where the masks are the same.
        width_inches: Width of the figure.
    """
    of_masks = (row["metric"] for row in rows if row["metric"].startswith("mask_overlap"))
    metrics = list(dict.fromkeys(of_masks)) or ["mask_overlap"]
    columns = min(len(metrics), 3 if width_inches > NARROW else 2)
    lines = math.ceil(len(metrics) / columns)
    height = 0.6 + lines * (2.6 if columns == 1 else 1.9)
    figure = Figure(figsize=(width_inches, height), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for metric, axes in zip(metrics, panels, strict=False):
        _draw_arms(axes, rows, metric, 1.0, 0.9 * width_inches / columns)
        axes.set_title(drawing.literal(f"Overlap, {metric.partition('/')[2] or 'whole network'}"))
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    drawing.legend(figure, panels, width_inches)
    return figure


@drawing.styled
def forest(rows: Table, *, width_inches: float = WIDE) -> Figure:
    """Every effect's difference in every case with the interval that decides it, a panel an effect.

    Args:
        rows: The verdicts of a suite: `case`, `effect`, `arm`, `against`, `metric`, `difference`
            and `interval` in the metric's unit, `verdict`; the margin is `margin`.
        width_inches: Width of the figure.
    """
    effects = list(dict.fromkeys(row["effect"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    columns = min(len(effects), 3 if width_inches > NARROW else 1)
    lines = math.ceil(len(effects) / columns)
    figure = Figure(
        figsize=(width_inches, 0.3 + lines * (0.62 + 0.19 * len(cases))), layout="constrained"
    )
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for effect, axes in zip(effects, panels, strict=False):
        _draw_differences(axes, [row for row in rows if row["effect"] == effect], cases)
    for axes in panels[len(effects) :]:
        axes.set_axis_off()
    return figure


def _against_density(
    rows: Table, metric: str, scale: float, width_inches: float
) -> tuple[Figure, Axes]:
    height = 3.4 if width_inches > NARROW else 3.0
    figure = Figure(figsize=(width_inches, height), layout="constrained")
    axes = figure.subplots()
    _draw_arms(axes, rows, metric, scale, width_inches - 1.2)
    _name_the_ends(axes, width_inches - 1.2)
    return figure, axes


def _draw_arms(axes: Axes, rows: Table, metric: str, scale: float, inches: float) -> None:
    """Every arm's line, begun at the dense network; `inches` is about the length of the axis."""
    rows = drawing.in_order(row for row in rows if row["metric"] == metric)
    dense = [row for row in rows if row["arm"] == "dense"]
    for row in dense:
        _draw_dense(axes, row, scale)
    for arm in dict.fromkeys(row["arm"] for row in rows if row["arm"] != "dense"):
        begun = [] if arm in ALONE else dense
        points = begun + [row for row in rows if row["arm"] == arm]
        density = [row["density"] for row in points]
        mean = scaled([row["mean"] for row in points], scale)
        intervals = [row["interval"] or (None, None) for row in points]
        low, high = (scaled([ends[side] for ends in intervals], scale) for side in (0, 1))
        color, marker = COLORS[look(arm).color], look(arm).marker
        axes.fill_between(density, low, high, color=color, alpha=0.12, linewidth=0)
        axes.vlines(density, low, high, color=color, alpha=0.55, linewidth=0.9)
        axes.plot(density, mean, color=color, marker=marker, label=arm)
    _density_axis(axes, [row["density"] for row in rows], inches)


def _draw_dense(axes: Axes, row: Row, scale: float) -> None:
    color = COLORS[look("dense").color]
    mean = scaled([row["mean"]], scale)
    if row["interval"] is not None:
        low, high = scaled(row["interval"], scale)
        axes.axhspan(low, high, color=color, alpha=0.13, linewidth=0)
    axes.axhline(mean[0], color=color, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.plot([row["density"]], mean, "o", color=color, label="dense", zorder=3)


def _density_axis(axes: Axes, densities: list[Number], inches: float) -> None:
    """Logarithmic, from all the weights on the left to few on the right; labels where they fit."""
    ticks = sorted(set(densities), reverse=True) or [1.0]
    span = math.log(ticks[0] / ticks[-1]) or 1.0
    shown = ticks[:1]
    for tick in ticks[1:]:
        if math.log(shown[-1] / tick) > 0.38 * span / inches:
            shown.append(tick)
    axes.set_xscale("log")
    axes.set_xlim(ticks[0] * math.exp(0.03 * span), ticks[-1] * math.exp(-0.03 * span))
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{100 * tick:.3g}"))
    axes.xaxis.set_minor_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("Weights remaining (%)")
    drawing.quiet(axes, 6)


def _name_the_ends(axes: Axes, inches: float) -> None:
    """Names and markers right of the plot, each as near to its line's end as the others allow."""
    low, high = axes.set_ylim(axes.get_ylim())
    ends: list[tuple[float, str]] = []
    for arm, line in drawing.lines([axes]).items():
        values = np.asarray(line.get_ydata(), dtype=float)
        ends += [((value - low) / (high - low), arm) for value in values[np.isfinite(values)][-1:]]
    ends.sort()
    for (_, arm), place in zip(ends, drawing.apart([end for end, _ in ends], 0.068), strict=True):
        color, marker, words = look(arm)
        beside: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
        x = 1 + 0.13 / inches
        axes.plot(x, place, marker, color=COLORS[color], label="_name", **beside)
        axes.text(x + 0.1 / inches, place, drawing.literal(words), va="center_baseline", **beside)


def _draw_differences(axes: Axes, rows: list[Row], cases: list[str]) -> None:
    scale = 100.0 if rows[0]["metric"].startswith("test_accuracy") else 1.0
    margin = scale * rows[0]["margin"]
    axes.axvspan(-margin, margin, color=COLORS["grid"], linewidth=0)
    axes.axvline(0, color=COLORS["muted"], linewidth=0.8)
    for row in rows:
        if row["difference"] is None:
            continue
        place, color = cases.index(row["case"]), COLORS[_DECIDED[row["verdict"]]]
        if row["interval"] is not None:
            ends = scaled(row["interval"], scale)
            axes.plot(ends, [place, place], color=color, label="_interval")
        face = COLORS["paper"] if row["verdict"] == "undecided" else color
        value = scale * row["difference"]
        axes.plot(value, place, "o", color=color, markerfacecolor=face, label="_difference")
    unit = "pp" if scale > 1 else "steps"
    axes.set_title(drawing.literal(f"{rows[0]['arm']} - {rows[0]['against']} ({unit})", 40))
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_yticks(range(len(cases)), [drawing.literal(case) for case in cases])
    axes.grid(axis="x", color=COLORS["grid"], linewidth=0.7)
    axes.tick_params(which="both", color=COLORS["grid"], labelcolor=COLORS["muted"], labelsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _over_steps(axes: Axes, curves: list[Row], name: str, scale: float) -> None:
    for row in curves:
        color = COLORS[look(row["arm"]).color]
        low, mean, high = (scaled(row[name][side], scale) for side in ("low", "mean", "high"))
        axes.fill_between(row["steps"], low, high, color=color, alpha=0.13, linewidth=0)
        axes.plot(row["steps"], mean, color=color, linewidth=1.2, label=row["arm"])
    drawing.quiet(axes, 4)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _frame_late_steps(axes: Axes, curves: Table, name: str, scale: float) -> None:
    parts = (row[name][side][len(row["steps"]) // 4 :] for row in curves for side in row[name])
    late = [scale * value for part in parts for value in part if value is not None]
    if late and max(late) > min(late):
        room = 0.05 * (max(late) - min(late))
        axes.set_ylim(min(late) - room, max(late) + room)
