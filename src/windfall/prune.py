"""Pruning and rewinding as values: Prune = criterion x selection; Rewind = where survivors restart.

new = Prune(criterion="magnitude", selection="layerwise").masks(evidence, masks, kinds)
"""

from typing import Annotated, Literal

from pydantic import Field

from windfall.criteria import Criterion, Evidence, Magnitude
from windfall.masks import Masks
from windfall.models import Kind
from windfall.selection import Layerwise, Selection
from windfall.spec import FAMILY, Spec


class Prune(Spec):
    """How a mask is found.

    Args:
        criterion: which weights matter.
        selection: how many stay, and where.
    """

    criterion: Criterion = Magnitude()
    selection: Selection = Layerwise()

    def masks(self, evidence: Evidence, alive: Masks, kinds: dict[str, Kind]) -> Masks:
        """The masks of the evidence's level, nested in `alive`, of exact counts.

        Raises:
            SpecError: when a tensor would be emptied; the message names it.
        """
        scores = self.criterion.score(evidence, alive)
        return self.selection.select(scores, alive, kinds, evidence.level)


class ToStep(Spec):
    """Survivors return to their values at step k of the dense run, and train on from step k.

    Weights, normalization statistics, data order and learning rate are those of step k; T - k steps
    remain. k = 0 is the lottery ticket's return to initialization.

    Source: Frankle et al. 2019 (1903.01611), section 3.

    Args:
        step: k, at least 0 and less than the recipe's steps.
        optimizer: the optimizer's state, `reset` to empty or `restored` as it was at step k.
    """

    step: int = Field(default=0, ge=0)
    optimizer: Literal["reset", "restored"] = "reset"


class LearningRate(Spec):
    """Survivors keep their trained values; the end of schedule and data order is replayed.

    Source: Renda, Frankle & Carbin 2020 (2003.02389), section 2 (learning-rate rewinding).

    Args:
        steps: how many of the last steps are replayed, at least 1.
    """

    steps: int = Field(ge=1)


class Continue(Spec):
    """No rewinding: survivors keep their trained values and train on at the schedule's last rate.

    Source: Han et al. 2015; Liu et al. 2019 (1810.05270), fine-tuning.

    Args:
        steps: how many steps, at least 1, on data that follows the parent's in the same order.
    """

    steps: int = Field(ge=1)


Rewind = Annotated[ToStep | LearningRate | Continue, FAMILY]
