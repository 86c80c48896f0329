"""Levels: iterative pruning with rewinding to step k, one training at a time.

A `Chain` is the training of one level, and begins from the one before. What it reads keeps all that
the next level, or another experiment, begins from:

    dense = Chain(level=0, rewind={"step": 100}).run(seed=0)
    ticket = Chain(level=1, rewind={"step": 100}).run(seed=0, grown=dense)
    ticket.values["accuracy"]

Source: Frankle et al. 2019, Stabilizing the LTH (1903.01611), section 3.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from windfall import data, flops, models, seeds, structure, tickets
from windfall.data import Data
from windfall.engines import dispatch, rule
from windfall.engines.contract import Task
from windfall.evidence import Outset
from windfall.initialize import GlorotNormal, Initialization, initial_parameters
from windfall.inputs import loaded
from windfall.masks import Params
from windfall.measures import Readings
from windfall.models import Kind, ModelField
from windfall.prune import Prune, ToStep
from windfall.runs import Pruned
from windfall.spec import Spec, SpecError, tag, unaddressed
from windfall.tickets import Lineage
from windfall.train import Recipe, State

Pulse = Callable[[int, Callable[[], State]], None]


def ahead(pulse: Pulse, steps: int) -> Pulse:
    """A pulse that counts the steps that went before."""
    return lambda step, state: pulse(steps + step, state)


def at_end(values: dict[str, float], step: int, kept: Params, *, diverged: bool) -> Readings:
    """Readings of one moment, the end."""
    tensors = {n: torch.tensor([value], dtype=torch.float64) for n, value in values.items()}
    return Readings(torch.tensor([step]), tensors, diverged, kept)


class Rewound(Spec):
    """What a chain and the children of its networks share."""

    model: ModelField = Field(default=models.Mlp(hidden=(300, 100)), validate_default=True)
    data: Data = data.Digits()
    initialization: Initialization = GlorotNormal()
    recipe: Recipe = Recipe()
    prune: Prune = Prune()
    rewind: ToStep = ToStep()
    level: int = Field(default=0, ge=0)
    engine: rule.Asked = unaddressed("auto")

    @model_validator(mode="after")
    def _can_be(self) -> "Rewound":
        step, steps = self.rewind.step, self.recipe.steps
        if step >= steps:
            raise ValueError(f"`rewind.step` must be less than `recipe.steps`, {steps}; got {step}")
        if self.prune.is_structured:
            removed = tag(type(self.prune.structure))
            raise ValueError(f"`prune.structure` must be weights, which have masks; got {removed}")
        if self.recipe.sparsity:
            name = self.recipe.sparsity[0]
            raise ValueError(f"`recipe.{name}` must be left out, for children train without it")
        return self

    def check(self) -> None:
        """Refuse, by a `SpecError`, what cannot be trained or pruned; this reads the data."""
        whole, network = loaded(self.data), self._network(0)
        models.check_outputs(network, whole.input_shape, whole.num_classes, tag(type(self.model)))
        rule.choose(self.engine, network, whole.input_shape, 1.0, "cpu", self.recipe)
        self._initial(0)
        self._macs(self.level)

    def _chain(self, level: int) -> "Chain":
        """The chain of this network, data, recipe and pruning at a level."""
        shared: dict[str, Any] = {name: getattr(self, name) for name in Rewound.model_fields}
        shared["level"] = level
        return Chain(**shared)

    def trial(self) -> "Chain":
        """A training without a parent, whose steps take as long as those of the whole network."""
        return self._chain(0)

    def _steps(self, level: int) -> int:
        """Steps of all trainings up to that of a level of the chain."""
        return self.recipe.steps + level * (self.recipe.steps - self.rewind.step)

    # -- the network --

    def _built(self) -> nn.Module:
        whole = loaded(self.data)
        return self.model.build(whole.input_shape, whole.num_classes).to(self.recipe.torch_dtype)

    def _network(self, seed: int) -> nn.Module:
        with seeds.isolated(seed, "build"):
            return self._built()

    def _kinds(self, network: nn.Module) -> dict[str, Kind]:
        return models.kinds(network, loaded(self.data).input_shape)

    def _macs(self, level: int) -> Fraction:
        """Multiply-adds of a level's network for one input; a pool is taken to be pruned evenly."""
        network, shape = self._network(0), loaded(self.data).input_shape
        uses, kinds = flops.multiply_adds(network, shape), self._kinds(network)
        if not level:
            return Fraction(sum(uses.values()))
        params = dict(network.named_parameters())
        sizes = {name: params[name].numel() for name in kinds}
        counts = self.prune.selection.counts(sizes, kinds, level)
        pool = sum(size for name, size in sizes.items() if name not in counts)
        kept = {n: Fraction(counts[n], s) for n, s in sizes.items() if n in counts}
        even = Fraction(counts.get("", 0), pool or 1)
        return sum((uses[name] * kept.get(name, even) for name in uses), Fraction())

    def _total(self, level: int) -> Fraction:
        """Multiply-adds, step by step, of all trainings up to that of a level."""
        later = sum((self._macs(each) for each in range(1, level + 1)), Fraction())
        return self.recipe.steps * self._macs(0) + (self.recipe.steps - self.rewind.step) * later

    # -- training --

    def _initial(self, seed: int) -> State:
        def inputs() -> Tensor:
            return loaded(self.data).first(seed, self.recipe.batch_size, torch.float64)[0]

        return State(0, *initial_parameters(self._built, self.initialization, seed, inputs=inputs))

    def _held(self, grown: Readings | None, seed: int) -> State:
        """The end of the level before, theta_k and the dense network's end among its snapshots.

        Raises:
            SpecError: when it diverged, so that nothing can begin from it.
        """
        assert grown is not None, "the level before is trained first"
        if grown.diverged:
            raise SpecError(
                f"`recipe.learning_rate` must be one that the network to prune converges with; got"
                f" {self.recipe.learning_rate:g}, and seed {seed} diverged."
            )
        state = State.restored(
            grown.kept, {"step": self.recipe.steps, "diverged": False, "evaluations": []}
        )
        kinds = self._kinds(self._network(seed))  # in whose order masks are drawn
        state.masks = {name: state.masks[name] for name in kinds if name in state.masks}
        return state

    def _source(self, held: State, seed: int) -> State:
        """theta_k, that all children begin from."""
        return held.snapshots[self.rewind.step] if self.rewind.step else self._initial(seed)

    def _outset(self, initial: State, seed: int) -> Outset:
        """What criteria that look at the network before its training are given."""
        whole, tensors = loaded(self.data), initial.params | initial.buffers

        def network() -> nn.Module:
            return structure.given(self._network(seed), tensors).eval()

        def inputs(places: Tensor) -> Tensor:
            return whole.prepare(whole.train.inputs[places], torch.float64)

        return Outset(network, whole.input_shape, whole.train.labels, inputs)

    def _ticket(self, held: State, seed: int, level: int, *, is_random: bool = False) -> State:
        """m times theta_k at step k, proved; m is found in the level before, or shuffled."""
        start = Pruned(
            parent=self._chain(level - 1).address,
            prune=self.prune,
            level=level,
            arrange="shuffled" if is_random else "found",
            weights=self.rewind,
        )
        initial = self._initial(seed)
        lineage = Lineage(initial, held, self._source(held, seed), self._outset(initial, seed))
        state = tickets.begin(start, lineage, self._kinds(self._network(seed)), seed)
        state.step = self.rewind.step
        return state

    def _trained(
        self, state: State, seed: int, order: int, keep: frozenset[int], pulse: Pulse
    ) -> State:
        """A state at the end of its training."""
        whole, network = loaded(self.data), self._network(seed)
        density, recipe = rule.kept(state), self.recipe
        chosen = rule.choose(self.engine, network, whole.input_shape, density, "cpu", recipe)
        task = Task(network, whole, recipe, order, recipe.steps, keep)
        (ended,) = dispatch.train(
            chosen.engine, [task], [state], lambda step, now: pulse(step, lambda: now()[0])
        )
        return ended


class Chain(Rewound):
    """A level of iterative pruning with rewinding: prune the level before, return to step k, train.

    Level 0 is the dense network, trained from the beginning. At level l the weights that the end of
    level l - 1 leaves return to their values at step k of the dense training, theta_k, and train on
    to the last step.

    Source: 1903.01611, section 3; k = 0 is 1803.03635.

    Args:
        model: the network.
        data: what it is trained on; accuracies are of the test part.
        initialization: of its weights, theta_0.
        recipe: how every level is trained.
        prune: how masks are found; single weights.
        rewind: k, less than the recipe's steps, and what becomes of the optimizer's state.
        engine: that trains; `auto` is the fixed rule's.
        level: at least 0.
    """

    def parent(self) -> "Chain | None":
        """The level before; level 0 has none."""
        return self._chain(self.level - 1) if self.level else None

    def metrics(self) -> list[str]:
        """The names of what is read at the end."""
        return ["accuracy", "validation-accuracy", "dense-accuracy", "density"]

    def num_steps(self) -> int:
        """Of this training and all that it begins from."""
        return self._steps(self.level)

    def num_macs(self) -> int:
        """Multiply-adds for one input, the mean over all those steps."""
        return round(self._total(self.level) / self.num_steps())

    def run(
        self,
        seed: int,
        grown: Readings | None = None,
        state: State | None = None,
        pulse: Pulse = lambda *_: None,
    ) -> Readings:
        """Train with a seed, from the level before or a state, and read at the end.

        Args:
            seed: at least 0.
            grown: the parent's readings; None at level 0.
            state: a training that was stopped, or None for the beginning.
            pulse: called before every step, as in `experiments.run`.

        Returns:
            The readings, which keep what the next level begins from.

        Raises:
            SpecError: when the level before diverged, or a layer would be emptied.
        """
        step = self.rewind.step
        keep = frozenset({step} - {0}) if not self.level else frozenset[int]()
        held = self._held(grown, seed) if self.level else None
        begun = state or (self._initial(seed) if held is None else self._ticket_of(held, seed))
        before = self._steps(self.level - 1) - step if self.level else 0
        ended = self._trained(begun, seed, seed, keep, ahead(pulse, before))
        if held is not None:
            last = self.recipe.steps
            ended.snapshots = held.snapshots | {last: held.snapshots.get(last, held.copy())}
        return self._read(ended, grown)

    def _ticket_of(self, held: State, seed: int) -> State:
        return self._ticket(held, seed, self.level)

    def _read(self, ended: State, grown: Readings | None) -> Readings:
        look, chance = ended.evaluations[-1], 1 / loaded(self.data).num_classes
        accuracy = chance if ended.diverged else look.test_accuracy
        dense = accuracy if grown is None else float(grown.values["dense-accuracy"][-1])
        values = {
            "accuracy": accuracy,
            "validation-accuracy": chance if ended.diverged else look.validation_accuracy,
            "dense-accuracy": dense,
            "density": rule.kept(ended),
        }
        return at_end(values, self.recipe.steps, ended.tensors(), diverged=ended.diverged)
