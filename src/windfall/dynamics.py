"""Dynamics: how a student's nodes are pulled by the teacher's and push each other, and who wins.

Student and teacher are fully connected ReLU networks, linear at the output, given as dictionaries
of parameters; f and y are the student's activations and outputs, f* and y* the teacher's. The loss
of a sample is ½|y* - y|². All quantities are by the name of a layer:

    found = couplings(student, teacher, inputs)      # H, H*, beta, beta* and L, L*
    update = expected_update(student, teacher, inputs)
    before = correlation(teacher_nodes["hidden1"], student_nodes["hidden1"])

Legend. W_l is layer l's weight with its bias as last column, [out + 1, in + 1]: a last row
(0, ..., 0, 1) hands the constant 1 on as a *bias node*, which is never gated and which the output
layer, [out, in + 1], does not have. f_l = D_l W_l f_{l-1}, D_l the gates. H_l belongs to the nodes
of layer l, as do β_l and g_l; L_l, L*_l are those of what layer l reads, f_{l-1}.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from windfall.chains import layer_names, outgoing_norms
from windfall.masks import Params

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of luckmatters' `recon_two_layer`
CORRELATION_EPSILON = 1e-10  # of its `act2corrMat`; added to the squared norms

# -- forward and backward --------------------------------------------------------------------------


def augmented(params: Params) -> dict[str, Tensor]:
    """The weights with the biases as last columns, and bias nodes between the layers.

    Args:
        params: of a fully connected network; a missing bias is 0.

    Returns:
        [out + 1, in + 1] by hidden layer, [out, in + 1] for the output layer.
    """
    names, found = layer_names(params), dict[str, Tensor]()
    for name in names:
        weight = params[f"{name}.weight"]
        bias = params.get(f"{name}.bias", weight.new_zeros(len(weight)))
        joined = torch.cat([weight, bias[:, None]], dim=1)
        if name != names[-1]:
            last = torch.zeros_like(joined[:1])
            last[0, -1] = 1
            joined = torch.cat([joined, last])
        found[name] = joined
    return found


@dataclass(frozen=True)
class Signals:
    """What passes through a network, with bias nodes.

    Args:
        reads: f_{l-1}, [sample, in + 1], what each layer reads, by its name.
        gates: of each hidden layer, [sample, out + 1], 1 where the node fires or is the bias node.
        outputs: y, [sample, out].
    """

    reads: dict[str, Tensor]
    gates: dict[str, Tensor]
    outputs: Tensor


def signals(params: Params, inputs: Tensor) -> Signals:
    """One forward pass; a node fires where its pre-activation is above 0.

    Args:
        params: of a fully connected network.
        inputs: [sample, in].
    """
    reads: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}
    weights = augmented(params)
    values = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    for name in list(weights)[:-1]:
        reads[name], made = values, values @ weights[name].T
        gates[name] = (made > 0).to(made.dtype)
        values = made * gates[name]
    last = list(weights)[-1]
    reads[last] = values
    return Signals(reads, gates, values @ weights[last].T)


def activations(params: Params, inputs: Tensor) -> dict[str, Tensor]:
    """What the nodes of every hidden layer give, [sample, node], without bias nodes."""
    passed = signals(params, inputs)
    names = list(passed.reads)
    return {name: passed.reads[above][:, :-1] for name, above in itertools.pairwise(names)}


def _returned(params: Params, passed: Signals, error: Tensor) -> dict[str, Tensor]:
    """g_l = D_l V_lᵀ e for e at the outputs, [sample, node], without bias nodes."""
    weights, names = augmented(params), layer_names(params)
    found, gradient = {names[-1]: error}, error
    for above, name in zip(names[:0:-1], names[-2::-1], strict=True):
        # A bias node hands nothing back: its value is constant.
        gradient = (gradient @ weights[above][: gradient.shape[1], :-1]) * passed.gates[name][
            :, :-1
        ]
        found[name] = gradient
    return dict(reversed(found.items()))


def _as_params(params: Params, passed: Signals, gradients: dict[str, Tensor]) -> Params:
    """The means of g_l f_{l-1}ᵀ under the names of the parameters that there are."""
    found: Params = {}
    for name, gradient in gradients.items():
        product = gradient.T @ passed.reads[name] / len(gradient)
        found[f"{name}.weight"] = product[:, :-1]
        found[f"{name}.bias"] = product[:, -1]
    return {name: value for name, value in found.items() if name in params}


def node_gradients(student: Params, teacher: Params, inputs: Tensor) -> dict[str, Tensor]:
    """g_l(x) = D_l V_lᵀ (y* - y), how each sample would move each node's pre-activation.

    It is minus the derivative of ½|y* - y|². V_l is the derivative of the outputs by f_l.

    Source: 1909.13458, Lemma 1, whose g_l is D_l (V_lᵀ V*_l f*_l - V_lᵀ V_l f_l).

    Returns:
        [sample, node] by layer.
    """
    passed = signals(student, inputs)
    error = signals(teacher, inputs).outputs - passed.outputs
    return _returned(student, passed, error)


def pull_and_push(student: Params, teacher: Params, inputs: Tensor) -> tuple[Params, Params]:
    """The two parts of the expected update: what the teacher's nodes pull, what the student's push.

        pull_l = E[H*_l W*_l f*_{l-1} f_{l-1}ᵀ],  push_l = E[H_l W_l f_{l-1} f_{l-1}ᵀ],

    the means of per-sample products. Because H*_l W*_l f*_{l-1} = D_l V_lᵀ V*_l f*_l, and V*_l f*_l
    is y*, they are what the outputs y* and y hand back through the student: exact, for any number
    of layers.

    Returns:
        Two dictionaries with the names and shapes of the student's weights and biases.
    """
    passed, goal = signals(student, inputs), signals(teacher, inputs).outputs
    parts = [_returned(student, passed, outputs) for outputs in (goal, passed.outputs)]
    pull, push = (_as_params(student, passed, part) for part in parts)
    return pull, push


def expected_update(student: Params, teacher: Params, inputs: Tensor) -> Params:
    """Minus the gradient of the mean over samples of ½|y* - y|²: pull minus push, exactly.

    It is -num_outputs / 2 times the gradient of `torch.nn.functional.mse_loss`, which is a mean
    over outputs too. A student that computes what the teacher does has update 0.

    Returns:
        The names and shapes of the student's weights and biases.
    """
    passed = signals(student, inputs)
    error = signals(teacher, inputs).outputs - passed.outputs
    return _as_params(student, passed, _returned(student, passed, error))


def update_norms(update: Params) -> dict[str, float]:
    """The L2 norm of an update (or any parameters) of each layer, weights and biases together."""
    return {
        name: float(
            torch.cat([update[f"{name}.{kind}"].flatten() for kind in _kinds(update, name)]).norm()
        )
        for name in layer_names(update)
    }


def _kinds(params: Params, name: str) -> list[str]:
    return [kind for kind in ("weight", "bias") if f"{name}.{kind}" in params]


# -- H, beta and L ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Couplings:
    """Means over samples of how nodes of two networks are coupled, all by layer, with bias nodes.

    Args:
        beta: β_l = E[W_{l+1}ᵀ H_{l+1} W_{l+1}], student with student, [out + 1, out + 1].
        beta_star: β*_l, student with teacher, [student's out + 1, teacher's out + 1].
        H: H_l = E[(g gᵀ) ⊙ β_l(x)], g the gates; the identity at the output.
        H_star: H*_l, student with teacher.
        L: L_l = E[f_{l-1} f_{l-1}ᵀ], of what the layer reads, [in + 1, in + 1].
        L_star: L*_l = E[f_{l-1} f*_{l-1}ᵀ], [student's in + 1, teacher's in + 1].
    """

    beta: dict[str, Tensor]
    beta_star: dict[str, Tensor]
    H: dict[str, Tensor]
    H_star: dict[str, Tensor]
    L: dict[str, Tensor]
    L_star: dict[str, Tensor]


def influences(params: Params, passed: Signals) -> Iterator[tuple[str, Tensor, Tensor]]:
    """From the output down: a layer, V_l and V_l D_l, [sample, outputs, nodes + 1]."""
    weights, names = augmented(params), layer_names(params)
    num_outputs = len(weights[names[-1]])
    eye = torch.eye(num_outputs, dtype=passed.outputs.dtype, device=passed.outputs.device)
    influence = gated = eye.expand(len(passed.outputs), -1, -1)
    yield names[-1], influence, gated
    for above, name in zip(names[:0:-1], names[-2::-1], strict=True):
        influence = gated @ weights[above]
        gated = influence * passed.gates[name][:, None, :]
        yield name, influence, gated


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    """The sum over samples and outputs of v wᵀ: one product, and no tensor per sample."""
    return one.reshape(-1, one.shape[-1]).T @ other.reshape(-1, other.shape[-1])


def couplings(
    student: Params, teacher: Params, inputs: Tensor, num_at_once: int = 256
) -> Couplings:
    """H, H*, β, β*, L and L* of every layer, means over the inputs.

    Per sample, β_l = W_{l+1}ᵀ H_{l+1} W*_{l+1} and H_l = D_l β_l D*_l from H = I at the output.
    By induction β_l = V_lᵀ V*_l and H_l = (V_l D_l)ᵀ (V*_l D*_l), where V = I at the output and
    V_l = V_{l+1} D_{l+1} W_{l+1} is the derivative of the outputs by f_l. The sums over samples are
    then products of two matrices, [sample · output, node], and no β(x) is ever stored.

    Note:
        luckmatters gives the output a bias node too, which adds 1 to the entry of the two bias
        nodes of every β and H*; it cancels in every update.

    Source: 1905.13405, section 3; luckmatters, `recon_multilayer.compute_Hs`.

    Args:
        student: parameters of a fully connected network.
        teacher: of one with as many layers and outputs.
        inputs: [sample, in].
        num_at_once: samples held in memory together, at least 1; each needs
            2 · outputs · (student's + teacher's nodes of a layer) numbers.
    """
    _check_pair(student, teacher)
    names = layer_names(student)
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for part in inputs.split(num_at_once):
        for name, found in _summed(student, teacher, part).items():
            for key, value in found.items():
                sums[name][key] = sums[name][key] + value if key in sums[name] else value
    keys = ("beta", "beta_star", "H", "H_star", "L", "L_star")
    return Couplings(
        **{key: {name: sums[name][key] / len(inputs) for name in names} for key in keys}
    )


def _summed(student: Params, teacher: Params, inputs: Tensor) -> dict[str, dict[str, Tensor]]:
    passed, goal = signals(student, inputs), signals(teacher, inputs)
    found: dict[str, dict[str, Tensor]] = {}
    pairs = zip(influences(student, passed), influences(teacher, goal), strict=True)
    for (name, influence, gated), (_, influence_star, gated_star) in pairs:
        reads = passed.reads[name]
        found[name] = {
            "beta": _overlap(influence, influence),
            "beta_star": _overlap(influence, influence_star),
            "H": _overlap(gated, gated),
            "H_star": _overlap(gated, gated_star),
            "L": reads.T @ reads,
            "L_star": reads.T @ goal.reads[name],
        }
    return found


def factored_update(student: Params, teacher: Params, found: Couplings) -> Params:
    """The paper's expected update, products of means: H*_l W*_l L*_lᵀ - H_l W_l L_l.

    (In the paper W is transposed: L*_l W*_l H*_lᵀ - L_l W_l H_lᵀ.) It is `expected_update` where
    H_l(x), H*_l(x) are uncorrelated with what the layer reads: always at the output layer, whose H
    is the identity; for one sample; and where no gate above changes from sample to sample.
    Elsewhere it is an approximation, and not a small one: at the start it is off by .5 to .8 of the
    update's norm with one hidden layer, and by .3 (the top) to 1.0 (the lowest) with four.

    Source: 1905.13405, section 3; luckmatters, `test_multilayer.compute_terms`.

    Args:
        student: its parameters.
        teacher: its parameters.
        found: their couplings.

    Returns:
        The names and shapes of the student's weights and biases.
    """
    weights, goals, made = augmented(student), augmented(teacher), dict[str, Tensor]()
    for name, weight in weights.items():
        pull = found.H_star[name] @ goals[name] @ found.L_star[name].T
        update = pull - found.H[name] @ weight @ found.L[name]
        if name != list(weights)[-1]:
            update = update[:-1]
        made[f"{name}.weight"], made[f"{name}.bias"] = update[:, :-1], update[:, -1]
    return {name: value for name, value in made.items() if name in student}


def _check_pair(student: Params, teacher: Params) -> None:
    names, others = layer_names(student), layer_names(teacher)
    if names != others:
        raise ValueError(f"the teacher must have the student's layers, {names}; got {others}.")
    outputs = [len(params[f"{names[-1]}.weight"]) for params in (student, teacher)]
    if outputs[0] != outputs[1]:
        raise ValueError(
            f"the teacher must have the student's {outputs[0]} outputs; got {outputs[1]}."
        )


# -- correlation, winners, ranks -------------------------------------------------------------------


def correlation(teacher_nodes: Tensor, student_nodes: Tensor) -> Tensor:
    """The Pearson correlation rho of every teacher node with every student node, in [-1, 1].

    Means are subtracted, and 1e-10 is added to each squared norm, so a node that is dead (constant)
    on these inputs has correlation 0: count them with `dead`.

    Source: luckmatters, `utils_corrs.act2corrMat`.

    Args:
        teacher_nodes: activations [sample, teacher node].
        student_nodes: activations [sample, student node] on the same inputs.

    Returns:
        [teacher node, student node].
    """
    if len(teacher_nodes) != len(student_nodes):
        raise ValueError(
            f"both must be activations on the same inputs; got {len(teacher_nodes)} and "
            f"{len(student_nodes)} samples."
        )
    one, other = (nodes - nodes.mean(0) for nodes in (teacher_nodes, student_nodes))
    inverse, other_inverse = (
        (nodes.square().sum(0) + CORRELATION_EPSILON).rsqrt() for nodes in (one, other)
    )
    found = (one.T @ other) * inverse[:, None] * other_inverse
    return torch.where(dead(teacher_nodes)[:, None] | dead(student_nodes), 0, found)


def dead(nodes: Tensor) -> Tensor:
    """Which nodes [node] give the same on all inputs, from activations [sample, node]."""
    return (nodes == nodes[:1]).all(0)


def best(rho: Tensor) -> Tensor:
    """The highest correlation that any student node has with each teacher node, [teacher node]."""
    return rho.max(1).values


def covered(rho: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> dict[float, int]:
    """How many teacher nodes have a best correlation above each threshold."""
    return {threshold: int((best(rho) > threshold).sum()) for threshold in thresholds}


def winners(rho: Tensor) -> Tensor:
    """The student node [teacher node] that each teacher node is best correlated with.

    Among equals the first; one student node may win several teacher nodes.
    """
    return rho.argmax(1)


def ranks(initial: Tensor, won: Tensor) -> Tensor:
    """The winners' places at the start: how many student nodes were ahead of each, from 0.

    Ahead is a higher initial correlation with that teacher node, or an equal one of an earlier
    node. 0 means that the winner was the best from the beginning. Chance gives (n - 1) / 2.

    Note:
        luckmatters correlates on training inputs at the start and on others at the end; here both
        are what the caller gives, and should be of the same inputs.

    Source: luckmatters, `utils_corrs.compareCorrIndices`.

    Args:
        initial: rho at the start, [teacher node, student node].
        won: the winners at the end, [teacher node].
    """
    own = initial.gather(1, won[:, None])
    places = torch.arange(initial.shape[1], device=initial.device)
    is_ahead = (initial > own) | ((initial == own) & (places < won[:, None]))
    return is_ahead.sum(1)


def chance_mean_rank(num_nodes: int) -> float:
    """The expected rank of a winner drawn uniformly from so many student nodes, (n - 1) / 2."""
    return (num_nodes - 1) / 2


def chance_rank_sum(num_nodes: int, num_winners: int) -> npt.NDArray[np.float64]:
    """The distribution of the sum of independent uniform ranks, of 0 to num_winners · (n - 1).

    Args:
        num_nodes: n, the student nodes, at least 1.
        num_winners: the teacher nodes, at least 0.

    Returns:
        Probabilities [num_winners · (n - 1) + 1].
    """
    law = np.ones(1)
    for _ in range(num_winners):
        law = np.convolve(law, np.full(num_nodes, 1 / num_nodes))
    return law


def chance_of_ranks(found: Tensor, num_nodes: int) -> float:
    """The probability that winners drawn uniformly have a mean rank at most the one found.

    It takes the draws to be independent, which the winners of teacher nodes that are alike are not.

    Args:
        found: the ranks [teacher node], each in 0 ... n - 1.
        num_nodes: n, the student nodes.
    """
    law = chance_rank_sum(num_nodes, len(found))
    return min(1.0, float(law[: int(found.sum()) + 1].sum()))


def is_winner(won: Tensor, num_nodes: int) -> Tensor:
    """Which student nodes [student node] win some teacher node."""
    return torch.zeros(num_nodes, dtype=torch.bool, device=won.device).index_fill_(0, won, True)


def is_matched(rho: Tensor, threshold: float = 0.9) -> Tensor:
    """Which student nodes [student node] correlate with some teacher node above the threshold."""
    return rho.max(0).values > threshold


def outgoing_split(params: Params, matched: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """By hidden layer, the outgoing norms of the matched student nodes, and those of the rest."""
    norms = outgoing_norms(params)
    return {name: (norms[name][mask], norms[name][~mask]) for name, mask in matched.items()}
