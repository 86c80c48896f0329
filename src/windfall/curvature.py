"""Curvature: how the loss of a student bends, by the Hessian over all of its parameters.

Student and goal (the teacher) are fully connected ReLU chains without BatchNorm.

    top = hessian_top(params, goal, inputs, "squared-error")     # its largest eigenvalues
    whole = trace(params, inputs, "squared-error")               # exact

The loss is the mean over samples, and over outputs too where errors are squared; cross-entropy has
the teacher's largest output as label. All arithmetic is float64. The Hessian is that between kinks:
a ReLU has derivative 0 at 0, and that a gradient jumps there adds nothing.
"""

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from windfall import chains, dynamics, seeds
from windfall.chains import layer_names
from windfall.masks import Params

Loss = Literal["squared-error", "cross-entropy"]

TOLERANCE = 1e-6  # relative, of eigenvectors; eigenvalues are then exact to about its square
NUM_AT_ONCE = 256  # samples whose influences are in memory: 50 MB for 100 outputs and 250 nodes


def hessian_top(params: Params, goal: Params, inputs: Tensor, loss: Loss, num: int = 5) -> Tensor:
    """The largest eigenvalues of the Hessian of the loss over all parameters.

    Lanczos' method needs only products with the Hessian, which are exact up to rounding: about 20
    for the largest eigenvalue, 30 to 100 for five. Its start vector is always the same.

    Source: curvlinops, `HessianLinearOperator`; scipy, `eigsh`.

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
    from scipy.sparse.linalg import eigsh

    operator = _hessian(params, goal, inputs, loss)
    size = operator.shape[0]
    if not 1 <= num < size:
        raise ValueError(f"`num` must lie in [1, {size - 1}], below the parameters; got {num}.")
    stream = seeds.stream(0, "flatness-start")
    options: dict[str, Any] = {
        "v0": stream.standard_normal(size),
        "rng": stream,  # it goes on from a random vector where products leave nothing new
        "tol": TOLERANCE,
        "return_eigenvectors": False,
    }
    found = eigsh(operator.to_scipy(np.float64), num, which="LA", **options)
    return torch.from_numpy(found).sort(descending=True).values


def _hessian(params: Params, goal: Params, inputs: Tensor, loss: Loss) -> Any:
    """The Hessian as curvlinops' linear operator over all parameters in their order, float64."""
    from curvlinops import HessianLinearOperator

    check_pair(params, goal, "goal")
    _check_curved(params, loss)
    inputs = inputs.double()
    criterion, answers = nn.MSELoss(), chains.outputs(doubled(goal), inputs)
    if loss == "cross-entropy":
        criterion, answers = nn.CrossEntropyLoss(), answers.argmax(1)
    network, data = chains.build(doubled(params)), [(inputs, answers)]
    weights = list(network.parameters())
    # Its check for determinism would draw from the global generator.
    return HessianLinearOperator(network, criterion, weights, data, check_deterministic=False)


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
