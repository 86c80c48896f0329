"""Teachers: random networks to be learned, whose every node is known.

A teacher is a ReLU network whose rows are drawn, not trained, so everything that a student could
find out is known. Parameters are float64 and named as those of `chains`:

    teacher = Teacher(hidden=(10, 15), seed=1)
    goal = teacher.parameters((20,), 100)      # hidden1.weight [10, 20], ..., output.bias [100]
"""

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
)
from torch import Tensor, nn

from windfall import chains, seeds
from windfall.chains import KERNEL, layer_name
from windfall.chains import layer_names as layer_names
from windfall.chains import layer_sizes as layer_sizes
from windfall.masks import Params
from windfall.spec import FAMILY, Spec, SpecError

Draws = npt.NDArray[np.float64]
VALUES = (-0.5, -0.25, 0.0, 0.25, 0.5)  # of luckmatters' `init_w`
Layers = Literal["linear", "convolutional"]


# -- rows and biases -------------------------------------------------------------------------------


def distinct_rows(
    num_rows: int, size: int, values: Sequence[float], stream: np.random.Generator
) -> Draws:
    """Different rows, none all zero, every such choice of rows in order equally likely.

    Note:
        Different rows may still be parallel, (.25, 0) and (.5, 0), and then are one direction. With
        five values and twenty inputs that has a probability below 1e-8 for 25 rows.

    Source: luckmatters, `theory_utils.init_separate_w`.

    Args:
        num_rows: at least 0 and at most |values|^size, less one if 0 is a value.
        size: the entries of a row, at least 1.
        values: what an entry may be, all different.
        stream: what is drawn from.

    Returns:
        The rows [num_rows, size].

    Raises:
        ValueError: when there are not as many.
    """
    num_possible = len(values) ** size - (0 in values)
    if num_rows > num_possible:
        raise ValueError(
            f"`values` must make {num_rows} different nonzero rows of {size} entries; "
            f"{len(values)} values make {num_possible}. Give more values, or fewer nodes."
        )
    choices, rows = np.array(values, dtype=np.float64), dict[bytes, Draws]()
    while len(rows) < num_rows:
        for row in choices[stream.integers(len(choices), size=(num_rows - len(rows), size))]:
            if row.any():
                rows.setdefault(row.tobytes(), row)
    return np.stack(list(rows.values())) if rows else np.empty((0, size))


class UniformBias(Spec):
    """Biases uniform on [low, high), each then divided by its row's norm.

    Source: luckmatters, `model_gen.init_w` and `normalize_layer`.
    """

    low: float = -0.5
    high: float = 0.5

    @field_validator("high")
    @classmethod
    def _above(cls, value: float, info: ValidationInfo) -> float:
        low = info.data.get("low", value)
        if value < low:
            raise ValueError(f"must be at least `low`, {low:g}; got {value:g}")
        return value

    def draw(self, norms: Tensor, stream: np.random.Generator) -> Tensor:
        """The biases of nodes whose rows have these norms."""
        return torch.from_numpy(stream.uniform(self.low, self.high, len(norms))) / norms


class ConstantBias(Spec):
    """One bias for all nodes, as it is, whatever their rows' norms.

    Source: luckmatters, `recon_two_layer.init` (-0.1); 0 is that of `test_multilayer`.
    """

    value: float = -0.1

    def draw(self, norms: Tensor, stream: np.random.Generator) -> Tensor:  # noqa: ARG002
        """The biases of nodes whose rows have these norms."""
        return torch.full_like(norms, self.value)


Bias = Annotated[UniformBias | ConstantBias, FAMILY]


class Teacher(Spec):
    """A ReLU network of random, different nodes, linear at the output.

    The rows of every layer are drawn without repetition from `values`^fan_in and divided by their
    L2 norms; the weights out of node i of a hidden layer are then divided by (i + 1)^decay, so that
    later nodes matter less. Layer l's rows and biases come from streams of their own. A row of a
    convolution is its kernel over all channels.

    Source: 1905.13405, with `recon_multilayer`'s settings as defaults; 1909.13458, whose two-layer
    teacher is `Teacher(hidden=(10,), bias=ConstantBias(), decay=1, is_output_unit=False)`.

    Args:
        hidden: the sizes of the hidden layers, channels of convolutions.
        layers: `linear` ones, or `convolutional`: 3x3 without padding.
        values: what a weight may be before the division, all different.
        bias: the biases, of the output too.
        decay: the exponent of the strength, at least 0; 0 for nodes of one strength.
        is_output_unit: divide the rows of the output layer too.
        seed: which of the random teachers.
    """

    hidden: tuple[PositiveInt, ...] = (10, 15, 20, 25)
    layers: Layers = "linear"
    values: tuple[float, ...] = Field(default=VALUES, min_length=1)
    bias: Bias = UniformBias()
    decay: NonNegativeFloat = 0.0
    is_output_unit: bool = True
    seed: NonNegativeInt = 0

    @field_validator("values")
    @classmethod
    def _all_different(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"must all be different; got {list(values)}")
        return values

    def parameters(self, input_shape: tuple[int, ...], num_outputs: int) -> Params:
        """The teacher's weights [out, in] or [out, in, 3, 3] and biases [out] by name, float64.

        Raises:
            SpecError: when a layer has more nodes than there are different rows, or the inputs
                are no images that convolutions can read.
        """
        try:
            shapes = layer_shapes(self.hidden, self.layers, input_shape, num_outputs)
        except ValueError as problem:
            raise SpecError(str(problem)) from None
        params, below = Params(), 0
        for layer, (name, shape) in enumerate(shapes.items()):
            stream = seeds.stream(self.seed, "teacher", 2 * layer)
            weight = self._rows(name, shape[0], math.prod(shape[1:]), stream)
            norms = weight.norm(dim=1)
            if name == "output" and not self.is_output_unit:
                norms = torch.ones_like(norms)
            weight = weight / norms[:, None]
            if layer > 0 and self.decay:
                places = torch.arange(1, below + 1, dtype=weight.dtype)
                strength = places.repeat_interleave(weight.shape[1] // below) ** self.decay
                weight = weight / strength
            params[f"{name}.weight"] = weight.reshape(shape)
            stream = seeds.stream(self.seed, "teacher", 2 * layer + 1)
            params[f"{name}.bias"] = self.bias.draw(norms, stream)
            below = shape[0]
        return params

    def _rows(self, name: str, size: int, fan_in: int, stream: np.random.Generator) -> Tensor:
        try:
            return torch.from_numpy(distinct_rows(size, fan_in, self.values, stream))
        except ValueError as problem:
            told = str(problem).removesuffix(".").replace("`values`", "`teacher.values`")
            raise SpecError(f"{told} (layer `{name}`).") from None

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network with the teacher's parameters, rounded to the default dtype."""
        params = self.parameters(input_shape, num_classes)
        return chains.build({name: value.float() for name, value in params.items()})


def layer_shapes(
    hidden: tuple[int, ...], layers: Layers, input_shape: tuple[int, ...], num_outputs: int
) -> dict[str, tuple[int, ...]]:
    """The shape of every layer's weight by its name.

    Raises:
        ValueError: when the inputs are no images, or too small for so many convolutions.
    """
    shapes: list[tuple[int, ...]]
    if layers == "linear":
        sizes = (math.prod(input_shape), *hidden, num_outputs)
        shapes = [(made, reads) for reads, made in itertools.pairwise(sizes)]
    else:
        num_positions = chains.positions(input_shape, len(hidden))
        channels = (input_shape[0], *hidden)
        shapes = [(made, reads, KERNEL, KERNEL) for reads, made in itertools.pairwise(channels)]
        shapes.append((num_outputs, channels[-1] * num_positions))
    return {layer_name(layer, len(shapes)): shape for layer, shape in enumerate(shapes)}
