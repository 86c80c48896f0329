"""Stages: the layers of a network that see images of one size, and the channels that they make.

stage(Vgg_16(), "conv3.weight") == 1
shared_stage(Resnet_56(), "stage2.block1.conv2.weight") == 1  # of the channels that blocks add to

Stages count from 0. Networks of the zoo that have stages take a factor for each (`stages`, and
`shared` in residual networks).
"""

import re

from windfall.models.dense import Densenet_40, Densenet_BC_100
from windfall.models.preactivated import Preresnet_110, Preresnet_164
from windfall.models.residual import Resnet_20, Resnet_56, Resnet_110
from windfall.models.vgg import Vgg_11, Vgg_13, Vgg_16, Vgg_19

Pooled = Vgg_11 | Vgg_13 | Vgg_16 | Vgg_19
Residual = Resnet_20 | Resnet_56 | Resnet_110 | Preresnet_110 | Preresnet_164
Grown = Densenet_40 | Densenet_BC_100
Staged = Pooled | Residual | Grown


def num_stages(model: Staged) -> int:
    """The number of stages."""
    return len(model.lengths) if isinstance(model, Pooled) else 3


def stage(model: Staged, weight: str) -> int | None:
    """The stage that a layer is in, by its weight's name; None outside (a first layer, the output).

    Of a DenseNet, what stands between two blocks is outside.
    """
    if isinstance(model, Pooled):
        found = re.fullmatch(r"conv(\d+)\.weight", weight)
        number = int(found[1]) if found else 0
        ends = [sum(model.lengths[: index + 1]) for index in range(len(model.lengths))]
        return next((s for s, end in enumerate(ends) if number <= end), None) if number else None
    found = re.match(r"(?:stage|block)(\d)\.", weight)
    return int(found[1]) - 1 if found else None


def shared_stage(model: Staged, group: str) -> int | None:
    """The stage whose blocks add to a group of channels, by the group's name; None if none do.

    The first convolution of a residual network makes channels of its first stage, but for
    bottlenecks, which widen them first.
    """
    if not isinstance(model, Residual):
        return None
    if group == "conv1.weight":
        return None if isinstance(model, Preresnet_164) else 0
    last = 3 if isinstance(model, Preresnet_164) else 2
    found = re.fullmatch(rf"stage(\d)\.block\d+\.(?:conv{last}|shortcut\.conv)\.weight", group)
    return int(found[1]) - 1 if found else None


def inner_stage(model: Staged, group: str) -> int | None:
    """The stage that makes a group of channels for itself: all but the ones that blocks add to."""
    return stage(model, group) if shared_stage(model, group) is None else None
