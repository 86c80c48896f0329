"""The executor: trains what a graph of runs still lacks, on local worker processes.

It knows processes and nothing of pruning. Every run goes to a worker as soon as its parent is
stored, the longest chain first; runs that are one program go together. A worker that dies costs one
retry of its runs; then they have failed, with the reason, and so have their descendants, and all
others go on.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import torch

from windfall.graph import Graph
from windfall.models import is_importable
from windfall.schedule import Outcome, Progress, Queue, Unit, engines
from windfall.spec import Json, SpecError, canonical
from windfall.store import Lab
from windfall.worker import CHECKPOINT_SECONDS, Stopped, Workshop, ended

GRACE_SECONDS = 20.0  # for workers to save their checkpoints after Ctrl-C, before they are killed
EXIT_SECONDS = 5.0  # for a worker that closed its output to end with its own exit code
RETRIES = 1  # of a run whose worker died
BUSY_SECONDS = 0.5  # between two looks at a run that another process is training

# A worker finds modules where its caller does, so that it builds the same user's network.
_SERVE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1));"
    " from windfall.service import main; main()"
)


class Interrupted(KeyboardInterrupt):
    """The user stopped a study; everything finished is kept, the rest has checkpoints."""


Watch = Callable[[Progress], None]


def pick_device(name: str) -> str:
    """The device that `auto`, `cpu` or `cuda` means on this machine.

    Raises:
        SpecError: when it is not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise SpecError(f"`--device` must be auto, cpu or cuda; got {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise SpecError("`--device` must be one this machine has; got cuda. Use cpu or auto.")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _sigint_blocked() -> Generator[None]:
    """Blocked in processes started inside, for good; here it arrives as soon as this ends.

    A terminal's Ctrl-C reaches workers too, even before their first line of Python.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """A worker process and the runs it is at."""

    def __init__(self, lab: Lab, device: str) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        paths, folder = json.dumps(sys.path), str(lab.folder.resolve())
        with _sigint_blocked():
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, paths, folder, device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **threads},
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        os.set_blocking(self.stdout.fileno(), False)
        self.partial = b""
        self.is_ready = False
        self.unit: Unit = ()
        self.step = 0

    def send(self, message: Json) -> None:
        with contextlib.suppress(BrokenPipeError):  # its death is heard as the end of its output
            self.stdin.write(canonical(message).encode() + b"\n")
            self.stdin.flush()

    def heard(self) -> list[Json] | None:
        """The events since the last call; None when the process has ended."""
        chunk = self.stdout.read()
        if chunk == b"":
            return None
        *lines, self.partial = (self.partial + (chunk or b"")).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> str:
        """Wait for the process and say how it ended."""
        try:
            code = self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:  # its output has ended: it says nothing any more
            self.process.kill()
            code = self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # of what it was sent and never read
            self.stdin.close()
        self.stdout.close()
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
            return f"its worker was killed by {name}{hint}"
        return f"its worker ended with exit code {code}"


class _Pool:
    """Workers, the queue they serve, and what has come of it."""

    def __init__(self, queue: Queue, num: int, device: str, seconds: float, watch: Watch) -> None:
        self.queue, self.num, self.device, self.watch = queue, num, device, watch
        self.checkpoint_seconds = seconds
        self.progress = queue.progress()
        self.begun = time.monotonic()
        self.settled = 0
        self.selector = selectors.DefaultSelector()
        self.workers: list[_Worker] = []

    def run(self, stopping: threading.Event) -> Outcome:
        try:
            while not stopping.is_set() and (self.queue.waiting or self._is_active()):
                self._assign()
                self._listen(0.2)
                self._report()
            if stopping.is_set():
                self._stop()
                raise Interrupted
        finally:
            for worker in self.workers:
                worker.process.kill()
                worker.end()
            self.selector.close()
        self._report()
        return self.queue.conclude()

    def _is_active(self) -> bool:
        return any(worker.unit for worker in self.workers)

    def _assign(self) -> None:
        idle = [worker for worker in self.workers if not worker.unit]
        while self.queue.waiting and (idle or len(self.workers) < self.num):
            unit = self.queue.take()
            if not unit:
                return
            worker = idle.pop() if idle else self._hire()
            worker.unit, worker.step = unit, self.queue.runs[unit[0]].clock[0]
            worker.send(self.queue.job(unit, self.checkpoint_seconds).to_json())

    def _hire(self) -> _Worker:
        worker = _Worker(self.queue.lab, self.device)
        self.workers.append(worker)
        self.selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return worker

    def _listen(self, seconds: float) -> None:
        if not self.workers:
            time.sleep(seconds)
        for key, _ in self.selector.select(seconds):
            worker: _Worker = key.data
            events = worker.heard()
            if events is None:
                self._bury(worker)
            for event in events or ():
                self._hear(worker, event)

    def _hear(self, worker: _Worker, event: Json) -> None:
        worker.is_ready = True
        match event["event"]:
            case "step":  # halves of a stack are at different steps
                worker.step = max(worker.step, event["step"])
            case "note":
                self.progress.tell(event["text"])
            case "lost":
                self.queue.settle((event["address"],), "failed", event["reason"])
            case "end":
                self._end(worker, event["result"], event["reason"] or "")
            case _:
                pass

    def _end(self, worker: _Worker, result: str, reason: str) -> None:
        unit, worker.unit = worker.unit, ()
        if result == "busy":
            self.queue.put_back(unit, wait_seconds=BUSY_SECONDS)
        elif unit:
            self.queue.settle(unit, result, reason)
            self.settled += self.queue.work(unit)

    def _bury(self, worker: _Worker) -> None:
        self.selector.unregister(worker.stdout)
        self.workers.remove(worker)
        reason, unit = worker.end(), worker.unit
        if not unit:
            return
        self.queue.deaths[unit] += 1
        if self.queue.deaths[unit] > RETRIES:
            self.queue.settle(unit, "failed", reason)
            self.settled += self.queue.work(unit)
        else:
            self.progress.tell(f"{_named(unit)}: {reason}; it is tried once more")
            self.queue.put_back(unit)

    def _report(self) -> None:
        going = sum(self.queue.worked(worker.unit, worker.step) for worker in self.workers)
        self.progress.worked = self.settled + going
        self.progress.finished = len(self.queue.done)
        self.progress.seconds = time.monotonic() - self.begun
        self.watch(self.progress)
        self.progress.message = None

    def _stop(self) -> None:
        for worker in self.workers:
            worker.send({"stop": True})
            if not worker.is_ready:  # still importing: it has nothing to save
                worker.process.kill()
        limit = time.monotonic() + GRACE_SECONDS
        while self.workers and time.monotonic() < limit:
            self._listen(0.2)


def _named(unit: Unit) -> str:
    first, *others = unit
    among = f" (in a stack of {len(unit)})" if others else ""
    return f"run {first[:12]}{among}"


@contextlib.contextmanager
def _interruptible() -> Generator[threading.Event]:
    """An event that the first Ctrl-C sets; the second ends the process as ever."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def stop(*_: Any) -> None:
        stopping.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = [(s, signal.signal(s, stop)) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield stopping
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _in_process(
    queue: Queue, device: str, seconds: float, watch: Watch, stopping: threading.Event
) -> Outcome:
    """Train in this process: for networks that no other process can build."""
    workshop, progress, begun = Workshop(queue.lab, device), queue.progress(), time.monotonic()
    progress.message = "the network cannot be imported by name: it trains in this process alone"

    def report(worked: int) -> None:
        progress.worked = max(progress.worked, worked)  # halves of a stack go back a while
        progress.finished = len(queue.done)
        progress.seconds = time.monotonic() - begun
        watch(progress)
        progress.message = None

    def lose(address: str, problem: Exception) -> None:
        queue.settle((address,), "failed", ended(problem)[1])

    settled = 0
    while queue.waiting and not stopping.is_set():
        report(settled)
        unit = queue.take()
        if not unit:
            time.sleep(0.2)
            continue

        def pulse(step: int, before: int = settled, unit: Unit = unit) -> bool:
            report(before + queue.worked(unit, step))
            return stopping.is_set()

        job, reason = queue.job(unit, seconds), ""
        try:
            result = workshop.perform(job, pulse, progress.tell, lose)
        except Stopped:
            break
        except Exception as problem:  # a run's failure is a result
            result, reason = ended(problem)
        if result == "busy":
            queue.put_back(unit, wait_seconds=BUSY_SECONDS)
        else:
            queue.settle(unit, result, reason)
            settled += queue.work(unit)
    if stopping.is_set():
        raise Interrupted
    report(settled)
    return queue.conclude()


def execute(
    graph: Graph,
    lab: Lab,
    *,
    workers: int | None = None,
    device: str = "auto",
    watch: Watch = lambda progress: None,  # noqa: ARG005  told nothing
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Outcome:
    """Train every run of a graph that the lab does not hold.

    Args:
        graph: what a study needs.
        lab: where runs are kept.
        workers: number of processes, at least 1; None is one a core.
        device: `auto`, `cpu` or `cuda`.
        watch: called several times a second.
        checkpoint_seconds: of training between two checkpoints of a run, at least 0.

    Raises:
        SpecError: when workers or device cannot be.
        Interrupted: on Ctrl-C, after the workers have saved their checkpoints.
        OSError: when the disk is full; everything finished before is kept.
    """
    if workers is not None and workers < 1:
        raise SpecError(f"`--workers` must be at least 1; got {workers}.")
    chosen = pick_device(device)
    which = engines(graph, chosen)  # an engine asked for by name must be one that can
    with _interruptible() as stopping:
        queue = Queue(graph, lab, which)
        if not is_importable(graph.study.model):
            return _in_process(queue, chosen, checkpoint_seconds, watch, stopping)
        lab.keep_data(graph.study.data)
        num = num_cores() if workers is None else workers
        return _Pool(queue, num, chosen, checkpoint_seconds, watch).run(stopping)
