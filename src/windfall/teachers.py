"""Teachers and students: random networks to be learned, and wider ones that learn them.

A teacher is a fully connected ReLU network whose rows are drawn, not trained, so everything that a
student could find out is known. A student has `multi` times as many nodes in every hidden layer and
begins as one of the family `Start` says. Parameters are float64 and named as those of `models.Mlp`:

    teacher = Teacher(hidden=(10, 15), seed=1)
    goal = teacher.parameters(20, 100)         # hidden1.weight [10, 20], ..., output.bias [100]
    student = Student(hidden=teacher.hidden, multi=5, start=Perturbed(std=0.1))
    begun = student.parameters(goal, seed=0)   # hidden1.weight [50, 20], ...
"""

import itertools
import math
from collections import OrderedDict
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

from windfall import models, seeds
from windfall.masks import Params
from windfall.spec import FAMILY, Spec, SpecError

Draws = npt.NDArray[np.float64]
VALUES = (-0.5, -0.25, 0.0, 0.25, 0.5)  # of luckmatters' `init_w`


# -- parameters of fully connected networks --------------------------------------------------------


def layer_names(params: Params) -> list[str]:
    """The linear layers of a fully connected network in order: `hidden1`, ..., `output`."""
    return [
        name.removesuffix(".weight")
        for name, value in params.items()
        if name.endswith(".weight") and value.ndim == 2
    ]


def layer_sizes(params: Params) -> tuple[int, ...]:
    """The number of inputs, of nodes in each hidden layer, and of outputs.

    Raises:
        ValueError: when a layer does not read as many numbers as the one below has nodes.
    """
    weights = [params[f"{name}.weight"] for name in layer_names(params)]
    for name, below, above in zip(layer_names(params)[1:], weights, weights[1:], strict=False):
        if above.shape[1] != below.shape[0]:
            raise ValueError(
                f"`{name}` must read the {below.shape[0]} nodes below it; got a weight of shape "
                f"{tuple(above.shape)}."
            )
    return weights[0].shape[1], *(weight.shape[0] for weight in weights)


# -- teachers --------------------------------------------------------------------------------------


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
    """A fully connected ReLU network of random, different nodes, linear at the output.

    The rows of every layer are drawn without repetition from `values`^fan_in and divided by their
    L2 norms; the weights out of node i of a hidden layer are then divided by (i + 1)^decay, so that
    later nodes matter less. Layer l's rows and biases come from streams of their own.

    Source: 1905.13405, with `recon_multilayer`'s settings as defaults; 1909.13458, whose two-layer
    teacher is `Teacher(hidden=(10,), bias=ConstantBias(), decay=1, is_output_unit=False)`.

    Args:
        hidden: the sizes of the hidden layers.
        values: what a weight may be before the division, all different.
        bias: the biases, of the output too.
        decay: the exponent of the strength, at least 0; 0 for nodes of one strength.
        is_output_unit: divide the rows of the output layer too.
        seed: which of the random teachers.
    """

    hidden: tuple[PositiveInt, ...] = (10, 15, 20, 25)
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

    def parameters(self, num_inputs: int, num_outputs: int) -> Params:
        """The teacher's weights [out, in] and biases [out] by name, float64.

        Raises:
            SpecError: when a layer has more nodes than there are different rows.
        """
        sizes = (num_inputs, *self.hidden, num_outputs)
        params: Params = {}
        for layer, (fan_in, size) in enumerate(itertools.pairwise(sizes)):
            name = _name(layer, len(sizes) - 1)
            weight = self._rows(name, size, fan_in, seeds.stream(self.seed, "teacher", 2 * layer))
            norms = weight.norm(dim=1)
            if name == "output" and not self.is_output_unit:
                norms = torch.ones_like(norms)
            weight = weight / norms[:, None]
            if layer > 0 and self.decay:
                weight = weight / torch.arange(1, fan_in + 1, dtype=weight.dtype) ** self.decay
            params[f"{name}.weight"] = weight
            params[f"{name}.bias"] = self.bias.draw(
                norms, seeds.stream(self.seed, "teacher", 2 * layer + 1)
            )
        return params

    def _rows(self, name: str, size: int, fan_in: int, stream: np.random.Generator) -> Tensor:
        try:
            return torch.from_numpy(distinct_rows(size, fan_in, self.values, stream))
        except ValueError as problem:
            raise SpecError(f"{str(problem).removesuffix('.')} (layer `{name}`).") from None

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `hidden1`, ..., `output`, with the teacher's parameters.

        They are rounded to the default dtype.
        """
        network = models.Mlp(hidden=self.hidden).build(input_shape, num_classes)
        network.load_state_dict(self.parameters(math.prod(input_shape), num_classes))
        return network


def _name(layer: int, num_layers: int) -> str:
    return "output" if layer == num_layers - 1 else f"hidden{layer + 1}"


# -- starts ----------------------------------------------------------------------------------------


class TorchUniform(Spec):
    """Weights and biases uniform on ±1/sqrt(fan_in), as `nn.Linear` begins."""

    def place(self, drawn: Params, goal: Params, seed: int) -> Params:  # noqa: ARG002
        """The student's parameters, from `nn.Linear`'s and the teacher's."""
        return drawn


class Gaussian(Spec):
    """Weights N(0, std²), biases 0.

    Source: 1909.13458, `recon_two_layer.init` (its student scale .005).
    """

    std: NonNegativeFloat = 0.005

    def place(self, drawn: Params, goal: Params, seed: int) -> Params:  # noqa: ARG002
        """The student's parameters, from `nn.Linear`'s and the teacher's."""
        noise = _gaussian(drawn, seed, self.std)
        return {
            name: noise[name] if name.endswith(".weight") else torch.zeros_like(value)
            for name, value in drawn.items()
        }


class Perturbed(Spec):
    """The teacher on the first nodes of every layer, plus N(0, std²) on all weights and biases.

    What joins the teacher's nodes to others, and the other nodes, are noise alone.

    Source: luckmatters, `test_multilayer --perturb`; `model_gen.set_teacher` where `multi` is 1.
    """

    std: NonNegativeFloat = 0.1

    def place(self, drawn: Params, goal: Params, seed: int) -> Params:
        """The student's parameters, from `nn.Linear`'s and the teacher's."""
        params = _gaussian(drawn, seed, self.std)
        for name, value in goal.items():
            params[name][_block(value)] += value
        return params


class SameDirection(Spec):
    """As `nn.Linear` begins, but the first nodes point where the teacher's do.

    Of each layer, the weights between the first nodes are the teacher's, scaled to the L2 norm that
    was drawn for them; the biases of those nodes are the teacher's by the same factor.

    Source: luckmatters, `model_gen.set_same_dir`, which has no other nodes.
    """

    def place(self, drawn: Params, goal: Params, seed: int) -> Params:  # noqa: ARG002
        """The student's parameters, from `nn.Linear`'s and the teacher's."""
        params = {name: value.clone() for name, value in drawn.items()}
        for name, value in goal.items():
            weight = name.rpartition(".")[0] + ".weight"
            factor = drawn[weight][_block(goal[weight])].norm() / goal[weight].norm()
            params[name][_block(value)] = value * factor
        return params


class SameSign(Spec):
    """As `nn.Linear` begins, but with the teacher's signs between the first nodes.

    Where the teacher has 0, and on all other nodes, what was drawn stays.

    Source: luckmatters, `model_gen.set_same_sign`, which has no other nodes.
    """

    def place(self, drawn: Params, goal: Params, seed: int) -> Params:  # noqa: ARG002
        """The student's parameters, from `nn.Linear`'s and the teacher's."""
        params = {name: value.clone() for name, value in drawn.items()}
        for name, value in goal.items():
            block = params[name][_block(value)]
            block.copy_(torch.where(block * value < 0, -block, block))
        return params


Start = Annotated[TorchUniform | Gaussian | Perturbed | SameDirection | SameSign, FAMILY]


def _block(goal: Tensor) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in goal.shape)


def _gaussian(like: Params, seed: int, std: float) -> Params:
    streams = [seeds.stream(seed, "student-noise", place) for place in range(len(like))]
    return {
        name: torch.from_numpy(std * stream.standard_normal(tuple(value.shape)))
        for (name, value), stream in zip(like.items(), streams, strict=True)
    }


def _torch_uniform(sizes: tuple[int, ...], seed: int) -> Params:
    params: Params = {}
    for layer, (fan_in, size) in enumerate(itertools.pairwise(sizes)):
        name, bound = _name(layer, len(sizes) - 1), 1 / math.sqrt(fan_in)
        for place, (kind, shape) in enumerate((("weight", (size, fan_in)), ("bias", (size,)))):
            draws = seeds.stream(seed, "student", 2 * layer + place).uniform(-bound, bound, shape)
            params[f"{name}.{kind}"] = torch.from_numpy(draws)
    return params


# -- students --------------------------------------------------------------------------------------


class Student(Spec):
    """A fully connected ReLU network `multi` times as wide as its teacher.

    Source: 1905.13405; luckmatters, `model_gen.Model`.

    Args:
        hidden: the sizes of the teacher's hidden layers.
        multi: student nodes for each teacher node, at least 1.
        norm: BatchNorm of every hidden layer `before` or `after` its ReLU, or `none`.
        start: how its weights begin.
    """

    hidden: tuple[PositiveInt, ...] = (10, 15, 20, 25)
    multi: PositiveInt = 10
    norm: Literal["none", "before", "after"] = "none"
    start: Start = TorchUniform()

    def parameters(self, goal: Params, seed: int) -> Params:
        """The student's parameters at the start, float64, BatchNorm's (1 and 0) among them.

        Args:
            goal: the teacher's parameters.
            seed: the run's seed, at least 0.

        Raises:
            SpecError: when the teacher's hidden layers have other sizes.
        """
        sizes = layer_sizes(goal)
        if sizes[1:-1] != self.hidden:
            raise SpecError(
                f"`hidden` must be the teacher's, {list(sizes[1:-1])}; got {list(self.hidden)}."
            )
        sizes = sizes[0], *(self.multi * size for size in self.hidden), sizes[-1]
        params = self.start.place(_torch_uniform(sizes, seed), goal, seed)
        if self.norm != "none":
            for layer, size in enumerate(sizes[1:-1], start=1):
                params[f"hidden{layer}_norm.weight"] = torch.ones(size, dtype=torch.float64)
                params[f"hidden{layer}_norm.bias"] = torch.zeros(size, dtype=torch.float64)
        return params

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `hidden1`, `hidden1_norm`, ..., `output`, as torch makes it."""
        parts: dict[str, nn.Module] = {"flatten": nn.Flatten()}
        num_features = math.prod(input_shape)
        for layer, size in enumerate(self.hidden, start=1):
            wide, name = self.multi * size, f"hidden{layer}"
            parts[name] = nn.Linear(num_features, wide)
            if self.norm == "before":
                parts[f"{name}_norm"] = nn.BatchNorm1d(wide)
            parts[f"{name}_relu"] = nn.ReLU()
            if self.norm == "after":
                parts[f"{name}_norm"] = nn.BatchNorm1d(wide)
            num_features = wide
        parts["output"] = nn.Linear(num_features, num_classes)
        return nn.Sequential(OrderedDict(parts))


def nodes(network: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """What the nodes of every hidden layer give to the layer above, with BatchNorm where it is.

    One forward pass without gradients, in the mode that the network is in.

    Args:
        network: a teacher's or a student's.
        inputs: [sample, ...].

    Returns:
        [sample, node] by the hidden layer's name.
    """
    found: dict[str, Tensor] = {}
    layer, values = "", inputs
    with torch.no_grad():
        for name, part in network.named_children():
            if isinstance(part, nn.Linear):
                found[layer] = values
                layer = name
            values = part(values)
    found.pop("", None)
    return found
