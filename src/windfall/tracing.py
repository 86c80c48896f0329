"""Tracing: which channels, or blocks, of a network live and die together, found and proved.

Torch-Pruning's dependency graph proposes the groups of channels; blocks say themselves by their
gates what they are. A proof follows: a network with channels, or blocks, removed must compute what
the whole one does with the same entries set to 0, for random ones and random weights, in float64.

    groups = trace(network, (3, 32, 32))
    (blocks,) = gated(network, (3, 32, 32))
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from windfall import limits, models, seeds
from windfall.initialize import Layer, Transposed
from windfall.models import Gate
from windfall.spec import SpecError
from windfall.structure import (
    Group,
    Normalization,
    Slot,
    is_depthwise,
    masks,
    resized,
    shapes,
    shrunk,
    tensors,
)
from windfall.weightnorm import WeightNormed

ROOTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # layers that make channels
TRACE_SECONDS, TRACE_BYTES = 60.0, 2 * 2**30
TOLERANCE = 1e-9  # relative, in float64: rounding of sums of another length


def trace(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[Group, ...]:
    """The groups of channels that can be removed, in the order of their layers, each proved.

    Left out are the outputs' own channels, and those that a layer reads which cannot lose one alone
    (`LayerNorm`, `GroupNorm`, attention).

    Args:
        module: the network; left as it is.
        input_shape: the shape of one input.

    Raises:
        SpecError: when nothing can be removed, or the network cannot be followed; the message
            names the module.
    """
    own = _copied(module)
    last = [name for name, kind in models.kinds(own, input_shape).items() if kind == "output"]
    proposed = [group for group in _proposed(own, input_shape) if group is not None]
    named = tensors(own).keys()  # of a tensor that layers share, the first one's name alone
    groups = _ordered(
        own,
        [
            group
            for group in proposed
            if not set(last) & set(group.makers) and named >= {slot.tensor for slot in group.slots}
        ],
    )
    if not groups:
        raise _refused(module, "none of its layers has channels that can be removed")
    if not _is_proved(own, input_shape, groups):
        groups = [group for group in groups if _is_proved(own, input_shape, [group])]
        if not groups or not _is_proved(own, input_shape, groups):
            raise _refused(module, "with channels removed it computes something else than without")
    return tuple(groups)


def _copied(module: nn.Module) -> nn.Module:
    own = copy.deepcopy(module).cpu().double().eval()
    for param in own.parameters():
        param.requires_grad_()
    return own


def _ordered(own: nn.Module, groups: list[Group]) -> list[Group]:
    tensors = [*dict(own.named_parameters()), *dict(own.named_buffers())]
    place = {name: index for index, name in enumerate(tensors)}

    def ordered(group: Group) -> Group:
        names = sorted(group.makers, key=place.__getitem__)
        scales = tuple(sorted(group.scales, key=place.__getitem__))
        slots = tuple(sorted(group.slots, key=lambda slot: (place[slot.tensor], slot.axis)))
        return Group(names[0], {name: group.makers[name] for name in names}, scales, slots)

    return sorted(map(ordered, groups), key=lambda group: place[group.name])


def _refused(module: nn.Module, why: str) -> SpecError:
    return SpecError(
        f"`model` must be a network whose channels can be followed from layer to layer;"
        f" {type(module).__name__} is not: {why}. Prune it without structure, or write it with"
        " `nn.Module` layers, additions and concatenations."
    )


def _proposed(own: nn.Module, input_shape: tuple[int, ...]) -> Iterator[Group | None]:
    graph = _dependencies()
    inputs = torch.zeros(2, *input_shape, dtype=torch.float64)
    with seeds.isolated(0, "structure"), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        _check_gradients(own, inputs)
        try:
            with limits.within(TRACE_SECONDS, TRACE_BYTES):
                graph.build_dependency(own, example_inputs=inputs, verbose=False)
                found = list(graph.get_all_groups(root_module_types=ROOTS))
        except Exception as problem:
            why = problem if isinstance(problem, limits.OverLimit) else f"raised {problem!r}"
            raise _refused(own, f"following it {why}") from problem
    paths = {id(part): path for path, part in own.named_modules()}
    for one in found:
        yield _group(graph, one, paths)


def _dependencies() -> Any:
    try:
        import torch_pruning  # here: it takes a while, and most studies need none of it
    except Exception as problem:  # it imports what else is installed, and whatever that raises
        raise SpecError(
            "`prune.structure` needs torch-pruning, which must be importable; it raised"
            f" {problem!r}. Install it anew, or prune weights."
        ) from problem
    return torch_pruning.DependencyGraph()


def _check_gradients(own: nn.Module, inputs: Tensor) -> None:
    """Refuse a network in which a layer runs that no gradient reaches."""
    ran: list[str] = []
    models.observe(own, tuple(inputs.shape[1:]), lambda name, *_: ran.append(name))
    outputs = own(inputs)
    if not outputs.requires_grad:
        raise _refused(own, "no gradient reaches anything from its outputs (`no_grad`, `detach`)")
    params = {name: param for name, param in own.named_parameters() if name in ran}
    found = torch.autograd.grad(outputs.sum(), list(params.values()), allow_unused=True)
    slopes = cast(Sequence[Tensor | None], found)
    for name, slope in zip(params, slopes, strict=True):
        if slope is None:
            raise _refused(own, f"`{name}` is used, but no gradient reaches it (`detach`, `.data`)")


@dataclass(frozen=True)
class _Place:
    """A slot as it was proposed.

    Args:
        tensor: its name.
        axis: of the tensor.
        positions: on what the layer makes or reads, each once.
        channels: the channel of each position.
        period: of a grouped convolution, the size of a group: positions that are equal modulo it
            go together; None elsewhere.
        is_folded: the tensor has one period's positions only.
    """

    tensor: str
    axis: int
    positions: list[int]
    channels: list[int]
    period: int | None
    is_folded: bool


def _group(graph: Any, found: Any, paths: Mapping[int, str]) -> Group | None:
    """The group that Torch-Pruning found; None if one of its layers cannot lose channels."""
    makers: dict[str, int] = {}
    scales: list[str] = []
    places: list[_Place] = []
    for item in found:
        part, kind = item.dep.target.module, item.dep.target.type
        if kind == graph.ops.OPTYPE.OUTPUT or isinstance(part, nn.Parameter):
            return None
        if id(part) not in paths:  # an addition, a concatenation: nothing of its own
            continue
        prefix = f"{paths[id(part)]}." if paths[id(part)] else ""
        makes = graph.is_out_channel_pruning_fn(item.dep.handler)
        axes = _axes(part, makes=makes)
        if axes is None:
            return None
        if makes and isinstance(part, Layer) and not is_depthwise(part):
            makers[f"{prefix}weight"] = axes[0][1]
        if isinstance(part, Normalization) and part.affine:
            scales.append(f"{prefix}weight")
        period = _period(part, makes=makes)
        places += [
            _Place(f"{prefix}{name}", axis, item.idxs, item.root_idxs, period, not makes)
            for name, axis in axes
            if getattr(part, name) is not None
        ]
    return _coupled(makers, tuple(scales), places)


def _period(part: nn.Module, *, makes: bool) -> int | None:
    if not isinstance(part, Layer) or isinstance(part, nn.Linear) or is_depthwise(part):
        return None
    whole = part.out_channels if makes else part.in_channels
    return whole // part.groups if part.groups > 1 else None


def _coupled(
    makers: Mapping[str, int], scales: tuple[str, ...], places: list[_Place]
) -> Group | None:
    """The group whose channels are those of the places, or several where they go together."""
    leader = {channel: channel for place in places for channel in place.channels}

    def first(channel: int) -> int:
        while leader[channel] != channel:
            channel = leader[channel]
        return channel

    for place in places:
        if place.period is None:
            continue
        seen: dict[int, int] = {}
        for position, channel in zip(place.positions, place.channels, strict=True):
            one, other = first(channel), first(seen.setdefault(position % place.period, channel))
            leader[max(one, other)] = min(one, other)
    leaders = sorted({first(channel) for channel in leader})
    if len(leaders) < 2:
        return None
    slots: list[Slot] = []
    for place in places:
        lies: dict[int, set[int]] = {channel: set() for channel in leaders}
        period = place.period if place.is_folded else None
        for position, channel in zip(place.positions, place.channels, strict=True):
            lies[first(channel)].add(position if period is None else position % period)
        slots.append(Slot(place.tensor, place.axis, tuple(tuple(sorted(lies[c])) for c in leaders)))
    return Group(next(iter(makers)), makers, scales, tuple(slots))


def _axes(part: nn.Module, *, makes: bool) -> list[tuple[str, int]] | None:
    """The tensors of a module that have the channels it makes, or reads, and on which axis."""
    if isinstance(part, Normalization):
        tensors = ("weight", "bias", "running_mean", "running_var")
        return [(name, 0) for name in tensors]
    if isinstance(part, nn.PReLU):
        return [("weight", 0)] if part.num_parameters > 1 else []
    if not isinstance(part, Layer):
        return None if any(True for _ in part.parameters(recurse=False)) else []
    beside = [("bias", 0), ("gain", 0)] if isinstance(part, WeightNormed) else [("bias", 0)]
    if is_depthwise(part):
        return [("weight", 0), *beside]
    if isinstance(part, Transposed):
        return None if part.groups > 1 else [("weight", 1), *beside] if makes else [("weight", 0)]
    return [("weight", 0), *beside] if makes else [("weight", 1)]


# -- blocks ----------------------------------------------------------------------------------------


def gated(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[Group]:
    """The one group of a network's blocks that have a gate, in their order, proved.

    A block is removed with every tensor of its branch: all its parts but the one named `shortcut`.

    Args:
        module: the network; left as it is.
        input_shape: the shape of one input.

    Raises:
        SpecError: when no block has a gate, or a network without blocks computes something else
            than with their branches at 0.
    """
    own = _copied(module)
    blocks = [
        f"{path}." if path else ""
        for path, part in own.named_modules()
        if any(isinstance(child, Gate) for child in part.children())
    ]
    if not blocks:
        raise SpecError(
            "`prune.structure` blocks must be used with a network whose blocks have gates; got"
            f" {type(module).__name__} without. Take a residual network of the zoo with"
            " `model.gates=true`, or write blocks with `models.Gate`."
        )
    group = _of_blocks(own, blocks)
    if group.size > 1 and not _is_proved(own, input_shape, [group]):
        raise SpecError(
            "`prune.structure` blocks must be used with a network that computes without a block"
            f" what it does with the branch at 0; {type(module).__name__} does not. Let each"
            " block's `forward` return its shortcut where its gate `is_removed`."
        )
    return (group,)


def _of_blocks(own: nn.Module, blocks: Sequence[str]) -> Group:
    slots: list[Slot] = []
    for name, tensor in [*own.named_parameters(), *own.named_buffers()]:
        within = [name.startswith(b) and not name.startswith(f"{b}shortcut.") for b in blocks]
        if any(within) and tensor.dim():  # a counter of batches has no positions to lose
            every = tuple(range(tensor.shape[0]))
            slots.append(Slot(name, 0, tuple(every if its else () for its in within)))
    gates = (f"{p}.weight" for p, part in own.named_modules() if isinstance(part, Gate))
    return Group("blocks", {}, tuple(gates), tuple(slots))


# -- the proof -------------------------------------------------------------------------------------


def _is_proved(own: nn.Module, input_shape: tuple[int, ...], groups: Sequence[Group]) -> bool:
    """Whether the network without random channels computes what it does with them set to 0."""
    stream = seeds.stream(0, "structure")
    values = {name: drawn(tensor, stream) for name, tensor in tensors(own).items()}
    channels = {group.name: some(stream.random(group.size)) for group in groups}
    inputs = torch.from_numpy(stream.standard_normal((2, *input_shape)))
    with seeds.isolated(0, "structure"), torch.no_grad():
        try:
            smaller = shrunk(values, groups, channels)
            zeroed = {
                name: values[name] * mask
                for name, mask in masks(groups, channels, values).items()
                if name in dict(own.named_parameters())
            }
            whole = functional_call(own, values | zeroed, (inputs,))
            less = functional_call(resized(own, shapes(smaller)), smaller, (inputs,))
        except (RuntimeError, ValueError, IndexError):
            return False
    if whole.shape != less.shape:
        return False
    scale = whole.abs().max()
    return bool(
        torch.isfinite(scale) and scale > 0 and (whole - less).abs().max() <= TOLERANCE * scale
    )


def drawn(like: Tensor, stream: np.random.Generator) -> Tensor:
    """Values none of which is 0, of a scale that no depth makes overflow."""
    if not like.is_floating_point():
        return like
    values = torch.from_numpy(stream.uniform(0.5, 1.5, tuple(like.shape)))
    if like.dim() < 2:
        return values
    signs = torch.from_numpy(stream.choice([-1.0, 1.0], tuple(like.shape)))
    return values * signs / math.sqrt(math.prod(like.shape[1:]))


def some(draws: Any) -> Tensor:
    """Half of the channels, at least one of them staying and, where there are two, one not.

    Args:
        draws: uniform in [0, 1), [channel].
    """
    keep = torch.from_numpy(draws < 0.5)
    keep[int(draws.argmin())] = True
    keep[int(draws.argmax())] = False
    return keep
