"""Studies: many networks that differ in exactly one thing, as a value.

Study(model="lenet-300-100", data="mnist", levels=20, num_seeds=5).address
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from windfall import prune as pruning
from windfall.arms import (
    ARRANGED,
    SHIFT,
    SIGNED,
    Arm,
    Dense,
    Design,
    Finetune,
    Reinit,
    Rewind,
    Ticket,
    sized,
)
from windfall.data import Data, UserData, tensors
from windfall.engines.rule import Asked
from windfall.initialize import GlorotNormal, Initialization, TorchDefault
from windfall.models import Model, ModelField, UserModel
from windfall.prune import LearningRate, Prune, ToStep
from windfall.samples import stacked
from windfall.sparsity import GatePenalty
from windfall.spec import Spec, SpecError, tag, unaddressed
from windfall.train import Recipe

Metric = Literal[
    "test_accuracy",
    "test_accuracy_at_early_stop",
    "test_accuracy_at_start",
    "early_stop_step",
    "mask_overlap",
]


def _given(data: Any) -> Any:
    """Data as a user gives it: a spec, a name, a function's name, tensors, or a `Dataset`."""
    if isinstance(data, str) and ":" in data:
        return UserData(callable=data)
    if data is None or isinstance(data, Spec | Mapping | str | int | float):
        return data
    try:
        train, test = stacked(data)
        return tensors(*train, test)
    except SpecError as problem:
        raise ValueError(f"must be tensors or a Dataset; {problem}") from None


class Study(Spec):
    """A study: arms x levels x seeds of one network, data set and recipe.

    Args:
        name: names the page and the record; letters, digits, `-` and `_`.
        title: one line.
        question: what is asked, a sentence.
        num_seeds: number of paired seeds, 0 to num_seeds - 1.
        model: the network, or a callable that returns an `nn.Module`.
        data: the data set; or a pair of tensors (inputs, labels), a map-style `Dataset`, or a pair
            (train, test) of either.
        initialization: of the weights; None is the paper's Gaussian Glorot for the zoo, and what
            the constructor does for a user's own network.
        recipe: how every network is trained.
        prune: how masks are found.
        one_shot: prune the dense run to every level at once, not level by level.
        arms: what is compared; the dense run belongs to every study.
        levels: number of levels, 1 to `levels`, beside the dense level 0.
        verdict_level: the level whose comparisons get a verdict; None is the last.
        metric: what verdicts are about.
        margin: of equivalence, in the metric's unit; None is 0.005 (half a percentage point), or
            `recipe.eval_every` steps for `early_stop_step`.
        intervals: Student's t, or BCa bootstrap.
        engine: which engine trains; `auto` is the fixed rule.
    """

    name: str = Field(default="study", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)
    title: str = unaddressed("")
    question: str = unaddressed("")
    num_seeds: int = Field(default=10, ge=1, lt=SHIFT)
    model: ModelField
    data: Annotated[Data, BeforeValidator(_given)]
    initialization: Initialization | None = None
    recipe: Recipe = Recipe()
    prune: Prune = Prune()
    one_shot: bool = False
    arms: tuple[Arm, ...] = (Dense(), Ticket(), Reinit(), Finetune())
    levels: int = Field(default=8, ge=1)
    verdict_level: int | None = Field(default=None, ge=1)
    metric: Metric = "test_accuracy"
    margin: float | None = Field(default=None, ge=0)
    intervals: Literal["t", "bca"] = "t"
    engine: Asked = unaddressed("auto")

    @field_validator("arms", mode="before")
    @classmethod
    def _one_arm(cls, arms: Any) -> Any:
        return (arms,) if isinstance(arms, str) else arms

    @field_validator("arms")
    @classmethod
    def _sized(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        return sized(arms)

    @model_validator(mode="after")
    def _is_consistent(self) -> "Study":
        if self.verdict_level is not None and self.verdict_level > self.levels:
            raise ValueError(
                f"`verdict_level` must be at most `levels`, {self.levels}; got {self.verdict_level}"
            )
        kinds = [tag(type(arm)) for arm in self.arms]
        twice = {kind for kind in kinds if kinds.count(kind) > 1}
        if twice:
            raise ValueError(f"`arms` must differ; got `{min(twice)}` twice")
        for arm in self.arms:
            if isinstance(arm, Rewind):
                _fits(arm.to, self.recipe)
            if isinstance(arm, Design):
                _fits_stages(arm, self.model)
        if self.metric == "mask_overlap" and "ticket" not in kinds:
            raise ValueError("`arms` must include `ticket` when `metric` is mask_overlap")
        if self.prune.is_structured:
            self._fits_groups(kinds, tag(type(self.prune.structure)))
        return self

    def _fits_groups(self, kinds: list[str], structure: str) -> None:
        for kind in kinds:
            if kind in (*ARRANGED, *SIGNED):
                what = "arranges masks" if kind in ARRANGED else "is of single weights' signs"
                raise ValueError(
                    f"`arms` must not include `{kind}` where `prune.structure` is {structure}: it"
                    f" {what}"
                )
        if self.metric == "mask_overlap":
            raise ValueError(
                f"`metric` must be of a training where `prune.structure` is {structure}"
            )

    @property
    def decided_level(self) -> int:
        """The level whose comparisons get a verdict."""
        return self.levels if self.verdict_level is None else self.verdict_level

    @property
    def decided_margin(self) -> float:
        """The margin in the metric's unit."""
        if self.margin is not None:
            return self.margin
        return float(self.recipe.eval_every) if self.metric == "early_stop_step" else 0.005

    @property
    def begun_by(self) -> Initialization:
        """The initialization of every fresh network."""
        if self.initialization is not None:
            return self.initialization
        return TorchDefault() if isinstance(self.model, UserModel) else GlorotNormal()


def _fits(to: pruning.Rewind, recipe: Recipe) -> None:
    steps = recipe.steps
    match to:
        case ToStep(optimizer="restored") if isinstance(recipe.penalty, GatePenalty):
            problem = "optimizer` must be reset where `recipe.penalty` is gate-penalty, whose steps"
            problem += " of gates are not the optimizer's; got restored"
        case ToStep(step=step) if step >= steps:
            problem = f"step` must be less than `recipe.steps`, {steps}; got {step}"
        case LearningRate(steps=replayed) if replayed > steps:
            problem = f"steps` must be at most `recipe.steps`, {steps}; got {replayed}"
        case _:
            return
    raise ValueError(f"`arms.rewind.to.{problem}")


def _fits_stages(arm: Design, model: Model) -> None:
    try:
        arm.design(model)
    except SpecError as problem:
        raise ValueError(f"`arms.{tag(type(arm))}` must fit the network: {problem}") from None
