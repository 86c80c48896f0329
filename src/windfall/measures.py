"""Measures: one number of what an experiment found.

measured(course, "alignment/hidden1")
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from windfall.course import Course, ordered
from windfall.dynamics import THRESHOLDS
from windfall.masks import Params

HALF = 0.5  # of the share of student nodes that were ahead: what chance gives
COVERED = 0.95  # correlation above which a teacher node counts as found
EARLY = 0.25  # of the steps
BINARY = ("trains", "stable", "matching", "overflows")  # 1 or 0 of a network, a share of several
START = "@start"  # behind the name of a reading: its first
SCORED = ("loss", "train-loss", "agreement", "train-agreement")  # as `course.SCORES`
OF_LAYERS = ("alignment", "early-alignment", "covered", "rank", "winners", "fading", "spread")


@dataclass(frozen=True)
class Readings:
    """What was read off networks at some steps of a training, by name.

    Args:
        steps: [time], int64, ascending.
        values: by the metric's name, [time], float64.
        diverged: True when the training's last loss was NaN or infinite.
        kept: tensors that other experiments begin from; most have none.
    """

    steps: Tensor
    values: Params
    diverged: bool = False
    kept: Params = field(default_factory=dict[str, Tensor])

    def tensors(self) -> Params:
        """Everything under one flat set of names, for a file."""
        parts = {"values": self.values, "kept": self.kept}
        flat = {f"{part}/{n}": v for part, tensors in parts.items() for n, v in tensors.items()}
        return {"steps": self.steps} | flat

    @classmethod
    def restored(cls, tensors: Params, *, diverged: bool) -> "Readings":
        """The readings that `tensors` describe."""

        def under(prefix: str) -> Params:
            held = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            return ordered(held)

        return cls(tensors["steps"], under("values/"), diverged, under("kept/"))


Outcome = Course | Readings


def outcome(tensors: Params, *, diverged: bool) -> Outcome:
    """What a file's tensors describe."""
    kind = Course if "frames" in tensors else Readings
    return kind.restored(tensors, diverged=diverged)


def metrics(layers: Sequence[str], *, is_subset: bool = False) -> list[str]:
    """The names of all metrics of a course with these hidden layers, of a pruned student or not."""
    kinds = [*OF_LAYERS, *(f"covered@{t:g}" for t in THRESHOLDS if t != COVERED)]
    kinds += ["again"] if is_subset else []
    own = [f"{kind}/{layer}" for layer in layers for kind in kinds]
    return ["alignment", "early-alignment", *SCORED, *own]


def measured(found: Outcome, metric: str, *, living: bool = False) -> float:
    """One number; of a training that diverged, what it was at the start, or chance.

    Of readings, the last of that name; of `NAME@start`, where none has that whole name, the first
    of NAME. Of a course:

    - `alignment`: mean over teacher nodes of the best student's correlation, at the last step; the
      mean over hidden layers, or of one, `alignment/hidden1`.
    - `early-alignment`: the same at the last measurement within the first quarter of the steps.
    - `covered/LAYER`: the share of teacher nodes whose best correlation is above .95;
      `covered@0.5/LAYER` above .5.
    - `rank/LAYER`: the mean over teacher nodes that are alive of the share of student nodes that
      were ahead of the final winner at the start, in [0, 1]; .5 is chance.
    - `winners/LAYER`: different student nodes that win, for each teacher node that is alive.
    - `again/LAYER`: of a student that was pruned, the share of living teacher nodes that are won by
      the node that had won them in the whole student; chance gives one over its nodes.
    - `fading/LAYER`: the median outgoing norm of student nodes that match no teacher node (.9) over
      that of those that do, in [0, ...); 1 where either kind is missing.
    - `spread/LAYER`: over how many of the student's nodes its strength is spread, in [1/n, 1]: with
      c_j the product of node j's incoming and outgoing norm, squared, (sum c)² / (n sum c²).
    - `loss` on the evaluation inputs, `train-loss` on training inputs; `agreement`, the share of
      evaluation inputs whose largest output is the teacher's, and `train-agreement`.

    Args:
        found: a course, or readings.
        metric: one of its `metrics`.
        living: leave dead teacher nodes out of alignment and coverage.
    """
    if isinstance(found, Readings):
        is_start = metric.endswith(START) and metric not in found.values
        name = metric.removesuffix(START) if is_start else metric
        return float(found.values[name][0 if is_start or found.diverged else -1])
    kind, _, layer = metric.partition("/")
    time = _time(found, kind)
    if kind in SCORED:
        return float(found.scores[time, SCORED.index(kind)])
    if kind in ("alignment", "early-alignment"):
        layers = [layer] if layer else found.layers
        each = [found.alignment(name, living=living)[time] for name in layers]
        return float(torch.stack(each).mean())
    if kind.startswith("covered"):
        threshold = float(kind.partition("@")[2] or COVERED)
        return float(found.covered(layer, threshold, living=living)[time])
    if kind == "spread":
        return _spread(found, layer, time)
    if kind == "again":
        same = found.again(layer)
        return float(same.double().mean()) if len(same) and not found.diverged else 0.0
    if kind == "winners":
        won = found.winners(layer)
        return len(won.unique()) / len(won) if len(won) else 0.0
    if found.diverged:
        return HALF if kind == "rank" else 1.0
    return _relative_rank(found, layer) if kind == "rank" else _fading(found, layer)


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


def _spread(course: Course, layer: str, time: int) -> float:
    outgoing = course.outgoing[layer][time].double()
    incoming = course.incoming[layer][time].double() if course.incoming else 1.0
    strength = (outgoing * incoming).square()
    total = float(strength.square().sum())
    return float(strength.sum()) ** 2 / (len(strength) * total) if total else 1.0
