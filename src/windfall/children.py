"""Children: networks that leave step k of one training with different noise, and where they end.

`Stability` trains two children of one network, whole or pruned, that see the data in different
orders, and measures whether a line of low error joins them:

    ticket = Stability(level=10, rewind={"step": 100})
    ticket.run(seed=0, grown=...).values["barrier"]     # grown: what ticket.parent() read

Source: Frankle et al. 2019, Stabilizing the LTH (1903.01611); Frankle et al. 2020, Linear Mode
Connectivity and the Lottery Ticket Hypothesis (1912.05671).
"""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from windfall import connectivity, masks
from windfall.arms import SHIFT
from windfall.connectivity import Line
from windfall.engines import rule
from windfall.inputs import loaded
from windfall.levels import Chain, Pulse, Rewound, ahead, at_end
from windfall.masks import Params
from windfall.measures import Readings
from windfall.train import State

NUM_SEEN = 1000  # training inputs that BatchNorm's statistics on the line are estimated from

Mask = Literal["dense", "ticket", "random"]
Points = Annotated[int, Field(ge=2, le=101)]  # two decimals name each


class Masked(Rewound):
    """What experiments share whose networks begin with theta_k, or with what a mask leaves of it.

    Args:
        mask: of the children; `dense` is none; `ticket` is found by the chain of this k; `random`
            has as many weights in every layer at random places (`shuffled` among arms).
        level: of the mask; 0 for `dense`.
    """

    num_children: ClassVar[int]  # that are trained from there

    mask: Mask = "ticket"
    level: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _level_has_mask(self) -> Self:
        if (self.mask == "dense") != (self.level == 0):
            rest = "be 0 for `mask` dense" if self.level else "be at least 1 for a mask"
            raise ValueError(f"`level` must {rest}; got {self.level} and {self.mask}")
        return self

    def parent(self) -> Chain:
        """The chain at the level that the mask is found in; the dense network for `dense`."""
        return self._chain(max(0, self.level - 1))

    def num_steps(self) -> int:
        """Of the children and all trainings that they begin from."""
        return self.parent().num_steps() + self._own_steps()

    def num_macs(self) -> int:
        """Multiply-adds for one input, the mean over all those steps."""
        own = self._own_steps() * self._macs(self.level)
        return round((self._total(max(0, self.level - 1)) + own) / self.num_steps())

    def _own_steps(self) -> int:
        return self.num_children * (self.recipe.steps - self.rewind.step)

    def _start(self, held: State, seed: int) -> State:
        """What the children begin with, at step k."""
        if self.level:
            return self._ticket(held, seed, self.level, is_random=self.mask == "random")
        state = self._source(held, seed).copy()
        state.step = self.rewind.step
        if self.rewind.optimizer == "reset":
            state.optimizer = {}
        return state


class Stability(Masked):
    """Whether two children of one network, trained on other orders of the data, end in one valley.

    Both begin with theta_k of the dense training, or with what a mask of a level leaves of it. The
    first sees the data in the order that the dense network saw, the second in another. Read at the
    end, by name:

    - `barrier`: the error barrier on the line between them, in [0, 1]; `stable`: 1 where it is
      below 2 %, else 0; `loss-barrier` in nats; `error/S` at the share S of the second child;
    - `distance`: L2, between all weights that are kept; `relative-distance`: over the mean distance
      that the children went from theta_k; `angle`: between their ways, in degrees;
    - `disagreement`: the share of test inputs that they tell differently;
    - `accuracy`: the mean of their test accuracies; `dense-accuracy`: the dense network's at its
      end; `density`;
    - of pruned ones, `matching`: 1 where the accuracy is at least the dense network's less the
      margin, else 0; `pruning-distance`: L2, from the dense network's end, pruned, to the first.

    Children that diverge tell by chance: their barrier and disagreement are 1 - 1/num_classes, they
    are neither stable nor matching, and distances are NaN.

    Source: 1912.05671, sections 2 to 4 (barrier, matching); 1903.01611, section 2 (distances).

    Args:
        model: the network.
        data: what it is trained on; readings are of the test part.
        initialization: of its weights, theta_0.
        recipe: how every network is trained.
        prune: how masks are found; single weights.
        rewind: k, less than the recipe's steps, and what becomes of the optimizer's state.
        engine: that trains; `auto` is the fixed rule's.
        mask: of the children; `dense` is none; `ticket` is found by the chain of this k; `random`
            has as many weights in every layer at random places (`shuffled` among arms).
        level: of the mask; 0 for `dense`.
        num_points: on the line, its ends among them, 2 to 101.
        num_inputs: test inputs that are tried on the line, at most those that there are.
        margin: of matching, in accuracy, at least 0.
    """

    num_children: ClassVar[int] = 2

    num_points: Points = connectivity.NUM_POINTS
    num_inputs: PositiveInt = 10_000
    margin: float = Field(default=0.002, ge=0)  # Source: 1912.05671, section 4

    def metrics(self) -> list[str]:
        """The names of what is read, but for the errors on the line."""
        names = ["barrier", "stable", "loss-barrier", "distance", "relative-distance", "angle"]
        names += ["disagreement", "accuracy", "dense-accuracy", "density"]
        return names + (["matching", "pruning-distance"] if self.level else [])

    def run(
        self,
        seed: int,
        grown: Readings | None = None,
        state: State | None = None,
        pulse: Pulse = lambda *_: None,
    ) -> Readings:
        """Train both children of a seed, from the parent's or from a state, and measure.

        Args:
            seed: at least 0.
            grown: the parent's readings.
            state: a training that was stopped, or None for the beginning.
            pulse: called before every step, as in `experiments.run`.

        Raises:
            SpecError: when the parent diverged, or a layer would be emptied.
        """
        assert grown is not None
        held = self._held(grown, seed)
        start = self._start(held, seed)
        ends = self._children(start, seed, state, pulse)
        values = self._measured(seed, start, ends)
        accuracy, dense = values["accuracy"], float(grown.values["dense-accuracy"][-1])
        values |= {"dense-accuracy": dense, "density": rule.kept(start)}
        if self.level:
            values["matching"] = float(accuracy >= dense - self.margin)
            values["pruning-distance"] = self._moved_by_pruning(held, ends[0])
        diverged = math.isnan(values["distance"])
        return at_end(values, self.recipe.steps, {}, diverged=diverged)

    def _children(
        self, start: State, seed: int, state: State | None, pulse: Pulse
    ) -> tuple[State, State]:
        """Both at their end; the first travels with the second's checkpoints, as its snapshot."""
        steps, step = self.recipe.steps, self.rewind.step
        before, none = self.parent().num_steps() - step, frozenset[int]()
        first = next(iter(state.snapshots.values()), None) if state else None
        if first is None:
            first = self._trained(state or start, seed, seed, none, ahead(pulse, before))
            state = start.copy()
            state.snapshots = {first.step: first.copy()}
        assert state is not None
        before += steps - step
        second = self._trained(state, seed, SHIFT + seed, none, ahead(pulse, before))
        return first, second

    def _measured(self, seed: int, start: State, ends: Sequence[State]) -> dict[str, float]:
        whole, network, dtype = loaded(self.data), self._network(seed), self.recipe.torch_dtype
        inputs = whole.prepare(whole.test.inputs, dtype)
        whence = [end.params | end.buffers for end in ends]
        found = [connectivity.outputs(network, tensors, inputs) for tensors in whence]
        chance = 1 / whole.num_classes
        is_whole = [bool(each.isfinite().all()) for each in found]
        rights = [1 - connectivity.scores(each, whole.test.labels)[1] for each in found]
        right = [each if whole else chance for each, whole in zip(rights, is_whole, strict=True)]
        values = {"accuracy": sum(right) / len(right)}
        if not all(is_whole):
            return values | self._lost(chance)
        line = self._line(seed, network, whence, inputs)
        return values | _on(line) | _apart(start, ends) | {"disagreement": _differ(found)}

    def _line(self, seed: int, network: nn.Module, ends: Sequence[Params], inputs: Tensor) -> Line:
        whole, num = loaded(self.data), self.num_inputs
        (a, b), labels = ends, whole.test.labels[:num]
        batches, num_points = [self._training(seed)], self.num_points
        return connectivity.between(
            network, a, b, inputs[:num], labels, training=batches, num_points=num_points
        )

    def _training(self, seed: int) -> Tensor:
        """Training inputs, one batch: the first of the first child's order."""
        return loaded(self.data).first(seed, NUM_SEEN, self.recipe.torch_dtype)[0]

    def _lost(self, chance: float) -> dict[str, float]:
        """What is read where a child diverged."""
        shares = torch.linspace(0, 1, self.num_points, dtype=torch.float64)
        names = ("loss-barrier", "distance", "relative-distance", "angle")
        values = {"barrier": 1 - chance, "stable": 0.0, "disagreement": 1 - chance}
        values |= dict.fromkeys(names, math.nan)
        return values | {_place(share): 1 - chance for share in shares.tolist()}

    def _moved_by_pruning(self, held: State, child: State) -> float:
        """The distance from the dense network's end under the child's mask to the child's."""
        dense = held.snapshots.get(self.recipe.steps, held)
        pruned = masks.apply(child.masks, dense.params)
        return connectivity.distance(pruned, child.params, child.masks)


def _place(share: float) -> str:
    return f"error/{share:.2f}"


def _on(line: Line) -> dict[str, float]:
    """What is read on the line."""
    errors = zip(line.shares.tolist(), line.errors.tolist(), strict=True)
    return {
        "barrier": line.barrier,
        "stable": float(line.is_stable),
        "loss-barrier": line.loss_barrier,
    } | {_place(share): error for share, error in errors}


def _apart(start: State, ends: Sequence[State]) -> dict[str, float]:
    """What is read among weights."""
    first, second = (end.params for end in ends)
    went = [connectivity.distance(start.params, end, start.masks) for end in (first, second)]
    apart = connectivity.distance(first, second, start.masks)
    return {
        "distance": apart,
        "relative-distance": 2 * apart / sum(went) if sum(went) else math.nan,
        "angle": connectivity.angle(start.params, first, second, start.masks),
    }


def _differ(found: Sequence[Tensor]) -> float:
    one, other = found
    return connectivity.disagreement(one, other)
