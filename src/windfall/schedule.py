"""The schedule: which runs of a graph are to be trained, in what order, and what came of them."""

import contextlib
import errno
import time
from collections import Counter
from dataclasses import dataclass, field

from windfall import seeds
from windfall.engines.rule import Choice, choose
from windfall.runs import Pruned
from windfall.store import Lab
from windfall.study import Graph
from windfall.worker import Job


@dataclass
class Progress:
    """How far an execution is.

    Args:
        total: number of runs.
        finished: number of runs that are stored, found or trained.
        work: of all runs that had to be trained, in steps.
        worked: of it, done.
        seconds: since the beginning.
        message: something to tell the user once, or None.
    """

    total: int
    finished: int = 0
    work: int = 0
    worked: int = 0
    seconds: float = 0.0
    message: str | None = None

    @property
    def remaining_seconds(self) -> float | None:
        """An estimate from the work done so far; None before there is any."""
        return self.seconds * (self.work - self.worked) / self.worked if self.worked else None


@dataclass
class Outcome:
    """What an execution did.

    Args:
        reused: number of runs found stored.
        trained: number of runs trained now.
        failures: reasons of the runs that failed, by address.
    """

    reused: int = 0
    trained: int = 0
    failures: dict[str, str] = field(default_factory=dict[str, str])


def engines(graph: Graph, device: str) -> dict[str, Choice]:
    """The engine that trains each run of a graph on a device, by address.

    Raises:
        Unsupported: when the study asks for one by name that cannot train its network.
    """
    study, shape = graph.study, graph.network.input_shape
    with seeds.isolated(0, "inspect"):
        network = study.model.build(shape, graph.network.num_classes)
    made: dict[float, Choice] = {}
    found: dict[str, Choice] = {}
    for address, run in graph.runs.items():
        density = graph.density(run.start.level) if isinstance(run.start, Pruned) else 1.0
        if density not in made:
            made[density] = choose(study.engine, network, shape, density, device)
        found[address] = made[density]
    return found


class Queue:
    """Which runs are to be done, which are ready, in what order, and what came of the rest."""

    def __init__(self, graph: Graph, lab: Lab) -> None:
        self.graph, self.lab, self.runs = graph, lab, graph.runs
        self.stored = lab.records(graph.runs)
        self.done = {a for a, r in self.stored.items() if lab.holds(r, graph.keep[a])}
        self.outcome = Outcome(reused=len(self.stored))
        self.waiting = [address for address in graph.runs if address not in self.done]
        self.is_full = False
        self.deaths = Counter[str]()
        self.busy_until: dict[str, float] = {}
        height = dict.fromkeys(graph.runs, 0)
        for address in reversed(graph.runs):
            parent = graph.runs[address].parent
            if parent is not None:
                height[parent] = max(height[parent], height[address] + 1)
        self.waiting.sort(key=lambda address: -height[address])

    def progress(self) -> Progress:
        """How far it is at the beginning."""
        return Progress(len(self.runs), len(self.done), sum(map(self.work, self.waiting)))

    def job(self, address: str, checkpoint_seconds: float) -> Job:
        """What is asked of the worker that gets the run."""
        keep, engine = self.graph.keep[address], self.graph.study.engine
        return Job(self.runs[address], address, keep, checkpoint_seconds, engine)

    def work(self, address: str) -> int:
        """Its number of steps."""
        first, last = self.runs[address].clock
        return last - first

    def take(self) -> str | None:
        """The next run that can be trained now."""
        clock = time.monotonic()
        for address in self.waiting:
            parent = self.runs[address].parent
            if (parent is None or parent in self.done) and self.busy_until.get(address, 0) <= clock:
                self.waiting.remove(address)
                return address
        return None

    def put_back(self, address: str, wait_seconds: float = 0.0) -> None:
        """A run that was taken is to be taken again, not before a time."""
        self.busy_until[address] = time.monotonic() + wait_seconds
        self.waiting.insert(0, address)

    def settle(self, address: str, result: str, reason: str = "") -> None:
        """Take in how a run ended: `trained`, `reused`, `failed`, or `full` (the disk)."""
        if result in ("trained", "reused"):
            self.done.add(address)
            self.outcome.trained += result == "trained"
            self.outcome.reused += result == "reused" and address not in self.stored
            return
        self._fail(address, reason)
        if result == "full":
            self.is_full = True
            for other in self.waiting:
                self.outcome.failures[other] = "not trained: no space is left where the lab is"
            self.waiting.clear()

    def _fail(self, address: str, reason: str) -> None:
        """A run failed: so have all that descend from it."""
        self.outcome.failures[address] = reason
        for child in [a for a in self.waiting if self.runs[a].parent == address]:
            self.waiting.remove(child)
            self._fail(child, f"its parent {address[:12]} failed: {reason}")

    def conclude(self) -> Outcome:
        """What came of it all, the failures noted in the lab.

        Raises:
            OSError: when the disk is full.
        """
        failures = self.outcome.failures
        for address, reason in failures.items():
            with contextlib.suppress(OSError):  # a full disk cannot keep the reason either
                self.lab.fail(address, reason)
        if self.is_full:
            told = f"no space is left in {self.lab.folder}; {len(failures)} runs are not trained"
            raise OSError(errno.ENOSPC, told)
        return self.outcome
