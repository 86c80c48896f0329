"""Drawing: what figures share: their style, the colors and markers of arms, and SVG.

An arm has one color and one marker in every figure. A color of `COLORS` is written into an SVG as a
variable, so that a page may redefine it.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Row = Mapping[str, Any]
Table = Sequence[Row]
Number = int | float  # in a JSON document, a round number is an int

WIDE, NARROW = 7.2, 3.5  # inches: the text width of a two-column page, and one column of it

# From blue to pink: Okabe and Ito (2008), distinct in every common form of color blindness.
COLORS = {
    "ink": "#1f2933",
    "muted": "#6b7683",
    "grid": "#e3e6ea",
    "paper": "#ffffff",
    "blue": "#0072b2",
    "sky": "#56b4e9",
    "green": "#009e73",
    "vermilion": "#d55e00",
    "orange": "#e69f00",
    "pink": "#cc79a7",
    "brown": "#8c6239",
    "violet": "#6f4fa0",
    "leaf": "#3c7d46",
}


class Look(NamedTuple):
    """How an arm is drawn: the name of its color, its matplotlib marker, and its name in words."""

    color: str
    marker: str
    words: str


LOOKS = {
    "dense": Look("muted", "o", "dense"),
    "ticket": Look("blue", "o", "ticket"),
    "rewind": Look("sky", "s", "rewind"),
    "finetune": Look("green", "^", "finetune"),
    "reinit": Look("vermilion", "D", "reinit"),
    "shuffled": Look("orange", "v", "shuffled"),
    "shuffled-ticket": Look("leaf", "P", "shuffled ticket"),
    "random": Look("pink", "X", "random"),
    "signed-reinit": Look("green", "s", "signed-reinit"),
    "signed-constant": Look("sky", "^", "signed-constant"),
    "random-constant": Look("brown", "v", "random-constant"),
    "scratch-e": Look("brown", "P", "scratch-e"),
    "scratch-b": Look("violet", "p", "scratch-b"),
    "scratch-b-plus": Look("pink", "h", "scratch-b-plus"),
    "finetune-small": Look("leaf", "v", "finetune-small"),
    "guided": Look("leaf", "*", "guided"),
    "transferred": Look("sky", "*", "transferred"),
    "uniform-width": Look("pink", "d", "uniform width"),
    "other-order": Look("blue", "o", "same start, other order"),
    "other-init": Look("vermilion", "D", "other start"),
    "chance": Look("muted", "s", "chance"),
}

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so text is measured alike everywhere
    "font.size": 8,
    "text.color": COLORS["ink"],
    "axes.edgecolor": COLORS["muted"],
    "axes.labelcolor": COLORS["muted"],
    "axes.linewidth": 0.6,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.2,
}
_DECIMALS = re.compile(r"(\d\.\d\d)\d+")  # a hundredth of a point is below any resolution
styled = matplotlib.rc_context(_STYLE)


def look(arm: str) -> Look:
    """How an arm is drawn in every figure; one that `LOOKS` lacks is gray and keeps its name."""
    return LOOKS.get(arm, Look("muted", "h", arm))


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element, the same text for the same figure.

    Text stays text, and the background is transparent. Each color of `COLORS` is written as
    `var(--figure-<name>, <color>)`, so that a page may redefine it, for a dark scheme say.
    Identifiers begin with a digest of the figure, so that several figures fit in one page.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "windfall", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = "<svg" + buffer.getvalue().partition("<svg")[2].replace("xlink:href", "href")
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "", 1)
    # matplotlib's style sheet speaks of every element, which in a page is the whole page
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.DOTALL)
    text = text.replace("<svg", '<svg stroke-linejoin="round"', 1).replace("rotate(-0", "rotate(0")
    text = re.sub(r"<[^<]*>", lambda tag: _DECIMALS.sub(r"\1", tag[0]), text)
    for name, color in COLORS.items():
        text = re.sub(rf"{color}\b", f"var(--figure-{name}, {color})", text)
    used = "|".join(sorted(set(re.findall(r'(?:href="#|url\(#)(\w+)', text)))) or "none"
    prefix = "w" + hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(rf' id="(?!(?:{used})")\w+"', "", text)
    return re.sub(r'( id="|href="#|url\(#)(?=\w)', rf"\g<1>{prefix}-", text).strip()


def percent(fraction: Number) -> str:
    """A fraction in percent, to three digits: 1 is "100%", 0.0115 is "1.15%"."""
    return f"{100 * fraction:.3g}%"


def in_order(rows: Iterable[Row]) -> list[Row]:
    """The rows by arm as in `LOOKS`, others last, then by level: the order of lines and tables."""
    rank = {arm: place for place, arm in enumerate(LOOKS)}
    return sorted(rows, key=lambda row: (rank.get(row["arm"], len(rank)), row["arm"], row["level"]))


def quiet(axes: Axes, num_ticks: int) -> None:
    """Faint horizontal lines, and few ticks."""
    axes.grid(axis="y", color=COLORS["grid"], linewidth=0.7)
    axes.tick_params(which="both", color=COLORS["grid"], labelcolor=COLORS["muted"], labelsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(num_ticks, steps=[1, 2, 2.5, 5, 10]))


def apart(places: list[float], gap: float) -> list[float]:
    """The places in their order, moved as little as keeps neighbors `gap` apart (pooled means)."""
    blocks: list[tuple[float, int]] = []
    for index, place in enumerate(places):
        total, count = place - index * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            before, members = blocks.pop()
            total, count = total + before, count + members
        blocks.append((total, count))
    shifted = [total / count for total, count in blocks for _ in range(count)]
    return [place + index * gap for index, place in enumerate(shifted)]


def legend(figure: Figure, panels: Iterable[Axes], width_inches: float) -> None:
    """The arms of all panels, above them."""
    drawn = lines(panels)
    words = [literal(look(arm).words) for arm in drawn]
    columns = max(1, int(14 * width_inches / (5 + max(map(len, words), default=0))))
    figure.legend(list(drawn.values()), words, loc="outside upper left", ncols=columns)


def lines(panels: Iterable[Axes]) -> dict[str, Line2D]:
    """The line of each arm; all other labels begin with "_", matplotlib's word for no legend."""
    lines = {str(line.get_label()): line for axes in panels for line in axes.get_lines()}
    return {label: line for label, line in lines.items() if not label.startswith("_")}


def scaled(values: Sequence[Number | None], scale: float) -> NDArray[np.float64]:
    """The values times a scale, NaN where there is none."""
    return scale * np.array(values, dtype=float)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly chosen, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[round(place)] for place in places]


def literal(text: str, limit: int = 28) -> str:
    """The text as it is, its beginning cut if too long; matplotlib would typeset $ as a formula."""
    return (text if len(text) <= limit else f"…{text[1 - limit :]}").replace("$", r"\$")
