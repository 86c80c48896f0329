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

from windfall import states
from windfall.execute import Interrupted
from windfall.laboratory import (
    Course,
    Experiment,
    Laboratory,
    Look,
    State,
    Training,
    matrix_course,
    num_steps,
    num_weights,
)
from windfall.luck import address
from windfall.masks import Params
from windfall.schedule import Progress
from windfall.spec import Json, SpecError, canonical, decode
from windfall.store import Lab, now
from windfall.worker import CHECKPOINT_SECONDS, versions

RETRIES = 1  # of an experiment whose worker died
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


def stored(lab: Lab, name: str) -> tuple[Course, Json]:
    """A finished experiment's course, and its facts: `experiment`, `seed`, `seconds`, ...

    Raises:
        SpecError: when its file is not whole.
    """
    tensors, facts = states.read_tensors(_path(lab, name))
    return Course.restored(tensors, diverged=facts["status"] == "diverged"), facts


def _checkpoint(lab: Lab, name: str) -> Path:
    return lab.folder / "checkpoints" / f"{name}.safetensors"


def _flat(state: State) -> Params:
    tensors: Params = {f"params/{name}": value for name, value in state.params.items()}
    for place, look in enumerate(state.looks):
        tensors[f"looks/{place}/loss"] = look.loss
        for kind in ("rho", "outgoing", "gradient"):
            found: Params = getattr(look, kind)
            tensors |= {f"looks/{place}/{kind}/{name}": value for name, value in found.items()}
    return tensors


def _restored(tensors: Params, facts: Json) -> State:
    def under(prefix: str) -> Params:
        found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        return dict(sorted(found.items()))

    looks = [
        Look(
            step,
            tensors[f"looks/{place}/loss"],
            *(under(f"looks/{place}/{kind}/") for kind in ("rho", "outgoing", "gradient")),
        )
        for place, step in enumerate(facts["steps"])
    ]
    return State(under("params/"), looks)


# -- one experiment --------------------------------------------------------------------------------


def train(
    lab: Lab, experiment: Any, seed: int, tell: Callable[[int], None] = lambda _: None
) -> bool:
    """Train and keep one experiment; whether it was trained here, or was there already.

    Args:
        lab: where it is kept.
        experiment: a `Laboratory` or `Matrices`.
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
    name, begun, before = address(experiment, seed), time.monotonic(), 0.0
    if isinstance(experiment, Laboratory):
        state, path = None, _checkpoint(lab, name)
        if path.exists():
            tensors, facts = states.read_tensors(path)
            state, before = _restored(tensors, facts), facts["seconds"]
        course = Training(experiment, seed, state).run(_pulse(path, begun, before, tell))
    else:
        course = matrix_course(experiment, seed)
    facts = {
        "experiment": experiment.to_json(),
        "seed": seed,
        "status": "diverged" if course.diverged else "done",
        "seconds": before + time.monotonic() - begun,
        "versions": versions(),
        "created": now(),
    }
    _path(lab, name).parent.mkdir(exist_ok=True)
    states.write_tensors(_path(lab, name), course.tensors(), facts)
    _checkpoint(lab, name).unlink(missing_ok=True)


def _pulse(
    path: Path, begun: float, before: float, tell: Callable[[int], None]
) -> Callable[[int, Callable[[], State]], None]:
    saved = time.monotonic()

    def pulse(step: int, state: Callable[[], State]) -> None:
        nonlocal saved
        if time.monotonic() - saved >= CHECKPOINT_SECONDS:
            held = state()
            took = before + time.monotonic() - begun
            facts = {"steps": [look.step for look in held.looks], "seconds": took}
            states.write_tensors(path, _flat(held), facts)
            saved = time.monotonic()
        tell(step)

    return pulse


# -- workers ---------------------------------------------------------------------------------------


def serve() -> None:
    """A worker: trains what its standard input names, a line each, and says how far it is."""
    torch.set_num_threads(1)  # one experiment a core: their products are too small for more

    def say(message: Json) -> None:
        print(canonical(message), flush=True)

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
        job = {"lab": str(self.lab.folder.resolve()), "experiment": experiment.to_json()}
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
    """What a training costs beside others: its weights, and what any step costs at least."""
    return num_steps(experiment) * (30_000 + num_weights(experiment))


def read(lab: Lab, wanted: Iterable[str]) -> dict[str, tuple[Course, Json]]:
    """The finished ones among these addresses."""
    return {name: stored(lab, name) for name in wanted if is_stored(lab, name)}


def refuse_missing(found: Mapping[str, Any], wanted: Iterable[str], name: str) -> None:
    """Refuse, by a `SpecError`, a study of which nothing is in the lab."""
    if not any(each in found for each in wanted):
        raise SpecError(
            f"STUDY must have been run in the lab with these settings; got {name}. Run it: windfall"
            f" run {name}."
        )
