"""Structure: what parts of a network live and die together, and the physically smaller network.

A channel that is removed takes with it the filter that makes it, its normalization, and whatever of
other layers reads it; where layers add, their channels go together. A residual block goes with all
tensors of its branch, of which nothing is left. These groups are found by `tracing`. In a group of
blocks "channels" are the blocks.

    groups = tracing.trace(network, (3, 32, 32))
    channels = {group.name: keep(group) for group in groups}  # booleans, one a channel
    smaller = resized(network, shapes(shrunk(params | buffers, groups, channels)))

Tensors are named as by `named_parameters` and `named_buffers`, and every function here works on
dictionaries of them, so that a smaller network is its model and the shapes of its tensors.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from windfall.initialize import Layer, Transposed
from windfall.masks import Masks, Params
from windfall.models import Gate

Normalization = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

Shapes = Mapping[str, tuple[int, ...]]
Unit = Literal["weights", "channels", "blocks"]  # what is pruned one by one


@dataclass(frozen=True)
class Slot:
    """Where a group's channels lie in a tensor.

    Args:
        tensor: its name.
        axis: of the tensor.
        places: of each channel, the positions on that axis; none of a block that the tensor is no
            part of.
    """

    tensor: str
    axis: int
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Group:
    """Channels that are removed in all their tensors at once; or the blocks of a network.

    Args:
        name: of the weight of the first layer that makes them; or `blocks`.
        makers: the weights of all layers that make them, by name, with the axis of what is made;
            none of blocks.
        scales: the names of the weights of their batch normalizations; or of the blocks' gates.
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
        groups: as `tracing.trace` finds them.
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


def tensors(module: nn.Module) -> Params:
    """The parameters and buffers of a network, by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def shapes(tensors: Params) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# -- modules: resized ------------------------------------------------------------------------------


def resized(module: nn.Module, wanted: Shapes) -> nn.Module:
    """A copy of a network whose tensors have the wanted shapes; those of other shapes are zeros.

    Args:
        module: the network; left as it is.
        wanted: the shape of every parameter and buffer, by name; one that several layers share is
            named once.

    Raises:
        ValueError: when a layer cannot have these shapes.
    """
    made = copy.deepcopy(module)
    for path, part in made.named_modules():
        prefix = f"{path}." if path else ""
        changed = {
            name: wanted[prefix + name]
            for name, tensor in _own(part)
            if tuple(tensor.shape) != wanted.get(prefix + name, tensor.shape)
        }
        if changed:
            _resize(part, changed, path)
    return made


def given(module: nn.Module, tensors: Params) -> nn.Module:
    """A copy of a network with the sizes, values and dtype of these tensors, in evaluation mode.

    Args:
        module: the network; left as it is.
        tensors: every parameter and buffer, by name.

    Raises:
        ValueError: when a layer cannot have these shapes.
    """
    made = resized(module, shapes(tensors))
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        tensor.data = tensors[name].detach().clone()
    return made.eval()


def newly(module: nn.Module, groups: Sequence[Group], channels: Masks) -> nn.Module:
    """A network as its constructor made it, without the channels that do not stay.

    Layers that lost channels begin as their own constructors make them at the size that is left,
    from the global generator; all else, such as normalization, keeps its values where it stays.

    Args:
        module: the whole network, newly constructed; left as it is.
        groups: of the whole network.
        channels: by group's name, True for a channel that stays.
    """
    whole = tensors(module)
    kept = shrunk(whole, groups, channels)
    made = resized(module, shapes(kept))
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            tensor.copy_(kept[name])
    for path, part in made.named_modules():
        name = f"{path}.weight" if path else "weight"
        is_smaller = name in kept and kept[name].shape != whole[name].shape
        if isinstance(part, Layer) and is_smaller and kept[name].numel():
            part.reset_parameters()
    return made


def _own(part: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
    return list(tensors)


def _resize(part: nn.Module, changed: Shapes, path: str) -> None:
    is_known = isinstance(part, Layer | nn.PReLU | Normalization | Gate)
    if not is_known and any(math.prod(shape) for shape in changed.values()):
        raise ValueError(
            f"`{path}` must be a linear layer, a convolution or a batch normalization to be"
            f" resized; got {type(part).__name__}."
        )
    was_depthwise = is_depthwise(part)
    for name, shape in changed.items():
        tensor = getattr(part, name)
        zeros = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(part, name, nn.Parameter(zeros, tensor.requires_grad) if is_parameter else zeros)
    if isinstance(part, Normalization):
        part.num_features = next(iter(changed.values()))[0]
        return
    if not is_known:  # nothing of it is left, and its block does not run
        return
    shape = tuple(part.weight.shape)
    if isinstance(part, Gate):
        part.size = shape[0]
    elif isinstance(part, nn.Linear):
        part.out_features, part.in_features = shape
    elif isinstance(part, Layer):
        part.groups = shape[0] if was_depthwise else part.groups
        one, other = (1, 0) if isinstance(part, Transposed) else (0, 1)
        part.out_channels = shape[one] * (part.groups if one else 1)
        part.in_channels = shape[other] * (part.groups if other else 1)
    elif isinstance(part, nn.PReLU):
        part.num_parameters = shape[0]


def is_depthwise(part: nn.Module) -> bool:
    """Whether a module is a convolution that makes each channel of one alone."""
    if not isinstance(part, Layer) or isinstance(part, nn.Linear) or part.groups == 1:
        return False
    return part.groups == part.in_channels == part.out_channels
