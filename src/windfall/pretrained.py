"""Pretrained teachers: networks trained on labels, and pruned to the nodes that matter.

goal = Trained(hidden=(50, 50), removed=0.5).parameters(data, seed=0)
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from windfall import chains, students, teachers
from windfall.chains import layer_names
from windfall.data import Dataset, Order
from windfall.masks import Params
from windfall.spec import Spec, SpecError
from windfall.teachers import Layers

MOMENTUM = 0.9


class Trained(Spec):
    """A ReLU network trained on the labels of its inputs, then pruned to its active nodes.

    It begins as torch's layers do and is trained by SGD with momentum .9 and cross-entropy. Of
    every hidden layer the nodes with the smallest mean |weight| out of them are removed; there is
    no training after that.

    Source: luckmatters, `recon_multilayer.prune` and its `active_ks`.

    Args:
        hidden: the sizes of the hidden layers before pruning, channels of convolutions.
        layers: `linear` ones, or `convolutional`: 3x3 without padding.
        removed: the share of every hidden layer's nodes to remove, in [0, 1), rounded down.
        steps: of its training.
        learning_rate: of every step, above 0.
        batch_size: inputs of a step.
        seed: which of these teachers.
    """

    hidden: tuple[PositiveInt, ...] = (50, 75, 100)
    layers: Layers = "linear"
    removed: float = Field(default=0.5, ge=0, lt=1)
    steps: PositiveInt = 1000
    learning_rate: PositiveFloat = 0.02
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0

    @property
    def active(self) -> tuple[int, ...]:
        """The sizes of the hidden layers after pruning."""
        return tuple(size - math.floor(self.removed * size + 1e-9) for size in self.hidden)

    def parameters(self, data: Dataset) -> Params:
        """The teacher's parameters, float64.

        Args:
            data: what it is trained on: the training part.

        Raises:
            SpecError: when the inputs are no images that convolutions can read.
        """
        params = self.begun(data.input_shape, data.num_classes)
        network = chains.build({name: value.float() for name, value in params.items()})
        optimizer = torch.optim.SGD(network.parameters(), self.learning_rate, MOMENTUM)
        order = Order(self.seed, len(data.train), self.batch_size)
        for step in range(self.steps):
            part = torch.from_numpy(order.batch(step))
            inputs = data.prepare(data.train.inputs[part], torch.float32)
            optimizer.zero_grad()
            loss: Any = F.cross_entropy(network(inputs), data.train.labels[part].long())
            loss.backward()
            optimizer.step()
        ended = {name: value.detach().double() for name, value in network.named_parameters()}
        if not all(bool(value.isfinite().all()) for value in ended.values()):
            raise SpecError(
                f"`teacher.learning_rate` must be one that its training converges with; got"
                f" {self.learning_rate:g}, and weights that are not finite."
            )
        return pruned(ended, self.active)

    def begun(self, input_shape: tuple[int, ...], num_classes: int) -> Params:
        """Its parameters before training, float64; raises as `parameters`."""
        try:
            shapes = teachers.layer_shapes(self.hidden, self.layers, input_shape, num_classes)
        except ValueError as problem:
            raise SpecError(str(problem)) from None
        return students.torch_uniform(shapes, self.seed, "trained-teacher")


def pruned(params: Params, active: tuple[int, ...]) -> Params:
    """The chain with only so many nodes in every hidden layer: those of largest mean |fan-out|.

    Nodes keep their order; among equals the first stay.

    Args:
        params: of a chain without BatchNorm.
        active: nodes to keep, by hidden layer.
    """
    kept = {
        name: chains.per_node(params, name)[-1].abs().flatten(1).mean(1)
        .sort(descending=True, stable=True).indices[:num].sort().values
        for name, num in zip(layer_names(params), active, strict=False)
    }  # fmt: skip
    return chains.restricted(params, kept)
