"""How weights begin: the family `Initialization` and the parameters it gives a network.

Each member but `TorchDefault` maps a weight's fans and a random stream to the weight, and leaves
the rest of the network (normalization, embeddings, buffers) as its constructor made it. A layer's
draws depend on the seed, the stream and the layer's place, not on any other layer's shape:

    build = lambda: nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))
    params, buffers = initial_parameters(build, GlorotNormal(), seed=0)
    fresh, _ = initial_parameters(build, GlorotNormal(), seed=0, stream="reinit")
"""

import math
from collections.abc import Callable, Iterator
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from windfall import seeds
from windfall.masks import Params
from windfall.spec import FAMILY, Spec

Draws = npt.NDArray[np.float64]
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | Transposed


def layers(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers whose weights can be pruned, by the names of their weights, in order.

    These are `nn.Linear` and the convolutions. A weight that several layers share is named once,
    by its first owner; one that is shared with another kind of module (an embedding) or is computed
    from other parameters (weight norm) is not among them.
    """
    owners = [child for child in module.modules() if not isinstance(child, Layer)]
    shared = {id(param) for child in owners for param in child.parameters(recurse=False)}
    named = {id(param): name for name, param in module.named_parameters()}
    for path, child in module.named_modules():
        name = f"{path}.weight" if path else "weight"
        if not isinstance(child, Layer) or id(child.weight) in shared:
            continue
        if named.get(id(child.weight)) == name:
            yield name, child


def fans(layer: Layer) -> tuple[int, int]:
    """How many inputs an output of the layer reads, and how many outputs an input reaches.

    A convolution with a kernel of k x k counts k² positions for every channel, and only the
    channels of one group.

    Note:
        `torch.nn.init` reads the same numbers off the weight's shape, which counts all groups'
        outputs and takes a transposed convolution's inputs for outputs.

    Returns:
        (fan_in, fan_out).
    """
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        return weight.shape[1], weight.shape[0]
    kernel = math.prod(weight.shape[2:])
    fan_in = layer.in_channels // layer.groups * kernel
    return fan_in, layer.out_channels // layer.groups * kernel


class GlorotNormal(Spec):
    """Gaussian weights, not truncated, of standard deviation sqrt(2 / (fan_in + fan_out)).

    Source: Glorot & Bengio 2010, eq. 12 (its variance); 1803.03635, Fig. 2 (as a Gaussian).
    """

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer."""
        return stream.standard_normal(layer.weight.shape) * math.sqrt(2 / sum(fans(layer)))


class KaimingNormal(Spec):
    """Gaussian weights of standard deviation sqrt(2 / fan_in), which keeps ReLU signals' scale.

    Source: He et al. 2015 (1502.01852), eq. 10.
    """

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer."""
        return stream.standard_normal(layer.weight.shape) * math.sqrt(2 / fans(layer)[0])


class KaimingUniform(Spec):
    """Uniform weights on ±sqrt(6 / fan_in), the variance of `KaimingNormal`.

    Source: He et al. 2015 (1502.01852), eq. 10 (its variance).
    """

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer."""
        bound = math.sqrt(6 / fans(layer)[0])
        return stream.uniform(-bound, bound, tuple(layer.weight.shape))


class Orthogonal(Spec):
    """Orthonormal rows, or columns where the weight [out, in · k²] is tall; uniform among those.

    Source: Saxe et al. 2014 (1312.6120); Mezzadri 2007 (math-ph/0609050) for the signs that make
    the draw uniform.
    """

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer."""
        shape = layer.weight.shape
        rows, columns = shape[0], math.prod(shape[1:])
        gaussian = stream.standard_normal((rows, columns))
        basis, triangle = _qr(gaussian.T if rows < columns else gaussian)
        basis = basis * np.sign(np.diag(triangle))
        return (basis.T if rows < columns else basis).reshape(shape)


def _qr(matrix: Draws) -> tuple[Draws, Draws]:
    # On one thread: the last bits of a threaded QR depend on the number of threads.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        basis, triangle = torch.linalg.qr(torch.from_numpy(matrix))
    finally:
        torch.set_num_threads(num_threads)
    return basis.numpy(), triangle.numpy()


class TorchDefault(Spec):
    """The network as its constructor made it."""


def initial_parameters(
    build: Callable[[], nn.Module],
    initialization: "Initialization",
    seed: int,
    stream: str = "init",
) -> tuple[Params, Params]:
    """The parameters and buffers with which a network begins.

    The constructor runs with the global generators at the beginning of the named stream; each
    weight is then drawn from the stream's index that is the weight's place among the parameters,
    in float64 and rounded to the weight's dtype, and the biases of those layers are zero.

    Args:
        build: makes the network.
        initialization: how its weights are drawn.
        seed: the run's seed, at least 0.
        stream: `init` for θ_0, `reinit` for fresh weights of the same seed.

    Returns:
        The named parameters and the named buffers, detached copies that share no storage.
    """
    with seeds.isolated(seed, stream):
        module = build()
    params = {name: param.detach().clone() for name, param in module.named_parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    if isinstance(initialization, TorchDefault):
        return params, buffers
    place = {name: index for index, name in enumerate(params)}
    for name, layer in layers(module):
        draws = initialization.draw(layer, seeds.stream(seed, stream, place[name]))
        params[name].copy_(torch.from_numpy(draws))
        bias = name.removesuffix("weight") + "bias"
        if bias in params:
            params[bias].zero_()
    return params, buffers


Initialization = Annotated[
    GlorotNormal | KaimingNormal | KaimingUniform | Orthogonal | TorchDefault, FAMILY
]
