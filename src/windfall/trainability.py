"""Trainability: whether a network of some depth trains from some initialization.

deep = Mlp(hidden=(128,), repeat=100, norm="weight")
readings = Trainability(model=deep, initialization=WeightNorm()).run(seed=0)
"""

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat

from windfall.beginnings import Start
from windfall.engines import separate
from windfall.engines.contract import Task
from windfall.inputs import loaded
from windfall.masks import Params
from windfall.measures import Readings
from windfall.probes import gathered
from windfall.train import Recipe, State

Fraction = Annotated[float, Field(gt=0, lt=1)]


class Trainability(Start):
    """Whether a network trains, at the best of some learning rates.

    It is trained from the same start at every rate. Read at the end: `accuracy` on the validation
    part at the best rate, and `trains`, 1 where that is above the threshold; the same at each rate
    R, `accuracy@R` and `trains@R`; `signal`, the norm of the outputs' deviation from sample to
    sample before training over that of the inputs', as log10, at least -45. A training that
    diverged counts with its accuracy at the start.

    Source: Arpit et al. 2019 (1906.02341), its experiment on depth.

    Args:
        model: the network.
        initialization: of the weights.
        data: what it is trained on.
        recipe: how, but for its learning rate.
        learning_rates: those that are tried, each above 0.
        threshold: of accuracy, in (0, 1).
    """

    recipe: Recipe = Recipe(steps=600, eval_every=600, batch_size=128)
    learning_rates: tuple[PositiveFloat, ...] = Field(default=(0.01, 0.1), min_length=1)
    threshold: Fraction = 0.5

    def metrics(self) -> list[str]:
        """The names of what is read."""
        each = [f"{kind}@{rate:g}" for rate in self.learning_rates for kind in _KINDS]
        return [*_KINDS, "signal", *each]

    def num_steps(self) -> int:
        """Of all trainings."""
        return len(self.learning_rates) * self.recipe.steps

    @property
    def _dtype(self) -> torch.dtype:
        return self.recipe.torch_dtype

    @property
    def _num_seen(self) -> int:
        return self.recipe.batch_size

    def run(self, seed: int, pulse: Callable[[int], None] = lambda _: None) -> Readings:
        """Train with a seed at every rate.

        Args:
            seed: at least 0.
            pulse: called before every step, with the number of steps so far; it may raise to stop.
        """
        params, buffers = self._begun(seed)
        found = {"signal": self._signal(params | buffers, seed)}
        for place, rate in enumerate(self.learning_rates):
            recipe = self.recipe.model_copy(update={"learning_rate": rate})
            task = Task(self._built(), loaded(self.data), recipe, seed, recipe.steps)
            before = place * recipe.steps
            start = State(0, params, buffers).copy()
            ended = separate.train(task, start, lambda step, _, so_far=before: pulse(so_far + step))
            accuracy = ended.evaluations[0 if ended.diverged else -1].validation_accuracy
            found[f"accuracy@{rate:g}"] = accuracy
            found[f"trains@{rate:g}"] = float(accuracy > self.threshold)
        for kind in _KINDS:
            found[kind] = max(found[f"{kind}@{rate:g}"] for rate in self.learning_rates)
        return gathered({self.num_steps(): found}, diverged=False)

    @torch.no_grad()
    def _signal(self, tensors: Params, seed: int) -> float:
        inputs, _ = self._batch(seed)
        outputs = torch.func.functional_call(self._built(), tensors, (inputs,))
        one, other = (values.flatten(1) for values in (outputs, inputs))
        ratio = float((one - one.mean(0)).norm()) / float((other - other.mean(0)).norm())
        return min(45.0, math.log10(max(ratio, 1e-45))) if math.isfinite(ratio) else 45.0


_KINDS = ("trains", "accuracy")
