"""Structure: which channels of a network live and die together, and the physically smaller network.

A channel that is removed takes with it the filter that makes it, its normalization, and whatever of
other layers reads it; where layers add, their channels go together. Torch-Pruning's dependency
graph proposes these groups. A proof follows: a network with channels removed must compute what
the whole one does with the same entries set to 0, for random channels and weights, in float64.

    groups = trace(network, (3, 32, 32))
    channels = {group.name: keep(group) for group in groups}  # booleans, one a channel
    smaller = resized(network, shapes(shrunk(params | buffers, groups, channels)))

Tensors are named as by `named_parameters` and `named_buffers`, and every function here works on
dictionaries of them, so that a smaller network is its model and the shapes of its tensors.
"""

import copy
import fnmatch
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from windfall import limits, models, seeds
from windfall.initialize import Layer, Transposed
from windfall.masks import Masks, Params
from windfall.spec import FAMILY, Spec, SpecError, nearest

Normalization = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
ROOTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # layers that make channels
TRACE_SECONDS, TRACE_BYTES = 60.0, 2 * 2**30
TOLERANCE = 1e-9  # relative, in float64: rounding of sums of another length

Shapes = Mapping[str, tuple[int, ...]]
Unit = Literal["weights", "channels"]  # what is pruned one by one


@dataclass(frozen=True)
class Slot:
    """Where a group's channels lie in a tensor.

    Args:
        tensor: its name.
        axis: of the tensor.
        places: of each channel, the positions on that axis.
    """

    tensor: str
    axis: int
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Group:
    """Channels that are removed in all their tensors at once.

    Args:
        name: of the weight of the first layer that makes them.
        makers: the weights of all layers that make them, by name, with the axis of what is made.
        scales: the names of the weights of their batch normalizations.
        slots: their places in all tensors, those that only read them included.
    """

    name: str
    makers: Mapping[str, int]
    scales: tuple[str, ...]
    slots: tuple[Slot, ...]

    @property
    def size(self) -> int:
        """The number of channels."""
        return len(self.slots[0].places)


# -- tensors: masked and shrunk --------------------------------------------------------------------


def alive(groups: Sequence[Group], channels: Masks, like: Params) -> dict[str, dict[int, Tensor]]:
    """Which positions stay, by tensor and axis; tensors and axes that lose nothing are left out."""
    stays: dict[str, dict[int, Tensor]] = {}
    for group in groups:
        dead = (~channels[group.name]).nonzero().flatten().tolist()
        for slot in group.slots if dead else ():
            if slot.tensor not in like:
                continue
            axes = stays.setdefault(slot.tensor, {})
            size = like[slot.tensor].shape[slot.axis]
            stay = axes.setdefault(slot.axis, torch.ones(size, dtype=torch.bool))
            stay[[place for channel in dead for place in slot.places[channel]]] = False
    return stays


def masks(groups: Sequence[Group], channels: Masks, like: Params) -> Masks:
    """The masks of the tensors that lose channels, in the shapes of the whole network.

    Args:
        groups: as `trace` finds them.
        channels: by group's name, True for a channel that stays.
        like: the whole network's parameters and buffers, or some of them.
    """
    found: Masks = {}
    for name, axes in alive(groups, channels, like).items():
        mask = torch.ones(like[name].shape, dtype=torch.bool)
        for axis, stay in axes.items():
            mask &= stay.reshape([-1 if a == axis else 1 for a in range(mask.dim())])
        found[name] = mask
    return found


def shrunk(tensors: Params, groups: Sequence[Group], channels: Masks) -> Params:
    """The tensors without the channels that do not stay; none shares its storage."""
    stays = alive(groups, channels, tensors)
    smaller: Params = {}
    for name, tensor in tensors.items():
        kept = tensor.detach().clone()
        for axis, stay in stays.get(name, {}).items():
            kept = kept.index_select(axis, stay.nonzero().flatten().to(kept.device))
        smaller[name] = kept
    return smaller


def restricted(groups: Sequence[Group], channels: Masks, like: Params) -> tuple[Group, ...]:
    """The groups of the network without the channels that do not stay, in its own positions.

    Args:
        groups: of the whole network.
        channels: by group's name, True for a channel that stays; of each group at least one.
        like: the whole network's parameters and buffers.
    """
    stays = alive(groups, channels, like)
    moved = {
        (name, axis): (stay.cumsum(0) - 1).tolist()
        for name, axes in stays.items()
        for axis, stay in axes.items()
    }

    def within(group: Group, slot: Slot) -> Slot:
        kept = channels[group.name].nonzero().flatten().tolist()
        at = moved.get((slot.tensor, slot.axis))
        places = (slot.places[channel] for channel in kept)
        return Slot(
            slot.tensor,
            slot.axis,
            tuple(places if at is None else (tuple(at[p] for p in each) for each in places)),
        )

    return tuple(
        replace(group, slots=tuple(within(group, slot) for slot in group.slots)) for group in groups
    )


def shapes(tensors: Params) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# -- modules: resized ------------------------------------------------------------------------------


def resized(module: nn.Module, wanted: Shapes) -> nn.Module:
    """A copy of a network whose tensors have the wanted shapes; those of other shapes are zeros.

    Args:
        module: the network; left as it is.
        wanted: the shape of every parameter and buffer, by name.

    Raises:
        ValueError: when a layer cannot have these shapes.
    """
    made = copy.deepcopy(module)
    for path, part in made.named_modules():
        prefix = f"{path}." if path else ""
        changed = {
            name: wanted[prefix + name]
            for name, tensor in _own(part)
            if tuple(tensor.shape) != wanted[prefix + name]
        }
        if changed:
            _resize(part, changed, path)
    return made


def _own(part: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
    return list(tensors)


def _resize(part: nn.Module, changed: Shapes, path: str) -> None:
    if not isinstance(part, Layer | nn.PReLU | Normalization):
        raise ValueError(
            f"`{path}` must be a linear layer, a convolution or a batch normalization to be"
            f" resized; got {type(part).__name__}."
        )
    is_depthwise = _is_depthwise(part)
    for name, shape in changed.items():
        tensor = getattr(part, name)
        zeros = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(part, name, nn.Parameter(zeros, tensor.requires_grad) if is_parameter else zeros)
    if isinstance(part, Normalization):
        part.num_features = next(iter(changed.values()))[0]
        return
    shape = tuple(part.weight.shape)
    if isinstance(part, nn.Linear):
        part.out_features, part.in_features = shape
    elif isinstance(part, Layer):
        part.groups = shape[0] if is_depthwise else part.groups
        one, other = (1, 0) if isinstance(part, Transposed) else (0, 1)
        part.out_channels = shape[one] * (part.groups if one else 1)
        part.in_channels = shape[other] * (part.groups if other else 1)
    else:
        part.num_parameters = shape[0]


def _is_depthwise(part: nn.Module) -> bool:
    if not isinstance(part, Layer) or isinstance(part, nn.Linear) or part.groups == 1:
        return False
    return part.groups == part.in_channels == part.out_channels


# -- the groups ------------------------------------------------------------------------------------


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
    own = copy.deepcopy(module).double().eval()
    for param in own.parameters():
        param.requires_grad_()
    last = [name for name, kind in models.kinds(own, input_shape).items() if kind == "output"]
    proposed = [group for group in _proposed(own, input_shape) if group is not None]
    groups = _ordered(own, [g for g in proposed if not set(last) & set(g.makers)])
    if not groups:
        raise _refused(module, "none of its layers has channels that can be removed")
    if not _is_proved(own, input_shape, groups):
        groups = [group for group in groups if _is_proved(own, input_shape, [group])]
        if not groups or not _is_proved(own, input_shape, groups):
            raise _refused(module, "with channels removed it computes something else than without")
    return tuple(groups)


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
    import torch_pruning  # here: it takes a while, and most studies need none of it

    graph = torch_pruning.DependencyGraph()
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
        path, makes = paths[id(part)], graph.is_out_channel_pruning_fn(item.dep.handler)
        axes = _axes(part, makes=makes)
        if axes is None:
            return None
        if makes and isinstance(part, Layer) and not _is_depthwise(part):
            makers[f"{path}.weight"] = axes[0][1]
        if isinstance(part, Normalization) and part.affine:
            scales.append(f"{path}.weight")
        period = _period(part, makes=makes)
        places += [
            _Place(f"{path}.{name}", axis, item.idxs, item.root_idxs, period, not makes)
            for name, axis in axes
            if getattr(part, name) is not None
        ]
    return _coupled(makers, tuple(scales), places)


def _period(part: nn.Module, *, makes: bool) -> int | None:
    if not isinstance(part, Layer) or isinstance(part, nn.Linear) or _is_depthwise(part):
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
    if _is_depthwise(part):
        return [("weight", 0), ("bias", 0)]
    if isinstance(part, Transposed):
        return (
            None if part.groups > 1 else [("weight", 1), ("bias", 0)] if makes else [("weight", 0)]
        )
    return [("weight", 0), ("bias", 0)] if makes else [("weight", 1)]


# -- the proof -------------------------------------------------------------------------------------


def _is_proved(own: nn.Module, input_shape: tuple[int, ...], groups: Sequence[Group]) -> bool:
    """Whether the network without random channels computes what it does with them set to 0."""
    stream = seeds.stream(0, "structure")
    tensors = dict(own.named_parameters()) | dict(own.named_buffers())
    drawn = {name: _drawn(tensor, stream) for name, tensor in tensors.items()}
    channels = {group.name: _some(stream.random(group.size)) for group in groups}
    inputs = torch.from_numpy(stream.standard_normal((2, *input_shape)))
    with seeds.isolated(0, "structure"), torch.no_grad():
        try:
            smaller = shrunk(drawn, groups, channels)
            zeroed = {
                name: drawn[name] * mask
                for name, mask in masks(groups, channels, drawn).items()
                if name in dict(own.named_parameters())
            }
            whole = functional_call(own, drawn | zeroed, (inputs,))
            less = functional_call(resized(own, shapes(smaller)), smaller, (inputs,))
        except (RuntimeError, ValueError, IndexError):
            return False
    if whole.shape != less.shape:
        return False
    scale = whole.abs().max()
    return bool(
        torch.isfinite(scale) and scale > 0 and (whole - less).abs().max() <= TOLERANCE * scale
    )


def _drawn(like: Tensor, stream: np.random.Generator) -> Tensor:
    """Values none of which is 0, of a scale that no depth makes overflow."""
    if not like.is_floating_point():
        return like
    values = torch.from_numpy(stream.uniform(0.5, 1.5, tuple(like.shape)))
    if like.dim() < 2:
        return values
    signs = torch.from_numpy(stream.choice([-1.0, 1.0], tuple(like.shape)))
    return values * signs / math.sqrt(math.prod(like.shape[1:]))


def _some(draws: Any) -> Tensor:
    """Half of the channels, at least one of them staying and, where there are two, one not."""
    keep = torch.from_numpy(draws < 0.5)
    keep[int(draws.argmin())] = True
    keep[int(draws.argmax())] = False
    return keep


# -- what is pruned, as a value --------------------------------------------------------------------


class Weights(Spec):
    """Single weights, each by itself: masks, and the network keeps its size."""


class Channels(Spec):
    """Whole channels, with all that makes and reads them: the network becomes smaller.

    Args:
        exclude: groups left whole, by the name of their first layer's weight; `*` stands for any
            text (`stage*.conv2.weight`).
        shared: prune also channels that several layers make, such as those that residual blocks
            add to.
    """

    exclude: tuple[str, ...] = ()
    shared: bool = True

    def of(self, groups: Iterable[Group]) -> dict[str, Group]:
        """The groups that may lose channels, by name.

        Raises:
            SpecError: when there is none, or a name in `exclude` fits none.
        """
        groups = tuple(groups)
        names = [group.name for group in groups]
        for pattern in self.exclude:
            if not fnmatch.filter(names, pattern):
                raise SpecError(
                    f"`prune.structure.exclude` must name groups of channels; `{pattern}` fits"
                    f" none.{nearest(pattern, names)}"
                )
        found = {
            group.name: group
            for group in groups
            if (self.shared or len(group.makers) == 1)
            and not any(fnmatch.fnmatchcase(group.name, pattern) for pattern in self.exclude)
        }
        if not found:
            raise SpecError(
                "`prune.structure` must leave a group of channels to prune; got none of"
                f" {', '.join(names)}."
            )
        return found


Structure = Annotated[Weights | Channels, FAMILY]
