"""A network's training step as one compiled program, the same for every mask and seed.

The program has two entry points, each a function of a table of addresses (`Program.places` says
which): `train` runs steps, `evaluate` sums losses and right answers over a part of the data.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property

import llvmlite.binding as llvm
from llvmlite import ir

from windfall.engines.sparse import kernels, passes
from windfall.engines.sparse.emit import I8, I32, I64, LANES, REALS, Emitter, Kernel, Pointer, Value
from windfall.engines.sparse.kernels import Moments, Momentum, Post
from windfall.engines.sparse.layout import Layout, Sweep, View, sweep, unflattened
from windfall.engines.sparse.machine import Code
from windfall.engines.sparse.operations import (
    INPUT,
    Add,
    Connect,
    Flatten,
    MaxPool,
    MeanPool,
    Network,
    Normalize,
    Op,
    Relu,
    inputs,
)  # fmt: skip
from windfall.engines.sparse.pack import Connection

STORED = {"uint8": I8, "float32": ir.FloatType(), "float64": ir.DoubleType()}


def widest_tile() -> int:
    """Vectors a tile: 16 where there are 32 registers of 16 lanes, else as many as fit."""
    return 16 if llvm.get_host_cpu_features().get("avx512f") else 4


@dataclass(frozen=True)
class Program:
    """What is compiled.

    Args:
        network: the operations.
        batch_size: examples a step.
        dtype: of the numbers, `float32` or `float64`.
        stored: dtype of the data.
        rule: the optimizer.
        most: vectors a tile.
    """

    network: Network
    batch_size: int
    dtype: str
    stored: str
    rule: Momentum | Moments
    most: int = field(default_factory=widest_tile)

    @property
    def groups(self) -> int:
        """Of 16 samples a batch."""
        return -(-self.batch_size // LANES)

    @property
    def width(self) -> int:
        """Samples a batch, those that fill the last group included."""
        return self.groups * LANES

    @property
    def num_features(self) -> int:
        """Numbers a sample."""
        num = 1
        for side in self.network.shapes[INPUT]:
            num *= side
        return num

    @cached_property
    def layouts(self) -> dict[int, Layout]:
        """Of every tensor, its gradient included."""
        halos: Counter[int] = Counter()
        for op in self.network.ops:
            if isinstance(op, Connect):
                for tensor, halo in zip((op.x, op.out), self._halos(op), strict=True):
                    halos[tensor] = max(halos[tensor], halo)
        sums = [op for op in self.network.ops if isinstance(op, Normalize) and op.other is not None]
        for op in [*sums, *reversed(sums)]:  # what is added lies as the result does
            assert op.other is not None
            halos[op.out] = halos[op.other] = max(halos[op.out], halos[op.other])
        shapes = self.network.shapes
        return {t: Layout(self.groups, *shape, halo=halos[t]) for t, shape in shapes.items()}  # type: ignore[misc]

    def _halos(self, op: Connect) -> tuple[int, int]:
        """How far the layer reads beyond its input, and its transposed lists beyond its output."""
        ahead, back = 0, 0
        (_, *size), (_, *made) = (self._image(t) for t in (op.x, op.out))
        for axis in (0, 1):
            kernel, step = op.shape[2 + axis], op.stride[axis]
            reach, padding = op.dilation[axis] * (kernel - 1), op.padding[axis]
            last = (made[axis] - 1) * step + reach - padding
            # a bias reads its ones where the output is, padded or not
            furthest = max(last, (made[axis] - 1) * step) - (size[axis] - 1)
            ahead = max(ahead, padding, furthest)
            for residue in range(min(step, size[axis])):
                most = (size[axis] - 1 - residue) // step + (residue + padding) // step
                least = (residue + padding - reach) // step
                back = max(back, -least, most - (made[axis] - 1))
        return ahead, back

    def _image(self, tensor: int) -> tuple[int, ...]:
        shape = self.network.shapes[tensor]
        return shape if len(shape) == 3 else (*shape, 1, 1)

    @cached_property
    def connections(self) -> dict[int, Connection]:
        """The linear layers and convolutions, by the place of their operation."""
        return {
            i: Connection(
                op.shape, op.groups, op.stride, op.padding, op.dilation, op.has_bias,
                self.layouts[op.x], self.layouts[op.out], self.most,
            )
            for i, op in enumerate(self.network.ops)
            if isinstance(op, Connect)
        }  # fmt: skip

    def wants(self, tensor: int) -> bool:
        """Whether a gradient for the tensor is needed."""
        return tensor in self.network.trained

    @property
    def sloped(self) -> set[int]:
        """The tensors whose gradient is written, wanted or not."""
        normalized = {op.x for op in self.network.ops if isinstance(op, Normalize)}
        return set(self.network.trained) | normalized

    def norm(self, i: int) -> passes.Norm:
        """The normalization that is operation i."""
        op = self.network.ops[i]
        assert isinstance(op, Normalize)
        x, out = self.layouts[op.x], self.layouts[op.out]
        adds = op.other is not None
        return passes.Norm(x, out, self.batch_size, op.eps, op.momentum, op.relu, adds)

    @cached_property
    def compiled(self) -> "Compiled":
        """The machine code."""
        return Compiled(self)


class Compiled:
    """Machine code and the table that it reads.

    Args:
        program: to be compiled.
    """

    def __init__(self, program: Program) -> None:
        self.program, code = program, Code(program.dtype)
        self.places: dict[str, int] = {}
        with code.entry("train", 1) as (k, table, (num_steps,)):
            writer = _Writer(program, self.places, k, table, training=True)
            with k.range(0, num_steps) as step:
                writer.step(step)
        with code.entry("evaluate", 1) as (k, table, (num_samples,)):
            writer = _Writer(program, self.places, k, table, training=False)
            writer.part(num_samples)
        self.library = code.compiled()
        self.train = self.library.function("train", 1)
        self.evaluate = self.library.function("evaluate", 1)


class _Writer:
    """Writes an entry point: the kernels of each operation, in order."""

    def __init__(
        self,
        program: Program,
        places: dict[str, int],
        k: Emitter,
        table: Pointer,
        *,
        training: bool,
    ) -> None:
        self.program, self.places, self.k, self.table = program, places, k, table
        self.training, self.network, self.layouts = training, program.network, program.layouts
        self.readers = program.network.readers()
        self.is_cut = {op.out for op in self.network.ops if getattr(op, "relu", False)}
        self.written: Counter[int] = Counter()
        self.shared: dict[int, int] = {}

    # -- addresses

    def at(self, name: str, kind: ir.Type | None = None) -> Pointer:
        """The buffer of this name."""
        place = self.places.setdefault(name, len(self.places))
        address = self.table.address(place)
        return Pointer(self.k, address, kind or self.k.real)

    def value(self, tensor: int) -> Pointer:
        """A tensor."""
        return self.at(f"x{tensor}")

    def slope(self, tensor: int) -> Pointer:
        """A tensor's gradient."""
        return self.at(f"d{self.shared.get(tensor, tensor)}")

    def into(self, tensor: int) -> Post:
        """What becomes of the next part of a tensor's gradient: the last one cuts it."""
        adds = self.written[tensor] > 0
        self.written[tensor] += 1
        is_last = self.written[tensor] == self.readers[tensor]
        return Post(gated=is_last and tensor in self.is_cut, adds=adds)

    def call(self, kernel: Kernel, static: object, *arguments: Value | Pointer) -> None:
        """A kernel's code."""
        self.k.call(kernel, static, *arguments)  # type: ignore[arg-type]

    # -- the entry points

    def step(self, step: Value) -> None:
        """One step of training."""
        size = self.program.batch_size
        self._gather(self.at("indices", I64) + step * size, self.k.index(size))
        self.rates = self.at("rates", REALS["float64"]) + step * 2
        self.written.clear()
        self.shared.clear()
        for i, op in enumerate(self.network.ops):
            self._forward(i, op)
        self._loss(self.k.index(size), step * 2)
        for i, op in reversed(list(enumerate(self.network.ops))):
            self._backward(i, op)

    def part(self, num_samples: Value) -> None:
        """A part of the data, a batch's width at a time."""
        k, width = self.k, self.program.width
        for i, op in enumerate(self.network.ops):
            if isinstance(op, Normalize):
                at = self.at(f"{i}.running_var"), self.at(f"{i}.running_scale")
                self.call(passes.running_scales, self.program.norm(i), *at)
        with k.range(0, num_samples, width) as first:
            rest = num_samples - first
            count = k.select(rest < width, rest, width)
            self._gather(self.at("indices", I64) + first, count)
            for i, op in enumerate(self.network.ops):
                self._forward(i, op)
            self._loss(count, self.k.index(0))

    def _gather(self, indices: Pointer, count: Value) -> None:
        layout = self.layouts[INPUT]
        static = kernels.Gather(self.program.num_features, layout.groups, layout.group)
        self.call(
            kernels.gather, static, self.at("data", STORED[self.program.stored]),
            self.at("labels", I64), indices, count, self.at("places", I32), self.at("scale"),
            self.at("shift"), self.value(INPUT), self.at("classes", I32),
        )  # fmt: skip

    def _loss(self, count: Value, place: Value) -> None:
        logits = self.network.ops[-1].out
        static = kernels.Softmax(
            self.layouts[logits].channels, self.layouts[logits], slopes=self.training
        )
        d = self.slope(logits) if self.training else self.value(logits)
        totals = self.at("totals", REALS["float64"]) + place
        self.call(
            kernels.softmax, static, self.value(logits), d, self.at("classes", I32), count, totals
        )

    # -- operations

    def _forward(self, i: int, op: Op) -> None:
        x, out = self.value(op.x), self.value(op.out)
        match op:
            case Connect():
                forward = self.program.connections[i].forward
                static = forward, Post(relu=op.relu), False
                self._product(static, f"{i}", i, op.shape[0], x, out, out)
            case Normalize():
                self._normalize(i, op)
            case Add():
                other = self.value(op.other)
                self._transfer(op.x, op.out, x, out, Post())
                self._transfer(op.other, op.out, other, out, Post(relu=op.relu, adds=True))
            case Relu():
                self._transfer(op.x, op.out, x, out, Post(relu=True))
            case Flatten():
                self._flatten(op, x, out)
            case MaxPool() | MeanPool():
                kernel = passes.largest if isinstance(op, MaxPool) else passes.mean
                self.call(kernel, self._pool(op, Post()), x, out)

    def _backward(self, i: int, op: Op) -> None:
        if not self.program.wants(op.out):
            return
        d = self.slope(op.out)
        if isinstance(op, Connect):
            self._connect_back(i, op, d)
        elif isinstance(op, Normalize):
            self._normalize_back(i, op, d)
        else:
            for tensor in inputs(op):
                if self.program.wants(tensor):
                    self._back_into(op, tensor, d)

    def _back_into(self, op: Op, tensor: int, d: Pointer) -> None:
        value, dx, post = self.value(tensor), self.slope(tensor), self.into(tensor)
        match op:
            case Add():
                self._transfer(op.out, tensor, d, dx, post, value)
            case Relu():
                self._transfer(op.out, tensor, d, dx, replace(post, part_gated=True), value)
            case Flatten():
                flat, image = self.layouts[op.out], self.layouts[tensor]
                view = unflattened(flat, image)
                places = self._sweep(view, image, image)
                static = places, view.channel, post
                self.call(passes.transfer, static, d, dx, value, self.k.index(image.channels))
            case MaxPool() | MeanPool():
                self._pool_back(op, post, d, value, dx)
            case _:
                raise AssertionError(op)

    def _pool_back(
        self, op: MaxPool | MeanPool, post: Post, d: Pointer, value: Pointer, dx: Pointer
    ) -> None:
        kernel = passes.largest_back if isinstance(op, MaxPool) else passes.mean_back
        whole, out = self.layouts[op.x], self.layouts[op.out]
        pooled = out.height * op.size[0], out.width * op.size[1]
        if pooled == (whole.height, whole.width):
            self.call(kernel, self._pool(op, post), d, value, dx)
            return
        if not post.adds:  # for the places that no square holds
            self.call(passes.clear, whole, dx)
        self.call(kernel, self._pool(op, Post(adds=True)), d, value, dx)
        if post.gated:
            self._transfer(op.x, op.x, dx, dx, Post(gated=True), value)

    def _sweep(self, x: Layout | View, out: Layout | View, image: Layout) -> Sweep:
        return sweep(x, out, (image.height, image.width), most=self.program.most)

    def _pool(self, op: MaxPool | MeanPool, post: Post) -> passes.Pool:
        return passes.Pool(self.layouts[op.x], self.layouts[op.out], op.size, post)

    def _transfer(
        self,
        source: int,
        target: int,
        x: Pointer,
        out: Pointer,
        post: Post,
        gate: Pointer | None = None,
    ) -> None:
        here, there = self.layouts[source], self.layouts[target]
        static = self._sweep(here, there, there), here.channel, post
        channels = self.k.index(there.channels)
        self.call(passes.transfer, static, x, out, out if gate is None else gate, channels)

    def _flatten(self, op: Flatten, x: Pointer, out: Pointer) -> None:
        image, flat = self.layouts[op.x], self.layouts[op.out]
        view = unflattened(flat, image)
        static = self._sweep(image, view, image), image.channel, Post()
        self.call(passes.transfer, static, x, out, out, self.k.index(image.channels))

    # -- linear layers and convolutions

    def _product(
        self, static: object, name: str, i: int, rows: int, x: Pointer, out: Pointer, gate: Pointer
    ) -> None:
        count, blocks = self.k.index(rows), self.at(f"blocks{name}", I64)[0]
        self.call(
            kernels.product, static, x, out, gate, count, blocks,
            self.at(f"starts{name}", I32), self.at(f"offsets{name}", I32), self.at(f"w{i}"),
            self.at(f"sources{name}", I32),
        )  # fmt: skip

    def _connect_back(self, i: int, op: Connect, d: Pointer) -> None:
        connection = self.program.connections[i]
        if self.program.wants(op.x):
            post = self.into(op.x)
            for number, residue in enumerate(connection.residues):
                static = connection.backward(residue), post, True
                channels = self.layouts[op.x].channels
                into = self.slope(op.x), self.value(op.x)
                self._product(static, f"{i}.{number}", i, channels, d, *into)
        at = [self.at(f"{name}{i}", I32) for name in ("starts", "offsets")]
        rows, blocks = self.k.index(op.shape[0]), self.at(f"blocks{i}", I64)[0]
        g = self.at(f"g{i}")
        self.call(kernels.gradient, connection.forward, self.value(op.x), d, rows, blocks, *at, g)
        self._update(f"{i}", self.at(f"count{i}", I64)[0])

    def _update(self, name: str, count: Value) -> None:
        arrays = [self.at(f"{kind}{name}") for kind in ("w", "g", "m", "v")]
        self.call(kernels.update, self.program.rule, *arrays, count, self.rates)

    # -- normalization

    def _norm(self, i: int, *names: str) -> list[Pointer]:
        return [self.at(f"{i}.{name}") for name in names]

    def _normalize(self, i: int, op: Normalize) -> None:
        norm, x, out = self.program.norm(i), self.value(op.x), self.value(op.out)
        other = out if op.other is None else self.value(op.other)
        use = ("mean", "scale") if self.training else ("running_mean", "running_scale")
        if self.training:
            at = self._norm(i, "mean", "scale", "running_mean", "running_var")
            self.call(passes.moments, norm, x, self.at("present"), *at)
        affine = self.at(f"w{i}.weight"), self.at(f"w{i}.bias")
        self.call(passes.normalize, norm, x, out, other, *self._norm(i, *use), *affine)

    def _normalize_back(self, i: int, op: Normalize, d: Pointer) -> None:
        if op.other is not None and self.program.wants(op.other):
            self._share(op, op.other, d)
        post = self.into(op.x) if self.program.wants(op.x) else Post()
        norm, dx = (self.program.norm(i), post), self.slope(op.x)
        slopes = self.at(f"g{i}.weight"), self.at(f"g{i}.bias")
        self.call(
            passes.normalize_back, norm, d, self.value(op.x), dx, self.at("present"),
            *self._norm(i, "mean", "scale"), self.at(f"w{i}.weight"), *slopes,
        )  # fmt: skip
        for name in ("weight", "bias"):
            count = -(-self.layouts[op.x].channels // LANES) * LANES
            self._update(f"{i}.{name}", self.k.index(count))

    def _share(self, op: Normalize, other: int, d: Pointer) -> None:
        """The gradient for what was added: the result's own, and its memory where that is free."""
        post = self.into(other)
        if post == Post() and self.layouts[other] == self.layouts[op.out]:
            self.shared[other] = self.shared.get(op.out, op.out)
        else:
            self._transfer(op.out, other, d, self.slope(other), post, self.value(other))
