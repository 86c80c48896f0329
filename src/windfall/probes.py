"""Probes: experiments that train a network and read numbers off it on the way.

readings = Flatness(laboratory=Laboratory(steps=1000)).read(course, seed=0)
"""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from windfall import biases, data, flatness, flops, models, seeds
from windfall.course import Course
from windfall.data import Data
from windfall.engines import separate
from windfall.engines.contract import Task
from windfall.flatness import Relevance
from windfall.initialize import Initialization, KaimingNormal, initial_parameters
from windfall.inputs import loaded
from windfall.laboratory import Laboratory
from windfall.measures import Readings
from windfall.models import ModelField
from windfall.spec import Spec
from windfall.train import Recipe, State

Fraction = Annotated[float, Field(ge=0, le=1)]
MOMENTS = (0.0, 0.01, 0.1, 0.3, 1.0)  # of the steps: much happens early


def steps_at(moments: tuple[float, ...], steps: int) -> tuple[int, ...]:
    """The steps at these fractions of a training, the last one too, ascending."""
    return tuple(sorted({*(round(each * steps) for each in moments), steps}))


def gathered(found: dict[int, dict[str, float]], *, diverged: bool) -> Readings:
    """Readings of numbers by step and name; the names are those of the first step."""
    names = next(iter(found.values()))
    values = {
        name: torch.tensor([each[name] for each in found.values()], dtype=torch.float64)
        for name in names
    }
    return Readings(torch.tensor(list(found)), values, diverged)


class Flatness(Spec):
    """How flat the loss is around a student, and along which of its nodes; see `flatness.measure`.

    Source: 1905.13405, its explanation of flat minima.

    Args:
        laboratory: the student's training; fully connected, without BatchNorm.
        moments: the fractions of its steps at which it is measured; its end is one besides.
        norms: by which incoming weights of nodes are moved.
        is_relative: as shares of their own norm; if not, as they are.
        relevance: which nodes are relevant: `matched` by a teacher node, or as many of largest
            `outgoing` norm.
        num_inputs: evaluation inputs that it is measured on, at most those that there are.
    """

    laboratory: Laboratory = Laboratory()
    moments: tuple[Fraction, ...] = MOMENTS
    norms: tuple[PositiveFloat, ...] = Field(default=(0.1, 1.0), min_length=1)
    is_relative: bool = True
    relevance: Relevance = "matched"
    num_inputs: PositiveInt = 512

    @model_validator(mode="after")
    def _is_plain(self) -> "Flatness":
        if self.laboratory.student.norm != "none" or self.laboratory.teacher.layers != "linear":
            raise ValueError(
                "`laboratory` must have fully connected layers without BatchNorm; got"
                f" {self.laboratory.teacher.layers} ones, norm {self.laboratory.student.norm}"
            )
        return self

    def check(self) -> None:
        """Refuse, by a `SpecError`, what cannot be trained or measured."""
        self.laboratory.check()

    def parent(self) -> Laboratory:
        """The training, which keeps the parameters of those moments."""
        steps = steps_at(self.moments, self.laboratory.steps)
        return self.laboratory.model_copy(update={"snapshots": steps})

    def metrics(self) -> list[str]:
        """The names of what is read."""
        moved = ("moved-relevant", "moved-irrelevant", "moved-ratio")
        return ["sharpness", "trace", "trace-per-parameter", "effective"] + [
            name
            for layer in self.laboratory.layers
            for name in (
                f"relevant/{layer}",
                *(f"{kind}@{norm:g}/{layer}" for norm in self.norms for kind in moved),
            )
        ]

    def read(self, course: Course, seed: int) -> Readings:
        """The readings of a training that was made.

        Args:
            course: the parent's.
            seed: of it.
        """
        goal = self.laboratory.goal(seed)
        inputs = self.laboratory.inputs.drawn(seed, 1).evaluation[: self.num_inputs].flatten(1)
        found: dict[int, dict[str, float]] = {}
        for step, params in course.moments().items():
            if all(bool(value.isfinite().all()) for value in params.values()):
                found[step] = flatness.measure(
                    params, goal, inputs, loss=self.laboratory.loss, seed=seed, norms=self.norms,
                    is_relative=self.is_relative, relevance=self.relevance,
                )  # fmt: skip
        return gathered(found, diverged=course.diverged)


class Biases(Spec):
    """The signs of BatchNorm's biases, and what ReLUs pass, of a network while it learns labels.

    Source: 1905.13405, figure 6; luckmatters, `check_models`. See `biases.summary`.

    Args:
        model: a network with BatchNorm.
        data: what it is trained on; readings are of the validation part.
        initialization: of its weights.
        recipe: how.
        moments: the fractions of its steps at which it is read; its end is one besides.
        num_inputs: validation inputs that are passed through it, at most those that there are.
    """

    model: ModelField = Field(default=models.Resnet_20(), validate_default=True)
    data: Data = data.Digits()
    initialization: Initialization = KaimingNormal()
    recipe: Recipe = Recipe()
    moments: tuple[Fraction, ...] = MOMENTS
    num_inputs: PositiveInt = 1000

    def metrics(self) -> list[str]:
        """The names of what is read, but for those of single layers."""
        halves = ("", "/lower", "/upper")
        return ["accuracy", *(f"{k}{h}" for k in ("negative", "passes") for h in halves)]

    def check(self) -> None:
        """Refuse, by a `SpecError`, a network without BatchNorm, or data that are missing."""
        biases.signs(dict(self._built().state_dict()))
        self._initial(0)

    def num_macs(self) -> int:
        """Multiply-adds of a forward pass of one input; this reads the data."""
        return sum(flops.multiply_adds(self._built(), loaded(self.data).input_shape).values())

    def _built(self) -> nn.Module:
        whole = loaded(self.data)
        return self.model.build(whole.input_shape, whole.num_classes).to(self.recipe.torch_dtype)

    def _initial(self, seed: int) -> State:
        def inputs() -> Tensor:
            return loaded(self.data).first(seed, self.recipe.batch_size, torch.float64)[0]

        return State(0, *initial_parameters(self._built, self.initialization, seed, inputs=inputs))

    def run(
        self, seed: int, state: State | None, pulse: Callable[[int, Callable[[], State]], None]
    ) -> Readings:
        """Train with a seed, from the beginning or a state, and read."""
        state = state or self._initial(seed)
        with seeds.isolated(seed, "init"):
            network = self._built()
        steps = steps_at(self.moments, self.recipe.steps)
        keep = frozenset(steps[:-1])
        task = Task(network, loaded(self.data), self.recipe, seed, self.recipe.steps, keep)
        ended = separate.train(task, state, pulse)
        moments = ended.snapshots | {ended.step: ended}
        found = {step: self._read(network, moment) for step, moment in sorted(moments.items())}
        return gathered(found, diverged=ended.diverged)

    def _read(self, network: nn.Module, state: State) -> dict[str, float]:
        tensors = state.params | state.buffers
        network.load_state_dict(dict(tensors))
        whole = loaded(self.data)
        part = whole.validation
        inputs = whole.prepare(part.inputs[: self.num_inputs], self.recipe.torch_dtype)
        relus = biases.passed(network, inputs)
        accuracy = _accuracy(network, inputs, part.labels[: self.num_inputs])
        return {"accuracy": accuracy} | biases.summary(biases.signs(tensors), relus)


@torch.no_grad()
def _accuracy(network: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    network.eval()
    right = (network(inputs).argmax(1) == labels).double().mean()
    network.train()
    return float(right)
