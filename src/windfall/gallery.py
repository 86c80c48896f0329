"""The gallery: the page of a study of the laboratory.

html = render(document, study, found)
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from markupsafe import Markup
from matplotlib.figure import Figure

from windfall import experiments, luck, page, portraits
from windfall.course import Course
from windfall.exhibit import Found, by_place
from windfall.luck import LaboratoryStudy
from windfall.measures import Readings
from windfall.spec import Json

HALVES = ("lower", "upper")  # of a network, which are no layers
DEEP = 6  # layers from which on a curve over them says more than a panel each
FEW = 8  # panels of single layers that do not hide those of the whole network
FRAMES = 40  # of an animation: more than the eye needs
POWER = 4  # of correlations as weights: a student at 1 sits on its teacher, not between all


def render(document: Json, study: LaboratoryStudy, found: Found) -> str:
    """The page: HTML that refers to nothing outside itself; all text of the document is escaped."""
    outcomes = by_place(study, found)
    courses = {at: each for at, each in outcomes.items() if isinstance(each, Course)}
    readings = {at: each for at, each in outcomes.items() if isinstance(each, Readings)}
    grouped, widest, units = _by_arm(courses), _widest(courses), _units(document, study)
    first = courses.get((widest, 0)) if widest else None
    order = dict.fromkeys(row["metric"] for row in document["arms"])
    figures = dict(_figures(grouped, widest, first))
    if readings:
        decided = {row["metric"] for row in document["verdicts"]}
        names = [name for name in order if any(name in each.values for each in readings.values())]
        figures |= _read(_by_arm(readings), names, decided, units)
    layers = first.layers if first else []
    return page.template("laboratory").render(
        document=document,
        figures=figures,
        layers=layers,
        names=[
            row["metric"] for row in document["arms"] if row["arm"] == document["arms"][0]["arm"]
        ],
        units=units,
        widest=widest,
        table={(row["arm"], row["metric"]): row for row in document["arms"]},
        nodes=luck.node_table(first) if first else [],
        motion=Markup(json.dumps(_motions(courses)).replace("<", "\\u003c")),
        arms=list(study.arms),
        settings=page.leaves({k: v for k, v in document["settings"].items() if k != "contrasts"}),
    )


def _units(document: Json, study: LaboratoryStudy) -> dict[str, str]:
    """The units of all metrics that have one; a layer's, or a start's, is that of the network."""
    known = [experiments.units(each) for each in study.experiments().values()]
    of = {name: unit for each in known for name, unit in each.items()}
    names = {row["metric"]: re.split("[/@]", row["metric"])[0] for row in document["arms"]}
    return {metric: of[name] for metric, name in names.items() if name in of}


def _by_arm(outcomes: Mapping[tuple[str, int], Any]) -> dict[str, list[Any]]:
    grouped: dict[str, list[Any]] = {}
    for (arm, _), each in outcomes.items():
        grouped.setdefault(arm, []).append(each)
    return grouped


def _widest(courses: Mapping[tuple[str, int], Course]) -> str | None:
    """The arm whose first seed has most student nodes, the last among equals."""
    sizes = {
        arm: sum(rho.shape[1] for rho in course.last.values())
        for (arm, seed), course in courses.items()
        if seed == 0
    }
    return max(reversed(sizes), key=lambda arm: sizes[arm]) if sizes else None


def _figures(
    grouped: Mapping[str, Sequence[Course]], widest: str | None, first: Course | None
) -> list[tuple[str, tuple[Markup, Markup]]]:
    if not grouped or widest is None or first is None:
        return []
    draws: list[tuple[str, Callable[..., Figure]]] = [
        ("alignments", functools.partial(portraits.alignments, grouped)),
        ("coverage", functools.partial(portraits.coverage, grouped)),
        ("losses", functools.partial(portraits.losses, grouped)),
        ("outgoing", functools.partial(portraits.outgoing, grouped)),
        ("ranks", functools.partial(portraits.rank_histograms, grouped[widest])),
        ("heat", functools.partial(portraits.heat_maps, first)),
    ]
    if first.gradient:
        draws.append(("gradients", functools.partial(portraits.gradients, grouped)))
    if first.couplings:
        draws.append(("couplings", functools.partial(portraits.couplings, grouped[widest])))
    return [(name, page.inline(draw)) for name, draw in draws]


def _read(
    found: Mapping[str, Sequence[Readings]],
    names: Sequence[str],
    decided: set[str],
    units: Mapping[str, str],
) -> dict[str, tuple[Markup, Markup]]:
    """Figures of what was read: on the way, the whole network's; at the end, layer by layer.

    Where there are few layers, theirs are on the way too. What stays as it was is in no figure.
    """
    every = [one for each in found.values() for one in each]
    names = [name for name in names if name in decided or _moves(every, name)]
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind, slash, place = name.partition("/")
        if slash and place not in HALVES:
            kinds.setdefault(kind, []).append(name)
    deep = {kind: each for kind, each in kinds.items() if len(each) >= DEEP}
    single = [name for kind, each in kinds.items() if kind not in deep for name in each]
    shown = {*decided, *(single if len(single) <= FEW else ())}
    chosen = [n for n in names if "/" not in n or n in shown or n.partition("/")[2] in HALVES]
    draws: list[tuple[str, Callable[..., Figure], Any]] = [
        ("readings", portraits.readings, chosen),
        ("profiles", portraits.profiles, deep),
    ]
    return {
        name: page.inline(functools.partial(draw, found, what, units))
        for name, draw, what in draws
        if what
    }


def _moves(every: Sequence[Readings], name: str) -> bool:
    """Whether a reading changes from moment to moment, or has but one."""
    series = [one.values[name] for one in every if name in one.values]
    return any(len(each) == 1 or bool((each != each[0]).any()) for each in series)


def positions(rho: torch.Tensor) -> torch.Tensor:
    """Where students stand among their teachers, [student node, 2], from rho.

    Teacher nodes sit on the unit circle; a student is at

        sum_t rho_t^4 u_t / sum_t rho_t^3     (rho_t: its correlation, 0 if negative)

    so that one that equals a teacher node, and is like no other, sits on it.
    """
    angles = torch.arange(len(rho)) * (2 * torch.pi / len(rho))
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    pulled = rho.nan_to_num().clamp_min(0).float()
    weight = pulled.pow(POWER - 1).sum(0).clamp_min(1e-9)
    return (pulled.pow(POWER).T @ circle) / weight[:, None]


def _motions(courses: Mapping[tuple[str, int], Course]) -> Json:
    """Of the first seed of every arm: where its lowest layer's students stand, frame by frame."""
    told = Json()
    for (arm, seed), course in courses.items():
        if seed or len(course.frames) != len(course.steps):
            continue
        num = len(course.steps)
        chosen = torch.linspace(0, num - 1, min(num, FRAMES)).round().long().unique()
        norms = course.outgoing[course.layers[0]][chosen]
        largest = float(norms.nan_to_num().max()) or 1.0
        places = [positions(rho) for rho in course.frames[chosen]]
        told[arm] = {
            "teachers": course.frames.shape[1],
            "steps": course.steps[chosen].tolist(),
            "places": [[[round(x, 3), round(y, 3)] for x, y in p.tolist()] for p in places],
            "sizes": [[round(n / largest, 3) for n in row] for row in norms.nan_to_num().tolist()],
        }
    return told
