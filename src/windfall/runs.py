"""Runs: what one training is, completely, and where it starts.

A run is named by what it is: its address is the SHA-256 of its spec, which holds the model, the
data (with the hash of its tensors), the recipe, the start and the seed, and nothing else. A start
that was pruned names its parent by address, so an address stands for a whole chain of trainings.

    dense = Run(model="lenet-300-100", data="mnist", data_sha256=..., recipe=..., seed=0)
    ticket = dense.model_copy(update={"start": Pruned(parent=dense.address, level=1)})
"""

from typing import Annotated, Literal

from pydantic import Field

from windfall.data import Data
from windfall.initialize import GlorotNormal, Initialization
from windfall.models import Model
from windfall.prune import Continue, LearningRate, Prune, Rewind, ToStep
from windfall.spec import FAMILY, Spec, later
from windfall.train import Constant, Recipe

Address = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Budget(Spec):
    """As many steps as cost what the whole network's training costs, in FLOPs.

    T F / F' steps, rounded down, for the recipe's T steps and the multiply-adds F of the whole
    network and F' of the smaller one: known once it is known what stays. The recipe's schedule is
    stretched over them.

    Source: Liu et al. 2019 (1810.05270), section 3, Scratch-B; it does not count fine-tuning.

    Args:
        finetuning: steps of fine-tuning the smaller network that are counted too, at least 0.
    """

    finetuning: int = Field(default=0, ge=0)

    def steps(self, total: int, whole: int, kept: int) -> int:
        """The number of steps.

        Args:
            total: the recipe's steps, T.
            whole: multiply-adds of the whole network, F.
            kept: multiply-adds of what stays, F', at least 1.
        """
        return total * whole // kept + self.finetuning


class Fresh(Spec):
    """A network newly initialized.

    Args:
        initialization: the distribution its weights are drawn from.
        stream: the random stream of the draws, `init` (theta_0) or `reinit` (theta_0').
        seed: of the draws; None is the run's own.
        budget: what its number of steps follows from; None is the recipe's.
        signs: the stream of the draws whose signs the weights of layers have; None is `stream`.
        magnitudes: of the weights of layers, as `drawn`; or `constant`: in each layer the standard
            deviation of what was drawn.
    """

    initialization: Initialization = GlorotNormal()
    stream: Literal["init", "reinit"] = "init"
    seed: int | None = Field(default=None, ge=0)
    budget: Budget | None = later(None, absent=None)
    signs: Literal["init", "reinit"] | None = later(None, absent=None)
    magnitudes: Literal["drawn", "constant"] = later("drawn", absent="drawn")


class Pruned(Spec):
    """A network whose mask was found by pruning a trained parent.

    Args:
        parent: address of the run that was trained and pruned.
        prune: how.
        level: the level of the mask found, at least 1.
        arrange: `found` as it was; `shuffled` inside each tensor; `uniform`: the same total count
            spread over all tensors at one density, at random positions.
        weights: where the survivors start: rewound in the parent's chain, or drawn afresh.
    """

    parent: Address
    prune: Prune = Prune()
    level: int = Field(ge=1)
    arrange: Literal["found", "shuffled", "uniform"] = "found"
    weights: Annotated[Rewind | Fresh, FAMILY] = ToStep()


Start = Annotated[Fresh | Pruned, FAMILY]


class Run(Spec):
    """One training.

    Args:
        model: the network.
        data: the data set and its split.
        data_sha256: hash of the data set's decoded tensors.
        recipe: how it is trained.
        start: where it starts.
        seed: names the streams of initialization, data order, augmentation, pruning.
    """

    model: Model
    data: Data
    data_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    recipe: Recipe
    start: Start = Fresh()
    seed: int = Field(ge=0)

    @property
    def parent(self) -> str | None:
        """The address of the run it was pruned from."""
        return self.start.parent if isinstance(self.start, Pruned) else None

    @property
    def weights(self) -> Rewind | Fresh:
        """Where its weights start."""
        return self.start.weights if isinstance(self.start, Pruned) else self.start

    @property
    def budget(self) -> Budget | None:
        """What its number of steps follows from, if not from the recipe."""
        return self.weights.budget if isinstance(self.weights, Fresh) else None

    def trained_by(self, whole: int, kept: int) -> Recipe:
        """The recipe that trains it, its budget and its rate of fine-tuning resolved.

        Args:
            whole: multiply-adds of the whole network.
            kept: multiply-adds of what stays of it.
        """
        if self.budget is not None:
            return self.recipe.stretched(self.budget.steps(self.recipe.steps, whole, kept))
        match self.weights:
            case Continue(learning_rate=float(rate)):
                changed = {"learning_rate": rate, "schedule": Constant()}
                return self.recipe.model_copy(update=changed)
            case _:
                return self.recipe

    @property
    def clock(self) -> tuple[int, int]:
        """The first step of its training and the one after the last.

        With a budget, the last is that of the recipe: `trained_by` tells the number of steps.
        """
        total = self.recipe.steps
        match self.weights:
            case ToStep(step=step):
                return step, total
            case LearningRate(steps=steps):
                return total - steps, total
            case Continue(steps=steps):
                return total, total + steps
            case Fresh():
                return 0, total
