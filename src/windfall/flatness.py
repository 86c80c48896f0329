"""Flatness: how freely a student's nodes move while its outputs stay, and how its loss bends.

Student and goal (the teacher) are fully connected ReLU chains without BatchNorm. Where a student
has more nodes than it needs, most are irrelevant: what they read may change and the outputs do not,
so the loss is flat along their incoming weights.

    masks = relevant(params, goal, inputs)                   # the nodes that match the teacher's
    one, rest = changes(params, "hidden1", masks["hidden1"], 0.3, inputs, seed=0)
    found = measure(params, goal, inputs, loss="squared-error", seed=0)

Parameters and inputs are of one dtype; `measure` takes all to float64.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from windfall import chains, curvature, dynamics, seeds
from windfall.chains import layer_names
from windfall.curvature import Loss
from windfall.masks import Params

Relevance = Literal["matched", "outgoing"]

THRESHOLD = 0.9  # of `dynamics.is_matched`: above it a student node is a teacher node's

# -- nodes that are moved --------------------------------------------------------------------------


def incoming(params: Params, layer: str) -> Tensor:
    """What each node of a layer reads with: its weights and, last, its bias, [node, in + 1]."""
    return torch.cat([params[f"{layer}.weight"], params[f"{layer}.bias"][:, None]], dim=1)


def moved(
    params: Params,
    layer: str,
    which: Tensor,
    norm: float,
    stream: np.random.Generator,
    *,
    is_relative: bool = True,
) -> Params:
    """The network with the incoming weights of some nodes moved, each in a random direction.

        w_i ← w_i + norm · |w_i| u_i    or, not relative,    w_i ← w_i + norm · u_i,

    w_i the weights and the bias of the i-th chosen node as one vector, u_i uniform on the sphere.
    The stream's i-th direction goes to the i-th chosen node: from equal streams, masks of as many
    nodes are given the same directions.

    A ReLU network computes the same when a node's incoming weights are multiplied by a > 0 and its
    outgoing ones divided by a. So does what a relative move makes of it; the change that a move of
    a given length makes is divided by a, and says little of nodes of different norms.

    Source: 1905.13405, its explanation of flat minima; 1703.04933 for what rescaling does.

    Args:
        params: of a network; not changed.
        layer: a hidden layer.
        which: the nodes that move, bool [node].
        norm: the L2 norm of every node's move, above 0, as a share of the node's own if relative.
        stream: what the directions are drawn from, and nothing else.
        is_relative: see above; a node whose incoming weights are all 0 then stays.

    Returns:
        The names, shapes and dtype of `params`; what does not move is equal bit for bit.

    Raises:
        ValueError: for another layer, a mask of another size, or a norm that is not above 0.
    """
    _check_move(params, layer, which, norm)
    own = incoming(params, layer)
    drawn = torch.from_numpy(stream.standard_normal((int(which.sum()), own.shape[1])))
    step = norm * drawn / drawn.norm(dim=1, keepdim=True)
    if is_relative:
        step = step * own[which].double().norm(dim=1, keepdim=True)
    own[which] += step.to(own)
    weight, bias = own[:, :-1].contiguous(), own[:, -1].contiguous()
    return params | {f"{layer}.weight": weight, f"{layer}.bias": bias}


def output_change(params: Params, other: Params, inputs: Tensor) -> float:
    """How far the outputs of a network change when it becomes another, in their own deviations.

        |y' - y| / |y - mean y|,    norms over samples and outputs, the mean of each output

    0 is no change; sqrt(2) is that to outputs as varied which have nothing to do with the first.

    Args:
        params: of a network.
        other: of another with as many inputs and outputs, e.g. `moved`.
        inputs: [sample, in].

    Returns:
        At least 0; inf when outputs change that were the same for all inputs.

    Raises:
        ValueError: when the other network has other inputs or outputs.
    """
    curvature.check_pair(params, other, "other")
    return _change(_outputs(params, inputs), _outputs(other, inputs))


def _change(before: Tensor, after: Tensor) -> float:
    own = float((before - before.mean(0)).norm())
    return _ratio(float((after - before).norm()), own, both_zero=0.0)


def _ratio(one: float, other: float, *, both_zero: float) -> float:
    """One over the other; inf over 0, and what is said where both are 0."""
    if other == 0:
        return both_zero if one == 0 else math.inf
    return one / other


# -- relevant and irrelevant -----------------------------------------------------------------------


def relevant(
    params: Params,
    goal: Params,
    inputs: Tensor,
    *,
    threshold: float = THRESHOLD,
    relevance: Relevance = "matched",
) -> dict[str, Tensor]:
    """Which nodes of every hidden layer are relevant, bool [node] by its name.

    `matched` are those that correlate with some teacher node above the threshold; `outgoing` the
    same number of nodes, those with the largest outgoing L2 norms, the first among equals.

    Source: 1905.13405, whose irrelevant nodes match nothing and lose their outgoing weights.

    Args:
        params: the student's.
        goal: the teacher's, with the same hidden layers by name.
        inputs: that the correlations are taken over, [sample, in].
        threshold: in [-1, 1].
        relevance: by what; see above.

    Raises:
        ValueError: when the teacher does not fit, or a setting is out of its range.
    """
    curvature.check_pair(params, goal, "goal")
    if layer_names(params) != layer_names(goal):
        names = layer_names(params), layer_names(goal)
        raise ValueError(f"`goal` must have the student's layers, {names[0]}; got {names[1]}.")
    if not -1 <= threshold <= 1:
        raise ValueError(f"`threshold` must lie in [-1, 1]; got {threshold:g}.")
    if relevance not in get_args(Relevance):
        known = list(get_args(Relevance))
        raise ValueError(f"`relevance` must be one of {known}; got {relevance!r}.")
    seen, aims = dynamics.activations(params, inputs), dynamics.activations(goal, inputs)
    rho = {name: dynamics.correlation(aims[name], seen[name]) for name in seen}
    matched = {name: dynamics.is_matched(values, threshold) for name, values in rho.items()}
    if relevance == "matched":
        return matched
    norms = chains.outgoing_norms(params)
    return {name: _largest(norms[name], int(mask.sum())) for name, mask in matched.items()}


def _largest(values: Tensor, num: int) -> Tensor:
    return dynamics.is_winner(values.argsort(descending=True, stable=True)[:num], len(values))


def changes(
    params: Params,
    layer: str,
    is_relevant: Tensor,
    norm: float,
    inputs: Tensor,
    *,
    seed: int,
    num_draws: int = 8,
    is_relative: bool = True,
) -> tuple[float, float]:
    """What moving relevant nodes changes at the outputs, and what moving irrelevant ones does.

    In every draw, as many nodes of each kind, k, the count of the rarer one, are chosen at random
    and move in the same k directions. Draws belong to the seed, the layer and their number: they
    are the same for every norm and, while the masks stay, at every moment of a training.

    Args:
        params: the student's.
        layer: a hidden layer.
        is_relevant: bool [node].
        norm: above 0; see `moved`.
        inputs: [sample, in].
        seed: of the draws, at least 0.
        num_draws: at least 1.
        is_relative: see `moved`.

    Returns:
        The means over draws of `output_change`, relevant first; both 0 where a kind has no nodes.

    Raises:
        ValueError: as `moved`, and for no draws.
    """
    if num_draws < 1:
        raise ValueError(f"`num_draws` must be at least 1; got {num_draws}.")
    _check_move(params, layer, is_relevant, norm)
    num = min(int(is_relevant.sum()), int((~is_relevant).sum()))
    if num == 0:
        return 0.0, 0.0
    place, before = layer_names(params).index(layer), _outputs(params, inputs)

    def drawn(mask: Tensor, draw: int) -> float:
        which = _some(mask, num, seeds.stream(seed, "flatness-nodes", place, draw))
        directions = seeds.stream(seed, "flatness-directions", place, draw)
        other = moved(params, layer, which, norm, directions, is_relative=is_relative)
        return _change(before, _outputs(other, inputs))

    kinds = is_relevant, ~is_relevant
    one, rest = (sum(drawn(mask, draw) for draw in range(num_draws)) for mask in kinds)
    return one / num_draws, rest / num_draws


def _some(mask: Tensor, num: int, stream: np.random.Generator) -> Tensor:
    """So many of a mask's nodes, every choice equally likely, [node]."""
    places = stream.permutation(mask.nonzero().flatten().numpy())[:num]
    return dynamics.is_winner(torch.from_numpy(places), len(mask))


# -- at one moment ---------------------------------------------------------------------------------


def measure(
    params: Params,
    goal: Params,
    inputs: Tensor,
    *,
    loss: Loss,
    seed: int,
    norms: Sequence[float] = (0.1, 0.3, 1.0),
    threshold: float = THRESHOLD,
    relevance: Relevance = "matched",
    is_relative: bool = True,
    num_draws: int = 8,
) -> dict[str, float]:
    """How flat the loss is around a student, and along which of its nodes.

    - `sharpness`: the largest eigenvalue of the Hessian; `trace`: its trace, and
      `trace-per-parameter`; `effective`: trace / sharpness, how many directions as sharp as the
      sharpest would make the trace, 0 where the Hessian is 0.
    - for each hidden layer, `relevant/LAYER`: the share of its nodes that are relevant.
    - for each norm r besides, `moved-relevant@r/LAYER` and `moved-irrelevant@r/LAYER`: what moving
      nodes by r changes at the outputs, see `changes`; `moved-ratio@r/LAYER`: irrelevant over
      relevant, below 1 where the irrelevant are the freer. Where either kind has no nodes, nothing
      is moved, both changes are 0, and the ratio is 1.

    Nothing is NaN; a ratio is inf if moves of irrelevant nodes alone change anything. Sharpness and
    trace, unlike relative moves, depend on how a node is scaled: see `moved`.

    Source: 1905.13405, its explanation of flat minima.

    Args:
        params: the student's.
        goal: the teacher's.
        inputs: [sample, in].
        loss: `squared-error` or `cross-entropy`.
        seed: of the moves, at least 0.
        norms: of the moves, each above 0, as shares of a node's own norm if relative.
        threshold: see `relevant`.
        relevance: see `relevant`.
        is_relative: see `moved`.
        num_draws: of each kind, layer and norm, at least 1.

    Raises:
        ValueError: where `relevant`, `changes` or `curvature.hessian_top` refuse.
    """
    params, goal, inputs = curvature.doubled(params), curvature.doubled(goal), inputs.double()
    masks = relevant(params, goal, inputs, threshold=threshold, relevance=relevance)
    found = _curved(params, goal, inputs, loss)
    options: dict[str, Any] = {"seed": seed, "num_draws": num_draws, "is_relative": is_relative}
    for layer, mask in masks.items():
        found[f"relevant/{layer}"] = float(mask.double().mean())
        for norm in norms:
            one, rest = changes(params, layer, mask, norm, inputs, **options)
            found[f"moved-relevant@{norm:g}/{layer}"] = one
            found[f"moved-irrelevant@{norm:g}/{layer}"] = rest
            found[f"moved-ratio@{norm:g}/{layer}"] = _ratio(rest, one, both_zero=1.0)
    return found


def _curved(params: Params, goal: Params, inputs: Tensor, loss: Loss) -> dict[str, float]:
    sharpness = float(curvature.hessian_top(params, goal, inputs, loss, num=1))
    whole = curvature.trace(params, inputs, loss)
    return {
        "sharpness": sharpness,
        "trace": whole,
        "trace-per-parameter": whole / sum(value.numel() for value in params.values()),
        "effective": _ratio(whole, sharpness, both_zero=0.0),
    }


@torch.no_grad()
def _outputs(params: Params, inputs: Tensor) -> Tensor:
    return chains.outputs(params, inputs)


def _check_move(params: Params, layer: str, mask: Tensor, norm: float) -> None:
    curvature.check_plain(params, "params")
    hidden = layer_names(params)[:-1]
    if layer not in hidden:
        raise ValueError(f"`layer` must be a hidden layer, one of {hidden}; got {layer!r}.")
    num_nodes = len(params[f"{layer}.bias"])
    if mask.dtype != torch.bool or mask.shape != (num_nodes,):
        raise ValueError(
            f"the mask of `{layer}` must be bool [{num_nodes}], one for each node; got "
            f"{mask.dtype} {list(mask.shape)}."
        )
    if not 0 < norm < math.inf:
        raise ValueError(f"`norm` must be above 0 and finite; got {norm:g}.")
