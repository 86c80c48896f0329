"""Connectivity: whether two networks that left one start lie in one valley of the loss.

They are *stable* to the noise of their training if the error does not rise on the straight line
between them.

    line = between(network, a, b, inputs, labels, training=batches)
    line.barrier                          # below `STABLE`: one valley
    distance(a, b, masks), angle(start, a, b), disagreement(outputs_a, outputs_b)

Source: Frankle et al. 2020, Linear Mode Connectivity and the Lottery Ticket Hypothesis
(1912.05671); distance and angle, Frankle et al. 2019, Stabilizing the LTH (1903.01611), section 2.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from windfall.masks import Params
from windfall.spec import SpecError

NUM_POINTS = 30  # Source: 1912.05671, section 2
STABLE = 0.02  # a barrier below it is none; Source: as above
CHUNK = 1000  # inputs of a forward pass: the memory that it takes, not its result


# -- on the line -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """What was found on the straight line between two networks.

    Args:
        shares: of the second network at each point, ascending from 0 to 1, [point], float64.
        losses: mean cross-entropies in nats, [point], float64.
        errors: shares of inputs whose largest output is not their label's, [point], float64.
    """

    shares: Tensor
    losses: Tensor
    errors: Tensor

    @property
    def barrier(self) -> float:
        """The error barrier, in [0, 1]; see `barrier`."""
        return barrier(self.errors)

    @property
    def loss_barrier(self) -> float:
        """The same of the losses, in nats, at least 0; NaN where a loss is."""
        return barrier(self.losses)

    @property
    def is_stable(self) -> bool:
        """Whether the error barrier is below `STABLE`."""
        return self.barrier < STABLE


def barrier(values: Tensor) -> float:
    """How much higher a line rises than its ends lie: max_i v_i - (v_1 + v_n) / 2.

    Source: 1912.05671, section 2 (linear interpolation instability).

    Args:
        values: at the points of a line, its ends first and last, [point].

    Returns:
        at least 0.
    """
    return float(values.max() - (values[0] + values[-1]) / 2)


def point(a: Params, b: Params, share: float) -> Params:
    """The tensors at a point of the line, (1 - s) a + s b; exactly a or b at its ends.

    Args:
        a: tensors by name.
        b: those of a network of the same names and shapes.
        share: s, in [0, 1].

    Returns:
        What is not floating (counters of batches) is a's.

    Raises:
        SpecError: when names or shapes differ.
    """
    refuse_unlike(a, b)
    return {n: torch.lerp(x, b[n], share) if x.is_floating_point() else x for n, x in a.items()}


def refuse_unlike(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: tuple[str, str] = ("a", "b")
) -> None:
    """Refuse, by a `SpecError`, two networks that no line joins: of other names or shapes.

    Args:
        a: tensors by name.
        b: those of the other.
        names: what the message calls them.
    """
    for name in [*a, *b]:
        expected, found = (_shape(tensors, name) for tensors in (a, b))
        if expected != found:
            one, other = names
            raise SpecError(
                f"`{other}` must have the tensors of `{one}`; got `{name}` of shape {found} where"
                f" that of `{one}` is {expected}. Take two networks of one shape."
            )


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(list(tensors[name].shape)) if name in tensors else "none"


def between(
    network: nn.Module,
    a: Params,
    b: Params,
    inputs: Tensor,
    labels: Tensor,
    *,
    training: Sequence[Tensor] = (),
    num_points: int = NUM_POINTS,
) -> Line:
    """Loss and error at evenly spaced points of the straight line between two networks.

    The statistics of BatchNorm are no weights, and a mean of two networks' is not the mean
    network's: they are estimated anew at every point, the ends too.

    Source: 1912.05671, section 2; Jordan et al. 2022 (2211.08403) for the statistics.

    Args:
        network: of which both are tensors; its own are left as they are.
        a: parameters and buffers by name, at share 0.
        b: the same at share 1.
        inputs: as the network is given them, [batch, *input_shape].
        labels: theirs, int64, [batch].
        training: batches of training inputs that statistics are estimated from; with none those
            on the line are means of both networks'.
        num_points: at least 2, the ends among them.

    Raises:
        SpecError: when the two differ in names or shapes, or there are too few points.
    """
    if num_points < 2:
        raise SpecError(f"`num_points` must be at least 2, the ends; got {num_points}.")
    own, shares = copy.deepcopy(network), torch.linspace(0, 1, num_points, dtype=torch.float64)
    found = [
        scores(outputs(own, point(a, b, share), inputs, training=training), labels)
        for share in shares.tolist()
    ]
    losses, errors = (torch.tensor(each, dtype=torch.float64) for each in zip(*found, strict=True))
    return Line(shares, losses, errors)


@torch.no_grad()
def outputs(
    network: nn.Module, tensors: Params, inputs: Tensor, *, training: Sequence[Tensor] = ()
) -> Tensor:
    """The logits of a network given its tensors, in evaluation mode, [batch, class].

    Args:
        network: overwritten by the tensors.
        tensors: parameters and buffers by name.
        inputs: [batch, *input_shape], at least one.
        training: batches that BatchNorm's statistics are estimated from; with none they stay.

    Raises:
        SpecError: when the tensors are another network's.
    """
    own = dict(network.named_parameters()) | dict(network.named_buffers())
    refuse_unlike(own, tensors, ("network", "tensors"))
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
    estimate_statistics(network, training)
    network.eval()
    return torch.cat([network(some) for some in inputs.split(CHUNK)])


@torch.no_grad()
def estimate_statistics(network: nn.Module, training: Iterable[Tensor]) -> None:
    """Set BatchNorm's running statistics to the means over batches of what each layer is given.

    Every batch is normalized by itself while it passes, as in training. Nothing else of the network
    changes; without BatchNorm or without batches nothing does.

    Source: Izmailov et al. 2018 (1803.05407), Algorithm 1, its last step.

    Args:
        network: left in evaluation mode but where there is nothing to do.
        training: batches, [batch, *input_shape].
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    batches = list(training)
    if not norms or not batches:
        return
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain mean over all batches
        norm.train()
    for batch in batches:
        network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def scores(outputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """The mean cross-entropy in nats, and the share of inputs that are not told right.

    An input whose outputs are not all finite is told wrong.

    Args:
        outputs: logits, [batch, class].
        labels: int64, [batch].
    """
    is_right = (outputs.argmax(1) == labels) & outputs.isfinite().all(1)
    return float(F.cross_entropy(outputs.double(), labels)), 1 - float(is_right.double().mean())


def disagreement(outputs: Tensor, others: Tensor) -> float:
    """The share of inputs for which two networks' largest outputs are of different classes.

    Source: 1912.05671, appendix on classification differences.

    Args:
        outputs: logits of the one, [batch, class].
        others: of the other, of the same inputs.

    Returns:
        in [0, 1].
    """
    return float((outputs.argmax(1) != others.argmax(1)).double().mean())


# -- among weights ---------------------------------------------------------------------------------


def _way(start: Params, end: Params, masks: Mapping[str, Tensor] | None) -> Tensor:
    """What is between two networks' parameters as one vector, float64, where masks keep weights."""
    refuse_unlike(start, end)
    moved = {name: (end[name].double() - value.double()) for name, value in start.items()}
    kept = masks or {}
    return torch.cat([v[kept[n]] if n in kept else v.flatten() for n, v in moved.items()])


def distance(a: Params, b: Params, masks: Mapping[str, Tensor] | None = None) -> float:
    """The L2 distance between two networks' parameters, ||a - b||.

    Source: 1903.01611, section 2.

    Args:
        a: parameters by name.
        b: those of a network of the same names and shapes.
        masks: of tensors by name; of these only the weights that are kept count. None counts all.

    Returns:
        in the unit of the weights, at least 0.

    Raises:
        SpecError: when names or shapes differ.
    """
    return float(_way(a, b, masks).norm())


def angle(start: Params, a: Params, b: Params, masks: Mapping[str, Tensor] | None = None) -> float:
    """The angle between the ways that two networks went from their start, in degrees.

        arccos(<a - o, b - o> / (||a - o|| ||b - o||))

    Source: 1903.01611, section 2.

    Args:
        start: o, the parameters that both began with.
        a: those of the one at its end.
        b: of the other.
        masks: as in `distance`.

    Returns:
        in [0, 180]; NaN where one of them has not moved.

    Raises:
        SpecError: when names or shapes differ.
    """
    one, other = (_way(start, end, masks) for end in (a, b))
    norms = float(one.norm()) * float(other.norm())
    if not norms or math.isnan(norms):
        return math.nan
    return math.degrees(math.acos(max(-1.0, min(1.0, float(one @ other) / norms))))
