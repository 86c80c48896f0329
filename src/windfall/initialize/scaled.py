"""Schemes that look at the whole network: a layer's scale follows from where it stands."""

import math
from typing import Annotated, Literal

import numpy as np
from torch import nn

from windfall.initialize.drawn import Drawn, KaimingNormal, LecunNormal, Orthogonal, uniform
from windfall.initialize.parts import Draws, Layer, fans, layers
from windfall.initialize.residual import blocks, needed
from windfall.spec import FAMILY, Spec, SpecError
from windfall.weightnorm import WeightNormed

_NORMALIZATION = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm | nn.LayerNorm


class Fixup(Spec):
    """Residual branches that begin at 0, and whose updates together are of a plain network's size.

    In a network of L branches, layers of a branch of m are drawn as ever and multiplied by
    L^(-1 / (2m - 2)), its last is 0; so is the network's last layer, the classifier. Biases are 0.
    A weight-normalized layer is 0 by its gain.

    Source: Zhang et al. 2019 (1901.09321), section 3, rules 1 and 2.

    Note:
        Rule 3 is of the architecture, not the scheme: biases, and a multiplier of 1 for each
        branch. Of the zoo, `norm = "none"` with `gates = true` has them (a bias for each channel
        of a convolution, where the paper has a scalar before and after it).

    Args:
        draws: what is scaled.
    """

    draws: Drawn = KaimingNormal()

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer, before it is scaled."""
        return self.draws.draw(layer, stream)

    def scales(self, module: nn.Module) -> dict[str, float]:
        """What each layer's weight is multiplied by, by its name.

        Raises:
            SpecError: when the network has no residual blocks, or normalization.
        """
        found = needed(module, "fixup")
        _check_unnormalized(module)
        factors = {name: 1.0 for name, _ in layers(module)}
        for block in found:
            num_layers = len(block.branch)
            for name in block.branch[:-1]:
                factors[name] = len(found) ** (-1 / (2 * num_layers - 2))
            factors[block.branch[-1]] = 0.0
        inside = {name for block in found for name in block.branch + block.shortcut}
        last = list(factors)[-1]
        return factors if last in inside else factors | {last: 0.0}


def _check_unnormalized(module: nn.Module) -> None:
    for path, part in module.named_modules():
        if isinstance(part, _NORMALIZATION):
            raise SpecError(
                "`initialization` fixup must be given a network without normalization; got"
                f" `{path}`, a {type(part).__name__}. Build one without (of the zoo,"
                ' `norm = "none"`), or take kaiming-normal.'
            )


def powers(module: nn.Module) -> dict[str, float]:
    """By how much, gamma, each layer should multiply the mean square of what it reads, by its name.

    In front of a ReLU, which halves it, gamma = 2. The last layer of a residual branch has
    gamma = 1 / B in a stage of B blocks, so that a block multiplies it by 1 + 1/B and all of them
    by (1 + 1/B)^B, which is between 2 and e. In a residual network the shortcuts have gamma = 1, as
    has what stands outside of the blocks, for no ReLU follows it in the paper's networks.

    Source: Arpit et al. 2019 (1906.02341), residual networks; its authors' code.
    """
    found = blocks(module)
    gammas = {name: 1.0 if found else 2.0 for name, _ in layers(module)}
    for block in found:
        gammas |= dict.fromkeys(block.branch, 2.0) | {block.branch[-1]: 1 / block.num_blocks}
    return gammas


class StageScaled(Spec):
    """Gaussian weights of variance gamma / fan_in, by which a stage of blocks keeps signals' scale.

    gamma is 2; in residual networks that of a branch's last layer is 1 / B, for the B blocks of its
    stage, and that of what stands outside of branches 1 (see `powers`). A stage of blocks
    x + W_2 relu(W_1 x) multiplies the norm by about (1 + 1/B)^(B/2), at most sqrt(e), at any depth.

    Source: Arpit et al. 2019 (1906.02341), residual networks, without its weight normalization.
    """

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A weight for the layer, before it is scaled."""
        return LecunNormal().draw(layer, stream)

    def scales(self, module: nn.Module) -> dict[str, float]:
        """What each layer's weight is multiplied by, sqrt(gamma), by its name."""
        return {name: math.sqrt(gamma) for name, gamma in powers(module).items()}


class WeightNorm(Spec):
    """Weight-normalized layers of directions drawn and gains that keep signals' norm.

    `forward`: g = sqrt(gamma fan_in / fan_out), which keeps the norm of activations; `backward`:
    g = sqrt(gamma), which keeps that of gradients; where widths are equal both are the same.
    gamma is 2, and in residual networks 1 / B or 1 too (see `powers`). `one` is g = 1, under which
    the norm falls by sqrt(2) a layer. Biases are 0. A layer without weight normalization, as the
    output is, has weights uniform on ±1 / sqrt(fan_in).

    Source: Arpit et al. 2019 (1906.02341), the proposed initialization; its authors' code.

    Note:
        Of the code's output layer, which torch made, the bias is not drawn but 0.

    Args:
        preserve: what gains keep the norm of.
        draws: v, before it is normalized.
    """

    preserve: Literal["forward", "backward", "one"] = "forward"
    draws: Drawn = Orthogonal()

    def draw(self, layer: Layer, stream: np.random.Generator) -> Draws:
        """A direction for the layer; the weight of one without weight normalization."""
        if isinstance(layer, WeightNormed):
            return self.draws.draw(layer, stream)
        return uniform(layer, 1 / math.sqrt(fans(layer)[0]), stream)

    def gains(self, module: nn.Module) -> dict[str, float]:
        """The gain of every weight-normalized layer's filters, by its weight's name.

        Raises:
            SpecError: when the network has no such layer.
        """
        gammas = powers(module)
        normed = [(n, layer) for n, layer in layers(module) if isinstance(layer, WeightNormed)]
        if not normed:
            raise SpecError(
                "`initialization` weight-norm must be given a network with weight-normalized"
                f" layers; got none in {type(module).__name__}. Build it with them (of the zoo,"
                ' `norm = "weight"`), or take stage-scaled.'
            )
        return {name: self._gain(layer, gammas[name]) for name, layer in normed}

    def _gain(self, layer: Layer, gamma: float) -> float:
        fan_in, fan_out = fans(layer)
        match self.preserve:
            case "forward":
                return math.sqrt(gamma * fan_in / fan_out)
            case "backward":
                return math.sqrt(gamma)
            case "one":
                return 1.0


Scaled = Annotated[Fixup | StageScaled, FAMILY]
