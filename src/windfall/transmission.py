"""Transmission: signals of a network along its training, whole or pruned.

    of = Transmission(mask="ticket", level=8)
    readings = of.run(seed=0, grown=...)                # grown: what of.parent() read
    readings.values["forward"], readings.values["accuracy"]     # moment by moment

Source: Arpit & Bengio 2019 (1901.03611) for the norms of signals; Frankle et al. 2019, Stabilizing
the LTH (1903.01611) for what they go through.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import PositiveInt
from torch import Tensor

from windfall import connectivity, signals
from windfall.activations import Signal
from windfall.children import Masked
from windfall.engines import rule
from windfall.inputs import loaded
from windfall.levels import Pulse, ahead
from windfall.measures import START, Readings
from windfall.probes import MOMENTS, Fraction, gathered, steps_at
from windfall.signals import Signals
from windfall.spec import SpecError
from windfall.train import State

NUM_JACOBIANS = 8  # inputs: their mean tells arms apart, and each costs a pass for every output
LEAST, MOST = -45.0, 38.5  # log10 of the smallest and of the largest float32

UNITS = {
    "forward": "log10 |h| / |x|",
    "backward": "log10 |g₁| / |g|",
    "dead": "share of units",
    "always-on": "share of units",
    "correlation": "mean cosine",
    "rank": "effective rank",
    "jacobian": "log10 of singular value",
    "loss": "nats",
}


class Transmission(Masked):
    """How signals go through one network along its training, and how accurate it is by then.

    It begins with theta_k of the dense training, or with what a mask of a level leaves of it, and
    trains on in the order of the data that the dense network saw. Read at every moment, in
    evaluation mode, the signals on inputs of the validation part (see `signals`):

    - `forward`: log10 of the mean over inputs of |h| / |x|, h the last hidden activation;
      `backward`: of |g_1| / |g|, the gradients by what the first layer gives and by the outputs;
      `jacobian`: of the largest singular value of the outputs' derivative by the input, on the
      first 8 inputs. Each in [-45, 38.5], where float32 ends, 38.5 too where it is not finite;
    - `dead`, `always-on`: the shares of units that no input turns on, or all do, means over ReLUs;
    - `correlation`: the mean over pairs of inputs of the cosine of their h; `rank`: the effective
      rank of h;
    - `loss`: mean cross-entropy in nats, at most 10^38.5;
    - `forward/LAYER`, `dead/LAYER` of every hidden activation;
    - `accuracy`: on the test part; `dense-accuracy`: the dense network's at its end; `density`.

    `NAME@start` is the first of a signal's readings. A BatchNorm that has seen nothing has the
    statistics of the inputs, but for the accuracy, which is an evaluation's. What is not defined is
    NaN: shares without a finite ReLU, the correlation of what is 0, ratios over 0.

    A training that diverged has the accuracy of chance at every moment, and no moment at which a
    weight is not finite.

    Source: 1901.03611, |h_l| / |x| and |g_l| / |g_L|; Schoenholz et al. 2017 (1611.01232) for
    correlations; Roy & Vetterli 2007 for the effective rank.

    Args:
        model: the network, with an activation before its last layer.
        data: what it is trained on.
        initialization: of its weights, theta_0.
        recipe: how every network is trained.
        prune: how masks are found; single weights.
        rewind: k, less than the recipe's steps, and what becomes of the optimizer's state.
        engine: that trains; `auto` is the fixed rule's.
        mask: of the network; `dense` is none; `ticket` is found by the chain of this k; `random`
            has as many weights in every layer at random places (`shuffled` among arms).
        level: of the mask; 0 for `dense`.
        moments: the fractions of the steps from k on at which it is read; its start is the first
            and its end the last besides.
        num_inputs: validation inputs that are passed through it, at most those that there are.
    """

    num_children: ClassVar[int] = 1

    moments: tuple[Fraction, ...] = MOMENTS
    num_inputs: PositiveInt = 256

    def metrics(self) -> list[str]:
        """The names of what is read, but for those of single layers."""
        starts = [f"{name}{START}" for name in UNITS]
        return [*UNITS, "accuracy", "dense-accuracy", "density", *starts]

    def units(self) -> dict[str, str]:
        """The units of what is read, by name; those of single layers and of starts are theirs."""
        return UNITS

    def check(self) -> None:
        """Refuse, by a `SpecError`, what cannot be trained, pruned or measured."""
        super().check()
        network = self._network(0)
        tensors = dict(network.named_parameters()) | dict(network.named_buffers())
        _hidden(self._signals(State(0, tensors, {}), seed=0, num_inputs=2, num_jacobians=0))

    def run(
        self,
        seed: int,
        grown: Readings | None = None,
        state: State | None = None,
        pulse: Pulse = lambda *_: None,
    ) -> Readings:
        """Train with a seed, from the parent's or from a state, and read.

        Args:
            seed: at least 0.
            grown: the parent's readings.
            state: a training that was stopped, or None for the beginning.
            pulse: called before every step, as in `experiments.run`.

        Raises:
            SpecError: when the parent diverged, or a layer would be emptied.
        """
        assert grown is not None
        start = state or self._start(self._held(grown, seed), seed)
        before = self.parent().num_steps() - self.rewind.step
        keep = frozenset(self._read_at()[:-1])
        ended = self._trained(start, seed, seed, keep, ahead(pulse, before))
        constant = {
            "dense-accuracy": float(grown.values["dense-accuracy"][-1]),
            "density": rule.kept(ended),
        }
        moments = ended.snapshots | {ended.step: ended}
        found = {
            step: self._read(moment, seed, diverged=ended.diverged) | constant
            for step, moment in sorted(moments.items())
            if all(bool(weight.isfinite().all()) for weight in moment.params.values())
        }
        return gathered(found, diverged=ended.diverged)

    def _read_at(self) -> list[int]:
        """The steps of all moments, ascending."""
        first = self.rewind.step
        steps = steps_at((0.0, *self.moments), self.recipe.steps - first)
        return [first + step for step in steps]

    def _read(self, moment: State, seed: int, *, diverged: bool) -> dict[str, float]:
        whole, dtype = loaded(self.data), self.recipe.torch_dtype
        accuracy = 1 / whole.num_classes
        if not diverged:
            inputs = whole.prepare(whole.test.inputs, dtype)
            tensors = moment.params | moment.buffers
            outputs = connectivity.outputs(self._network(seed), tensors, inputs)
            accuracy = 1 - connectivity.scores(outputs, whole.test.labels)[1]
        found = self._signals(moment, seed, self.num_inputs, NUM_JACOBIANS)
        return summary(found) | {"accuracy": accuracy}

    def _signals(self, moment: State, seed: int, num_inputs: int, num_jacobians: int) -> Signals:
        whole, tensors = loaded(self.data), moment.params | moment.buffers
        part = whole.validation
        return signals.measured(
            self._network(seed),
            whole.prepare(part.inputs[:num_inputs], self.recipe.torch_dtype),
            part.labels[:num_inputs],
            tensors=tensors,
            seed=seed,
            num_jacobians=num_jacobians,
        )


def summary(found: Signals) -> dict[str, float]:
    """The signals that `Transmission` reads of a network, by name.

    Args:
        found: measured with labels.

    Raises:
        SpecError: when the network has no activation before its last layer.
    """
    hidden = _hidden(found)
    last, first = hidden[-1], next(each for each in found.layers if each.kind == "weights")
    top = math.inf if found.jacobian is None else float(found.jacobian.top[:, 0].mean())
    return {
        "forward": _ratio(last.norms, found.norms),
        "backward": _ratio(first.gradients, found.gradients),
        "dead": _mean([each.dead for each in hidden]),
        "always-on": _mean([each.always_on for each in hidden]),
        "correlation": _known(last.correlation),
        "rank": _known(last.effective_rank),
        "jacobian": _log(top),
        "loss": 10**MOST if found.loss is None else min(found.loss, 10**MOST),
        **{f"forward/{each.name}": _ratio(each.norms, found.norms) for each in hidden},
        **{f"dead/{each.name}": _known(each.dead) for each in hidden},
    }


def _hidden(found: Signals) -> list[Signal]:
    """The activations before the last layer, in the order in which they run."""
    kinds = [each.kind for each in found.layers]
    below = found.layers[: len(kinds) - 1 - kinds[::-1].index("weights")]
    hidden = [each for each in below if each.kind == "activation"]
    if not hidden:
        raise SpecError("`model` must have an activation before its last layer; got none.")
    return hidden


def _ratio(ones: Tensor | None, others: Tensor) -> float:
    """log10 of the mean of the ratios over others that are not 0; NaN where there are none."""
    if ones is None or not bool(others.any()):
        return math.nan
    return _log(float((ones / others)[others != 0].mean()))


def _log(value: float) -> float:
    """log10 of what is at least 0, within what is told."""
    if not math.isfinite(value):
        return MOST
    return min(MOST, max(LEAST, math.log10(value))) if value else LEAST


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _known(value: float | None) -> float:
    return math.nan if value is None else value
