"""Weights drawn layer by layer: members that map a layer's fans and a random stream to a weight."""

import contextlib
import math
from collections.abc import Generator
from typing import Annotated

import numpy as np
import torch
from torch import nn

from windfall.initialize.parts import Draws, Layer, Transposed, fans
from windfall.spec import FAMILY, Spec, SpecError


def _gaussian(layer: Layer, variance: float, stream: np.random.Generator) -> Draws:
    return stream.standard_normal(layer.weight.shape) * math.sqrt(variance)


def uniform(layer: Layer, bound: float, stream: np.random.Generator) -> Draws:
    """A weight for the layer, uniform on ±bound."""
    return stream.uniform(-bound, bound, tuple(layer.weight.shape))


class GlorotNormal(Spec):
    """Gaussian weights, not truncated, of standard deviation sqrt(2 / (fan_in + fan_out)).

    Source: Glorot & Bengio 2010, eq. 12 (its variance); 1803.03635, Fig. 2 (as a Gaussian).
    """

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer."""
        return _gaussian(layer, 2 / sum(fans(layer)), stream)


class GlorotUniform(Spec):
    """Uniform weights on ±sqrt(6 / (fan_in + fan_out)), the variance of `GlorotNormal`.

    Source: Glorot & Bengio 2010, eq. 16.
    """

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer."""
        return uniform(layer, math.sqrt(6 / sum(fans(layer))), stream)


class LecunNormal(Spec):
    """Gaussian weights of standard deviation sqrt(1 / fan_in), which keeps linear signals' scale.

    Source: LeCun et al. 1998, Efficient BackProp, eq. 16.
    """

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer."""
        return _gaussian(layer, 1 / fans(layer)[0], stream)


class LecunUniform(Spec):
    """Uniform weights on ±sqrt(3 / fan_in), the variance of `LecunNormal`.

    Source: LeCun et al. 1998, Efficient BackProp, eq. 16 (its variance).
    """

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer."""
        return uniform(layer, math.sqrt(3 / fans(layer)[0]), stream)


class KaimingNormal(Spec):
    """Gaussian weights of standard deviation sqrt(2 / fan_in), which keeps ReLU signals' scale.

    Source: He et al. 2015 (1502.01852), eq. 10.
    """

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer."""
        return _gaussian(layer, 2 / fans(layer)[0], stream)


class KaimingUniform(Spec):
    """Uniform weights on ±sqrt(6 / fan_in), the variance of `KaimingNormal`.

    Source: He et al. 2015 (1502.01852), eq. 10 (its variance).
    """

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer."""
        return uniform(layer, math.sqrt(6 / fans(layer)[0]), stream)


class Orthogonal(Spec):
    """Orthonormal rows, or columns where the weight [out, in · k²] is tall; uniform among those.

    Source: Saxe et al. 2014 (1312.6120); Mezzadri 2007 (math-ph/0609050) for the signs that make
    the draw uniform.
    """

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer."""
        shape = layer.weight.shape
        return _orthonormal(shape[0], math.prod(shape[1:]), stream).reshape(shape)


class DeltaOrthogonal(Spec):
    """Convolutions that read the middle of their kernel alone, by orthonormal columns.

    W[:, :, middle] = H with H^T H = 1, uniform among those, and 0 elsewhere; of groups, each has
    its own H. At a stride of 1 such a convolution keeps the norm of every image. A linear layer's
    weight is that of `Orthogonal`.

    Source: Xiao et al. 2018 (1806.05393), section 3 and algorithm 1.
    """

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer.

        Raises:
            SpecError: when it is a transposed convolution, one that makes fewer channels than it
                reads, or one whose kernel has no middle.
        """
        if isinstance(layer, nn.Linear):
            return Orthogonal().draw(layer, stream)
        _check_delta(layer)
        made, read, *kernel = layer.weight.shape
        weight = np.zeros((layer.groups, made // layer.groups, read, *kernel))
        middle = tuple(size // 2 for size in kernel)
        for group in weight:
            group[:, :, *middle] = _orthonormal(len(group), read, stream)
        return weight.reshape(layer.weight.shape)


def _check_delta(layer: Layer) -> None:
    is_odd = all(size % 2 for size in layer.weight.shape[2:])
    if isinstance(layer, Transposed) or not is_odd or fans(layer)[0] > fans(layer)[1]:
        raise SpecError(
            "`initialization` delta-orthogonal must be given linear layers, and convolutions of odd"
            f" kernels that make at least as many channels as they read; got {layer}. Use"
            " orthogonal."
        )


def _orthonormal(rows: int, columns: int, stream: np.random.Generator) -> Draws:
    """A uniformly random matrix of orthonormal rows, or columns where it is tall."""
    gaussian = stream.standard_normal((rows, columns))
    basis, triangle = _qr(gaussian.T if rows < columns else gaussian)
    basis = basis * np.sign(np.diag(triangle))
    return basis.T if rows < columns else basis


def _qr(matrix: Draws) -> tuple[Draws, Draws]:
    with one_thread():
        basis, triangle = torch.linalg.qr(torch.from_numpy(matrix))
    return basis.numpy(), triangle.numpy()


@contextlib.contextmanager
def one_thread() -> Generator[None]:
    """On one thread of torch's: their number changes the last bits of a QR, or of a sum."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


Drawn = Annotated[
    GlorotNormal
    | GlorotUniform
    | LecunNormal
    | LecunUniform
    | KaimingNormal
    | KaimingUniform
    | Orthogonal
    | DeltaOrthogonal,
    FAMILY,
]
