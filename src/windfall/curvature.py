"""Curvature: how a loss bends, by the Hessian over all parameters.

    largest = spectral_norm(network, inputs, labels)             # of any network

Of a student and its goal (the teacher), fully connected ReLU chains without BatchNorm:

    top = hessian_top(params, goal, inputs, "squared-error")     # its largest eigenvalues
    whole = trace(params, inputs, "squared-error")               # exact

The loss is the mean over samples, and over outputs too where errors are squared; cross-entropy has
the teacher's largest output as label. All arithmetic is float64. The Hessian is that between kinks:
a ReLU has derivative 0 at 0, and that a gradient jumps there adds nothing.
"""

import copy
import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from windfall import chains, dynamics, seeds
from windfall.chains import layer_names
from windfall.masks import Params

Loss = Literal["squared-error", "cross-entropy"]

TOLERANCE = 1e-6  # relative, of eigenvectors; eigenvalues are then exact to about its square
ROUGH = 1e-3  # the same of a number that is told by its power of ten
NUM_AT_ONCE = 256  # samples whose influences are in memory: 50 MB for 100 outputs and 250 nodes


def spectral_norm(network: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """The largest absolute eigenvalue of the Hessian of the mean cross-entropy.

    Found by Lanczos' method in float64, from a start vector that is always the same. BatchNorm
    normalizes by the statistics of the inputs, as in training.

    Source: Arpit et al. 2019 (1906.02341), the log spectral norms of its appendix.

    Args:
        network: is left as it is.
        inputs: [sample, ...], as it is given them.
        labels: [sample], int64.

    Returns:
        At least 0; inf where a product with the Hessian is not finite.
    """
    own = copy.deepcopy(network).double().train()
    operator = _hessian(nn.CrossEntropyLoss()(own(inputs.double()), labels), own)
    first = operator @ _start(operator)[0]
    if not np.isfinite(first).all():
        return math.inf
    if not first.any():
        return 0.0
    return float(abs(_extreme(operator, 1, "LM", ROUGH)[0]))


def hessian_top(params: Params, goal: Params, inputs: Tensor, loss: Loss, num: int = 5) -> Tensor:
    """The largest eigenvalues of the Hessian of the loss over all parameters.

    Lanczos' method needs only products with the Hessian, which are exact up to rounding: about 20
    for the largest eigenvalue, 30 to 100 for five. Its start vector is always the same.

    Source: scipy, `eigsh`; Pearlmutter 1994 for the products.

    Args:
        params: the student's.
        goal: the teacher's.
        inputs: [sample, in].
        loss: `squared-error` or `cross-entropy`.
        num: in 1 ... parameters - 1.

    Returns:
        The eigenvalues [num], float64, the largest first.

    Raises:
        ValueError: when the teacher does not fit, the loss is unknown, a parameter is not finite,
            or `num` is out of its range.
    """
    check_pair(params, goal, "goal")
    _check_curved(params, loss)
    network, inputs = chains.build(doubled(params)), inputs.double()
    criterion, answers = nn.MSELoss(), chains.outputs(doubled(goal), inputs)
    if loss == "cross-entropy":
        criterion, answers = nn.CrossEntropyLoss(), answers.argmax(1)
    operator = _hessian(criterion(network(inputs), answers), network)
    size = operator.shape[0]
    if not 1 <= num < size:
        raise ValueError(f"`num` must lie in [1, {size - 1}], below the parameters; got {num}.")
    return torch.from_numpy(_extreme(operator, num, "LA")).sort(descending=True).values


def _hessian(loss: Tensor, network: nn.Module) -> Any:
    """The Hessian of a loss over all parameters in their order, as scipy's operator, float64.

    Products with it are derivatives of products with the gradient, backward twice. torch's forward
    derivatives are not used, for through BatchNorm those of a gradient are wrong (torch 2.13).

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994.
    """
    from scipy.sparse.linalg import LinearOperator

    weights = list(network.parameters())
    slopes = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    slope = torch.cat([each.flatten() for each in slopes])

    def product(vector: Any) -> Any:
        along = torch.from_numpy(vector).reshape(-1)
        parts = torch.autograd.grad(
            slope, weights, along, retain_graph=True, materialize_grads=True
        )
        return torch.cat([each.flatten() for each in parts]).numpy()

    size = slope.numel()
    made: Any = LinearOperator  # its stubs know its subclasses alone
    return made((size, size), matvec=product, dtype=np.float64)


def _start(operator: Any) -> tuple[Any, np.random.Generator]:
    """The vector that Lanczos' method begins with, and the stream that it goes on from."""
    stream = seeds.stream(0, "flatness-start")
    return stream.standard_normal(operator.shape[0]), stream


def _extreme(
    operator: Any, num: int, which: Literal["LA", "LM"], tolerance: float = TOLERANCE
) -> Any:
    """The largest eigenvalues of a symmetric operator, or those of largest size, [num]."""
    from scipy.sparse.linalg import eigsh

    first, stream = _start(operator)
    options: dict[str, Any] = {
        "v0": first,
        "rng": stream,  # where products leave nothing new
        "tol": tolerance,
        "return_eigenvectors": False,
    }
    return eigsh(operator, num, which=which, **options)


def trace(params: Params, inputs: Tensor, loss: Loss) -> float:
    """The trace of the Hessian of the loss over all parameters, exact.

        mean over samples of sum_l |f_{l-1}|² tr(G_lᵀ S G_l),    G_l = V_l D_l, [output, node]

    f_{l-1} is what a layer reads with the constant 1 of its bias, G_l the derivative of the outputs
    by its pre-activations, and S the Hessian of the loss by the outputs: 2 / outputs on the
    diagonal for squared errors, diag(p) - p pᵀ for cross-entropy, p the softmax. Every output is
    piecewise linear in every single weight: on the diagonal, the Hessian and its Gauss-Newton part
    are equal, and that part does not know the teacher.

    Source: the symbols are those of 1905.13405, section 3; see `dynamics`.

    Args:
        params: the student's.
        inputs: [sample, in].
        loss: `squared-error` or `cross-entropy`.

    Returns:
        At least 0.

    Raises:
        ValueError: when the loss is unknown or a parameter is not finite.
    """
    _check_curved(params, loss)
    params, parts = doubled(params), inputs.double().split(NUM_AT_ONCE)
    return sum(_summed_trace(params, part, loss) for part in parts) / len(inputs)


def _summed_trace(params: Params, inputs: Tensor, loss: Loss) -> float:
    passed, total = dynamics.signals(params, inputs), 0.0
    for name, _, gated in dynamics.influences(params, passed):
        own = gated[..., : len(params[f"{name}.bias"])]  # a bias node has no weights
        curved = _curvature(own, passed.outputs, loss)
        total += float(passed.reads[name].square().sum(1) @ curved)
    return total


def _curvature(influence: Tensor, outputs: Tensor, loss: Loss) -> Tensor:
    """tr(Gᵀ S G), [sample], of influences G, [sample, output, node]."""
    if loss == "squared-error":
        return influence.square().sum((1, 2)) * (2 / outputs.shape[1])
    weights = outputs.softmax(1)[:, None]
    mean = weights @ influence
    return (weights @ (influence - mean).square()).sum((1, 2))


def doubled(params: Params) -> Params:
    """The parameters in float64, without gradients."""
    return {name: value.detach().double() for name, value in params.items()}


# -- what is refused -------------------------------------------------------------------------------


def check_plain(params: Params, field: str) -> None:
    """Refuse convolutions, BatchNorm and layers without biases, which the formulas do not know.

    Raises:
        ValueError: naming the field.
    """
    known = {f"{name}.{kind}" for name in layer_names(params) for kind in ("weight", "bias")}
    if known != set(params) or any(value.ndim > 2 for value in params.values()):
        shapes = {name: list(value.shape) for name, value in params.items()}
        raise ValueError(
            f"`{field}` must be weights and biases of fully connected layers alone; got {shapes}."
        )


def check_pair(params: Params, other: Params, field: str) -> None:
    """Refuse a network that has not the inputs and outputs of the first.

    Raises:
        ValueError: naming the field of the other.
    """
    check_plain(params, "params")
    check_plain(other, field)
    sizes, others = chains.layer_sizes(params), chains.layer_sizes(other)
    for what, place in (("inputs", 0), ("outputs", -1)):
        if sizes[place] != others[place]:
            raise ValueError(
                f"`{field}` must have the network's {sizes[place]} {what}; got {others[place]}."
            )


def _check_curved(params: Params, loss: Loss) -> None:
    check_plain(params, "params")
    if loss not in get_args(Loss):
        raise ValueError(f"`loss` must be one of {list(get_args(Loss))}; got {loss!r}.")
    for name, value in params.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"`params` must be finite; got nan or inf in `{name}`.")
