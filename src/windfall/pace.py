"""Pace: how long each kind of work takes on this machine, measured once and kept.

    pace = pace.known() or pace.measure(num_processes=2)
    pace.seconds("sparse", counted.step)

The seconds of a training are those of its work (`windfall.workload`), each kind at its pace, fitted
by non-negative least squares of relative errors to the timings of `windfall.trials`:

    seconds = start + steps x (step's work . pace) + evaluations x (evaluation's work . pace)

They are kept in the user's cache folder (or WINDFALL_CACHE) for a processor, number of cores and
versions. On a GPU nothing is measured yet.
"""

import hashlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pooch
from scipy.optimize import nnls

from windfall import trials
from windfall.engines.rule import Name
from windfall.execute import num_cores
from windfall.spec import Json, canonical
from windfall.store import write_whole
from windfall.trials import LOOK_SAMPLES, Timing, Trial
from windfall.workload import Counts, Training

FORMAT = 1  # of the file, and of what is counted: another one is measured again
PULL = 0.5  # of typical figures; from 0.15 to 1, other networks are told about as well
# seconds of a unit: of two cores of an AMD EPYC with AVX-512, torch 2.13
TYPICAL: dict[str, Counts] = {
    "separate": {
        "step": 5e-5, "tensor": 2.5e-5, "linear": 1.5e-11, "convolution": 7.7e-12,
        "normalized": 7e-9, "pooled": 27e-9, "moved": 1.7e-9, "gathered": 2e-9,
        "adam": 0.7e-9, "sgd": 0.55e-9, "masked": 0.5e-9, "augment": 3e-4, "augmented": 5e-9,
        "look": 2.4e-4, "evaluated linear": 2.7e-11, "evaluated convolution": 6.3e-12,
        "evaluated normalized": 0.5e-9, "evaluated pooled": 15e-9, "evaluated moved": 0.8e-9,
    },
    "sparse": {
        "step": 1e-6, "product linear": 1.8e-10, "product convolution": 2.3e-10,
        "gradient linear": 1.4e-10, "gradient convolution": 2.9e-10, "entry linear": 5e-10,
        "back linear": 5e-10, "row linear": 2e-9, "row convolution": 1.8e-9, "normalized": 0.7e-9,
        "pooled": 0.6e-9, "moved": 0.6e-9, "far": 1.2e-9, "gathered": 1.6e-9, "classed": 1e-7,
        "adam": 0.4e-9, "sgd": 0.33e-9, "augment": 2.3e-4, "augmented": 1e-9, "look": 1.2e-4,
    },
}  # fmt: skip
ON_CPU: dict[Name, Name] = {"stacked": "separate"}  # a stack costs what its replicas do alone


@dataclass(frozen=True)
class Pace:
    """A machine's pace.

    Args:
        process: seconds that a worker process takes to start.
        start: of a training before its first evaluation, by engine.
        work: of a unit of each kind of work, by engine.
    """

    process: float
    start: Mapping[str, float]
    work: Mapping[str, Mapping[str, float]]

    def seconds(self, engine: Name, counts: Counts) -> float:
        """What some work takes; kinds that no trial had take nothing."""
        known = self.work[ON_CPU.get(engine, engine)]
        return sum(number * known.get(kind, 0.0) for kind, number in counts.items())

    def start_seconds(self, engine: Name) -> float:
        """What a training takes before its first evaluation; its kernels are compiled."""
        return self.start[ON_CPU.get(engine, engine)]


def fit(
    counts: Sequence[Counts], seconds: Sequence[float], typical: Counts | None = None
) -> dict[str, float]:
    """The seconds of a unit of each kind of work, none negative, of least relative error.

    It minimizes the sum over rows of (counts . pace / seconds - 1)^2, and of
    PULL^2 (pace / (s typical) - 1)^2 over kinds: what the rows do not tell apart stays in typical
    proportion, with s the median of what the rows took against typical figures.

    Args:
        counts: of each row.
        seconds: that it took, above 0.
        typical: seconds of a unit of each kind on another machine; None fits the rows alone.
    """
    kinds = sorted({kind for row in counts for kind in row})
    rows = [
        [row.get(kind, 0.0) / took for kind in kinds]
        for row, took in zip(counts, seconds, strict=True)
    ]
    if typical:
        usual = np.array([typical[kind] for kind in kinds])
        usual /= statistics.median(np.array(rows) @ usual)
        rows += (PULL * np.diag(1 / usual)).tolist()
    matrix = np.array(rows)
    wanted = np.array([1.0] * len(counts) + [PULL] * (len(rows) - len(counts)))
    size = np.abs(matrix).max(0)
    size[size == 0] = 1.0
    solved, _ = nnls(matrix / size, wanted)
    return dict(zip(kinds, (solved / size).tolist(), strict=True))


def fitted(process: float, calibration: Sequence[Trial], timings: Sequence[Timing]) -> Pace:
    """The pace that timings of trials tell.

    Args:
        process: seconds that a worker process takes to start.
        calibration: the trials.
        timings: of each.
    """
    start: dict[str, list[float]] = {}
    rows: dict[str, list[tuple[Counts, float]]] = {}
    for trial, timing in zip(calibration, timings, strict=True):
        training = Training(trial.engine, trial.build(), trial.input_shape, trial.recipe)
        work = training.workload(trial.kept())
        start.setdefault(trial.engine, []).append(timing.start)
        told = rows.setdefault(trial.engine, [])
        told.append((work.step, timing.step))
        told.append((_both(work.step, work.evaluation(LOOK_SAMPLES)), timing.looked))
    return Pace(
        process,
        {engine: statistics.median(values) for engine, values in start.items()},
        {
            engine: fit([row for row, _ in told], [took for _, took in told], TYPICAL[engine])
            for engine, told in rows.items()
        },
    )


def _both(one: Counts, other: Counts) -> Counts:
    return {kind: one.get(kind, 0.0) + other.get(kind, 0.0) for kind in {*one, *other}}


# -- once per machine ------------------------------------------------------------------------------


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")  # elsewhere than on Linux, `platform` knows the model
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def machine() -> Json:
    """What a pace is measured for."""
    libraries = ("windfall", "torch", "llvmlite")
    return {
        "format": FORMAT,
        "processor": processor(),
        "cores": num_cores(),
        "device": "cpu",
        "versions": {name: version(name) for name in libraries},
    }


def _path() -> Path:
    folder = Path(os.environ.get("WINDFALL_CACHE") or pooch.os_cache("windfall")) / "pace"
    return folder / f"{hashlib.sha256(canonical(machine()).encode()).hexdigest()[:32]}.json"


def known() -> Pace | None:
    """This machine's pace, if it was measured before; a damaged file counts as none."""
    try:
        return _read(json.loads(_path().read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _read(document: Any) -> Pace:
    def numbers(values: Any) -> dict[str, float]:
        made = {str(name): float(value) for name, value in values.items()}
        if not all(0 <= value < float("inf") for value in made.values()):
            raise ValueError("a pace must be finite and at least 0")
        return made

    pace = document["pace"]
    work = {str(engine): numbers(values) for engine, values in pace["work"].items()}
    start = numbers(pace["start"])
    if not {"separate", "sparse"} <= work.keys() & start.keys():
        raise ValueError("a pace must be of both engines")
    return Pace(numbers({"process": pace["process"]})["process"], start, work)


def measure() -> Pace:
    """Measure this machine's pace and keep it: some eight seconds, with a word on stderr."""
    print("measuring this machine once, about ten seconds ...", file=sys.stderr, flush=True)
    process, timings = trials.run(num_cores())
    pace = fitted(process, trials.calibration(), timings)
    path = _path()
    with suppress(OSError):  # a folder that cannot be written costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, canonical({"machine": machine(), "pace": asdict(pace)}).encode())
    return pace
