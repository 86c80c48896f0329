"""Residual blocks: where a network adds a branch to a shortcut, as its modules' names tell.

A block is a module that has a part named `shortcut` (or `downsample`, as torchvision's have): what
the branch is added to, `nn.Identity()` or None where that is the block's own inputs. All its other
layers are the branch, in the order they were registered in. A stage is the consecutive blocks of
one module, and begins anew with a shortcut that has layers of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from windfall.initialize.parts import layers
from windfall.spec import SpecError

_SHORTCUTS = ("shortcut", "downsample")


@dataclass(frozen=True)
class Block:
    """A residual block.

    Args:
        branch: the names of its branch's weights, in order.
        shortcut: of its shortcut's.
        num_blocks: B, of its stage, at least 1.
    """

    branch: tuple[str, ...]
    shortcut: tuple[str, ...]
    num_blocks: int


def blocks(module: nn.Module) -> list[Block]:
    """The residual blocks of a network whose branches have weights, in order.

    Of blocks inside each other, the outermost.
    """
    names = [name for name, layer in layers(module) if layer.weight.numel()]
    stages: list[list[tuple[tuple[str, ...], tuple[str, ...]]]] = []
    before = None
    for path, shortcut in _found(module):
        inside = [name for name in names if name.startswith(path)]
        beside = tuple(name for name in inside if name.startswith(shortcut))
        branch = tuple(name for name in inside if name not in beside)
        if not branch:
            continue
        around = path.rstrip(".").rpartition(".")[0]
        if around != before or beside:
            stages.append([])
        stages[-1].append((branch, beside))
        before = around
    return [Block(branch, beside, len(stage)) for stage in stages for branch, beside in stage]


def _found(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The prefixes of blocks and of their shortcuts."""
    last = None
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        named = next((name for name in _SHORTCUTS if hasattr(part, name)), None)
        if named is not None and (last is None or not prefix.startswith(last)):
            yield prefix, f"{prefix}{named}."
            last = prefix


def needed(module: nn.Module, scheme: str) -> list[Block]:
    """The residual blocks of a network that a scheme is defined for only if there are some.

    Raises:
        SpecError: when there is none.
    """
    found = blocks(module)
    if not found:
        raise SpecError(
            f"`initialization` {scheme} must be given a network with residual blocks; got none in"
            f" {type(module).__name__}. Name what a block's branch is added to `shortcut`"
            " (`nn.Identity()` for its inputs), or take another scheme."
        )
    return found
