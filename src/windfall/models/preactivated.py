"""Residual networks that normalize before they convolve: nothing stands on the path that adds."""

from collections import OrderedDict

from pydantic import PositiveInt
from torch import Tensor, nn

from windfall.models.gates import Gate
from windfall.models.norms import Norm, conv, normalization, only_batch
from windfall.models.sizes import BlockStages, Width, check_images, scaled, staged
from windfall.spec import Spec, later

_CHANNELS = (16, 32, 64)  # of the three stages
_BLOCKS = 18  # in a stage
_EXPANSION = 4  # a bottleneck gives so many times the channels of its 3 x 3 convolution


class _Block(nn.Module):
    """Every convolution on relu(norm(.)) of what comes before it, gated; and the shortcut added.

    Without batch normalization, the first convolution on the inputs and the others on relu(.).

    Args:
        channels: of the inputs.
        convs: of the residual branch, in order.
        stride: of the whole block.
        norm: what it normalizes by.
        has_conv: the shortcut is a 1 x 1 convolution.
        is_gated: the branch is multiplied by a learned number.
    """

    def __init__(
        self,
        channels: int,
        convs: list[nn.Conv2d],
        stride: int,
        norm: Norm,
        *,
        has_conv: bool,
        is_gated: bool,
    ) -> None:
        super().__init__()
        for index, layer in enumerate(convs, start=1):
            relu = only_batch(nn.ReLU(), norm) if index == 1 else nn.ReLU()
            self.add_module(f"norm{index}", normalization(layer.in_channels, norm))
            self.add_module(f"relu{index}", relu)
            self.add_module(f"conv{index}", layer)
        self.num_convs = len(convs)
        self.shortcut: nn.Module = nn.Identity()
        if has_conv:
            layer = conv(channels, convs[-1].out_channels, norm, 1, stride)
            self.shortcut = nn.Sequential(OrderedDict(conv=layer))
        self.gate = Gate() if is_gated else None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.gate is not None and self.gate.is_removed:
            return self.shortcut(inputs)
        hidden = inputs
        for index in range(1, self.num_convs + 1):
            for part in ("norm", "relu", "conv"):
                hidden = self.get_submodule(f"{part}{index}")(hidden)
        if self.gate is not None:
            hidden = self.gate(hidden)
        return hidden + self.shortcut(inputs)


def _basic(channels: int, inner: int, made: int, stride: int, norm: Norm) -> list[nn.Conv2d]:
    return [conv(channels, inner, norm, stride=stride), conv(inner, made, norm)]


def _bottleneck(channels: int, inner: int, made: int, stride: int, norm: Norm) -> list[nn.Conv2d]:
    return [
        conv(channels, inner, norm, 1),
        conv(inner, inner, norm, stride=stride),
        conv(inner, made, norm, 1),
    ]


def _preresnet(
    model: "Preresnet_110 | Preresnet_164",
    input_shape: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    check_images(model, input_shape, len(_CHANNELS) - 1)
    is_deep = isinstance(model, Preresnet_164)
    blocks_each = _BLOCKS if is_deep else model.blocks
    convs, times = (_bottleneck, _EXPANSION) if is_deep else (_basic, 1)
    sizes = [times * scaled(size, model.width) for size in _CHANNELS]  # that blocks add to
    made = [staged(size, 1.0, model.shared, stage) for stage, size in enumerate(sizes)]
    channels = scaled(_CHANNELS[0], model.width) if is_deep else made[0]
    parts: dict[str, nn.Module] = {"conv1": conv(input_shape[0], channels, model.norm)}
    for stage, size in enumerate(_CHANNELS):
        inner = staged(size, model.width, model.stages, stage)
        blocks: dict[str, nn.Module] = {}
        for index in range(1, blocks_each + 1):
            stride = 2 if stage > 0 and index == 1 else 1
            layers = convs(channels, inner, made[stage], stride, model.norm)
            has_conv = index == 1 and (stage > 0 or is_deep)
            blocks[f"block{index}"] = _Block(
                channels, layers, stride, model.norm, has_conv=has_conv, is_gated=model.gates
            )
            channels = made[stage]
        parts[f"stage{stage + 1}"] = nn.Sequential(OrderedDict(blocks))
    parts["norm"] = normalization(channels, model.norm)
    parts["relu"] = only_batch(nn.ReLU(), model.norm)
    parts["mean"], parts["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    parts["output"] = nn.Linear(channels, num_classes)
    return nn.Sequential(OrderedDict(parts))


class Preresnet_110(Spec):
    """A 3 x 3 convolution, and three stages of 18 blocks of two 3 x 3 convolutions.

    The stages have 16, 32 and 64 channels; the second and third begin with a stride of 2, which the
    shortcut takes by a 1 x 1 convolution. 1,722,416 weights on CIFAR-10.

    Source: He et al. 2016 (1603.05027), section 3 and Fig. 4(e).

    Args:
        width: factor on all channels.
        gates: multiply each block's residual branch by a learned number (`models.Gate`).
        stages: three factors on each stage's channels inside its blocks, those between
            convolutions, beside the width; None is 1 for all.
        shared: the same on the channels that a stage's blocks add to.
        norm: what it normalizes by. With `weight` or `none` every convolution has biases, and ReLU
            stands between the convolutions of a block alone: x + conv(relu(conv(x))), as in
            1906.02341.
        blocks: of each stage. Six layers a block and two: 18 make 110, 1,666 about ten thousand.
    """

    width: Width = 1.0
    gates: bool = later(False, absent=False)
    stages: BlockStages = later(None, absent=None)
    shared: BlockStages = later(None, absent=None)
    norm: Norm = later("batch", absent="batch")
    blocks: PositiveInt = later(_BLOCKS, absent=_BLOCKS)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1`, `stage1.block1.conv1`, ..., `output`."""
        return _preresnet(self, input_shape, num_classes)


class Preresnet_164(Spec):
    """`Preresnet_110` with bottlenecks: 1 x 1, 3 x 3 and 1 x 1 to four times the channels.

    Source: He et al. 2016 (1603.05027), section 3 and Fig. 4(e).
    """

    width: Width = 1.0
    gates: bool = later(False, absent=False)
    stages: BlockStages = later(None, absent=None)
    shared: BlockStages = later(None, absent=None)
    norm: Norm = later("batch", absent="batch")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1`, `stage1.block1.conv1`, ..., `output`."""
        return _preresnet(self, input_shape, num_classes)
