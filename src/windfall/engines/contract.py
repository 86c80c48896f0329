"""What every engine is given, and what it must refuse.

An engine's `train` takes a `Task` and a `State` and returns the state at the task's last step. It
draws what the seed's streams say, and gives the training of `engines.separate` up to rounding.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from windfall.batches import Indices
from windfall.data import Dataset, Order
from windfall.spec import SpecError
from windfall.train import Evaluation, Recipe, State

AHEAD = 64  # steps whose batches are drawn at once: one at a time costs 2 % of a step of LeNet
CHUNK = 1000  # examples a forward pass of an evaluation: 100 to 1,000 are equally fast on LeNet

Pulse = Callable[[int, Callable[[], State]], None]


class Unsupported(SpecError):
    """An engine cannot train this network; the message names the layer."""


@dataclass(frozen=True)
class Task:
    """One training as an engine sees it.

    Args:
        network: the module; its parameters and buffers are overwritten.
        data: on the device of the training.
        recipe: how it is trained.
        seed: names the streams of order, augmentation and the network's own draws.
        last_step: the step after the last one.
        keep: steps at whose beginning a snapshot of the state is kept.
    """

    network: nn.Module
    data: Dataset
    recipe: Recipe
    seed: int
    last_step: int
    keep: frozenset[int] = frozenset()

    @property
    def order(self) -> Order:
        """The order of the training samples."""
        return Order(self.seed, len(self.data.train), self.recipe.batch_size)


def batches(order: Order, step: int) -> Iterator[Indices]:
    """The indices of the batches from this step on, [AHEAD, batch] at a time, without end."""
    while True:
        yield order.batches(step, AHEAD)
        step += AHEAD


def evaluation(
    state: State, validation: tuple[float, float], test: tuple[float, float]
) -> Evaluation:
    """The evaluation of a state.

    Args:
        state: of which `step`, `evaluations` and `losses` are read.
        validation: its loss and accuracy.
        test: the same on the test part.
    """
    steps = state.step - state.evaluations[-1].step if state.evaluations else 0
    train_loss = float(state.losses) / steps if steps else None
    return Evaluation(state.step, train_loss, *validation, *test)


def refuse_sparsity(recipe: Recipe, engine: str) -> None:
    """Refuse, by `Unsupported`, sparsity training in an engine that knows none."""
    for name in recipe.sparsity:
        raise Unsupported(
            f"`engine` must be separate or auto where `recipe.{name}` is set; got {engine}."
        )


def check(network: nn.Module, state: State) -> None:
    """Refuse a state that is another network's, or whose pruned weights would come back.

    Raises:
        SpecError: when names or shapes differ, or a pruned weight or its moment is not 0.
    """
    for kind, own, given in (
        ("parameter", dict(network.named_parameters()), state.params),
        ("buffer", dict(network.named_buffers()), state.buffers),
    ):
        for name in [*given, *own]:
            expected, found = _shape(given, name), _shape(own, name)
            if expected != found:
                raise SpecError(
                    f"`network` must have the {kind}s of the state; got {kind} `{name}` of shape "
                    f"{found} where the state's is {expected}."
                )
    _check_pruned(state)


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(list(tensors[name].shape)) if name in tensors else "none"


def _check_pruned(state: State) -> None:
    for name, mask in state.masks.items():
        for kind, tensors in {"params": state.params, **state.optimizer}.items():
            value = tensors.get(name, mask)
            if value.shape == mask.shape and bool(value[~mask].any()):
                raise SpecError(
                    f"`state` must be 0 where its masks prune; got others in `{name}` of `{kind}`. "
                    "Apply the masks to both, `masks.apply`."
                )


@torch.no_grad()
def overwrite(network: nn.Module, state: State) -> None:
    """Give a network's tensors the values of a state's that was checked."""
    for own, given in (
        (dict(network.named_parameters()), state.params),
        (dict(network.named_buffers()), state.buffers),
    ):
        for name, tensor in own.items():
            tensor.copy_(given[name])
