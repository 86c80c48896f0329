"""The kernels that go over a tensor once: normalization, pooling, sums, and changes of layout."""

from dataclasses import dataclass
from itertools import product as pairs

from windfall.engines.sparse.emit import LANES, Emitter, Pointer, Value
from windfall.engines.sparse.kernels import Post, tiles, total
from windfall.engines.sparse.layout import Layout, Sweep, sweep


def _posted(k: Emitter, post: Post, value: Value, out: Pointer, gate: Pointer, place: int) -> None:
    """Store a value as `post` says."""
    if post.part_gated:
        value = k.select(gate.vector(place) <= 0.0, 0.0, value)
    if post.adds:
        value = value + out.vector(place)
    if post.relu:
        value = k.select(value < 0.0, 0.0, value)  # NaN stays
    if post.gated:
        value = k.select(gate.vector(place) <= 0.0, 0.0, value)
    out.put(place, value)


def transfer(
    k: Emitter,
    static: tuple[Sweep, int, Post],
    x: Pointer,
    out: Pointer,
    gate: Pointer,
    channels: Value,
) -> None:
    """out = x, from one layout to another.

    Args:
        static: the places of one channel; from a channel of x to the next; what becomes of it.
    """
    places, x_channel, post = static
    with k.range(0, channels) as c:
        at = x + c * x_channel, out + c * places.out_channel, gate + c * places.out_channel
        with tiles(k, places, *at) as (_, x, out, gate):
            for x_place, place in places.tile:
                _posted(k, post, x.vector(x_place), out, gate, place)


def clear(k: Emitter, layout: Layout, out: Pointer) -> None:
    """All numbers become 0."""
    with k.range(0, layout.size, LANES) as i:
        out.put(i, k.zeros())


# -- batch normalization ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """A batch normalization.

    Args:
        x: the layout of what is normalized.
        out: of the result.
        count: samples in the batch.
        eps: added to the variance.
        momentum: of the running statistics.
        relu: the result is cut at 0.
        adds: another tensor of the result's layout is added before that.
    """

    x: Layout
    out: Layout
    count: int
    eps: float
    momentum: float
    relu: bool
    adds: bool

    @property
    def places(self) -> Sweep:
        """Of one channel."""
        return sweep(self.x, self.out, (self.out.height, self.out.width), one_group=True)

    @property
    def number(self) -> int:
        """Numbers a channel."""
        return self.count * self.out.height * self.out.width


def moments(
    k: Emitter,
    static: Norm,
    x: Pointer,
    present: Pointer,
    means: Pointer,
    scales: Pointer,
    running_means: Pointer,
    running_variances: Pointer,
) -> None:
    """The mean and 1 / sqrt(variance + eps) of each channel over the batch; running ones follow.

    They are taken from the differences to the channel's first number: the square of their mean is
    of the order of the variance, and little is lost in the one pass.

    Args:
        present: 1 in the lanes of samples, 0 in those that fill the last group.
    """
    places, number = static.places, static.number
    with k.range(0, static.x.channels) as c:
        origin = k.lane((x + c * static.x.channel).vector(static.x.origin), 0)
        first, second = k.variable(k.zeros()), k.variable(k.zeros())
        with tiles(k, places, x + c * static.x.channel) as (group, here):
            differences = [here.vector(place) - origin for place, _ in places.tile]
            squares = k.zeros()
            for each in differences:
                squares = k.fma(each, each, squares)
            lanes = present.vector(group * LANES)
            first.set(first.get() + lanes * sum(differences[1:], differences[0]))
            second.set(second.get() + lanes * squares)
        shift = total(k, first.get()) * (1 / number)
        variance = total(k, second.get()) * (1 / number) - shift * shift
        variance = k.select(variance < 0.0, k.value(0.0, k.real), variance)
        mean = origin + shift
        means.put(c, mean)
        scales.put(c, 1 / k.sqrt(variance + static.eps))
        unbiased = variance * (number / (number - 1)) if number > 1 else variance
        for running, value in ((running_means, mean), (running_variances, unbiased)):
            running.put(c, running[c] * (1 - static.momentum) + value * static.momentum)


def running_scales(k: Emitter, static: Norm, running_variances: Pointer, scales: Pointer) -> None:
    """1 / sqrt(running variance + eps) of each channel, for evaluation."""
    with k.range(0, static.x.channels) as c:
        scales.put(c, 1 / k.sqrt(running_variances[c] + static.eps))


def normalize(
    k: Emitter,
    static: Norm,
    x: Pointer,
    out: Pointer,
    other: Pointer,
    means: Pointer,
    scales: Pointer,
    weights: Pointer,
    biases: Pointer,
) -> None:
    """out = (x - mean) scale weight + bias (+ other), cut at 0 if there is a ReLU."""
    places = static.places
    with k.range(0, static.x.channels) as c:
        mean, bias = k.spread(means[c]), k.spread(biases[c])
        factor = k.spread(scales[c] * weights[c])
        target = c * static.out.channel
        at = x + c * static.x.channel, out + target, other + target
        with tiles(k, places, *at) as (_, x, out, other):
            for x_place, place in places.tile:
                value = k.fma(x.vector(x_place) - mean, factor, bias)
                if static.adds:
                    value = value + other.vector(place)
                _posted(k, Post(relu=static.relu), value, out, out, place)


def normalize_back(
    k: Emitter,
    both: tuple[Norm, Post],
    d: Pointer,
    x: Pointer,
    dx: Pointer,
    present: Pointer,
    means: Pointer,
    scales: Pointer,
    weights: Pointer,
    weight_slopes: Pointer,
    bias_slopes: Pointer,
) -> None:
    """The gradient for x, weight and bias from d, the gradient for the result.

    With h = (x - mean) scale:  dbias = sum d,  dweight = sum d h,
    dx = weight scale (d - dbias / n - h dweight / n).
    """
    static, post = both
    back = sweep(static.out, static.x, (static.x.height, static.x.width), one_group=True)
    with k.range(0, static.x.channels) as c:
        mean, scale = k.spread(means[c]), scales[c]
        sums, products = k.variable(k.zeros()), k.variable(k.zeros())
        at = d + c * static.out.channel, x + c * static.x.channel, dx + c * static.x.channel
        with tiles(k, back, *at) as (group, d_here, x_here, _):
            some, more = k.zeros(), k.zeros()
            for place, x_place in back.tile:
                slope = d_here.vector(place)
                some = some + slope
                more = k.fma(slope, x_here.vector(x_place) - mean, more)
            lanes = present.vector(group * LANES)
            sums.set(sums.get() + lanes * some)
            products.set(products.get() + lanes * more)
        whole, product = total(k, sums.get()), total(k, products.get()) * scale
        bias_slopes.put(c, whole)
        weight_slopes.put(c, product)
        factor = k.spread(weights[c] * scale)
        level = k.spread(whole * (1 / static.number))
        slant = k.spread(0 - product * scale * (1 / static.number))
        with tiles(k, back, *at) as (group, d_here, x_here, dx_here):
            lanes = factor * present.vector(group * LANES)
            for place, x_place in back.tile:
                rest = k.fma(x_here.vector(x_place) - mean, slant, d_here.vector(place) - level)
                _posted(k, post, rest * lanes, dx_here, x_here, x_place)


# -- pooling ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """A pooling of squares side by side.

    Args:
        x: the layout of what is pooled.
        out: of the result.
        size: rows and columns of a square.
        post: what becomes of the gradient for x.
    """

    x: Layout
    out: Layout
    size: tuple[int, int]
    post: Post

    @property
    def places(self) -> Sweep:
        """Of one channel: a square's first number in x, and its place in the result."""
        return _strided(self.x, self.out, self.size)

    @property
    def back(self) -> Sweep:
        """The same the other way: from the result to a square's first number."""
        there = self.places
        loops = tuple((count, out, x) for count, x, out in there.loops)
        return Sweep(loops, ((0, 0),), there.out_base, there.x_base, self.x.channel)

    @property
    def square(self) -> list[int]:
        """From a square's first number to each of them, by rows."""
        rows, columns = map(range, self.size)
        return [y * self.x.row + x * self.x.column for y, x in pairs(rows, columns)]


def _strided(x: Layout, out: Layout, size: tuple[int, int]) -> Sweep:
    """Like `sweep`, with a stride for rows and one for columns."""
    count = out.height, out.width
    loops = (
        (out.groups, x.group, out.group),
        (count[0], size[0] * x.row, out.row),
        (count[1], size[1] * x.column, out.column),
    )
    return Sweep(loops, ((0, 0),), x.origin, out.origin, out.channel)


def largest(k: Emitter, static: Pool, x: Pointer, out: Pointer) -> None:
    """The largest number of each square."""
    with k.range(0, static.x.channels) as c:
        at = x + c * static.x.channel, out + c * static.out.channel
        with tiles(k, static.places, *at) as (_, x, out):
            out.put(0, _largest(k, [x.vector(place) for place in static.square]))


def _largest(k: Emitter, values: list[Value]) -> Value:
    best = values[0]
    for value in values[1:]:
        more = k.select(value > best, value, best)
        best = k.select(value.equals(value), more, value)  # NaN stays
    return best


def largest_back(k: Emitter, static: Pool, d: Pointer, x: Pointer, dx: Pointer) -> None:
    """The gradient for x: the result's at the first largest number of its square, elsewhere 0."""
    with k.range(0, static.x.channels) as c:
        here = c * static.x.channel
        at = d + c * static.out.channel, x + here, dx + here
        with tiles(k, static.back, *at) as (_, d, x, dx):
            slope, values = k.variable(d.vector(0)), [x.vector(p) for p in static.square]
            best = _largest(k, values)
            for place, value in zip(static.square, values, strict=True):
                is_best = value.equals(best)
                given = k.select(is_best, slope.get(), 0.0)
                slope.set(k.select(is_best, 0.0, slope.get()))
                _posted(k, static.post, given, dx, x, place)


def mean(k: Emitter, static: Pool, x: Pointer, out: Pointer) -> None:
    """The mean of each square."""
    rows, columns = static.size
    with k.range(0, static.x.channels) as c:
        at = x + c * static.x.channel, out + c * static.out.channel
        with tiles(k, static.places, *at) as (_, x, out):
            sums = k.variable(k.zeros())
            with k.range(0, rows) as y:
                line = x + y * static.x.row
                with k.range(0, columns) as i:
                    sums.set(sums.get() + line.vector(i * static.x.column))
            out.put(0, sums.get() * (1 / (rows * columns)))


def mean_back(k: Emitter, static: Pool, d: Pointer, x: Pointer, dx: Pointer) -> None:
    """The gradient for x: each number of a square has its share of the result's."""
    rows, columns = static.size
    with k.range(0, static.x.channels) as c:
        here = c * static.x.channel
        at = d + c * static.out.channel, x + here, dx + here
        with tiles(k, static.back, *at) as (_, d, x, dx):
            share = d.vector(0) * (1 / (rows * columns))
            with k.range(0, rows) as y:
                line = y * static.x.row
                with k.range(0, columns) as i:
                    place = line + i * static.x.column
                    _posted(k, static.post, share, dx + place, x + place, 0)
