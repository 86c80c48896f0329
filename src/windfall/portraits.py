"""Portraits: figures of what happens between teachers and students.

Each takes courses, and returns a matplotlib `Figure`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from windfall import drawing, dynamics, luck, stats
from windfall.course import COUPLINGS, Course
from windfall.drawing import COLORS, NARROW, WIDE
from windfall.dynamics import THRESHOLDS
from windfall.measures import Readings

_ARMS = ("muted", "sky", "green", "blue", "violet", "vermilion", "orange", "pink", "brown")
_BARS = 10  # of a histogram

_SYMBOLS = ("β", "β*", "H", "H*", "L", "L*")  # of COUPLINGS

Courses = Mapping[str, Sequence[Course]]


def color(place: int) -> str:
    """The color of the arm at this place of a study."""
    return COLORS[_ARMS[place % len(_ARMS)]]


def _panels(
    num: int, width_inches: float, height: float, *, is_shared: bool = True
) -> tuple[Figure, list[Axes]]:
    columns = min(num, 4 if width_inches > NARROW else 2)
    rows = -(-num // columns)
    figure = Figure(figsize=(width_inches, 0.5 + rows * height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=is_shared).ravel()
    for axes in panels[num:]:
        axes.set_axis_off()
    return figure, list(panels[:num])


def _stepped(axes: Axes, title: str) -> None:
    """A panel over steps: their axis is logarithmic, with the start at its left end."""
    axes.set_title(title)
    axes.set_xscale("log")
    axes.grid(visible=True, axis="y", color=COLORS["grid"], linewidth=0.6)
    axes.tick_params(length=0)
    axes.set_xlabel("Step")


def _steps(steps: Tensor) -> Any:
    return np.maximum(steps.numpy(), 0.7)


def _band(
    axes: Axes, places: Any, values: Sequence[Tensor], paint: str, label: str, style: str = "-"
) -> None:
    """A line of means over seeds, and the band of their 95 % intervals, where all are finite."""
    if not values:
        return
    whole = torch.stack(list(values)).double().numpy()
    is_known = np.isfinite(whole).all(0)
    places, whole = np.asarray(places)[is_known], whole[:, is_known]
    axes.plot(places, whole.mean(0), style, color=paint, label=label)
    intervals = [stats.mean_interval(column.tolist()) for column in whole.T]
    if intervals and None not in intervals:
        low, high = np.array(intervals).T
        axes.fill_between(places, low, high, color=paint, alpha=0.18, linewidth=0)


Line = tuple[Any, list[Tensor]]  # places on the horizontal axis, and the values of every seed


def _arms(
    axes: Axes,
    found: Mapping[str, Sequence[Any]],
    line: Callable[[list[Any]], Line],
    style: str = "-",
) -> None:
    """A band for each arm, of what `line` makes of those of its seeds that did not diverge."""
    for place, (arm, each) in enumerate(found.items()):
        if whole := _whole(each):
            _band(axes, *line(whole), color(place), arm, style)


def _whole(each: Sequence[Any]) -> list[Any]:
    return [found for found in each if not found.diverged]


def _layers(courses: Courses) -> list[str]:
    return next(iter(courses.values()))[0].layers


def _by_step(
    courses: Courses, width_inches: float, value: Callable[[Course, str], Tensor]
) -> tuple[Figure, list[Axes]]:
    """A panel for each hidden layer, with a band for each arm of what `value` gives by step."""
    layers = _layers(courses)
    figure, panels = _panels(len(layers), width_inches, 1.9)
    for layer, axes in zip(layers, panels, strict=True):

        def line(whole: list[Course], layer: str = layer) -> Line:
            return _steps(whole[0].steps), [value(course, layer) for course in whole]

        _arms(axes, courses, line)
        _stepped(axes, _words(layer))
    return figure, panels


@drawing.styled
def alignments(courses: Courses, *, width_inches: float = WIDE) -> Figure:
    """Alignment against the step, a panel for each hidden layer and a line for each arm.

    Lines are means over seeds, bands their 95 % intervals.

    Args:
        courses: of every arm, one a seed.
        width_inches: of the figure.
    """
    figure, panels = _by_step(courses, width_inches, Course.alignment)
    panels[0].set_ylim(0, 1.02)
    drawing.legend(figure, panels, width_inches)
    return figure


@drawing.styled
def coverage(courses: Courses, *, width_inches: float = WIDE) -> Figure:
    """The share of teacher nodes found at the end, against what counts as found.

    Args:
        courses: of every arm, one a seed.
        width_inches: of the figure.
    """
    layers = _layers(courses)
    figure, panels = _panels(len(layers), width_inches, 1.7)
    for layer, axes in zip(layers, panels, strict=True):

        def line(whole: list[Course], layer: str = layer) -> Line:
            shares = [[course.covered(layer, t)[-1] for t in THRESHOLDS] for course in whole]
            return THRESHOLDS, [torch.stack(each) for each in shares]

        _arms(axes, courses, line)
        axes.set_title(_words(layer))
        axes.set_xlabel("Correlation above")
        axes.grid(visible=True, axis="y", color=COLORS["grid"], linewidth=0.6)
        axes.tick_params(length=0)
    panels[0].set_ylim(0, 1.02)
    drawing.legend(figure, panels, width_inches)
    return figure


@drawing.styled
def losses(courses: Courses, *, width_inches: float = WIDE) -> Figure:
    """The loss on evaluation inputs (solid) and on training inputs (dashed), by step.

    Args:
        courses: of every arm, one a seed.
        width_inches: of the figure.
    """
    figure = Figure(figsize=(width_inches, 2.6), layout="constrained")
    axes = figure.subplots()
    for place, (arm, each) in enumerate(courses.items()):
        whole = _whole(each)
        for score, style in ((0, "-"), (1, "--")):
            values = [course.scores[:, score] for course in whole]
            if values and bool(torch.stack(values).isfinite().all()):
                label = "_training" if score else arm
                _band(axes, _steps(whole[0].steps), values, color(place), label, style)
    _stepped(axes, "")
    axes.set_yscale("log")
    axes.set_ylabel("Loss")
    drawing.legend(figure, [axes], width_inches)
    return figure


@drawing.styled
def gradients(courses: Courses, *, width_inches: float = WIDE) -> Figure:
    """The L2 norm of the expected update of each layer, by step.

    Args:
        courses: of every arm, one a seed.
        width_inches: of the figure.
    """
    figure, panels = _by_step(courses, width_inches, lambda course, layer: course.gradient[layer])
    panels[0].set_yscale("log")
    drawing.legend(figure, panels, width_inches)
    return figure


@drawing.styled
def couplings(courses: Sequence[Course], *, width_inches: float = WIDE) -> Figure:
    """How strongly nodes are coupled: medians over student nodes of the rows of H, beta and L.

    Args:
        courses: one arm's, one a seed.
        width_inches: of the figure.
    """
    layers = courses[0].layers
    figure, panels = _panels(len(layers), width_inches, 1.9)
    for layer, axes in zip(layers, panels, strict=True):
        for place, (kind, symbol) in enumerate(zip(COUPLINGS, _SYMBOLS, strict=True)):
            name = f"{kind}/{layer}"
            found = [course for course in _whole(courses) if name in course.couplings]
            values = [course.couplings[name].median(1).values for course in found]
            if found:
                _band(axes, _steps(found[0].coupling_steps), values, color(place), symbol)
        _stepped(axes, _words(layer))
        axes.set_yscale("log")
    drawing.legend(figure, panels, width_inches)
    return figure


Found = Mapping[str, Sequence[Readings]]


@drawing.styled
def readings(
    found: Found,
    names: Sequence[str],
    units: Mapping[str, str] | None = None,
    *,
    width_inches: float = WIDE,
) -> Figure:
    """Readings by step, a panel each and a line for each arm.

    Args:
        found: of every arm, one a seed.
        names: of the readings.
        units: of those that have one, by name.
        width_inches: of the figure.
    """
    if all(len(one.steps) == 1 for each in found.values() for one in each):
        return _standings(found, names, width_inches)
    figure, panels = _panels(len(names), width_inches, 1.6, is_shared=False)
    for name, axes in zip(names, panels, strict=True):
        having = {arm: [one for one in each if name in one.values] for arm, each in found.items()}

        def line(whole: list[Readings], name: str = name) -> Line:
            return _steps(whole[0].steps), [one.values[name] for one in whole]

        _arms(axes, having, line)
        _stepped(axes, name)
        axes.set_ylabel((units or {}).get(name, ""))
    drawing.legend(figure, panels, width_inches)
    return figure


def _standings(found: Found, names: Sequence[str], width_inches: float) -> Figure:
    """Readings of one moment: a place on the horizontal axis for each arm, a dot for each seed."""
    figure, panels = _panels(len(names), width_inches, 1.8, is_shared=False)
    for name, axes in zip(names, panels, strict=True):
        for place, each in enumerate(found.values()):
            ends = [float(one.values[name][-1]) for one in _whole(each) if name in one.values]
            values = [end for end in ends if math.isfinite(end)]
            if values:
                axes.plot([place] * len(values), values, ".", color=color(place), alpha=0.35)
                axes.plot(place, float(np.mean(values)), "o", color=color(place))
            if len(values) > 1:
                interval = luck.interval_of(name, values) or ()
                axes.plot([place, place], interval, color=color(place), linewidth=2)
        axes.set_title(name)
        axes.set_xticks(range(len(found)), list(found), rotation=60, ha="right", fontsize=6)
        axes.set_xlim(-0.5, len(found) - 0.5)
        axes.grid(visible=True, axis="y", color=COLORS["grid"], linewidth=0.6)
        axes.tick_params(length=0)
    return figure


@drawing.styled
def profiles(
    found: Found,
    kinds: Mapping[str, Sequence[str]],
    units: Mapping[str, str] | None = None,
    *,
    width_inches: float = WIDE,
) -> Figure:
    """Readings at the end by place: a panel for each kind.

    Places are layers, the lowest at the left, or numbers: shares of a way.

    Args:
        found: of every arm, one a seed.
        kinds: the readings of each kind, place by place.
        units: of those readings that have one, by name.
        width_inches: of the figure.
    """
    figure = Figure(figsize=(width_inches, 2.4), layout="constrained")
    panels = list(figure.subplots(1, len(kinds), squeeze=False).ravel())
    for (kind, names), axes in zip(kinds.items(), panels, strict=True):
        having = {
            arm: [one for one in each if any(n in one.values for n in names)]
            for arm, each in found.items()
        }

        def line(whole: list[Readings], names: Sequence[str] = names) -> Line:
            ends = [[one.values[n][-1] for n in names if n in one.values] for one in whole]
            places = _shares(names) or range(1, len(ends[0]) + 1)
            return list(places), [torch.stack(each) for each in ends]

        shares = _shares(names)
        _arms(axes, having, line, "-" if shares else "o-")
        axes.set_title(kind)
        axes.set_xlabel("Share of the way" if shares else "Place in the network")
        axes.grid(visible=True, axis="y", color=COLORS["grid"], linewidth=0.6)
        axes.tick_params(length=0)
        axes.set_ylabel((units or {}).get(names[0], ""))
        if not any((line.get_ydata() < 0).any() for line in axes.get_lines()):
            axes.set_ylim(bottom=0)
    drawing.legend(figure, panels, width_inches)
    return figure


def _shares(names: Sequence[str]) -> list[float] | None:
    """The numbers behind the strokes of names; None where some are words."""
    places = [name.partition("/")[2] for name in names]
    if not all(re.fullmatch(r"\d*\.\d+", place) for place in places):
        return None
    return [float(place) for place in places]


def by_winner(rho: Tensor, won: Tensor) -> Tensor:
    """The columns in order of the teacher node that a student won, then of those that won none."""
    order = list(dict.fromkeys(won.tolist()))
    order += [node for node in range(rho.shape[1]) if node not in set(order)]
    return rho[:, order]


@drawing.styled
def heat_maps(course: Course, *, width_inches: float = WIDE) -> Figure:
    """Correlations of teacher nodes (rows) and student nodes (columns), at the start and the end.

    Students stand in the order of the teacher node that they win at the end, so that winners make a
    diagonal; those that win none follow.

    Args:
        course: one seed of one arm.
        width_inches: of the figure.
    """
    size = (width_inches, 0.5 + len(course.layers) * 0.8)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(course.layers), 2, squeeze=False)
    image = None
    for layer, row in zip(course.layers, panels, strict=True):
        won = dynamics.winners(course.last[layer])
        for axes, rho, when in zip(
            row, (course.first[layer], course.last[layer]), ("start", "end"), strict=True
        ):
            image = axes.imshow(
                by_winner(rho, won).numpy(), vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto",
                interpolation="nearest",
            )  # fmt: skip
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"{_words(layer)}, {when}")
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.6, label="correlation")
    return figure


@drawing.styled
def rank_histograms(courses: Sequence[Course], *, width_inches: float = WIDE) -> Figure:
    """Where the final winners stood at the start, against what chance gives (the line).

    Of all living teacher nodes of all seeds: the share of student nodes that were ahead.

    Args:
        courses: one arm's, one a seed.
        width_inches: of the figure.
    """
    layers = courses[0].layers
    figure, panels = _panels(len(layers), width_inches, 1.7)
    for layer, axes in zip(layers, panels, strict=True):
        whole = [course for course in courses if not course.diverged]
        others = [max(1, course.first[layer].shape[1] - 1) for course in whole]
        shares = [c.ranks(layer) / num for c, num in zip(whole, others, strict=True)]
        counts, edges = np.histogram(
            torch.cat(shares).numpy() if shares else [], bins=_BARS, range=(0, 1)
        )
        share = counts / max(1, counts.sum())
        axes.bar(edges[:-1], share, width=0.9 / _BARS, align="edge", color=COLORS["blue"])
        axes.axhline(1 / _BARS, color=COLORS["vermilion"], linewidth=1)
        axes.set_title(_words(layer))
        axes.set_xlim(0, 1)
        axes.set_xlabel("Share ahead at start")
        axes.tick_params(length=0)
    panels[0].set_ylabel("Share of winners")
    return figure


@drawing.styled
def outgoing(courses: Courses, *, width_inches: float = WIDE) -> Figure:
    """The median outgoing norm of matched (solid) and unmatched (dashed) students, by step.

    Matched are those that end above a correlation of .9 with some teacher node. Means over seeds.

    Args:
        courses: of every arm, one a seed.
        width_inches: of the figure.
    """
    layers = _layers(courses)
    figure, panels = _panels(len(layers), width_inches, 1.9)
    for layer, axes in zip(layers, panels, strict=True):
        for place, (arm, each) in enumerate(courses.items()):
            whole = _whole(each)
            for is_matched, style in ((True, "-"), (False, "--")):
                lines = [
                    course.outgoing[layer][:, mask].median(1).values.double().numpy()
                    for course in whole
                    if (mask := course.matched(layer) == is_matched).any()
                ]
                if lines:
                    label = arm if is_matched else "_unmatched"
                    paint, steps = color(place), _steps(whole[0].steps)
                    axes.plot(steps, np.mean(lines, axis=0), style, color=paint, label=label)
        _stepped(axes, _words(layer))
    panels[0].set_ylim(bottom=0)  # shared: once all lines are drawn, or their tops are cut
    drawing.legend(figure, panels, width_inches)
    return figure


def _words(layer: str) -> str:
    return f"Layer {layer.removeprefix('hidden')}"
