"""A network as a list of operations on tensors.

network = graph.read(module, (3, 32, 32))
[op for op in network.ops if isinstance(op, Connect)]
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

Shape = tuple[int, ...]  # [channel, height, width] or [feature]
INPUT = 0  # the tensor that the network is given


@dataclass(frozen=True)
class Connect:
    """A linear layer or convolution, its weights named `name`.weight and `name`.bias."""

    name: str
    x: int
    out: int
    shape: tuple[int, int, int, int]
    has_bias: bool
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    relu: bool = False


@dataclass(frozen=True)
class Normalize:
    """A batch normalization, and another tensor added to its result."""

    name: str
    x: int
    out: int
    eps: float
    momentum: float
    other: int | None = None
    relu: bool = False


@dataclass(frozen=True)
class Add:
    """The sum of two tensors."""

    x: int
    other: int
    out: int
    relu: bool = False


@dataclass(frozen=True)
class Relu:
    """A ReLU that no other operation could take on."""

    x: int
    out: int


@dataclass(frozen=True)
class Flatten:
    """An image as features."""

    x: int
    out: int


@dataclass(frozen=True)
class MaxPool:
    """The largest number of each square."""

    x: int
    out: int
    size: tuple[int, int]


@dataclass(frozen=True)
class MeanPool:
    """The mean of each square."""

    x: int
    out: int
    size: tuple[int, int]


Op = Connect | Normalize | Add | Relu | Flatten | MaxPool | MeanPool


@dataclass(frozen=True)
class Network:
    """Operations in the order they run; tensor INPUT is the input, the last one's `out` the logits.

    Args:
        ops: the operations.
        shapes: of one sample of each tensor.
    """

    ops: tuple[Op, ...]
    shapes: dict[int, Shape]

    @cached_property
    def trained(self) -> frozenset[int]:
        """The tensors that depend on a parameter: for these a gradient is needed."""
        found: set[int] = set()
        for op in self.ops:
            if isinstance(op, Connect | Normalize) or found & set(inputs(op)):
                found.add(op.out)
        return frozenset(found)

    def readers(self) -> Counter[int]:
        """How often each tensor is read."""
        return Counter(t for op in self.ops for t in inputs(op))


def inputs(op: Op) -> list[int]:
    """The tensors that an operation reads."""
    other = getattr(op, "other", None)
    return [op.x] if other is None else [op.x, other]


# -- fusing ----------------------------------------------------------------------------------------


def fused(ops: list[Op]) -> list[Op]:
    """The same with sums and ReLUs taken on by what makes their input, where nothing else reads it.

    What takes one on runs where that stood: all that it reads is made by then. A ReLU that makes
    the logits stays, for the loss does not cut their gradient.
    """
    readers = Counter(t for op in ops for t in inputs(op))
    done: list[Op] = []
    for op in ops:
        is_last = readers[op.out] == 0
        candidates = [] if is_last else [made for made in done if readers[made.out] == 1]
        taken = _taken_on(op, candidates)
        if taken is not None:
            done.remove(taken[0])
        done.append(op if taken is None else taken[1])
    return done


def _taken_on(op: Op, candidates: list[Op]) -> tuple[Op, Op] | None:
    """An operation that can take on another: as it was, and as it then is."""
    for made in candidates:
        match op, made:
            case Relu(x, out), Connect(relu=False) | Normalize(relu=False) | Add(relu=False):
                if made.out == x:
                    return made, replace(made, out=out, relu=True)
            case Add(x, other, out), Normalize(other=None, relu=False):
                if made.out in (x, other):
                    return made, replace(made, out=out, other=other if made.out == x else x)
            case _:
                pass
    return None
