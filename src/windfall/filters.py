"""Filters: which channels, or blocks, of a network matter.

A criterion for channels gives each channel of a group a number; the highest stay. It may see the
trained weights, and what the network makes of training inputs. One for blocks does so for them.

    FilterNorm().score(evidence, ["conv1.weight"])  # a number for each channel, by group's name
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from windfall import reconstruction, seeds
from windfall.evidence import Evidence
from windfall.masks import Scores
from windfall.reconstruction import Array
from windfall.spec import Spec, SpecError
from windfall.structure import Group, Unit

NUM_IMAGES, NUM_SAMPLES = 500, 5000  # 1707.06168, section 4.1: ten positions of 500 images


class FilterNorm(Spec):
    """Keep the channels whose filters are large: s_j = sum of |W_j|, or the root of that of W_j².

    A channel that several layers make (the sum of a residual stage) has the filters of all.

    Source: order 1, Li et al. 2017 (1608.08710), section 3.1; order 2, He et al. 2018 (1808.06866),
    section 3.2, eq. 2.

    Args:
        order: 1 or 2.
    """

    prunes: ClassVar[Unit] = "channels"
    order: Literal[1, 2] = 1

    def refuse(self, network: nn.Module, groups: Iterable[Group]) -> None:
        """No network is unfit."""

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """A number for each channel, by group's name."""
        return {name: self._norms(evidence, evidence.groups[name]) for name in names}

    def _norms(self, evidence: Evidence, group: Group) -> Tensor:
        total = torch.zeros(group.size, dtype=torch.float64)
        for slot in group.slots:
            if slot.tensor in group.makers and slot.axis == group.makers[slot.tensor]:
                filters = evidence.trained[slot.tensor].double().movedim(slot.axis, 0).flatten(1)
                sizes = filters.abs().pow(self.order).sum(1)
                total += torch.stack([sizes[list(at)].sum() for at in slot.places])
        return total if self.order == 1 else total.sqrt()


class NormalizationScale(Spec):
    """Keep the channels that their normalization scales most: s_j = mean |gamma_j|.

    The mean is over all normalizations of the channel: one after a convolution of VGG, those of all
    layers that read a channel in networks that normalize first.

    Source: Liu et al. 2017 (1708.06519), section 3.3 (Network Slimming), to be used with the
    recipe's `penalty`. There, networks that normalize first are given layers that select the inputs
    of each convolution by itself; here a channel goes whole.
    """

    prunes: ClassVar[Unit] = "channels"

    def refuse(self, network: nn.Module, groups: Iterable[Group]) -> None:  # noqa: ARG002
        """Refuse, by a `SpecError`, a network with channels that are not normalized."""
        for group in groups:
            if not group.scales:
                raise SpecError(
                    "`prune.criterion` normalization-scale must be used where all channels that may"
                    f" be pruned are batch-normalized; those of `{group.name}` are not. Use"
                    " filter-norm, or name that layer in `prune.structure.exclude`."
                )

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """A number for each channel, by group's name."""
        return {name: self._scales(evidence, evidence.groups[name]) for name in names}

    def _scales(self, evidence: Evidence, group: Group) -> Tensor:
        sizes: list[Tensor] = []
        for slot in group.slots:
            if slot.tensor in group.scales:
                scales = evidence.trained[slot.tensor].abs()
                sizes.append(torch.stack([scales[list(at)].mean() for at in slot.places]))
        return torch.stack(sizes).double().mean(0)


class _Reconstructing(Spec):
    """What the criteria that look at layers' inputs share.

    Args:
        num_images: of the training part, that the network is shown, at least 1.
        num_samples: outputs of every layer that reads the channels, at least 1.
    """

    prunes: ClassVar[Unit] = "channels"
    num_images: int = Field(default=NUM_IMAGES, ge=1)
    num_samples: int = Field(default=NUM_SAMPLES, ge=1)

    def refuse(self, network: nn.Module, groups: Iterable[Group]) -> None:
        """Refuse, by a `SpecError`, a network with channels whose readers cannot be looked at."""
        for group in groups:
            reconstruction.readers(network, group)

    def _sampled(self, evidence: Evidence, names: Iterable[str]) -> Iterator[tuple[str, Array]]:
        """What the channels of each group add to sampled outputs of their readers."""
        network, inputs = evidence.seen(self.num_images)
        place = {name: index for index, name in enumerate(evidence.groups)}
        for name in names:
            stream = seeds.stream(evidence.seed, "prune", evidence.level, place[name])
            group, num = evidence.groups[name], self.num_samples
            yield name, reconstruction.contributions(network, group, inputs, stream, num)


class Thinet(_Reconstructing):
    """Keep the channels without which the next layer's outputs change most.

    Channels are removed one by one, each time the one with which the summed contributions of those
    removed stay smallest; a channel's number is its place in that order.

    Source: Luo, Wu & Lin 2017 (1707.06342), section 3.2.
    """

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """A number for each channel, by group's name."""
        scores: Scores = {}
        for name, sampled in self._sampled(evidence, names):
            order = reconstruction.greedy_removal(sampled)
            scores[name] = torch.empty(len(order), dtype=torch.float64)
            scores[name][order] = torch.arange(len(order), dtype=torch.float64)
        return scores


class FeatureReconstruction(_Reconstructing):
    """Keep the channels that a LASSO regression of the next layer's outputs keeps longest.

    Source: He, Zhang & Sun 2017 (1707.06168), section 3.1.
    """

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """A number for each channel, by group's name."""
        return {
            name: torch.from_numpy(reconstruction.lasso_strengths(sampled))
            for name, sampled in self._sampled(evidence, names)
        }


class Gate(Spec):
    """Keep the residual blocks whose gates are large: s_b = |lambda_b|.

    Source: Huang & Wang 2018 (1707.01213), section 3.2 (Sparse Structure Selection), to be used
    with the recipe's `penalty` gate-penalty, which makes gates exactly 0, and the selection
    `positive`.
    """

    prunes: ClassVar[Unit] = "blocks"

    def refuse(self, network: nn.Module, groups: Iterable[Group]) -> None:
        """No network with blocks is unfit."""

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """A number for each block, by group's name."""
        return {name: self._sizes(evidence, evidence.groups[name]) for name in names}

    def _sizes(self, evidence: Evidence, group: Group) -> Tensor:
        sizes = torch.zeros(group.size, dtype=torch.float64)
        for slot in group.slots:
            if slot.tensor in group.scales:
                gate = evidence.trained[slot.tensor].detach().double().abs()
                sizes += torch.stack([gate[list(at)].sum() for at in slot.places]).cpu()
        return sizes


GroupCriterion = FilterNorm | NormalizationScale | Thinet | FeatureReconstruction | Gate
