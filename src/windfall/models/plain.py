"""Networks without batch normalization: fully connected ones, and the small ones on CIFAR-10."""

import math
from collections import OrderedDict

from pydantic import PositiveInt
from torch import nn

from windfall.models.norms import Norm, PlainNorm, conv, linear
from windfall.models.sizes import Width, check_images, scaled
from windfall.spec import Spec, later


def _head(
    num_features: int, hidden: tuple[int, ...], width: float, num_classes: int, norm: Norm
) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for index, size in enumerate(hidden, start=1):
        wide = scaled(size, width)
        parts[f"hidden{index}"] = linear(num_features, wide, norm)
        parts[f"hidden{index}_relu"] = nn.ReLU()
        num_features = wide
    return parts | {"output": nn.Linear(num_features, num_classes)}


def _conv(
    model: "Conv_2 | Conv_4 | Conv_6",
    stages: tuple[int, ...],
    input_shape: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    check_images(model, input_shape, len(stages))
    channels, rows, columns = input_shape
    parts: dict[str, nn.Module] = {}
    for stage, size in enumerate(stages, start=1):
        for index in (2 * stage - 1, 2 * stage):
            wide = scaled(size, model.width)
            parts[f"conv{index}"] = conv(channels, wide, model.norm)
            parts[f"conv{index}_relu"] = nn.ReLU()
            channels = wide
        parts[f"pool{stage}"] = nn.MaxPool2d(2)
        rows, columns = rows // 2, columns // 2
    head = _head(channels * rows * columns, (256, 256), model.width, num_classes, model.norm)
    return nn.Sequential(OrderedDict(parts | head))


class Mlp(Spec):
    """A fully connected ReLU network on flattened inputs.

    Args:
        hidden: the sizes of the hidden layers, each at least 1; none for a linear classifier.
        width: factor on their sizes.
        norm: what they, but for the output, normalize by.
        repeat: how often these layers stand behind each other: `hidden=(64,), repeat=100` has a
            hundred.
    """

    hidden: tuple[PositiveInt, ...] = (100, 50)
    width: Width = 1.0
    norm: PlainNorm = later("none", absent="none")
    repeat: PositiveInt = later(1, absent=1)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `hidden1`, ..., `output`."""
        hidden = self.hidden * self.repeat
        parts = _head(math.prod(input_shape), hidden, self.width, num_classes, self.norm)
        return nn.Sequential(OrderedDict(parts))


class Lenet_300_100(Spec):
    """Hidden layers of 300 and 100; 266,200 weights on MNIST. Source: 1803.03635, Fig. 2."""

    width: Width = 1.0
    norm: PlainNorm = later("none", absent="none")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `hidden1`, `hidden2`, `output`."""
        whole = Mlp(hidden=(300, 100), width=self.width, norm=self.norm)
        return whole.build(input_shape, num_classes)


class Conv_2(Spec):
    """Two 3 x 3 convolutions of 64 channels, a 2 x 2 max-pool, hidden layers of 256 and 256.

    It has 4,300,992 weights on CIFAR-10. Source: 1803.03635, Fig. 2.
    """

    width: Width = 1.0
    norm: PlainNorm = later("none", absent="none")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1`, `conv2`, `hidden1`, `hidden2`, `output`."""
        return _conv(self, (64,), input_shape, num_classes)


class Conv_4(Spec):
    """`Conv_2` with two more convolutions, of 128 channels, and a max-pool; 2,425,024 weights.

    Source: 1803.03635, Fig. 2.
    """

    width: Width = 1.0
    norm: PlainNorm = later("none", absent="none")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1` to `conv4`, `hidden1`, `hidden2`, `output`."""
        return _conv(self, (64, 128), input_shape, num_classes)


class Conv_6(Spec):
    """`Conv_4` with two more convolutions, of 256 channels, and a max-pool; 2,261,184 weights.

    Source: 1803.03635, Fig. 2, whose printed 1.7M weights do not fit its description.
    """

    width: Width = 1.0
    norm: PlainNorm = later("none", absent="none")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1` to `conv6`, `hidden1`, `hidden2`, `output`."""
        return _conv(self, (64, 128, 256), input_shape, num_classes)
