"""Architecture: how much of each stage pruning keeps, and new networks of these proportions.

A *stage* is the layers that see images of one size. What pruning keeps of each, averaged over
networks, is their pattern; a network of the same family, of any width, depth or number of classes,
can be built with it, and beside it one that is as large and has the same width everywhere.

    pattern = of_channels(Vgg_16(), [state.channels for state in states])
    model = guided(Vgg_19(), pattern.stages)
    uniform(Vgg_19(), num_parameters(model, (3, 32, 32), 100), (3, 32, 32), 100).model
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from windfall.masks import Masks
from windfall.models import Model, stages
from windfall.models.stages import Residual, Staged
from windfall.spec import SpecError, checked, members, tag
from windfall.structure import Unit

Ratios = tuple[float, ...]  # of each stage, what is kept of it
Kernel = tuple[tuple[float, ...], ...]
_counted: dict[tuple[Model, tuple[int, ...], int], int] = {}  # every seed of a study asks again
GRID = 10_000  # widths are multiples of 1 / GRID: finer than a channel of any network here


@dataclass(frozen=True)
class Pattern:
    """What pruning keeps of each stage.

    Args:
        unit: of what, channels or weights.
        networks: of each network, the fraction kept of each stage: of the channels that its layers
            make for themselves, or of its convolutions' weights.
        shared: the same of the channels that a stage's blocks add to; empty where there are none.
        kernels: of each stage, the average fraction of the weights kept at each position of its
            3 x 3 kernels; empty for channels.
    """

    unit: Unit
    networks: tuple[Ratios, ...]
    shared: tuple[Ratios, ...] = ()
    kernels: tuple[Kernel, ...] = ()

    @property
    def num_networks(self) -> int:
        """How many networks it is of."""
        return len(self.networks)

    @property
    def stages(self) -> Ratios:
        """The mean over networks, of each stage."""
        return _means(self.networks)

    @property
    def shared_stages(self) -> Ratios | None:
        """The mean over networks, of the channels that a stage's blocks add to; None for all."""
        means = _means(self.shared)
        return means if any(mean < 1 for mean in means) else None

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """The least and the greatest over networks, of each stage."""
        return tuple((min(each), max(each)) for each in zip(*self.networks, strict=True))


def _means(networks: tuple[Ratios, ...]) -> Ratios:
    return tuple(fmean(each) for each in zip(*networks, strict=True))


# -- what was kept ---------------------------------------------------------------------------------


def check_staged(model: Model) -> Staged:
    """The network, if it has stages.

    Raises:
        SpecError: when it has none; the message names those that have.
    """
    if not isinstance(model, Staged):
        known = ", ".join(tag(m) for m in members(Model).values() if issubclass(m, Staged))
        raise SpecError(
            f"`model` must have stages of convolutions; got {tag(type(model))}. Known: {known}."
        )
    return model


def of_channels(model: Model, networks: Iterable[Masks]) -> Pattern:
    """The pattern of networks that lost channels, relative to the network without `stages`.

    Where a network has no channels of a stage that may go, all of them stay: 1.

    Args:
        model: which was pruned.
        networks: of each, the channels that stay, by group's name (`State.channels`).

    Raises:
        SpecError: when the network has no stages.
    """
    whole = check_staged(model)
    inner: list[Ratios] = []
    shared: list[Ratios] = []
    for channels in networks:
        inner.append(_relative(_kept(whole, channels, stages.inner_stage), whole.stages))
        if isinstance(whole, Residual):
            shared.append(_relative(_kept(whole, channels, stages.shared_stage), whole.shared))
    return Pattern("channels", tuple(inner), tuple(shared))


def of_masks(model: Model, networks: Iterable[Masks]) -> Pattern:
    """The pattern of networks that lost single weights.

    Args:
        model: which was pruned.
        networks: of each, its masks.

    Raises:
        SpecError: when the network has no stages.
    """
    whole = check_staged(model)
    kept: list[Ratios] = []
    kernels: list[list[Kernel]] = []
    for masks in networks:
        kept.append(_kept(whole, masks, stages.stage))
        kernels.append([_kernel(whole, masks, s) for s in range(stages.num_stages(whole))])
    by_stage = zip(*kernels, strict=True)
    return Pattern("weights", tuple(kept), kernels=tuple(map(_mean_kernel, by_stage)))


class Layer(NamedTuple):
    """What stays of a layer, or of a group of channels.

    Args:
        stage: that it is in, from 0.
        is_shared: the channels are those that the stage's blocks add to.
        kept: the fraction.
    """

    stage: int
    is_shared: bool
    kept: float


def of_layers(model: Model, masks: Masks, unit: Unit) -> dict[str, Layer]:
    """What stays of every layer, or group of channels, that is in a stage.

    Args:
        model: which was pruned.
        masks: of its weights, or of its groups of channels.
        unit: which of the two.
    """
    whole = check_staged(model)
    found: dict[str, Layer] = {}
    for name, mask in masks.items():
        shared = stages.shared_stage(whole, name) if unit == "channels" else None
        own = stages.stage(whole, name) if shared is None else shared
        if own is not None:
            found[name] = Layer(own, shared is not None, float(mask.double().mean()))
    return found


def _kept(
    model: Staged, masks: Mapping[str, Tensor], stage: Callable[[Staged, str], int | None]
) -> Ratios:
    parts = [[m for n, m in masks.items() if stage(model, n) == s]
             for s in range(stages.num_stages(model))]  # fmt: skip
    counts = [(sum(int(m.sum()) for m in part), sum(m.numel() for m in part)) for part in parts]
    return tuple(float(Fraction(kept, size)) if size else 1.0 for kept, size in counts)


def _relative(kept: Ratios, factors: Ratios | None) -> Ratios:
    return kept if factors is None else tuple(a * b for a, b in zip(kept, factors, strict=True))


def _kernel(model: Staged, masks: Mapping[str, Tensor], stage: int) -> Kernel:
    chosen = [m for n, m in masks.items() if stages.stage(model, n) == stage and m.dim() == 4]
    joined = [m.flatten(0, 1) for m in chosen if m.shape[2:] == (3, 3)]
    rows = torch.cat(joined).double().mean(0).tolist()
    return tuple(tuple(row) for row in rows)


def _mean_kernel(kernels: tuple[Kernel, ...]) -> Kernel:
    rows = zip(*kernels, strict=True)
    return tuple(_means(tuple(row)) for row in rows)


# -- new networks ----------------------------------------------------------------------------------


def guided(model: Model, ratios: Ratios, shared: Ratios | None = None) -> Model:
    """The network with these factors on the channels of its stages.

    Source: Liu et al. 2019 (1810.05270), section 5 (guided and transferred architectures).

    Args:
        model: of any width and depth; its own `stages` are replaced.
        ratios: of each stage, above 0.
        shared: of the channels that a stage's blocks add to; None is 1 for all.

    Raises:
        SpecError: when it has no stages, or another number of them.
    """
    known = check_staged(model)
    fields = known.to_json(addressed=False) | {"stages": list(ratios)}
    fields.pop("shared", None)
    if shared is not None:
        fields["shared"] = list(shared)
    return checked(lambda: type(known).model_validate(fields))


@dataclass(frozen=True)
class Uniform:
    """A network of one width that is as large as wanted, as nearly as whole channels allow.

    Args:
        model: the network.
        num_parameters: that it has.
        wanted: that it was to have.
    """

    model: Model
    num_parameters: int
    wanted: int

    @property
    def difference(self) -> int:
        """How many more parameters it has than wanted; fewer when below 0."""
        return self.num_parameters - self.wanted


def num_parameters(model: Model, input_shape: tuple[int, ...], num_classes: int) -> int:
    """The number of parameters of a network: weights, biases, normalization; no statistics."""
    place = model, input_shape, num_classes
    if place not in _counted:
        with torch.device("meta"):
            module = model.build(input_shape, num_classes)
        _counted[place] = sum(param.numel() for param in module.parameters())
    return _counted[place]


def uniform(model: Model, wanted: int, input_shape: tuple[int, ...], num_classes: int) -> Uniform:
    """The network of one width, whose number of parameters is nearest; of two, the smaller.

    Args:
        model: of any width; its `stages` are left out.
        wanted: number of parameters, at least 1.
        input_shape: of one input.
        num_classes: of its outputs.

    Raises:
        SpecError: when it has no stages.
    """
    plain = guided(model, (1.0,) * stages.num_stages(check_staged(model)))
    plain = plain.model_copy(update={"stages": None})

    def at(step: int) -> Uniform:
        made = plain.model_copy(update={"width": step / GRID})
        return Uniform(made, num_parameters(made, input_shape, num_classes), wanted)

    low, high = 1, GRID
    while at(high).difference < 0:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle).difference <= 0 else (low, middle)
    return min(at(low), at(high), key=lambda found: abs(found.difference))
