"""Where numbers lie: 16 samples innermost, tiles of places that are computed together.

An image tensor is [group][channel][row][column][16 samples] with a border of zeros (the halo) that
a convolution's padding reads; a flat one is [feature][group][16 samples]. Both are one thing with
other strides, counted in numbers:

    place(g, c, y, x) = origin + g group + c channel + y row + x column
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

LANES = 16


@dataclass(frozen=True)
class Layout:
    """How a tensor of a batch is stored.

    Args:
        groups: of 16 samples.
        channels: or features; one more is stored, all ones, for biases.
        height: rows, without the halo.
        width: columns, without the halo.
        halo: rows and columns of zeros around each channel.
    """

    groups: int
    channels: int
    height: int = 1
    width: int = 1
    halo: int = 0

    @property
    def is_flat(self) -> bool:
        """Whether it has no rows and columns: the groups are then inside the features."""
        return self.height == self.width == 1 and self.halo == 0

    @property
    def column(self) -> int:
        """From a column to the next."""
        return LANES * (self.groups if self.is_flat else 1)

    @property
    def row(self) -> int:
        """From a row to the next."""
        return self.column * (self.width + 2 * self.halo)

    @property
    def channel(self) -> int:
        """From a channel to the next."""
        return self.row * (self.height + 2 * self.halo)

    @property
    def group(self) -> int:
        """From 16 samples to the next 16."""
        return LANES if self.is_flat else self.channel * (self.channels + 1)

    @property
    def origin(self) -> int:
        """The place of the first number that is not halo."""
        return self.halo * (self.row + self.column)

    @property
    def size(self) -> int:
        """Number of numbers stored."""
        return (self.channels + 1) * self.channel * (1 if self.is_flat else self.groups)


@dataclass(frozen=True)
class Sweep:
    """All places of a tensor `out`, in tiles, with those of a tensor `x` that belong to them.

    Args:
        loops: (count, stride in x, stride in out), the outermost first.
        tile: (place in x, place in out) of the vectors of a tile.
        x_base: the first tile's place in x.
        out_base: the same in out.
        out_channel: from a row of the list to the next, in out.
    """

    loops: tuple[tuple[int, int, int], ...]
    tile: tuple[tuple[int, int], ...]
    x_base: int
    out_base: int
    out_channel: int

    @cached_property
    def reach(self) -> int:
        """Vectors of x that a tile sees of one channel, without what its entries' offsets add."""
        return max(x for x, _ in self.tile) // LANES + 1


class View(NamedTuple):
    """The strides of a flat tensor seen as the image it was."""

    groups: int
    origin: int
    group: int
    channel: int
    row: int
    column: int


def unflattened(flat: Layout, image: Layout) -> View:
    """Feature (c height + y) width + x of `flat` as channel c, row y and column x."""
    step, width = flat.channel, image.width
    return View(flat.groups, 0, LANES, image.height * width * step, width * step, step)


def sweep(
    x: Layout | View,
    out: Layout | View,
    count: tuple[int, int],
    x_stride: int = 1,
    out_stride: int = 1,
    residue: tuple[int, int] = (0, 0),
    most: int = 16,
    *,
    one_group: bool = False,
) -> Sweep:
    """The places out[stride_out t + residue] beside x[stride_x t], t below `count` (rows, columns).

    A tile's sides divide the counts, so that no tile hangs over; it has at most `most` vectors:
    columns first, then rows, then groups of samples (not with `one_group`).
    """
    columns = _divisor(count[1], min(most, 8) if count[0] > 1 else most)
    rows = _divisor(count[0], most // columns)
    groups = 1 if one_group else _divisor(out.groups, most // (columns * rows))
    sizes = ((out.groups, groups), (count[0], rows), (count[1], columns))
    x_steps = x.group, x_stride * x.row, x_stride * x.column
    out_steps = out.group, out_stride * out.row, out_stride * out.column
    return Sweep(
        tuple(
            (total // part, part * x_step, part * out_step)
            for (total, part), x_step, out_step in zip(sizes, x_steps, out_steps, strict=True)
        ),
        tuple(
            (_place(x_steps, g, y, c), _place(out_steps, g, y, c))
            for g in range(groups)
            for y in range(rows)
            for c in range(columns)
        ),
        x.origin,
        out.origin + residue[0] * out.row + residue[1] * out.column,
        out.channel,
    )


def _place(steps: tuple[int, int, int], group: int, row: int, column: int) -> int:
    return group * steps[0] + row * steps[1] + column * steps[2]


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is at most `most`."""
    return max(d for d in range(1, max(1, most) + 1) if number % d == 0)
