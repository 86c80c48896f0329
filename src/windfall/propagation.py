"""Propagation: what deep ReLU networks of random weights do to the norms of signals.

    norms = propagate(1000, 10, inputs, "he", num_outputs=20, seed=0)
    abs(1 - norms.forward).mean()            # how far activations are from their inputs' norm
    bound(width=1000, depth=10, num_points=2000)

Source: Arpit & Bengio 2019 (1901.03611), with the set-up of its code.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from windfall import seeds

Scaling = Literal["he", "glorot"]
VARIANCES: dict[Scaling, float] = {"he": 2.0, "glorot": 1.0}  # times the layer's width


@dataclass(frozen=True)
class Norms:
    """Norms of signals, over those that they began from.

    Args:
        forward: |h_l| / |x| after every hidden layer l, [layer, point].
        backward: |h_{l-1}| |g_l| / (|x| |δ|), [layer, point]: the norm of layer l's weight gradient
            over the product of the input's and of the error at the last hidden layer, g_l and δ
            being gradients at pre-activations of layer l and of the last.
    """

    forward: Tensor
    backward: Tensor


def propagate(
    width: int, depth: int, inputs: Tensor, scaling: Scaling, num_outputs: int, seed: int
) -> Norms:
    """One network without biases, forward and backward through all points.

    Weights are N(0, 2 / width) for `he`, N(0, 1 / width) for `glorot`, whatever a layer reads; the
    output layer is N(0, 1). The loss is the cross-entropy of softmax with random targets, uniform
    draws divided by their sum.

    Args:
        width: m, of every hidden layer, at least 1.
        depth: L, hidden layers, at least 1.
        inputs: [point, dimension].
        scaling: of the weights.
        num_outputs: of the output layer, at least 1.
        seed: names the streams of weights and targets, at least 0.
    """
    weights, values, ratios = list[Tensor](), inputs, list[Tensor]()
    norms, size = inputs.norm(dim=1), inputs.shape[1]
    reads: list[Tensor] = []
    for layer in range(depth):
        std = math.sqrt(VARIANCES[scaling] / width)
        weights.append(_gaussian(seed, layer, (width, size), inputs, std))
        reads.append(values)
        values, size = (values @ weights[-1].t()).relu_(), width
        ratios.append(values.norm(dim=1) / norms)
    gradient = _error(values, num_outputs, seed)
    error, returned = gradient.norm(dim=1), list[Tensor]()
    for layer in reversed(range(depth)):
        returned.append(reads[layer].norm(dim=1) * gradient.norm(dim=1) / (norms * error))
        if layer:
            gradient = (gradient @ weights[layer]).mul_(reads[layer] > 0)
    return Norms(torch.stack(ratios), torch.stack(returned[::-1]))


def _error(values: Tensor, num_outputs: int, seed: int) -> Tensor:
    """δ: minus the loss's gradient at the last hidden pre-activations, [point, node]."""
    output = _gaussian(seed, -1, (num_outputs, values.shape[1]), values, 1.0)
    drawn = seeds.stream(seed, "targets").uniform(size=(len(values), num_outputs))
    targets = torch.from_numpy(drawn / drawn.sum(1, keepdims=True)).to(values)
    error = (values @ output.t()).softmax(1) - targets
    return (error @ output).mul_(values > 0)


def _gaussian(seed: int, layer: int, shape: tuple[int, int], like: Tensor, std: float) -> Tensor:
    stream = seeds.stream(seed, "propagation", layer + 1)
    drawn = stream.standard_normal(shape)
    return torch.from_numpy(drawn).mul_(std).to(like.dtype)


def bound(width: int, depth: int, num_points: int, failure: float = 0.05) -> float:
    """ε(m) = (1 + (4 / m) ln(4 N L / δ))^L - 1: how far norms may be, but for probability δ.

    Note:
        The formula is that of the code's comments. Mean deviations lie far below it; the worst
        point of a network passes it from widths of about 1,000 on, so it bounds no worst case.

    Args:
        width: m, at least 1.
        depth: L, at least 1.
        num_points: N, at least 1.
        failure: δ, in (0, 1).
    """
    return (1 + 4 / width * math.log(4 * num_points * depth / failure)) ** depth - 1


def needed_width(epsilon: float, depth: int, num_points: int, failure: float = 0.05) -> int:
    """The smallest width whose `bound` is at most epsilon.

    Args:
        epsilon: above 0.
        depth: L, at least 1.
        num_points: N, at least 1.
        failure: δ, in (0, 1).
    """
    per_layer = (1 + epsilon) ** (1 / depth) - 1
    return math.ceil(4 / per_layer * math.log(4 * num_points * depth / failure))


# -- residual networks -----------------------------------------------------------------------------

Gains = Literal["proposed", "one"]


def residual_growth(width: int, blocks: int, inputs: Tensor, gains: Gains, seed: int) -> Tensor:
    """|h_B| / |x| of every point after B residual blocks, [point]; inf where it overflows.

        h_{b+1} = h_b + W_2 relu(W_1 h_b),  rows of both of norm g, orthogonal

    With `proposed` gains g is sqrt(2) in the first layer of a block and sqrt(1/B) in the second;
    with `one` it is 1 in both.

    Source: Arpit et al. 2019 (1906.02341), its residual networks with weight normalization.

    Args:
        width: of every layer, the dimension of the inputs.
        blocks: B, at least 1.
        inputs: [point, width].
        gains: see above.
        seed: names the streams of weights, at least 0.
    """
    first, second = (math.sqrt(2), math.sqrt(1 / blocks)) if gains == "proposed" else (1.0, 1.0)
    values = inputs
    for block in range(blocks):
        inner = (values @ _orthogonal(seed, 2 * block, width, inputs).t()).relu_().mul_(first)
        values = values + second * (inner @ _orthogonal(seed, 2 * block + 1, width, inputs).t())
    return (values.norm(dim=1) / inputs.norm(dim=1)).nan_to_num(math.inf, math.inf)


def residual_theory(blocks: int, gains: Gains) -> float:
    """What residual_growth is about: (1 + 1/B)^(B/2), or (1 + 1/2)^(B/2) with gains of 1, as log10.

    Args:
        blocks: B, at least 1.
        gains: as `residual_growth`.
    """
    return blocks / 2 * math.log10(1 + (1 / blocks if gains == "proposed" else 1 / 2))


def _orthogonal(seed: int, layer: int, width: int, like: Tensor) -> Tensor:
    drawn = seeds.stream(seed, "residual-growth", layer).standard_normal((width, width))
    q, r = torch.linalg.qr(torch.from_numpy(drawn))
    return (q * r.diagonal().sign()).to(like.dtype)
