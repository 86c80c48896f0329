"""The kernels: what a training step is made of, one function of `emit` each.

Data is laid out with 16 samples innermost (`layout`). A layer's weights are a list of entries
(offset into the input, value), sorted by (block of inputs, row); an offset leads from the place of
an output to the input that the weight multiplies, so that one list serves every place, and linear
layers and convolutions are one thing. With t over the places of a tile, kept in registers:

    product    out[row, t] = sum of w_p x[offset_p + t] over the row's entries p
    gradient   g_p = sum of d[row, t] x[offset_p + t] over all tiles
    update     the optimizer's step on every w_p

The gradient for the inputs is `product` again, over the transposed list. Each block of inputs is
summed from 0 and then added to the blocks before it: faster (the block stays in the first-level
cache) and more exact than one long sum.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from windfall.engines.sparse.emit import (
    I32,
    I64,
    LANES,
    Emitter,
    Pointer,
    Value,
    Variable,
    vector_of,
)  # fmt: skip
from windfall.engines.sparse.layout import Layout, Sweep


@dataclass(frozen=True)
class Post:
    """What becomes of a result before it is stored.

    Args:
        relu: it is cut at 0.
        gated: it is 0 where the gate is not above 0: the gradient of a ReLU whose output that is.
        adds: it is added to what is there.
        part_gated: it alone is 0 where the gate is not above 0, not what it is added to.
    """

    relu: bool = False
    gated: bool = False
    adds: bool = False
    part_gated: bool = False


# -- sums over lanes -------------------------------------------------------------------------------


def _folded(k: Emitter, one: Value, two: Value, width: int) -> Value:
    """Two vectors, each run of 2 width lanes folded onto its first half: one vector.

    Runs of at least 4 lanes are laid one after the other; shorter ones alternate inside each group
    of 4, where a shuffle is cheaper.
    """
    if width >= 4:
        first = [run + i for run in range(0, LANES, 2 * width) for i in range(width)]
        low = first + [LANES + lane for lane in first]
    else:
        low = [
            source + group + run + i
            for group in range(0, LANES, 4)
            for source in (0, LANES)
            for run in range(0, 4, 2 * width)
            for i in range(width)
        ]
    return k.shuffle(one, two, low) + k.shuffle(one, two, [lane + width for lane in low])


def _quarters(k: Emitter, four: Sequence[Value]) -> Value:
    """Four vectors folded to 4 lanes each, one after the other."""
    first, second = (_folded(k, four[i], four[i + 1], 8) for i in (0, 2))
    return _folded(k, first, second, 4)


def _totals(k: Emitter, dot: Callable[[int], Value]) -> Value:
    """Lane i is the sum over the lanes of dot(i), for 16 of them, by a tree."""
    q = [_quarters(k, [dot(i + j) for j in (0, 4, 8, 12)]) for i in range(4)]
    return _folded(k, _folded(k, q[0], q[1], 2), _folded(k, q[2], q[3], 2), 1)


def _four_totals(k: Emitter, dot: Callable[[int], Value]) -> Value:
    """The same for four, in a vector of four."""
    q = _quarters(k, [dot(i) for i in range(4)])
    q = _folded(k, q, q, 2)
    return _folded(k, q, q, 1).lanes(0, 4, 8, 12)


def total(k: Emitter, vector: Value) -> Value:
    """The sum over the lanes, by a tree."""
    for width in (8, 4, 2, 1):
        half = vector.lanes(*range(width)), vector.lanes(*range(width, 2 * width))
        vector = half[0] + half[1]
    return k.lane(vector, 0)


# -- products --------------------------------------------------------------------------------------


def product(
    k: Emitter,
    static: tuple[Sweep, Post, bool],
    x: Pointer,
    out: Pointer,
    gate: Pointer,
    rows: Value,
    blocks: Value,
    starts: Pointer,
    offsets: Pointer,
    weights: Pointer,
    positions: Pointer,
) -> None:
    """out[row, t] = sum over the row's entries p of w_p x[offset_p + t].

    Args:
        static: where the tiles are; what becomes of the sums; whether w_p is weights[positions[p]]
            (a transposed list) or weights[p].
        starts: of the entries of (block, row), [blocks rows + 1].
    """
    sweep, post, is_transposed = static
    with tiles(k, sweep, x, out, gate) as (_, x, out, gate), k.range(0, blocks) as block:
        first = block.equals(0) if not post.adds else None
        floor = k.select(
            block.equals(blocks - 1), k.value(0.0, k.real), k.value(-float("inf"), k.real)
        )
        with k.range(0, rows) as row:
            here = block * rows + row
            sums = [k.variable(k.zeros()) for _ in sweep.tile]
            with k.range(starts[here], starts[here + 1]) as p:
                weight = k.spread(weights[positions[p]] if is_transposed else weights[p])
                source = x + offsets[p]
                for each, (place, _) in zip(sums, sweep.tile, strict=True):
                    each.set(k.fma(weight, source.vector(place), each.get()))
            target = row * sweep.out_channel
            after = (out + target), (gate + target)
            _add_earlier(k, sweep, sums, after[0], first)
            for each, (_, place) in zip(sums, sweep.tile, strict=True):
                value = each.get()
                if post.relu:
                    value = k.select(value < floor, floor, value)  # NaN stays
                if post.gated:
                    value = k.select(after[1].vector(place) <= floor, 0.0, value)
                after[0].put(place, value)


def _add_earlier(
    k: Emitter, sweep: Sweep, sums: list[Variable], out: Pointer, first: Value | None
) -> None:
    def add() -> None:
        for each, (_, place) in zip(sums, sweep.tile, strict=True):
            each.set(each.get() + out.vector(place))

    if first is None:
        add()
    else:
        with k.when(first.equals(0)):
            add()


@contextmanager
def tiles(k: Emitter, sweep: Sweep, x: Pointer, *outs: Pointer) -> Generator[tuple[Any, ...]]:
    """The loops of a sweep: inside, the group of the tile and the pointers at it."""
    with ExitStack() as loops:
        x, outs = x + sweep.x_base, tuple(out + sweep.out_base for out in outs)
        group: Value | int = 0
        for depth, (count, x_stride, out_stride) in enumerate(sweep.loops):
            if count > 1:
                i = loops.enter_context(k.range(0, count))
                x, outs = x + i * x_stride, tuple(out + i * out_stride for out in outs)
                group = i if depth == 0 else group
        yield (group, x, *outs)


def gradient(
    k: Emitter,
    static: Sweep,
    x: Pointer,
    d: Pointer,
    rows: Value,
    blocks: Value,
    starts: Pointer,
    offsets: Pointer,
    g: Pointer,
) -> None:
    """g_p = sum over all places t of d[row, t] x[offset_p + t].

    Args:
        static: where the tiles are, the same as of the layer's `product`.
        g: of every entry, and 15 beyond.
    """
    sweep = static
    one_tile = all(count == 1 for count, _, _ in sweep.loops)

    with tiles(k, sweep, x, d) as (_, x, d), k.range(0, blocks) as block, k.range(0, rows) as row:
        ours = d + row * sweep.out_channel
        slopes = [ours.vector(place) for _, place in sweep.tile]

        def dot(p: Value) -> Value:
            source, sums = x + offsets[p], None
            for slope, (place, _) in zip(slopes, sweep.tile, strict=True):
                value = source.vector(place)
                sums = slope * value if sums is None else k.fma(slope, value, sums)
            assert sums is not None
            return sums

        here = block * rows + row
        start, stop = starts[here], starts[here + 1]
        whole = start + ((stop - start) & -LANES)
        with k.range(start, whole, LANES) as p:
            sums = _totals(k, lambda i: dot(p + i))
            g.put(p, sums if one_tile else sums + g.vector(p))
        with k.range(whole, stop, 4) as p:
            sums, old = _four_totals(k, lambda i: dot(p + i)), g.vector(p, 4)
            ours4 = k.constants([0, 1, 2, 3], I64) < k.spread(stop - p, 4)
            g.put(p, k.select(ours4, sums if one_tile else sums + old, old))


# -- the optimizer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Momentum:
    """Stochastic gradient descent as `train.Sgd` says."""

    momentum: float
    nesterov: bool
    weight_decay: float


@dataclass(frozen=True)
class Moments:
    """Adam as `train.Adam` says."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def update(
    k: Emitter,
    rule: Momentum | Moments,
    w: Pointer,
    g: Pointer,
    m: Pointer,
    v: Pointer,
    count: Value,
    rates: Pointer,
) -> None:
    """The optimizer's step on `count` weights (a multiple of 16); their gradients become 0.

    Args:
        rule: the optimizer.
        rates: of the step: the rate (Adam's over 1 - beta1^t), and 1 / sqrt(1 - beta2^t).
    """
    rate, correction = (k.spread(k.cast(rates[i], k.real)) for i in (0, 1))
    with k.range(0, count, LANES) as p:
        weight, slope = w.vector(p), g.vector(p)
        g.put(p, k.zeros())
        if rule.weight_decay:
            slope = k.fma(k.spread(rule.weight_decay), weight, slope)
        if isinstance(rule, Momentum):
            step = _with_momentum(k, rule, slope, m + p)
        else:
            step = _with_moments(k, rule, slope, m + p, v + p, correction)
        w.put(p, weight - rate * step)


def _with_momentum(k: Emitter, rule: Momentum, slope: Value, m: Pointer) -> Value:
    if not rule.momentum:
        return slope
    velocity = k.fma(k.spread(rule.momentum), m.vector(0), slope)
    m.put(0, velocity)
    return k.fma(k.spread(rule.momentum), velocity, slope) if rule.nesterov else velocity


def _with_moments(
    k: Emitter, rule: Moments, slope: Value, m: Pointer, v: Pointer, correction: Value
) -> Value:
    mean, square = m.vector(0), v.vector(0)
    mean = k.fma(k.spread(1 - rule.beta1), slope - mean, mean)
    square = k.fma(k.spread(1 - rule.beta2), slope * slope, square * rule.beta2)
    m.put(0, mean)
    v.put(0, square)
    return mean / k.fma(k.sqrt(square), correction, k.spread(rule.eps))


# -- the data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gather:
    """How a batch is read: `num_features` a sample, `groups` of 16 samples."""

    num_features: int
    groups: int
    group: int


def gather(
    k: Emitter,
    static: Gather,
    data: Pointer,
    labels: Pointer,
    indices: Pointer,
    count: Value,
    places: Pointer,
    scale: Pointer,
    shift: Pointer,
    x: Pointer,
    classes: Pointer,
) -> None:
    """x[places[f] + lane] = data[sample of the lane, f] scale[f] + shift[f]; classes, their labels.

    Lanes from `count` on repeat the last sample. Bytes are read 16 features at a time, for 16
    samples, and transposed in registers; other data one number at a time.
    """
    size = static.num_features
    with k.range(0, static.groups) as group:
        samples = []
        for lane in range(LANES):
            wanted = group * LANES + lane
            sample = indices[k.select(wanted < count, wanted, count - 1)]
            classes.put(wanted, labels[sample])
            samples.append(data + sample * size)
        target = x + group * static.group

        def store(f: Value, values: Value) -> None:
            target.put(places[f], k.fma(values, k.spread(scale[f]), k.spread(shift[f])))

        is_bytes = getattr(data.kind, "width", 0) == 8
        whole = size - size % LANES if is_bytes else 0
        with k.range(0, whole, LANES) as f:
            for i, values in enumerate(_transposed(k, [each.vector(f) for each in samples])):
                store(f + i, k.cast(k.cast(values, I32), k.real))
        with k.range(whole, size) as f:
            values = k.zeros()
            for lane, sample in enumerate(samples):
                number = k.cast(sample[f], k.real)
                values = Value(k, k.builder.insert_element(values.ir, number.ir, I32(lane)))
            store(f, values)


def _transposed(k: Emitter, rows: list[Value]) -> list[Value]:
    """The columns of a 16 by 16 square: interleaving rows i and i + 8 four times."""
    low = [lane for i in range(LANES // 2) for lane in (i, LANES + i)]
    high = [lane + LANES // 2 for lane in low]
    for _ in range(4):
        rows = [k.shuffle(rows[i], rows[i + 8], half) for i in range(8) for half in (low, high)]
    return rows


# -- the loss --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Softmax:
    """The shape of the logits; whether the gradient is wanted."""

    num_classes: int
    layout: Layout
    slopes: bool


def softmax(
    k: Emitter,
    static: Softmax,
    logits: Pointer,
    d: Pointer,
    classes: Pointer,
    count: Value,
    totals: Pointer,
) -> None:
    """Cross-entropy: totals[0] += its sum over `count` samples, totals[1] += right answers.

    With slopes, d = (softmax - one_hot) / count, 0 in the lanes from `count` on; that of the right
    class is -(sum of the others' e^z) / (sum of all), which loses nothing where they are small.
    """
    num, stride = static.num_classes, static.layout.channel
    with k.range(0, static.layout.groups) as group:
        z, slopes = logits + group * static.layout.group, d + group * static.layout.group
        right = (classes + group * LANES).vector(0)
        lanes = k.spread(group * LANES) + k.constants(range(LANES), I64)
        present = lanes < count
        best, chosen = k.variable(z.vector(0)), k.variable(k.constants([0] * LANES, I32))
        with k.range(1, num) as c:
            value = z.vector(c * stride)
            is_more = value > best.get()
            chosen.set(k.select(is_more, k.cast(c, I32), chosen.get()))
            best.set(k.select(is_more, value, best.get()))
        own, others, picked = (k.variable(k.zeros()) for _ in range(3))
        with k.range(0, num) as c:
            value = z.vector(c * stride)
            is_right = right.equals(k.cast(c, I32))
            power = exponential(k, value - best.get())
            own.set(k.select(is_right, power, own.get()))
            picked.set(k.select(is_right, value, picked.get()))
            others.set(others.get() + k.select(is_right, 0.0, power))
            if static.slopes:
                slopes.put(c * stride, power)
        whole = own.get() + others.get()
        losses = k.select(present, (best.get() - picked.get()) + k.log(whole), 0.0)
        correct = k.select(present, k.select(chosen.get().equals(right), k.spread(1.0), 0.0), 0.0)
        for i, value in enumerate((losses, correct)):
            totals.put(i, totals[i] + k.cast(total(k, value), totals.kind))
        if static.slopes:
            share = k.select(present, 1 / (k.spread(k.cast(count, k.real)) * whole), 0.0)
            with k.range(0, num) as c:
                is_right = right.equals(k.cast(c, I32))
                slope = k.select(is_right, 0 - others.get(), slopes.vector(c * stride))
                slopes.put(c * stride, k.select(present, slope * share, 0.0))


def exponential(k: Emitter, x: Value) -> Value:
    """e^x for x <= 0: 2^n times the Taylor series at x - n log 2; 0 where it would underflow."""
    single = k.dtype == "float32"
    lowest, terms, width, mantissa = (-87.0, 8, I32, 23) if single else (-708.0, 14, I64, 52)
    high, low = (
        (0.693359375, -2.12194440e-4) if single else (0.6931471803691238, 1.9082149292705877e-10)
    )
    safe = k.select(x > lowest, x, lowest)
    n = k.floor(safe * 1.4426950408889634 + 0.5)
    rest = k.fma(n, k.spread(-low), k.fma(n, k.spread(-high), safe))
    series = k.spread(1.0)
    for term in range(terms, 0, -1):
        series = k.fma(rest * (1.0 / term), series, k.spread(1.0))
    bias = (1 << (8 if single else 11) - 1) - 1
    exponent = Value(k, k.builder.fptosi(n.ir, vector_of(width))) + bias
    shifted = k.builder.shl(exponent.ir, k.spread(Value(k, width(mantissa))).ir)
    power = series * k.bits(Value(k, shifted), k.real)
    return k.select(x.equals(x), k.select(x > lowest, power, 0.0), x)
