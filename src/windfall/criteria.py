"""Criteria: which weights matter.

A criterion scores every prunable weight; the highest scores stay. It may see the weights at
initialization (theta_0) and after training (theta_T). Scores are finite, of the weights' shape.
The family holds the criteria that need the network before its training (`saliency`) and those for
channels and blocks (`filters`) too.

    scores = Magnitude().score(Evidence(initial, trained, seed=0, level=1), names)
"""

from collections.abc import Iterable
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from windfall import seeds
from windfall.evidence import Evidence
from windfall.filters import FeatureReconstruction, FilterNorm, Gate, NormalizationScale, Thinet
from windfall.masks import Scores
from windfall.saliency import Grasp, Snip, Synflow
from windfall.spec import FAMILY, Spec
from windfall.structure import Unit


class Magnitude(Spec):
    """Keep the weights that ended large: s = |theta_T|.

    Source: Frankle & Carbin 2019 (1803.03635), section 2; `large_final` of Zhou et al. 2019.
    """

    prunes: ClassVar[Unit] = "weights"

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """Scores per weight name."""
        return {name: evidence.trained[name].abs() for name in names}


class Random(Spec):
    """Keep weights at random: s ~ U(0, 1) from the stream `prune` of the seed and level."""

    prunes: ClassVar[Unit] = "weights"

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """Scores per weight name."""
        return {
            name: _uniform(evidence, index, evidence.trained[name])
            for index, name in enumerate(names)
        }


class MagnitudeIncrease(Spec):
    """Keep the weights that grew most: s = |theta_T| - |theta_0|.

    Source: Zhou et al. 2019 (1905.01067), section 3.
    """

    prunes: ClassVar[Unit] = "weights"

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """Scores per weight name."""
        return {name: evidence.trained[name].abs() - evidence.initial[name].abs() for name in names}


class LargeInit(Spec):
    """Keep the weights that began large: s = |theta_0|. Magnitude at initialization.

    Source: Zhou et al. 2019 (1905.01067), section 3.
    """

    prunes: ClassVar[Unit] = "weights"

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """Scores per weight name."""
        return {name: evidence.initial[name].abs() for name in names}


class Movement(Spec):
    """Keep the weights that moved most: s = |theta_T - theta_0|.

    Source: Zhou et al. 2019 (1905.01067), section 3.
    """

    prunes: ClassVar[Unit] = "weights"

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """Scores per weight name."""
        return {name: (evidence.trained[name] - evidence.initial[name]).abs() for name in names}


class LargeFinalSameSign(Spec):
    """Keep the weights that ended large with the sign they began with: s = max(0, theta_T sign).

    sign is that of theta_0. Weights that changed it score 0; of those the earlier stay.

    Source: Zhou et al. 2019 (1905.01067), section 5: the mask of supermasks.
    """

    prunes: ClassVar[Unit] = "weights"

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """Scores per weight name, at least 0."""
        return {
            name: (evidence.trained[name] * evidence.initial[name].sign()).clamp(min=0)
            for name in names
        }


def _uniform(evidence: Evidence, index: int, like: Tensor) -> Tensor:
    draws = seeds.stream(evidence.seed, "prune", evidence.level, index).random(like.numel())
    return torch.from_numpy(draws).reshape(like.shape)


Criterion = Annotated[
    Magnitude
    | Random
    | MagnitudeIncrease
    | LargeInit
    | Movement
    | LargeFinalSameSign
    | Snip
    | Grasp
    | Synflow
    | FilterNorm
    | NormalizationScale
    | Thinet
    | FeatureReconstruction
    | Gate,
    FAMILY,
]

__all__ = [
    "Criterion",
    "Evidence",
    "LargeFinalSameSign",
    "LargeInit",
    "Magnitude",
    "MagnitudeIncrease",
    "Movement",
    "Random",
]
