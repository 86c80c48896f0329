"""Sparsity training: what makes a dense network ready to lose channels or blocks.

A penalty pulls numbers that scale channels or blocks towards 0, beside the loss. A rhythm sets
filters to 0 every so many steps, and lets them train on. Both belong to the dense run alone: what
stays of a network is trained without them.

    optimizers = GatePenalty(strength=0.01).optimizers(network, build, momentum=0.9)
    SoftPruning(every=100).begun(network, (3, 32, 32)).zero(params)
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from windfall import models
from windfall.evidence import Evidence
from windfall.filters import FilterNorm
from windfall.masks import Masks, Params
from windfall.models import Gate, Kind
from windfall.selection import Global, Layerwise, Published, Ratios
from windfall.spec import FAMILY, Spec, SpecError
from windfall.structure import Group, Normalization
from windfall.units import Channels

Build = Callable[[list[Tensor]], torch.optim.Optimizer]


# -- penalties -------------------------------------------------------------------------------------


class ScalePenalty(Spec):
    """An L1 penalty on the scales of all batch normalizations, by its subgradient.

    strength · sum |gamma| beside the loss: gamma's gradient has strength · sign(gamma) more. It is
    not in the losses that are told.

    Source: Liu et al. 2017 (1708.06519), section 3.3 (Network Slimming); 1e-4 for VGG, 1e-5 for
    PreResNet and DenseNet in 1810.05270's code.

    Args:
        strength: above 0.
    """

    strength: float = Field(default=1e-4, gt=0)

    def targets(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """What is penalized, by name.

        Raises:
            SpecError: when the network has no batch normalization.
        """
        found = {
            f"{path}.weight": part.weight
            for path, part in network.named_modules()
            if isinstance(part, Normalization) and part.affine
        }
        if not found:
            raise SpecError(
                "`recipe.penalty` scale-penalty must be used with a network that has batch"
                f" normalization; got {type(network).__name__} without. Leave it out."
            )
        return found

    def optimizers(
        self,
        network: nn.Module,
        build: Build,
        momentum: float,  # noqa: ARG002  the family's signature
    ) -> list[torch.optim.Optimizer]:
        """The recipe's optimizer, which adds to the gradients of scales before every step."""
        scales = list(self.targets(network).values())

        def add(*_: Any) -> None:
            for scale in scales:
                assert scale.grad is not None
                scale.grad.add_(scale.detach().sign(), alpha=self.strength)

        optimizer = build(list(network.parameters()))
        optimizer.register_step_pre_hook(add)
        return [optimizer]


class GatePenalty(Spec):
    """An L1 penalty on the gates of residual blocks, by accelerated proximal gradient steps.

    strength · sum |lambda| beside the loss. With the step's rate η and the optimizer's momentum μ,

        z = lambda - η dL/dlambda + μ v
        lambda⁺ = sign(z) max(|z| - η strength, 0)
        v = lambda⁺ - lambda

    so that a gate becomes exactly 0. The recipe's optimizer and its weight decay leave gates alone.

    Source: Huang & Wang 2018 (1707.01213), section 3.3 (Sparse Structure Selection).

    Note:
        The gradient is that at lambda. The paper's second form takes it a momentum step ahead, and
        lets a gate rest there: its code needs gates to be at least 0 for them to end at 0.

    Args:
        strength: above 0; 0.01 in the paper's code for ResNet-50.
    """

    strength: float = Field(default=0.01, gt=0)

    def targets(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """What is penalized, by name.

        Raises:
            SpecError: when the network has no gates.
        """
        found = {
            f"{path}.weight": part.weight
            for path, part in network.named_modules()
            if isinstance(part, Gate)
        }
        if not found:
            raise SpecError(
                "`recipe.penalty` gate-penalty must be used with a network whose blocks have gates;"
                f" got {type(network).__name__} without. Take a residual network of the zoo with"
                " `model.gates=true`, or leave it out."
            )
        return found

    def optimizers(
        self, network: nn.Module, build: Build, momentum: float
    ) -> list[torch.optim.Optimizer]:
        """The recipe's optimizer, over all but the gates, and the gates' own."""
        gates = self.targets(network)
        every = network.named_parameters()
        others: list[Tensor] = [param for name, param in every if name not in gates]
        return [build(others), _Proximal(list(gates.values()), momentum, self.strength)]


class _Proximal(torch.optim.Optimizer):
    """Accelerated proximal gradient steps for strength · sum |w|; v is its state."""

    def __init__(self, params: list[nn.Parameter], momentum: float, strength: float) -> None:
        super().__init__(params, {"lr": 0.0})  # an engine sets the rate before every step
        self.momentum, self.strength = momentum, strength

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ARG002  torch's signature
        for group in self.param_groups:
            for param in group["params"]:
                assert param.grad is not None
                velocity = self.state[param].setdefault("velocity", torch.zeros_like(param))
                ahead = param - group["lr"] * param.grad + self.momentum * velocity
                new = F.softshrink(ahead, group["lr"] * self.strength)
                velocity.copy_(new - param)
                param.copy_(new)


Penalty = Annotated[ScalePenalty | GatePenalty, FAMILY]


# -- rhythms ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Zeroing:
    """What a network's rhythm sets to 0, and when.

    Args:
        every: steps from one time to the next.
        selection: how many channels stay, and where.
        groups: that may lose channels, by name.
        kinds: of layers, by their weights' names.
    """

    every: int
    selection: Global | Layerwise | Published | Ratios
    groups: Mapping[str, Group]
    kinds: dict[str, Kind]

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether it is done after so many steps: it is, after the last one."""
        return step % self.every == 0 or step == last_step

    @torch.no_grad()
    def zero(self, params: Params) -> Masks:
        """Set the smallest filters to 0; where one's norm is not finite, none.

        Returns:
            By group's name, True for the channels that stay as they were.
        """
        makers = {name for group in self.groups.values() for name in group.makers}
        trained = {name: params[name].detach().cpu() for name in makers}
        scores = FilterNorm(order=2).score(Evidence({}, trained, 0, 1, self.groups), self.groups)
        alive = {n: torch.ones(len(score), dtype=torch.bool) for n, score in scores.items()}
        if not all(bool(score.isfinite().all()) for score in scores.values()):
            return alive  # the next evaluation finds that the run has diverged
        stay = self.selection.select(scores, alive, self.kinds, level=1)
        for name, group in self.groups.items():
            dead = (~stay[name]).nonzero().flatten().tolist()
            for slot in group.slots if dead else ():
                if group.makers.get(slot.tensor) == slot.axis:
                    places = torch.tensor([at for channel in dead for at in slot.places[channel]])
                    tensor = params[slot.tensor]
                    tensor.index_fill_(slot.axis, places.to(tensor.device), 0.0)
        return stay


class SoftPruning(Spec):
    """Filters of the smallest L2 norm are set to 0 every so often, train on, and may come back.

    After the last step too: pruning by `filter-norm` of order 2 with the same selection and
    structure then removes, at level 1, the channels that were set to 0 last.

    Biases and normalization stay as they are: a ReLU of what is 0 with its bias has no gradient,
    and the filter could not come back.

    Source: He et al. 2018 (1808.06866), section 3.2 and algorithm 1 (Soft Filter Pruning).

    Args:
        every: steps, at least 1; in the paper an epoch, 391 for CIFAR-10 in batches of 128.
        selection: how many channels stay, and where: as of level 1 each time.
        structure: which channels may be set to 0.
    """

    every: int = Field(default=391, ge=1)
    selection: Annotated[Layerwise | Global | Ratios | Published, FAMILY] = Layerwise()
    structure: Channels = Channels()

    def begun(self, network: nn.Module, input_shape: tuple[int, ...]) -> Zeroing:
        """What it sets to 0 of a network, which is left as it was.

        Raises:
            SpecError: when it is not fit for the network.
        """
        own = copy.deepcopy(network).cpu()
        try:
            groups = self.structure.of(self.structure.groups(own, input_shape))
            kinds = models.kinds(own, input_shape)
            self.selection.counts({name: group.size for name, group in groups.items()}, kinds, 1)
        except SpecError as problem:
            raise SpecError(f"`recipe.rhythm` must fit the network. {problem}") from problem
        return Zeroing(self.every, self.selection, groups, kinds)


Rhythm = Annotated[SoftPruning, FAMILY]
