"""Training one run in a lab, and the process that does so for an executor.

`perform` takes a run from wherever it stands (stored, checkpointed, or not begun) to finished. A
worker process reads jobs as lines of JSON and answers with events; it ends when the pipe closes.
"""

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
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from windfall import data as datasets
from windfall import models, seeds, tickets
from windfall.data import Dataset
from windfall.engines import rule
from windfall.engines.contract import Task
from windfall.initialize import initial_parameters
from windfall.prune import ToStep
from windfall.runs import Fresh, Run
from windfall.spec import Json, SpecError, canonical, digest
from windfall.store import FULL, Lab, Record, now
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
        checkpoint_seconds: of training between two checkpoints, at least 0.
        engine: that is asked for; `auto` is the fixed rule's.
    """

    run: Run
    address: str
    keep: frozenset[int]
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    engine: rule.Asked = "auto"

    def to_json(self) -> Json:
        """The job as JSON, where the data lies included."""
        run = self.run.to_json(addressed=False)
        return {
            "run": run,
            "address": self.address,
            "keep": sorted(self.keep),
            "checkpoint_seconds": self.checkpoint_seconds,
            "engine": self.engine,
        }

    @classmethod
    def from_json(cls, job: Json) -> "Job":
        """The job that `to_json` wrote."""
        run, seconds = Run.from_json(job["run"]), job.get("checkpoint_seconds", CHECKPOINT_SECONDS)
        keep, engine = frozenset(job["keep"]), job.get("engine", "auto")
        return cls(run, job["address"], keep, seconds, engine)


def versions() -> dict[str, str]:
    """Versions that are recorded with every run."""
    return {name: version(name) for name in ("windfall", "torch", "numpy")}


def ended(problem: Exception) -> tuple[str, str]:
    """What an exception makes of a run, `failed` or `full`, and why, in text any file takes."""
    is_full = isinstance(problem, OSError) and problem.errno in FULL
    reason = f"{type(problem).__name__}: {problem}".encode(errors="replace").decode()
    return "full" if is_full else "failed", reason


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
        name = digest([run.data.to_json(), run.data_sha256])  # the hash alone knows no split
        if name not in self._data:
            self.lab.lend_data(run.data)
            data = datasets.load(run.data)
            if data.sha256 != run.data_sha256:
                raise SpecError(
                    f"`data` must be what the run was made for, sha256 {run.data_sha256[:12]};"
                    f" got {data.sha256[:12]}. The files have changed since; run the study again."
                )
            self._data[name] = data.to(self.device)
        return self._data[name]

    def network(self, run: Run) -> nn.Module:
        """The run's network, to be given a state; what else its constructor draws is the seed's."""
        data = self.data(run)
        with seeds.isolated(run.seed, "build"):
            return run.model.build(data.input_shape, data.num_classes)

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
            SpecError: when pruning would empty a layer, or its chain diverged.
            BrokenTicket: when the ticket is not what it says.
        """
        if isinstance(run.start, Fresh):
            return self.initial(run, run.start)
        kinds = models.kinds(self.network(run), self.data(run).input_shape)
        origin_address, origin = self._origin(run.start.parent)
        assert isinstance(origin.start, Fresh)
        initial = self.initial(origin, origin.start)
        parent = self.lab.weights(run.start.parent)
        match run.start.weights:
            case ToStep(step=0):
                source = initial
            case ToStep(step=step):
                source = self.lab.weights(origin_address).snapshots.get(step)
            case Fresh() as fresh:
                source = self.initial(run, fresh)
            case _:
                source = parent
        if source is None:
            raise SpecError(
                f"`start.weights.step` must be one that run {origin_address[:12]} came by; got"
                f" {run.clock[0]}, and it had diverged before."
            )
        state = tickets.begin(run.start, tickets.Lineage(initial, parent, source), kinds, run.seed)
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
            if record is not None and self.lab.holds(record, job.keep):
                return "reused"
            with quiet_machine():
                final, seconds, engine = self._train(job, record, pulse)
            if record is None:
                self.lab.finish(self._recorded(job, final, seconds, engine), final)
                return "trained"
            self._prove_replay(record, final)
            self.lab.finish(replace(record, snapshots=sorted(final.snapshots)), final)
            return "reused"

    def _prove_replay(self, record: Record, final: State) -> None:
        """Check that a run trained again, for what its stored one lacks, is the same bit for bit.

        Raises:
            RuntimeError: when it is not.
        """
        is_same = repr(final.evaluations) == repr(record.evaluations)  # NaN equals itself
        if is_same and self.lab.has_weights(record.address):
            stored, now_trained = self.lab.weights(record.address).tensors(), final.tensors()
            is_same = all(
                _bits(tensor) == _bits(now_trained[name])
                for name, tensor in stored.items()
                if name != "losses"  # of the steps since the last evaluation: not stored
            )
        if not is_same:
            raise RuntimeError(
                "a replay for its snapshots ended with other metrics or weights than the stored"
                " run's; was it stored on another machine or by other versions?"
            )

    def _train(
        self, job: Job, record: Record | None, pulse: Callable[[int], bool]
    ) -> tuple[State, float, str]:
        keep = job.keep | frozenset(record.snapshots if record else ())
        run, data, network = job.run, self.data(job.run), self.network(job.run)
        state, facts = self._resumed(job, network, record, keep)
        keep = frozenset(facts["keep"])  # a checkpoint's too: its next one will claim them
        begun = saved = time.monotonic()

        def tick(step: int, state_now: Callable[[], State]) -> None:
            nonlocal saved
            is_stopping, clock = pulse(step), time.monotonic()
            if is_stopping or clock - saved > job.checkpoint_seconds:
                facts["seconds"] += clock - saved
                self.lab.save_checkpoint(job.address, state_now(), facts)
                saved = time.monotonic()
            if is_stopping:
                raise Stopped

        task = Task(network, data, run.recipe, run.seed, run.clock[1], keep)
        spent, engine = facts["seconds"], facts["made_by"]["engine"]
        final = rule.train(engine.partition("/")[0], task, state, tick)
        return final, spent + time.monotonic() - begun, engine

    def _resumed(
        self, job: Job, network: nn.Module, record: Record | None, keep: frozenset[int]
    ) -> tuple[State, Json]:
        """The state to train on from: of the checkpoint, if this worker would have written it."""
        found = self.lab.checkpoint(job.address)
        if found is not None:
            state, facts = found
            made_by = self._made_by(job, network, record, state)
            if keep <= set(facts["keep"]) and facts.get("made_by", made_by) == made_by:
                return state, {"made_by": made_by, **facts}
        state = self.beginning(job.run)
        made_by = self._made_by(job, network, record, state)
        return state, {"seconds": 0.0, "keep": sorted(keep), "made_by": made_by}

    def _made_by(self, job: Job, network: nn.Module, record: Record | None, state: State) -> Json:
        """The engine and versions of a training; a replay's engine is that of the stored run."""
        asked = job.engine if record is None else cast(rule.Name, record.engine.partition("/")[0])
        shape, density = self.data(job.run).input_shape, rule.kept(state)
        engine = rule.choose(asked, network, shape, density, self.device).engine
        return {"engine": f"{engine}/{self.device}", "versions": versions()}

    def _recorded(self, job: Job, final: State, seconds: float, engine: str) -> Record:
        kept = sum(int(mask.sum()) for mask in final.masks.values()) if final.masks else -1
        return Record(
            job.address,
            job.run.to_json(),
            "diverged" if final.diverged else "done",
            final.evaluations,
            sorted(final.snapshots),
            kept,
            seconds,
            engine,
            versions(),
            now(),
        )


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


# ---- the process ---------------------------------------------------------------------------


def _listen(messages: BinaryIO, jobs: "queue.Queue[Json]", stopping: threading.Event) -> None:
    for line in messages:
        message = json.loads(line)
        if message.get("stop"):
            stopping.set()
        jobs.put(message)
    os._exit(1)  # the pipe closed: nobody is there to hear of the run, and its checkpoint stands


def _serve(lab: Lab, device: str, messages: BinaryIO, events: BinaryIO) -> None:
    jobs: queue.Queue[Json] = queue.Queue()
    stopping = threading.Event()
    threading.Thread(target=_listen, args=(messages, jobs, stopping), daemon=True).start()
    workshop = Workshop(lab, device)

    def tell(**event: Any) -> None:
        events.write(canonical(event).encode() + b"\n")
        events.flush()

    tell(event="ready")
    while not (message := jobs.get()).get("stop"):
        told = time.monotonic()

        def pulse(step: int) -> bool:
            nonlocal told
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                tell(event="step", step=step)
            return stopping.is_set()

        try:
            result = workshop.perform(Job.from_json(message), pulse)
            tell(event="end", result=result, reason=None)
        except Stopped:
            return
        except Exception as problem:
            result, reason = ended(problem)
            if result == "failed":
                traceback.print_exc(file=sys.stderr)
            tell(event="end", result=result, reason=reason)


def main() -> None:
    """Serve jobs from standard input until it closes; arguments: the lab and the device."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the executor hears it and says stop
    # the pipes are this module's alone: what a user's code reads or prints goes elsewhere
    messages, events = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    with redirect_stdout(sys.stderr):
        _serve(Lab(sys.argv[1]), sys.argv[2], messages, events)


if __name__ == "__main__":
    main()
