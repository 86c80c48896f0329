"""Students of the laboratory, as `windfall.courses` trains them, by plain PyTorch, and the peak."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from windfall import seeds
from windfall.bench import roofline
from windfall.bench.crew import Crew, Talk
from windfall.bench.machine import machine, ratios, refuse, shown, spread, table
from windfall.course import Look
from windfall.execute import num_cores
from windfall.experiments import training_flops
from windfall.inputs import Gaussian
from windfall.laboratory import Laboratory, Training
from windfall.masks import Params
from windfall.spec import Json, SpecError

PLAIN, OURS, MEASURED = "plain PyTorch", "windfall", "windfall, measured"
EXPERIMENT = Laboratory()  # its student has ten nodes for each of the teacher's
GOALS = {"fraction_of_peak": 0.6, "speedup": 2.0, "measuring_share": 0.2}
WARM = 64  # steps of each side before the first round: libraries, caches
CHECKED = 2  # steps after which weights are compared: later, rounding grows
GIGA, TERA, MICRO, MILLI = 1e9, 1e12, 1e6, 1e3


# -- the yardstick ---------------------------------------------------------------------------------


def network(params: Params) -> nn.Sequential:
    """A network of `nn.Linear` and `nn.ReLU` with these weights and biases, lowest first."""
    parts: list[nn.Module] = []
    with seeds.isolated(0, "luck"):
        for name, value in params.items():
            if name.endswith(".weight"):
                parts += [nn.Linear(value.shape[1], value.shape[0]), nn.ReLU()]
    made = nn.Sequential(*parts[:-1])
    with torch.no_grad():
        for own, given in zip(made.parameters(), params.values(), strict=True):
            own.copy_(given)
    return made


class Plain:
    """A training as one writes it in PyTorch.

    Args:
        settings: of the experiment.
        begun: the student's parameters.
    """

    def __init__(self, settings: Laboratory, begun: Params) -> None:
        self.settings = settings
        self.teacher, self.student = network(settings.goal(0)), network(begun)
        self.loss = nn.MSELoss()
        self.optimizer = SGD(self.student.parameters(), lr=settings.learning_rate)

    def answers(self, inputs: Tensor) -> Tensor:
        """What the teacher gives, [batch, output]."""
        with torch.no_grad():
            return self.teacher(inputs)

    def step(self, inputs: Tensor) -> None:
        """One step of the training."""
        answers = self.answers(inputs)
        self.optimizer.zero_grad()
        self.loss(self.student(inputs), answers).backward()
        self.optimizer.step()

    def run(self, inputs: Tensor, num_steps: int) -> None:
        """Train on shuffled batches of the inputs, over and over."""
        loader = DataLoader(
            TensorDataset(inputs),
            self.settings.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
        )
        passes = itertools.chain.from_iterable(itertools.repeat(loader))
        for (batch,) in itertools.islice(passes, num_steps):
            self.step(batch)


def difference(settings: Laboratory) -> float:
    """How far both sides' weights are from each other after `CHECKED` steps on the same inputs.

    |w - w'| / |w - w_0|, 2-norms over all parameters.
    """
    training = Training(settings, 0)
    begun = training.state().params
    plain = Plain(settings, begun)
    inputs = _inputs(settings, CHECKED * settings.batch_size)
    for batch in inputs.split(settings.batch_size):
        training.advance(batch, plain.answers(batch))
        plain.step(batch)
    ours = _flat(training.state().params.values())
    theirs, before = _flat(plain.student.parameters()), _flat(begun.values())
    return float((ours - theirs).norm() / (ours - before).norm())


def _inputs(settings: Laboratory, num: int | None = None) -> Tensor:
    """So many inputs, as many as are trained on if none are said."""
    inputs = settings.inputs
    assert isinstance(inputs, Gaussian) and inputs.num_train is not None
    draws = seeds.stream(0, "luck").standard_normal((num or inputs.num_train, inputs.dimension))
    return torch.from_numpy(inputs.std * draws).float()


def _flat(params: Iterable[Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten().double() for value in params])


# -- in a process ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """When a student was measured: the step, and the seconds on the clock before and after."""

    step: int
    begun: float
    ended: float

    @property
    def seconds(self) -> float:
        """What the look took."""
        return self.ended - self.begun


def told(begun: float, marks: Sequence[Mark], couples: Callable[[int], bool]) -> Json:
    """What a training says of its time.

    The first step belongs to the beginning: whatever is made once is made by then.

    Args:
        begun: when it was begun, before it was made.
        marks: of the looks at steps 0 and 1, and of later ones, one at least.
        couples: whether the look at a step is one of the rare ones, which cost more.

    Returns:
        seconds of the `beginning`, of a `step`, of a `look` and of a `rare_look`, the median ones.
    """
    later = marks[1:]
    spans = sum(after.begun - before.ended for before, after in itertools.pairwise(later))
    step = spans / (later[-1].step - later[0].step)
    beginning = later[0].begun - begun - marks[0].seconds - step
    return {
        "beginning": max(0.0, beginning),
        "step": step,
        "look": _median([mark for mark in later if not couples(mark.step)] or later),
        "rare_look": _median([mark for mark in later if couples(mark.step)] or later),
    }


def _median(marks: Sequence[Mark]) -> float:
    return statistics.median(mark.seconds for mark in marks)


def _ours(message: Json) -> Json:
    settings = Laboratory.from_json(message["experiment"])
    begun, marks = time.monotonic(), list[Mark]()
    training = Training(settings, message["seed"])
    measure = training.look

    def look() -> Look:
        since = time.monotonic()
        found = measure()
        marks.append(Mark(found.step, since, time.monotonic()))
        return found

    training.look = look
    training.run()
    return told(begun, marks, settings.couples)


def _plain(message: Json) -> Json:
    settings = Laboratory.from_json(message["experiment"])
    plain = Plain(settings, Training(settings, message["seed"]).state().params)
    inputs = _inputs(settings)
    begun = time.monotonic()
    plain.run(inputs, settings.steps)
    return {"step": (time.monotonic() - begun) / settings.steps}


def _peak(message: Json) -> Json:
    best = max(roofline.products(message["seconds"]).values())
    return {"flops": best, "sustained": roofline.sustained(message["flops"])}


WORK: dict[str, Callable[[Json], Json]] = {"plain": _plain, "ours": _ours, "peak": _peak}


def serve(talk: Talk) -> None:
    """Do what is asked for, of `WORK`."""
    message = talk(None)
    while True:
        message = talk(WORK[message["work"]](message))


# -- the measurement -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """The answers of one round: of the yardstick, and of each core's process."""

    plain: Json
    ours: Sequence[Json]
    peak: Sequence[Json]


@dataclass(frozen=True)
class Course:
    """A whole training, of which a round times a slice.

    Args:
        steps: of the training.
        looks: at it, as it measures itself, the rare ones aside.
        rare_looks: those that measure couplings too.
        flops: of the training.
    """

    steps: int
    looks: int
    rare_looks: int
    flops: float

    @classmethod
    def of(cls, experiment: Laboratory) -> "Course":
        """The training of an experiment."""
        measured = list(filter(experiment.measures, range(experiment.steps + 1)))
        rare = sum(map(experiment.couples, measured))
        return cls(experiment.steps, len(measured) - rare, rare, training_flops(experiment))

    def seconds(self, each: Round) -> dict[str, float]:
        """The seconds of one training by side; Windfall's of the slowest process."""
        bare = [answer["beginning"] + self.steps * answer["step"] for answer in each.ours]
        looks = [
            self.looks * answer["look"] + self.rare_looks * answer["rare_look"]
            for answer in each.ours
        ]
        return {
            PLAIN: self.steps * each.plain["step"],
            OURS: max(bare),
            MEASURED: max(map(sum, zip(bare, looks, strict=True))),
        }


def measure(
    experiment: Laboratory = EXPERIMENT,
    trainings: int = 10,
    num_steps: int = 1_500,
    rounds: int = 5,
    peak_seconds: float = 0.1,
) -> Json:
    """Trainings of the laboratory by plain PyTorch and by Windfall, over the machine's peak.

    Plain PyTorch trains one student after another with all cores: `nn.Sequential`, a teacher
    without gradients, `DataLoader` of shuffled inputs, `MSELoss`, `SGD`. Windfall trains one on
    each core, as a study's workers do; all cores work at once. A round times `num_steps` steps of
    either; the seconds of all whole trainings follow from those of a step and, of Windfall's alone,
    of the beginning and of a look. Of several processes the slowest counts.

    FLOPs are those of `experiments.training_flops`: 6 for each weight of the student, input and
    step; the teacher, biases, activations and measuring are not counted. The peak is of matrix
    products, torch's or numpy's, on all cores at once, one thread each, their rates added.

    Note:
        Measure on a machine that does nothing else: other processes slow the plain loop, whose
        threads wait for each other, more than Windfall; the peak, the best of short calls, less.

    Args:
        experiment: of squared errors in float32, on a Gaussian training set, without BatchNorm and
            subset.
        trainings: seeds, at least 1.
        num_steps: of a round, at least 2.
        rounds: n, at least 1; in each, both sides and the peak are measured once.
        peak_seconds: of each size of products, above 0.

    Returns:
        machine; settings; goals; flops_per_step and flops, of all trainings; looks and
        rare_looks of a training, the latter with couplings; difference of both sides'
        weights after two steps; peak_flops_per_second; sustained_flops_per_second;
        look_seconds, rare_look_seconds, beginning_seconds and measuring_share; and rows, of
        the yardstick and of Windfall without and with measuring: at_once, the trainings at
        a time; step_seconds, of a whole training over its steps; trainings_seconds;
        flops_per_second; fraction_of_peak, the best call of products, and
        fraction_of_sustained, their mean over as much work; speedup, in the seconds of all
        trainings.

    Raises:
        SpecError: when a setting cannot be.
    """
    refuse(trainings=(trainings, 1), num_steps=(num_steps, 2), rounds=(rounds, 1),
           peak_seconds=(peak_seconds, 1e-9))  # fmt: skip
    _refuse_others(experiment)
    course = Course.of(experiment)
    found = _rounds(experiment, num_steps, rounds, peak_seconds)
    return {
        "benchmark": "luck",
        "machine": machine(),
        "rounds": rounds,
        "experiment": experiment.to_json(),
        "trainings": trainings,
        "num_steps": num_steps,
        "goals": GOALS,
        "flops_per_step": course.flops / course.steps,
        "flops": trainings * course.flops,
        "looks": course.looks,
        "rare_looks": course.rare_looks,
        "difference": difference(experiment),
    } | summary(course, trainings, found)


def _refuse_others(experiment: Laboratory) -> None:
    inputs = experiment.inputs
    fits = (
        experiment.loss == "squared-error"
        and experiment.dtype == "float32"
        and experiment.student.norm == "none"
        and experiment.subset is None
        and isinstance(inputs, Gaussian)
        and inputs.num_train is not None
    )
    if not fits:
        raise SpecError(
            "`experiment` must be of squared errors in float32, on a Gaussian training set, without"
            " BatchNorm and subset, as the plain loop is; got another."
        )


def _rounds(
    experiment: Laboratory, num_steps: int, rounds: int, peak_seconds: float
) -> list[Round]:
    def asked(steps: int) -> Json:
        shorter = experiment.model_copy(update={"steps": steps, "snapshots": ()})
        return {"experiment": shorter.to_json()}

    with ExitStack() as stack:
        alone = stack.enter_context(Crew("luck", 1, num_cores()))
        crew = stack.enter_context(Crew("luck", num_cores(), 1))

        def one(steps: int, seconds: float, first: int) -> Round:
            flops = training_flops(experiment) / experiment.steps * steps
            each = [asked(steps) | {"work": "ours", "seed": seed} for seed in range(num_cores())]
            work: dict[str, Callable[[], list[Json]]] = {
                "plain": lambda: alone.ask(asked(steps) | {"work": "plain", "seed": 0}),
                "ours": lambda: crew.ask(*each),
                "peak": lambda: crew.ask({"work": "peak", "seconds": seconds, "flops": flops}),
            }
            names = [*work][first % len(work) :] + [*work][: first % len(work)]
            told = {name: work[name]() for name in names}
            return Round(told["plain"][0], told["ours"], told["peak"])

        one(min(WARM, num_steps), min(peak_seconds, 1e-3), 0)
        return [one(num_steps, peak_seconds, place) for place in range(rounds)]


def summary(course: Course, trainings: int, found: Sequence[Round]) -> Json:
    """The rates, shares and ratios of what was measured round by round.

    Args:
        course: a whole training.
        trainings: their number.
        found: the rounds.
    """
    seconds = [course.seconds(each) for each in found]
    peaks, products = (
        [sum(answer[name] for answer in each.peak) for each in found]
        for name in ("flops", "sustained")
    )
    cores = len(found[0].ours)
    whole, rows = dict[str, list[float]](), list[Json]()
    for side, at_once in ((PLAIN, 1), (OURS, cores), (MEASURED, cores)):
        each = [of[side] for of in seconds]
        rates = [at_once * course.flops / one for one in each]
        whole[side] = [math.ceil(trainings / at_once) * one for one in each]
        rows.append(
            {
                "side": side,
                "at_once": at_once,
                "step_seconds": spread(one / course.steps for one in each),
                "trainings_seconds": spread(whole[side]),
                "flops_per_second": spread(rates),
                "fraction_of_peak": ratios(rates, peaks),
                "fraction_of_sustained": ratios(rates, products),
                "speedup": ratios(whole[PLAIN], whole[side]),
            }
        )
    answers = [answer for each in found for answer in each.ours]
    return {
        "peak_flops_per_second": spread(peaks),
        "sustained_flops_per_second": spread(products),
        "look_seconds": spread(answer["look"] for answer in answers),
        "rare_look_seconds": spread(answer["rare_look"] for answer in answers),
        "beginning_seconds": spread(answer["beginning"] for answer in answers),
        "measuring_share": spread(1 - of[OURS] / of[MEASURED] for of in seconds),
        "rows": rows,
    }


def render(result: Json) -> Table:
    """A row for each side."""
    columns = ("side", "at once", "µs a step", "GFLOP/s", "% of peak", "% sustained",
               f"s for {result['trainings']} trainings", f"x {PLAIN}")  # fmt: skip
    goals = result["goals"]
    notes = (
        f"{result['trainings']} trainings of {result['experiment']['steps']:,} steps, "
        f"{result['flops'] / TERA:,.1f} TFLOP, extrapolated from {result['num_steps']:,}; FLOPs "
        "are 6 for each weight of the student, input and step",
        f"products at best (peak) {_scaled(result['peak_flops_per_second'], 1 / GIGA)} GFLOP/s, "
        f"over as much work {_scaled(result['sustained_flops_per_second'], 1 / GIGA)} GFLOP/s",
        f"{result['looks']} looks of {_scaled(result['look_seconds'], MILLI, ',.1f')} ms and "
        f"{result['rare_looks']} of {_scaled(result['rare_look_seconds'], MILLI, ',.1f')} ms, with "
        f"couplings: {_scaled(result['measuring_share'], 100, '.1f')} % of the time",
        f"goals: {100 * goals['fraction_of_peak']:g} % of peak, {goals['speedup']:g} x {PLAIN}, "
        f"measuring {100 * goals['measuring_share']:g} % at most",
    )
    made = table(result, f"n = {result['rounds']}", columns, *notes)
    for row in result["rows"]:
        made.add_row(
            row["side"],
            str(row["at_once"]),
            _scaled(row["step_seconds"], MICRO),
            _scaled(row["flops_per_second"], 1 / GIGA, ",.1f"),
            _scaled(row["fraction_of_peak"], 100, ".1f"),
            _scaled(row["fraction_of_sustained"], 100, ".1f"),
            _scaled(row["trainings_seconds"], 1.0),
            shown(row["speedup"], ".2f"),
        )
    return made


def _scaled(values: Json, factor: float, form: str = ",.0f") -> str:
    return shown({key: factor * value for key, value in values.items()}, form)
