"""Tables: what a study found, as plain rows that name the runs they came from.

A study is summed up from its *outline* (places and addresses, no code needed to read it) and the
lab's records. The result is one JSON-able document; the page, the terminal and pandas all show it.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from windfall import patterns, stats, words
from windfall.architecture import num_parameters
from windfall.arms import DESIGNS
from windfall.findings import Findings
from windfall.graph import Graph, Node
from windfall.spec import Json
from windfall.store import Lab, Record


def outline(graph: Graph) -> Json:
    """What a study consists of, without its specs: enough to sum it up from a lab."""
    study, network = graph.study, graph.network
    return {
        "study": study.to_json(addressed=False),
        "address": study.address,
        "nodes": [[node.arm, node.level, node.seed, node.address] for node in graph.nodes],
        "densities": {str(level): graph.density(level) for level in graph.counts},
        "designs": _designs(graph),
        "sizes": network.sizes,
        "flops": {address: graph.flops(address) for address in graph.runs},
        "clocks": {address: list(graph.clock(address)) for address in graph.runs},
        "input_shape": list(network.input_shape),
        "num_classes": network.num_classes,
        "metric": study.metric,
        "margin": study.decided_margin,
        "verdict_level": study.decided_level,
        "note": graph.note,
    }


def _designs(graph: Graph) -> dict[str, Json]:
    """The arms whose networks are not the study's, by name."""
    whole = sum(graph.network.sizes.values())
    return {
        node.arm: {
            "density": graph.weights(node) / whole,
            "model": graph.runs[node.address].model.to_json(),
            "num_parameters": num_parameters(
                graph.runs[node.address].model, graph.network.input_shape, graph.network.num_classes
            ),
        }
        for node in graph.nodes
        if node.arm in DESIGNS
    }


# ---- figures' tables -----------------------------------------------------------------------


def _shown_levels(plan: Json) -> list[int]:
    last, decided = max(int(level) for level in plan["densities"]), plan["verdict_level"]
    return sorted({1, max(1, decided // 2), decided, last})


def curves(findings: Findings, most: int = 120) -> list[Json]:
    """Validation loss and test accuracy by step, mean and interval over seeds, for some levels."""
    shown = {0, *_shown_levels(findings.plan)}
    columns: dict[tuple[str, int], list[Record]] = {}
    for node in findings.nodes:
        record = findings.records.get(node.address)
        if node.level in shown and record is not None and record.status == "done":
            columns.setdefault((node.arm, node.level), []).append(record)
    return [
        _curve(*place, findings.density(*place), records, most)
        for place, records in columns.items()
    ]


def _curve(arm: str, level: int, density: float, records: list[Record], most: int) -> Json:
    looks = [{look.step: look for look in record.evaluations} for record in records]
    steps = sorted(set(looks[0]).intersection(*looks))  # ends differ where budgets do
    chosen = steps[:: math.ceil(len(steps) / most)]
    curve: Json = {"arm": arm, "level": level, "density": density, "steps": chosen}
    for metric in ("validation_loss", "test_accuracy"):
        values = [[float(getattr(each[step], metric)) for each in looks] for step in chosen]
        bounds = [stats.mean_interval(v) for v in values]
        curve[metric] = {
            "mean": [fmean(v) for v in values],
            "low": [None if b is None else b.low for b in bounds],
            "high": [None if b is None else b.high for b in bounds],
        }
    return curve


def _first_tickets(findings: Findings) -> list[Node]:
    chain = [n for n in findings.nodes if n.seed == 0 and n.arm in ("ticket", "rewind")]
    first = [n for n in chain if n.arm == chain[0].arm]
    return [n for n in first if n.address in findings.records]


def layers(findings: Findings) -> list[Json]:
    """Weights, or channels, kept per layer and level, in the first seed's chain."""
    return [
        {
            "level": node.level,
            "layer": name,
            "kept": int(mask.sum()),
            "total": mask.numel(),
            "unit": findings.unit,
        }
        for node in _first_tickets(findings)
        for name, mask in findings.masks(node.address).items()
    ]


def pictures(findings: Findings) -> list[Json]:
    """Surviving weights per input of the first layer, in the input's shape, for some levels."""
    name = next(iter(findings.plan["sizes"]))
    shown = _shown_levels(findings.plan)
    return [
        {
            "level": node.level,
            "density": findings.plan["densities"][str(node.level)],
            "layer": name,
            "address": node.address,
            "counts": _picture(findings.masks(node.address)[name], findings.plan["input_shape"]),
        }
        for node in _first_tickets(findings)
        if node.level in shown and not findings.is_structured
    ]


def _picture(mask: Any, shape: Sequence[int]) -> list[list[int]]:
    is_image = len(shape) == 3 and mask.ndim == 2 and mask.shape[1] == math.prod(shape)
    if is_image:
        return mask.sum(0).reshape(*shape).sum(0).tolist()
    return mask.sum((0, 1)).tolist() if mask.ndim == 4 else mask.flatten(1).int().tolist()


# ---- the document --------------------------------------------------------------------------


def summary(plan: Json, lab: Lab) -> Json:
    """Everything that a study found, one JSON-able document without NaN.

    Args:
        plan: the study's outline; `estimate` in it is what `costs.forecast` told.
        lab: where its runs are.
    """
    findings = Findings(plan, lab)
    study, verdicts = plan["study"], findings.verdicts()
    records = _records(findings)
    versions = [dict(v) for v in {tuple(sorted(r["versions"].items())): 0 for r in records}]
    document: Json = {
        "study": {
            "name": study["name"],
            "address": plan["address"],
            "title": study.get("title") or study["name"],
            "question": study.get("question", ""),
        },
        "settings": study,
        "arms": findings.rows,
        "verdicts": verdicts,
        "comparisons": findings.comparisons(),
        "failures": _failures(findings),
        "curves": curves(findings),
        "layers": layers(findings),
        "pictures": pictures(findings),
        "pattern": patterns.pattern(findings) if patterns.is_known(findings) else None,
        "records": records,
        "flops": sum(record["flops"] for record in records),
        "training_seconds": sum(record["seconds"] for record in records),
        "versions": versions[-1] if versions else {},
        "estimate": plan.get("estimate"),
        **winner(findings),
    }
    document["notes"] = words.notes(findings.plan, document, versions)
    document["answer"] = words.answer(findings.plan, document)
    return document


def _failures(findings: Findings) -> list[Json]:
    return [
        {
            "address": node.address,
            "arm": node.arm,
            "level": node.level,
            "seed": node.seed,
            "reason": findings.failures[node.address],
        }
        for node in findings.nodes
        if node.address in findings.failures
    ]


def _records(findings: Findings) -> list[Json]:
    once = {node.address: node for node in reversed(findings.nodes)}
    rows: list[Json] = []
    for node in findings.nodes:
        record = findings.records.get(node.address)
        if record is None or once.get(node.address) is not node:
            continue
        rows.append(
            {
                "address": node.address,
                "arm": node.arm,
                "level": node.level,
                "seed": node.seed,
                "status": record.status,
                **findings.budget(node),
                "seconds": record.seconds,
                "engine": record.engine,
                "versions": record.versions,
            }
        )
    return rows


def winner(findings: Findings) -> Json:
    """The pruned run of best validation accuracy at the level of the verdicts; ties: lower loss."""
    level = findings.plan["verdict_level"]
    found = [
        (node, findings.records[node.address].evaluations[-1])
        for node in findings.nodes
        if node.level == level
        and node.arm not in findings.designs
        and node.address in findings.records
        and findings.records[node.address].status == "done"
    ]
    if not found:
        return {"winner": None, "winner_record": None}
    node, last = max(found, key=lambda f: (f[1].validation_accuracy, -f[1].validation_loss))
    kept = findings.records[node.address].kept
    whole = sum(findings.plan["sizes"].values())
    record = {
        "arm": node.arm,
        "level": node.level,
        "seed": node.seed,
        "validation_accuracy": last.validation_accuracy,
        "test_accuracy": last.test_accuracy,
        "density": kept / whole if kept >= 0 else 1.0,
    }
    return {"winner": node.address, "winner_record": record}
