"""Which engine trains a run: a fixed rule of network, density, batch size and device.

It is never a stopwatch's, so that a study stopped and run again ends where an unbroken one would.
What the rule rests on (two cores of an AMD EPYC with AVX-512, torch 2.13, one replica a core, one
thread each; seconds of a step of `separate` over those of `sparse`, `windfall bench step`):

    density             1     .8    .6    .4    .2    .1   .05   .02
    lenet-300-100      2.9    -     -     -    10     16    25    40
    conv-2             1.0   1.2   1.5   2.1   3.2    -     -     -
    conv-4              .7    .9   1.1   1.3   2.6    -     5     -
    resnet-20          1.0   1.1   1.4   1.7   2.5    -     4     -
    vgg-11              .7    .9   1.1   1.6   3.1    -     -     -

A stack of replicas costs about as much as they do alone on a CPU; on a GPU, where a small network's
step is the launch of its kernels, it costs about as much as one.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from windfall.data import Dataset
from windfall.engines.contract import Task, Unsupported
from windfall.samples import Part
from windfall.train import Recipe, State

Name = Literal["separate", "stacked", "sparse"]
Asked = Literal["auto", "separate", "stacked", "sparse"]
NAMES: tuple[Name, ...] = get_args(Name)

BREAK_EVEN = 0.7  # density up to which sparse convolutions are faster than dense ones
SMALL = 3_000_000  # parameters of a network whose kernels on a GPU cost their launch


@dataclass(frozen=True)
class Choice:
    """An engine.

    Args:
        engine: that trains.
        reason: why a faster one cannot, or None.
    """

    engine: Name
    reason: str | None = None


def choose(
    asked: Asked,
    network: nn.Module,
    input_shape: tuple[int, ...],
    density: float,
    device: str,
    recipe: Recipe | None = None,
) -> Choice:
    """The engine of a run.

    Args:
        asked: for an engine by name, or `auto`; sparsity training is `separate`'s all the same.
        network: to be trained.
        input_shape: of one sample.
        density: fraction of the prunable weights that are trained, in (0, 1].
        device: `cpu` or `cuda`.
        recipe: how it is trained; None is without sparsity training.

    Raises:
        Unsupported: when the engine asked for by name cannot train the network; the message names
            the layer.
    """
    if asked == "separate":
        return Choice(asked)
    if recipe is not None and recipe.sparsity:
        return Choice("separate", f"`recipe.{recipe.sparsity[0]}` is known to `separate` alone.")
    if asked == "stacked":
        _examine(network, input_shape)
        return Choice(asked)
    if device != "cpu":
        if asked == "sparse":
            raise Unsupported("`engine` must be one for a GPU; sparse is for the CPU. Use auto.")
        return _on_gpu(network, input_shape)
    from windfall.engines.sparse import (
        graph,
        operations,
    )  # bring a compiler, which not every command needs

    try:
        found = graph.read(network, input_shape)
    except Unsupported as problem:
        if asked == "sparse":
            raise
        return Choice("separate", str(problem))
    is_linear = all(
        op.shape[2:] == (1, 1) for op in found.ops if isinstance(op, operations.Connect)
    )
    wins = asked == "sparse" or is_linear or density <= BREAK_EVEN
    return Choice("sparse" if wins else "separate")


def _on_gpu(network: nn.Module, input_shape: tuple[int, ...]) -> Choice:
    if sum(param.numel() for param in network.parameters()) > SMALL:
        return Choice("separate")
    try:
        _examine(network, input_shape)
    except Unsupported as problem:
        return Choice("separate", str(problem))
    return Choice("stacked")


def _examine(network: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Refuse a network that cannot be trained in a stack, by a trial on two black images."""
    from windfall.engines import lift

    part = Part(torch.zeros(2, *input_shape, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))
    mean = torch.zeros(input_shape[0])
    data = Dataset(part, part, part, mean, mean + 1, 255, 1, sha256="", note=None)
    lift.examine(Task(network, data, Recipe(), seed=0, last_step=0))


def kept(state: State) -> float:
    """The fraction of a state's prunable weights that are trained."""
    masks = state.masks.values()
    total = sum(mask.numel() for mask in masks)
    return sum(int(mask.sum()) for mask in masks) / total if total else 1.0
