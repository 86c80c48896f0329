"""What a network of the zoo normalizes by: its batch, its weights, or nothing."""

from typing import Literal

from torch import nn

from windfall.weightnorm import WeightNormConv2d, WeightNormLinear

Norm = Literal["batch", "weight", "none"]
PlainNorm = Literal["none", "weight"]  # of networks that never had batch normalization


def linear(given: int, made: int, norm: Norm) -> nn.Linear:
    """A linear layer; by its weights, a weight-normalized one."""
    return WeightNormLinear(given, made) if norm == "weight" else nn.Linear(given, made)


def conv(given: int, made: int, norm: Norm, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size of images at a stride of 1.

    It has biases where no batch normalization subtracts them again.
    """
    layer = WeightNormConv2d if norm == "weight" else nn.Conv2d
    return layer(given, made, kernel, stride, padding=kernel // 2, bias=norm != "batch")


def normalization(channels: int, norm: Norm) -> nn.Module:
    """What stands behind a convolution."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def only_batch(part: nn.Module, norm: Norm) -> nn.Module:
    """A part that a residual network has with batch normalization alone."""
    return part if norm == "batch" else nn.Identity()
