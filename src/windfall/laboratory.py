"""The laboratory: students that learn from teachers, and what happens to their nodes on the way.

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
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from windfall import dynamics, seeds, simulation
from windfall.batches import Order
from windfall.masks import Params
from windfall.simulation import Matrices
from windfall.spec import FAMILY, Spec
from windfall.teachers import Student, Teacher, layer_names, nodes

AHEAD = 64  # steps whose inputs are drawn at once; it does not change the draws
NUM_GRADIENT = 256  # evaluation inputs that the expected update is taken over: they steer nothing


# -- what comes of it ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """What an experiment went through, at every step that was measured.

    Args:
        steps: [time], int64, from 0.
        loss: [time], on the evaluation inputs, in the experiment's unit.
        best: by hidden layer, each teacher node's highest correlation, [time, teacher node].
        outgoing: by hidden layer, the L2 norms of the weights that read each student node,
            [time, student node].
        gradient: by layer, the L2 norm of its expected update, [time]; empty in the matrix form.
        first: by hidden layer, rho at the start, [teacher node, student node].
        last: the same at the last step.
        frames: rho of the lowest hidden layer, [time, teacher node, student node].
        dead: by hidden layer, which teacher nodes give the same on all inputs, [teacher node].
        diverged: True when the loss was NaN or infinite at the last step measured.
    """

    steps: Tensor
    loss: Tensor
    best: Params
    outgoing: Params
    gradient: Params
    first: Params
    last: Params
    frames: Tensor
    dead: Params
    diverged: bool = False

    @property
    def layers(self) -> list[str]:
        """The hidden layers, the lowest first."""
        return list(self.best)

    def alignment(self, layer: str) -> Tensor:
        """The mean over teacher nodes of the best student node's correlation, [time].

        Dead teacher nodes count with their correlation of 0.

        Source: 1905.13405; luckmatters, `recon_multilayer.getCorrs`.
        """
        return self.best[layer].mean(1)

    def ranks(self, layer: str) -> Tensor:
        """The winners' places at the start, [teacher node that is alive]; see `dynamics.ranks`."""
        found = dynamics.ranks(self.first[layer], dynamics.winners(self.last[layer]))
        return found[~self.dead[layer]]

    def matched(self, layer: str, threshold: float = 0.9) -> Tensor:
        """Which student nodes end above the threshold with some teacher node, [student node]."""
        return dynamics.is_matched(self.last[layer], threshold)

    def tensors(self) -> Params:
        """Everything under one flat set of names, for a file."""
        flat = {"steps": self.steps, "loss": self.loss, "frames": self.frames}
        for kind in _BY_LAYER:
            flat |= {f"{kind}/{layer}": value for layer, value in getattr(self, kind).items()}
        return flat

    @classmethod
    def restored(cls, tensors: Params, *, diverged: bool) -> "Course":
        """The course that `tensors` describe."""
        parts: dict[str, Params] = {kind: {} for kind in _BY_LAYER}
        for path, tensor in sorted(tensors.items()):
            kind, slash, layer = path.partition("/")
            if slash and kind in parts:
                parts[kind][layer] = tensor
        return cls(
            tensors["steps"],
            tensors["loss"],
            frames=tensors["frames"],
            diverged=diverged,
            **parts,
        )


_BY_LAYER = ("best", "outgoing", "gradient", "first", "last", "dead")


@dataclass(frozen=True)
class Look:
    """One measurement: a `Course` at one step, without its axis of time."""

    step: int
    loss: Tensor
    rho: Params
    outgoing: Params
    gradient: Params


def _course(looks: list[Look], dead: Params, *, diverged: bool) -> Course:
    first, last = looks[0], looks[-1]
    lowest = next(iter(first.rho))
    return Course(
        torch.tensor([look.step for look in looks]),
        torch.stack([look.loss for look in looks]),
        {n: torch.stack([dynamics.best(look.rho[n]) for look in looks]) for n in first.rho},
        {n: torch.stack([look.outgoing[n] for look in looks]) for n in first.outgoing},
        {n: torch.stack([look.gradient[n] for look in looks]) for n in first.gradient},
        first.rho,
        last.rho,
        torch.stack([look.rho[lowest] for look in looks]),
        dead,
        diverged,
    )


# -- the laboratory --------------------------------------------------------------------------------


class Inputs(Spec):
    """Gaussian inputs, x ~ N(0, std² I).

    Source: luckmatters, `recon_multilayer`'s defaults.

    Args:
        dimension: of x.
        std: of each coordinate, above 0.
        num_train: training inputs, seen in an endless seeded order; None draws every batch afresh.
        num_evaluation: inputs that losses and correlations are measured on, never trained on.
    """

    dimension: PositiveInt = 20
    std: PositiveFloat = 10.0
    num_train: PositiveInt | None = 100_000
    num_evaluation: PositiveInt = 1024

    def evaluation(self, seed: int) -> Tensor:
        """The inputs to measure on, [sample, dimension], float32."""
        return self._drawn(seed, "evaluation-inputs", 0, self.num_evaluation)

    def batches(self, seed: int, batch_size: int, step: int) -> Iterator[Tensor]:
        """The batches of this step and of every later one, [batch, dimension], float32."""
        if self.num_train is None:
            yield from self._fresh(seed, batch_size, step)
            return
        whole = self._drawn(seed, "inputs", 0, self.num_train)
        order = Order(seed, self.num_train, batch_size)
        while True:
            for indices in order.batches(step, AHEAD):
                yield whole.index_select(0, torch.from_numpy(indices))
            step += AHEAD

    def _fresh(self, seed: int, batch_size: int, step: int) -> Iterator[Tensor]:
        block, begun = divmod(step, AHEAD)
        while True:
            drawn = self._drawn(seed, "inputs", block, AHEAD * batch_size)
            yield from drawn.split(batch_size)[begun:]
            block, begun = block + 1, 0

    def _drawn(self, seed: int, purpose: str, index: int, num: int) -> Tensor:
        draws = seeds.stream(seed, purpose, index).standard_normal((num, self.dimension))
        return torch.from_numpy(self.std * draws).float()


class Laboratory(Spec):
    """A deep ReLU student learns the outputs of a deep ReLU teacher, by SGD without momentum.

    The loss of squared errors is (y* - y)², meaned over the batch and the outputs; that of
    cross-entropy has the teacher's largest output as label.

    Source: 1905.13405; luckmatters, `recon_multilayer` with its README's learning rate.

    Args:
        teacher: seed s has the random teacher number `teacher.seed` + s.
        student: how wide, how it begins.
        inputs: what both see.
        num_outputs: of teacher and student.
        loss: see above.
        learning_rate: of every step, above 0.
        batch_size: inputs of a step.
        steps: of the training; 62,500 are forty passes over 100,000 inputs.
        measure_every: steps between measurements; the first ones and the last step come besides.
        dtype: of parameters and arithmetic.
    """

    teacher: Teacher = Teacher()
    student: Student = Student()
    inputs: Inputs = Inputs()
    num_outputs: PositiveInt = 100
    loss: Literal["squared-error", "cross-entropy"] = "squared-error"
    learning_rate: PositiveFloat = 0.05
    batch_size: PositiveInt = 64
    steps: int = Field(default=62_500, ge=1)
    measure_every: PositiveInt = 1563  # a pass over the inputs
    dtype: Literal["float32", "float64"] = "float32"

    @model_validator(mode="after")
    def _fits(self) -> "Laboratory":
        """Refuse a teacher that cannot be, and a student of another one, before anything starts."""
        goal = self.teacher.parameters(self.inputs.dimension, self.num_outputs)
        self.student.parameters(goal, 0)
        return self

    def course(self, seed: int, pulse: "Pulse" = lambda *_: None) -> Course:
        """Train from the start to the last step; see `Training.run`."""
        return Training(self, seed).run(pulse)

    def measures(self, step: int) -> bool:
        """Whether the student is measured after so many steps: early often, later regularly."""
        is_early = step < self.measure_every and step & (step - 1) == 0  # 0, 1, 2, 4, 8, ...
        return is_early or step % self.measure_every == 0 or step == self.steps

    @property
    def num_epochs(self) -> float:
        """Passes over the training inputs; nan where each is seen once."""
        return self.steps * self.batch_size / (self.inputs.num_train or math.nan)


Pulse = Callable[[int, Callable[[], "State"]], None]


@dataclass(frozen=True)
class State:
    """A laboratory in the middle of a training; shares no storage with it."""

    params: Params
    looks: list[Look]


class Training:
    """One training: the student, its teacher, and what was measured so far.

    Args:
        settings: of the experiment.
        seed: at least 0.
        state: where it goes on, or None for the beginning.
    """

    def __init__(self, settings: Laboratory, seed: int, state: State | None = None) -> None:
        self.settings, self.seed = settings, seed
        dtype = torch.float64 if settings.dtype == "float64" else torch.float32
        drawn = settings.teacher.model_copy(update={"seed": settings.teacher.seed + seed})
        goal = drawn.parameters(settings.inputs.dimension, settings.num_outputs)
        self.goal: Params = {name: value.to(dtype) for name, value in goal.items()}
        shape = (settings.inputs.dimension,)
        with seeds.isolated(seed, "student"):
            self.network = settings.student.build(shape, settings.num_outputs).to(dtype)
        begun = settings.student.parameters(goal, seed) if state is None else state.params
        self.network.load_state_dict(dict(begun), strict=state is not None)
        self.params: Params = dict(self.network.state_dict(keep_vars=True))
        self.looks = [] if state is None else list(state.looks)
        self.step = self.looks[-1].step if self.looks else 0
        self.evaluation = settings.inputs.evaluation(seed).to(dtype)
        self.seen = dynamics.activations(self.goal, self.evaluation)
        self.answers = _answers(self.goal, self.evaluation)
        self.advance = _Products(self).advance if settings.student.norm == "none" else self._descend

    # -- a step --

    def error(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Minus the loss's gradient by the outputs, [batch, output], times half the outputs."""
        if self.settings.loss == "squared-error":
            return (answers - outputs).div_(len(outputs))
        labels = F.one_hot(answers.argmax(1), answers.shape[1]).to(outputs)
        scale = self.settings.num_outputs / 2
        return (labels - outputs.softmax(1)).mul_(scale / len(outputs))

    def _descend(self, inputs: Tensor, answers: Tensor) -> None:
        """A step by automatic differentiation: of students with BatchNorm."""
        for param in self.network.parameters():
            param.grad = None
        outputs = self.network(inputs)
        outputs.backward(-self.error(outputs.detach(), answers))
        with torch.no_grad():
            for param in self.network.parameters():
                if param.grad is not None:
                    param.sub_(param.grad, alpha=self.rate)

    @property
    def rate(self) -> float:
        """The learning rate, times 2 / outputs: the mean over outputs, and the square's 2."""
        return 2 * self.settings.learning_rate / self.settings.num_outputs

    # -- measuring --

    @torch.no_grad()
    def look(self) -> Look:
        """Measure the student as it is."""
        self.network.eval()
        seen, outputs = nodes(self.network, self.evaluation), self.network(self.evaluation)
        self.network.train()
        rho = {n: dynamics.correlation(self.seen[n], seen[n]) for n in self.seen}
        params = {name: value.detach() for name, value in self.params.items()}
        gradient: Params = {}
        if self.settings.student.norm == "none":
            update = dynamics.expected_update(params, self.goal, self.evaluation[:NUM_GRADIENT])
            gradient = {
                name: torch.tensor(norm) for name, norm in dynamics.update_norms(update).items()
            }
        return Look(self.step, self._loss(outputs), rho, dynamics.outgoing_norms(params), gradient)

    def _loss(self, outputs: Tensor) -> Tensor:
        if self.settings.loss == "squared-error":
            return F.mse_loss(outputs, self.answers).double()
        return F.cross_entropy(outputs, self.answers.argmax(1)).double()

    def state(self) -> State:
        """The training now."""
        params = {name: value.detach().clone() for name, value in self.params.items()}
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
        batches = settings.inputs.batches(self.seed, settings.batch_size, self.step)
        while self.step < total and bool(self.looks[-1].loss.isfinite()):
            inputs = next(batches).to(self.evaluation)
            self.advance(inputs, _answers(self.goal, inputs))
            self.step += 1
            if settings.measures(self.step):
                self.looks.append(self.look())
                pulse(self.step, self.state)
        dead = {name: dynamics.dead(seen) for name, seen in self.seen.items()}
        return _course(self.looks, dead, diverged=not bool(self.looks[-1].loss.isfinite()))


def _answers(goal: Params, inputs: Tensor) -> Tensor:
    """What the teacher gives, [batch, output]."""
    values, names = inputs, layer_names(goal)
    for name in names:
        values = torch.addmm(goal[f"{name}.bias"], values, goal[f"{name}.weight"].t())
        if name != names[-1]:
            values = values.relu_()
    return values


class _Products:
    """A step of a student without normalization: its products alone, in memory of their own.

    Forward and backward are written out, and each layer's update is one product that is added to
    the weight in place. `Training._descend` is its twin.
    """

    def __init__(self, training: Training) -> None:
        self.training, self.rate = training, training.rate
        names = layer_names(training.params)
        self.weights = [training.params[f"{name}.weight"].detach() for name in names]
        self.biases = [training.params[f"{name}.bias"].detach() for name in names]
        size = training.settings.batch_size
        like = self.weights[0]
        self.ones = like.new_ones(size)
        self.values = [like.new_empty(size, len(bias)) for bias in self.biases]
        self.pulled = [torch.empty_like(values) for values in self.values]

    @torch.no_grad()
    def advance(self, inputs: Tensor, answers: Tensor) -> None:
        """One step of the training."""
        values, reads = inputs, [inputs]
        for weight, bias, made in zip(self.weights, self.biases, self.values, strict=True):
            values = torch.addmm(bias, values, weight.t(), out=made)
            if made is not self.values[-1]:
                reads.append(values.relu_())
        error = self.training.error(values, answers)
        for place in reversed(range(len(self.weights))):
            below = error
            if place:
                below = torch.mm(error, self.weights[place], out=self.pulled[place - 1])
                below.mul_(reads[place].sign())  # the gates: what was rectified is 0 or more
            self.weights[place].addmm_(error.t(), reads[place], alpha=self.rate)
            self.biases[place].addmv_(error.t(), self.ones, alpha=self.rate)
            error = below


# -- the matrix form -------------------------------------------------------------------------------


def matrix_course(settings: Matrices, seed: int) -> Course:
    """The course of the paper's matrix form; its correlations and loss are over all inputs."""
    series, tensor = simulation.simulate(settings, seed), torch.from_numpy
    layer = "hidden1"
    norms, is_dead = tensor(series.outgoing[:, :-1]), torch.zeros(len(series.first)).bool()
    return Course(
        tensor(series.steps),
        tensor(series.loss),
        {layer: tensor(series.best)},
        {layer: norms},
        {},
        {layer: tensor(series.first)},
        {layer: tensor(series.last)},
        torch.stack([tensor(series.first), tensor(series.last)]),
        {layer: is_dead},
    )


Experiment = Annotated[Laboratory | Matrices, FAMILY]


def num_steps(experiment: Laboratory | Matrices) -> int:
    """The steps of one training."""
    return experiment.steps if isinstance(experiment, Laboratory) else experiment.num_steps


def num_weights(experiment: Laboratory | Matrices) -> int:
    """The weights of its student, biases not counted."""
    if isinstance(experiment, Laboratory):
        student = experiment.student
        wide = (student.multi * size for size in student.hidden)
        sizes = [experiment.inputs.dimension, *wide, experiment.num_outputs]
    else:
        num_inputs, num_nodes, num_outputs = experiment.sizes
        sizes = [num_inputs, experiment.multi * num_nodes, num_outputs]
    return sum(one * other for one, other in itertools.pairwise(sizes))


def training_flops(experiment: Laboratory | Matrices) -> float:
    """FLOPs of one training: 6 for each weight, input and step, forward, backward and update."""
    return 6.0 * num_weights(experiment) * experiment.batch_size * num_steps(experiment)
