"""DenseNets for small images: every layer is given the channels of all before it in its block."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from windfall.models.sizes import BlockStages, Width, check_images, scaled, staged
from windfall.spec import Spec, later

_BLOCKS = 3
_GROWTH = 12  # channels that a layer adds
_BOTTLENECK = 4  # times the growth: what a bottleneck's 1 x 1 convolution makes


class _Layer(nn.Module):
    """What it is given, and beside it the channels that its convolutions make of it.

    Args:
        channels: of the inputs.
        growth: channels added.
        has_bottleneck: a 1 x 1 convolution comes before the 3 x 3 one.
    """

    def __init__(self, channels: int, growth: int, *, has_bottleneck: bool) -> None:
        super().__init__()
        narrow = _BOTTLENECK * growth
        parts: dict[str, nn.Module] = {"norm1": nn.BatchNorm2d(channels), "relu1": nn.ReLU()}
        if has_bottleneck:
            parts["conv1"] = nn.Conv2d(channels, narrow, 1, bias=False)
            parts["norm2"], parts["relu2"] = nn.BatchNorm2d(narrow), nn.ReLU()
            parts["conv2"] = nn.Conv2d(narrow, growth, 3, padding=1, bias=False)
        else:
            parts["conv1"] = nn.Conv2d(channels, growth, 3, padding=1, bias=False)
        self.branch = nn.Sequential(OrderedDict(parts))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([inputs, self.branch(inputs)], dim=1)


def _transition(channels: int, made: int) -> nn.Module:
    parts = {
        "norm": nn.BatchNorm2d(channels),
        "relu": nn.ReLU(),
        "conv": nn.Conv2d(channels, made, 1, bias=False),
        "pool": nn.AvgPool2d(2),
    }
    return nn.Sequential(OrderedDict(parts))


def _densenet(
    model: "Densenet_40 | Densenet_BC_100", input_shape: tuple[int, ...], num_classes: int
) -> nn.Module:
    check_images(model, input_shape, _BLOCKS - 1)
    is_bc, growth = isinstance(model, Densenet_BC_100), scaled(_GROWTH, model.width)
    num_layers = 16 if is_bc else 12
    channels = 2 * growth if is_bc else scaled(16, model.width)
    parts: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=False)
    }
    for block in range(1, _BLOCKS + 1):
        growth = staged(_GROWTH, model.width, model.stages, block - 1)
        grown: dict[str, nn.Module] = {}
        for index in range(1, num_layers + 1):
            grown[f"layer{index}"] = _Layer(channels, growth, has_bottleneck=is_bc)
            channels += growth
        parts[f"block{block}"] = nn.Sequential(OrderedDict(grown))
        if block < _BLOCKS:
            made = channels // 2 if is_bc else channels
            parts[f"transition{block}"] = _transition(channels, made)
            channels = made
    parts["norm"], parts["relu"] = nn.BatchNorm2d(channels), nn.ReLU()
    parts["mean"], parts["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    parts["output"] = nn.Linear(channels, num_classes)
    return nn.Sequential(OrderedDict(parts))


class Densenet_40(Spec):
    """A 3 x 3 convolution of 16 channels, and three blocks of twelve layers that add 12 each.

    Between the blocks stand a 1 x 1 convolution that keeps the number of channels and a 2 x 2 mean.

    Source: Huang et al. 2017 (1608.06993), section 3 and Table 2 (L = 40, k = 12).

    Args:
        width: factor on all channels.
        stages: three factors on the channels that each block's layers add, beside the width; None
            is 1 for all. The first convolution stays as it is; what stands between two blocks
            follows from what the block before gives.
    """

    width: Width = 1.0
    stages: BlockStages = later(None, absent=None)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1`, `block1.layer1.branch.conv1`, ..., `output`."""
        return _densenet(self, input_shape, num_classes)


class Densenet_BC_100(Spec):
    """`Densenet_40` with bottlenecks, sixteen layers in a block, and half the channels between.

    Every 3 x 3 convolution reads 48 channels, which a 1 x 1 convolution makes; the first
    convolution has 24.

    Source: Huang et al. 2017 (1608.06993), section 3 and Table 2 (L = 100, k = 12).
    """

    width: Width = 1.0
    stages: BlockStages = later(None, absent=None)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1`, `block1.layer1.branch.conv1`, ..., `output`."""
        return _densenet(self, input_shape, num_classes)
