"""Trials: small trainings whose time tells how fast this machine trains.

They are timed in as many processes at once as would train a study, a thread each: beside busy
neighbours a core is slower, by a third where memory is what bounds it (ResNet-20, two cores). The
time is the process's own, not the clock's, so that other programs disturb it little.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import nn

from windfall import masks as masking
from windfall import models, seeds
from windfall.data import CropFlip, Dataset
from windfall.engines import dispatch, rule
from windfall.engines.contract import Task
from windfall.initialize import GlorotNormal, initial_parameters
from windfall.samples import Part
from windfall.train import Adam, Optimizer, Recipe, Sgd, State
from windfall.worker import quiet_machine

DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)
NUM_CLASSES, PEAK = 10, 255
DATA_BYTES = 1 << 23  # of training samples: more than the second-level caches hold
LOOK_SAMPLES = 256  # of both parts that an evaluation is timed on
NEVER = 10**9  # steps: a trial is stopped, it does not end
LEAST = 2  # intervals timed of a trial, however slow it is, after a first one that warms up
TRIAL_SECONDS = 0.03  # for its steps, and again for its evaluations
MOST_PROCESSES = 16  # at once: each needs 300 MB

# A process finds modules where its caller does.
_SERVE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1));"
    " from windfall.trials import main; main()"
)


@dataclass(frozen=True)
class Trial:
    """A training to be timed.

    Args:
        build: the network.
        input_shape: of its images.
        recipe: how it is trained.
        engine: that trains it.
        density: of its random masks; 1 is without.
    """

    build: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]
    recipe: Recipe
    engine: rule.Name
    density: float

    def kept(self) -> dict[str, int]:
        """The number of weights that its masks keep, by name; none where there are no masks."""
        if self.density == 1:
            return {}
        module = self.build()
        sizes = {name: param.numel() for name, param in module.named_parameters()}
        kinds = models.kinds(module, self.input_shape)
        return {name: max(1, round(self.density * sizes[name])) for name in kinds}

    def beginning(self) -> State:
        """A new network with random masks."""
        params, buffers = initial_parameters(self.build, GlorotNormal(), 0)
        counts = self.kept()
        masks = masking.scatter(counts, masking.ones(params, counts), 0)
        return State(0, masking.apply(masks, params), buffers, masks)


@dataclass(frozen=True)
class Timing:
    """What was measured of a trial, in seconds.

    Args:
        start: until the first step, without the evaluation before it.
        step: of training.
        looked: of a step and an evaluation of `LOOK_SAMPLES` samples.
    """

    start: float
    step: float
    looked: float


# -- the calibration set ---------------------------------------------------------------------------


def _linear(shape: tuple[int, ...], *hidden: int) -> Callable[[], nn.Module]:
    return lambda: models.Mlp(hidden=hidden).build(shape, NUM_CLASSES)


def _pooled(channels: int) -> Callable[[], nn.Module]:
    """Two convolutions, each pooled, and a linear layer."""
    wide = 2 * channels
    return lambda: nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(channels, wide, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * wide, NUM_CLASSES),
    )  # fmt: skip


def _normalized(channels: int) -> Callable[[], nn.Module]:
    """Three normalized convolutions, one with stride 2, and a linear layer of their means."""

    def build() -> nn.Module:
        parts: list[nn.Module] = []
        wide = 2 * channels
        for given, made, stride in ((3, channels, 1), (channels, wide, 2), (wide, wide, 1)):
            layer = nn.Conv2d(given, made, 3, stride, 1, bias=False)
            parts += [layer, nn.BatchNorm2d(made), nn.ReLU()]
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, NUM_CLASSES)
        return nn.Sequential(*parts, *head)

    return build


def calibration() -> list[Trial]:
    """The trainings that are timed; none is of a network of the zoo."""
    sgd, adam = Sgd(momentum=0.9), Adam()
    return [
        *_trials(_linear(DIGITS, 32, 32), DIGITS, 32, sgd, (1, 0.1)),
        *_trials(_linear(MNIST, 8), MNIST, 64, sgd, ()),
        *_trials(_linear(MNIST, 64, 64, 64, 64), MNIST, 64, adam, ()),
        *_trials(_linear(MNIST, 512), MNIST, 64, adam, (1, 0.1, 0.01)),
        *_trials(_linear(MNIST, 256, 256), MNIST, 96, sgd, (1, 0.1), masked=True),
        *_trials(_linear(MNIST, 200), MNIST, 256, adam, (1, 0.1)),
        *_trials(_pooled(8), CIFAR, 32, sgd, ()),
        *_trials(_pooled(32), CIFAR, 16, adam, ()),
        *_trials(_pooled(16), CIFAR, 64, sgd, (1, 0.3, 0.05)),
        *_trials(_normalized(8), CIFAR, 32, adam, ()),
        *_trials(_normalized(24), CIFAR, 16, sgd, (1, 0.3, 0.05), augment=CropFlip(padding=4)),
        *_trials(_normalized(16), CIFAR, 64, sgd, ()),
    ]


def _trials(
    build: Callable[[], nn.Module],
    shape: tuple[int, int, int],
    batch_size: int,
    optimizer: Optimizer,
    densities: Sequence[float],
    *,
    masked: bool = False,
    augment: CropFlip | None = None,
) -> Iterator[Trial]:
    recipe = Recipe(optimizer=optimizer, learning_rate=1e-3, batch_size=batch_size, augment=augment)
    yield Trial(build, shape, recipe, "separate", 0.5 if masked else 1)
    for density in densities:
        yield Trial(build, shape, recipe, "sparse", density)


# -- one process -----------------------------------------------------------------------------------


def images(shape: tuple[int, ...]) -> Dataset:
    """Random images, the same in every process."""
    size, half = prod(shape), LOOK_SAMPLES // 2
    sizes = [DATA_BYTES // size, half, half]
    drawn = seeds.stream(0, "trials").bytes(sum(sizes) * size)
    inputs = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).reshape(-1, *shape)
    labels = torch.arange(len(inputs)) % NUM_CLASSES
    parts = zip(inputs.split(sizes), labels.split(sizes), strict=True)
    train, validation, test = (Part(*part) for part in parts)
    middle = torch.full((shape[0],), 0.5)
    return Dataset(train, validation, test, middle, middle, PEAK, NUM_CLASSES, sha256="", note=None)


class _Enough(Exception):
    """A trial has been timed for long enough."""


def _marks(trial: Trial, data: Dataset, eval_every: int, seconds: float) -> list[tuple[int, float]]:
    """The process's time before a training and at each of its pulses, with the step."""
    recipe = trial.recipe.model_copy(update={"eval_every": eval_every, "steps": NEVER})
    task, state = Task(trial.build(), data, recipe, 0, NEVER), trial.beginning()
    marks, end = [(0, time.process_time())], 0.0

    def pulse(step: int, _: Any) -> None:
        nonlocal end
        marks.append((step, time.process_time()))
        end = end or time.monotonic() + seconds
        if len(marks) > LEAST + 2 and time.monotonic() > end:
            raise _Enough

    with suppress(_Enough):
        dispatch.train(trial.engine, [task], [state], pulse)
    return marks


def _per_step(marks: Sequence[tuple[int, float]]) -> float:
    pairs = pairwise(marks[2:])
    return statistics.median((after - before) / (j - i) for (i, before), (j, after) in pairs)


def measure(trial: Trial, data: Dataset, seconds: float = TRIAL_SECONDS) -> Timing:
    """Time a trial in this process.

    Args:
        trial: to be timed.
        data: of its images' shape.
        seconds: for its steps, and again for its evaluations.
    """
    step = _per_step(_marks(trial, data, NEVER, seconds))
    marks = _marks(trial, data, 1, seconds)  # its kernels are compiled by now
    looked = _per_step(marks)
    return Timing(max(0.0, marks[1][1] - marks[0][1] - (looked - step)), step, looked)


def main() -> None:
    """Time the calibration set when a line comes on standard input; print the seconds as JSON."""
    data = {shape: images(shape) for shape in (DIGITS, MNIST, CIFAR)}
    print(time.process_time(), flush=True)
    sys.stdin.readline()
    with quiet_machine():
        timings = [measure(trial, data[trial.input_shape]) for trial in calibration()]
    print(json.dumps([[t.start, t.step, t.looked] for t in timings]), flush=True)


# -- all of them -----------------------------------------------------------------------------------


@contextmanager
def _process() -> Generator["subprocess.Popen[str]"]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, json.dumps(sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(num_processes: int) -> tuple[float, list[Timing]]:
    """Time the calibration set in some processes at once.

    Args:
        num_processes: at once, at most `MOST_PROCESSES`.

    Returns:
        Seconds that a process takes to start, and the least time of each trial in any process.
    """
    with ExitStack() as stack:
        count = max(1, min(num_processes, MOST_PROCESSES))
        processes = [stack.enter_context(_process()) for _ in range(count)]
        started = min(float(_line(process)) for process in processes)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        rounds = [[Timing(*row) for row in json.loads(_line(process))] for process in processes]
    return started, [_least(each) for each in zip(*rounds, strict=True)]


def _least(timings: Sequence[Timing]) -> Timing:
    return Timing(
        min(t.start for t in timings),
        min(t.step for t in timings),
        min(t.looked for t in timings),
    )


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a process that measures this machine ended")
    return line
