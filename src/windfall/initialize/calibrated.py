"""Schemes that look at data: a layer's scale follows from what it makes of a batch of inputs.

The layers of one forward pass are set in the order they run in, each on what those before it now
make. Linear layers and convolutions without a bias are linear in their weights, so what a layer
makes is scaled with its weight, and one pass is enough, in float64.
"""

import copy
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from windfall import seeds
from windfall.initialize.drawn import Drawn, KaimingNormal, Orthogonal, one_thread
from windfall.initialize.parts import Draws, Layer, Transposed, layers
from windfall.masks import Params
from windfall.spec import FAMILY, Spec, SpecError, tag
from windfall.weightnorm import WeightNormed


class Lsuv(Spec):
    """Layer-sequential unit variance: W <- W / std(W x), layer after layer, over all outputs.

    Source: Mishkin & Matas 2016 (1511.06422), algorithm 1.

    Note:
        Without biases one division is exact, so there is neither a tolerance nor a number of tries.

    Args:
        draws: what is scaled; the paper's is orthonormal.
    """

    draws: Drawn = Orthogonal()

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer, before it is scaled."""
        return self.draws.draw(layer, stream)

    def adjust(self, name: str, layer: Layer, made: Tensor) -> Tensor:
        """Give the layer's outputs a variance of 1, and return them.

        Args:
            name: of its weight.
            layer: whose weight is scaled in place.
            made: its outputs, of a bias of 0.

        Raises:
            SpecError: when the outputs are all equal.
        """
        deviation = made.std(correction=0)
        _check_varied(name, deviation)
        rescale(layer, (1 / deviation).expand(_num_made(layer)))
        return made / deviation


class DataDependent(Spec):
    """Every unit begins with mean 0 and variance 1: w = v / sigma, b = -mu / sigma.

    mu and sigma are a unit's mean and standard deviation of v x over the batch, and over positions.
    Of a weight-normalized layer that is g = 1 / sigma for directions of norm 1. The scale of the
    draws cancels.

    Source: Salimans & Kingma 2016 (1602.07868), section 3, eq. 5 and 6.

    Args:
        draws: v.
    """

    draws: Drawn = KaimingNormal()

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer, before it is scaled."""
        return self.draws.draw(layer, stream)

    def adjust(self, name: str, layer: Layer, made: Tensor) -> Tensor:
        """Give each of the layer's units a mean of 0 and a variance of 1, and return its outputs.

        Args:
            name: of its weight.
            layer: whose weight and bias are set in place.
            made: its outputs, of a bias of 0.

        Raises:
            SpecError: when the layer has no bias, or a unit's outputs are all equal.
        """
        if layer.bias is None:
            raise SpecError(
                "`initialization` data-dependent must be given layers with biases; got `"
                f"{name}`, of a {type(layer).__name__} without. Give it one, or take lsuv."
            )
        axis = made.dim() - (1 if isinstance(layer, nn.Linear) else layer.weight.dim() - 1)
        units = made.movedim(axis, -1)
        flat = units.flatten(0, -2)
        mean, deviation = flat.mean(0), flat.std(0, correction=0)
        _check_varied(name, deviation)
        rescale(layer, 1 / deviation)
        layer.bias.copy_(-mean / deviation)
        return ((units - mean) / deviation).movedim(-1, axis)


Calibrated = Annotated[Lsuv | DataDependent, FAMILY]


def _num_made(layer: Layer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _check_varied(name: str, deviation: Tensor) -> None:
    if not bool((deviation > 0).all()) or not bool(deviation.isfinite().all()):
        raise SpecError(
            "`initialization` must be given a batch of inputs on which every layer's outputs vary;"
            f" those of `{name}` do not. Give another or a larger batch, or take a scheme without"
            " data."
        )


def rescale(layer: Layer, scale: Tensor) -> None:
    """Multiply what each of a layer's units makes, by its weight, in place.

    Args:
        layer: linear or a convolution.
        scale: of each unit or channel made, [out].
    """
    if isinstance(layer, WeightNormed):
        layer.gain.mul_(scale)
    elif isinstance(layer, Transposed):  # its weight is [in, out / groups, ...]
        read, made, *kernel = layer.weight.shape
        grouped = layer.weight.view(layer.groups, read // layer.groups, made, *kernel)
        grouped.mul_(scale.view(layer.groups, 1, made, *(1 for _ in kernel)))
    else:
        layer.weight.mul_(scale.view(-1, *(1,) * (layer.weight.dim() - 1)))


def calibrate(
    module: nn.Module, begun: Params, inputs: Tensor, scheme: Lsuv | DataDependent, seed: int
) -> Params:
    """The tensors of layers, adjusted on a batch, each layer's the first time it runs.

    The pass is in training mode (batch normalization by the batch); what is random in it draws from
    a stream of its own.

    Args:
        module: the network; left as it is.
        begun: the layers' tensors by name, in float64, biases 0.
        inputs: [batch, *input_shape], as the network is trained on.
        scheme: that adjusts.
        seed: of the stream.

    Returns:
        What `begun` holds, adjusted.

    Raises:
        SpecError: when the network does not run on the inputs, or a layer never runs by itself.
    """
    own = copy.deepcopy(module).cpu().double().train()
    held = {**dict(own.named_parameters()), **dict(own.named_buffers())}
    given = inputs.cpu().double() if inputs.is_floating_point() else inputs.cpu()
    with torch.no_grad(), seeds.isolated(seed, "calibrate"), one_thread():
        for name, tensor in begun.items():
            held[name].copy_(tensor)
        unseen = _run(own, given, scheme)
    if unseen:
        raise SpecError(
            f"`initialization` {tag(type(scheme))} must be given a network whose layers all run as"
            f" modules on its inputs; `{unseen[0]}` does not. Take a scheme without data."
        )
    return {name: held[name].detach() for name in begun}


def _run(own: nn.Module, inputs: Tensor, scheme: Lsuv | DataDependent) -> list[str]:
    """Run the network, each layer adjusted as it runs; the weights of those that did not run."""
    waiting = {id(layer.weight): name for name, layer in layers(own) if layer.weight.numel()}

    def ran(part: nn.Module, _: Any, made: Tensor) -> Tensor:
        assert isinstance(part, Layer)
        name = waiting.pop(id(part.weight), None)
        return made if name is None else scheme.adjust(name, part, made)

    for part in own.modules():
        if isinstance(part, Layer):
            part.register_forward_hook(ran)
    try:
        own(inputs)
    except SpecError:
        raise
    except Exception as problem:
        raise SpecError(
            f"`initialization` {tag(type(scheme))} must be given a network that runs on its inputs"
            f" in float64; {type(own).__name__} raised {problem!r} on {tuple(inputs.shape)}."
        ) from problem
    return list(waiting.values())
