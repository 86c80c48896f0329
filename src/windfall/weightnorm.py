"""Weight normalization: layers whose filters have a direction, and a norm that is a parameter.

Both are what they are in torch, with `gain` g beside `weight` v: w_i = g_i v_i / |v_i| for every
filter i. They begin with g_i = |v_i|, so as the layer without it would. `weight` is v, so masks and
initializations of weights are of v: a weight is pruned by a 0 in v, and w has the same. Scores of
single weights are of w, for v has no scale that filters share.

Source: Salimans & Kingma 2016 (1602.07868), eq. 2.

    layer = WeightNormLinear(784, 300)
    effective(layer)  # w, [300, 784]
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from windfall.masks import Params


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


def multiplied(params: Params) -> Params:
    """The parameters with every v of a weight-normalized layer replaced by w, what inputs multiply.

    Args:
        params: by name; such a layer's are those that have a `gain` of one number a filter beside
            their `weight`.
    """
    return {name: _multiplied(params, name) for name in params}


def _multiplied(params: Params, name: str) -> Tensor:
    weight, gain = params[name], params.get(f"{name.removesuffix('weight')}gain")
    if not name.endswith("weight") or gain is None or gain.shape != weight.shape[:1]:
        return weight
    return weight * (gain / norms(weight)).reshape(-1, *(1,) * (weight.dim() - 1))


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
