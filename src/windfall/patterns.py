"""Patterns: how much of each stage a study's networks kept, from the lab alone.

pattern(Findings(plan, lab))["stages"][0]["mean"]
"""

import re
from collections.abc import Iterator
from statistics import fmean
from typing import Any, Literal

from windfall import architecture
from windfall.architecture import Pattern
from windfall.findings import Findings
from windfall.graph import Node
from windfall.masks import Masks
from windfall.models import Model, stages
from windfall.spec import Json, SpecError, members
from windfall.structure import Unit

# Arms on the mask that the ticket chain found, which are all the same; then a chain of its own.
MASKED = (
    "ticket", "finetune", "finetune-small", "reinit", "scratch-e", "scratch-b", "scratch-b-plus",
    "rewind",
)  # fmt: skip
DIGITS = 4  # of a factor in settings: no layer has so many channels that one is lost by rounding


def is_known(findings: Findings) -> bool:
    """Whether the study's network has stages, whose blocks stay, and a pruned run is stored."""
    if _unit(findings) is None:
        return False
    kind = members(Model)[findings.plan["study"]["model"]["kind"]]
    return issubclass(kind, stages.Staged) and bool(_pruned(findings))


def pattern(findings: Findings) -> Json:
    """How much of each stage stays at the level of the verdicts, over the seeds.

    Returns:
        level; arm, whose masks; unit, channels or weights; `stages`, rows of stage (from 1), mean,
        low and high over seeds, and kernel, the fraction kept at each position of 3 x 3 kernels, or
        None; `shared`, the same of the channels that residual blocks add to; `layers`, rows of
        layer, stage, is_shared and kept, by seed; `runs`, rows of seed and address; `settings`,
        what makes a study compare such a design, or None.

    Raises:
        SpecError: when the network has no stages, or no pruned run is stored.
    """
    document = findings.plan["study"]["model"]
    model: Any = members(Model)[document["kind"]].from_json(document)
    architecture.check_staged(model)
    nodes, unit = _pruned(findings), _unit(findings)
    if unit is None:
        raise SpecError(
            "STUDY must prune channels or weights to have a pattern; got one that prunes blocks."
        )
    if not nodes:
        raise SpecError(
            "STUDY must have pruned runs at the level of its verdicts,"
            f" {findings.plan['verdict_level']}; got none. Run it with an arm of"
            f" {', '.join(MASKED)}."
        )
    layers: list[dict[str, architecture.Layer]] = []

    def read(unit: Unit) -> Iterator[Masks]:
        for node in nodes:
            masks = findings.lab.masks(node.address)  # one at a time: they are large
            layers.append(architecture.of_layers(model, masks, unit))
            yield masks

    measure = architecture.of_channels if findings.is_structured else architecture.of_masks
    found = measure(model, read(unit))
    return {
        "level": nodes[0].level,
        "arm": nodes[0].arm,
        "unit": found.unit,
        "stages": _rows(found.networks, found.kernels),
        "shared": _rows(found.shared, ()),
        "layers": _layers(layers),
        "runs": [{"seed": node.seed, "address": node.address} for node in nodes],
        "settings": _settings(found),
    }


def _unit(findings: Findings) -> Literal["channels", "weights"] | None:
    """What the study prunes; None if it is whole blocks, of which no stage keeps a width."""
    structure = findings.plan["study"]["prune"].get("structure", {"kind": "weights"})
    return None if structure["kind"] == "blocks" else structure["kind"]


def _pruned(findings: Findings) -> list[Node]:
    level = findings.plan["verdict_level"]
    for arm in MASKED:
        nodes = [n for n in findings.nodes if (n.arm, n.level) == (arm, level)]
        stored = [node for node in nodes if node.address in findings.records]
        if stored:
            return stored
    return []


def _rows(networks: tuple[architecture.Ratios, ...], kernels: tuple[Any, ...]) -> list[Json]:
    return [
        {
            "stage": index + 1,
            "mean": fmean(each),
            "low": min(each),
            "high": max(each),
            "kernel": [list(row) for row in kernels[index]] if kernels else None,
        }
        for index, each in enumerate(zip(*networks, strict=True))
    ]


def _layers(networks: list[dict[str, architecture.Layer]]) -> list[Json]:
    return [
        {
            "layer": name,
            "stage": layer.stage + 1,
            "is_shared": layer.is_shared,
            "kept": [network[name].kept for network in networks],
        }
        for name, layer in sorted(networks[0].items(), key=lambda item: _place(item[0]))
    ]


def _place(name: str) -> list[tuple[int, str]]:
    """Of a layer in its network, where files sort names by letters: conv2 before conv10."""
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _settings(found: Pattern) -> list[str] | None:
    """What `--set` takes, so that a study trains the design and what it is compared with."""
    if found.unit == "weights":
        return None
    told = ["arms=dense,guided,uniform-width", f"arms.guided.stages={_factors(found.stages)}"]
    if found.shared_stages is not None:
        told.append(f"arms.guided.shared={_factors(found.shared_stages)}")
    return told


def _factors(ratios: architecture.Ratios) -> str:
    return f"[{','.join(f'{round(ratio, DIGITS):g}' for ratio in ratios)}]"
