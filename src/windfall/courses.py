"""Courses in the lab: experiments of the laboratory, trained by processes and kept by address.

    lab/courses/ADDRESS.safetensors        a finished experiment: its course, and its facts
    lab/checkpoints/ADDRESS.safetensors    one that was stopped

An experiment is finished when its file exists, which is written whole. One that was stopped goes on
from its last checkpoint and ends bit for bit as an unbroken one would have. A worker is a process
that is given one experiment a line on its standard input and ends when that is closed.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from windfall import experiments, measures, states
from windfall.execute import Interrupted
from windfall.experiments import AnyState, Experiment, Pulse, num_macs, num_steps
from windfall.luck import address
from windfall.measures import Outcome
from windfall.schedule import Progress
from windfall.spec import Json, SpecError, canonical, decode
from windfall.store import Lab, now
from windfall.worker import CHECKPOINT_SECONDS, versions

RETRIES = 1  # of an experiment whose worker died
TRIAL_SECONDS = 1.0
TELL_SECONDS = 0.1  # between two words of how far a training is
TICK_SECONDS = 0.3  # between two looks at what workers say
_SERVE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1));"
    " from windfall.courses import serve; serve()"
)

# -- files -----------------------------------------------------------------------------------------


def _path(lab: Lab, name: str) -> Path:
    return lab.folder / "courses" / f"{name}.safetensors"


def is_stored(lab: Lab, name: str) -> bool:
    """Whether the experiment of an address is finished."""
    return _path(lab, name).exists()


def stored(lab: Lab, name: str) -> tuple[Outcome, Json]:
    """A finished experiment's outcome, and its facts: `experiment`, `seed`, `seconds`, ...

    Raises:
        SpecError: when its file is not whole.
    """
    tensors, facts = states.read_tensors(_path(lab, name))
    return measures.outcome(tensors, diverged=facts["status"] == "diverged"), facts


def _checkpoint(lab: Lab, name: str) -> Path:
    return lab.folder / "checkpoints" / f"{name}.safetensors"


# -- one experiment --------------------------------------------------------------------------------


def train(
    lab: Lab, experiment: Any, seed: int, tell: Callable[[int], None] = lambda _: None
) -> bool:
    """Train and keep one experiment; whether it was trained here, or was there already.

    Args:
        lab: where it is kept.
        experiment: of the family `Experiment`.
        seed: of it.
        tell: called with the step, now and then; it may raise to stop.
    """
    name = address(experiment, seed)
    while True:
        with lab.locked(name) as mine:
            if is_stored(lab, name):
                return False
            if mine:
                _trained(lab, experiment, seed, tell)
                return True
        time.sleep(TICK_SECONDS)  # another process trains it


def _trained(lab: Lab, experiment: Any, seed: int, tell: Callable[[int], None]) -> None:
    begun, name = time.monotonic(), address(experiment, seed)
    parent, grown = experiments.parent(experiment), None
    if parent is not None:
        train(lab, parent, seed, tell)
        grown, _ = stored(lab, address(parent, seed))
    before, state, path = 0.0, None, _checkpoint(lab, name)
    if path.exists():
        tensors, facts = states.read_tensors(path)
        state, before = experiments.restored(experiment, tensors, facts), facts["seconds"]
    pulse = _pulse(path, begun, before, tell)
    outcome = experiments.run(experiment, seed, grown=grown, state=state, pulse=pulse)
    facts = {
        "experiment": experiment.to_json(),
        "seed": seed,
        "status": "diverged" if outcome.diverged else "done",
        "seconds": before + time.monotonic() - begun,
        "versions": versions(),
        "note": experiments.data_note(experiment),
        "created": now(),
    }
    _path(lab, name).parent.mkdir(exist_ok=True)
    states.write_tensors(_path(lab, name), outcome.tensors(), facts)
    _checkpoint(lab, name).unlink(missing_ok=True)


def _pulse(path: Path, begun: float, before: float, tell: Callable[[int], None]) -> Pulse:
    """A pulse that saves a checkpoint and tells the step, each when it is time."""
    saved = told = time.monotonic()

    def pulse(step: int, state: Callable[[], AnyState]) -> None:
        nonlocal saved, told
        now = time.monotonic()
        if now - saved >= CHECKPOINT_SECONDS:
            held = state()
            facts = held.facts() | {"seconds": before + now - begun}
            states.write_tensors(path, held.tensors(), facts)
            saved = now
        if now - told >= TELL_SECONDS:
            tell(step)
            told = now

    return pulse


# -- workers ---------------------------------------------------------------------------------------


def serve() -> None:
    """A worker: trains what its standard input names, a line each, and says how far it is."""
    torch.set_num_threads(1)  # one experiment a core: their products are too small for more

    def say(message: Json) -> None:
        try:
            print(canonical(message), flush=True)
        except BrokenPipeError:  # who asked was killed
            os._exit(1)

    for line in sys.stdin:
        job = json.loads(line)
        lab = Lab(job["lab"])
        try:
            experiment = decode(Experiment, job["experiment"])
            trained = train(lab, experiment, job["seed"], lambda step: say({"step": step}))
            say({"done": True, "trained": trained})
        except Exception as problem:  # whatever it is, the others go on
            say({"done": True, "failed": f"{type(problem).__name__}: {problem}"})
        finally:
            lab.close()


class _Crew:
    """Threads that each drive a worker process through the jobs that are left."""

    def __init__(self, lab: Lab, jobs: Iterable[tuple[str, Any, int]]) -> None:
        self.lab, self.events = lab, queue.Queue[tuple[str, Json]]()
        self.jobs = queue.SimpleQueue[tuple[str, Any, int]]()
        for job in jobs:
            self.jobs.put(job)
        self.processes: list[subprocess.Popen[str]] = []
        self.threads: list[threading.Thread] = []
        self.is_over = False

    def start(self, num: int) -> None:
        self.threads = [threading.Thread(target=self._drive, daemon=True) for _ in range(num)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """End all workers; what they were at goes on from its checkpoint another time."""
        self.is_over = True
        for thread in self.threads:
            while thread.is_alive():  # it may be hiring a worker just now
                for process in self.processes:
                    process.kill()
                thread.join(TICK_SECONDS)
        for process in self.processes:
            with process:  # closes its pipes
                process.kill()

    def _hired(self) -> subprocess.Popen[str]:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C is for the caller, who then ends it
            env={**os.environ, **dict.fromkeys(names, "1")},
        )
        self.processes.append(process)
        return process

    def _drive(self) -> None:
        process: subprocess.Popen[str] | None = None
        while not self.is_over:
            try:
                name, experiment, seed = self.jobs.get_nowait()
            except queue.Empty:
                break
            for attempt in range(1 + RETRIES):
                if self.is_over:
                    return
                process = process or self._hired()
                if self._did(process, name, experiment, seed):
                    break
                code, process = process.wait(), None
                if attempt == RETRIES and not self.is_over:
                    reason = f"its worker died twice (exit {code})"
                    self.events.put((name, {"done": True, "failed": reason}))

    def _did(self, process: "subprocess.Popen[str]", name: str, experiment: Any, seed: int) -> bool:
        told = experiment.to_json(addressed=False)  # where its data lie, too
        job = {"lab": str(self.lab.folder.resolve()), "experiment": told}
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(canonical(job | {"seed": seed}) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            message = json.loads(line)
            self.events.put((name, message))
            if message.get("done"):
                return True
        return False


def execute(
    lab: Lab,
    wanted: Mapping[str, tuple[Any, int]],
    *,
    workers: int,
    watch: Callable[[Progress], None],
) -> tuple[int, dict[str, str]]:
    """Train what is missing.

    Args:
        lab: where courses are kept.
        wanted: experiment and seed by address.
        workers: number of processes, at least 1.
        watch: called with the progress several times a second.

    Returns:
        how many were trained here, and the reasons of those that failed by address.

    Raises:
        Interrupted: on Ctrl-C; everything finished is kept.
    """
    missing = {name: job for name, job in wanted.items() if not is_stored(lab, name)}
    work = {name: _work(experiment) for name, (experiment, _) in missing.items()}
    longest = sorted(missing, key=lambda name: -work[name])
    crew = _Crew(lab, [(name, *missing[name]) for name in longest])
    begun, worked, left = time.monotonic(), dict.fromkeys(missing, 0), set(missing)
    trained, failures = 0, dict[str, str]()
    try:
        crew.start(min(workers, len(missing)))
        while left:
            with contextlib.suppress(queue.Empty):
                name, event = crew.events.get(timeout=TICK_SECONDS)
                if "step" in event:
                    total = num_steps(missing[name][0])
                    worked[name] = work[name] * event["step"] // total
                if event.get("done"):
                    left.discard(name)
                    worked[name] = work[name]
                    trained += bool(event.get("trained"))
                    if "failed" in event:
                        failures[name] = event["failed"]
            done, seconds = len(wanted) - len(left), time.monotonic() - begun
            total, so_far = sum(work.values()), sum(worked.values())
            watch(Progress(len(wanted), done, total, so_far, seconds))
    except KeyboardInterrupt:
        raise Interrupted from None
    finally:
        crew.stop()
    return trained, failures


def _work(experiment: Any) -> int:
    """What a training costs beside others: its products, and what any step costs at least."""
    return num_steps(experiment) * (30_000 + num_macs(experiment))


class _EnoughError(Exception):
    """A trial has run long enough."""


def seconds(experiment: Any) -> float | None:
    """What one training would take on one core: a trial of about a second, scaled.

    None where a training cannot be stopped on the way. What is read off the trained network is not
    in it.
    """
    tried, marks = experiments.trial(experiment), list[tuple[int, float]]()

    def pulse(step: int, state: Any) -> None:  # noqa: ARG001  the family's signature
        marks.append((step, time.monotonic()))
        if marks[-1][1] - marks[0][1] >= TRIAL_SECONDS:
            raise _EnoughError

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        experiments.run(tried, 0, pulse=pulse)
    except _EnoughError:
        pass
    finally:
        torch.set_num_threads(threads)
    if len(marks) < 2:
        return None
    (first, begun), (last, ended) = marks[0], marks[-1]
    return (ended - begun) / (last - first) * num_steps(experiment)


def read(lab: Lab, wanted: Iterable[str]) -> dict[str, tuple[Outcome, Json]]:
    """The finished ones among these addresses."""
    return {name: stored(lab, name) for name in wanted if is_stored(lab, name)}


def refuse_missing(found: Mapping[str, Any], wanted: Iterable[str], name: str) -> None:
    """Refuse, by a `SpecError`, a study of which nothing is in the lab."""
    if not any(each in found for each in wanted):
        raise SpecError(
            f"STUDY must have been run in the lab with these settings; got {name}. Run it: windfall"
            f" run {name}."
        )
