"""Tickets: the next mask of a chain, what its weights start from, and the proof of both.

A ticket is (params, masks) at the start of a run. Whatever is made here is proved before it is
trained: every surviving weight equals its source bit for bit, every other is 0, and the mask is
nested in its parent's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from windfall import masks as masking
from windfall.criteria import Evidence
from windfall.masks import Masks, Params
from windfall.models import Kind
from windfall.prune import ToStep
from windfall.runs import Pruned
from windfall.selection import uniform
from windfall.train import State


class BrokenTicket(AssertionError):
    """A ticket that is not what it says; the message names the tensor."""


@dataclass(frozen=True)
class Lineage:
    """What a pruned start is made from.

    Args:
        initial: theta_0, the chain's initial state.
        parent: theta_T, the parent's state at the end of its training.
        source: the state that the survivors start from: theta_k, theta_T or theta_0'.
    """

    initial: State
    parent: State
    source: State


def found(start: Pruned, lineage: Lineage, kinds: dict[str, Kind], seed: int) -> Masks:
    """The masks that pruning the parent finds, nested in the parent's and of exact counts."""
    alive = lineage.parent.masks or masking.ones(lineage.parent.params, kinds)
    evidence = Evidence(lineage.initial.params, lineage.parent.params, seed, start.level)
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
