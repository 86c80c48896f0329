"""Residual networks for small images: three stages of blocks that add to what they are given."""

from collections import OrderedDict

from torch import Tensor, nn

from windfall.models.gates import Gate
from windfall.models.norms import Norm, conv, normalization, only_batch
from windfall.models.sizes import BlockStages, Width, check_images, staged
from windfall.spec import Spec, later

_CHANNELS = (16, 32, 64)  # of the three stages


def _shortcut(channels: int, wide: int, stride: int, norm: Norm) -> nn.Module:
    if stride == 1:
        return nn.Identity()
    parts = {"conv": conv(channels, wide, norm, 1, stride), "norm": normalization(wide, norm)}
    return nn.Sequential(OrderedDict(parts))


class _Block(nn.Module):
    """relu(gate · norm(conv(relu(norm(conv(x))))) + shortcut(x)).

    Without batch normalization, gate · conv(relu(conv(x))) + shortcut(x).

    Args:
        channels: of the inputs.
        inner: between the convolutions.
        wide: of the outputs.
        stride: of the whole block.
        norm: what it normalizes by.
        is_gated: the branch is multiplied by a learned number.
    """

    def __init__(
        self, channels: int, inner: int, wide: int, stride: int, norm: Norm, *, is_gated: bool
    ) -> None:
        super().__init__()
        self.conv1 = conv(channels, inner, norm, stride=stride)
        self.norm1 = normalization(inner, norm)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(inner, wide, norm)
        self.norm2 = normalization(wide, norm)
        self.shortcut = _shortcut(channels, wide, stride, norm)
        self.relu2 = only_batch(nn.ReLU(), norm)
        self.gate = Gate() if is_gated else None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.gate is not None and self.gate.is_removed:
            return self.relu2(self.shortcut(inputs))
        hidden = self.relu1(self.norm1(self.conv1(inputs)))
        hidden = self.norm2(self.conv2(hidden))
        if self.gate is not None:
            hidden = self.gate(hidden)
        return self.relu2(hidden + self.shortcut(inputs))


def _stage(
    model: "Resnet_20 | Resnet_56 | Resnet_110", stage: int, channels: int, length: int
) -> tuple[nn.Module, int]:
    """A stage, and the number of channels it makes."""
    inner = staged(_CHANNELS[stage], model.width, model.stages, stage)
    wide = staged(_CHANNELS[stage], model.width, model.shared, stage)
    blocks: dict[str, nn.Module] = {}
    for index in range(1, length + 1):
        stride = 2 if stage > 0 and index == 1 else 1
        block = _Block(channels, inner, wide, stride, model.norm, is_gated=model.gates)
        blocks[f"block{index}"], channels = block, wide
    return nn.Sequential(OrderedDict(blocks)), wide


def _resnet(
    model: "Resnet_20 | Resnet_56 | Resnet_110",
    length: int,
    input_shape: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    check_images(model, input_shape, len(_CHANNELS) - 1)
    channels = staged(_CHANNELS[0], model.width, model.shared, 0)
    parts: dict[str, nn.Module] = {
        "conv1": conv(input_shape[0], channels, model.norm),
        "norm1": normalization(channels, model.norm),
        "relu1": only_batch(nn.ReLU(), model.norm),
    }
    for stage in range(len(_CHANNELS)):
        parts[f"stage{stage + 1}"], channels = _stage(model, stage, channels, length)
    parts["mean"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["output"] = nn.Linear(channels, num_classes)
    return nn.Sequential(OrderedDict(parts))


class Resnet_20(Spec):
    """A 3 x 3 convolution, and three stages of three blocks with 16, 32 and 64 channels.

    A block is two 3 x 3 convolutions, each normalized. The second and third stage begin with a
    stride of 2, which the shortcut takes by a normalized 1 x 1 convolution. One linear layer reads
    the mean over all positions. Of its 270,896 weights on CIFAR-10, 2,560 are the shortcuts'.

    Source: He et al. 2016 (1512.03385), section 4.2, with the shortcuts B of section 4.1;
    1803.03635, Fig. 2 and section 4, which calls it Resnet-18.

    Args:
        width: factor on all channels.
        gates: multiply each block's residual branch by a learned number (`models.Gate`).
        stages: three factors on each stage's channels inside its blocks, those between two
            convolutions, beside the width; None is 1 for all.
        shared: the same on the channels that a stage's blocks add to.
        norm: what it normalizes by. With `weight` or `none` every convolution has biases, and there
            is no ReLU behind the first one or a sum: a block is x + conv(relu(conv(x))), as in
            1906.02341.
    """

    width: Width = 1.0
    gates: bool = later(False, absent=False)
    stages: BlockStages = later(None, absent=None)
    shared: BlockStages = later(None, absent=None)
    norm: Norm = later("batch", absent="batch")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1`, `stage1.block1.conv1`, ..., `output`."""
        return _resnet(self, 3, input_shape, num_classes)


class Resnet_56(Spec):
    """`Resnet_20` with nine blocks in a stage; 851,504 weights.

    Source: He et al. 2016 (1512.03385), section 4.2, with the shortcuts B of section 4.1.
    """

    width: Width = 1.0
    gates: bool = later(False, absent=False)
    stages: BlockStages = later(None, absent=None)
    shared: BlockStages = later(None, absent=None)
    norm: Norm = later("batch", absent="batch")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1`, `stage1.block1.conv1`, ..., `output`."""
        return _resnet(self, 9, input_shape, num_classes)


class Resnet_110(Spec):
    """`Resnet_20` with 18 blocks in a stage; 1,722,416 weights.

    Source: He et al. 2016 (1512.03385), section 4.2, with the shortcuts B of section 4.1.
    """

    width: Width = 1.0
    gates: bool = later(False, absent=False)
    stages: BlockStages = later(None, absent=None)
    shared: BlockStages = later(None, absent=None)
    norm: Norm = later("batch", absent="batch")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1`, `stage1.block1.conv1`, ..., `output`."""
        return _resnet(self, 18, input_shape, num_classes)
