"""Students: wider networks that learn a teacher, and how they begin.

A student has `multi` times as many nodes in every hidden layer as its teacher, or as many as said,
and begins as one of the family `Start` says. Parameters are float64 and named as those of `chains`:

    student = Student(multi=5, start=Perturbed(std=0.1))
    begun = student.parameters(goal, seed=0)   # hidden1.weight [50, 20], ...
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from windfall import seeds
from windfall.chains import Norm, layer_names, layer_sizes
from windfall.masks import Params
from windfall.spec import FAMILY, Spec, SpecError

# -- starts ----------------------------------------------------------------------------------------


class TorchUniform(Spec):
    """Weights and biases uniform on ±1/sqrt(fan_in), as `nn.Linear` begins."""

    def place(self, drawn: Params, noise: Params, goal: Params) -> Params:  # noqa: ARG002
        """The student's parameters, from torch's, N(0, 1) and the teacher's."""
        return drawn


class Gaussian(Spec):
    """Weights N(0, std²), biases 0.

    Source: 1909.13458, `recon_two_layer.init` (its student scale .005).
    """

    std: NonNegativeFloat = 0.005

    def place(self, drawn: Params, noise: Params, goal: Params) -> Params:  # noqa: ARG002
        """The student's parameters, from torch's, N(0, 1) and the teacher's."""
        return {
            name: self.std * noise[name] if name.endswith(".weight") else torch.zeros_like(value)
            for name, value in drawn.items()
        }


class Perturbed(Spec):
    """The teacher on the first nodes of every layer, plus N(0, std²) on all weights and biases.

    What joins the teacher's nodes to others, and the other nodes, are noise alone.

    Source: luckmatters, `test_multilayer --perturb`; `model_gen.set_teacher` where `multi` is 1.
    """

    std: NonNegativeFloat = 0.1

    def place(self, drawn: Params, noise: Params, goal: Params) -> Params:  # noqa: ARG002
        """The student's parameters, from torch's, N(0, 1) and the teacher's."""
        params = {name: self.std * value for name, value in noise.items()}
        for name, value in goal.items():
            params[name][_block(value)] += value
        return params


class SameDirection(Spec):
    """As `nn.Linear` begins, but the first nodes point where the teacher's do.

    Of each layer, the weights between the first nodes are the teacher's, scaled to the L2 norm that
    was drawn for them; the biases of those nodes are the teacher's by the same factor.

    Source: luckmatters, `model_gen.set_same_dir`, which has no other nodes.
    """

    def place(self, drawn: Params, noise: Params, goal: Params) -> Params:  # noqa: ARG002
        """The student's parameters, from torch's, N(0, 1) and the teacher's."""
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

    def place(self, drawn: Params, noise: Params, goal: Params) -> Params:  # noqa: ARG002
        """The student's parameters, from torch's, N(0, 1) and the teacher's."""
        params = {name: value.clone() for name, value in drawn.items()}
        for name, value in goal.items():
            block = params[name][_block(value)]
            block.copy_(torch.where(block * value < 0, -block, block))
        return params


Start = Annotated[TorchUniform | Gaussian | Perturbed | SameDirection | SameSign, FAMILY]


def _block(goal: Tensor) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in goal.shape)


def _gaussian(like: Params, seed: int, purpose: str) -> Params:
    streams = [seeds.stream(seed, purpose, place) for place in range(len(like))]
    return {
        name: torch.from_numpy(stream.standard_normal(tuple(value.shape)))
        for (name, value), stream in zip(like.items(), streams, strict=True)
    }


def torch_uniform(shapes: dict[str, tuple[int, ...]], seed: int, purpose: str) -> Params:
    """Weights and biases uniform on ±1/sqrt(fan_in), float64, for weights of these shapes."""
    params: Params = {}
    for layer, (name, shape) in enumerate(shapes.items()):
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        for place, (kind, size) in enumerate((("weight", shape), ("bias", shape[:1]))):
            draws = seeds.stream(seed, purpose, 2 * layer + place).uniform(-bound, bound, size)
            params[f"{name}.{kind}"] = torch.from_numpy(draws)
    return params


# -- students --------------------------------------------------------------------------------------


class Student(Spec):
    """A ReLU network `multi` times as wide as its teacher, of the same kind of layers.

    Source: 1905.13405; luckmatters, `model_gen.Model`.

    Args:
        multi: student nodes for each teacher node, at least 1.
        hidden: the sizes of the hidden layers themselves, whatever `multi` says; None for `multi`.
        norm: BatchNorm of every hidden layer `before` or `after` its ReLU, or `none`.
        start: how its weights begin.
    """

    multi: PositiveInt = 10
    hidden: tuple[PositiveInt, ...] | None = None
    norm: Norm = "none"
    start: Start = TorchUniform()

    def sizes(self, hidden: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of its hidden layers, for a teacher's.

        Raises:
            SpecError: when it has more or fewer layers, or begins as a teacher that is wider.
        """
        sizes = self.hidden or tuple(self.multi * size for size in hidden)
        if len(sizes) != len(hidden):
            raise SpecError(
                f"`student.hidden` must be sizes of {len(hidden)} hidden layers, as the teacher's"
                f" {list(hidden)}; got {list(sizes)}."
            )
        needs_room = isinstance(self.start, Perturbed | SameDirection | SameSign)
        if needs_room and any(own < size for own, size in zip(sizes, hidden, strict=True)):
            raise SpecError(
                f"`student.hidden` must be at least the teacher's, {list(hidden)}, for a start of"
                f" its nodes; got {list(sizes)}."
            )
        return sizes

    def parameters(self, goal: Params, seed: int, *, redrawn: bool = False) -> Params:
        """The student's parameters at the start, float64, BatchNorm's (1 and 0) among them.

        Args:
            goal: the teacher's parameters.
            seed: the run's seed, at least 0.
            redrawn: draw them once more, from other streams of the seed.

        Raises:
            SpecError: as `sizes`.
        """
        hidden = self.sizes(layer_sizes(goal)[1:-1])
        purpose = "student-redrawn" if redrawn else "student"
        drawn = torch_uniform(_shapes(goal, hidden), seed, purpose)
        noise = _gaussian(drawn, seed, f"{purpose}-noise")
        params = self.start.place(drawn, noise, goal)
        if self.norm != "none":
            for layer, size in enumerate(hidden, start=1):
                params[f"hidden{layer}_norm.weight"] = torch.ones(size, dtype=torch.float64)
                params[f"hidden{layer}_norm.bias"] = torch.zeros(size, dtype=torch.float64)
        return params


def _shapes(goal: Params, hidden: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of a student's weights, of the kinds that the teacher's are."""
    shapes, read = dict[str, tuple[int, ...]](), 0
    for layer, name in enumerate(layer_names(goal)):
        made, reads, *kernel = goal[f"{name}.weight"].shape
        if layer:
            reads = hidden[layer - 1] * (reads // read)
        shapes[name] = (made if name == "output" else hidden[layer], reads, *kernel)
        read = made
    return shapes


# -- pruned students -------------------------------------------------------------------------------


class Subset(Spec):
    """A student that was trained, and pruned to some of its nodes, to be trained again.

    In every hidden layer it keeps the winners: the nodes that ended as the best of a teacher node
    that is alive; or as many others, drawn. What is kept has its initial weights (a ticket), those
    of another draw of the whole student (re-initialized), or those that it ended with (fine-tuned).

    Source: 1905.13405, its account of the lottery ticket; 1803.03635.

    Args:
        keep: `winners`, or `random` nodes, as many in every layer.
        weights: `initial`, `redrawn` or `final`.
    """

    keep: Literal["winners", "random"] = "winners"
    weights: Literal["initial", "redrawn", "final"] = "initial"

    def kept(self, won: dict[str, Tensor], sizes: dict[str, int], seed: int) -> dict[str, Tensor]:
        """The indices of the nodes that stay by hidden layer, ascending.

        Args:
            won: by hidden layer, the winners of the teacher nodes, repeated or not.
            sizes: by hidden layer, the number of the student's nodes.
            seed: of the run.
        """
        winners = {name: found.unique() for name, found in won.items()}
        if self.keep == "winners":
            return winners
        streams = [seeds.stream(seed, "kept-nodes", layer) for layer in range(len(winners))]
        return {
            name: torch.from_numpy(
                stream.choice(sizes[name], len(found), replace=False, shuffle=False)
            ).sort().values
            for (name, found), stream in zip(winners.items(), streams, strict=True)
        }  # fmt: skip
