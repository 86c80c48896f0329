"""Arms: what a ticket is compared with, and what each comparison isolates.

An arm says which run stands for it at a level, given a `Family` of runs that share one seed and
differ in exactly one thing. Level 0 of every arm is the dense run.

    family = Family(base, Prune(), GlorotNormal(), seed=0, one_shot=False)
    family.runs[Reinit().run(family, level=3)]
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from windfall import architecture
from windfall import prune as pruning
from windfall.initialize import Initialization
from windfall.models import Model
from windfall.models.sizes import Width
from windfall.prune import Prune, ToStep
from windfall.runs import Budget, Fresh, Pruned, Run, Start
from windfall.spec import FAMILY, Spec, tag

Ratios = tuple[Width, ...]
SHIFT = 100_000  # seeds of the other orders and inits; the seeds of a study are below it


class Family:
    """The runs of one seed, by address, each made once and after its parent.

    Args:
        base: a run of the study's model, data and recipe; its start and seed are replaced.
        prune: how masks are found.
        initialization: of theta_0 and theta_0'.
        seed: of the study, 0 to num_seeds - 1.
        one_shot: prune the dense run at every level, not the level before.
        input_shape: of one input, by which the parameters of a network are counted.
        num_classes: of the outputs.
    """

    def __init__(
        self,
        base: Run,
        prune: Prune,
        initialization: Initialization,
        seed: int,
        *,
        one_shot: bool,
        input_shape: tuple[int, ...] = (),
        num_classes: int = 0,
    ) -> None:
        self.base, self.prune, self.initialization = base, prune, initialization
        self.input_shape, self.num_classes = input_shape, num_classes
        self.seed, self.one_shot = seed, one_shot
        self.runs: dict[str, Run] = {}
        self._chains: dict[tuple[str, Spec, int], str] = {}

    def dense(self, *, init: int | None = None, order: int | None = None) -> str:
        """The dense run, of another initialization or another data order when given."""
        start = Fresh(initialization=self.initialization, seed=init)
        return self._add(start, self.seed if order is None else order)

    def chain(self, root: str, rewind: pruning.Rewind, level: int) -> str:
        """The run at a level of the chain of `rewind` that begins with the dense run `root`."""
        if level == 0:
            return root
        name = (root, rewind, level)
        if name not in self._chains:
            parent = self.chain(root, rewind, 0 if self.one_shot else level - 1)
            self._chains[name] = self._pruned(parent, level, weights=rewind)
        return self._chains[name]

    def on_ticket_mask(self, level: int, **how: Any) -> str:
        """A run on the mask that the ticket chain finds for a level."""
        parent = self.chain(self.dense(), ToStep(), 0 if self.one_shot else level - 1)
        return self._pruned(parent, level, **how)

    def designed(self, model: Model) -> str:
        """The run of another network, from its theta_0'; it is not pruned."""
        return self._add(self.fresh(), self.seed, model)

    def fresh(self, budget: Budget | None = None) -> Fresh:
        """theta_0', the same for every control of a seed."""
        return self.begun(stream="reinit", budget=budget)

    def begun(self, **how: Any) -> Fresh:
        """theta_0, or what `Fresh` makes of it and of theta_0' when told how."""
        return Fresh(initialization=self.initialization, **how)

    def steps(self, fraction: float) -> int:
        """A fraction of the recipe's steps, at least 1."""
        return max(1, round(self.base.recipe.steps * fraction))

    def _pruned(self, parent: str, level: int, **how: Any) -> str:
        start = Pruned(parent=parent, prune=self.prune, level=level, **how)
        return self._add(start, self.runs[parent].seed)

    def _add(self, start: Start, seed: int, model: Model | None = None) -> str:
        recipe = self.base.recipe
        if isinstance(start, Pruned) or model is not None:
            recipe = recipe.plain()
        how: dict[str, Any] = {"start": start, "seed": seed, "recipe": recipe}
        run = self.base.model_copy(update=how if model is None else how | {"model": model})
        address = run.address
        self.runs.setdefault(address, run)
        return address


class Dense(Spec):
    """The unpruned network, level 0: the reference. It belongs to every study."""

    def run(self, family: Family, level: int) -> str:  # noqa: ARG002  the family's signature
        """The run's address, the same at every level."""
        return family.dense()


class Ticket(Spec):
    """The chain's mask and theta_0: the lucky initialization."""

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        return family.chain(family.dense(), ToStep(), level)


class Rewind(Spec):
    """A chain of its own, whose survivors return elsewhere than to theta_0: luck after k steps.

    Args:
        to: where they return.
    """

    to: pruning.Rewind = ToStep(step=100)

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        return family.chain(family.dense(), self.to, level)


class Finetune(Spec):
    """The ticket's mask on the trained weights it was found in: inherited weights.

    Args:
        fraction: of the recipe's steps, in (0, 1].
        replay: replay the end of the learning-rate schedule, or go on at its last rate.
    """

    fraction: float = Field(default=0.25, gt=0, le=1)
    replay: bool = True

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        how = pruning.LearningRate if self.replay else pruning.Continue
        return family.on_ticket_mask(level, weights=how(steps=family.steps(self.fraction)))


class FinetuneSmall(Spec):
    """As `Finetune`, at a small constant rate: what pruning papers do.

    Source: Liu et al. 2019 (1810.05270), section 4 (a quarter of the epochs at a hundredth of the
    first rate).

    Args:
        fraction: of the recipe's steps, in (0, 1].
        factor: on the recipe's learning rate, above 0.
    """

    fraction: float = Field(default=0.25, gt=0, le=1)
    factor: float = Field(default=0.01, gt=0)

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        rate = family.base.recipe.learning_rate * self.factor
        how = pruning.Continue(steps=family.steps(self.fraction), learning_rate=rate)
        return family.on_ticket_mask(level, weights=how)


class Reinit(Spec):
    """The ticket's mask and theta_0': the found architecture alone."""

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        return family.on_ticket_mask(level, weights=family.fresh())


class Scratch_E(Spec):
    """What stays of the network, newly initialized, for the recipe's steps: `Reinit` by its name.

    Source: Liu et al. 2019 (1810.05270), section 3, Scratch-E.
    """

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        return family.on_ticket_mask(level, weights=family.fresh())


class Scratch_B(Spec):
    """What stays of the network, newly initialized, at the cost of the whole network's training.

    Source: Liu et al. 2019 (1810.05270), section 3, Scratch-B.
    """

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        return family.on_ticket_mask(level, weights=family.fresh(Budget()))


class Scratch_B_Plus(Spec):
    """As `Scratch_B`, the cost of fine-tuning counted too: what a fine-tuned network costs in all.

    Args:
        fraction: of the recipe's steps, that fine-tuning takes, in (0, 1].
    """

    fraction: float = Field(default=0.25, gt=0, le=1)

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        budget = Budget(finetuning=family.steps(self.fraction))
        return family.on_ticket_mask(level, weights=family.fresh(budget))


class Shuffled(Spec):
    """The ticket's mask permuted inside each layer, and theta_0': layer-wise densities alone."""

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        return family.on_ticket_mask(level, weights=family.fresh(), arrange="shuffled")


class ShuffledTicket(Spec):
    """The ticket's mask permuted inside each layer, and theta_0: other weights of the same network.

    Source: Frankle et al. 2021 (2009.08576), its ablation by shuffling.
    """

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        return family.on_ticket_mask(level, weights=ToStep(), arrange="shuffled")


class Random(Spec):
    """The ticket's count spread uniformly over layers, and theta_0': the parameter count alone."""

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        return family.on_ticket_mask(level, weights=family.fresh(), arrange="uniform")


class SignedReinit(Spec):
    """The ticket's mask on magnitudes of theta_0' with the signs of theta_0: the signs alone.

    Source: Zhou et al. 2019 (1905.01067), section 3.2 (reinit, same sign).
    """

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        begun = family.begun(stream="reinit", signs="init")
        return family.on_ticket_mask(level, weights=begun)


class SignedConstant(Spec):
    """The ticket's mask on signs of theta_0, times the deviation of their layer in theta_0.

    Source: Zhou et al. 2019 (1905.01067), section 3.2 (constant, same sign).
    """

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        return family.on_ticket_mask(level, weights=family.begun(magnitudes="constant"))


class RandomConstant(Spec):
    """As `SignedConstant`, with the signs of theta_0': neither signs nor magnitudes are inherited.

    Source: Zhou et al. 2019 (1905.01067), section 3.2 (constant, random sign).
    """

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        begun = family.begun(magnitudes="constant", signs="reinit")
        return family.on_ticket_mask(level, weights=begun)


class OtherOrder(Spec):
    """A ticket chain of the same theta_0 that sees the data in another order."""

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        root = family.dense(init=family.seed, order=SHIFT + family.seed)
        return family.chain(root, ToStep(), level)


class OtherInit(Spec):
    """A ticket chain of another theta_0 that sees the data in the same order."""

    def run(self, family: Family, level: int) -> str:
        """The address of the run at a level, at least 1."""
        return family.chain(family.dense(init=SHIFT + family.seed), ToStep(), level)


class _Designed(Spec):
    """What the arms that are an unpruned network of given widths share.

    Args:
        stages: of each stage, the factor on its channels; `windfall pattern` tells them.
        shared: of the channels that a residual stage's blocks add to; None is 1 for all.
    """

    stages: Ratios
    shared: Ratios | None = None

    def design(self, model: Model) -> Model:
        """The network, from the study's."""
        return architecture.guided(model, self.stages, self.shared)

    def run(self, family: Family, level: int) -> str:  # noqa: ARG002  the family's signature
        """The run's address, the same at every level."""
        return family.designed(self.design(family.base.model))


class Guided(_Designed):
    """An unpruned network of the stages' widths that pruning found: the allocation over stages.

    It is the study's network with these factors, newly initialized, and stands at the level of the
    verdicts.

    Source: Liu et al. 2019 (1810.05270), section 5, guided pruning.

    Args:
        stages: of each stage, the factor on its channels; `windfall pattern` tells them.
        shared: of the channels that a residual stage's blocks add to; None is 1 for all.
    """


class Transferred(_Designed):
    """As `Guided`, by what pruning found in another network or on other data.

    Source: Liu et al. 2019 (1810.05270), section 5, transferable design.

    Args:
        stages: as of `Guided`, measured elsewhere.
        shared: as of `Guided`.
    """


class UniformWidth(Spec):
    """An unpruned network of one width, with as many parameters as a design: its size alone.

    Args:
        stages: of the design; None is the study's own, of `guided` or `transferred`.
        shared: as of `Guided`.
    """

    stages: Ratios | None = None
    shared: Ratios | None = None

    def design(self, model: Model) -> Model:
        """The network that it is as large as, from the study's."""
        assert self.stages is not None
        return architecture.guided(model, self.stages, self.shared)

    def run(self, family: Family, level: int) -> str:  # noqa: ARG002  the family's signature
        """The run's address, the same at every level."""
        design = self.design(family.base.model)
        place = family.input_shape, family.num_classes
        wanted = architecture.num_parameters(design, *place)
        return family.designed(architecture.uniform(design, wanted, *place).model)


Design = Guided | Transferred | UniformWidth
DESIGNS = tuple(tag(member) for member in (Guided, Transferred, UniformWidth))  # not pruned

_ARRANGED = (Shuffled, ShuffledTicket, Random)  # of masks, not of channels
ARRANGED = tuple(tag(member) for member in _ARRANGED)
SIGNED = tuple(tag(member) for member in (SignedReinit, SignedConstant, RandomConstant))

Arm = Annotated[
    Dense
    | Ticket
    | Rewind
    | Finetune
    | FinetuneSmall
    | Reinit
    | Scratch_E
    | Scratch_B
    | Scratch_B_Plus
    | Shuffled
    | ShuffledTicket
    | Random
    | SignedReinit
    | SignedConstant
    | RandomConstant
    | OtherOrder
    | OtherInit
    | Guided
    | Transferred
    | UniformWidth,
    FAMILY,
]


def sized(arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """The arms, that of one width as large as the design that it is compared with.

    Raises:
        ValueError: when there is no design, or there are several of different sizes.
    """
    designs = {(a.stages, a.shared) for a in arms if isinstance(a, Guided | Transferred)}

    def settled(arm: Arm) -> Arm:
        if not isinstance(arm, UniformWidth):
            return arm
        own = {(arm.stages, arm.shared)} if arm.stages is not None else set[Any]()
        if len(designs | own) != 1:
            raise ValueError(
                "must have one design, guided or transferred, whose size `uniform-width` has; got"
                f" {len(designs | own)}. Compare several in a study each: they share a lab"
            )
        stages, shared = next(iter(designs | own))
        return UniformWidth(stages=stages, shared=shared)

    return tuple(map(settled, arms))
