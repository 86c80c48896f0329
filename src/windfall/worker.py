"""Training one run in a lab, and the process that does so for an executor.

`perform` takes a run from wherever it stands (stored, checkpointed, or not begun) to finished. A
worker process reads jobs as lines of JSON and answers with events; it ends when the pipe closes.
"""

import errno
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TextIO

import torch

from windfall import data as datasets
from windfall import models, tickets
from windfall.data import Dataset
from windfall.engines import separate
from windfall.initialize import initial_parameters
from windfall.prune import ToStep
from windfall.runs import Fresh, Run
from windfall.spec import Json, SpecError, canonical
from windfall.store import Lab, Record, now
from windfall.train import State

CHECKPOINT_SECONDS = 30.0  # at most this much training is lost to a crash
PROGRESS_SECONDS = 0.5  # between two reports of a run's step


class Stopped(Exception):
    """Training was stopped on request, its checkpoint saved."""


@dataclass(frozen=True)
class Job:
    """What is asked of a worker.

    Args:
        run: to be trained.
        address: of the run.
        keep: steps whose snapshots must be stored.
    """

    run: Run
    address: str
    keep: frozenset[int]

    def to_json(self) -> Json:
        """The job as JSON, where the data lies included."""
        run = self.run.to_json(addressed=False)
        return {"run": run, "address": self.address, "keep": sorted(self.keep)}

    @classmethod
    def from_json(cls, job: Json) -> "Job":
        """The job that `to_json` wrote."""
        run = Run.from_json(job["run"])
        return cls(run, job["address"], frozenset(job["keep"]))


def versions() -> dict[str, str]:
    """Versions that are recorded with every run."""
    return {name: version(name) for name in ("windfall", "torch", "numpy")}


@contextmanager
def quiet_machine() -> Generator[None]:
    """One torch thread and denormals as zero: bits and speed do not depend on the caller."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


@dataclass(frozen=True)
class Workshop:
    """Where runs are trained: a lab, a device, and the data sets already read.

    Args:
        lab: where runs are kept.
        device: `cpu` or `cuda`.
    """

    lab: Lab
    device: str
    _data: dict[str, Dataset] = field(default_factory=dict[str, Dataset], repr=False)

    def data(self, run: Run) -> Dataset:
        """The run's data set on the device, its hash checked against the run's.

        Raises:
            SpecError: when the data is not what the run was made for.
        """
        if run.data_sha256 not in self._data:
            self.lab.lend_data(run.data)
            data = datasets.load(run.data)
            if data.sha256 != run.data_sha256:
                raise SpecError(
                    f"`data` must be what the run was made for, sha256 {run.data_sha256[:12]};"
                    f" got {data.sha256[:12]}. The files have changed since; run the study again."
                )
            self._data[run.data_sha256] = data.to(self.device)
        return self._data[run.data_sha256]

    def initial(self, run: Run, fresh: Fresh) -> State:
        """The state of the run's network newly initialized."""
        data = self.data(run)
        seed = run.seed if fresh.seed is None else fresh.seed
        params, buffers = initial_parameters(
            lambda: run.model.build(data.input_shape, data.num_classes),
            fresh.initialization,
            seed,
            fresh.stream,
        )
        return State(0, params, buffers)

    def beginning(self, run: Run) -> State:
        """The state at the first step of a run, made from its ancestors in the lab and proved.

        Raises:
            SpecError: when pruning would empty a layer.
            BrokenTicket: when the ticket is not what it says.
        """
        if isinstance(run.start, Fresh):
            return self.initial(run, run.start)
        data = self.data(run)
        kinds = models.kinds(run.model.build(data.input_shape, data.num_classes), data.input_shape)
        origin_address, origin = self._origin(run.start.parent)
        assert isinstance(origin.start, Fresh)
        initial = self.initial(origin, origin.start)
        parent = self.lab.weights(run.start.parent)
        match run.start.weights:
            case ToStep(step=0):
                source = initial
            case ToStep(step=step):
                source = self.lab.weights(origin_address).snapshots[step]
            case Fresh() as fresh:
                source = self.initial(run, fresh)
            case _:
                source = parent
        lineage = tickets.Lineage(initial, parent, source)
        state = tickets.begin(run.start, lineage, kinds, run.seed)
        state.step = run.clock[0]
        return state

    def _origin(self, address: str) -> tuple[str, Run]:
        while True:
            record = self.lab.record(address)
            assert record is not None, address
            run = Run.from_json(record.spec)
            if run.parent is None:
                return address, run
            address = run.parent

    def perform(self, job: Job, pulse: Callable[[int], bool] = lambda _: False) -> str:
        """Bring a run from wherever it stands to finished.

        Args:
            job: the run and what it must keep.
            pulse: called with every step; True asks to stop.

        Returns:
            `trained`, `reused`, or `busy` when another process is training it.

        Raises:
            Stopped: when `pulse` asked for it; the checkpoint is saved.
        """
        with self.lab.locked(job.address) as held:
            if not held:
                return "busy"
            record = self.lab.record(job.address)
            if record is not None and job.keep <= set(record.snapshots):
                return "reused"
            with quiet_machine():
                final, seconds = self._train(job, record, pulse)
            if record is not None and final.evaluations != record.evaluations:
                raise RuntimeError(
                    "a replay for its snapshots ended with other metrics than the stored run's;"
                    " was it stored on another machine or by other versions?"
                )
            self.lab.finish(self._recorded(job, final, seconds), final)
            return "trained" if record is None else "reused"

    def _train(
        self, job: Job, record: Record | None, pulse: Callable[[int], bool]
    ) -> tuple[State, float]:
        keep = job.keep | frozenset(record.snapshots if record else ())
        found = self.lab.checkpoint(job.address)
        facts: Json = found[1] if found else {"seconds": 0.0, "keep": sorted(keep)}
        if found is None or not keep <= set(facts["keep"]):
            found, facts = None, {"seconds": 0.0, "keep": sorted(keep)}
        state = found[0] if found else self.beginning(job.run)
        begun = saved = time.monotonic()

        def tick(step: int, state_now: Callable[[], State]) -> None:
            nonlocal saved
            is_stopping, clock = pulse(step), time.monotonic()
            if is_stopping or clock - saved > CHECKPOINT_SECONDS:
                facts["seconds"] += clock - saved
                self.lab.save_checkpoint(job.address, state_now(), facts)
                saved = time.monotonic()
            if is_stopping:
                raise Stopped

        run, data = job.run, self.data(job.run)
        network = run.model.build(data.input_shape, data.num_classes)
        task = separate.Task(network, data, run.recipe, run.seed, run.clock[1], keep)
        spent = facts["seconds"]
        final = separate.train(task, state, tick)
        return final, spent + time.monotonic() - begun

    def _recorded(self, job: Job, final: State, seconds: float) -> Record:
        kept = sum(int(mask.sum()) for mask in final.masks.values()) if final.masks else -1
        return Record(
            job.address,
            job.run.to_json(),
            "diverged" if final.diverged else "done",
            final.evaluations,
            sorted(final.snapshots),
            kept,
            seconds,
            f"separate/{self.device}",
            versions(),
            now(),
        )


# ---- the process ---------------------------------------------------------------------------


def _listen(jobs: "queue.Queue[Json]", stopping: threading.Event) -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("stop"):
            stopping.set()
        jobs.put(message)
    os._exit(1)  # the pipe closed: nobody is there to hear of the run, and its checkpoint stands


def _serve(lab: Lab, device: str, events: TextIO) -> None:
    jobs: queue.Queue[Json] = queue.Queue()
    stopping = threading.Event()
    threading.Thread(target=_listen, args=(jobs, stopping), daemon=True).start()
    workshop = Workshop(lab, device)

    def tell(**event: Any) -> None:
        print(canonical(event), file=events, flush=True)

    tell(event="ready")
    while not (message := jobs.get()).get("stop"):
        job, told = Job.from_json(message), time.monotonic()

        def pulse(step: int) -> bool:
            nonlocal told
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                tell(event="step", step=step)
            return stopping.is_set()

        try:
            tell(event="end", result=workshop.perform(job, pulse), reason=None)
        except Stopped:
            return
        except OSError as problem:
            full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            result = "full" if full else "failed"
            tell(event="end", result=result, reason=f"{type(problem).__name__}: {problem}")
        except Exception as problem:
            reason = f"{type(problem).__name__}: {problem}"
            traceback.print_exc(file=sys.stderr)
            tell(event="end", result="failed", reason=reason)


def main() -> None:
    """Serve jobs from standard input until it closes; arguments: the lab and the device."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the executor hears it and says stop
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    with redirect_stdout(sys.stderr):
        _serve(Lab(sys.argv[1]), sys.argv[2], events)


if __name__ == "__main__":
    main()
