"""Inputs: what teacher and student both see.

A member of the family says which; `drawn` makes them for a seed:

    seen = Gaussian(dimension=20, std=10.0).drawn(seed=0, batch_size=64)
    seen.evaluation                        # [sample, 20], never trained on
    batch = next(seen.batches(step=0))
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from windfall import data as data_sets
from windfall import seeds
from windfall.batches import CropFlip, Order
from windfall.data import Data, Dataset
from windfall.spec import FAMILY, Spec, canonical, decode

AHEAD = 64  # steps of a block, whose inputs are drawn at once


@dataclass(frozen=True)
class Seen:
    """The inputs of one seed, float32.

    Args:
        evaluation: to measure on, never trained on, [sample, ...].
        training: some that are trained on, as many as those to measure on, or all, [sample, ...];
            where every batch is drawn afresh, some of the same law.
        block: the inputs of AHEAD steps, [step · batch, ...], from the number of the block: block b
            begins at step b · AHEAD.
        batch_size: inputs of a step.
    """

    evaluation: Tensor
    training: Tensor
    block: Callable[[int], Tensor]
    batch_size: int

    def batches(self, step: int) -> Iterator[Tensor]:
        """The inputs of this step and of every later one, each [batch, ...]."""
        block, begun = divmod(step, AHEAD)
        while True:
            yield from self.block(block).split(self.batch_size)[begun:]
            block, begun = block + 1, 0


class Gaussian(Spec):
    """Gaussian inputs, x ~ N(0, std² I).

    Source: luckmatters, `recon_multilayer`'s defaults.

    Args:
        dimension: of x.
        std: of each coordinate, above 0.
        num_train: training inputs, seen in an endless seeded order; None draws every batch afresh.
        num_evaluation: inputs that losses and correlations are measured on, never trained on.
    """

    dimension: PositiveInt = 20
    std: PositiveFloat = 10.0
    num_train: PositiveInt | None = 100_000
    num_evaluation: PositiveInt = 1024

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return (self.dimension,)

    def drawn(self, seed: int, batch_size: int) -> Seen:
        """The inputs of a seed, in batches of this size."""
        evaluation = self._draw(seed, "evaluation-inputs", 0, self.num_evaluation)
        if self.num_train is None:
            some = self._draw(seed, "training-inputs", 0, self.num_evaluation)
            size = AHEAD * batch_size
            fresh = functools.partial(self._draw, seed, "inputs", num=size)
            return Seen(evaluation, some, fresh, batch_size)
        whole = self._draw(seed, "inputs", 0, self.num_train)
        pick = _picked(Order(seed, self.num_train, batch_size), whole)
        return Seen(evaluation, whole[: self.num_evaluation], pick, batch_size)

    def _draw(self, seed: int, purpose: str, index: int, num: int) -> Tensor:
        draws = seeds.stream(seed, purpose, index).standard_normal((num, self.dimension))
        return torch.from_numpy(self.std * draws).float()


def _picked(order: Order, whole: Tensor) -> Callable[[int], Tensor]:
    """The blocks of training samples in the run's order."""

    def block(index: int) -> Tensor:
        indices = order.batches(index * AHEAD, AHEAD).reshape(-1)
        return whole.index_select(0, torch.from_numpy(indices))

    return block


class Real(Spec):
    """Inputs of a data set, normalized by its training part; its labels are not read.

    They are measured on its validation part.

    Source: luckmatters, `recon_multilayer --use_cnn`, on CIFAR-10 with crops and mirror images.

    Args:
        data: which.
        augment: crops and mirror images of the training inputs, or None.
        num_evaluation: inputs to measure on, at most those of the validation part.
    """

    data: Data = data_sets.Digits()
    augment: CropFlip | None = None
    num_evaluation: PositiveInt = 1024

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input; reads the data.

        Raises:
            SpecError: when the data are missing or malformed.
        """
        return self.loaded().input_shape

    def loaded(self) -> Dataset:
        """The data, read once a process."""
        return loaded(self.data)

    def drawn(self, seed: int, batch_size: int) -> Seen:
        """The inputs of a seed: its order and augmentation; the samples are those of every seed."""
        whole = self.loaded()
        train, prepare = whole.train.inputs, functools.partial(whole.prepare, dtype=torch.float32)
        pick = _picked(Order(seed, len(train), batch_size), train)

        def block(index: int) -> Tensor:
            images = pick(index)
            if self.augment:
                steps = enumerate(images.split(batch_size), start=index * AHEAD)
                images = torch.cat([self.augment.apply(some, seed, step) for step, some in steps])
            return prepare(images)

        num = self.num_evaluation
        evaluation = prepare(whole.validation.inputs[:num])
        return Seen(evaluation, prepare(train[:num]), block, batch_size)


def loaded(data: Data) -> Dataset:
    """A data set, read once a process."""
    return _loaded(canonical(data.to_json(addressed=False)))


@functools.lru_cache(maxsize=2)
def _loaded(told: str) -> Dataset:
    return data_sets.load(decode(Data, json.loads(told)))


Inputs = Annotated[Gaussian | Real, FAMILY]
