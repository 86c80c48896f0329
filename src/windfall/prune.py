"""Pruning and rewinding as values: Prune = criterion x selection x structure x adjust; Rewind.

new = Prune(criterion="magnitude", selection="layerwise").masks(evidence, masks, kinds)

slimming = Prune(criterion="normalization-scale", selection="global", structure="channels")
blocks = Prune(criterion="gate", selection="positive", structure="blocks")
thinet = Prune(criterion="thinet", structure="channels", adjust="rescale")
"""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from windfall import selection as selecting
from windfall.adjust import Adjust, Refit, Rescale
from windfall.criteria import Criterion, Evidence, Magnitude
from windfall.masks import Masks, sizes
from windfall.models import Kind
from windfall.saliency import Synflow
from windfall.selection import Layerwise, Positive, Published, Selection, SmartRatios
from windfall.spec import FAMILY, Spec, later, tag
from windfall.structure import Unit
from windfall.units import Structure, Weights

# What selects or adjusts only some units; a selection by kinds of layers has no rate for blocks.
ONLY: dict[type, tuple[Unit, ...]] = {
    Layerwise: ("weights", "channels"),
    SmartRatios: ("weights",),
    Published: ("channels",),
    Positive: ("channels", "blocks"),
    Rescale: ("channels",),
    Refit: ("channels",),
}


class Prune(Spec):
    """How it is found what stays.

    Args:
        criterion: which weights, channels or blocks matter.
        selection: how many stay, and where.
        structure: what is removed: single weights, whole channels or whole blocks.
        adjust: how the weights that stay make up for removed channels; None is not at all.
    """

    criterion: Criterion = Magnitude()
    selection: Selection = Layerwise()
    structure: Structure = later(Weights(), absent=Weights())
    adjust: Adjust | None = later(None, absent=None)

    @model_validator(mode="after")
    def _fits(self) -> "Prune":
        unit, name = self.criterion.prunes, tag(type(self.structure))
        if unit != name:
            raise ValueError(
                f"`criterion` must judge what `structure` removes, {name}; got"
                f" {tag(type(self.criterion))}, which judges {unit}"
            )
        for what, value in (("adjust", self.adjust), ("selection", self.selection)):
            units = ONLY.get(type(value), (unit,))
            if unit not in units:
                raise ValueError(
                    f"`{what}` {tag(type(value))} must go with structure {' or '.join(units)}; got"
                    f" {unit}"
                )
        return self

    @property
    def is_structured(self) -> bool:
        """Whether channels or blocks are removed, and the network becomes smaller."""
        return not isinstance(self.structure, Weights)

    def masks(self, evidence: Evidence, alive: Masks, kinds: dict[str, Kind]) -> Masks:
        """The masks of the evidence's level, nested in `alive`, of exact counts.

        Of weights by their names; or of channels, or blocks, by their groups' names, of the shape
        [channel].

        Raises:
            SpecError: when a tensor would be emptied; the message names it.
        """
        if isinstance(self.criterion, Synflow):
            counts = self.selection.counts(sizes(alive), kinds, evidence.level)
            alive = self._eased(evidence, alive, counts, self.criterion.rounds)
        scores = self.criterion.score(replace(evidence, alive=alive), alive)
        return self.selection.select(scores, alive, kinds, evidence.level)

    def _eased(
        self, evidence: Evidence, alive: Masks, counts: dict[str, int], rounds: int
    ) -> Masks:
        """The masks that all rounds but the last leave."""
        for index in range(1, rounds):
            scores = self.criterion.score(replace(evidence, alive=alive), alive)
            alive = selecting.best(scores, alive, selecting.eased(counts, alive, index / rounds))
        return alive


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
    """No rewinding: survivors keep their trained values and train on at a constant rate.

    Source: Han et al. 2015; Liu et al. 2019 (1810.05270), fine-tuning.

    Args:
        steps: how many steps, at least 1, on data that follows the parent's in the same order.
        learning_rate: above 0; None is the schedule's last.
    """

    steps: int = Field(ge=1)
    learning_rate: float | None = later(None, absent=None, gt=0)


Rewind = Annotated[ToStep | LearningRate | Continue, FAMILY]
