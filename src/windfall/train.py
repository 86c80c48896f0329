"""Training: the recipe, and the contract that every engine keeps.

An engine takes a `State` (parameters, buffers, optimizer state, step), trains it with fixed masks
from its step to the last one, and evaluates when the recipe says so. Step t sees batch t of the
seed's endless order and the learning rate of step t, so a run resumed or rewound at a step sees
what an unbroken one would have. Pruned weights are exactly 0 at every step.

    recipe = Recipe(optimizer="adam", learning_rate=1.2e-3, batch_size=60, steps=20_000)
    recipe.rate(0)
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from windfall.data import CropFlip
from windfall.masks import Masks, Params
from windfall.sparsity import GatePenalty, Penalty, Rhythm
from windfall.spec import FAMILY, Spec, later, tag

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Sgd(Spec):
    """Stochastic gradient descent: v <- momentum v + g + weight_decay w; w <- w - rate v.

    Args:
        momentum: in [0, 1).
        nesterov: look ahead by one momentum step; needs momentum.
        weight_decay: L2 coefficient, at least 0.
    """

    momentum: Fraction = 0.0
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "Sgd":
        if self.nesterov and self.momentum == 0:
            raise ValueError("must have `momentum` above 0 where `nesterov` is true; got 0.")
        return self

    def build(self, params: list[Tensor], rate: float) -> torch.optim.Optimizer:
        """The torch optimizer over these parameters."""
        return torch.optim.SGD(
            params,
            lr=rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=True,
        )


class Adam(Spec):
    """Adam, weight decay as L2 in the gradient.

    Args:
        beta1: decay of the gradient's running mean, in [0, 1).
        beta2: decay of its running square, in [0, 1).
        eps: added to the root of the square, above 0.
        weight_decay: L2 coefficient, at least 0.
    """

    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)

    def build(self, params: list[Tensor], rate: float) -> torch.optim.Optimizer:
        """The torch optimizer over these parameters."""
        return torch.optim.Adam(
            params,
            lr=rate,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )


Optimizer = Annotated[Sgd | Adam, FAMILY]


class Constant(Spec):
    """One learning rate throughout.

    Args:
        warmup: steps of linear rise at the start, at least 0: step t < warmup has (t + 1) / warmup.
    """

    warmup: int = Field(default=0, ge=0)

    def decay(self, step: int, steps: int) -> float:  # noqa: ARG002  the family's signature
        """The factor on the learning rate at a step, without the warm-up."""
        return 1.0


class StepDrops(Spec):
    """The learning rate times `factor` at each of the steps `at`.

    Args:
        at: steps, increasing.
        factor: in (0, 1].
        warmup: as in `Constant`.
    """

    at: tuple[int, ...] = ()
    factor: float = Field(default=0.1, gt=0, le=1)
    warmup: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _increasing(self) -> "StepDrops":
        if any(a >= b for a, b in zip((0, *self.at), self.at, strict=False)):
            raise ValueError(f"must have increasing steps above 0 in `at`; got {list(self.at)}.")
        return self

    def decay(self, step: int, steps: int) -> float:  # noqa: ARG002  the family's signature
        """The factor on the learning rate at a step, without the warm-up."""
        return self.factor ** sum(step >= drop for drop in self.at)


class Cosine(Spec):
    """The learning rate falls as half a cosine from its value to 0 over the steps after warm-up.

    Args:
        warmup: as in `Constant`.
    """

    warmup: int = Field(default=0, ge=0)

    def decay(self, step: int, steps: int) -> float:
        """The factor on the learning rate at a step, without the warm-up."""
        progress = (step - self.warmup) / max(1, steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


Schedule = Annotated[Constant | StepDrops | Cosine, FAMILY]


class Recipe(Spec):
    """How a network is trained, the step its only clock.

    Args:
        optimizer: and its settings.
        learning_rate: before the schedule's factor, above 0.
        schedule: the factor on the learning rate, by step.
        steps: T, number of optimizer updates of a whole training, at least 1.
        batch_size: examples a step, at least 1.
        eval_every: steps between evaluations on validation and test, at least 1; the first and
            the last step are evaluated too.
        dtype: of parameters and arithmetic.
        augment: crop and flip of the training images, or none.
        penalty: on scales or gates of the dense network, beside the loss, or none.
        rhythm: in which filters of the dense network are set to 0, or none.
    """

    optimizer: Optimizer = Sgd()
    learning_rate: float = Field(default=0.1, gt=0)
    schedule: Schedule = Constant()
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    eval_every: int = Field(default=100, ge=1)
    dtype: Literal["float32", "float64"] = "float32"
    augment: CropFlip | None = None
    penalty: Penalty | None = later(None, absent=None)
    rhythm: Rhythm | None = later(None, absent=None)

    @model_validator(mode="after")
    def _penalty_has_momentum(self) -> "Recipe":
        if isinstance(self.penalty, GatePenalty) and not isinstance(self.optimizer, Sgd):
            raise ValueError(
                "`penalty` gate-penalty must go with `optimizer` sgd, whose momentum is its steps';"
                f" got {tag(type(self.optimizer))}"
            )
        return self

    @property
    def sparsity(self) -> tuple[str, ...]:
        """The names of its fields of sparsity training (`penalty`, `rhythm`) that are set."""
        fields = {"penalty": self.penalty, "rhythm": self.rhythm}
        return tuple(name for name, value in fields.items() if value is not None)

    def plain(self) -> "Recipe":
        """The recipe without sparsity training: that of every run but the dense one."""
        return self.model_copy(update={"penalty": None, "rhythm": None})

    def optimizers(self, network: nn.Module, step: int) -> list[torch.optim.Optimizer]:
        """The optimizers that make a step together, each over its own of a network's parameters."""

        def build(params: list[Tensor]) -> torch.optim.Optimizer:
            return self.optimizer.build(params, self.rate(step))

        if self.penalty is None:
            return [build(list(network.parameters()))]
        momentum = self.optimizer.momentum if isinstance(self.optimizer, Sgd) else 0.0
        return self.penalty.optimizers(network, build, momentum)

    def rate(self, step: int) -> float:
        """The learning rate of a step; after the last step, that of the last."""
        step = min(step, self.steps - 1)
        warm = min(1.0, (step + 1) / self.schedule.warmup) if self.schedule.warmup else 1.0
        return self.learning_rate * warm * self.schedule.decay(step, self.steps)

    def stretched(self, steps: int) -> "Recipe":
        """The recipe over another number of steps, the drops of its rate at the same fractions.

        A drop at step a of T is at the whole part of a · steps / T; warm-up keeps its length.

        Source: Liu et al. 2019 (1810.05270), Scratch-B.
        """
        schedule = self.schedule
        if isinstance(schedule, StepDrops):
            at = tuple(drop * steps // self.steps for drop in schedule.at)
            schedule = schedule.model_copy(update={"at": at})
        return self.model_copy(update={"steps": steps, "schedule": schedule})

    def evaluates(self, step: int) -> bool:
        """Whether the recipe's clock asks for an evaluation after this many steps."""
        return step % self.eval_every == 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return torch.float64 if self.dtype == "float64" else torch.float32


@dataclass(frozen=True)
class Evaluation:
    """One look at a network: losses are mean cross-entropies in nats, accuracies in [0, 1].

    Args:
        step: the clock, number of steps since initialization.
        train_loss: mean over the steps since the last evaluation; None at the start.
        validation_loss: on the validation part.
        validation_accuracy: on the validation part.
        test_loss: on the test part.
        test_accuracy: on the test part.
    """

    step: int
    train_loss: float | None
    validation_loss: float
    validation_accuracy: float
    test_loss: float
    test_accuracy: float

    @property
    def is_finite(self) -> bool:
        """False when a loss is NaN or infinite."""
        losses = (self.train_loss or 0.0, self.validation_loss, self.test_loss)
        return all(math.isfinite(loss) for loss in losses)


@dataclass
class State:
    """A network in training: everything that its future depends on, beside spec and data.

    Args:
        step: the clock.
        params: parameters by name.
        buffers: buffers by name (normalization statistics).
        masks: of the prunable weights; empty for a dense network.
        optimizer: the optimizer's tensors, by kind and then by parameter's name.
        evaluations: so far.
        losses: sum of the training losses since the last evaluation, a float64 scalar.
        diverged: True when a loss was NaN or infinite.
        snapshots: states at the steps to be kept, by step.
        channels: of a network that has lost channels, those of the whole one that stay, by group's
            name; empty for a whole network.
    """

    step: int
    params: Params
    buffers: Params
    masks: Masks = field(default_factory=dict[str, Tensor])
    optimizer: dict[str, Params] = field(default_factory=dict[str, Params])
    evaluations: list[Evaluation] = field(default_factory=list[Evaluation])
    losses: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    diverged: bool = False
    snapshots: "dict[int, State]" = field(default_factory=dict[int, "State"])
    channels: Masks = field(default_factory=dict[str, Tensor])

    def copy(self) -> "State":
        """A copy that shares no storage and carries neither evaluations nor snapshots."""
        return State(
            self.step,
            _cloned(self.params),
            _cloned(self.buffers),
            _cloned(self.masks),
            {kind: _cloned(tensors) for kind, tensors in self.optimizer.items()},
            losses=self.losses.clone(),
            diverged=self.diverged,
            channels=_cloned(self.channels),
        )

    def tensors(self) -> Params:
        """Everything that is a tensor under one flat set of names (for a file)."""
        parts = {
            "params": self.params,
            "buffers": self.buffers,
            "masks": self.masks,
            "channels": self.channels,
        }
        flat = {f"{part}/{n}": t for part, tensors in parts.items() for n, t in tensors.items()}
        for kind, tensors in self.optimizer.items():
            flat |= {f"optimizer/{kind}/{name}": tensor for name, tensor in tensors.items()}
        for step, snapshot in self.snapshots.items():
            flat |= {f"snapshots/{step}/{n}": t for n, t in snapshot.tensors().items()}
        return flat | {"losses": self.losses}

    def facts(self) -> dict[str, Any]:
        """Everything that is not a tensor, as a JSON-able dictionary."""
        return {
            "step": self.step,
            "diverged": self.diverged,
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
        }

    @classmethod
    def restored(cls, tensors: Params, facts: dict[str, Any]) -> "State":
        """The state that `tensors` and `facts` describe."""
        state = _unflattened(facts["step"], tensors)
        state.diverged = facts["diverged"]
        state.evaluations = [Evaluation(**evaluation) for evaluation in facts["evaluations"]]
        return state


def _cloned(tensors: Params) -> Params:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Params) -> Params:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _unflattened(step: int, tensors: Params) -> State:
    optimizer: dict[str, Params] = {}
    for path, tensor in _under("optimizer/", tensors).items():
        kind, name = path.split("/", 1)
        optimizer.setdefault(kind, {})[name] = tensor
    steps = {int(path.split("/", 1)[0]) for path in _under("snapshots/", tensors)}
    return State(
        step,
        _under("params/", tensors),
        _under("buffers/", tensors),
        _under("masks/", tensors),
        optimizer,
        losses=tensors["losses"],
        snapshots={k: _unflattened(k, _under(f"snapshots/{k}/", tensors)) for k in sorted(steps)},
        channels=_under("channels/", tensors),
    )


def early_stop(evaluations: list[Evaluation]) -> Evaluation:
    """The evaluation of least validation loss, the earliest among equals.

    Source: Frankle & Carbin 2019 (1803.03635), appendix G: found after the fact, over
        the whole run.
    """
    return min(evaluations, key=_badness)


def _badness(evaluation: Evaluation) -> tuple[bool, float, int]:
    loss = evaluation.validation_loss
    return math.isnan(loss), loss, evaluation.step  # NaN last: `min` alone depends on its place
