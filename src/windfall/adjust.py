"""Adjust: how what is left of a network makes up for the channels that it lost.

Each layer that lost inputs is looked at in the order of the network, on inputs of the training
part; its outputs before are what it is to come near to.

    Rescale().adjust(whole, smaller, groups, channels, inputs, stream)  # `smaller` is changed
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from windfall import reconstruction, structure
from windfall.filters import NUM_IMAGES, NUM_SAMPLES
from windfall.masks import Masks
from windfall.reconstruction import Reader
from windfall.spec import FAMILY, Spec
from windfall.structure import Group


@dataclass(frozen=True)
class Removal:
    """A network, the same without channels, and what was removed.

    Args:
        whole: before, in evaluation mode.
        smaller: after; its weights are what is changed.
        groups: of the whole network.
        channels: by group's name, True for those that stay.
        inputs: of both networks.
    """

    whole: nn.Module
    smaller: nn.Module
    groups: Sequence[Group]
    channels: Masks
    inputs: Tensor

    def readers(self) -> Iterator["_Loss"]:
        """The layers that lost inputs, in the order of the parameters."""
        tensors = dict(self.whole.named_parameters()) | dict(self.whole.named_buffers())
        stays = structure.alive(self.groups, self.channels, tensors)
        reading = {
            name
            for group in self.groups
            if not bool(self.channels[group.name].all())
            for name in reconstruction.readers(self.whole, group)
        }
        for name in tensors:
            if name in reading:
                yield _Loss(self, name, stays[name])


@dataclass(frozen=True)
class _Loss:
    """A layer that lost inputs."""

    of: Removal
    name: str
    stays: Mapping[int, Tensor]

    def layer(self, network: nn.Module) -> Reader:
        """The layer in a network."""
        return cast(Reader, network.get_submodule(self.name.removesuffix(".weight")))

    def given(self, network: nn.Module) -> Tensor:
        """The layer's inputs in a network."""
        return reconstruction.inputs_of(network, [self.name], self.of.inputs)[self.name]

    @property
    def inputs(self) -> Tensor:
        """The positions of the inputs that stay, in the whole layer."""
        return self.stays[1].nonzero().flatten()

    @property
    def outputs(self) -> Tensor:
        """The positions of the outputs that stay, in the whole layer."""
        every = torch.ones(self.layer(self.of.whole).weight.shape[0], dtype=torch.bool)
        return self.stays.get(0, every).nonzero().flatten()


class Rescale(Spec):
    """Each channel's weights in the layer that reads it times one factor, by least squares.

    Source: Luo, Wu & Lin 2017 (1707.06342), section 3.2, eq. 7 (ThiNet).

    Args:
        num_images: of the training part, at least 1.
        num_samples: outputs of every layer that lost inputs, at least 1.
    """

    num_images: int = Field(default=NUM_IMAGES, ge=1)
    num_samples: int = Field(default=NUM_SAMPLES, ge=1)

    def adjust(self, removal: Removal, stream: np.random.Generator) -> None:
        """Change the smaller network's weights."""
        for loss in removal.readers():
            whole, given = loss.layer(removal.whole), loss.given(removal.whole)
            places = reconstruction.sampled_places(whole, given, stream, self.num_samples)
            drawn = torch.from_numpy(stream.integers(len(loss.outputs), size=self.num_samples))
            added = reconstruction.added(whole, given, places, loss.outputs[drawn])
            channels = _channels(loss)
            kept = torch.stack([added[:, at].sum(1) for at in channels], 1)
            found = reconstruction.rescaled(kept.numpy(), added.sum(1).numpy())
            factors = torch.zeros(added.shape[1], dtype=torch.float64)
            for at, factor in zip(channels, found.tolist(), strict=True):
                factors[at] = factor
            weight = loss.layer(removal.smaller).weight
            shape = [1, -1, *([1] * (weight.dim() - 2))]
            with torch.no_grad():
                weight.mul_(factors[loss.inputs].reshape(shape).to(weight))


def _channels(loss: _Loss) -> list[list[int]]:
    """The inputs of a layer that stay, those of one channel together."""
    alone = {int(place): [int(place)] for place in loss.inputs}
    for group in loss.of.groups:
        for slot in group.slots:
            if slot.tensor == loss.name and slot.axis == 1:
                for at in slot.places:
                    if at[0] in alone:
                        alone |= {at[0]: list(at)}
                        for other in at[1:]:
                            alone.pop(other, None)
    return list(alone.values())


class Refit(Spec):
    """All weights of a layer that lost inputs anew, by least squares on what it is still given.

    Source: He, Zhang & Sun 2017 (1707.06168), section 3.1, eq. 2, its second step, and section 3.2
    for the outputs of the whole network as what is to be reached from the pruned one's inputs.

    Args:
        num_images: of the training part, at least 1.
        num_samples: output positions of every layer that lost inputs, at least 1.
    """

    num_images: int = Field(default=NUM_IMAGES, ge=1)
    num_samples: int = Field(default=NUM_SAMPLES, ge=1)

    def adjust(self, removal: Removal, stream: np.random.Generator) -> None:
        """Change the smaller network's weights."""
        for loss in removal.readers():
            whole, smaller = (loss.layer(n) for n in (removal.whole, removal.smaller))
            before, now = (loss.given(n) for n in (removal.whole, removal.smaller))
            places = reconstruction.sampled_places(whole, before, stream, self.num_samples)
            weight = whole.weight.detach().double().flatten(1)[loss.outputs]
            target = reconstruction.patches(whole, before, places).flatten(1) @ weight.T
            read = reconstruction.patches(smaller, now, places).flatten(1)
            found = reconstruction.refitted(read.numpy(), target.numpy())
            with torch.no_grad():
                smaller.weight.copy_(torch.from_numpy(found).reshape(smaller.weight.shape))


Adjust = Annotated[Rescale | Refit, FAMILY]
