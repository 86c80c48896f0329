"""Depths: figures of a network's signals by depth, and the page of a checkup.

html = render(checkup.examined(subject))
"""

import functools
import re
from collections.abc import Sequence
from datetime import UTC, datetime

from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from windfall import diagnosis, drawing, page
from windfall.drawing import COLORS, WIDE, Row, Table
from windfall.spec import Json, digest

FLOOR = 1e-30  # of logarithmic axes: what is 0 has no place on them

Line = tuple[str, str, str, Sequence[float | None]]  # label, color, marker, values


def _panel(rows: Table, width_inches: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_inches, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    drawing.quiet(axes, 5)
    axes.set_xlim(0.3, max(2, len(rows)) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Layer or activation, in the order in which they run")
    for place, row in enumerate(rows, start=1):
        if row["nonfinite"]:
            axes.axvline(place, color=COLORS["vermilion"], linewidth=0.9, label="_overflow")
            break
    return figure, axes


def _lines(axes: Axes, lines: Sequence[Line]) -> None:
    for label, color, marker, values in lines:
        known = [(place, each) for place, each in enumerate(values, 1) if each is not None]
        if known:
            places, heights = zip(*known, strict=True)
            axes.plot(places, heights, marker, color=COLORS[color], label=label)
    shown = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    if len(shown) > 1:
        axes.legend(handles=shown, loc="best", fontsize=7.5)


def _band(axes: Axes, rows: Table, way: str, color: str) -> None:
    """Between what a tenth of the inputs are below and above."""
    known = [(place, row[way]) for place, row in enumerate(rows, 1) if row[way]]
    low, high = ([max(each[end], FLOOR) for _, each in known] for end in ("low", "high"))
    places = [place for place, _ in known]
    axes.fill_between(places, low, high, color=COLORS[color], alpha=0.14, linewidth=0)


def _ratio(rows: Table, way: str, kind: str) -> list[float | None]:
    return [
        row[way]["mean"] if row["kind"] == kind and row[way] and row[way]["mean"] > FLOOR else None
        for row in rows
    ]


def _ratios(rows: Table, way: str, title: str, width_inches: float) -> Figure:
    figure, axes = _panel(rows, width_inches, title)
    axes.set_yscale("log")
    axes.axhline(1, color=COLORS["muted"], linewidth=0.8, linestyle=(0, (4, 3)), label="_one")
    _band(axes, rows, way, "blue")
    kinds = (("layers", "blue", "o", "weights"), ("activations", "orange", "s", "activation"))
    _lines(
        axes, [(word, color, mark, _ratio(rows, way, kind)) for word, color, mark, kind in kinds]
    )
    return figure


@drawing.styled
def forward(rows: Table, *, width_inches: float = WIDE) -> Figure:
    """The norm of every layer's outputs and every activation over that of the input.

    Means over inputs; the band holds the middle 80 % of them.

    Source: the statistic of Arpit & Bengio 2019 (1901.03611), Figure 1.

    Args:
        rows: The document's `layers`.
        width_inches: Width of the figure.
    """
    return _ratios(rows, "forward", "On the way up: |h| / |x|", width_inches)


@drawing.styled
def backward(rows: Table, *, width_inches: float = WIDE) -> Figure:
    """The norm of the loss's gradient at every layer over that at the outputs.

    Args:
        rows: The document's `layers`.
        width_inches: Width of the figure.
    """
    return _ratios(rows, "backward", "On the way down: |g| / |g at the outputs|", width_inches)


@drawing.styled
def variance(rows: Table, *, width_inches: float = WIDE) -> Figure:
    """The variance of pre-activations, over inputs and units.

    Args:
        rows: The document's `layers`.
        width_inches: Width of the figure.
    """
    figure, axes = _panel(rows, width_inches, "Variance of pre-activations")
    axes.set_yscale("log")
    values = [
        row["variance"] if row["kind"] == "weights" and (row["variance"] or 0) > FLOOR else None
        for row in rows
    ]
    _lines(axes, [("variance", "violet", "-o", values)])
    return figure


@drawing.styled
def units(rows: Table, *, width_inches: float = WIDE) -> Figure:
    """The shares of units of each ReLU that are dead, and always on, for these inputs.

    Args:
        rows: The document's `layers`.
        width_inches: Width of the figure.
    """
    figure, axes = _panel(rows, width_inches, "Units of ReLUs (%)")
    axes.set_ylim(-3, 103)
    for key, label, color, mark in (
        ("dead", "dead: off for every input", "vermilion", "-v"),
        ("always_on", "on for every input", "green", "-^"),
    ):
        shares = [None if row[key] is None else 100 * row[key] for row in rows]
        _lines(axes, [(label, color, mark, shares)])
    return figure


@drawing.styled
def alike(rows: Table, *, width_inches: float = WIDE) -> Figure:
    """The mean correlation of the activations of different inputs.

    Args:
        rows: The document's `layers`.
        width_inches: Width of the figure.
    """
    figure, axes = _panel(rows, width_inches, "Correlation between inputs")
    _lines(axes, [("correlation", "leaf", "-o", [row["correlation"] for row in rows])])
    return figure


# -- the page --------------------------------------------------------------------------------------


def render(document: Json) -> str:
    """The page of a checkup: HTML that refers to nothing outside itself; all text is escaped.

    Args:
        document: as `checkup.examined` makes it.
    """
    name = document["of"]["name"]
    study = {
        "title": f"Checkup of {name}",
        "name": name,
        "address": digest([document["of"], document["settings"]]),
    }
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return page.template("checkup").render(
        document=document | {"study": study, "created": created},
        figures=_figures(document["layers"]),
        findings=[{**row, **_marked(row)} for row in document["diagnosis"]],
        settings=list(page.leaves(document["settings"])),
        limits=(diagnosis.VANISHED, diagnosis.EXPLODED),
    )


def _marked(finding: Row) -> dict[str, Markup]:
    """Its sentences as HTML, what stands in backquotes as code."""
    told = {key: str(escape(finding[key])) for key in ("told", "remedy")}
    return {key: Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", t)) for key, t in told.items()}


def _figures(rows: Table) -> dict[str, tuple[Markup, Markup]]:
    drawn: dict[str, tuple[Markup, Markup]] = {}
    for name, draw, is_known in (
        ("forward", forward, lambda row: row["forward"]),
        ("backward", backward, lambda row: row["backward"]),
        ("units", units, lambda row: row["dead"] is not None),
        ("variance", variance, lambda row: row["variance"] is not None),
        ("alike", alike, lambda row: row["correlation"] is not None),
    ):
        if any(map(is_known, rows)):
            drawn[name] = page.inline(functools.partial(draw, rows))
    return drawn
