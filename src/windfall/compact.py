"""Compaction: a masked network made physically smaller, and its outputs exactly what they were.

A mask often leaves channels that do nothing. One is removed when no output depends on it: nothing
that reads it has a nonzero weight for it, or what does is not read in turn. It is removed too when
nothing that makes it has a weight left, for then what its readers get of it is a constant, and that
constant goes into their biases. Where it cannot, it stays: a zero-padded convolution sees less of
it at the border, and one without a bias has no place for it. A group never loses its last channel.

    found = compacted(network, (1, 28, 28), masks.apply(mask, params) | buffers)
    smaller = structure.given(network, found.tensors)

Which channels can be removed at all is what `tracing.trace` has proved. Beside it is proved, for
random weights in float64, that nothing sees them but the layers that read them, and that they
depend on nothing but the layers that make them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from windfall import seeds, structure, tracing
from windfall.initialize import Layer
from windfall.masks import Masks, Params
from windfall.spec import SpecError
from windfall.structure import Group, Slot

TOLERANCE = 1e-12  # relative, in float64: what a constant may differ by from place to place

Readers = Mapping[str, tuple[tuple[str, int], ...]]  # by group: weights and the axes they read on
Seen = dict[str, list[Tensor]]  # by layer's path: what it was given, each time it ran


@dataclass(frozen=True)
class Compacted:
    """A network without the channels that did nothing.

    Args:
        tensors: its parameters and buffers, by name; none shares its storage with the whole's.
        channels: by group's name, True for a channel that stays; empty where nothing was tried.
        reason: why nothing was tried, or None.
    """

    tensors: Params
    channels: Masks
    reason: str | None = None

    @property
    def removed(self) -> dict[str, int]:
        """How many channels were removed, by group's name; groups that lost none are left out."""
        lost = {name: int((~stay).sum()) for name, stay in self.channels.items()}
        return {name: count for name, count in lost.items() if count}


def compacted(network: nn.Module, input_shape: tuple[int, ...], tensors: Params) -> Compacted:
    """The network without channels that do nothing, to the fixpoint: removal can free others.

    A network whose channels cannot be followed is returned at full size, with the reason.

    Args:
        network: the whole network; its values do not matter.
        input_shape: the shape of one input.
        tensors: every parameter and buffer by name, finite; pruned weights are exactly 0.
    """
    try:
        groups = tracing.trace(network, input_shape)
    except SpecError as problem:
        return Compacted(_cloned(tensors), {}, str(problem))
    readers = _readers(network, groups)
    groups = _sealed(network, input_shape, groups, readers)
    own = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    channels = {group.name: torch.ones(group.size, dtype=torch.bool) for group in groups}
    while True:
        here = structure.restricted(groups, channels, tensors)
        stay = _live(here, readers, own)
        if _is_whole(stay):
            stay, shifts = _folded(network, input_shape, here, readers, own)
            own |= {name: own[name] + shift for name, shift in shifts.items()}
        if _is_whole(stay):
            return Compacted(
                {n: t.to(tensors[n].dtype, copy=True) for n, t in own.items()}, channels
            )
        own = structure.shrunk(own, here, stay)
        channels = {name: _within(before, stay[name]) for name, before in channels.items()}


def _is_whole(stay: Masks) -> bool:
    return all(bool(one.all()) for one in stay.values())


def _cloned(tensors: Params) -> Params:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _within(before: Tensor, stay: Tensor) -> Tensor:
    """Of the channels there were, in the whole network's numbers, those that stay."""
    return torch.zeros_like(before).masked_scatter(before, stay)


def _spared(stay: Tensor) -> Tensor:
    """What stays, and if nothing does, the first."""
    if not bool(stay.any()):
        stay = stay.clone()
        stay[0] = True
    return stay


# -- who makes and who reads -----------------------------------------------------------------------


def _readers(network: nn.Module, groups: Sequence[Group]) -> Readers:
    def is_read(group: Group, slot: Slot) -> bool:
        part = network.get_submodule(slot.tensor.rpartition(".")[0])
        is_layer = isinstance(part, Layer) and not structure.is_depthwise(part)
        is_weight = slot.tensor.endswith("weight")
        return is_layer and is_weight and group.makers.get(slot.tensor) != slot.axis

    return {
        group.name: tuple((s.tensor, s.axis) for s in group.slots if is_read(group, s))
        for group in groups
    }


def _slots(group: Group, readers: Readers) -> list[Slot]:
    return [slot for slot in group.slots if (slot.tensor, slot.axis) in readers[group.name]]


def _made(group: Group) -> list[Slot]:
    return [slot for slot in group.slots if group.makers.get(slot.tensor) == slot.axis]


def _places(slot: Slot, channels: Iterable[int]) -> Tensor:
    flat = [place for channel in channels for place in slot.places[channel]]
    return torch.tensor(flat, dtype=torch.long)


def _rows(tensor: Tensor, slot: Slot, channel: int) -> Tensor:
    return tensor.index_select(slot.axis, _places(slot, [channel]))


# -- what is not read ------------------------------------------------------------------------------


def _live(groups: Sequence[Group], readers: Readers, tensors: Params) -> Masks:
    """The channels that an output depends on, and of each group one at least.

    The least set such that a channel is in it when what reads it, by a nonzero weight, makes an
    output or a channel of the set: two that read only each other are in none.
    """
    read = {g.name: [(s, _connected(s, g, tensors)) for s in _slots(g, readers)] for g in groups}
    live = {group.name: torch.zeros(group.size, dtype=torch.bool) for group in groups}
    rows = {
        slot.tensor: torch.ones(tensors[slot.tensor].shape[1 - slot.axis], dtype=torch.bool)
        for group in groups
        for slot in _slots(group, readers)
    }
    for group in groups:
        _mark(rows, group, live[group.name])
    is_growing = True
    while is_growing:
        is_growing = False
        for group in reversed(groups):  # readers come later: they are marked before what they read
            found = live[group.name].clone()
            for slot, connected in read[group.name]:
                found |= connected[rows[slot.tensor]].any(0)
            if not torch.equal(found, live[group.name]):
                live[group.name], is_growing = found, True
                _mark(rows, group, found)
    return {name: _spared(found) for name, found in live.items()}


def _mark(rows: Masks, group: Group, live: Tensor) -> None:
    for slot in _made(group):
        if slot.tensor in rows:
            each = torch.tensor([len(places) for places in slot.places])
            rows[slot.tensor][_places(slot, range(group.size))] = live.repeat_interleave(each)


def _connected(slot: Slot, group: Group, tensors: Params) -> Tensor:
    """Which of what a layer makes reads which channel by a nonzero weight: [made, channel]."""
    weight = tensors[slot.tensor] != 0
    flat = weight.movedim((1 - slot.axis, slot.axis), (0, 1)).unsqueeze(-1).flatten(2).any(2)
    found = torch.zeros(len(flat), group.size, dtype=torch.bool)
    for channel, places in enumerate(slot.places):
        found[:, channel] = flat[:, list(places)].any(1)
    return found


# -- what is constant ------------------------------------------------------------------------------


def _folded(
    network: nn.Module,
    input_shape: tuple[int, ...],
    groups: Sequence[Group],
    readers: Readers,
    tensors: Params,
) -> tuple[Masks, Params]:
    """Which channels stay once the constants that can be are in their readers' biases.

    A channel that nothing makes reads no other one, so all can be read off and removed at once.

    Returns:
        The channels that stay, by group's name, and what is to be added to biases, by theirs.
    """
    constant = {group.name: _unmade(group, tensors) for group in groups}
    stay = {name: torch.ones_like(found) for name, found in constant.items()}
    total: Params = {}
    if not any(bool(found.any()) for found in constant.values()):
        return stay, total
    own = structure.given(network, tensors)
    seen = _watched(own, tensors, input_shape, readers)
    for group in groups:
        for channel in constant[group.name].nonzero().flatten().tolist():
            is_last = int(stay[group.name].sum()) == 1
            shifts = None if is_last else _shifts(own, group, channel, readers, seen)
            if shifts is not None:
                stay[group.name][channel] = False
                total |= {name: total.get(name, 0) + shift for name, shift in shifts.items()}
    return stay, total


def _unmade(group: Group, tensors: Params) -> Tensor:
    """The channels none of whose makers has a weight left for them."""
    found = torch.ones(group.size, dtype=torch.bool)
    for slot in _made(group):
        for channel in found.nonzero().flatten().tolist():
            found[channel] = not bool(_rows(tensors[slot.tensor], slot, channel).any())
    return found


def _watched(
    own: nn.Module, tensors: Params, input_shape: tuple[int, ...], readers: Readers
) -> Seen:
    """What the layers that read channels are given, for two random inputs, each time they run."""
    seen: Seen = {tensor.rpartition(".")[0]: [] for read in readers.values() for tensor, _ in read}
    hooks = [
        own.get_submodule(path).register_forward_pre_hook(
            lambda _, args, named, calls=calls: calls.append([*args, *named.values()][0].detach()),
            with_kwargs=True,
        )
        for path, calls in seen.items()
    ]
    stream = seeds.stream(0, "compact", 1)
    inputs = torch.from_numpy(stream.standard_normal((2, *input_shape)))
    try:
        with seeds.isolated(0, "compact"), torch.no_grad():
            functional_call(own, tensors, (inputs,))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _shifts(
    own: nn.Module, group: Group, channel: int, readers: Readers, seen: Seen
) -> Params | None:
    """What a constant channel adds to its readers' biases, by name; None where it cannot be told.

    It cannot when a layer has no bias, when the constant differs from one input to another, or when
    what a layer makes of it differs from place to place.
    """
    shifts: Params = {}
    for slot in _slots(group, readers):
        path = slot.tensor.rpartition(".")[0]
        layer = own.get_submodule(path)
        assert isinstance(layer, Layer)
        if not bool(_rows(layer.weight, slot, channel).any()):
            continue
        told = [_told(layer, slot, channel, given) for given in seen[path]]
        first = told[0] if told else None
        if first is None or any(t is None or not _is_close(t, first) for t in told):
            return None
        if bool(first.any()):
            if layer.bias is None:
                return None
            shifts[f"{path}.bias"] = shifts.get(f"{path}.bias", 0) + first
    return shifts


def _told(layer: Layer, slot: Slot, channel: int, given: Tensor) -> Tensor | None:
    """What a layer makes of one channel of its inputs, [made]; None if it is no constant."""
    axis, places = _positions(layer, slot, channel, given)
    read = given.index_select(axis, places)
    if not _is_close(read[:1], read[1:]):
        return None
    alone = torch.zeros_like(given[:1]).index_copy(axis, places, read[:1])
    changed = {} if layer.bias is None else {"bias": torch.zeros_like(layer.bias)}
    with torch.no_grad():
        made = functional_call(layer, changed, (alone,))
    flat = made.movedim(_axis(layer, made), 0).flatten(1)
    return flat[:, 0] if _is_close(flat, flat[:, :1]) else None


def _positions(layer: Layer, slot: Slot, channel: int, given: Tensor) -> tuple[int, Tensor]:
    """The axis of a layer's inputs that has a channel, and where on it; of all groups, if any."""
    places = torch.tensor(slot.places[channel], dtype=torch.long)
    axis = _axis(layer, given)
    if isinstance(layer, nn.Linear):
        return axis, places
    period = given.shape[axis] // layer.groups
    starts = torch.arange(layer.groups) * period
    return axis, (starts[:, None] + places).flatten()


def _axis(layer: Layer, tensor: Tensor) -> int:
    """The axis of channels of what a layer is given or makes."""
    return (
        tensor.dim() - 1 if isinstance(layer, nn.Linear) else tensor.dim() - layer.weight.dim() + 1
    )


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0:
        return True
    scale = torch.maximum(a.abs().max(), b.abs().max())
    return bool(torch.isfinite(scale)) and bool((a - b).abs().max() <= TOLERANCE * scale)


# -- the proof -------------------------------------------------------------------------------------


def _sealed(
    network: nn.Module, input_shape: tuple[int, ...], groups: Sequence[Group], readers: Readers
) -> Sequence[Group]:
    """The groups that only their makers make and only their readers read."""
    own = structure.given(network, structure.tensors(network)).double()
    if _is_sealed(own, input_shape, groups, readers):
        return groups
    return [group for group in groups if _is_sealed(own, input_shape, [group], readers)]


def _is_sealed(
    own: nn.Module, input_shape: tuple[int, ...], groups: Sequence[Group], readers: Readers
) -> bool:
    """Whether random channels that are not read change nothing, and not made are constant."""
    stream = seeds.stream(0, "compact")
    values = {
        name: tracing.drawn(tensor, stream) for name, tensor in structure.tensors(own).items()
    }
    some = {g.name: ~tracing.some(stream.random(g.size)) for g in groups}
    inputs = torch.from_numpy(stream.standard_normal((2, *input_shape)))
    unmade, unread, neither = dict(values), dict(values), dict(values)
    for group in groups:
        chosen = some[group.name].nonzero().flatten().tolist()
        for slot in _made(group):
            _zero(slot, chosen, unmade, neither)
        for slot in _slots(group, readers):
            _zero(slot, chosen, unread, neither)
    with seeds.isolated(0, "compact"), torch.no_grad():
        one, other = (functional_call(own, each, (inputs,)) for each in (unread, neither))
    if not _is_close(one, other):
        return False
    seen = _watched(own, unmade, input_shape, readers)
    return all(
        _is_constant(own, slot, channel, seen)
        for group in groups
        for slot in _slots(group, readers)
        for channel in some[group.name].nonzero().flatten().tolist()
    )


def _zero(slot: Slot, channels: Sequence[int], *several: Params) -> None:
    for tensors in several:
        zeroed = tensors[slot.tensor].index_fill(slot.axis, _places(slot, channels), 0)
        tensors[slot.tensor] = zeroed


def _is_constant(own: nn.Module, slot: Slot, channel: int, seen: Seen) -> bool:
    """Whether a layer is given the same of a channel for both inputs, each time it runs."""
    path = slot.tensor.rpartition(".")[0]
    layer = own.get_submodule(path)
    assert isinstance(layer, Layer)
    read = [given.index_select(*_positions(layer, slot, channel, given)) for given in seen[path]]
    return all(_is_close(each[:1], each[1:]) for each in read)
