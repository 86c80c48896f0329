"""What a network costs: multiply-adds of its forward pass, dense or masked, and of its training.

The convention: one multiply-add is 2 FLOPs; a training step costs three forward passes (the
backward pass computes a gradient for the inputs and one for the weights, each as dear as the
forward pass). Only the weights of linear layers and convolutions are counted: no biases,
normalization, activations or optimizer.

    dense = multiply_adds(module, (3, 32, 32))
    kept = masked_multiply_adds(dense, masks)
    training_flops(sum(kept.values()), batch_size=60, num_steps=20_000)
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from windfall import initialize, models


def multiply_adds(module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """The multiply-adds of one input's forward pass, for every weight that can be pruned.

    A weight entry is used once for each position at which its layer is applied: a linear layer's
    once (or once per token), a convolution's once per output position, padding included, a
    transposed convolution's once per input position; again each time the layer is run.

    Args:
        module: the network.
        input_shape: the shape of one input.

    Returns:
        Exact counts by weight name, in the order of the parameters; 0 for a layer that never runs.

    Example:
        >>> multiply_adds(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), (3, 32, 32))
        {'0.weight': 221184}
    """
    counts = {name: 0 for name, _ in initialize.layers(module)}

    def count(name: str, layer: initialize.Layer, given: Tensor, made: Tensor) -> None:
        counts[name] += layer.weight.numel() * _positions(layer, given, made)

    models.observe(module, input_shape, count, batch_size=1)
    return counts


def _positions(layer: initialize.Layer, given: Tensor, made: Tensor) -> int:
    if isinstance(layer, nn.Linear):
        return made.numel() // layer.out_features
    if isinstance(layer, initialize.Transposed):
        return given.numel() // layer.in_channels
    return made.numel() // layer.out_channels


def masked_multiply_adds(dense: Mapping[str, int], masks: Mapping[str, Tensor]) -> dict[str, int]:
    """The multiply-adds that are left when only the kept weights are used.

    Every entry of a weight is used equally often, so what is left of its count is the share that
    is kept; the division is exact.

    Args:
        dense: as `multiply_adds` counts them.
        masks: by weight name, nonzero where a weight is kept; a weight without one stays dense.

    Raises:
        ValueError: when a mask is of no weight of the network, or of another shape's size.
    """
    for name, mask in masks.items():
        if name not in dense:
            raise ValueError(f"masks must be of the network's weights; `{name}` is none of them.")
        if dense[name] % mask.numel() if mask.numel() else dense[name]:
            raise ValueError(
                f"the mask of `{name}` must have its shape; got {list(mask.shape)}, whose size "
                f"does not divide {dense[name]} multiply-adds."
            )
    kept = {name: int(torch.count_nonzero(mask)) for name, mask in masks.items()}
    return {
        name: count // max(1, masks[name].numel()) * kept[name] if name in kept else count
        for name, count in dense.items()
    }


def training_flops(macs_per_sample: int, batch_size: int, num_steps: int) -> int:
    """The cost of a training, 2 · 3 · macs · batch · steps.

    One multiply-add is 2 FLOPs; the backward pass costs twice the forward pass.

    Args:
        macs_per_sample: multiply-adds of one input's forward pass, at least 0.
        batch_size: inputs of a step, at least 1.
        num_steps: optimizer updates, at least 0.

    Returns:
        FLOPs.
    """
    for name, value, least in (
        ("macs_per_sample", macs_per_sample, 0),
        ("batch_size", batch_size, 1),
        ("num_steps", num_steps, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}; got {value}.")
    return 2 * 3 * macs_per_sample * batch_size * num_steps
