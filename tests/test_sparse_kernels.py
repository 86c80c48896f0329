"""The parts of the sparse engine: kernels against brute force, lists, the graph, machine code."""

import math
import operator
import platform
from collections import Counter, OrderedDict
from dataclasses import replace
from functools import partial
from itertools import pairwise

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from llvmlite import ir
from test_sparse import (  # noqa: F401  the fixtures are used by being here
    CLASSES,
    CONVOLUTIONS,
    GRAPHS,
    SHAPE,
    Made,
    assert_close,
    beginning,
    block,
    conv,
    made,
    mlp,
    norm2d,
    normed,
    one_thread,
    recipe_of,
    task,
)
from torch import nn

from windfall import models
from windfall.engines import sparse
from windfall.engines.contract import Unsupported
from windfall.engines.sparse import graph, kernels, machine, pack, passes, training
from windfall.engines.sparse.emit import I8, I32, I64, LANES, Pointer
from windfall.engines.sparse.graph import Add, Connect, Flatten, MaxPool, MeanPool, Normalize, Relu
from windfall.engines.sparse.kernels import Moments, Momentum, Post
from windfall.engines.sparse.layout import Layout, sweep, unflattened
from windfall.engines.sparse.machine import Code
from windfall.engines.sparse.program import Program

KINDS = {
    "uint8": I8,
    "int32": I32,
    "int64": I64,
    "float32": ir.FloatType(),
    "float64": ir.DoubleType(),
}
DTYPES = {"float32": 1e-5, "float64": 1e-13}


def run(kernel, static, *arguments, dtype="float64"):
    """Run one kernel: arrays are given as pointers, integers as 64 bits."""
    code = Code(dtype)
    numbers = [each for each in arguments if isinstance(each, int)]
    arrays = [each for each in arguments if not isinstance(each, int)]
    assert all(array.flags.c_contiguous for array in arrays)
    with code.entry("main", len(numbers)) as (k, table, values):
        ints, places = iter(values), iter(range(len(arrays)))
        given = [
            next(ints)
            if isinstance(each, int)
            else Pointer(k, table.address(next(places)), KINDS[each.dtype.name])
            for each in arguments
        ]
        k.call(kernel, static, *given)
    addresses = np.array([array.ctypes.data for array in arrays], np.int64)
    code.compiled().function("main", len(numbers))(addresses.ctypes.data, *numbers)


def stream(seed=0):
    return np.random.Generator(np.random.Philox(seed))


# -- layouts ---------------------------------------------------------------------------------------


def places(layout):
    """Of every number, [sample, channel, row, column], from the formula of `layout`."""
    g, c, y, x = np.indices((layout.groups, layout.channels, layout.height, layout.width))
    first = (
        layout.origin + g * layout.group + c * layout.channel + y * layout.row + x * layout.column
    )
    every = first[:, None] + np.arange(LANES).reshape(1, -1, 1, 1, 1)
    return every.reshape(-1, *every.shape[2:])


def stored(layout, values=None, dtype="float64"):
    """The values as the layout has them, and its channel of ones."""
    array = np.zeros(layout.size, dtype)
    if layout.is_flat:
        array[layout.channels * layout.channel :] = 1
    else:
        array.reshape(layout.groups, -1)[:, layout.channels * layout.channel :] = 1
    if values is not None:
        array[places(layout)] = values
    return array


def drawn(layout, seed=0):
    shape = (layout.groups * LANES, layout.channels, layout.height, layout.width)
    return stream(seed).standard_normal(shape)


LAYOUTS = [
    Layout(1, 3), Layout(2, 5), Layout(1, 3, 4, 5), Layout(3, 2, 5, 4, halo=2),
    Layout(2, 3, 1, 1, halo=1), Layout(2, 1, 1, 7),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_has_a_place_of_its_own_beside_the_halo_and_the_ones(layout):
    found = places(layout).ravel()
    assert len(set(found.tolist())) == len(found)
    array = np.zeros(layout.size)
    array[found] = 1  # and none beyond the size
    ones = LANES * layout.groups * (layout.height + 2 * layout.halo)
    ones *= layout.width + 2 * layout.halo
    assert np.count_nonzero(stored(layout)) == ones
    assert not (array * stored(layout)).any()


@pytest.mark.parametrize("most", [1, 4, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sweep_comes_to_every_place_once(layout, most):
    other = replace(layout, halo=1)
    swept = sweep(layout, other, (layout.height, layout.width), most=most)
    assert 1 <= len(swept.tile) <= most
    pairs = [(swept.x_base, swept.out_base)]
    for count, x_stride, out_stride in swept.loops:
        pairs = [(x + i * x_stride, o + i * out_stride) for x, o in pairs for i in range(count)]
    pairs = {(x + dx, o + do) for x, o in pairs for dx, do in swept.tile}
    firsts = zip(
        *(places(each)[::LANES, 0].ravel().tolist() for each in (layout, other)), strict=True
    )
    assert pairs == set(firsts)


# -- products, gradients and their lists -----------------------------------------------------------

GEOMETRIES = {
    "linear": ((9, 40, 1, 1), (1, 1), {}),
    "3x3": ((6, 4, 3, 3), (5, 7), {"padding": (1, 1)}),
    "3x3 without padding": ((6, 4, 3, 3), (5, 7), {}),
    "5x5": ((3, 2, 5, 5), (6, 5), {"padding": (2, 2)}),
    "1x1": ((5, 20, 1, 1), (4, 6), {}),
    "stride 2": ((6, 4, 3, 3), (5, 8), {"stride": (2, 2), "padding": (1, 1)}),
    "stride 3": ((3, 4, 2, 3), (7, 6), {"stride": (3, 3), "padding": (1, 0)}),
    "1x1, stride 2": ((6, 4, 1, 1), (5, 7), {"stride": (2, 2)}),
    "dilation": ((6, 4, 3, 2), (7, 6), {"dilation": (2, 3), "padding": (2, 1)}),
    "groups": ((6, 2, 3, 3), (5, 4), {"groups": 3, "padding": (1, 1)}),
    "to one place": ((6, 4, 3, 4), (3, 4), {}),
}


def connected(geometry, *, groups=2, most=16, has_bias=True):
    """A connection of this geometry; the halos are wide enough for any."""
    shape, (height, width), given = GEOMETRIES[geometry]
    settings = {"groups": 1, "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)} | given
    size = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, p, d, k, s in zip(
            (height, width), settings["padding"], settings["dilation"], shape[2:],
            settings["stride"], strict=True,
        )
    ]  # fmt: skip
    halo = 0 if geometry == "linear" else 5
    x = Layout(groups, shape[1] * settings["groups"], height, width, halo)
    out = Layout(groups, shape[0], *size, halo)
    return pack.Connection(shape, has_bias=has_bias, x=x, out=out, most=most, **settings)


def kept_of(connection, density=0.5, seed=1):
    return np.flatnonzero(stream(seed).random(connection.shape) < density)


def in_blocks(monkeypatch):
    """As if the cache held two channels, so that a list has several blocks."""
    monkeypatch.setattr(pack, "CACHE", 1)
    monkeypatch.setattr(pack, "LEAST", 1)


def product(connection, swept, listed, weights, x, out, post=None, *, positions=None):
    is_transposed = positions is not None
    run(
        kernels.product, (swept, post or Post(), is_transposed), x, out, out, listed.rows,
        listed.blocks, listed.starts, listed.offsets, weights,
        listed.sources if positions is None else positions,
    )  # fmt: skip


@pytest.mark.parametrize(("most", "blocks"), [(1, "blocks"), (4, "one block"), (16, "blocks")])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_products_and_gradients_are_those_of_a_convolution(geometry, blocks, most, monkeypatch):
    if blocks == "blocks":
        in_blocks(monkeypatch)
    c = connected(geometry, most=most)
    kept = kept_of(c)
    size = math.prod(c.shape)
    both = np.zeros(size + c.shape[0])  # weights, biases
    both[kept] = stream(2).standard_normal(len(kept))
    both[size:] = stream(3).standard_normal(c.shape[0])
    x, d = torch.from_numpy(drawn(c.x, 4)), torch.from_numpy(drawn(c.out, 5))
    d[20:] = 0  # as of the samples that fill the last group
    weight, bias = (torch.from_numpy(w) for w in (both[:size].reshape(c.shape), both[size:]))
    for each in (x, weight, bias):
        each.requires_grad_()
    expected = F.conv2d(x, weight, bias, c.stride, c.padding, c.dilation, c.groups)
    expected.backward(d)

    listed = pack.entries(c, kept, 8)
    assert listed.blocks > 1 or blocks == "one block"
    out = stored(c.out)
    product(c, c.forward, listed, both[listed.sources], stored(c.x, x.detach()), out)
    np.testing.assert_allclose(out[places(c.out)], expected.detach(), rtol=0, atol=1e-12)
    beside = np.ones(c.out.size, bool)
    beside[places(c.out).ravel()] = False
    assert (out[beside] == stored(c.out)[beside]).all()

    dx, slopes = stored(c.x), stored(c.out, d)
    dx[places(c.x)] = np.nan  # every place is written
    for residue in c.residues:
        back = pack.transposed(c, listed, residue, 8)
        product(
            c, c.backward(residue), back, both[listed.sources], slopes, dx, positions=back.sources
        )
    np.testing.assert_allclose(dx[places(c.x)], x.grad, rtol=0, atol=1e-12)
    assert not dx[places(c.x)][20:].any()

    g = np.zeros(len(listed.sources) + LANES)
    offsets = np.concatenate([listed.offsets, np.zeros(LANES, np.int32)])
    run(
        kernels.gradient, c.forward, stored(c.x, x.detach()), slopes, listed.rows,
        listed.blocks, listed.starts, offsets, g,
    )  # fmt: skip
    slope = np.concatenate([weight.grad.ravel(), bias.grad])
    np.testing.assert_allclose(g[:-LANES], slope[listed.sources], rtol=0, atol=1e-11)
    assert not g[-LANES:].any()


@pytest.mark.parametrize("most", [1, 2, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_rows_of_any_length_are_summed_over_all_tiles(dtype, most):
    """Row r has r entries: none, tails of every length, one whole vector, and more."""
    rows, groups = 36, 4
    x, out = Layout(groups, 40), Layout(groups, rows)
    c = pack.Connection((rows, 40, 1, 1), 1, (1, 1), (0, 0), (1, 1), False, x, out, most)
    kept = np.concatenate(
        [row * 40 + np.sort(stream(row).permutation(40)[:row]) for row in range(rows)]
    )
    listed = pack.entries(c, kept, 8)
    assert (listed.blocks, np.diff(listed.starts).tolist()) == (1, list(range(rows)))
    values, slopes = (drawn(each, i).astype(dtype) for i, each in enumerate((x, out)))
    g = np.zeros(len(kept) + LANES, dtype)
    offsets = np.concatenate([listed.offsets, np.zeros(LANES, np.int32)])
    run(
        kernels.gradient, c.forward, stored(x, values, dtype), stored(out, slopes, dtype),
        rows, 1, listed.starts, offsets, g, dtype=dtype,
    )  # fmt: skip
    expected = np.einsum("nr,nc->rc", slopes[..., 0, 0].astype(float), values[..., 0, 0]).ravel()
    np.testing.assert_allclose(g[: len(kept)], expected[kept], rtol=0, atol=100 * DTYPES[dtype])
    assert not g[len(kept) :].any()


@pytest.mark.parametrize("blocks", ["one block", "blocks"])
@pytest.mark.parametrize(
    "post", [Post(relu=True), Post(gated=True), Post(adds=True), Post(False, True, True)]
)
def test_a_product_is_cut_gated_and_added_once_its_blocks_are_summed(post, blocks, monkeypatch):
    if blocks == "blocks":
        in_blocks(monkeypatch)
    c = connected("linear")
    kept, weights = kept_of(c), stream(2).standard_normal(9 * 40 + 9)
    listed = pack.entries(c, kept, 8)
    x, before, gate = drawn(c.x, 1), drawn(c.out, 2), drawn(c.out, 3)
    gate[0, 0], x[5, :] = 0, np.nan
    mask = np.zeros(360)
    mask[kept] = 1
    dense = (weights[:360] * mask).reshape(9, 40)
    expected = np.einsum("nc,rc->nr", x[..., 0, 0], dense) + weights[360:]
    out = stored(c.out, before)
    run(
        kernels.product, (c.forward, post, False), stored(c.x, x), out, stored(c.out, gate),
        listed.rows, listed.blocks, listed.starts, listed.offsets, weights[listed.sources],
        listed.sources,
    )  # fmt: skip
    expected = posted(post, expected, before[..., 0, 0], gate[..., 0, 0])
    np.testing.assert_allclose(out[places(c.out)][..., 0, 0], expected, rtol=0, atol=1e-12)


def posted(post, value, before, gate):
    """What becomes of a result, by hand: NaN stays unless its gate is closed."""
    value = value + before if post.adds else value
    value = np.where(value < 0, 0, value) if post.relu else value
    return np.where(gate <= 0, 0, value) if post.gated else value


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("blocks", ["one block", "blocks"])
@pytest.mark.parametrize("density", [1, 0.4, 0.02, 0])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_kept_weight_is_listed_exactly_once(geometry, density, blocks, has_bias, monkeypatch):
    if blocks == "blocks":
        in_blocks(monkeypatch)
    c = connected(geometry, has_bias=has_bias)
    kept, size = kept_of(c, density), math.prod(c.shape)
    listed = pack.entries(c, kept, 4)
    biases = list(range(size, size + c.shape[0])) if has_bias else []
    assert sorted(listed.sources.tolist()) == [*kept.tolist(), *biases]
    assert_consistent(listed)
    row = np.where(
        listed.sources < size, listed.sources // math.prod(c.shape[1:]), listed.sources - size
    )
    here = np.repeat(np.arange(listed.blocks * listed.rows), np.diff(listed.starts))
    assert (here % listed.rows).tolist() == row.tolist()

    seen = Counter()
    for residue in c.residues:
        back = pack.transposed(c, listed, residue, 4)
        assert_consistent(back)
        seen.update(back.sources.tolist())
    alive = np.flatnonzero(listed.sources < size).tolist()
    assert set(seen) <= set(alive)
    assert max(seen.values(), default=1) == 1
    # A weight of a strided layer whose places all lie outside the image has no residue.
    assert geometry == "stride 3" or sorted(seen) == alive


def assert_consistent(listed):
    assert listed.starts[0] == 0
    assert listed.starts[-1] == len(listed.sources) == len(listed.offsets)
    assert len(listed.starts) == listed.blocks * listed.rows + 1
    assert (np.diff(listed.starts) >= 0).all()
    assert {a.dtype.name for a in (listed.starts, listed.offsets, listed.sources)} == {"int32"}


def test_blocks_cut_the_inputs_in_ranges_that_do_not_overlap(monkeypatch):
    in_blocks(monkeypatch)
    c = connected("linear")
    listed = pack.entries(c, kept_of(c, 0.7), 8)
    block_of = (
        np.repeat(np.arange(listed.blocks * listed.rows), np.diff(listed.starts)) // listed.rows
    )
    ranges = [listed.offsets[block_of == b] for b in range(listed.blocks)]
    ranges = [(each.min(), each.max()) for each in ranges if len(each)]
    assert len(ranges) > 5
    assert all(one[1] < other[0] for one, other in pairwise(ranges))


# -- the optimizers --------------------------------------------------------------------------------

RULES = {
    "plain": (Momentum(0.0, False, 0.0), lambda w: torch.optim.SGD(w, 0.1)),
    "decay": (Momentum(0.0, False, 0.1), lambda w: torch.optim.SGD(w, 0.1, weight_decay=0.1)),
    "momentum": (
        Momentum(0.9, False, 0.1),
        lambda w: torch.optim.SGD(w, 0.1, 0.9, weight_decay=0.1),
    ),
    "nesterov": (Momentum(0.9, True, 0.0), lambda w: torch.optim.SGD(w, 0.1, 0.9, nesterov=True)),
    "adam": (Moments(0.8, 0.99, 1e-6, 0.0), lambda w: torch.optim.Adam(w, 0.1, (0.8, 0.99), 1e-6)),
    "adam, decay": (
        Moments(0.9, 0.999, 1e-8, 0.1),
        lambda w: torch.optim.Adam(w, 0.1, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_moves_weights_as_torch_does_and_clears_their_gradients(rule, dtype):
    rule, build = RULES[rule]
    count = 48
    w, m, v = (np.zeros(count, dtype) for _ in range(3))
    w[:] = stream(0).standard_normal(count)
    weight = torch.from_numpy(w.astype(float)).requires_grad_()
    optimizer = build([weight])
    for step in range(1, 5):
        g = (stream(step).standard_normal(count) * 10.0 ** np.arange(-8, 4).repeat(4)).astype(dtype)
        weight.grad = torch.from_numpy(g.astype(float))
        optimizer.step()
        rates = np.array([0.1, 1.0])
        if isinstance(rule, Moments):
            rates = np.array([0.1 / (1 - rule.beta1**step), (1 - rule.beta2**step) ** -0.5])
        run(kernels.update, rule, w, g, m, v, count, rates, dtype=dtype)
        assert not g.any()
    np.testing.assert_allclose(w, weight.detach(), rtol=0, atol=10 * DTYPES[dtype])
    kinds = {"momentum_buffer": m, "exp_avg": m, "exp_avg_sq": v}
    for kind, value in optimizer.state[weight].items():
        if kind != "step" and value is not None:
            np.testing.assert_allclose(kinds[kind], value, rtol=10 * DTYPES[dtype])


# -- the loss --------------------------------------------------------------------------------------


def softmax(logits, classes, count, *, slopes=True, dtype="float64"):
    """The kernel's totals, on top of 10 and 20, and gradient [sample, class]."""
    num_samples, num_classes = logits.shape
    layout = Layout(num_samples // LANES, num_classes)
    static = kernels.Softmax(num_classes, layout, slopes=slopes)
    d, totals = stored(layout, dtype=dtype), np.array([10.0, 20.0])
    z = stored(layout, logits[..., None, None], dtype)
    run(kernels.softmax, static, z, d, classes.astype(np.int32), count, totals, dtype=dtype)
    return totals - [10, 20], d[places(layout)][..., 0, 0]


def loss_by_hand(z, classes):
    """Losses and their slopes, the right class's as minus the sum of the others'."""
    right = np.arange(z.shape[1]) == classes[:, None]
    powers = np.exp(z - z.max(1, keepdims=True))
    shares = powers / powers.sum(1, keepdims=True)
    slopes = np.where(right, -np.where(right, 0, shares).sum(1, keepdims=True), shares)
    return np.log(powers.sum(1)) + z.max(1) - z[right], slopes


@pytest.mark.parametrize(
    ("num", "count", "num_classes"),
    [(16, 1, 3), (16, 16, 1), (32, 17, 10), (48, 47, 2), (48, 33, 37)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_and_its_gradient_are_as_by_hand(dtype, num, count, num_classes):
    logits = 3 * stream(0).standard_normal((num, num_classes))
    logits[: num // 2] *= 20
    logits = logits.astype(dtype)
    classes = stream(1).integers(0, num_classes, num)
    losses, slopes = loss_by_hand(logits[:count].astype(float), classes[:count])
    totals, d = softmax(logits, classes, count, dtype=dtype)
    assert totals[0] == pytest.approx(losses.sum(), rel=10 * DTYPES[dtype], abs=10 * DTYPES[dtype])
    assert totals[1] == (logits[:count].argmax(1) == classes[:count]).sum()
    np.testing.assert_allclose(d[:count], slopes / count, rtol=20 * DTYPES[dtype], atol=1e-37)
    assert not d[count:].any()
    alone, untouched = softmax(logits, classes, count, slopes=False, dtype=dtype)
    assert alone.tolist() == totals.tolist()
    assert not untouched.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_equal_and_missing_logits_are_as_by_torch(dtype):
    huge, inf, nan = 1e30, math.inf, math.nan
    rows = np.array(
        [[huge, 0, -huge], [-huge, 0, huge], [2, 2, 2], [-5, 7, 7], [80, -80, 0], [0, -inf, 1]]
    ).astype(dtype)
    for row in rows:
        for label in range(3):
            logits, classes = np.repeat(row[None], 16, 0), np.full(16, label)
            z = torch.from_numpy(row.astype(float))[None].requires_grad_()
            loss = F.cross_entropy(z, torch.tensor([label]))
            loss.backward()
            totals, d = softmax(logits, classes, 1, dtype=dtype)
            assert totals[0] == pytest.approx(loss.item(), rel=10 * DTYPES[dtype])
            assert totals[1] == (row.argmax() == label)  # the first among equals
            if math.isfinite(loss.item()):
                np.testing.assert_allclose(d[0], z.grad[0], rtol=20 * DTYPES[dtype], atol=1e-30)
    for row in ([nan, 0, 1], [0, nan, 1], [0, 1, nan], [inf, 0, 1], [nan, nan, nan]):
        logits = np.zeros((16, 3), dtype)
        logits[3] = row
        assert math.isnan(softmax(logits, np.zeros(16), 16, dtype=dtype)[0][0])
        assert math.isfinite(softmax(logits, np.zeros(16), 3, dtype=dtype)[0][0])


def test_a_gradient_that_is_small_keeps_its_digits():
    """The right class's, 1 - softmax, would lose all of them as a difference."""
    logits = np.tile(np.array([40.0, 1.0, 0.0], np.float32), (16, 1))
    _, d = softmax(logits, np.zeros(16), 1, dtype="float32")
    expected = -(math.exp(-39) + math.exp(-40))
    assert d[0, 0] == pytest.approx(expected, rel=1e-5)


def powers(k, static, x, out, count):
    with k.range(0, count, LANES) as i:
        out.put(i, kernels.exponential(k, x.vector(i)))


@pytest.mark.parametrize(("dtype", "lowest"), [("float32", -86.99), ("float64", -707.9)])
def test_the_exponential_is_right_to_two_units_in_the_last_place(dtype, lowest):
    near = -np.logspace(-18, 0, 4096)
    x = np.concatenate([np.linspace(lowest, 0, 60_000), near]).astype(dtype)
    x = np.concatenate([x, np.zeros(-len(x) % LANES, dtype)])
    out = np.empty_like(x)
    run(powers, None, x, out, len(x), dtype=dtype)
    expected = np.array([math.exp(each) for each in x.tolist()])
    error = np.abs(out.astype(np.longdouble) - expected) / np.spacing(expected.astype(dtype))
    assert error.max() <= 2
    assert (out[x == 0] == 1).all()
    assert (out <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_exponential_is_zero_where_it_would_underflow_and_keeps_what_is_no_number(dtype):
    x = np.array([-1e4, -math.inf, math.nan, -800, -np.finfo(dtype).max, 0, -0.0, -1] * 2).astype(
        dtype
    )
    out = np.empty_like(x)
    run(powers, None, x, out, len(x), dtype=dtype)
    np.testing.assert_allclose(
        out[:8], [0, 0, math.nan, 0, 0, 1, 1, math.exp(-1)], rtol=2e-7, equal_nan=True
    )


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("data_type", ["uint8", "float32", "float64"])
@pytest.mark.parametrize(("size", "count"), [(1, 37), (7, 16), (16, 48), (17, 1), (40, 37)])
def test_a_batch_is_gathered_scaled_and_transposed(count, size, data_type, dtype):
    groups = -(-count // LANES)
    layout = Layout(groups, size)
    data = stream(0).integers(0, 256, (50, size)).astype(data_type)
    labels, indices = stream(1).integers(0, 9, 50), stream(2).permutation(50)[:count]
    scale, shift = (stream(seed).standard_normal(size).astype(dtype) for seed in (3, 4))
    order = stream(5).permutation(size)  # features may lie in any order
    x, classes = stored(layout, dtype=dtype), np.full(groups * LANES, -1, np.int32)
    run(
        kernels.gather, kernels.Gather(size, groups, layout.group), data, labels, indices, count,
        (order * layout.channel).astype(np.int32), scale, shift, x, classes, dtype=dtype,
    )  # fmt: skip
    lanes = indices[np.minimum(np.arange(groups * LANES), count - 1)]
    expected = np.empty((len(lanes), size))
    expected[:, order] = data[lanes].astype(float) * scale + shift
    found = x[places(layout)][..., 0, 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e3 * DTYPES[dtype])
    assert classes.tolist() == labels[lanes].tolist()
    assert (x[size * layout.channel :] == 1).all()


# -- passes ----------------------------------------------------------------------------------------

FROM_TO = [
    (Layout(2, 3, 5, 4, halo=1), Layout(2, 3, 5, 4)),
    (Layout(1, 2, 4, 4), Layout(1, 2, 4, 4, halo=2)),
    (Layout(3, 20), Layout(3, 20)),
]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("here", "there"), FROM_TO)
def test_a_transfer_adds_cuts_and_gates(here, there, relu, gated, adds):
    post = Post(relu, gated, adds)
    x, before, gate = drawn(here, 0), drawn(there, 1), drawn(there, 2)
    x[1], gate[2], gate[3] = math.nan, 0, -0.0
    out = stored(there, before)
    beside = np.ones(there.size, bool)
    beside[places(there).ravel()] = False
    kept = out[beside].copy()
    swept = sweep(here, there, (there.height, there.width))
    static = swept, here.channel, post
    run(passes.transfer, static, stored(here, x), out, stored(there, gate), there.channels)
    np.testing.assert_array_equal(out[places(there)], posted(post, x, before, gate))
    assert (out[beside] == kept).all()


@pytest.mark.parametrize("halo", [0, 2])
def test_an_image_is_flattened_as_torch_does_and_back(halo):
    image, flat = Layout(2, 3, 4, 5, halo), Layout(2, 60)
    view, x = unflattened(flat, image), drawn(image)
    out, back = stored(flat), stored(image)
    swept = sweep(image, view, (4, 5))
    run(passes.transfer, (swept, image.channel, Post()), stored(image, x), out, out, 3)
    np.testing.assert_array_equal(out[places(flat)][..., 0, 0], x.reshape(32, 60))
    swept = sweep(view, image, (4, 5))
    run(passes.transfer, (swept, view.channel, Post()), out, back, back, 3)
    np.testing.assert_array_equal(back, stored(image, x))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("here", "there"), FROM_TO)
def test_a_batch_is_normalized_there_and_back_as_by_torch(here, there, adds, relu):
    count = here.groups * LANES - 5
    norm = passes.Norm(here, there, count, 1e-3, 0.2, relu, adds)
    channels = here.channels
    x, other, d = (drawn(each, i) for i, each in enumerate((here, there, there)))
    x, d[count:] = 3 * x + 7, 0
    weights, biases = (stream(seed).standard_normal(channels) for seed in (3, 4))
    running = [stream(5).standard_normal(channels), stream(6).random(channels)]
    given = [torch.from_numpy(each) for each in (x[:count], weights, biases, other[:count])]
    for each in given:
        each.requires_grad_()
    theirs = [torch.from_numpy(each.copy()) for each in running]
    made_of = F.batch_norm(given[0], *theirs, *given[1:3], training=True, momentum=0.2, eps=1e-3)
    made_of = made_of + given[3] if adds else made_of
    expected = F.relu(made_of) if relu else made_of
    made_of.backward(torch.from_numpy(d[:count]))  # a ReLU's gate is shut by who reads it

    present = (np.arange(here.groups * LANES) < count).astype(float)
    means, scales, out = np.zeros(channels), np.zeros(channels), stored(there)
    array = stored(here, x)
    run(passes.moments, norm, array, present, means, scales, *running)
    run(passes.normalize, norm, array, out, stored(there, other), means, scales, weights, biases)
    np.testing.assert_allclose(out[places(there)][:count], expected.detach(), rtol=0, atol=1e-12)
    for mine, their in zip(running, theirs, strict=True):
        np.testing.assert_allclose(mine, their, rtol=1e-12)
    inverse = np.zeros(channels)
    run(passes.running_scales, norm, running[1], inverse)
    np.testing.assert_allclose(inverse, (theirs[1] + 1e-3) ** -0.5, rtol=1e-12)

    dx, slopes = stored(here), [np.zeros(channels) for _ in range(2)]
    run(
        passes.normalize_back, (norm, Post()), stored(there, d), array, dx, present, means, scales,
        weights, *slopes,
    )  # fmt: skip
    np.testing.assert_allclose(dx[places(here)][:count], given[0].grad, rtol=0, atol=1e-12)
    assert not dx[places(here)][count:].any()
    for mine, their in zip(slopes, given[1:3], strict=True):
        np.testing.assert_allclose(mine, their.grad, rtol=0, atol=1e-11)


def pooled(kind, size, x, **settings):
    return {"max": F.max_pool2d, "mean": F.avg_pool2d}[kind](x, size, **settings)


KERNELS = {
    "max": (passes.largest, passes.largest_back),
    "mean": (passes.mean, passes.mean_back),
}


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("size", [(2, 2), (3, 3), (2, 3), (1, 1), (5, 7)])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("gated", "adds"), [(False, False), (True, False), (False, True)])
def test_squares_are_pooled_there_and_back_as_by_torch(kind, size, ties, gated, adds):
    here = Layout(2, 3, 5, 7, halo=1)
    there = Layout(2, 3, 5 // size[0], 7 // size[1], halo=0 if ties else 2)
    x, d, before = drawn(here, 0), drawn(there, 1), drawn(here, 2)
    if ties:
        x = np.round(x)  # the first among equals takes it all
    given = torch.from_numpy(x).requires_grad_()
    expected = pooled(kind, size, given)
    expected.backward(torch.from_numpy(d))
    static = passes.Pool(here, there, size, Post(gated=gated, adds=adds))
    forward, back = KERNELS[kind]
    out = stored(there)
    run(forward, static, stored(here, x), out)
    np.testing.assert_allclose(out[places(there)], expected.detach(), rtol=0, atol=1e-14)
    dx = stored(here, before if adds else None)
    run(back, static, stored(there, d), stored(here, x), dx)
    rows, columns = there.height * size[0], there.width * size[1]
    expected = posted(static.post, given.grad.numpy(), before, x)[:, :, :rows, :columns]
    np.testing.assert_allclose(
        dx[places(here)][:, :, :rows, :columns], expected, rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("place", range(4))
def test_what_is_no_number_is_pooled_to_what_is_no_number(kind, place):
    here, there = Layout(1, 1, 2, 2), Layout(1, 1)
    x = drawn(here)
    x.reshape(LANES, 4)[3, place] = math.nan
    out = stored(there)
    run(KERNELS[kind][0], passes.Pool(here, there, (2, 2), Post()), stored(here, x), out)
    assert np.isnan(out[places(there)].ravel()).tolist() == [lane == 3 for lane in range(LANES)]


# -- the graph -------------------------------------------------------------------------------------


def ops_of(build, shape=SHAPE):
    return graph.read(build(), shape).ops


def kinds(build, shape=SHAPE):
    return Counter(type(op) for op in ops_of(build, shape))


def test_relu_and_sums_are_taken_on_where_nothing_else_reads_them():
    found = kinds(lambda: models.Resnet_20(width=0.1).build((3, 8, 8), CLASSES), (3, 8, 8))
    assert found == {Connect: 22, Normalize: 21, MeanPool: 1, Flatten: 1}
    found = ops_of(lambda: models.Resnet_20(width=0.1).build((3, 8, 8), CLASSES), (3, 8, 8))
    norms = [op for op in found if isinstance(op, Normalize)]
    assert sum(op.other is not None for op in norms) == 9
    assert sum(op.relu for op in norms) == 19
    found = kinds(lambda: models.Conv_4(width=0.1).build((3, 8, 8), CLASSES), (3, 8, 8))
    assert found == {Connect: 7, MaxPool: 2, Flatten: 1}
    assert kinds(mlp) == {Connect: 3}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("ReLU read beside its input", Relu), ("ReLU of the input", Relu),
        ("sum of halos", Add), ("a sum read twice", Add),
    ],
)  # fmt: skip
def test_what_another_operation_reads_is_not_taken_on(case, kind):
    assert kinds(GRAPHS[case])[kind] >= 1


def functional(**forms):
    """A network whose layers without weights are functions, or modules if given as such."""
    forms = {
        "relu": F.relu,
        "flatten": lambda x: torch.flatten(x, 1),
        "add": operator.add,
        "pool": lambda x: F.avg_pool2d(x, 2),
    } | forms
    modules = {f"{n}_": lambda m=m: m for n, m in forms.items() if isinstance(m, nn.Module)}

    def forward(net, x):
        use = {name: getattr(net, f"{name}_", form) for name, form in forms.items()}
        x = use["relu"](net.conv(x))
        x = use["pool"](use["relu"](use["add"](net.two(x), x)))
        return net.output(use["flatten"](x))

    layers = {"conv": conv(), "two": conv(4, 4), "output": lambda: nn.Linear(24, CLASSES)}
    return made(forward, **layers, **modules)


@pytest.mark.parametrize(
    "form",
    [
        {"relu": torch.relu}, {"relu": lambda x: x.relu()}, {"relu": nn.ReLU()},
        {"relu": lambda x: F.relu(x, inplace=False)},
        {"flatten": lambda x: x.flatten(1)}, {"flatten": lambda x: torch.flatten(x, start_dim=1)},
        {"flatten": lambda x: x.view(x.size(0), -1)}, {"flatten": lambda x: x.view(-1, 24)},
        {"flatten": lambda x: x.reshape(x.shape[0], -1)},
        {"flatten": nn.Flatten()}, {"add": torch.add}, {"add": lambda x, y: x.add(y)},
        {"add": operator.iadd}, {"pool": nn.AvgPool2d(2)},
        {"pool": lambda x: F.avg_pool2d(x, kernel_size=2, stride=2)},
    ],
)  # fmt: skip
def test_two_spellings_are_one_network(form):
    assert ops_of(functional(**form)) == ops_of(functional())


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ({"pool": lambda x: F.max_pool2d(x, 2)}, MaxPool),
        ({"pool": lambda x: F.max_pool2d(x, kernel_size=2, stride=2)}, MaxPool),
        ({"pool": lambda x: F.adaptive_avg_pool2d(x, (1, 1))}, MeanPool),
    ],
)
def test_functional_pools_are_read(form, kind):
    network = functional(**form)()
    network.output = nn.Linear(24 if kind is MaxPool else 4, CLASSES)
    assert any(isinstance(op, kind) for op in graph.read(network, SHAPE).ops)


def shared():
    layer = nn.Linear(70, 70)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.Linear(70, 3))


def changed(change):
    """The small convolutional network, changed."""

    def build():
        network = CONVOLUTIONS["3x3"]()
        change(network)
        return network

    return build


def with_layer(layer, name="odd", size=140):
    """A layer of this name after a convolution."""
    return made(
        lambda net, x: net.output(getattr(net, name)(net.conv(x)).flatten(1)),
        conv=conv(), **{name: layer}, output=lambda: nn.Linear(size, CLASSES),
    )  # fmt: skip


def with_function(function, size=140):
    return made(
        lambda net, x: net.output(function(net.conv(x)).flatten(1)),
        conv=conv(), output=lambda: nn.Linear(size, CLASSES),
    )  # fmt: skip


class Scaled(nn.Module):
    """A parameter of its own, beside a layer's."""

    def __init__(self):
        super().__init__()
        self.scale, self.output = nn.Parameter(torch.ones(())), nn.Linear(70, CLASSES)

    def forward(self, inputs):
        return self.output(inputs.flatten(1)) * self.scale


class Untraceable(nn.Linear):
    """What it does depends on what it sees."""

    def forward(self, inputs):
        inputs = inputs.flatten(1)
        return super().forward(inputs if inputs.sum() > 0 else -inputs)


def two_modes(net, x):
    x = net.one(x.flatten(1))
    return net.output(F.relu(x) if net.training else x)


def in_place_after(net, x):
    x = net.conv(x)
    return net.output((F.relu(x, inplace=True) + x).flatten(1))


def in_place_of_a_view(net, x):
    x = net.conv(x)
    return net.output(F.relu(x.flatten(1), inplace=True)) + net.two(net.pool(x).flatten(1))


REFUSED = {
    "dropout": (with_layer(lambda: nn.Dropout(0.3)), r"`odd` \(Dropout\)"),
    "dropout of images": (with_layer(lambda: nn.Dropout2d(0.3)), r"`odd` \(Dropout2d\)"),
    "layer norm": (with_layer(lambda: nn.LayerNorm(7)), r"`odd` \(LayerNorm\)"),
    "group norm": (with_layer(lambda: nn.GroupNorm(2, 4)), r"`odd` \(GroupNorm\)"),
    "tanh": (with_layer(nn.Tanh), r"`odd` \(Tanh\)"),
    "shared layer": (shared, "`1` is used 2 times"),
    "unused layer": (
        made(
            lambda net, x: net.output(x.flatten(1)),
            spare=lambda: nn.Linear(2, 2),
            output=lambda: nn.Linear(70, CLASSES),
        ),
        "`spare` is used 0 times",
    ),
    "frozen": (
        changed(lambda n: n.output.weight.requires_grad_(False)),
        "`output.weight` is frozen",
    ),
    "hook": (changed(lambda n: n.body[0].register_forward_hook(print)), "`body.0` has hooks"),
    "hook before": (
        changed(lambda n: n.body[0].register_forward_pre_hook(print)),
        "`body.0` has hooks",
    ),
    "backward hook": (
        changed(lambda n: n.body[2].register_full_backward_hook(print)),
        "`body.2` has hooks",
    ),
    "gradient's hook": (
        changed(lambda n: n.body[0].weight.register_hook(lambda g: 0 * g)),
        r"`body\.0",
    ),
    "parameter": (Scaled, "`scale`"),
    "sigmoid": (with_function(torch.sigmoid), "`sigmoid`"),
    "method": (with_function(lambda x: x.abs()), "`abs`"),
    "product": (with_function(lambda x: x * x), "`mul`"),
    "sum with a number": (with_function(lambda x: x + 1), "`add`"),
    "sum with a number that is a tensor's": (with_function(lambda x: F.relu(x) + 1), "`add`"),
    "doubled": (with_function(lambda x: x + x), "`add`"),
    "weighted sum": (with_function(lambda x: torch.add(x, F.relu(x), alpha=2)), "`add`"),
    "weighted sum, a method": (with_function(lambda x: x.add(F.relu(x), alpha=2)), "`add`"),
    "a part": (with_function(lambda x: x[:, :2], 70), "`getitem`"),
    "a part, cut": (with_function(lambda x: F.relu(x[:, :2]), 70), "`getitem`"),
    "a view": (with_function(lambda x: x.view(-1, 70), 70), "`view`"),
    "flattened in part": (with_function(lambda x: torch.flatten(x, 2)), "`flatten`"),
    "momentum": (with_layer(lambda: nn.BatchNorm2d(4, momentum=None)), r"`odd` \(BatchNorm2d\)"),
    "no statistics": (with_layer(lambda: nn.BatchNorm2d(4, track_running_stats=False)), "`odd`"),
    "no weights": (with_layer(lambda: nn.BatchNorm2d(4, affine=False)), "`odd`"),
    "strides": (with_layer(conv(4, 4, stride=(1, 2)), size=80), r"`odd` \(Conv2d\)"),
    "same": (with_layer(conv(4, 4, padding="same")), r"`odd` \(Conv2d\)"),
    "reflected": (with_layer(conv(4, 4, padding_mode="reflect")), r"`odd` \(Conv2d\)"),
    "transposed": (with_layer(lambda: nn.ConvTranspose2d(4, 4, 3, padding=1)), "`odd`"),
    "overlapping pool": (with_layer(lambda: nn.MaxPool2d(3, 2), size=24), r"`odd` \(MaxPool2d\)"),
    "padded pool": (with_layer(lambda: nn.MaxPool2d(2, padding=1), size=48), "`odd`"),
    "rounded up": (with_layer(lambda: nn.AvgPool2d(2, ceil_mode=True), size=48), "`odd`"),
    "padded, a function": (with_function(lambda x: F.avg_pool2d(x, 2, 2, 1), 48), "`avg_pool2d`"),
    "rounded up, a function": (
        with_function(lambda x: F.avg_pool2d(x, 2, 2, 0, True), 48),
        "`avg_pool2d`",
    ),
    "uneven": (with_layer(lambda: nn.AdaptiveAvgPool2d(2), size=16), "`odd`"),
    "images to a linear layer": (with_layer(lambda: nn.Linear(7, 7)), r"`odd` \(Linear\)"),
    "changed in place": (
        made(in_place_after, conv=conv(), output=lambda: nn.Linear(140, 3)),
        "changes in place what is read again",
    ),
    "changed in place by a view": (
        made(
            in_place_of_a_view,
            conv=conv(),
            pool=lambda: nn.MaxPool2d(5),
            output=lambda: nn.Linear(140, 3),
            two=lambda: nn.Linear(4, 3),
        ),
        "in place",
    ),
    "another in evaluation": (
        made(two_modes, one=lambda: nn.Linear(70, 9), output=lambda: nn.Linear(9, 3)),
        "forward pass",
    ),
    "untraceable": (lambda: Untraceable(70, CLASSES), "cannot be traced"),
    "two outputs": (
        made(lambda net, x: (net.output(x.flatten(1)), x), output=lambda: nn.Linear(70, 3)),
        "`output` does not return one tensor",
    ),
    "images as output": (lambda: nn.Sequential(conv()()), "its output"),
    "nothing": (nn.Identity, "its output"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_by_the_name_of_its_layer(case):
    build, message = REFUSED[case]
    with pytest.raises(Unsupported, match="sparse cannot: .*" + message) as refused:
        graph.read(build(), SHAPE)
    assert "Use auto or separate." in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_argument_given_by_name_is_read_or_refused():
    build = made(lambda net, x: net.output(input=x.flatten(1)), output=lambda: nn.Linear(70, 3))
    try:
        (op,) = ops_of(build)
    except Unsupported as refused:
        assert "`output`" in str(refused)
    else:
        assert (op.name, op.x) == ("output", graph.INPUT)


def test_training_refuses_with_the_layers_name():
    build = REFUSED["dropout"][0]
    with pytest.raises(Unsupported, match="`odd`"):
        sparse.train(task(build, recipe_of()), beginning(build))


def test_what_does_nothing_is_left_out():
    layers = OrderedDict(a=nn.Identity(), b=nn.Dropout(0.0), c=nn.Flatten(), d=nn.Linear(70, 3))
    assert [type(op) for op in ops_of(lambda: nn.Sequential(layers))] == [Connect]


# -- machine code ----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, and no program in memory."""
    monkeypatch.setenv("WINDFALL_CACHE", str(tmp_path))
    monkeypatch.setattr(training, "_programs", {})
    return tmp_path / "kernels"


def trained(monkeypatch, build=mlp, **settings):
    """A short training as a process begins it, and how often something was compiled."""
    monkeypatch.setattr(training, "_programs", {})
    compiled, compile_it = [], machine.Library._object

    def noted(library, text):
        compiled.append(text)
        return compile_it(library, text)

    with monkeypatch.context() as patch:
        patch.setattr(machine.Library, "_object", noted)
        final = sparse.train(task(build, recipe_of(**settings)), beginning(build, density=0.4))
    return final, len(compiled)


def test_machine_code_is_kept_and_used_again(cache, monkeypatch):
    first, num = trained(monkeypatch)
    assert num == 1
    (path,) = cache.iterdir()
    before = path.read_bytes()
    again, num = trained(monkeypatch)
    assert (num, list(cache.iterdir()), path.read_bytes()) == (0, [path], before)
    assert torch.equal(again.params["output.weight"], first.params["output.weight"])
    assert trained(monkeypatch, learning_rate=0.3, steps=3)[1] == 0
    assert trained(monkeypatch, batch_size=33)[1] == 1
    assert len(list(cache.iterdir())) == 2


def test_a_program_in_memory_is_not_compiled_again(cache, monkeypatch):
    run_of = task(mlp, recipe_of())
    sparse.train(run_of, beginning(mlp))
    monkeypatch.setattr(machine.Library, "_object", None)
    for path in cache.iterdir():
        path.unlink()
    sparse.train(task(mlp, recipe_of(learning_rate=0.3), seed=2), beginning(mlp, density=0.1))


DAMAGES = {
    "a byte": lambda code: code[:200] + bytes([code[200] ^ 1]) + code[201:],
    "the digest": lambda code: bytes([code[0] ^ 1]) + code[1:],
    "truncated": lambda code: code[: len(code) // 2],
    "the digest alone": lambda code: code[:32],
    "shorter": lambda code: code[:10],
    "empty": lambda code: b"",
    "longer": lambda code: code + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_machine_code_is_not_run_but_made_anew(damage, cache, monkeypatch):
    first, _ = trained(monkeypatch)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    again, num = trained(monkeypatch)
    assert num == 1
    assert torch.equal(again.params["output.weight"], first.params["output.weight"])
    assert (list(cache.iterdir()), path.read_bytes()) == ([path], whole)


@pytest.mark.parametrize("where", ["cache", "kernels", "file"])
def test_a_folder_that_cannot_be_used_is_no_error(where, tmp_path, monkeypatch):
    """It is a file itself, holds one in place of its folder, or a folder in place of the file."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("WINDFALL_CACHE", str(folder))
    if where == "cache":
        folder.write_bytes(b"")
    elif where == "kernels":
        folder.mkdir()
        (folder / "kernels").write_bytes(b"")
    else:
        trained(monkeypatch)
        (path,) = (folder / "kernels").iterdir()
        path.unlink()
        path.mkdir()
        (path / "full").write_bytes(b"")
    final, num = trained(monkeypatch)
    assert (num, final.step) == (1, recipe_of().steps)


on_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="compiles for an x86 processor"
)


def plain_host(monkeypatch, processor):
    features = llvm.get_host_cpu_features()
    if processor == "haswell" and not (features.get("avx2") and features.get("fma")):
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(machine, "_host", lambda: (processor, ""))


@on_x86
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
@pytest.mark.parametrize(
    "build", [mlp, normed, CONVOLUTIONS["stride 2"]], ids=["mlp", "normed", "strided"]
)
def test_another_processor_trains_the_same_up_to_rounding(processor, build, cache, monkeypatch):
    start = beginning(build, density=0.4)
    native, _ = trained(monkeypatch, build)
    (path,) = cache.iterdir()
    plain_host(monkeypatch, processor)
    other, num = trained(monkeypatch, build)
    assert num == 1  # its code is another file
    assert path in cache.iterdir()
    assert len(list(cache.iterdir())) == 2
    assert_close(other, native, start, 1e-12)


@on_x86
def test_a_processor_may_be_named_for_the_library(cache):
    code = Code("float64")
    with code.entry("main", 1) as (k, table, (count,)):
        x = Pointer(k, table.address(0), k.real)
        k.call(powers, None, x, x, count)
    x = -np.arange(16.0)
    table = np.array([x.ctypes.data], np.int64)
    code.compiled("x86-64,+sse3").function("main", 1)(table.ctypes.data, 16)
    np.testing.assert_allclose(x, np.exp(-np.arange(16.0)), rtol=1e-15)
    code.compiled("x86-64")
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize(
    "build", [mlp, normed, CONVOLUTIONS["stride 2"]], ids=["mlp", "normed", "strided"]
)
def test_the_width_of_a_tile_changes_rounding_alone(most, build, monkeypatch):
    start = beginning(build, density=0.4)
    widest, _ = trained(monkeypatch, build, batch_size=60)
    monkeypatch.setattr(training, "Program", partial(Program, most=most))
    narrow, _ = trained(monkeypatch, build, batch_size=60)
    assert [p.most for p in training._programs.values()] == [most]
    assert_close(narrow, widest, start, 1e-12)
