"""Diagnosis: what ails a network's signals, as words, and the remedy that its numbers point to.

Each finding is read off the document of `signals.Signals` alone:

    found = diagnosed(signals.measured(network, inputs, labels).document())
    [each.kind for each in found], answer(document, found)[0]

A scale is a root mean square, beside the inputs': unlike a norm it does not change with the width.
What BatchNorm reads is left out of ups and downs, for it divides by its scale.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from windfall import words
from windfall.spec import Json

Kind = Literal[
    "overflow",
    "exploding-forward",
    "vanishing-forward",
    "exploding-backward",
    "vanishing-backward",
    "alike",
    "dead",
    "head",
    "inputs",
    "scale-before-norm",
    "bias-before-norm",
]

EXPLODED = 1e4  # 1.6 a layer over 20 layers; one rate for all moves some 10,000 times as much
VANISHED = 1e-4  # 2^-10, what 20 ReLU layers lose by Glorot, still trains; 2^-50 not (1906.02341)
ALIKE = 1 - 1e-4  # inputs then differ by 1.4 % of their activations; He's at depth 100 by 9 %
DEAD = 0.75  # of a ReLU's units; where inputs are alike, half are: more is their biases' doing
HEAD_LARGE, HEAD_SMALL = 3.0, 0.01  # logits of deviation s begin at a loss s²/2 above chance
HEAD_EXCESS = 1.0  # of the loss above chance; He's output layer has 0.7
HEAD_GAIN = 3.0  # of the output layer; He's has 1.4, torch's own 0.6
OFFSET = 0.25  # of the deviation: Efficient BackProp (LeCun et al. 1998), 4.3, asks for 0
SPREAD = 2.0  # factor on the deviation, to which it asks for 1; that of pixels in [0, 1] is 1/4
NORM_GAIN = 100.0  # relative steps before BatchNorm go with 1/gain²: 10,000 times off (1706.05350)
LONE = 10.0  # times the median gain of all layers: then one layer alone is to blame


@dataclass(frozen=True)
class Finding:
    """One thing that ails a network.

    Args:
        kind: what it is.
        layers: where, by name, the first one first; none where it is the inputs.
        told: a sentence with its numbers.
        remedy: a sentence.
        is_serious: whether it harms training; if not, it is only useless.
    """

    kind: Kind
    layers: tuple[str, ...]
    told: str
    remedy: str
    is_serious: bool = True

    def to_json(self) -> Json:
        """The finding as a row of a document."""
        return {
            "kind": self.kind,
            "layers": [*self.layers],
            "told": self.told,
            "remedy": self.remedy,
            "is_serious": self.is_serious,
        }


def diagnosed(document: Json) -> list[Finding]:
    """What ails a network, what is to be cured first, first; nothing where all is well.

    An illness that follows from another is not told: after a signal has overflowed, nothing is; an
    output layer is not blamed for what it reads; what is dead is not called vanished.

    Args:
        document: as `signals.Signals.document` makes it.
    """
    first = [*_inputs(document), *_overflow(document)]
    last = [*_before_norms(document)]
    if any(each.kind == "overflow" for each in first):
        return first + last
    dead = [*_dead(document)]
    ways = [] if _is_cut(document) else [*_forward(document), *_backward(document)]
    return [*first, *dead, *ways, *_head(document), *last]


# -- rows ------------------------------------------------------------------------------------------


def _hidden(document: Json) -> list[Json]:
    """Layers and activations but the last layer and what comes after it."""
    rows = document["layers"]
    heads = [index for index, row in enumerate(rows) if row["kind"] == "weights"]
    return rows[: heads[-1]] if heads else rows


def free(document: Json) -> list[Json]:
    """Those whose scale is that of the signal: hidden ones that no BatchNorm reads."""
    return [row for row in _hidden(document) if row["norm"] is None]


def scales(document: Json) -> list[tuple[str, float]]:
    """By name, the scale of `free` rows over that of the inputs, in their order."""
    own = document["inputs"]["scale"]
    rows = [row for row in free(document) if row["scale"] is not None and own]
    return [(row["name"], row["scale"] / own) for row in rows]


def slopes(document: Json) -> list[tuple[str, float]]:
    """By name, the gradient's norm at `free` rows over that at the last of them, in their order."""
    rows = [row for row in free(document) if row["gradient"] is not None]
    last = rows[-1]["gradient"] if rows else 0.0
    return [(row["name"], row["gradient"] / last) for row in rows if last]


def _dying(document: Json) -> list[Json]:
    """ReLUs most of whose units are dead, though what they read is not all 0."""
    rows = document["layers"]
    read = [None, *(row["scale"] for row in rows)]
    return [r for r, below in zip(rows, read, strict=False) if (r["dead"] or 0) > DEAD and below]


def _is_cut(document: Json) -> bool:
    """Whether all units of some ReLU are dead, so that nothing comes through."""
    return any(row["dead"] == 1.0 for row in _dying(document))


def _number(value: float) -> str:
    short = f"{value:.2g}"
    return f"{float(short):,.0f}" if 100 <= value < 1e6 else short


# -- up and down -----------------------------------------------------------------------------------


def _overflow(document: Json) -> Iterator[Finding]:
    rows = document["layers"]
    up = [row for row in rows if row["nonfinite"]]
    down = [row for row in rows if row["gradient_nonfinite"]]
    if up:
        before = rows[: rows.index(up[0])]
        reached = [row["scale"] for row in before if row["scale"] is not None]
        far = f", after a scale of {_number(reached[-1])}" if reached else ""
        told = f"The signal overflows at `{up[0]['name']}`: its outputs are {up[0]['nonfinite']}"
        yield Finding("overflow", (up[0]["name"],), f"{told}{far}.", _smaller(document))
    elif document["outputs"]["nonfinite"]:
        told = f"The outputs are {document['outputs']['nonfinite']}, though all layers' are finite."
        yield Finding("overflow", ("outputs",), told, "Look at what follows the last layer.")
    elif down:
        name, what = down[-1]["name"], down[-1]["gradient_nonfinite"]
        told = f"The gradient overflows on its way down at `{name}`: it is {what}."
        yield Finding("overflow", (name,), told, _smaller(document))


def _forward(document: Json) -> Iterator[Finding]:
    found = scales(document)
    for at, word in _past(found):
        told = f"Activations {word} on their way up, to {_number(found[-1][1])} times the scale of"
        told += f" the inputs; `{at}` is the first past {_number(_BOUNDS[word])}."
        kind = "exploding-forward" if word == "explode" else "vanishing-forward"
        remedy = _smaller if word == "explode" else _larger
        yield Finding(kind, (at,), told, remedy(document))
    yield from _alike(document, found)


def _alike(document: Json, found: Sequence[tuple[str, float]]) -> Iterator[Finding]:
    own = document["inputs"]["correlation"]
    rows = [row for row in free(document) if (row["correlation"] or 0.0) > ALIKE]
    if not rows or own is None or own > ALIKE or any(value < VANISHED for _, value in found):
        return
    yield Finding(
        "alike",
        (rows[0]["name"],),
        f"All inputs look alike from `{rows[0]['name']}` on: the mean correlation of their"
        f" activations is {rows[0]['correlation']:.6f}, that of the inputs {own:.2g}.",
        "Let less of each layer be its bias: begin with biases of 0 and weights of variance 2 /"
        " fan_in (`initialization=kaiming-normal`), or use shortcuts or BatchNorm.",
    )


def _backward(document: Json) -> Iterator[Finding]:
    found = slopes(document)[::-1]
    for at, word in _past(found):
        told = f"Gradients {word} on their way down, to {_number(found[-1][1])} times that of the"
        told += f" last hidden layer; `{at}` is the first past {_number(_BOUNDS[word])}."
        kind = "exploding-backward" if word == "explode" else "vanishing-backward"
        remedy = _flatter if word == "explode" else _steeper
        yield Finding(kind, (at,), told, remedy(document))


_BOUNDS = {"explode": EXPLODED, "vanish": VANISHED}


def _past(found: Sequence[tuple[str, float]]) -> Iterator[tuple[str, str]]:
    """The first layer that is past either bound, and which."""
    for word, values in (
        ("explode", [name for name, value in found if value > EXPLODED]),
        ("vanish", [name for name, value in found if value < VANISHED]),
    ):
        if values:
            yield values[0], word


def _weights(document: Json) -> list[Json]:
    rows = [row for row in _hidden(document) if row["kind"] == "weights"]
    return [row for row in rows if row["gain"] is not None]


def _factor(document: Json) -> float:
    """By how much a hidden layer, with what follows it, multiplies the scale: geometric mean."""
    found = scales(document)
    rows = [row for row in free(document) if row["kind"] == "weights" and row["scale"] is not None]
    return found[-1][1] ** (1 / max(1, len(rows))) if found and found[-1][1] else 0.0


def _smaller(document: Json) -> str:
    gains = {row["name"]: row["gain"] for row in _weights(document)}
    worst = max(gains, key=lambda name: gains[name], default=None)
    if worst is not None and gains[worst] > LONE * statistics.median(gains.values()):
        return f"Divide the weights of `{worst}` by {_number(gains[worst])}: it alone grows so."
    return (
        f"A layer multiplies the scale by {_number(_factor(document))}: divide the weights by that,"
        " or draw them with variance 2 / fan_in where ReLUs follow"
        " (`initialization=kaiming-normal`). In a residual network scale each of B branches by 1 /"
        " sqrt(B) (1906.02341), or use BatchNorm."
    )


def _larger(document: Json) -> str:
    gains = {row["name"]: row["gain"] for row in _weights(document)}
    worst = min(gains, key=lambda name: gains[name], default=None)
    if worst is not None and LONE * gains[worst] < statistics.median(gains.values()):
        by = f"Multiply by {_number(1 / gains[worst])}" if gains[worst] else "Draw anew"
        return f"{by} the weights of `{worst}`: it alone shrinks so."
    factor = _factor(document)
    each = f"by {_number(factor)}: divide the weights by that" if factor else "to 0"
    return (
        f"A layer multiplies the scale {each}, or draw them with variance 2 / fan_in where ReLUs"
        " follow (`initialization=kaiming-normal`), or use shortcuts or BatchNorm."
    )


def _steepness(document: Json) -> float:
    """By how much a hidden layer multiplies the gradient on its way down: geometric mean."""
    found = slopes(document)
    num = sum(row["kind"] == "weights" for row in free(document) if row["gradient"] is not None)
    num = num or sum(row["kind"] == "weights" for row in _hidden(document))
    return found[0][1] ** (1 / max(1, num - 1)) if found and found[0][1] else 0.0


def _flatter(document: Json) -> str:
    each = f"A layer multiplies the gradient by {_number(_steepness(document))}"
    if any(row["norm"] for row in document["layers"]):
        return (
            f"{each}: without shortcuts BatchNorm and a ReLU do by 1.2 (1902.08129). Use shortcuts,"
            " or fewer layers."
        )
    return f"{each}: divide the weights by that, or use shortcuts."


def _steeper(document: Json) -> str:
    each, found = _steepness(document), scales(document)
    if found and found[-1][1] > VANISHED:
        return (
            f"A layer multiplies the gradient by {_number(each)}, though activations keep their"
            " scale: by their biases, or because they saturate. Begin with biases of 0 and weights"
            " of variance 2 / fan_in before ReLUs (`initialization=kaiming-normal`), 1 / fan_in"
            " before tanh."
        )
    told = f"by {_number(each)}: divide the weights by that" if each else "to 0"
    return f"A layer multiplies the gradient {told}, or use shortcuts or BatchNorm."


# -- single layers ---------------------------------------------------------------------------------


def _dead(document: Json) -> Iterator[Finding]:
    rows = _dying(document)
    if rows:
        each = words.listed(f"`{row['name']}` {words.percent(row['dead'])}" for row in rows[:4])
        more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
        yield Finding(
            "dead",
            tuple(row["name"] for row in rows),
            f"Most units are dead, off for every input: {each}{more}.",
            "Raise the biases that these ReLUs read, to 0 at the start; if they died in training,"
            " lower the learning rate, or use leaky ReLUs.",
        )


def _head(document: Json) -> Iterator[Finding]:
    outputs, rows = document["outputs"], document["layers"]
    head = next((row for row in reversed(rows) if row["kind"] == "weights"), None)
    if head is None or head["gain"] is None or outputs["scale"] is None or _is_cut(document):
        return
    scale, gain = outputs["scale"], head["gain"]
    loss, chance = outputs["loss"], outputs["chance_loss"]
    is_wrong = loss is None or loss > chance + HEAD_EXCESS
    beside = "" if loss is None else f", and the loss {loss:.3g} where chance has {chance:.3g}"
    if scale > HEAD_LARGE and gain > HEAD_GAIN and is_wrong:
        word, verb, by = "large", "Divide", gain
    elif scale < HEAD_SMALL and gain < 1 / HEAD_GAIN:
        word, verb, by = "small", "Multiply", 1 / gain if gain else 0.0
    else:
        return
    remedy = f"{verb} its weights by about {_number(by)}" if by else "Begin with weights that"
    remedy += ", so that outputs are of order 1." if by else " are not all 0."
    if word == "small":
        remedy += " If it begins small on purpose: until it has grown, nothing else learns."
    told = f"The output layer `{head['name']}` is scaled badly: too {word} outputs, of deviation"
    told += f" {_number(scale)}{beside}; its gain is {_number(gain)}."
    yield Finding("head", (head["name"],), told, remedy)


def _inputs(document: Json) -> Iterator[Finding]:
    offset, spread = (document["inputs"][name] for name in ("offset", "spread"))
    if offset > OFFSET or not 1 / SPREAD <= spread <= SPREAD:
        yield Finding(
            "inputs",
            (),
            f"The inputs are not normalized: their deviation is {_number(spread)}, their mean up to"
            f" {_number(offset)} deviations from 0.",
            "Subtract the mean of each channel and divide by its deviation"
            " (`data.normalize=true`).",
        )


def _before_norms(document: Json) -> Iterator[Finding]:
    rows = [row for row in document["layers"] if row["norm"] is not None]
    off = [
        row
        for row in rows
        if row["gain"] is not None and not 1 / NORM_GAIN <= row["gain"] <= NORM_GAIN
    ]
    if off:
        each = words.listed(f"`{row['name']}` {_number(row['gain'])}" for row in off[:4])
        yield Finding(
            "scale-before-norm",
            tuple(row["name"] for row in off),
            f"Weights are scaled uselessly before BatchNorm, which divides by their scale: gains of"
            f" {each}{f' and {len(off) - 4} more' if len(off) > 4 else ''}. Steps relative to the"
            " weights go with 1 / gain².",
            "Divide these weights by their gains: outputs stay as they are, and the learning rate"
            " means there what it means elsewhere.",
        )
    biased = [row for row in rows if row["has_bias"]]
    if biased:
        told = words.listed(f"`{row['name']}`" for row in biased[:4])
        more = f" and {len(biased) - 4} more" if len(biased) > 4 else ""
        yield Finding(
            "bias-before-norm",
            tuple(row["name"] for row in biased),
            f"Biases that BatchNorm subtracts again do nothing: those of {told}{more}.",
            "Build these layers with `bias=False`.",
            is_serious=False,
        )


# -- as sentences ----------------------------------------------------------------------------------

_TITLES: dict[str, str] = {
    "overflow": "its signal overflows",
    "exploding-forward": "its activations explode",
    "vanishing-forward": "its activations vanish",
    "exploding-backward": "its gradients explode",
    "vanishing-backward": "its gradients vanish",
    "alike": "its inputs become alike",
    "dead": "most units of a ReLU are dead",
    "head": "its output layer is scaled badly",
    "inputs": "its inputs are not normalized",
    "scale-before-norm": "weights before BatchNorm are scaled uselessly",
}


def answer(document: Json, found: Sequence[Finding]) -> list[str]:
    """The diagnosis as sentences, the headline first, then each finding and its remedy.

    Args:
        document: as `diagnosed` takes it.
        found: as it gives them.
    """
    serious = [_TITLES[each.kind] for each in found if each.is_serious]
    lead = f"This network is ill: {words.listed(serious)}." if serious else _well(document)
    told, remedies = [lead], set[str]()
    for each in found:
        again = "" if each.remedy in remedies else f" {each.remedy}"
        remedies.add(each.remedy)
        told.append(f"{each.told}{again}")
    return told


def _well(document: Json) -> str:
    parts = [
        f"{name} {_number(min(values))} to {_number(max(values))} times {whose}"
        for name, found, whose in (
            ("activations have", scales(document), "the inputs' scale"),
            ("gradients", slopes(document), "the last hidden layer's"),
        )
        if (values := [value for _, value in found])
    ]
    loss, chance = document["outputs"]["loss"], document["outputs"]["chance_loss"]
    if loss is not None:
        parts.append(f"the loss is {loss:.3g} where chance has {chance:.3g}")
    return f"All is well: {words.listed(parts)}." if parts else "All is well."
