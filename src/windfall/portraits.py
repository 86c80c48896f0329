"""Portraits: figures of what happens between teachers and students.

Each takes courses, and returns a matplotlib `Figure`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from windfall import drawing, dynamics, stats
from windfall.drawing import COLORS, NARROW, WIDE
from windfall.laboratory import Course

_ARMS = ("muted", "sky", "green", "blue", "violet", "vermilion", "orange", "pink")  # in their order
_BARS = 10  # of a histogram

Courses = Mapping[str, Sequence[Course]]


def color(place: int) -> str:
    """The color of the arm at this place of a study."""
    return COLORS[_ARMS[place % len(_ARMS)]]


def _panels(num: int, width_inches: float, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(num, 4 if width_inches > NARROW else 2)
    rows = -(-num // columns)
    figure = Figure(figsize=(width_inches, 0.5 + rows * height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes in panels[num:]:
        axes.set_axis_off()
    return figure, list(panels[:num])


@drawing.styled
def alignments(courses: Courses, *, width_inches: float = WIDE) -> Figure:
    """Alignment against the step, a panel for each hidden layer and a line for each arm.

    Lines are means over seeds, bands their 95 % intervals. The step's axis is logarithmic from 1;
    the start is drawn at its left end.

    Args:
        courses: of every arm, one a seed.
        width_inches: of the figure.
    """
    layers = next(iter(courses.values()))[0].layers
    figure, panels = _panels(len(layers), width_inches, 1.9)
    for layer, axes in zip(layers, panels, strict=True):
        for place, (arm, each) in enumerate(courses.items()):
            _draw_alignment(axes, arm, each, layer, color(place))
        axes.set_title(_words(layer))
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        axes.grid(visible=True, axis="y", color=COLORS["grid"], linewidth=0.6)
        axes.tick_params(length=0)
        axes.set_xlabel("Step")
    drawing.legend(figure, panels, width_inches)
    return figure


def _draw_alignment(axes: Axes, arm: str, each: Sequence[Course], layer: str, paint: str) -> None:
    whole = [course for course in each if not course.diverged]
    if not whole:
        return
    values = torch.stack([course.alignment(layer) for course in whole]).double().numpy()
    steps = np.maximum(whole[0].steps.numpy(), 0.7)
    axes.plot(steps, values.mean(0), color=paint, label=arm)
    intervals = [stats.mean_interval(column.tolist()) for column in values.T]
    if None not in intervals:
        low, high = np.array(intervals).T
        axes.fill_between(steps, low, high, color=paint, alpha=0.18, linewidth=0)


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
    layers = next(iter(courses.values()))[0].layers
    figure, panels = _panels(len(layers), width_inches, 1.9)
    for layer, axes in zip(layers, panels, strict=True):
        for place, (arm, each) in enumerate(courses.items()):
            whole = [course for course in each if not course.diverged]
            for is_matched, style in ((True, "-"), (False, "--")):
                lines = [
                    course.outgoing[layer][:, mask].median(1).values.double().numpy()
                    for course in whole
                    if (mask := course.matched(layer) == is_matched).any()
                ]
                if lines:
                    steps = np.maximum(whole[0].steps.numpy(), 0.7)
                    label = arm if is_matched else "_unmatched"
                    axes.plot(steps, np.mean(lines, axis=0), style, color=color(place), label=label)
        axes.set_title(_words(layer))
        axes.set_xscale("log")
        axes.grid(visible=True, axis="y", color=COLORS["grid"], linewidth=0.6)
        axes.tick_params(length=0)
        axes.set_xlabel("Step")
    panels[0].set_ylim(bottom=0)  # shared: once all lines are drawn, or their tops are cut
    drawing.legend(figure, panels, width_inches)
    return figure


def _words(layer: str) -> str:
    return f"Layer {layer.removeprefix('hidden')}"
