"""Jacobians: by how much a network's outputs move with its inputs, by their singular values.

    found = jacobian(network, inputs, seeds.stream(0, "jacobian"))
    found.top[:, 0]                        # of each input, the largest

J_i is the derivative of the outputs of input i by that input, both as vectors: [output, entry]. If
its singular values are near 1, signals keep their length both ways (dynamical isometry).

Source: Saxe et al. 2014 (1312.6120); Pennington, Schoenholz & Ganguli 2017 (1711.04735).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

NUM_TOP = 5  # singular values that are told
MOST_EXACT = 64  # outputs up to which the whole Jacobian is made: a backward pass for each
NUM_PROJECTIONS = 64  # random ones of the mean square: an error of at most sqrt(2/64) = 18 %
MOST_ITERATIONS = 100  # of the power iteration, each two passes for every singular value
TOLERANCE = 1e-4  # relative, at which the power iteration ends


@dataclass(frozen=True)
class Jacobian:
    """Of some inputs, the singular values of the Jacobian.

    Args:
        top: the largest ones, descending, [sample, value], float64.
        mean_square: of all min(outputs, entries) of them, [sample], float64.
        is_exact: whether they are of the whole matrix; if not, `top` is of a power iteration, and
            `mean_square` the mean of random projections.
    """

    top: Tensor
    mean_square: Tensor
    is_exact: bool


def jacobian(
    function: Function,
    inputs: Tensor,
    stream: np.random.Generator,
    *,
    num_top: int = NUM_TOP,
    most_exact: int = MOST_EXACT,
) -> Jacobian:
    """The singular values of the Jacobian at each input.

    Args:
        function: of inputs [sample, ...] into outputs [sample, ...], each sample by itself.
        inputs: floating, [sample, ...].
        stream: of the random vectors where the Jacobian is not exact.
        num_top: how many of the largest to find, at least 1; fewer where there are fewer.
        most_exact: outputs up to which it is exact.

    Raises:
        RuntimeError: when the outputs cannot be differentiated by the inputs; torch says why.
    """
    begun = inputs.detach().requires_grad_()
    # A network may write into its inputs, which it could not into a leaf.
    outputs = function(begun.clone()).flatten(1)
    size = min(outputs.shape[1], begun[0].numel())
    if outputs.shape[1] <= most_exact:
        values = torch.linalg.svdvals(_whole(outputs, begun))
        return Jacobian(values[:, :num_top], values.square().sum(1) / size, is_exact=True)
    square = _projected(outputs, begun, stream) / size
    return Jacobian(_iterated(outputs, begun, stream, min(num_top, size)), square, is_exact=False)


def _whole(outputs: Tensor, inputs: Tensor) -> Tensor:
    """The Jacobians, [sample, output, entry], float64."""
    rows = [_pulled(outputs, inputs, row) for row in torch.eye(outputs.shape[1]).to(outputs)]
    return torch.stack(rows, 1)


def _pulled(outputs: Tensor, inputs: Tensor, by: Tensor) -> Tensor:
    """Jᵀ v, [sample, entry], float64, of vectors [sample, output], or of the same for all."""
    by = by.to(outputs).expand_as(outputs)
    (found,) = torch.autograd.grad(outputs, inputs, by, retain_graph=True)
    return found.flatten(1).double()


def _projected(outputs: Tensor, inputs: Tensor, stream: np.random.Generator) -> Tensor:
    """E|Jᵀ z|² = |J|² of Gaussian z, [sample]."""
    draws = (_gaussian(stream, outputs.shape) for _ in range(NUM_PROJECTIONS))
    squares = [_pulled(outputs, inputs, draw).square().sum(1) for draw in draws]
    return torch.stack(squares).mean(0)


def _gaussian(stream: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(stream.standard_normal(shape))


def _iterated(outputs: Tensor, inputs: Tensor, stream: np.random.Generator, num: int) -> Tensor:
    """The largest singular values by iterating JᵀJ on a subspace, [sample, value]."""
    pushed = _forward(outputs, inputs)
    basis = _gaussian(stream, (len(inputs), inputs[0].numel(), num)).to(inputs.device)
    values = torch.zeros(len(inputs), num, dtype=torch.float64, device=inputs.device)
    for _ in range(MOST_ITERATIONS):
        basis, before = torch.linalg.qr(basis)[0], values
        images = torch.stack([pushed(column) for column in basis.unbind(2)], 2)
        values = torch.linalg.svdvals(images)
        if not bool(((values - before).abs() > TOLERANCE * values[:, :1]).any()):
            break
        back = [_pulled(outputs, inputs, image) for image in images.unbind(2)]
        basis = torch.stack(back, 2)
    return values


def _forward(outputs: Tensor, inputs: Tensor) -> Function:
    """J v of vectors [sample, entry], [sample, output]: the derivative of Jᵀ u, linear in u, by u.

    Backward passes alone: more operations have them than have forward ones.
    """
    probe = torch.zeros_like(outputs, requires_grad=True)
    (pulled,) = torch.autograd.grad(outputs, inputs, probe, create_graph=True)

    def push(vectors: Tensor) -> Tensor:
        by = vectors.to(pulled).reshape(pulled.shape)
        (found,) = torch.autograd.grad(pulled, probe, by, retain_graph=True)
        return found.double()

    return push
