"""Costs: the runs a study needs, which are stored, and what the rest costs.

What a run takes is known best from stored runs of its model, recipe and engine at its level; else
from its work at this machine's pace, set right by the stored runs of other levels; else from
typical figures.
"""

import heapq
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from windfall import data, pace, schedule, seeds
from windfall.engines.rule import Choice, Name
from windfall.graph import Graph
from windfall.pace import Pace
from windfall.runs import Pruned, Run
from windfall.spec import Json, digest
from windfall.store import Lab, Record
from windfall.train import Recipe
from windfall.workload import Training, Workload

FLOPS_PER_SECOND = (
    80e9  # of one core at the matrix sizes of small networks; measured, LeNet-300-100
)
STEP_SECONDS = 2.5e-4  # of a step beside its arithmetic, eager torch; measured, a 100-50 network
WORTH_SECONDS = 60.0  # of training by typical figures, for which the machine is measured
STORED, PACE, TYPICAL = "stored runs", "this machine's pace", "typical figures"


def num_evaluations(recipe: Recipe, clock: tuple[int, int]) -> int:
    """Evaluations of a run that trains from a step to another: the first and the last included."""
    first, last = clock
    every = recipe.eval_every
    return 1 + last // every - first // every + (last % every != 0)


@dataclass
class Predictor:
    """What runs take by their work and a machine's pace.

    Args:
        graph: whose runs.
        pace: of the machine.
    """

    graph: Graph
    pace: Pace
    _trainings: dict[tuple[str, str], Training] = field(default_factory=dict, init=False)
    _workloads: dict[tuple[object, ...], Workload] = field(default_factory=dict, init=False)

    @cached_property
    def num_samples(self) -> int:
        """Of an evaluation: the validation and the test part."""
        parts = data.load(self.graph.study.data)
        return len(parts.validation) + len(parts.test)

    def seconds(self, address: str, engine: Name) -> float:
        """What a run takes."""
        run = self.graph.runs[address]
        work, clock = self._workload(address, engine), self.graph.clock(address)
        first, last = clock
        step = self.pace.seconds(engine, work.step)
        look = self.pace.seconds(engine, work.evaluation(self.num_samples))
        looks = num_evaluations(run.recipe, clock)
        return self.pace.start_seconds(engine) + (last - first) * step + looks * look

    def _workload(self, address: str, engine: Name) -> Workload:
        run, kept = self.graph.runs[address], self.graph.kept(address)
        place = engine, digest([run.model.to_json(), run.recipe.to_json()])
        key = *place, *kept.values()
        if key not in self._workloads:
            if place not in self._trainings:
                self._trainings[place] = self._training(run, engine)
            counts = {name: float(count) for name, count in kept.items()}
            self._workloads[key] = self._trainings[place].workload(counts)
        return self._workloads[key]

    def _training(self, run: Run, engine: Name) -> Training:
        shape, num_classes = self.graph.network.input_shape, self.graph.network.num_classes
        with seeds.isolated(0, "inspect"):
            return Training(engine, run.model.build(shape, num_classes), shape, run.recipe)


@dataclass
class Costs:
    """What each run of a graph costs, from the best that is known.

    Args:
        graph: of the study.
        choices: the engine of each run, by address.
        records: of the stored ones.
        predictor: by this machine's pace, or None.
    """

    graph: Graph
    choices: Mapping[str, Choice]
    records: Mapping[str, Record]
    predictor: Predictor | None = None

    @property
    def missing(self) -> list[str]:
        """The runs that are not stored."""
        return [address for address in self.graph.runs if address not in self.records]

    def steps(self, address: str) -> int:
        """Of a run."""
        first, last = self.graph.clock(address)
        return last - first

    def kind(self, address: str) -> str:
        """What runs must share for the one to tell what the other takes: all but the level."""
        run = self.graph.runs[address]
        record, engine = self.records.get(address), self.choices[address].engine
        engine = engine if record is None else record.engine.partition("/")[0]
        return digest([run.model.to_json(), run.recipe.to_json(), engine])

    def _level(self, address: str) -> int:
        start = self.graph.runs[address].start
        return start.level if isinstance(start, Pruned) else 0

    @cached_property
    def _per_step(self) -> dict[tuple[str, int | None], float]:
        """Median seconds a step of stored runs, by kind and level; level None is all of them."""
        found: dict[tuple[str, int | None], list[float]] = {}
        for address, record in self.records.items():
            first = self.graph.runs[address].clock[0]
            each = record.seconds / max(1, record.evaluations[-1].step - first)
            for level in (self._level(address), None):
                found.setdefault((self.kind(address), level), []).append(each)
        return {key: statistics.median(values) for key, values in found.items()}

    @cached_property
    def _errors(self) -> dict[str, float]:
        """Median quotient of what stored runs took and what was predicted, by kind."""
        assert self.predictor is not None
        found: dict[str, list[float]] = {}
        for address, record in self.records.items():
            engine = self.choices[address].engine
            if record.status == "done" and record.engine.partition("/")[0] == engine:
                quotient = record.seconds / self.predictor.seconds(address, engine)
                found.setdefault(self.kind(address), []).append(quotient)
        return {kind: statistics.median(values) for kind, values in found.items()}

    def seconds(self, address: str) -> tuple[float, str]:
        """What a run takes, and what that rests on."""
        kind, steps = self.kind(address), self.steps(address)
        exact = self._per_step.get((kind, self._level(address)))
        if exact is not None:
            return steps * exact, STORED
        if self.predictor is not None:
            predicted = self.predictor.seconds(address, self.choices[address].engine)
            return predicted * self._errors.get(kind, 1.0), PACE
        near = self._per_step.get((kind, None))
        return (self.typical(address), TYPICAL) if near is None else (steps * near, STORED)

    def typical(self, address: str) -> float:
        """What a run takes by typical figures: dense arithmetic, eager torch."""
        network = self.graph.network_of(address)
        batch_size = self.graph.runs[address].recipe.batch_size
        dense = 6.0 * sum(network.multiply_adds.values()) * batch_size
        return self.steps(address) * (STEP_SECONDS + dense / FLOPS_PER_SECOND)

    @property
    def is_worth_measuring(self) -> bool:
        """Whether what is missing takes so long that to measure the machine is nothing beside."""
        return sum(map(self.typical, self.missing)) > WORTH_SECONDS

    @property
    def is_open(self) -> bool:
        """Whether a missing run has no stored one of its kind and level."""
        keys = ((self.kind(address), self._level(address)) for address in self.missing)
        return any(key not in self._per_step for key in keys)


def costs(graph: Graph, lab: Lab | None, device: str) -> Costs:
    """What each run of a graph costs; the machine is measured when that is worth it.

    Args:
        graph: of the study.
        lab: where runs may be stored, or None.
        device: that would train; a GPU's pace is not known.
    """
    found = Costs(graph, schedule.engines(graph, device), lab.records(graph.runs) if lab else {})
    if device == "cpu" and found.is_open:
        known = pace.known() or (pace.measure() if found.is_worth_measuring else None)
        found.predictor = None if known is None else Predictor(graph, known)
    return found


def wall_seconds(graph: Graph, seconds: Mapping[str, float], workers: int) -> float:
    """How long workers take for runs, each once its parent is done, the longest chain first.

    Args:
        graph: whose runs; those without seconds are done.
        seconds: of each run to be trained, by address.
        workers: at once, at least 1.
    """
    height = dict.fromkeys(graph.runs, 0)
    for address in reversed(graph.runs):
        parent = graph.runs[address].parent
        if parent is not None:
            height[parent] = max(height[parent], height[address] + 1)
    waiting = sorted(seconds, key=lambda address: -height[address])
    clock, active, open_runs = 0.0, list[tuple[float, str]](), set(seconds)
    while waiting or active:
        ready = [a for a in waiting if graph.runs[a].parent not in open_runs]
        for address in ready[: workers - len(active)]:
            waiting.remove(address)
            heapq.heappush(active, (clock + seconds[address], address))
        clock, address = heapq.heappop(active)
        open_runs.remove(address)
    return clock


def estimate(
    graph: Graph,
    lab: Lab | None,
    workers: int,
    device: str = "cpu",
    beside: Collection[str] = (),
) -> Json:
    """What a study needs and what is missing, as a JSON-able document.

    Args:
        graph: of the study.
        lab: where runs may be stored, or None.
        workers: number of processes that would train.
        device: they would train on.
        beside: addresses of runs that are trained before, for another study.

    Returns:
        `runs` (total, stored, missing), `rows` (a row per arm and level, with its engine), `flops`
        and `seconds_estimate` of what is missing (`total_seconds_estimate`: of its runs one after
        the other), what that rests on, and why the sparse engine cannot train the network.
    """
    found = costs(graph, lab, device)
    missing = [address for address in found.missing if address not in beside]
    told = {address: found.seconds(address) for address in missing}
    seconds = {address: taken for address, (taken, _) in told.items()}
    begin = found.predictor.pace.process if found.predictor and missing else 0.0
    reasons = [choice.reason for choice in found.choices.values() if choice.reason]
    return {
        "study": {"name": graph.study.name, "address": graph.study.address},
        "runs": {
            "total": len(graph.runs),
            "stored": len(found.records),
            "missing": len(missing),
        },
        "rows": _rows(found, seconds),
        "flops": sum(map(graph.flops, missing)),
        "seconds_estimate": begin + wall_seconds(graph, seconds, max(1, workers)),
        "total_seconds_estimate": sum(seconds.values()),
        "estimate_from": _sources([source for _, source in told.values()]),
        "engine_reason": reasons[0] if reasons else None,
        "addresses": [
            {**vars(node), "stored": node.address in found.records} for node in graph.nodes
        ],
    }


def _sources(sources: Sequence[str]) -> str:
    order = [source for source in (STORED, PACE, TYPICAL) if source in sources]
    return " and ".join(order) or STORED


def _rows(found: Costs, seconds: Mapping[str, float]) -> list[Json]:
    graph = found.graph
    columns: dict[tuple[int, str], list[str]] = {}
    weights: dict[tuple[int, str], int] = {}
    for node in graph.nodes:
        place = node.level, node.arm
        columns.setdefault(place, []).append(node.address)
        weights[place] = graph.weights(node)
    whole = sum(graph.network.sizes.values())
    return [
        {
            "arm": arm,
            "level": level,
            "density": weights[level, arm] / whole,
            "weights": weights[level, arm],
            "engine": found.choices[addresses[0]].engine,
            "runs": len(addresses),
            "stored": sum(address in found.records for address in addresses),
            "steps": found.steps(addresses[0]),
            "flops": sum(map(graph.flops, addresses)),
            "seconds_estimate": sum(seconds.get(address, 0.0) for address in addresses),
        }
        for (level, arm), addresses in columns.items()
    ]


# -- estimate beside measured ----------------------------------------------------------------------


def forecast(graph: Graph, lab: Lab, workers: int, device: str) -> Json | None:
    """What is estimated of a study before it is trained; None where it is too short to tell.

    Returns:
        `runs`, `total_seconds` (of the runs) and `seconds` (until all are done) of what is
        missing, what they rest on, and the same `measured_`, not known yet.
    """
    found = Costs(graph, schedule.engines(graph, device), lab.records(graph.runs))
    if not found.is_worth_measuring:
        return None
    document = estimate(graph, lab, workers, device)
    return {
        "runs": document["runs"]["missing"],
        "total_seconds": document["total_seconds_estimate"],
        "seconds": document["seconds_estimate"],
        "from": document["estimate_from"],
        "measured_total_seconds": None,
        "measured_seconds": None,
    }


def measured(told: Json, records: Sequence[Record], seconds: float) -> Json:
    """A forecast and what was measured of it, if all of its runs were trained.

    Args:
        told: by `forecast`.
        records: of the runs trained since.
        seconds: that it took until all were done.
    """
    if len(records) < told["runs"]:
        return told
    total = sum(record.seconds for record in records)
    return {**told, "measured_total_seconds": total, "measured_seconds": seconds}
