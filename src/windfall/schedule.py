"""The schedule: which runs of a graph are to be trained, in what order, and what came of them."""

import contextlib
import errno
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from windfall import seeds
from windfall.engines.rule import Choice, choose
from windfall.graph import Graph
from windfall.models import Model
from windfall.runs import Pruned
from windfall.store import Lab
from windfall.worker import Job

Unit = tuple[str, ...]


@dataclass
class Progress:
    """How far an execution is.

    Args:
        total: number of runs.
        finished: number of runs that are stored, found or trained.
        work: of all runs that had to be trained, in steps.
        worked: of it, done.
        seconds: since the beginning.
        message: something to tell the user once, a line or several, or None.
    """

    total: int
    finished: int = 0
    work: int = 0
    worked: int = 0
    seconds: float = 0.0
    message: str | None = None

    def tell(self, message: str) -> None:
        """Add something to tell the user once."""
        self.message = message if self.message is None else f"{self.message}\n{message}"

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
    networks: dict[Model, nn.Module] = {}
    made: dict[tuple[Model, float, bool], Choice] = {}
    found: dict[str, Choice] = {}
    for address, run in graph.runs.items():
        match run.start:
            case Pruned(prune=prune, level=level) if not prune.is_structured:
                density = graph.density(level)
            case _:  # a network without channels is trained whole
                density = 1.0
        if run.model not in networks:
            with seeds.isolated(0, "inspect"):
                networks[run.model] = run.model.build(shape, graph.network.num_classes)
        key = run.model, density, bool(run.recipe.sparsity)
        if key not in made:
            network = networks[run.model]
            made[key] = choose(study.engine, network, shape, density, device, run.recipe)
        found[address] = made[key]
    return found


def _nodes(graph: Graph, engines: Mapping[str, Choice]) -> dict[str, Unit]:
    """The runs that are trained together with each, itself included, if none is stored.

    Every seed has the same runs in the same order, so each has one of every node.
    """
    addresses = list(graph.runs)
    size = len(addresses) // graph.study.num_seeds
    assert size * graph.study.num_seeds == len(addresses)
    nodes = {address: (address,) for address in addresses}
    for place in range(size):
        node = tuple(addresses[place::size])
        choice = engines.get(node[0])
        if choice is not None and choice.engine == "stacked":
            nodes |= dict.fromkeys(node, node)
    return nodes


class Queue:
    """Which runs are to be done, which are ready, in what order, and what came of the rest.

    It hands out units: runs that are trained together, as one program. Where the engine is the
    stacked one these are the runs of a node, one of every seed, that are not stored; a stored run
    that lacks something goes with those it was trained with. Any other run is a unit of its own.

    Args:
        graph: whose runs are to be done.
        lab: where they are kept.
        engines: of the runs, by address; a run that is not named is trained alone.
    """

    def __init__(self, graph: Graph, lab: Lab, engines: Mapping[str, Choice] | None = None) -> None:
        self.graph, self.lab, self.runs = graph, lab, graph.runs
        self.stored = lab.records(graph.runs)
        self.done = {a for a, r in self.stored.items() if lab.holds(r, graph.keep[a])}
        self.outcome = Outcome(reused=len(self.stored))
        self.waiting = [address for address in graph.runs if address not in self.done]
        self.is_full = False
        self.deaths = Counter[Unit]()
        self.together = _nodes(graph, engines or {})
        self.together |= {address: record.unit for address, record in self.stored.items()}
        self.busy_until: dict[str, float] = {}
        height = dict.fromkeys(graph.runs, 0)
        for address in reversed(graph.runs):
            parent = graph.runs[address].parent
            if parent is not None:
                height[parent] = max(height[parent], height[address] + 1)
        self.waiting.sort(key=lambda address: -height[address])

    def progress(self) -> Progress:
        """How far it is at the beginning."""
        return Progress(len(self.runs), len(self.done), self.work(self.waiting))

    def job(self, unit: Unit, checkpoint_seconds: float) -> Job:
        """What is asked of the worker that gets the unit."""
        first, *others = unit
        keep = frozenset[int]().union(*(self.graph.keep[address] for address in unit))
        companions = {address: self.runs[address] for address in others}
        engine = self.graph.study.engine
        return Job(self.runs[first], first, keep, checkpoint_seconds, engine, companions)

    def work(self, addresses: Iterable[str]) -> int:
        """Their number of steps."""
        clocks = [self.graph.clock(address) for address in addresses]
        return sum(last - first for first, last in clocks)

    def worked(self, unit: Unit, step: int) -> int:
        """The number of steps that runs trained together have done at a step."""
        return sum(step - self.runs[address].clock[0] for address in unit)

    def take(self) -> Unit:
        """The next runs that can be trained now, together; none if there are none."""
        clock = time.monotonic()

        def is_ready(address: str) -> bool:
            parent = self.runs[address].parent
            is_next = parent is None or parent in self.done
            return is_next and self.busy_until.get(address, 0) <= clock

        for address in self.waiting:
            unit = self._unit(address) if is_ready(address) else ()
            if unit and all(map(is_ready, unit)):
                self.waiting = [other for other in self.waiting if other not in unit]
                return unit
        return ()

    def _unit(self, address: str) -> Unit:
        """The waiting runs that are trained together with this one, itself included, in order."""
        together = self.together[address]
        waiting = {other for other in self.waiting if self.together[other] == together}
        return tuple(other for other in together if other in waiting)

    def put_back(self, unit: Unit, wait_seconds: float = 0.0) -> None:
        """Runs that were taken are to be taken again, not before a time.

        Those that another process has stored meanwhile leave the others.
        """
        again = [address for address in unit if address not in self.outcome.failures]
        self.busy_until |= dict.fromkeys(again, time.monotonic() + wait_seconds)
        self.together |= {a: record.unit for a, record in self.lab.records(again).items()}
        self.waiting[:0] = again

    def settle(self, unit: Unit, result: str, reason: str = "") -> None:
        """Take in how runs ended: `trained`, `reused`, `failed`, or `full` (the disk).

        One of them that has failed before the others ended has failed.
        """
        for address in unit:
            if address not in self.outcome.failures:
                self._settle(address, result, reason)
        if result == "full":
            self.is_full = True
            for other in self.waiting:
                self.outcome.failures[other] = "not trained: no space is left where the lab is"
            self.waiting.clear()

    def _settle(self, address: str, result: str, reason: str) -> None:
        if result in ("trained", "reused"):
            self.done.add(address)
            self.outcome.trained += result == "trained"
            self.outcome.reused += result == "reused" and address not in self.stored
        else:
            self._fail(address, reason)

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
