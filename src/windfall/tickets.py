"""Tickets: the next mask of a chain, what its weights start from, and the proof of both.

A ticket is (params, masks) at the start of a run. Whatever is made here is proved before it is
trained: every surviving weight equals its source bit for bit, every other is 0, and the mask is
nested in its parent's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from windfall import masks as masking
from windfall import seeds, structure
from windfall.adjust import Removal
from windfall.criteria import Evidence
from windfall.evidence import Outset
from windfall.masks import Masks, Params
from windfall.models import Kind
from windfall.prune import Continue, LearningRate, ToStep
from windfall.runs import Pruned
from windfall.selection import uniform
from windfall.structure import Group
from windfall.train import State
from windfall.units import Weights
from windfall.weightnorm import multiplied


class BrokenTicket(AssertionError):
    """A ticket that is not what it says; the message names the tensor."""


@dataclass(frozen=True)
class Lineage:
    """What a pruned start is made from.

    Args:
        initial: theta_0, the chain's initial state.
        parent: theta_T, the parent's state at the end of its training.
        source: the state that the survivors start from: theta_k, theta_T or theta_0'.
        outset: the chain's network before its training; None where no criterion looks at it.
    """

    initial: State
    parent: State
    source: State
    outset: Outset | None = None


def found(start: Pruned, lineage: Lineage, kinds: dict[str, Kind], seed: int) -> Masks:
    """The masks that pruning the parent finds, nested in the parent's and of exact counts."""
    alive = lineage.parent.masks or masking.ones(lineage.parent.params, kinds)
    evidence = Evidence(
        multiplied(lineage.initial.params),
        multiplied(lineage.parent.params),
        seed,
        start.level,
        outset=lineage.outset,
    )
    return start.prune.masks(evidence, alive, kinds)


def arranged(start: Pruned, masks: Masks, seed: int) -> Masks:
    """The masks as found, or the control of the same counts that `start.arrange` names."""
    match start.arrange:
        case "found":
            return masks
        case "shuffled":
            return masking.shuffle(masks, seed)
        case "uniform":
            counts = uniform(masking.sizes(masks), sum(masking.kept(masks).values()))
            return masking.scatter(counts, masks, seed, "uniform")


def begin(start: Pruned, lineage: Lineage, kinds: dict[str, Kind], seed: int) -> State:
    """The proved state at the first step of a pruned run.

    Raises:
        SpecError: when pruning would empty a tensor.
        BrokenTicket: when the proof fails.
    """
    mask = found(start, lineage, kinds, seed)
    escaped = masking.escaped(mask, lineage.parent.masks) if lineage.parent.masks else []
    if escaped:
        raise BrokenTicket(f"the mask of `{escaped[0]}` is not nested in its parent's")
    mask = arranged(start, mask, seed)
    source = lineage.source.copy()
    state = State(0, masking.apply(mask, source.params), source.buffers, mask)
    if isinstance(start.weights, ToStep) and start.weights.optimizer == "restored":
        state.optimizer = {
            kind: masking.apply({n: m for n, m in mask.items() if _fits(tensors, n, m)}, tensors)
            for kind, tensors in source.optimizer.items()
        }
    prove(state, lineage.source)
    return state


@dataclass(frozen=True)
class Surroundings:
    """What is needed to remove channels, beside states.

    Args:
        network: the whole network; its values do not matter.
        groups: of it, all that channels or blocks can be removed from.
        inputs: gives so many inputs of the training part, as the network is given them.
        fresh: gives the state of the run's network newly initialized and then made smaller by a
            function; None where survivors keep values.
    """

    network: nn.Module
    groups: Sequence[Group]
    inputs: Callable[[int], Tensor]
    fresh: Callable[[Callable[[nn.Module], nn.Module]], State] | None = None


def begin_smaller(
    start: Pruned, lineage: Lineage, around: Surroundings, kinds: dict[str, Kind], seed: int
) -> State:
    """The proved state at the first step of a run whose network has lost channels.

    Raises:
        SpecError: when pruning would empty a layer, or the network is not fit for it.
        BrokenTicket: when the proof fails.
    """
    initial = lineage.initial.params | lineage.initial.buffers
    groups = around.groups
    before = lineage.parent.channels or {
        group.name: torch.ones(group.size, dtype=torch.bool) for group in groups
    }
    own = structure.restricted(groups, before, initial)
    channels = before | _chosen(start, lineage, around, (groups, own), before, kinds, seed)
    for name, stay in channels.items():
        if bool((stay & ~before[name]).any()) or not bool(stay.any()):
            raise BrokenTicket(f"the channels of `{name}` are none, or not among its parent's")
    local = {name: stay[before[name]] for name, stay in channels.items()}
    if around.fresh is not None:
        state = around.fresh(lambda whole: structure.newly(whole, groups, channels))
        return replace(state, channels=channels)
    source = lineage.source
    is_whole = not source.channels
    removed = (groups, channels) if is_whole else (own, local)
    state = _without(source, *removed)
    _prove_smaller(state, source, *removed)
    state.channels = channels
    if isinstance(start.weights, ToStep) and start.weights.optimizer == "reset":
        state.optimizer = {}
    if isinstance(start.weights, LearningRate | Continue):
        state.optimizer = {}
        if start.prune.adjust is not None:
            _adjust(start, lineage.parent, state, (own, local), around, seed)
    return state


def _chosen(
    start: Pruned,
    lineage: Lineage,
    around: Surroundings,
    groups: tuple[Sequence[Group], Sequence[Group]],
    before: Masks,
    kinds: dict[str, Kind],
    seed: int,
) -> Masks:
    """The channels that stay of the groups that may lose some, in the whole network's numbers."""
    assert not isinstance(start.prune.structure, Weights)
    whole, own = groups
    names = list(start.prune.structure.of(whole))
    parent = lineage.parent
    evidence = Evidence(
        lineage.initial.params,
        parent.params,
        seed,
        start.level,
        {group.name: group for group in own if group.name in names},
        lambda: structure.given(around.network, parent.params | parent.buffers),
        around.inputs,
    )
    scores = start.prune.criterion.score(evidence, names)
    spread = {
        name: torch.zeros(len(before[name]), dtype=scores[name].dtype).masked_scatter(
            before[name], scores[name]
        )
        for name in names
    }
    alive = {name: before[name] for name in names}
    return start.prune.selection.select(spread, alive, kinds, start.level)


def _without(source: State, groups: Sequence[Group], channels: Masks) -> State:
    """The state without the channels that do not stay, its moments too."""
    tensors = structure.shrunk(source.params | source.buffers, groups, channels)
    return State(
        0,
        {name: tensors[name] for name in source.params},
        {name: tensors[name] for name in source.buffers},
        optimizer={
            kind: structure.shrunk(moments, groups, channels)
            for kind, moments in source.optimizer.items()
        },
    )


def _prove_smaller(ticket: State, source: State, groups: Sequence[Group], channels: Masks) -> None:
    """Check that what stays equals its source bit for bit, found there by masks of its shape.

    Raises:
        BrokenTicket: naming the tensor.
    """
    origin, found = source.params | source.buffers, ticket.params | ticket.buffers
    masks = structure.masks(groups, channels, origin)
    for name, value in found.items():
        kept = origin[name][masks[name]] if name in masks else origin[name].flatten()
        if not torch.equal(_bits(value.flatten()), _bits(kept)):
            raise BrokenTicket(f"what stays of `{name}` differs from its source")
        if value.numel() and _place(value) == _place(origin[name]):
            raise BrokenTicket(f"`{name}` shares its storage with its source")


def _adjust(
    start: Pruned,
    parent: State,
    state: State,
    removed: tuple[Sequence[Group], Masks],
    around: Surroundings,
    seed: int,
) -> None:
    assert start.prune.adjust is not None
    whole, smaller = (
        structure.given(around.network, each.params | each.buffers) for each in (parent, state)
    )
    groups, channels = removed
    inputs = around.inputs(start.prune.adjust.num_images)
    stream = seeds.stream(seed, "adjust", start.level)
    start.prune.adjust.adjust(Removal(whole, smaller, groups, channels, inputs), stream)
    for name, param in smaller.named_parameters():
        state.params[name] = param.detach().clone()


def _fits(tensors: Params, name: str, mask: Tensor) -> bool:
    return name in tensors and tensors[name].shape == mask.shape


def prove(ticket: State, source: State) -> None:
    """Check that a ticket's survivors equal their source bit for bit and that the rest is 0.

    Buffers (normalization statistics) are the source's, and nothing shares its storage.

    Raises:
        BrokenTicket: naming the tensor and what is wrong with it.
    """
    origin = source.params | source.buffers
    for name, value in (ticket.params | ticket.buffers).items():
        mask = ticket.masks.get(name)
        alive = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
        if not torch.equal(_bits(value[alive]), _bits(origin[name][alive])):
            raise BrokenTicket(f"the surviving weights of `{name}` differ from their source")
        if bool((value[~alive] != 0).any()):
            raise BrokenTicket(f"a pruned weight of `{name}` is not 0")
        if value.numel() and _place(value) == _place(origin[name]):
            raise BrokenTicket(f"`{name}` shares its storage with its source")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
