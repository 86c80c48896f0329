"""Luck: studies of the laboratory, whose arms are experiments that share their seeds.

An arm changes the study's experiment; a contrast compares two arms in one metric, seed by seed, or
one arm with what chance gives. All contrasts of a study make one family of verdicts:

    study = LaboratoryStudy(
        arms={"narrow": {"student": {"multi": 1}}, "wide": {"student": {"multi": 10}}},
        contrasts=({"effect": "width", "arm": "wide", "against": "narrow", "metric": "alignment"},),
    )
    document = summary(study, courses)      # courses by (arm, seed)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, PositiveInt, field_validator, model_validator
from torch import Tensor

from windfall import dynamics, stats
from windfall.laboratory import Course, Experiment, Laboratory
from windfall.spec import Json, Spec, decode, digest, merge, nearest

CHANCE = "chance"  # what an arm's ranks are compared with
HALF = 0.5  # of the share of student nodes that were ahead: what chance gives
KINDS = ("alignment", "early-alignment", "covered", "rank", "fading", "loss")
COVERED = 0.95  # correlation above which a teacher node counts as found
EARLY = 0.25  # of the steps


class Contrast(Spec):
    """A claim: that an arm's metric is higher than another's, or lower.

    Args:
        effect: its name.
        arm: claimed to be better.
        against: the arm it is compared with; `chance` is known of `rank` alone.
        metric: see `measured`.
        is_lower: the claim is that the metric is lower.
        margin: the smallest difference that matters, in the metric's unit, at least 0.
        question: what it asks, for the page.
    """

    effect: str
    arm: str
    against: str
    metric: str
    is_lower: bool = False
    margin: float = Field(default=0.01, ge=0)
    question: str = ""


class LaboratoryStudy(Spec):
    """A study of the laboratory: arms x seeds of one experiment.

    Args:
        name: names the page and the record; letters, digits, `-` and `_`.
        title: of the page.
        question: that it asks.
        num_seeds: seeds 0 ... n - 1; each names a teacher, a student and their inputs.
        experiment: what all arms share.
        arms: by name, what each changes of it, as tables of its fields.
        contrasts: the family of verdicts.
    """

    name: str = Field(default="luck", pattern=r"^[A-Za-z0-9_-]+$")
    title: str = ""
    question: str = ""
    num_seeds: PositiveInt = 10
    experiment: Experiment = Laboratory()
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    contrasts: tuple[Contrast, ...] = ()

    @field_validator("arms")
    @classmethod
    def _none_is_chance(cls, arms: dict[str, Any]) -> dict[str, Any]:
        if CHANCE in arms:
            raise ValueError(f"must not be named `{CHANCE}`, which contrasts compare ranks with")
        return arms

    @model_validator(mode="after")
    def _fits(self) -> "LaboratoryStudy":
        experiments = self.experiments()
        for contrast in self.contrasts:
            kind, _, layer = contrast.metric.partition("/")
            if kind not in KINDS:
                raise ValueError(f"`metric` must be a known one.{nearest(kind, list(KINDS))}")
            for arm in (contrast.arm, contrast.against):
                if arm == CHANCE and kind == "rank" and arm == contrast.against:
                    continue
                if arm not in self.arms:
                    known = nearest(arm, list(self.arms))
                    raise ValueError(f"`contrasts` must compare arms of the study.{known}")
                layers = _hidden(experiments[arm])
                if layer and layer not in layers:
                    raise ValueError(
                        f"`metric` must name a hidden layer, {', '.join(layers)}; got {layer}"
                    )
        return self

    def experiments(self) -> dict[str, Any]:
        """The experiment of every arm."""
        base = self.experiment.to_json(addressed=False)
        return {arm: decode(Experiment, merge(base, new)) for arm, new in self.arms.items()}

    def places(self) -> dict[tuple[str, int], str]:
        """The address of the run of every (arm, seed)."""
        return {
            (arm, seed): address(experiment, seed)
            for arm, experiment in self.experiments().items()
            for seed in range(self.num_seeds)
        }


def address(experiment: Any, seed: int) -> str:
    """The name of an experiment's training with a seed."""
    return digest({"experiment": experiment.to_json(), "seed": seed})


def _hidden(experiment: Any) -> list[str]:
    if not isinstance(experiment, Laboratory):
        return ["hidden1"]
    return [f"hidden{layer}" for layer in range(1, len(experiment.student.hidden) + 1)]


# -- what is measured of a course ------------------------------------------------------------------


def metrics(layers: Sequence[str]) -> list[str]:
    """The names of all metrics of a course with these hidden layers."""
    kinds = [kind for kind in KINDS if kind != "loss"]
    return ["alignment", "early-alignment", "loss"] + [
        f"{kind}/{layer}" for layer in layers for kind in kinds
    ]


def measured(course: Course, metric: str) -> float:
    """One number of a course; of one that diverged, what it was at the start, or chance.

    - `alignment`: mean over teacher nodes of the best student's correlation, at the last step; the
      mean over hidden layers, or of one, `alignment/hidden1`.
    - `early-alignment`: the same at the last measurement within the first quarter of the steps.
    - `covered/LAYER`: the share of teacher nodes whose best correlation is above .95.
    - `rank/LAYER`: the mean over teacher nodes that are alive of the share of student nodes that
      were ahead of the final winner at the start, in [0, 1]; .5 is chance.
    - `fading/LAYER`: the median outgoing norm of student nodes that match no teacher node (.9) over
      that of those that do, in [0, ...); 1 where either kind is missing.
    - `loss`: on the evaluation inputs, at the last step.
    """
    kind, _, layer = metric.partition("/")
    time = _time(course, kind)
    if kind == "loss":
        return float(course.loss[time])
    if kind in ("alignment", "early-alignment"):
        return float(
            torch.stack(
                [course.alignment(name)[time] for name in ([layer] if layer else course.layers)]
            ).mean()
        )
    if kind == "covered":
        return float((course.best[layer][time] > COVERED).double().mean())
    if course.diverged:
        return HALF if kind == "rank" else 1.0
    return _relative_rank(course, layer) if kind == "rank" else _fading(course, layer)


def _time(course: Course, kind: str) -> int:
    if course.diverged:
        return 0
    if kind != "early-alignment":
        return -1
    return int((course.steps <= EARLY * course.steps[-1]).sum()) - 1


def _relative_rank(course: Course, layer: str) -> float:
    num_others = course.first[layer].shape[1] - 1
    ranks = course.ranks(layer)
    return float(ranks.double().mean()) / num_others if num_others and len(ranks) else HALF


def _fading(course: Course, layer: str) -> float:
    norms, is_matched = course.outgoing[layer][-1], course.matched(layer)
    if bool(is_matched.all()) or not bool(is_matched.any()):
        return 1.0
    return float(norms[~is_matched].median() / norms[is_matched].median())


# -- summing up ------------------------------------------------------------------------------------

Courses = Mapping[tuple[str, int], Course]


def arms(study: LaboratoryStudy, courses: Courses) -> list[Json]:
    """Every arm in every metric: the mean over seeds and its 95 % interval.

    A seed whose run failed makes its rows null.
    """
    places, rows = study.places(), list[Json]()
    for arm, experiment in study.experiments().items():
        for metric in metrics(_hidden(experiment)):
            found = [(seed, courses.get((arm, seed))) for seed in range(study.num_seeds)]
            values = [None if course is None else measured(course, metric) for _, course in found]
            whole = [value for value in values if value is not None]
            is_whole = len(whole) == len(values)
            interval = stats.mean_interval(whole) if is_whole else None
            rows.append(
                {
                    "arm": arm,
                    "level": 0,
                    "density": None,
                    "metric": metric,
                    "mean": sum(whole) / len(whole) if is_whole else None,
                    "interval": None if interval is None else list(interval),
                    "num_seeds": len(whole),
                    "num_diverged": sum(c is not None and c.diverged for _, c in found),
                    "runs": [
                        {"seed": seed, "address": places[arm, seed], "value": value}
                        for (seed, _), value in zip(found, values, strict=True)
                    ],
                }
            )
    return rows


def verdicts(study: LaboratoryStudy, rows: Sequence[Json]) -> list[Json]:
    """The family of contrasts, Holm-adjusted, from the table of arms.

    The claim of each is in units of its margin while the family is decided, for one family has one
    margin; what is told is in the metric's unit.
    """
    values = {(row["arm"], row["metric"]): [run["value"] for run in row["runs"]] for row in rows}
    claims = [_claim(contrast, values) for contrast in study.contrasts]
    decided = stats.decide(claims, margin=1.0)
    return [
        _told(contrast, verdict) for contrast, verdict in zip(study.contrasts, decided, strict=True)
    ]


def _scale(contrast: Contrast) -> float:
    sign = -1.0 if contrast.is_lower else 1.0
    return sign * (contrast.margin or 1e-12)  # as good as no margin, and still a unit


def _claim(contrast: Contrast, values: Mapping[tuple[str, str], list[float | None]]) -> stats.Claim:
    ones = values[contrast.arm, contrast.metric]
    others = values.get((contrast.against, contrast.metric), [HALF] * len(ones))
    pairs = [(a, b) for a, b in zip(ones, others, strict=True) if a is not None and b is not None]
    if len(pairs) < len(ones):
        return stats.Claim(None)
    return stats.Claim([(a - b) / _scale(contrast) for a, b in pairs])


def _told(contrast: Contrast, verdict: stats.Verdict) -> Json:
    scale, interval = _scale(contrast), verdict.interval
    return {
        "effect": contrast.effect,
        "arm": contrast.arm,
        "against": contrast.against,
        "level": 0,
        "density": None,
        "metric": contrast.metric,
        "is_lower": contrast.is_lower,
        "margin": contrast.margin,
        "question": contrast.question,
        "difference": None if verdict.difference is None else scale * verdict.difference,
        "interval": None if interval is None else sorted(scale * end for end in interval),
        "confidence": verdict.level,
        "num_seeds": verdict.num_seeds or 0,
        "p_value": verdict.p_value,
        "p_adjusted": verdict.p_adjusted,
        "verdict": verdict.word,
        "seeds_needed": verdict.seeds_needed,
    }


def answer(study: LaboratoryStudy, decided: Sequence[Json]) -> list[str]:
    """The answer in words: how many claims hold, then a sentence for each."""
    if not decided:
        return [f"{study.name} compares nothing."]
    words = ("supported", "refuted", "undecided")
    counts = {word: sum(row["verdict"] == word for row in decided) for word in words}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return [f"Of {len(decided)} claims: {told}.", *(_sentence(row) for row in decided)]


def _sentence(row: Json) -> str:
    question = row["question"] or row["effect"]
    if row["difference"] is None:
        return f"{question} Undecided: a run failed."
    ends = row["interval"]
    told = f"{row['arm']} - {row['against']} {row['difference']:+.3g} in {row['metric']}"
    if ends is not None:
        told += f" [{ends[0]:+.3g}, {ends[1]:+.3g}]"
    return f"{question} {row['verdict'].capitalize()}: {told}, n = {row['num_seeds']}."


def exceptions(study: LaboratoryStudy, courses: Courses) -> list[str]:
    """What means would hide: runs that diverged, and teacher nodes that are dead on the data."""
    notes: list[str] = []
    for arm in study.arms:
        of = {seed: c for (name, seed), c in courses.items() if name == arm}
        gone = sorted(seed for seed, course in of.items() if course.diverged)
        if gone:
            seeds = ", ".join(map(str, gone))
            notes.append(f"{arm}: seeds {seeds} diverged, and count as they were at the start")
    dead: dict[int, int] = {}
    for (_, seed), course in courses.items():
        dead[seed] = sum(int(mask.sum()) for mask in course.dead.values())
    if some := {seed: num for seed, num in sorted(dead.items()) if num}:
        told = ", ".join(f"{num} of seed {seed}" for seed, num in some.items())
        notes.append(
            f"teacher nodes that give the same on all inputs: {told}; they count in alignment and"
            " coverage with a correlation of 0, and not in ranks"
        )
    return notes


def node_table(course: Course) -> list[Json]:
    """For each hidden layer: who won whom, from where, and what became of the others' weights."""
    rows: list[Json] = []
    for layer in course.layers:
        won = dynamics.winners(course.last[layer])
        norms, is_matched = course.outgoing[layer][-1], course.matched(layer)
        rows.append(
            {
                "layer": layer,
                "winners": won.tolist(),
                "ranks": dynamics.ranks(course.first[layer], won).tolist(),
                "correlations": _numbers(dynamics.best(course.last[layer])),
                "dead": course.dead[layer].tolist(),
                "num_students": len(norms),
                "matched": _numbers(norms[is_matched]),
                "unmatched": _numbers(norms[~is_matched]),
            }
        )
    return rows


def _numbers(values: Tensor) -> list[float]:
    return [round(float(value), 6) for value in values.nan_to_num()]
