"""One layer by the sparse engine's kernels: forward pass, gradient of its inputs and its weights.

What the engine compiles for a layer inside a network, and nothing else: no batch, loss or update.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from windfall.engines.sparse import kernels, pack
from windfall.engines.sparse.emit import I32, I64, LANES, Pointer
from windfall.engines.sparse.kernels import Post
from windfall.engines.sparse.layout import Layout
from windfall.engines.sparse.machine import Code
from windfall.engines.sparse.program import widest_tile
from windfall.engines.sparse.training import aligned


def _packed(values: Tensor, layout: Layout) -> np.ndarray:
    """[batch, channel, ...] as the kernels lay it out; the channel after the last is all ones."""
    whole = aligned(layout.size, np.float32)
    images = values.detach().numpy().reshape(len(values), layout.channels, layout.height, -1)
    for sample in range(len(images)):
        group, lane = divmod(sample, LANES)
        _places(whole, layout, group)[..., lane] = images[sample]
    if layout.is_flat:
        whole[layout.channels * layout.channel :] = 1
    else:
        whole.reshape(layout.groups, -1)[:, layout.channels * layout.channel :] = 1
    return whole


def _unpacked(whole: np.ndarray, layout: Layout, like: Tensor) -> Tensor:
    images = [
        _places(whole, layout, sample // LANES)[..., sample % LANES] for sample in range(len(like))
    ]
    return torch.from_numpy(np.stack(images)).reshape(like.shape)


def _places(whole: np.ndarray, layout: Layout, group: int) -> np.ndarray:
    """A view of a group, [channel, row, column, lane]."""
    size = whole.itemsize
    return np.lib.stride_tricks.as_strided(
        whole[layout.origin + group * layout.group :],
        (layout.channels, layout.height, layout.width, LANES),
        [size * step for step in (layout.channel, layout.row, layout.column, 1)],
    )


@dataclass(frozen=True)
class Layer:
    """A compiled layer, its inputs and the gradient of its outputs laid out.

    Args:
        run: the three passes, once.
        results: after it, the outputs and the gradients of inputs and weights, as torch has them.
    """

    run: Callable[[], None]
    results: Callable[[], tuple[Tensor, Tensor, Tensor]]


def prepare(layer: nn.Linear | nn.Conv2d, mask: Tensor, x: Tensor, dy: Tensor) -> Layer:
    """A layer without bias, its masked weights, inputs and gradient packed.

    Args:
        layer: linear, or a convolution of stride 1.
        mask: of its weight.
        x: its inputs, [batch, ...]; a multiple of 16 of them.
        dy: the gradient of its outputs.
    """
    connection = _connection(layer, x, dy)
    weight = layer.weight.detach()
    kept = np.flatnonzero(mask.numpy().ravel())
    forward = pack.entries(connection, kept, 4)
    back = pack.transposed(connection, forward, (0, 0), 4)
    arrays = {
        "x": _packed(x, connection.x),
        "y": aligned(connection.out.size, np.float32),
        "dy": _packed(dy, connection.out),
        "dx": aligned(connection.x.size, np.float32),
        "w": _tailed(weight.numpy().ravel()[forward.sources]),
        "dw": _tailed(np.zeros(len(kept), np.float32)),
    }
    for name, listed in (("", forward), ("back_", back)):
        arrays[f"{name}starts"], arrays[f"{name}sources"] = listed.starts, listed.sources
        arrays[f"{name}offsets"] = _tailed(listed.offsets)
        arrays[f"{name}blocks"] = np.array([listed.blocks], np.int64)
    places, call = _compiled(connection)
    table = np.array([arrays[name].ctypes.data for name in places], np.int64)

    def run() -> None:  # the arrays live as long as it
        arrays["dw"].fill(0)  # sums over tiles; in training, the update leaves zeros behind
        call(table.ctypes.data)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        dense = np.zeros(weight.numel(), np.float32)
        dense[forward.sources] = arrays["dw"][: len(kept)]
        return (
            _unpacked(arrays["y"], connection.out, dy),
            _unpacked(arrays["dx"], connection.x, x),
            torch.from_numpy(dense).reshape(weight.shape),
        )

    return Layer(run, results)


def _tailed(values: np.ndarray) -> np.ndarray:
    """The values and a vector's zeros after them, as the kernels read them."""
    whole = aligned(len(values) + 2 * LANES, values.dtype)
    whole[: len(values)] = values
    return whole


def _connection(layer: nn.Linear | nn.Conv2d, x: Tensor, dy: Tensor) -> pack.Connection:
    groups = len(x) // LANES
    if isinstance(layer, nn.Linear):
        shape, padding = (*layer.weight.shape, 1, 1), (0, 0)
    else:
        shape, padding = tuple(layer.weight.shape), tuple(layer.padding)
    halo = padding[0]
    return pack.Connection(
        shape, 1, (1, 1), padding, (1, 1), False,
        Layout(groups, *x.shape[1:], halo=halo), Layout(groups, *dy.shape[1:], halo=halo),
        widest_tile(),
    )  # fmt: skip


def _compiled(connection: pack.Connection) -> tuple[dict[str, int], Callable[[int], None]]:
    """The order of the table of addresses, and the machine code that reads it."""
    code, places = Code("float32"), dict[str, int]()
    forward, backward = connection.forward, connection.backward((0, 0))
    with code.entry("layer", 0) as (k, table, _):

        def at(name: str, kind: object = None) -> Pointer:
            place = places.setdefault(name, len(places))
            return Pointer(k, table.address(place), kind or k.real)

        def listed(name: str) -> tuple[object, ...]:
            return at(f"{name}blocks", I64)[0], at(f"{name}starts", I32), at(f"{name}offsets", I32)

        rows, channels = k.index(connection.shape[0]), k.index(connection.x.channels)
        x, y, dy, dx, w = (at(name) for name in ("x", "y", "dy", "dx", "w"))
        k.call(
            kernels.product, (forward, Post(), False), x, y, y, rows, *listed(""), w,
            at("sources", I32),
        )  # fmt: skip
        k.call(
            kernels.product, (backward, Post(), True), dy, dx, dx, channels, *listed("back_"), w,
            at("back_sources", I32),
        )  # fmt: skip
        k.call(kernels.gradient, forward, x, dy, rows, *listed(""), at("dw"))
    return places, code.compiled().function("layer", 0)
