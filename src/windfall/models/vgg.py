"""VGG with batch normalization, in the form for small images: one linear layer at the end."""

from collections import OrderedDict
from typing import ClassVar

from torch import nn

from windfall.models.norms import Norm, conv, normalization
from windfall.models.sizes import PoolStages, Width, check_images, staged
from windfall.spec import Spec, later

_CHANNELS = (64, 128, 256, 512, 512)  # of the five stages


def _vgg(
    model: "Vgg_11 | Vgg_13 | Vgg_16 | Vgg_19",
    input_shape: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    check_images(model, input_shape, len(_CHANNELS) - 1)
    channels, index = input_shape[0], 0
    parts: dict[str, nn.Module] = {}
    for stage, (length, size) in enumerate(zip(model.lengths, _CHANNELS, strict=True)):
        if stage > 0:
            parts[f"pool{stage}"] = nn.MaxPool2d(2)
        wide = staged(size, model.width, model.stages, stage)
        for _ in range(length):
            index += 1
            parts[f"conv{index}"] = conv(channels, wide, model.norm)
            parts[f"norm{index}"] = normalization(wide, model.norm)
            parts[f"relu{index}"] = nn.ReLU()
            channels = wide
    parts["mean"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["output"] = nn.Linear(channels, num_classes)
    return nn.Sequential(OrderedDict(parts))


class Vgg_11(Spec):
    """Eight 3 x 3 convolutions in five stages of 64, 128, 256, 512 and 512 channels, and a mean.

    Every convolution is normalized, 2 x 2 max-pools stand between the stages, and one linear layer
    reads the mean over all positions: 9,222,848 weights on CIFAR-10.

    Source: Simonyan & Zisserman 2015 (1409.1556), Table 1, column A, its convolutions; the rest as
    of `Vgg_19`.

    Args:
        width: factor on all channels.
        stages: five factors on each stage's channels beside it; None is 1 for all.
        norm: what it normalizes by. With `weight` or `none` every convolution has biases.
    """

    lengths: ClassVar[tuple[int, ...]] = (1, 1, 2, 2, 2)  # convolutions of each stage
    width: Width = 1.0
    stages: PoolStages = later(None, absent=None)
    norm: Norm = later("batch", absent="batch")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1` to `conv8`, `output`."""
        return _vgg(self, input_shape, num_classes)


class Vgg_13(Spec):
    """`Vgg_11` with two convolutions in every stage; 9,407,168 weights.

    Source: Simonyan & Zisserman 2015 (1409.1556), Table 1, column B, as `Vgg_11`.
    """

    lengths: ClassVar[tuple[int, ...]] = (2, 2, 2, 2, 2)  # convolutions of each stage
    width: Width = 1.0
    stages: PoolStages = later(None, absent=None)
    norm: Norm = later("batch", absent="batch")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1` to `conv10`, `output`."""
        return _vgg(self, input_shape, num_classes)


class Vgg_16(Spec):
    """`Vgg_13` with three convolutions in the last three stages; 14,715,584 weights.

    Source: Simonyan & Zisserman 2015 (1409.1556), Table 1, column D, as `Vgg_11`.
    """

    lengths: ClassVar[tuple[int, ...]] = (2, 2, 3, 3, 3)  # convolutions of each stage
    width: Width = 1.0
    stages: PoolStages = later(None, absent=None)
    norm: Norm = later("batch", absent="batch")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1` to `conv13`, `output`."""
        return _vgg(self, input_shape, num_classes)


class Vgg_19(Spec):
    """`Vgg_13` with four convolutions in the last three stages; 20,024,000 weights.

    Source: 1803.03635, Fig. 2 and section 4; Simonyan & Zisserman 2015 (1409.1556), Table 1,
    column E, its convolutions.
    """

    lengths: ClassVar[tuple[int, ...]] = (2, 2, 4, 4, 4)  # convolutions of each stage
    width: Width = 1.0
    stages: PoolStages = later(None, absent=None)
    norm: Norm = later("batch", absent="batch")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1` to `conv16`, `output`."""
        return _vgg(self, input_shape, num_classes)
