"""How weights begin: the family `Initialization` and the parameters it gives a network.

Each member but `TorchDefault` gives the layers their weights, and leaves the rest of the network
(normalization, embeddings, buffers) as its constructor made it. There are four kinds: `Drawn`, from
a weight's fans and a random stream; `Scaled`, drawn and then multiplied by what the place in the
network asks for; `WeightNorm`, for weight-normalized layers; and `Calibrated`, drawn and then
scaled by what layers make of a batch of inputs. A layer's draws depend on the seed, the stream and
the layer's place, not on any other layer's shape:

    build = lambda: nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))
    params, buffers = initial_parameters(build, GlorotNormal(), seed=0)
    fresh, _ = initial_parameters(build, GlorotNormal(), seed=0, stream="reinit")
    params, buffers = initial_parameters(build, Lsuv(), seed=0, inputs=lambda: batch)

In the order of reading, each importing only from those before it: `parts`; `drawn`; `residual`;
`scaled`; `calibrated`.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor, nn

from windfall import seeds
from windfall.initialize.calibrated import Calibrated, DataDependent, Lsuv, calibrate
from windfall.initialize.drawn import (
    DeltaOrthogonal,
    Drawn,
    GlorotNormal,
    GlorotUniform,
    KaimingNormal,
    KaimingUniform,
    LecunNormal,
    LecunUniform,
    Orthogonal,
)
from windfall.initialize.parts import Draws, Layer, Transposed, fans, layers
from windfall.initialize.residual import Block, blocks
from windfall.initialize.scaled import Fixup, Scaled, StageScaled, WeightNorm, powers
from windfall.masks import Params
from windfall.spec import FAMILY, Spec, SpecError, tag
from windfall.weightnorm import WeightNormed, norms


class TorchDefault(Spec):
    """The network as its constructor made it."""


Initialization = Annotated[Drawn | Scaled | WeightNorm | Calibrated | TorchDefault, FAMILY]


def initial_parameters(
    build: Callable[[], nn.Module],
    initialization: Initialization,
    seed: int,
    stream: str = "init",
    inputs: Callable[[], Tensor] | None = None,
) -> tuple[Params, Params]:
    """The parameters and buffers with which a network begins.

    The constructor runs with the global generators at the beginning of the named stream; each
    weight is then drawn from the stream's index that is the weight's place among the parameters,
    in float64 and rounded to the weight's dtype, and the biases of those layers are zero. Of a
    weight-normalized layer v is what was drawn, and g such that w is.

    Args:
        build: makes the network.
        initialization: how its weights are drawn.
        seed: the run's seed, at least 0.
        stream: `init` for θ_0, `reinit` for fresh weights of the same seed.
        inputs: makes a batch of inputs, [batch, *input_shape], as the network is trained on; called
            for the schemes that need one (`Calibrated`) alone.

    Returns:
        The named parameters and the named buffers, detached copies that share no storage.

    Raises:
        SpecError: when the scheme is not defined for the network, or needs inputs and gets none.
    """
    with seeds.isolated(seed, stream):
        module = build()
    params = {name: param.detach().clone() for name, param in module.named_parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    if isinstance(initialization, TorchDefault):
        return params, buffers
    begun = _begun(module, initialization, seed, stream)
    if isinstance(initialization, Lsuv | DataDependent):
        batch = _batch(initialization, inputs)
        begun = calibrate(module, begun, batch, initialization, seed)
    for name, tensor in begun.items():
        params[name].copy_(tensor)
    return params, buffers


def _batch(scheme: Lsuv | DataDependent, inputs: Callable[[], Tensor] | None) -> Tensor:
    if inputs is None:
        raise SpecError(
            f"`initialization` {tag(type(scheme))} must be given a batch of inputs, and there is"
            " none here. Take a scheme without data."
        )
    return inputs()


def _begun(module: nn.Module, scheme: Initialization, seed: int, stream: str) -> Params:
    """The tensors of the layers, in float64: weights and gains drawn and scaled, biases 0."""
    assert not isinstance(scheme, TorchDefault)
    scales = scheme.scales(module) if isinstance(scheme, Fixup | StageScaled) else {}
    gains = scheme.gains(module) if isinstance(scheme, WeightNorm) else {}
    place = {name: index for index, (name, _) in enumerate(module.named_parameters())}
    begun: Params = {}
    for name, layer in layers(module):
        path, scale = name.removesuffix("weight"), scales.get(name, 1.0)
        weight = torch.zeros(layer.weight.shape, dtype=torch.float64)
        if weight.numel():  # a removed block's have nothing to draw
            draws = scheme.draw(layer, seeds.stream(seed, stream, place[name]))
            weight = torch.from_numpy(draws)
        if isinstance(layer, WeightNormed):
            own = scale * norms(weight)
            begun[f"{path}gain"] = torch.full_like(own, gains[name]) if name in gains else own
        else:
            weight = scale * weight
        begun[name] = weight
        if layer.bias is not None and f"{path}bias" in place:
            begun[f"{path}bias"] = torch.zeros(layer.bias.shape, dtype=torch.float64)
    return begun


__all__ = [
    "Block",
    "Calibrated",
    "DataDependent",
    "DeltaOrthogonal",
    "Drawn",
    "Draws",
    "Fixup",
    "GlorotNormal",
    "GlorotUniform",
    "Initialization",
    "KaimingNormal",
    "KaimingUniform",
    "Layer",
    "LecunNormal",
    "LecunUniform",
    "Lsuv",
    "Orthogonal",
    "Scaled",
    "StageScaled",
    "TorchDefault",
    "Transposed",
    "WeightNorm",
    "blocks",
    "fans",
    "initial_parameters",
    "layers",
    "powers",
]
