"""Workload: what a step of training and an evaluation consist of, counted before any is done.

Each kind of work is counted in its own unit; a machine's pace (`windfall.pace`) is the seconds that
one takes. Of the separate engine (and the stacked one, which on a CPU costs as much a replica):

    step, tensor                  1; parameter tensors
    linear, convolution           multiply-adds of the three passes
    normalized, pooled, moved     numbers that functions of that kind, or any other, make forward
    gathered, adam or sgd, masked             numbers of the batch; parameters; those with a mask

Of the sparse engine, in vectors of 16 samples, v of them a tile and t tiles, for n kept weights:

    product, gradient             n t v multiply-adds; `product` forward and back
    entry, back                   n t entries read, of the layer's list and of the transposed one
                                  (linear layers; a convolution's tiles differ little in v)
    row                           v stored for every row, block of inputs and tile
    normalized, pooled, moved     vectors read or written by such passes
    far                           vectors of all passes, by how much of the tensors no cache holds
    gathered, classed             vectors of the batch's features, of its logits
    adam or sgd                   n

An evaluation has the forward part of it, and one `look` for what it costs beside its samples.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from windfall import flops, models
from windfall.engines.rule import Name
from windfall.train import Adam, Recipe
from windfall.worker import quiet_machine

if TYPE_CHECKING:
    from windfall.engines.sparse.graph import Connect, Network, Op
    from windfall.engines.sparse.layout import Sweep

Counts = Mapping[str, float]
Tally = defaultdict[str, float]
Kept = Mapping[str, float]

NEAR_BYTES = 16e6  # of tensors, about what caches keep between passes; measured, 12 to 20
_KINDS = {"mm": "", "linear": "", "norm": "normalized", "pool": "pooled"}  # others: moved


@dataclass(frozen=True)
class Workload:
    """What is done, by the kind of work.

    Args:
        step: of training.
        sample: of an evaluation, for each sample.
    """

    step: Counts
    sample: Counts

    def evaluation(self, num_samples: int) -> Counts:
        """What an evaluation consists of."""
        return {"look": 1.0, **{kind: num_samples * n for kind, n in self.sample.items()}}


@dataclass(frozen=True)
class Training:
    """A network and how it is trained, to be counted for several masks.

    Args:
        engine: that trains it.
        module: the network.
        input_shape: of one sample.
        recipe: how it is trained.
    """

    engine: Name
    module: nn.Module
    input_shape: tuple[int, ...]
    recipe: Recipe

    def workload(self, kept: Kept) -> Workload:
        """The work with so many weights kept, by name; one without a number is dense."""
        with quiet_machine():  # on more threads a pass this small waits for them
            return self._sparse(kept) if self.engine == "sparse" else self._dense(kept)

    @property
    def _optimizer(self) -> str:
        return "adam" if isinstance(self.recipe.optimizer, Adam) else "sgd"

    @property
    def _scale(self) -> float:
        """Numbers of twice the width take twice as long."""
        return 2.0 if self.recipe.dtype == "float64" else 1.0

    def _augmented(self) -> Counts:
        numbers = self.recipe.batch_size * prod(self.input_shape)
        return {"augment": 1.0, "augmented": numbers} if self.recipe.augment else {}

    # -- the separate engine

    @cached_property
    def _numbers(self) -> Tally:
        """Numbers that a forward pass makes a sample, by kind of operation."""
        numbers = _Numbers()
        with numbers:
            models.observe(self.module, self.input_shape, batch_size=1)
        return numbers.tally

    def _dense(self, kept: Kept) -> Workload:
        batch, scale, made = self.recipe.batch_size, self._scale, self._numbers
        macs, params = self._multiply_adds(), dict(self.module.named_parameters())
        masked = sum(params[name].numel() for name, n in kept.items() if n < params[name].numel())
        numbers = {
            **{kind: 3.0 * n * batch for kind, n in macs.items()},
            **{kind: n * batch for kind, n in made.items()},
            self._optimizer: sum(param.numel() for param in params.values()),
            "gathered": batch * prod(self.input_shape),
            "masked": masked,
        }
        step = {"step": 1.0, "tensor": len(params), **self._augmented()}
        sample = {f"evaluated {kind}": n for kind, n in macs.items()}
        sample |= {f"evaluated {kind}": n for kind, n in made.items()}
        return Workload(step | _times(scale, numbers), _times(scale, sample))

    def _multiply_adds(self) -> Tally:
        kinds, found = models.kinds(self.module, self.input_shape), Tally(float)
        for name, uses in flops.multiply_adds(self.module, self.input_shape).items():
            is_convolution = kinds.get(name) == "convolution"
            found["convolution" if is_convolution else "linear"] += uses
        return found

    # -- the sparse engine

    @cached_property
    def _passes(self) -> "_Passes":
        return _Passes(self)

    def _sparse(self, kept: Kept) -> Workload:
        passes, scale = self._passes, self._scale
        forward, back = Tally(float, passes.forward), Tally(float, passes.back)
        for i, op in passes.connects.items():
            num = kept.get(f"{op.name}.weight", prod(op.shape))
            passes.connect(i, op, num, forward, back)
        back[self._optimizer] += back.pop("updated", 0)
        both = {kind: forward[kind] + back[kind] for kind in (*forward, *back)}
        step = {"step": 1.0, **self._augmented()} | _times(scale, both)
        return Workload(step, _times(scale / passes.program.width, forward))


def _times(factor: float, counts: Counts) -> dict[str, float]:
    return {kind: factor * n for kind, n in counts.items() if n}


class _Numbers(TorchFunctionMode):
    """Counts the numbers that torch's functions make, by kind of function."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally(float)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        kind = next((kind for word, kind in _KINDS.items() if word in name), "moved")
        given = args[0] if args else None
        if kind and isinstance(made, Tensor) and isinstance(given, Tensor):
            is_view = made.data_ptr() == given.data_ptr() and made.shape != given.shape
            self.tally[kind] += 0 if is_view else made.numel()
        return made


class _Passes:
    """What the sparse engine's step goes over, whatever the mask is."""

    def __init__(self, training: Training) -> None:
        from windfall.engines.sparse import graph  # brings a compiler, which not every plan needs
        from windfall.engines.sparse.program import Program
        from windfall.engines.sparse.training import rule

        recipe = training.recipe
        self.network: Network = graph.read(training.module, training.input_shape)
        self.program = Program(self.network, recipe.batch_size, recipe.dtype, "uint8", rule(recipe))
        self.itemsize = 8 if recipe.dtype == "float64" else 4
        layouts = self.program.layouts.values()
        size = 2 * self.itemsize * sum(layout.size for layout in layouts)
        self.farness = 1 - min(1.0, NEAR_BYTES / size)
        ops = enumerate(self.network.ops)
        self.connects = {i: op for i, op in ops if isinstance(op, graph.Connect)}
        self.forward, self.back = Tally(float), Tally(float)
        self.forward["gathered"] = self.program.num_features * self.program.groups
        self.forward["classed"] = self._vectors(self.network.ops[-1].out)
        for op in self.network.ops:
            self._pass(op)

    def _vectors(self, tensor: int) -> int:
        layout = self.program.layouts[tensor]
        return layout.groups * layout.channels * layout.height * layout.width

    def _pass(self, op: "Op") -> None:
        """Vectors that an operation reads and writes, forward and back."""
        x, out, wants = self._vectors(op.x), self._vectors(op.out), self.program.wants(op.x)
        match type(op).__name__:
            case "Connect":
                kind, ahead, back = "", x + out, x + out + wants * (2 * x + out)
            case "Normalize":
                adds = getattr(op, "other", None) is not None
                kind, ahead, back = "normalized", (3 + adds) * out, 6 * out
                self.back["updated"] += 2 * self.program.layouts[op.out].channels
            case "MaxPool" | "MeanPool":
                kind, ahead, back = "pooled", x + out, wants * 3 * x
            case "Add":
                kind, ahead, back = "moved", 5 * out, 4 * out
            case _:
                kind, ahead, back = "moved", 2 * out, wants * 3 * out
        for counts, vectors in ((self.forward, ahead), (self.back, back)):
            counts["far"] += self.farness * vectors
            if kind:
                counts[kind] += vectors

    def connect(self, i: int, op: "Connect", num: float, forward: Tally, back: Tally) -> None:
        """Add the products of a layer with so many kept weights."""
        made, rows = self.program.connections[i], op.shape[0]
        kind = "linear" if made.out.is_flat else "convolution"
        entries = num + rows * op.has_bias
        self._product(made.forward, entries, rows, made.x.channels, "entry", kind, forward)
        back[f"gradient {kind}"] += entries * _tiles(made.forward) * len(made.forward.tile)
        back["updated"] += entries
        if self.program.wants(op.x):
            for residue in made.residues:
                sweep, mine = made.backward(residue), num / len(made.residues)
                self._product(sweep, mine, made.x.channels, rows, "back", kind, back)

    def _product(
        self,
        sweep: "Sweep",
        entries: float,
        rows: int,
        channels: int,
        lists: str,
        kind: str,
        counts: Tally,
    ) -> None:
        tiles, width = _tiles(sweep), len(sweep.tile)
        blocks = num_blocks(sweep, entries, rows, channels, self.itemsize)
        counts[f"product {kind}"] += entries * tiles * width
        counts[f"row {kind}"] += blocks * rows * tiles * width
        if kind == "linear":
            counts[f"{lists} {kind}"] += entries * tiles


def _tiles(sweep: "Sweep") -> int:
    return prod(count for count, _, _ in sweep.loops)


def num_blocks(sweep: "Sweep", entries: float, rows: int, channels: int, itemsize: int) -> int:
    """The number of blocks of inputs that `engines.sparse.pack` makes of a list."""
    from windfall.engines.sparse.layout import LANES
    from windfall.engines.sparse.pack import CACHE, LEAST

    most = max(1, CACHE // (sweep.reach * LANES * itemsize))
    return max(1, min(-(-channels // most), int(entries // (LEAST * rows))))
