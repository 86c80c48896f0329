"""The exhibit: what a study of the laboratory found, as a document.

document = document(study, found, failures={}, address=...)
"""

import json
from collections.abc import Callable, Mapping

from windfall import luck
from windfall.laboratory import Course, num_steps, training_flops
from windfall.luck import LaboratoryStudy
from windfall.spec import Json

Found = Mapping[str, tuple[Course, Json]]


def by_place(study: LaboratoryStudy, found: Found) -> dict[tuple[str, int], Course]:
    """The courses that there are by (arm, seed)."""
    return {place: found[name][0] for place, name in study.places().items() if name in found}


def document(
    study: LaboratoryStudy, found: Found, failures: Mapping[str, str], address: str
) -> Json:
    """Everything that was found, JSON-able, as of a study of pruned networks.

    Args:
        study: whose it is.
        found: courses and their facts by address.
        failures: reasons by address.
        address: of the study.
    """
    courses = by_place(study, found)
    rows = luck.arms(study, courses)
    decided = luck.verdicts(study, rows)
    versions = {json.dumps(facts["versions"], sort_keys=True) for _, facts in found.values()}
    notes = luck.exceptions(study, courses)
    if len(versions) > 1:
        notes.append(f"runs of different versions: {'; '.join(sorted(versions))}")
    settings = study.to_json()
    return {
        "study": {
            "name": study.name,
            "address": address,
            "title": study.title or study.name,
            "question": study.question,
        },
        "settings": settings,
        "arms": rows,
        "verdicts": decided,
        "comparisons": [],
        "failures": [
            {"address": name, "arm": arm, "level": 0, "seed": seed, "reason": failures[name]}
            for (arm, seed), name in study.places().items()
            if name in failures
        ],
        "winner": None,
        "notes": notes,
        "answer": luck.answer(study, decided),
        "estimate": None,
        "training_seconds": sum(facts["seconds"] for _, facts in found.values()),
        "versions": next((facts["versions"] for _, facts in found.values()), {}),
    }


def planned(study: LaboratoryStudy, is_stored: Callable[[str], bool]) -> Json:
    """What a study needs, arm by arm, and what is stored of it."""
    rows: list[Json] = []
    for arm, experiment in study.experiments().items():
        names = [luck.address(experiment, seed) for seed in range(study.num_seeds)]
        rows.append(
            {
                "arm": arm,
                "runs": len(names),
                "stored": sum(map(is_stored, names)),
                "steps": num_steps(experiment),
                "flops": training_flops(experiment),
            }
        )
    return {"study": {"name": study.name}, "laboratory": rows}
