"""Luck: studies of the laboratory, whose arms are experiments that share their seeds.

An arm changes the study's experiment; a contrast compares two arms in one metric, seed by seed, or
one arm with what chance gives. All contrasts of a study make one family of verdicts:

    study = LaboratoryStudy(
        arms={"narrow": {"student": {"multi": 1}}, "wide": {"student": {"multi": 10}}},
        contrasts=({"effect": "width", "arm": "wide", "against": "narrow", "metric": "alignment"},),
    )
    document = summary(study, courses)      # courses by (arm, seed)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, PositiveInt, field_validator, model_validator
from torch import Tensor

from windfall import dynamics, stats
from windfall.course import Course
from windfall.experiments import Experiment, metrics
from windfall.laboratory import Laboratory
from windfall.measures import BINARY, HALF, Outcome, Readings, measured
from windfall.spec import Json, Spec, decode, digest, merge, nearest

CHANCE = "chance"  # what an arm's ranks are compared with
CONSTANTS = {CHANCE: HALF, "one": 1.0}  # what an arm may be compared with, beside another
SHARES = ("rank", "negative", "passes")  # kinds of metrics of which chance gives a half


class Contrast(Spec):
    """A claim: that an arm's metric is higher than another's, or lower.

    Args:
        effect: its name.
        arm: claimed to be better.
        against: the arm it is compared with; `chance`, .5, of ranks and shares, or
            `one`, 1, of ratios.
        metric: see `measures.measured`.
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
        exclude_dead: leave teacher nodes that give the same on all inputs out of alignment and
            coverage, where they else count with a correlation of 0.
    """

    name: str = Field(default="luck", pattern=r"^[A-Za-z0-9_-]+$")
    title: str = ""
    question: str = ""
    num_seeds: PositiveInt = 10
    experiment: Experiment = Laboratory()
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    contrasts: tuple[Contrast, ...] = ()
    exclude_dead: bool = False

    @field_validator("arms")
    @classmethod
    def _none_is_constant(cls, arms: dict[str, Any]) -> dict[str, Any]:
        for name in CONSTANTS:
            if name in arms:
                raise ValueError(f"must not be named `{name}`, which contrasts compare arms with")
        return arms

    @model_validator(mode="after")
    def _fits(self) -> "LaboratoryStudy":
        experiments = self.experiments()
        for contrast in self.contrasts:
            kind = contrast.metric.partition("/")[0]
            for arm in (contrast.arm, contrast.against):
                if arm == contrast.against and _is_constant(arm, kind):
                    continue
                if arm not in self.arms:
                    known = nearest(arm, list(self.arms))
                    raise ValueError(f"`contrasts` must compare arms of the study.{known}")
                known = metrics(experiments[arm])
                if contrast.metric not in known:
                    raise ValueError(
                        f"`metric` must be one of the arm {arm}; got"
                        f" {contrast.metric!r}.{nearest(contrast.metric, known)}"
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


def _is_constant(name: str, kind: str) -> bool:
    """Whether an arm is compared with a number in a metric of this kind: ratios with 1."""
    is_ratio = "ratio" in kind or kind == "fading"
    return (name == CHANCE and kind in SHARES) or (name == "one" and is_ratio)


def address(experiment: Any, seed: int) -> str:
    """The name of an experiment's training with a seed."""
    return digest({"experiment": experiment.to_json(), "seed": seed})


# -- summing up ------------------------------------------------------------------------------------

Outcomes = Mapping[tuple[str, int], Outcome]


def arms(study: LaboratoryStudy, outcomes: Outcomes) -> list[Json]:
    """Every arm in every metric: the mean over seeds and its 95 % interval, Wilson's of shares.

    A seed whose run failed makes its rows null.
    """
    places, rows = study.places(), list[Json]()
    for arm, experiment in study.experiments().items():
        found = [(seed, outcomes.get((arm, seed))) for seed in range(study.num_seeds)]
        living = study.exclude_dead
        for metric in _metrics(experiment, [each for _, each in found]):
            values = [each and _finite(measured(each, metric, living=living)) for _, each in found]
            whole = [value for value in values if value is not None]
            is_whole = len(whole) == len(values)
            interval = interval_of(metric, whole) if is_whole else None
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


def interval_of(metric: str, values: Sequence[float]) -> stats.Interval | None:
    """The 95 % interval of a mean: Student's, or Wilson's where it is a share of networks."""
    if metric.partition("@")[0] in BINARY:
        return stats.share_interval(round(sum(values)), len(values))
    return stats.mean_interval(values)


def _finite(value: float) -> float | None:
    """A number that a document can hold; one that is none, a ratio over 0, is as a failed run's."""
    return value if math.isfinite(value) else None


def _metrics(experiment: Any, outcomes: Sequence[Outcome | None]) -> list[str]:
    """All metrics: those that its kind always has, and those of its own layers."""
    read = [name for each in outcomes if isinstance(each, Readings) for name in each.values]
    return list(dict.fromkeys([*metrics(experiment), *read]))


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
    constant = CONSTANTS.get(contrast.against, HALF)
    others = values.get((contrast.against, contrast.metric), [constant] * len(ones))
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
    missed = [row["effect"] for row in decided if row["verdict"] != "supported"]
    but = f" Not supported: {', '.join(missed)}." if missed and counts["supported"] else ""
    return [f"Of {len(decided)} claims: {told}.{but}", *(_sentence(row) for row in decided)]


def _sentence(row: Json) -> str:
    question = row["question"] or row["effect"]
    if row["difference"] is None:
        return f"{question} Undecided: a run failed."
    ends = row["interval"]
    told = f"{row['arm']} - {row['against']} {row['difference']:+.3g} in {row['metric']}"
    if ends is not None:
        told += f" [{ends[0]:+.3g}, {ends[1]:+.3g}]"
    return f"{question} {row['verdict'].capitalize()}: {told}, n = {row['num_seeds']}."


def exceptions(study: LaboratoryStudy, outcomes: Outcomes) -> list[str]:
    """What means would hide: runs that diverged, and teacher nodes that are dead on the data."""
    notes, dead = list[str](), dict[str, list[str]]()
    for arm in study.arms:
        of = {seed: found for (name, seed), found in outcomes.items() if name == arm}
        gone = sorted(seed for seed, found in of.items() if found.diverged)
        if gone:
            seeds = ", ".join(map(str, gone))
            notes.append(f"{arm}: seeds {seeds} diverged, and count as at the start, or by chance")
        if told := _dead(of):
            dead.setdefault(told, []).append(arm)
    for told, names in dead.items():
        whose = "" if len(dead) == 1 else f" ({', '.join(names)})"
        counted = (
            "they are left out"
            if study.exclude_dead
            else "they count in alignment and coverage with a correlation of 0, and not in ranks"
        )
        notes.append(f"teacher nodes that give the same on all inputs{whose}: {told}; {counted}")
    return notes


def _dead(found: Mapping[int, Outcome]) -> str:
    """How many teacher nodes are dead, seed by seed; nothing where none is."""
    told: list[str] = []
    for seed, course in sorted(found.items()):
        if isinstance(course, Course):
            num = sum(int(mask.sum()) for mask in course.dead.values())
            told += [f"{num} of seed {seed}"] if num else []
    return ", ".join(told)


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
