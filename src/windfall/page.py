"""One self-contained HTML page per study: the answer in words first, then the numbers behind it.

The page loads nothing and runs no script, and every number in it leads to the addresses of its
runs. What an effect, an arm or a metric is called stands in the tables below; how the page looks
stands in `page.html.j2`.

    html = page.render(document)
    Path("lottery.html").write_text(html, encoding="utf-8")
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from windfall import drawing, plots, words
from windfall.drawing import Number, Row
from windfall.effects import EFFECTS
from windfall.findings import AT_START

Document = Mapping[str, Any]

MINUS = "\N{MINUS SIGN}"


class Metric(NamedTuple):
    """How a metric is written: its name, factor and digits, and the units of values and gaps."""

    words: str
    scale: Number = 1
    digits: int = 3
    unit: str = ""
    gap_unit: str = ""


METRICS = {
    "test_accuracy": Metric("Test accuracy at the last step", 100, 2, "%", " pp"),
    "test_accuracy_at_early_stop": Metric("Test accuracy at the early stop", 100, 2, "%", " pp"),
    AT_START: Metric("Test accuracy before any training", 100, 2, "%", " pp"),
    "early_stop_step": Metric("Step of the early stop", 1, 0, "", " steps"),
    "distance": Metric("Distance of the weights from where they began (L2)"),
    "mask_overlap": Metric("Mask overlap, whole network"),
}

QUESTIONS = {effect.name: effect.reads for effect in EFFECTS}

ARMS = {
    "dense": "the whole network, the reference",
    "ticket": "the mask that pruning found, from the original initialization",
    "rewind": "a mask that pruning found, from the weights a few steps into training",
    "finetune": "the ticket's mask, going on from the trained weights",
    "reinit": "the ticket's mask, from a fresh initialization",
    "shuffled": "that mask permuted inside each layer, from the same fresh initialization",
    "shuffled-ticket": "that mask, from the original initialization",
    "random": "as many weights anywhere in the network, from the same fresh initialization",
    "signed-reinit": "the ticket's mask, fresh magnitudes with the original initialization's signs",
    "signed-constant": "the ticket's mask, those signs with one magnitude in each layer",
    "random-constant": "the ticket's mask, fresh signs with that magnitude",
    "scratch-e": "the physically smaller network, fresh, for as many epochs as the dense one",
    "scratch-b": "the physically smaller network, fresh, for as many FLOPs as the dense one",
    "scratch-b-plus": "as scratch-b, the steps of fine-tuning granted too",
    "finetune-small": "as finetune, at a small constant rate",
    "guided": "a whole network of the widths that pruning found for each stage, fresh",
    "transferred": "a whole network of widths that pruning found elsewhere, fresh",
    "uniform-width": "a whole network of one width, as large as that design, fresh",
    "other-order": "two masks from one initialization, found with batches in different orders",
    "other-init": "two masks from different initializations",
    "chance": "two masks drawn independently at the same densities",
}

MARKS = {
    "o": "M8 3a5 5 0 1 0 0 10a5 5 0 1 0 0-10z",
    "s": "M3.5 3.5h9v9h-9z",
    "^": "M8 2.5l5.5 10h-11z",
    "v": "M8 13.5l5.5-10h-11z",
    "D": "M8 2l6 6-6 6-6-6z",
    "X": "M5 2.5l3 3 3-3 2.5 2.5-3 3 3 3-2.5 2.5-3-3-3 3-2.5-2.5 3-3-3-3z",
    "P": "M6 2.5h4V6h3.5v4H10v3.5H6V10H2.5V6H6z",
    "p": "M8 2.2l5.7 4.2-2.2 6.8h-7L2.3 6.4z",
    "*": "M8 1.5l1.9 4.4 4.7.4-3.6 3.1 1.1 4.6L8 11.6 3.9 14 5 9.4 1.4 6.3l4.7-.4z",
    "d": "M8 2l4 6-4 6-4-6z",
    "h": "M8 2l5.2 3v6L8 14l-5.2-3V5z",
}


class Drawing(NamedTuple):
    """A figure for wide and for narrow screens, what it rests on, and the runs it was made from."""

    wide: Markup
    narrow: Markup
    basis: str
    addresses: Sequence[str]


class Group(NamedTuple):
    """The rows of one metric, and where on their common scale a value lies, as a CSS length."""

    metric: str
    rows: Sequence[Row]
    place: Callable[[Number], str]


def render(document: Document) -> str:
    """The page of a study, the same text for the same document.

    Args:
        document: The study's results as plain JSON values, None where there is no number: `study`,
            `answer`, `settings`, `runs`, `arms`, `verdicts`, `comparisons`, `failures`, `curves`,
            `layers`, `pictures`, `records`, `notes`, `winner`, `winner_record`, `seconds`, `flops`,
            `versions` and `created`; `estimate` and `pattern` are optional. Accuracies are
            fractions; the intervals of `arms` and `comparisons` have confidence 0.95, those of
            `verdicts` state theirs.

    Returns:
        HTML that refers to nothing outside itself; all text of the document is escaped.
    """
    arms = [{**row, "id": f"row-{n}"} for n, row in enumerate(drawing.in_order(document["arms"]))]
    records = {record["address"]: record for record in document["records"]}
    reasons = {address: record["status"] for address, record in records.items()}
    reasons |= {each["address"]: f"failed: {each['reason']}" for each in document["failures"]}
    margin = document["settings"].get("margin")
    landmarks = (0.0, -margin, margin) if margin else (0.0,)
    return template("page").render(
        document=document,
        notes=[*document["notes"], *_mixed_versions(records.values())],
        drawings=dict(_drawings(document)),
        arms=list(_groups(arms, "mean", ())),
        arm_words={row["arm"]: ARMS.get(row["arm"], "") for row in arms},
        verdicts=list(_groups(_traced(document["verdicts"], arms), "difference", landmarks)),
        comparisons=list(_groups(_traced(document["comparisons"], arms), "difference", (0.0,))),
        margin=margin,
        basis=_basis(arms),
        unit=next((row["unit"] for row in document["layers"] if "unit" in row), "weights"),
        records=records,
        reasons=reasons,
        settings=list(leaves(document["settings"])),
        estimate=words.estimate(document.get("estimate")),
    )


def render_suite(document: Document) -> str:
    """The page of a suite: every effect in every case, and what every arm cost.

    Args:
        document: as `overview.combined` makes it; `pages`, the files of the cases' own pages by
            case, is optional.
    """
    verdicts = document["verdicts"]
    effects = dict.fromkeys((row["effect"], row["arm"], row["against"]) for row in verdicts)
    basis = _basis(verdicts).partition(";")[0]
    drawing = _drawing(plots.forest, verdicts, basis, ()) if verdicts else None
    return template("suite").render(
        document=document,
        pages=document.get("pages", {}),
        drawing=drawing,
        effects=[
            (same[0], [r for r in verdicts if (r["effect"], r["arm"], r["against"]) == same])
            for same in effects
        ],
        arms=[(case, _decided_arms(each)) for case, each in document["cases"].items()],
    )


def _decided_arms(document: Document) -> list[Row]:
    """The rows of a study's metric at the level of its verdicts, the dense network first."""
    settings = document["settings"]
    levels = (0, settings["verdict_level"] or settings["levels"])
    return [
        row
        for row in document["arms"]
        if row["metric"] == settings["metric"] and row["level"] in levels
    ]


@functools.cache
def template(name: str) -> jinja2.Template:
    """A page's template, with the filters and names that all pages share."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(_FILTERS)
    return environment.get_template(f"{name}.html.j2", globals=_GLOBALS)


def _source(name: str) -> str:
    return resources.files("windfall").joinpath(name).read_text(encoding="utf-8")


def _drawings(document: Document) -> Iterator[tuple[str, Drawing]]:
    arms, curves, layers = document["arms"], document["curves"], document["layers"]
    trained = {(row["arm"], row["level"]) for row in curves}
    masked = {("ticket", row["level"]) for row in layers}
    of_curves = [row for row in arms if (row["arm"], row["level"]) in trained]
    of_masks = [row for row in arms if (row["arm"], row["level"]) in masked]
    for metric, key, draw in (
        ("test_accuracy", "accuracy", plots.accuracy),
        (AT_START, "start", functools.partial(plots.accuracy, metric=AT_START)),
        ("early_stop_step", "early_stop", plots.early_stop),
        ("mask_overlap", "overlap", plots.overlap),
    ):
        rows = [row for row in arms if row["metric"].partition("/")[0] == metric]
        if any(row["arm"] != "dense" for row in rows):
            yield key, _drawing(draw, arms, _basis(rows), _addresses(rows))
    if curves:
        basis = _basis(of_curves)
        yield "curves", _drawing(plots.learning_curves, curves, basis, _addresses(of_curves))
    if layers:
        addresses = _addresses(of_masks, seed=0)
        yield "layers", _drawing(plots.layer_densities, layers, "n = 1: seed 0", addresses)
    if pictures := document["pictures"]:
        addresses = list(dict.fromkeys(picture["address"] for picture in pictures))
        yield "pictures", _drawing(plots.mask_pictures, pictures, "n = 1 run a picture", addresses)
    if pattern := document.get("pattern"):
        yield from _patterns(pattern)


def _patterns(pattern: Row) -> Iterator[tuple[str, Drawing]]:
    addresses = [run["address"] for run in pattern["runs"]]
    number = len(addresses)
    basis = f"n = {number} {'seed' if number == 1 else 'seeds'}, level {pattern['level']}"
    draw = functools.partial(plots.pattern, stages=pattern["stages"])
    yield "pattern", _drawing(draw, pattern["layers"], basis, addresses)
    if pattern["unit"] == "weights":
        yield "kernels", _drawing(plots.kernels, pattern["stages"], basis, addresses)


def _drawing(
    draw: Callable[..., Figure], table: drawing.Table, basis: str, addresses: Sequence[str]
) -> Drawing:
    return Drawing(*inline(functools.partial(draw, table)), basis, addresses)


def inline(draw: Callable[..., Figure]) -> tuple[Markup, Markup]:
    """A figure as SVG within a page, for wide and for narrow windows.

    Args:
        draw: makes it, of a default width or of `width_inches`.
    """
    wide, narrow = (
        # In a page the name space is HTML's own.
        Markup(drawing.svg(figure).replace(' xmlns="http://www.w3.org/2000/svg"', "", 1))
        for figure in (draw(), draw(width_inches=drawing.NARROW))
    )
    return wide, narrow


def _basis(rows: Sequence[Row]) -> str:
    seeds = sorted({row["num_seeds"] for row in rows}) or [0]
    count = f"n = {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))}"
    count += " seed" if seeds[-1] == 1 else " seeds"
    if any(row["interval"] for row in rows):
        return f"{count}; bands and bars are 95% intervals of the mean over seeds"
    return f"{count}, so no intervals" if seeds[-1] < 2 else f"{count}, no intervals"


def _addresses(rows: Iterable[Row], *, seed: int | None = None) -> list[str]:
    runs = (run for row in rows for run in row["runs"] if seed in {None, run["seed"]})
    return list(dict.fromkeys(run["address"] for run in runs))


def _groups(rows: Sequence[Row], key: str, landmarks: Sequence[Number]) -> Iterator[Group]:
    for metric in dict.fromkeys(row["metric"] for row in rows):
        chosen = [row for row in rows if row["metric"] == metric]
        shown = [end for row in chosen for end in (row[key], *(row["interval"] or ()))]
        shown = [*landmarks, *(end for end in shown if end is not None)]
        yield Group(metric, chosen, _ruler(shown))


def _ruler(values: Sequence[Number]) -> Callable[[Number], str]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return lambda value: f"{3 + 94 * (value - low) / ((high - low) or 1.0):.1f}%"


def _traced(rows: Iterable[Row], arms: Iterable[Row]) -> list[Row]:
    """The comparisons, each with the two rows it compares and with their runs paired by seed."""
    found = {(row["arm"], row["level"], row["metric"]): row for row in arms}

    def side(row: Row, arm: str) -> Row | None:
        at_level = found.get((arm, row["level"], row["metric"]))
        return at_level or found.get((arm, 0, row["metric"]))

    traced: list[Row] = []
    for row in rows:
        one, other = side(row, row["arm"]), side(row, row["against"])
        traced.append({**row, "one": one, "other": other, "pairs": _pairs(one, other)})
    return traced


def _pairs(one: Row | None, other: Row | None) -> list[Row]:
    ones, others = (
        {run["seed"]: run for run in row["runs"]} if row else {} for row in (one, other)
    )
    pairs: list[Row] = []
    for seed in sorted(ones.keys() | others.keys()):
        runs = ones.get(seed), others.get(seed)
        values = [run["value"] for run in runs if run and run["value"] is not None]
        difference = values[0] - values[1] if len(values) == 2 else None
        pairs.append({"seed": seed, "runs": runs, "difference": difference})
    return pairs


def _mixed_versions(records: Iterable[Row]) -> list[str]:
    found: dict[str, set[str]] = {}
    for record in records:
        for library, version in (record["versions"] or {}).items():
            found.setdefault(library, set()).add(version)
    mixed = [
        f"{name} {' and '.join(sorted(each))}"
        for name, each in sorted(found.items())
        if len(each) > 1
    ]
    return [f"These runs were made with different versions: {'; '.join(mixed)}."] if mixed else []


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The settings as `--set` would name them, each with its value as JSON, or plain if text."""
    if isinstance(node, Mapping) and node:
        for name, child in node.items():
            yield from leaves(child, f"{path}.{name}" if path else str(name))
    elif isinstance(node, list) and all(isinstance(each, str) for each in node):
        yield path, ", ".join(node) or "none"
    else:
        yield path, node if isinstance(node, str) else json.dumps(node, ensure_ascii=False)


def _why(row: Row) -> str:
    """Why a row lacks a number that others have."""
    center = row.get("mean", row.get("difference"))
    if center is None and row["num_diverged"] and row["metric"] == "early_stop_step":
        return "a diverged run never stops"
    if center is None:
        return "a run failed"
    return "one seed" if row["num_seeds"] < 2 else "not estimated"


def _metric(name: str) -> Metric:
    layer = name.removeprefix("mask_overlap/")
    return METRICS.get(name, Metric(name if layer == name else f"Mask overlap, {layer}"))


def _value(value: Number, name: str) -> str:
    _, scale, digits, unit, _ = _metric(name)
    return f"{scale * value:,.{digits}f}{unit}".replace("-", MINUS)


def _gap(value: Number, name: str, *, is_bare: bool = False) -> str:
    _, scale, digits, _, unit = _metric(name)
    rounded = round(scale * value, digits) + 0.0  # + 0.0 makes a rounded minus zero zero
    return f"{rounded:+,.{digits}f}{'' if is_bare else unit}".replace("-", MINUS)


def _interval(ends: Sequence[Number], name: str, *, is_gap: bool = False) -> str:
    if is_gap:
        return f"[{_gap(ends[0], name, is_bare=True)}, {_gap(ends[1], name, is_bare=True)}]"
    unit = _metric(name).unit
    return f"[{', '.join(_value(end, name).removesuffix(unit) for end in ends)}]"


def _p_value(p_value: Number, sign: str = "") -> str:
    return "< 0.001" if p_value < 0.001 else f"{sign}{p_value:.3f}"


def _duration(seconds: Number) -> str:
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _flops(flops: Number) -> str:
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    power = min(len(prefixes) - 1, max(0, len(f"{flops:.0f}") - 1) // 3)
    return f"{float(f'{flops / 1000**power:.3g}'):g} {prefixes[power]}FLOPs"


def _ratio(ratio: Number | None) -> str:
    return "–" if ratio is None else f"{ratio:.3g} to 1"  # noqa: RUF001  a missing number's dash


_FILTERS: dict[str, Any] = {
    "ratio": _ratio,
    "value": _value,
    "gap": _gap,
    "interval": _interval,
    "percent": drawing.percent,
    "p_value": _p_value,
    "duration": _duration,
    "flops": _flops,
}
_GLOBALS: dict[str, Any] = {
    "metric": _metric,
    "look": drawing.look,
    "colors": drawing.COLORS,
    "marks": MARKS,
    "questions": QUESTIONS,
    "why": _why,
}
