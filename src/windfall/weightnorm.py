"""Weight normalization: layers whose filters have a direction, and a norm that is a parameter.

Both are what they are in torch, with `gain` g beside `weight` v: w_i = g_i v_i / |v_i| for every
filter i. They begin with g_i = |v_i|, so as the layer without it would. `weight` is v, so masks,
scores and initializations of weights are of v: a weight is pruned by a 0 in v, and w has the same.

Source: Salimans & Kingma 2016 (1602.07868), eq. 2.

    layer = WeightNormLinear(784, 300)
    effective(layer)  # w, [300, 784]
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norms(weight: Tensor) -> Tensor:
    """The L2 norms |v_i| of a weight's filters, [filter, ...] to [filter]; 1 of one that is 0.

    A filter of which nothing was kept gives w_i = 0, not 0/0.
    """
    squares = weight.flatten(1).square().sum(1)
    return torch.where(squares > 0, squares, 1.0).sqrt()


def effective(layer: "WeightNormed") -> Tensor:
    """The weight w = g v / |v| that the layer multiplies by, in the shape of v."""
    scale = layer.gain / norms(layer.weight)
    return layer.weight * scale.reshape(-1, *(1,) * (layer.weight.dim() - 1))


class WeightNormLinear(nn.Linear):
    """`nn.Linear` with normalized weights: x w^T + b."""

    gain: nn.Parameter

    def reset_parameters(self) -> None:
        """Begin as `nn.Linear` does, with its filters' norms as gains."""
        super().reset_parameters()
        self.gain = nn.Parameter(norms(self.weight.detach()))

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., out] of inputs [..., in]."""
        return F.linear(input, effective(self), self.bias)


class WeightNormConv2d(nn.Conv2d):
    """`nn.Conv2d` with normalized weights: x * w + b."""

    gain: nn.Parameter

    def reset_parameters(self) -> None:
        """Begin as `nn.Conv2d` does, with its filters' norms as gains."""
        super().reset_parameters()
        self.gain = nn.Parameter(norms(self.weight.detach()))

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [batch, out, ...] of inputs [batch, in, height, width]."""
        return self._conv_forward(input, effective(self), self.bias)


WeightNormed = WeightNormLinear | WeightNormConv2d
