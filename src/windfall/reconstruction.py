"""Reconstruction: what each channel adds to the layers that read it, and how few can add as much.

An output of a layer, without its bias, is the sum of what each channel that it reads adds to it.
Outputs are sampled: each of a random image, position and output channel. ThiNet and the
regression-based method choose the channels whose contributions give the sum best, and then set the
weights that read them to give it better.

    sampled = contributions(network, group, inputs, stream, num_samples=2000)  # [sample, channel]
    greedy_removal(sampled)   # ThiNet's order
    lasso_strengths(sampled)  # regression-based: the penalty that each channel withstands
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from windfall import seeds
from windfall.initialize import Transposed
from windfall.spec import SpecError
from windfall.structure import Group
from windfall.weightnorm import WeightNormed

Array = npt.NDArray[np.float64]
Reader = nn.Linear | nn.Conv2d

FLOATS = 2**24  # of patches held at once


# -- what layers read ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Sampled output positions of a layer: of each an image, and a row and column (0 if linear)."""

    images: Tensor
    rows: Tensor
    columns: Tensor


def inputs_of(network: nn.Module, names: Sequence[str], inputs: Tensor) -> dict[str, Tensor]:
    """What layers are given when the network runs on inputs, in evaluation mode.

    Args:
        network: left as it was.
        names: of the layers' weights.
        inputs: of the network.

    Returns:
        By weight's name; of a layer that runs several times, what it is given last.
    """
    given: dict[str, Tensor] = {}
    modes = [(part, part.training) for part in network.modules()]

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: given.update({name: args[0].detach()})

    layers = {name: network.get_submodule(name.removesuffix(".weight")) for name in names}
    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), seeds.isolated(0, "reconstruction"):
            network.eval()(inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes:
            part.training = mode
    return given


def readers(network: nn.Module, group: Group) -> list[str]:
    """The weights of the layers that read a group's channels.

    Raises:
        SpecError: when there is none, or one is neither linear nor a convolution of images without
            groups, or is weight-normalized; the message names it.
    """
    names: list[str] = []
    for slot in group.slots:
        layer = network.get_submodule(slot.tensor.rpartition(".")[0])
        if slot.axis == (0 if isinstance(layer, Transposed) else 1):
            names.append(slot.tensor)
    for name in names:
        layer = network.get_submodule(name.removesuffix(".weight"))
        is_grouped = getattr(layer, "groups", 1) > 1
        if not isinstance(layer, Reader) or is_grouped or isinstance(layer, WeightNormed):
            raise SpecError(
                "`prune.criterion` must be one that looks at no layer's inputs where a layer is"
                " neither linear nor a convolution of images without groups, or is"
                f" weight-normalized; `{name}` is of a {type(layer).__name__}. Use filter-norm."
            )
    if not names:
        raise SpecError(
            "`prune.criterion` must be one that looks at no layer's inputs where no layer reads the"
            f" channels; none reads those of `{group.name}`. Use filter-norm."
        )
    return names


def sampled_places(
    layer: Reader, given: Tensor, stream: np.random.Generator, num_samples: int
) -> Places:
    """Random output positions of a layer on random images."""
    if isinstance(layer, nn.Linear):
        rows = math.prod(given.shape[:-1])
        drawn = torch.from_numpy(stream.integers(rows, size=num_samples))
        return Places(drawn, torch.zeros_like(drawn), torch.zeros_like(drawn))
    height, width = (
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            given.shape[2:],
            _padding(layer),
            layer.dilation,
            layer.kernel_size,
            layer.stride,
            strict=True,
        )
    )
    drawn = (stream.integers(size, size=num_samples) for size in (len(given), height, width))
    return Places(*map(torch.from_numpy, drawn))


def patches(layer: Reader, given: Tensor, places: Places) -> Tensor:
    """What sampled outputs of a layer read: [sample, input channel, kernel position], in float64.

    Args:
        layer: linear (whose kernel has one position), or a convolution without groups.
        given: its inputs, [image, channel, height, width], or [..., feature].
        places: of the outputs.
    """
    if isinstance(layer, nn.Linear):
        return given.reshape(-1, layer.in_features)[places.images].double()[:, :, None]
    down, right = _padding(layer)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(given, (right, right, down, down), mode=mode)
    rows, columns = (
        begin[:, None] * stride + dilation * torch.arange(kernel)
        for begin, stride, dilation, kernel in zip(
            (places.rows, places.columns),
            layer.stride,
            layer.dilation,
            layer.kernel_size,
            strict=True,
        )
    )
    read = padded[places.images[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return read.permute(0, 3, 1, 2).flatten(2).double()  # from [sample, row, column, channel]


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    if not isinstance(layer.padding, str):
        return cast(tuple[int, int], tuple(layer.padding))
    if layer.padding == "valid":
        return 0, 0
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if any(span % 2 for span in spans):
        raise SpecError(
            "`model` must not pad one side of an image more than the other where its layers' inputs"
            f" are looked at; got an even kernel, {layer}."
        )
    return spans[0] // 2, spans[1] // 2


def contributions(
    network: nn.Module,
    group: Group,
    inputs: Tensor,
    stream: np.random.Generator,
    num_samples: int,
) -> Array:
    """What a group's channels add to sampled outputs of each layer that reads them.

    Args:
        network: whose channels they are.
        group: the channels.
        inputs: of the network.
        stream: of the draws.
        num_samples: of every reader's outputs.

    Returns:
        [sample, channel]; the samples of all readers one after the other.
    """
    names = readers(network, group)
    given = inputs_of(network, names, inputs)
    slots = {slot.tensor: slot for slot in group.slots if slot.axis == 1}
    sampled: list[Array] = []
    for name in names:
        layer = cast(Reader, network.get_submodule(name.removesuffix(".weight")))
        places = sampled_places(layer, given[name], stream, num_samples)
        out = torch.from_numpy(stream.integers(layer.weight.shape[0], size=num_samples))
        each = added(layer, given[name], places, out)
        lies = slots[name].places
        sampled.append(torch.stack([each[:, list(at)].sum(1) for at in lies], 1).numpy())
    return np.concatenate(sampled)


def added(layer: Reader, given: Tensor, places: Places, out: Tensor) -> Tensor:
    """What each input channel adds to one output channel of each sample: [sample, channel]."""
    weight = layer.weight.detach().double()
    weight = weight.reshape(*weight.shape[:2], -1)
    size = max(1, FLOATS // weight[0].numel())
    parts = zip(*(part.split(size) for part in _all(places)), out.split(size), strict=True)
    return torch.cat([(patches(layer, given, Places(*at)) * weight[o]).sum(2) for *at, o in parts])


def _all(places: Places) -> tuple[Tensor, Tensor, Tensor]:
    return places.images, places.rows, places.columns


# -- which channels --------------------------------------------------------------------------------


def greedy_removal(sampled: Array) -> list[int]:
    """Channels in the order in which ThiNet removes them, all of them.

    The next one is that with which the summed contributions of those removed stay smallest: the c
    of least sum over samples of (contribution of c + those of all removed before)², the first
    among equals.

    Source: Luo, Wu & Lin 2017 (1707.06342), section 3.2, eq. 6 and algorithm 1.

    Args:
        sampled: contributions, [sample, channel].
    """
    gram = sampled.T @ sampled
    alone, crossed = np.diag(gram).copy(), np.zeros(len(gram))
    is_left, order = np.ones(len(gram), bool), list[int]()
    for _ in range(len(gram)):
        cost = np.where(is_left, alone + 2 * crossed, np.inf)
        order.append(int(cost.argmin()))
        is_left[order[-1]] = False
        crossed += gram[order[-1]]
    return order


def lasso_strengths(sampled: Array) -> Array:
    """How strong a penalty each channel withstands before its coefficient is 0.

    The coefficients b minimize ½ |y - Z b|² + λ |b|_1 for contributions Z [sample, channel] and
    their sum y. A channel's strength is the largest λ with which b_c is not 0, so that the k
    strongest are the first k that enter as λ falls.

    Source: He, Zhang & Sun 2017 (1707.06168), section 3.1, eq. 2, its first step.

    Args:
        sampled: contributions, [sample, channel].
    """
    from sklearn.exceptions import ConvergenceWarning  # here: they take a while
    from sklearn.linear_model import lars_path_gram

    gram = sampled.T @ sampled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # channels that equal each other
        penalties, _, path = lars_path_gram(
            gram.sum(1), gram.copy(), n_samples=1, method="lasso", alpha_min=0
        )
    above = np.concatenate(
        [penalties[:1], penalties[:-1]]
    )  # a coefficient begins at the knot above
    return np.where(path != 0, above, 0.0).max(1)


# -- how survivors make up for the others ----------------------------------------------------------


def rescaled(kept: Array, target: Array) -> Array:
    """The factors with which kept channels' contributions sum nearest to a target.

    argmin_w |target - kept w|², of least norm where there are several.

    Source: Luo, Wu & Lin 2017 (1707.06342), section 3.2, eq. 7.

    Args:
        kept: contributions, [sample, channel].
        target: sums to come near to, [sample].
    """
    return np.asarray(np.linalg.lstsq(kept, target, rcond=None)[0], np.float64)


def refitted(read: Array, target: Array) -> Array:
    """The weights [output channel, entry] with which what is read comes nearest to outputs.

    argmin_W |target - read Wᵀ|², of least norm where there are several.

    Source: He, Zhang & Sun 2017 (1707.06168), section 3.1, eq. 2, its second step.

    Args:
        read: [sample, entry].
        target: outputs without bias, [sample, output channel].
    """
    return np.asarray(np.linalg.lstsq(read, target, rcond=None)[0].T, np.float64)
