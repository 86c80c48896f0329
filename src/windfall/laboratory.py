"""The laboratory: students that learn from teachers.

An experiment is a value; with a seed it is one training, from which comes a `Course`:

    course = Laboratory(student=Student(multi=5), steps=10_000).course(seed=0)
    course.alignment("hidden1")[-1]      # mean over teacher nodes of the best student's correlation

The seed names the teacher, the student, the inputs and their order: experiments that differ in the
student alone are paired. A training can be paused and goes on bit for bit.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from windfall import chains, dynamics, teachers
from windfall.chains import layer_names, nodes
from windfall.course import COUPLINGS, Course, Look, gathered, ordered
from windfall.inputs import AHEAD, Gaussian, Inputs, Real
from windfall.masks import Params
from windfall.pretrained import Trained
from windfall.products import Products
from windfall.spec import FAMILY, Json, Spec, SpecError
from windfall.students import Student, Subset
from windfall.teachers import Teacher

NUM_GRADIENT = 256  # evaluation inputs that the expected update is taken over: they steer nothing
NUM_OUTPUTS = 100  # of a random teacher, where none is said
RARELY = 10  # measurements for one of couplings, which cost more


class Laboratory(Spec):
    """A deep ReLU student learns the outputs of a deep ReLU teacher, by SGD without momentum.

    The loss of squared errors is (y* - y)², meaned over the batch and the outputs; that of
    cross-entropy has the teacher's largest output as label.

    Source: 1905.13405; luckmatters, `recon_multilayer` with its README's learning rate.

    Args:
        teacher: random, or trained on its inputs' labels; seed s has number `teacher.seed` + s.
        student: how wide, how it begins.
        subset: train the student, prune it to some of its nodes, and train those; None: once.
        inputs: what teacher and student see.
        num_outputs: of teacher and student; None is 100, or a trained teacher's classes.
        loss: see above.
        learning_rate: of every step, above 0.
        batch_size: inputs of a step.
        steps: of the training; 62,500 are forty passes over 100,000 inputs.
        measure_every: steps between measurements; the first ones and the last step come besides.
        num_coupled: evaluation inputs that H, beta and L are taken over, now and then; 0: never.
        snapshots: steps whose parameters are kept, beside the last.
        dtype: of parameters and arithmetic.
    """

    teacher: Annotated[Teacher | Trained, FAMILY] = Teacher()
    student: Student = Student()
    subset: Subset | None = None
    inputs: Inputs = Gaussian()
    num_outputs: PositiveInt | None = None
    loss: Literal["squared-error", "cross-entropy"] = "squared-error"
    learning_rate: PositiveFloat = 0.05
    batch_size: PositiveInt = 64
    steps: int = Field(default=62_500, ge=1)
    measure_every: PositiveInt = 1563  # a pass over the inputs
    num_coupled: NonNegativeInt = 128
    snapshots: tuple[NonNegativeInt, ...] = ()
    dtype: Literal["float32", "float64"] = "float32"

    @model_validator(mode="after")
    def _fits(self) -> "Laboratory":
        """Refuse a teacher that cannot be, and a student of another one, before anything starts."""
        self.student.sizes(self.hidden)
        if isinstance(self.teacher, Trained):
            if not isinstance(self.inputs, Real):
                raise ValueError(
                    "`inputs` must be real data for a trained teacher, which needs labels; got"
                    " gaussian"
                )
            if self.num_outputs is not None:
                raise ValueError(
                    "`num_outputs` must be left out for a trained teacher, which has one a class;"
                    f" got {self.num_outputs}"
                )
        if isinstance(self.inputs, Gaussian):
            self.check()
        if any(step > self.steps for step in self.snapshots):
            raise ValueError(
                f"`snapshots` must be steps of the training, 0 to {self.steps:,}; got"
                f" {list(self.snapshots)}"
            )
        return self

    def check(self) -> None:
        """Refuse what cannot be trained; where the inputs are real, this reads them.

        Raises:
            SpecError: when there is no such teacher, or the data are missing.
        """
        if isinstance(self.teacher, Trained):
            self.teacher.begun(self.inputs.shape, self._num_outputs())
        else:
            self.goal(0)

    @property
    def hidden(self) -> tuple[int, ...]:
        """The sizes of the teacher's hidden layers."""
        return self.teacher.active if isinstance(self.teacher, Trained) else self.teacher.hidden

    @property
    def layers(self) -> list[str]:
        """The names of the hidden layers, the lowest first."""
        return [f"hidden{layer}" for layer in range(1, len(self.hidden) + 1)]

    def goal(self, seed: int) -> Params:
        """The teacher of a seed, float64."""
        teacher = self.teacher.model_copy(update={"seed": self.teacher.seed + seed})
        if isinstance(teacher, Teacher):
            return teacher.parameters(self.inputs.shape, self._num_outputs())
        assert isinstance(self.inputs, Real)
        return teacher.parameters(self.inputs.loaded())

    def parent(self) -> "Laboratory | None":
        """The experiment whose student is pruned to the subset."""
        return self.model_copy(update={"subset": None}) if self.subset else None

    def course(self, seed: int, pulse: "Pulse" = lambda *_: None) -> Course:
        """Train from the start to the last step; see `Training.run`."""
        parent = self.parent()
        grown = parent.course(seed) if parent else None
        return Training(self, seed, parent=grown).run(pulse)

    def measures(self, step: int) -> bool:
        """Whether the student is measured after so many steps: early often, later regularly."""
        is_early = step < self.measure_every and step & (step - 1) == 0  # 0, 1, 2, 4, 8, ...
        is_regular = step % self.measure_every == 0 or step == self.steps
        return is_early or is_regular or step in self.snapshots

    def couples(self, step: int) -> bool:
        """Whether H, beta and L are measured too: at the start, rarely, and at the end."""
        is_regular = step % (RARELY * self.measure_every) == 0 or step == self.steps
        return self.num_coupled > 0 and (is_regular or step == self.measure_every)

    def num_macs(self) -> int:
        """Multiply-adds of the student for one input; of a subset, those of its most nodes.

        Where the inputs are real, this reads them.
        """
        hidden = self.hidden if self.subset else self.student.sizes(self.hidden)
        shape, layers = self.inputs.shape, self.teacher.layers
        shapes = teachers.layer_shapes(hidden, layers, shape, self._num_outputs())
        positions = [
            chains.positions(shape, layer) if layers == "convolutional" else 1
            for layer in range(1, len(hidden) + 1)
        ]
        return sum(
            num * math.prod(each)
            for num, each in zip([*positions, 1], shapes.values(), strict=True)
        )

    def _num_outputs(self) -> int:
        if isinstance(self.teacher, Trained):
            assert isinstance(self.inputs, Real)
            return self.inputs.loaded().num_classes
        return self.num_outputs or NUM_OUTPUTS

    @property
    def num_epochs(self) -> float:
        """Passes over Gaussian training inputs; nan where each is seen once."""
        num = self.inputs.num_train if isinstance(self.inputs, Gaussian) else None
        return self.steps * self.batch_size / (num or math.nan)


Pulse = Callable[[int, Callable[[], "State"]], None]


@dataclass(frozen=True)
class State:
    """A laboratory in the middle of a training; shares no storage with it."""

    params: Params
    looks: list[Look]

    def tensors(self) -> Params:
        """Everything that is a tensor under one flat set of names, for a file."""
        flat: Params = {f"params/{name}": value for name, value in self.params.items()}
        for place, look in enumerate(self.looks):
            flat |= {f"looks/{place}/{name}": value for name, value in look.tensors().items()}
        return flat

    def facts(self) -> Json:
        """Everything else, JSON-able."""
        return {"steps": [look.step for look in self.looks]}

    @classmethod
    def restored(cls, tensors: Params, facts: Json) -> "State":
        """The state that `tensors` and `facts` describe."""

        def under(prefix: str) -> Params:
            held = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            return ordered(held)

        looks = [
            Look.restored(step, under(f"looks/{place}/"))
            for place, step in enumerate(facts["steps"])
        ]
        return cls(under("params/"), looks)


class Training:
    """One training: the student, its teacher, and what was measured so far.

    Args:
        settings: of the experiment.
        seed: at least 0.
        state: where it goes on, or None for the beginning.
        parent: the course of the experiment's parent, if it has one.
    """

    def __init__(
        self,
        settings: Laboratory,
        seed: int,
        state: State | None = None,
        parent: Course | None = None,
    ) -> None:
        self.settings, self.seed = settings, seed
        dtype = torch.float64 if settings.dtype == "float64" else torch.float32
        goal = settings.goal(seed)
        self.goal: Params = {name: value.to(dtype) for name, value in goal.items()}
        self.num_outputs = len(goal["output.bias"])
        self.heirs: Params = {}
        begun = state.params if state else settings.student.parameters(goal, seed)
        if settings.subset:
            assert parent is not None, "a subset is pruned from a student that was trained"
            kept = survivors(settings, seed, parent)
            self.heirs = {n: _places(kept[n], dynamics.winners(parent.last[n])) for n in kept}
            begun = state.params if state else inherited(settings, goal, seed, parent, kept)
        begun = {n: v.to(dtype) if v.is_floating_point() else v for n, v in begun.items()}
        self.network = chains.build(begun, settings.student.norm)
        self.params: Params = dict(self.network.state_dict(keep_vars=True))
        self.looks = list(state.looks) if state else []
        self.step = self.looks[-1].step if self.looks else 0
        self.inputs = settings.inputs.drawn(seed, settings.batch_size)
        self.evaluation, self.training = (
            values.to(dtype) for values in (self.inputs.evaluation, self.inputs.training)
        )
        teacher = chains.build(self.goal)
        self.seen = nodes(teacher, self.evaluation)
        self.answers, self.taught = (
            chains.outputs(self.goal, values) for values in (self.evaluation, self.training)
        )
        error = None if settings.loss == "squared-error" else self.error
        is_plain = settings.student.norm == "none" and not chains.is_convolutional(goal)
        self.advance: Callable[[Tensor, Tensor], None] = (
            Products(self.params, self.rate, settings.batch_size, error).advance
            if is_plain
            else self.descend
        )

    # -- a step --

    def error(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Minus the loss's gradient by the outputs, [batch, output], times half the outputs."""
        if self.settings.loss == "squared-error":
            return (answers - outputs).div_(len(outputs))
        labels = F.one_hot(answers.argmax(1), answers.shape[1]).to(outputs)
        return (labels - outputs.softmax(1)).mul_(self.num_outputs / 2 / len(outputs))

    def descend(self, inputs: Tensor, answers: Tensor) -> None:
        """A step by automatic differentiation, of any student."""
        self._differentiate(inputs, answers)
        with torch.no_grad():
            for param in self.network.parameters():
                assert param.grad is not None
                param.sub_(param.grad, alpha=self.rate)

    def _differentiate(self, inputs: Tensor, answers: Tensor) -> None:
        for param in self.network.parameters():
            param.grad = None
        outputs = self.network(inputs)
        outputs.backward(-self.error(outputs.detach(), answers))

    @property
    def rate(self) -> float:
        """The learning rate, times 2 / outputs: the mean over outputs, and the square's 2."""
        return 2 * self.settings.learning_rate / self.num_outputs

    def _taught(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and the teacher's answers, step by step; answered a block at a time, for speed."""
        size, (block, begun) = self.settings.batch_size, divmod(self.step, AHEAD)
        while True:
            inputs = self.inputs.block(block).to(self.evaluation)
            answers = chains.outputs(self.goal, inputs)
            pairs = zip(inputs.split(size), answers.split(size), strict=True)
            yield from itertools.islice(pairs, begun, None)
            block, begun = block + 1, 0

    # -- measuring --

    def look(self) -> Look:
        """Measure the student as it is."""
        self.network.eval()
        try:
            return self._look()
        finally:
            self.network.train()

    def _look(self) -> Look:
        seen = nodes(self.network, self.evaluation)
        params = {name: value.detach() for name, value in self.params.items()}
        keeps = self.step in self.settings.snapshots and self.step < self.settings.steps
        couples = self.settings.couples(self.step)
        return Look(
            self.step,
            self._scores(),
            {name: dynamics.correlation(self.seen[name], seen[name]) for name in self.seen},
            {name: params[f"{name}.weight"].flatten(1).norm(dim=1) for name in self.seen},
            chains.outgoing_norms(params),
            self._gradient_norms(),
            self._couplings(params) if couples else {},
            _copied(params) if keeps else {},
        )

    @torch.no_grad()
    def _scores(self) -> Tensor:
        pairs = ((self.evaluation, self.answers), (self.training, self.taught))
        found = [(self.network(inputs), answers) for inputs, answers in pairs]
        losses = [self._loss(outputs, answers) for outputs, answers in found]
        agreed = [(one.argmax(1) == other.argmax(1)).double().mean() for one, other in found]
        return torch.stack([*losses, *agreed])

    def _loss(self, outputs: Tensor, answers: Tensor) -> Tensor:
        if self.settings.loss == "squared-error":
            return F.mse_loss(outputs, answers).double()
        return F.cross_entropy(outputs, answers.argmax(1)).double()

    def _gradient_norms(self) -> Params:
        """By layer, the L2 norm of the expected update: of half the outputs times the loss."""
        self._differentiate(self.evaluation[:NUM_GRADIENT], self.answers[:NUM_GRADIENT])
        found: Params = {}
        for name in layer_names(self.params):
            grads = [self.params[f"{name}.{kind}"].grad for kind in ("weight", "bias")]
            found[name] = torch.cat([g.flatten() for g in grads if g is not None]).norm()
        return found

    @torch.no_grad()
    def _couplings(self, params: Params) -> Params:
        if self.settings.student.norm != "none" or chains.is_convolutional(params):
            return {}
        inputs = self.evaluation[: self.settings.num_coupled].flatten(1)
        found = dynamics.couplings(params, self.goal, inputs)
        return {
            f"{kind}/{name}": matrix[: len(params[f"{name}.weight"])].norm(dim=1)
            for kind in COUPLINGS
            for name, matrix in getattr(found, kind).items()
            if name != "output"
        }

    def state(self) -> State:
        """The training now."""
        params = _copied(self.params)
        return State(params, list(self.looks))

    def run(self, pulse: Pulse = lambda *_: None) -> Course:
        """Train to the last step, or until it diverges.

        Args:
            pulse: called after every measurement with the step and a function that gives the
                state, from which another training goes on; it may raise to stop this one.
        """
        settings, total = self.settings, self.settings.steps
        if not self.looks:
            self.looks.append(self.look())
        pairs, is_finite = self._taught(), True
        while self.step < total and is_finite:
            self.advance(*next(pairs))
            self.step += 1
            if settings.measures(self.step):
                self.looks.append(self.look())
                is_finite = bool(self.looks[-1].scores[0].isfinite())
                pulse(self.step, self.state)
        dead = {name: dynamics.dead(seen) for name, seen in self.seen.items()}
        diverged = not bool(self.looks[-1].scores[0].isfinite())
        return gathered(self.looks, dead, self.state().params, self.heirs, diverged=diverged)


def _copied(params: Params) -> Params:
    layout = torch.contiguous_format  # a view's own would hold what is not its
    return {n: value.detach().clone(memory_format=layout) for n, value in params.items()}


def survivors(settings: Laboratory, seed: int, parent: Course) -> dict[str, Tensor]:
    """The nodes of the parent's student that the subset keeps, by hidden layer.

    Raises:
        SpecError: when the parent diverged, so that it has no winners.
    """
    assert settings.subset is not None
    if parent.diverged:
        raise SpecError(
            f"`learning_rate` must be one that the student to prune converges with; got"
            f" {settings.learning_rate:g}, and seed {seed} diverged."
        )
    won = {layer: parent.winners(layer) for layer in parent.layers}
    sizes = {layer: rho.shape[1] for layer, rho in parent.last.items()}
    return settings.subset.kept(won, sizes, seed)


def inherited(
    settings: Laboratory, goal: Params, seed: int, parent: Course, kept: dict[str, Tensor]
) -> Params:
    """The parameters that a subset begins with, float64 or the parent's own."""
    assert settings.subset is not None
    weights = settings.subset.weights
    drawn = settings.student.parameters(goal, seed, redrawn=weights == "redrawn")
    return chains.restricted(parent.params if weights == "final" else drawn, kept)


def _places(kept: Tensor, nodes: Tensor) -> Tensor:
    """Where nodes stand among those that were kept; -1 where they were not."""
    found = (nodes[:, None] == kept).long()
    return torch.where(found.any(1), found.argmax(1), -1)
