"""The weights that survive, as the lists of entries that `kernels` reads.

A layer's entries are its kept weights, and a bias as the weight of an input that is always 1 (the
channel after the last). They are sorted by (block of input channels, row, place); the transposed
lists, which give the gradient for the inputs, name the same weights by their positions.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from windfall.engines.sparse.layout import LANES, Layout, Sweep, sweep

CACHE = 40_000  # bytes of a block's inputs: what stays in a first-level cache of 48 KB
LEAST = 8  # entries of a row in a block: fewer, and the block costs more than its cache saves

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Connection:
    """A linear layer or a convolution: where its weights lead from and to.

    Args:
        shape: of the weight, [row, input channel of its group, height, width].
        groups: of channels, each with rows of its own.
        stride: of the places, by rows and columns; so the others.
        padding: zeros around the input.
        dilation: from a weight of a kernel to the next.
        has_bias: whether each row has one.
        x: the input's layout.
        out: the output's.
        most: vectors a tile, at most.
    """

    shape: tuple[int, int, int, int]
    groups: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    has_bias: bool
    x: Layout
    out: Layout
    most: int

    @cached_property
    def forward(self) -> Sweep:
        """The places of the output, and of the input beside them."""
        assert self.stride[0] == self.stride[1]
        size = self.out.height, self.out.width
        return sweep(self.x, self.out, size, x_stride=self.stride[0], most=self.most)

    @cached_property
    def residues(self) -> tuple[tuple[int, int], ...]:
        """The remainders of the input's places by the stride that the input has at all."""
        return tuple(
            (y, x)
            for y in range(min(self.stride[0], self.x.height))
            for x in range(min(self.stride[1], self.x.width))
        )

    def backward(self, residue: tuple[int, int]) -> Sweep:
        """The places of the input of one residue, and of the output beside them."""
        step = self.stride[0]
        count = (
            -(-(self.x.height - residue[0]) // step),
            -(-(self.x.width - residue[1]) // step),
        )
        return sweep(self.out, self.x, count, out_stride=step, residue=residue, most=self.most)


@dataclass(frozen=True)
class Entries:
    """One list.

    Args:
        rows: number of rows.
        blocks: number of blocks.
        starts: of the entries of (block, row), [blocks rows + 1].
        offsets: from the output's place to the input's, [entry].
        sources: of a layer's list: indices into its weights, then biases, [entry]; of a transposed
            one: positions in the layer's list.
    """

    rows: int
    blocks: int
    starts: Array
    offsets: Array
    sources: Array


def _listed(
    rows: int,
    row: Array,
    channel: Array,
    num_channels: int,
    offset: Array,
    source: Array,
    reach: int,
    itemsize: int,
) -> Entries:
    most = max(1, CACHE // (reach * LANES * itemsize))
    blocks = max(1, min(-(-num_channels // most), len(row) // (LEAST * rows)))
    block = np.minimum(channel // -(-num_channels // blocks), blocks - 1)
    here = block * rows + row
    order = np.lexsort((offset, here))
    counts = np.bincount(here, minlength=blocks * rows)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return Entries(
        rows, blocks, starts, offset[order].astype(np.int32), source[order].astype(np.int32)
    )


def _unraveled(connection: Connection, kept: Array) -> tuple[Array, ...]:
    """Row, input channel, and place in the kernel of each kept weight."""
    row, channel, y, x = np.unravel_index(kept, connection.shape)
    channel = channel + row // (connection.shape[0] // connection.groups) * connection.shape[1]
    return row, channel, y * connection.dilation[0], x * connection.dilation[1]


def entries(connection: Connection, kept: Array, itemsize: int) -> Entries:
    """A layer's list.

    Args:
        connection: the layer.
        kept: flat indices of the weights that survive, increasing.
        itemsize: bytes a number.
    """
    row, channel, y, x = _unraveled(connection, kept)
    layout = connection.x
    offset = (
        channel * layout.channel
        + (y - connection.padding[0]) * layout.row
        + (x - connection.padding[1]) * layout.column
    )
    if connection.has_bias:
        rows = connection.shape[0]
        size = int(np.prod(connection.shape))
        row = np.concatenate([row, np.arange(rows)])
        channel = np.concatenate([channel, np.full(rows, layout.channels)])
        offset = np.concatenate([offset, np.full(rows, layout.channels * layout.channel)])
        kept = np.concatenate([kept, size + np.arange(rows)])
    num = layout.channels + connection.has_bias
    reach = connection.forward.reach
    return _listed(connection.shape[0], row, channel, num, offset, kept, reach, itemsize)


def transposed(
    connection: Connection, listed: Entries, residue: tuple[int, int], itemsize: int
) -> Entries:
    """The list that leads from the outputs back to the inputs of one residue."""
    size = int(np.prod(connection.shape))
    position = np.flatnonzero(listed.sources < size)
    row, channel, y, x = _unraveled(connection, listed.sources[position])
    up = residue[0] + connection.padding[0] - y
    left = residue[1] + connection.padding[1] - x
    step = connection.stride[0]
    ours = (up % step == 0) & (left % step == 0)
    row, channel, position = row[ours], channel[ours], position[ours]
    layout = connection.out
    offset = (
        row * layout.channel
        + (up[ours] // step) * layout.row
        + (left[ours] // step) * layout.column
    )
    reach = connection.backward(residue).reach
    return _listed(
        connection.x.channels, channel, row, layout.channels, offset, position, reach, itemsize
    )
