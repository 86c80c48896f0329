"""Units: what is removed of a network, one by one.

A member but `Weights` finds a network's groups, and says which of them may lose something.

    Channels(exclude=("conv1.weight",)).of(tracing.trace(network, (3, 32, 32)))
"""

import fnmatch
from collections.abc import Iterable
from typing import Annotated

from torch import nn

from windfall import tracing
from windfall.spec import FAMILY, Spec, SpecError, nearest
from windfall.structure import Group


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

    def groups(self, module: nn.Module, input_shape: tuple[int, ...]) -> tuple[Group, ...]:
        """All groups of channels of a network, as `tracing.trace` finds them."""
        return tracing.trace(module, input_shape)

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


class Blocks(Spec):
    """Whole residual blocks that have a gate (`models.Gate`): of each only its shortcut is left.

    Source: Huang & Wang 2018 (1707.01213), section 3.2 (Sparse Structure Selection).
    """

    def groups(self, module: nn.Module, input_shape: tuple[int, ...]) -> tuple[Group, ...]:
        """The network's blocks, as `tracing.gated` finds them: one group."""
        return tracing.gated(module, input_shape)

    def of(self, groups: Iterable[Group]) -> dict[str, Group]:
        """The groups that may lose blocks, by name."""
        return {group.name: group for group in groups}


Structure = Annotated[Weights | Channels | Blocks, FAMILY]
