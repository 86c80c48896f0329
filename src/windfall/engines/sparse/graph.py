"""A module read as a list of operations, by `torch.fx`.

Whatever the sparse engine cannot run is refused by the name of its layer.
"""

import copy
import operator
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node, Tracer

from windfall import seeds
from windfall.engines.contract import Unsupported
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
    Shape,
    fused,
    inputs,
)  # fmt: skip

HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
POOLS: dict[Any, type[MaxPool | MeanPool]] = {F.max_pool2d: MaxPool, F.avg_pool2d: MeanPool}
PLAIN = {("ceil_mode", False), ("return_indices", False), ("count_include_pad", True)}
PARAMETER_HOOKS = ("backward", "post_accumulate_grad")


def read(module: nn.Module, input_shape: Shape) -> Network:
    """The operations of a network.

    Args:
        module: the network.
        input_shape: of one sample.

    Raises:
        Unsupported: when the sparse engine cannot run it; the message names the layer.
    """
    reader, other = (_Reader(module, input_shape, training=mode) for mode in (True, False))
    ops, shapes = reader.ops, reader.shapes
    if ops != other.ops:
        raise _refused("its forward pass", "is another one in evaluation")
    if isinstance(ops[0], Flatten) and Network(tuple(ops), shapes).readers()[INPUT] == 1:
        ops, flat = ops[1:], ops[0].out  # the samples are read as features at once
        ops = [_reading(op, {flat: INPUT}) for op in ops]
        shapes = {**shapes, INPUT: shapes[flat]}
    ops = fused(ops)
    return Network(tuple(ops), {t: shapes[t] for t in (INPUT, *(op.out for op in ops))})


def _reading(op: Op, others: dict[int, int]) -> Op:
    """The operation with other tensors in the places of some that it reads."""
    named = {n: getattr(op, n) for n in ("x", "other") if getattr(op, n, None) is not None}
    return replace(op, **{n: others.get(tensor, tensor) for n, tensor in named.items()})


def _refused(what: str, why: str) -> Unsupported:
    return Unsupported(
        f"`engine` must be one that can train this network; sparse cannot: {what} {why}. "
        "Use auto or separate."
    )


def _traced(module: nn.Module, *, training: bool) -> Graph:
    """The trace of a copy, which may neither remember nor draw: its trace would not show it."""
    copied = copy.deepcopy(module).train(training)
    try:
        with seeds.isolated(0, "trace"):
            before = _memory(copied), seeds.generators()
            traced = Tracer().trace(copied)
            after = _memory(copied), seeds.generators()
    except Exception as problem:
        raise _refused("its forward pass", f"cannot be traced ({problem})") from problem
    if before != after:
        raise _refused("its forward pass", "changes something beside its result, or draws")
    return traced


def _memory(module: nn.Module) -> str:
    """What the parts of a module hold beside parameters, buffers and parts."""
    return repr(
        [
            (name, [item for item in vars(part).items() if not item[0].startswith("_")])
            for name, part in module.named_modules()
        ]
    )


class _Made(int):
    """The number of a tensor, told from any other number."""


class _Reader:
    """Walks through a traced module, operation by operation."""

    def __init__(self, module: nn.Module, input_shape: Shape, *, training: bool) -> None:
        self.module = module
        traced = _traced(module, training=training)
        self.ops: list[Op] = []
        self.shapes: dict[int, Shape] = {}
        self.tensors: dict[Node, Any] = {}
        self.used: Counter[str] = Counter()
        self.changed: set[int] = set()  # in place
        for node in traced.nodes:
            self.tensors[node] = self._read(node, input_shape)
        self._check()

    def _read(self, node: Node, input_shape: Shape) -> Any:
        match node.op:
            case "placeholder":
                if self.shapes:
                    raise _refused("its forward pass", "has more than one input")
                return self._new(input_shape)
            case "output":
                self.logits = self._given(node.args[0], "output")
                return None
            case "call_module":
                if node.kwargs or len(node.args) != 1:
                    raise _refused(f"`{node.target}`", "is not given one tensor alone")
                return self._module(str(node.target), self._arguments(node))
            case "call_function" | "call_method" if self._is_size(node):
                return None
            case "call_function":
                return self._function(node, self._arguments(node))
            case "call_method":
                return self._method(node, self._arguments(node))
            case _:
                raise _refused(f"`{node.target}`", "is used outside a layer")

    def _is_size(self, node: Node) -> bool:
        """Whether it asks for a tensor's shape, or a part of one: for `view`."""
        first = self.tensors.get(node.args[0]) if isinstance(node.args[0], Node) else None
        if isinstance(first, _Made):
            return node.target == "size" or (node.target is getattr and node.args[1] == "shape")
        return node.target is operator.getitem

    def _arguments(self, node: Node) -> list[Any]:
        given = [self.tensors[a] if isinstance(a, Node) else a for a in node.args]
        if not given or not isinstance(given[0], _Made):
            raise _refused(f"`{node.name}`", "is not given a tensor first")
        return given

    def _given(self, node: Any, name: str) -> int:
        found = self.tensors.get(node) if isinstance(node, Node) else None
        if not isinstance(found, _Made):
            raise _refused(f"`{name}`", "does not return one tensor")
        return found

    def _new(self, shape: Shape) -> _Made:
        made = _Made(len(self.shapes))
        self.shapes[made] = shape
        return made

    def _check(self) -> None:
        own = dict(self.module.named_parameters())
        for name, param in self.module.named_parameters(remove_duplicate=False):
            if name not in own:
                raise _refused(f"`{name}`", "is another layer's too")
            if not param.requires_grad:
                raise _refused(f"`{name}`", "is frozen")
            if any(getattr(param, f"_{kind}_hooks", None) for kind in PARAMETER_HOOKS):
                raise _refused(f"`{name}`", "has hooks")
            layer = name.rpartition(".")[0]
            if self.used[layer] != 1:
                raise _refused(f"`{layer or name}`", f"is used {self.used[layer]} times")
        for name, part in self.module.named_modules():
            if any(getattr(part, f"_{kind}_hooks") for kind in HOOKS):
                raise _refused(f"`{name}`", "has hooks")
        roots = {op.out: op.x for op in self.ops if isinstance(op, Flatten)}  # one memory
        read = [t for op in self.ops for t in inputs(op) if not isinstance(op, Flatten)]
        readers = Counter(roots.get(t, t) for t in read)
        if any(readers[roots.get(x, x)] > 1 for x in self.changed):
            raise _refused("its forward pass", "changes in place what is read again")
        last = self.ops[-1] if self.ops else None
        if last is None or last.out != self.logits or len(self.shapes[self.logits]) != 1:
            raise _refused("its output", "is not one row of logits a sample")

    # -- modules

    def _module(self, name: str, given: list[Any]) -> int:
        module = self.module.get_submodule(name)
        self.used[name] += 1
        x, what = given[0], f"`{name}` ({type(module).__name__})"
        match module:
            case nn.Linear():
                return self._linear(name, what, module, x)
            case nn.Conv2d():
                return self._convolution(name, what, module, x)
            case nn.BatchNorm2d() | nn.BatchNorm1d():
                return self._normalization(name, what, module, x)
            case nn.ReLU():
                return self._relu(x, changes=module.inplace)
            case nn.Identity() | nn.Dropout(p=0.0):
                return x
            case nn.Flatten(start_dim=1, end_dim=-1):
                return self._flatten(x)
            case _:
                return self._pooling(what, module, x)

    def _pooling(self, what: str, module: nn.Module, x: int) -> int:
        match module:
            case nn.MaxPool2d(padding=0, dilation=1, ceil_mode=False, return_indices=False):
                return self._pool(MaxPool, what, x, module.kernel_size, module.stride)
            case nn.AvgPool2d(padding=0, ceil_mode=False, divisor_override=None):
                return self._pool(MeanPool, what, x, module.kernel_size, module.stride)
            case nn.AdaptiveAvgPool2d():
                return self._adaptive(what, x, module.output_size)
            case _:
                raise _refused(what, "is not among its layers, or not with these settings")

    def _has_bias(self, name: str) -> bool:
        return f"{name}.bias" in dict(self.module.named_parameters())

    def _linear(self, name: str, what: str, module: nn.Linear, x: int) -> int:
        if self.shapes[x] != (module.in_features,):
            raise _refused(what, f"is applied to a tensor of shape {self.shapes[x]}")
        out = self._new((module.out_features,))
        shape = module.out_features, module.in_features, 1, 1
        self.ops.append(Connect(name, x, out, shape, self._has_bias(name)))
        return out

    def _convolution(self, name: str, what: str, module: nn.Conv2d, x: int) -> int:
        padding, stride = module.padding, module.stride
        if isinstance(padding, str) or module.padding_mode != "zeros" or stride[0] != stride[1]:
            raise _refused(what, "must have numbers of zeros as padding and one stride")
        self._check_image(what, x)
        channels, *size = self.shapes[x]
        kernel, dilation = module.kernel_size, module.dilation
        made = [
            (side + 2 * p - d * (k - 1) - 1) // s + 1
            for side, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
        ]
        out = self._new((module.out_channels, *made))
        rows, columns = kernel
        shape = module.out_channels, channels // module.groups, rows, columns
        self.ops.append(
            Connect(
                name, x, out, shape, self._has_bias(name), module.groups,
                (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]),
            )
        )  # fmt: skip
        return out

    def _normalization(self, name: str, what: str, module: Any, x: int) -> int:
        if module.momentum is None or not (module.affine and module.track_running_stats):
            raise _refused(what, "must have weights, running statistics and a momentum")
        out = self._new(self.shapes[x])
        self.ops.append(Normalize(name, x, out, module.eps, module.momentum))
        return out

    # -- functions and methods

    def _function(self, node: Node, given: list[Any]) -> Any:
        name = getattr(node.target, "__name__", str(node.target))
        what = f"`{name}`"
        named = node.kwargs
        if node.target in (F.relu, torch.relu) and not set(named) - {"inplace"}:
            return self._relu(given[0], changes=bool(named.get("inplace")))
        if node.target in (operator.add, operator.iadd, torch.add) and not named:
            self.changed |= {given[0]} if node.target is operator.iadd else set()
            return self._add(what, *given)
        if node.target is torch.flatten and (given[1:] == [1] or named == {"start_dim": 1}):
            return self._flatten(given[0])
        if node.target in POOLS and len(given) <= 3:
            settings = dict(zip(("kernel_size", "stride"), given[1:], strict=False)) | named
            others = set(settings.items()) - {("padding", 0), ("dilation", 1), *PLAIN}
            if {name for name, _ in others} <= {"kernel_size", "stride"}:
                size, stride = settings["kernel_size"], settings.get("stride")
                return self._pool(POOLS[node.target], what, given[0], size, stride)
        if node.target is F.adaptive_avg_pool2d and not named:
            return self._adaptive(what, given[0], given[1])
        raise _refused(what, "is not among its functions")

    def _method(self, node: Node, given: list[Any]) -> Any:
        x, rest = given[0], given[1:]
        match node.target:
            case "relu":
                return self._relu(x)
            case "add" if not node.kwargs:
                return self._add("`add`", *given)
            case "flatten" if rest == [1] and not node.kwargs:
                return self._flatten(x)
            case "view" | "reshape" if len(rest) == 2 and not node.kwargs:
                if rest[0] in (None, -1) and rest[1] in (-1, self._num_features(x)):
                    return self._flatten(x)
            case _:
                pass
        raise _refused(f"`{node.target}`", "is not among its methods, or not with these arguments")

    # -- operations

    def _num_features(self, x: int) -> int:
        return torch.Size(self.shapes[x]).numel()

    def _check_image(self, what: str, x: int) -> None:
        if len(self.shapes[x]) != 3:
            raise _refused(what, "is not applied to images [channel, height, width]")

    def _relu(self, x: int, *, changes: bool = False) -> int:
        self.changed |= {x} if changes else set()
        out = self._new(self.shapes[x])
        self.ops.append(Relu(x, out))
        return out

    def _add(self, what: str, x: Any, other: Any) -> int:
        both = isinstance(x, _Made) and isinstance(other, _Made)
        if not both or self.shapes[x] != self.shapes[other] or x == other:
            raise _refused(what, "must be of two tensors of one shape")
        out = self._new(self.shapes[x])
        self.ops.append(Add(x, other, out))
        return out

    def _flatten(self, x: int) -> int:
        if len(self.shapes[x]) == 1:
            return x
        out = self._new((self._num_features(x),))
        self.ops.append(Flatten(x, out))
        return out

    def _pool(
        self, kind: type[MaxPool | MeanPool], what: str, x: int, size: Any, stride: Any
    ) -> int:
        self._check_image(what, x)
        sides, steps = _pair(size), _pair(size if stride is None else stride)
        channels, *rest = self.shapes[x]
        if sides != steps or any(side > whole for side, whole in zip(sides, rest, strict=True)):
            raise _refused(what, "must pool squares side by side, inside the image")
        made = (side // s for side, s in zip(rest, sides, strict=True))
        out = self._new((channels, *made))
        self.ops.append(kind(x, out, sides))
        return out

    def _adaptive(self, what: str, x: int, size: Any) -> int:
        self._check_image(what, x)
        channels, *rest = self.shapes[x]
        made = [side if m is None else m for side, m in zip(rest, _pair(size), strict=True)]
        if any(side % m for side, m in zip(rest, made, strict=True)):
            raise _refused(what, f"must have a result that divides the image's {tuple(rest)}")
        sides = rest[0] // made[0], rest[1] // made[1]
        out = self._new((channels, *made))
        self.ops.append(MeanPool(x, out, sides))
        return out


def _pair(size: Any) -> tuple[Any, Any]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
