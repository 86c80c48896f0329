"""Costs: the runs a study needs, which are stored, and what the rest costs."""

import statistics
from typing import Any

from windfall.spec import Json, digest
from windfall.store import Lab
from windfall.study import Graph

FLOPS_PER_SECOND = (
    80e9  # of one core at the matrix sizes of small networks; measured, LeNet-300-100
)
STEP_SECONDS = 2.5e-4  # of a step beside its arithmetic, eager torch; measured, a 100-50 network


def _guessed(graph: Graph, address: str) -> float:
    run = graph.runs[address]
    first, last = run.clock
    dense = 6.0 * sum(graph.network.multiply_adds.values()) * run.recipe.batch_size
    return (last - first) * (STEP_SECONDS + dense / FLOPS_PER_SECOND)


def _measured(graph: Graph, lab: Lab | None) -> dict[str, float]:
    """Median seconds a step of the stored runs, by model and recipe."""
    found: dict[str, list[float]] = {}
    for record in lab.records(graph.runs).values() if lab else ():
        run = graph.runs[record.address]
        first, last = run.clock
        key = digest([run.model.to_json(), run.recipe.to_json()])
        found.setdefault(key, []).append(record.seconds / (last - first))
    return {key: statistics.median(values) for key, values in found.items()}


def estimate(graph: Graph, lab: Lab | None, workers: int) -> Json:
    """What a study needs and what is missing, as a JSON-able document.

    Args:
        graph: of the study.
        lab: where runs may be stored, or None.
        workers: number of processes that would train.

    Returns:
        `runs` (total, stored, missing), `rows` (a row per arm and level), `flops` and
        `seconds_estimate` of what is missing, and whether the estimate rests on stored runs.
    """
    stored = set(lab.records(graph.runs)) if lab else set[str]()
    speeds = _measured(graph, lab)

    def seconds(address: str) -> float:
        run = graph.runs[address]
        key = digest([run.model.to_json(), run.recipe.to_json()])
        first, last = run.clock
        return (last - first) * speeds[key] if key in speeds else _guessed(graph, address)

    missing = [address for address in graph.runs if address not in stored]
    total = sum(map(seconds, missing))
    return {
        "study": {"name": graph.study.name, "address": graph.study.address},
        "runs": {"total": len(graph.runs), "stored": len(stored), "missing": len(missing)},
        "rows": _rows(graph, stored, seconds),
        "flops": sum(map(graph.flops, missing)),
        "seconds_estimate": total / max(1, min(workers, len(missing) or 1)),
        "estimate_from": "stored runs" if speeds else "typical figures",
        "addresses": [{**vars(node), "stored": node.address in stored} for node in graph.nodes],
    }


def _rows(graph: Graph, stored: set[str], seconds: Any) -> list[Json]:
    columns: dict[tuple[int, str], list[str]] = {}
    for node in graph.nodes:
        columns.setdefault((node.level, node.arm), []).append(node.address)
    return [
        {
            "arm": arm,
            "level": level,
            "density": graph.density(level),
            "weights": graph.counts[level],
            "runs": len(addresses),
            "stored": sum(address in stored for address in addresses),
            "steps": _steps(graph, addresses[0]),
            "flops": sum(map(graph.flops, addresses)),
            "seconds_estimate": sum(seconds(a) for a in addresses if a not in stored),
        }
        for (level, arm), addresses in columns.items()
    ]


def _steps(graph: Graph, address: str) -> int:
    first, last = graph.runs[address].clock
    return last - first
