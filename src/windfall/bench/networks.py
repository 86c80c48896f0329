"""What is trained in a benchmark: networks, their recipes, data and random masks.

network = NETWORKS["lenet-300-100/60"]
data = images(network)
final = separate.train(network.task(data, seed=0, last_step=10), network.beginning(0.2, seed=0))
"""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import nn

from windfall import masks as masking
from windfall import models, samples, seeds
from windfall.data import Dataset
from windfall.engines.contract import Task
from windfall.initialize import GlorotNormal, initial_parameters
from windfall.masks import Masks
from windfall.models import ModelField
from windfall.samples import Part
from windfall.spec import Spec, SpecError, nearest
from windfall.train import Adam, Recipe, Sgd, State

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
NUM_CLASSES, PEAK = 10, 255
ENDLESS = 10**9  # steps: a benchmark's training is stopped, it does not end


class Network(Spec):
    """A network with the recipe of its paper, on random images.

    Args:
        name: what tables call it.
        model: the network.
        input_shape: channel, height and width of its images.
        num_train: images it is trained on.
        recipe: how; a lap of a measurement is a multiple of its `eval_every` steps.
    """

    name: str
    model: ModelField
    input_shape: tuple[int, int, int]
    num_train: int = Field(ge=1)
    recipe: Recipe

    @property
    def is_convolutional(self) -> bool:
        """Whether it has convolutions, whose speed depends on the layout in memory."""
        return "convolution" in self.kinds().values()

    def build(self) -> nn.Module:
        """A new module."""
        return self.model.build(self.input_shape, NUM_CLASSES)

    def kinds(self) -> dict[str, models.Kind]:
        """The kinds of its prunable layers."""
        return models.kinds(self.build(), self.input_shape)

    def masks(self, density: float, seed: int) -> Masks:
        """Random masks of one density in every layer, twice that in the output layer.

        Twice, at most 1, as the output layer is pruned at half the rate of the others (1803.03635).
        Density 1 is the dense network: it has none.
        """
        if density == 1:
            return {}
        kinds = self.kinds()
        dense = masking.ones(dict(self.build().named_parameters()), kinds)
        share = {n: min(1.0, density * (1 + (kinds[n] == "output"))) for n in kinds}
        counts = {name: max(1, round(share[name] * m.numel())) for name, m in dense.items()}
        return masking.scatter(counts, dense, seed)

    def beginning(self, density: float, seed: int) -> State:
        """A new network, its weights pruned at random."""
        params, buffers = initial_parameters(self.build, GlorotNormal(), seed)
        masks = self.masks(density, seed)
        return State(0, masking.apply(masks, params), buffers, masks)

    def task(self, data: Dataset, seed: int, last_step: int = ENDLESS) -> Task:
        """The training of one replica."""
        return Task(self.build(), data, self.recipe, seed, last_step)


def _recipe(optimizer: Sgd | Adam, rate: float, batch: int, every: int) -> Recipe:
    return Recipe(
        optimizer=optimizer,
        learning_rate=rate,
        batch_size=batch,
        steps=ENDLESS,
        eval_every=every,
    )


# eval_every: so many steps that the evaluation on two images in them costs a per cent at most
_LENET, _LENET_EVERY, _CONV_EVERY, _RESNET_EVERY = models.Lenet_300_100(), 1024, 16, 8
NETWORKS = {
    network.name: network
    for network in (
        Network(  # 1803.03635, Fig. 2
            name="lenet-300-100/60",
            model=_LENET,
            input_shape=MNIST,
            num_train=55_000,
            recipe=_recipe(Adam(), 1.2e-3, 60, _LENET_EVERY),
        ),
        Network(
            name="lenet-300-100/128",
            model=_LENET,
            input_shape=MNIST,
            num_train=55_000,
            recipe=_recipe(Sgd(), 0.1, 128, _LENET_EVERY),
        ),
        Network(  # 1803.03635, Fig. 2
            name="conv-4",
            model=models.Conv_4(),
            input_shape=CIFAR,
            num_train=45_000,
            recipe=_recipe(Adam(), 3e-4, 60, _CONV_EVERY),
        ),
        Network(  # 1512.03385, section 4.2
            name="resnet-20",
            model=models.Resnet_20(),
            input_shape=CIFAR,
            num_train=45_000,
            recipe=_recipe(Sgd(momentum=0.9, weight_decay=1e-4), 0.1, 128, _RESNET_EVERY),
        ),
    )
}


def chosen(networks: Sequence[Network | str]) -> list[Network]:
    """The networks that are meant, by name or as they are.

    Raises:
        SpecError: when a name is of none, or there is none.
    """
    for each in networks:
        if isinstance(each, str) and each not in NETWORKS:
            raise SpecError(
                f"`networks` must be of known names; got {each!r}.{nearest(each, list(NETWORKS))}"
            )
    if not networks:
        raise SpecError("`networks` must name one at least; got none.")
    return [NETWORKS[each] if isinstance(each, str) else each for each in networks]


def images(network: Network, num_validation: int = 1, num_test: int = 1) -> Dataset:
    """Random images of the network's shape and number, the same in every process.

    Args:
        network: whose.
        num_validation: images of the validation part.
        num_test: images of the test part.
    """
    numbers = (network.num_train, num_validation, num_test)
    stream = seeds.stream(0, "bench")
    inputs = stream.integers(0, PEAK + 1, (sum(numbers), *network.input_shape), dtype=np.uint8)
    labels = stream.integers(0, NUM_CLASSES, sum(numbers))
    parts = zip(
        torch.from_numpy(inputs).split(numbers),
        torch.from_numpy(labels).split(numbers),
        strict=True,
    )
    train, validation, test = (Part(*part) for part in parts)
    mean, std = samples.moments(train.inputs, PEAK)
    return Dataset(train, validation, test, mean, std, PEAK, NUM_CLASSES, sha256="", note=None)
