"""Selection: how many weights stay, and where.

A selection states exact counts: at level l a tensor (or the whole network) of n weights keeps
round(n (1 - rate)^l), halves rounded to even, so that pruning at once and level by level agree to
the weight. Among equal scores the earlier position stays.

    new = Layerwise(hidden=0.2, output=0.1).select(scores, masks, kinds, level=3)
"""

from fractions import Fraction
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from windfall.masks import Masks, Scores, flat, kept, sizes
from windfall.models import Kind
from windfall.spec import FAMILY, Spec, SpecError

Rate = Annotated[float, Field(ge=0, lt=1)]


def remaining(size: int, rate: float, level: int) -> int:
    """The count kept of `size` weights at a level: round(size (1 - rate)^level)."""
    return round(size * (1 - _decimal(rate)) ** level)


def _decimal(fraction: float) -> Fraction:
    # As it is written: in binary 15 (1 - 0.9) falls short of 1.5, and the count would be 1 for 2.
    return Fraction(repr(fraction))


def highest(scores: Tensor, alive: Tensor, count: int) -> Tensor:
    """The mask of the `count` highest scores among those alive; ties go to the earlier position.

    Args:
        scores: any shape, finite where alive.
        alive: boolean, of the same shape.
        count: 0 to the number alive.
    """
    candidates = alive.flatten().nonzero().squeeze(1)
    assert 0 <= count <= len(candidates), (count, len(candidates))
    values = scores.flatten()[candidates]
    if not bool(torch.isfinite(values).all()):
        raise SpecError(
            "`prune.criterion` must score every weight by a finite number; got NaN or infinity."
            " Has the training that it judges diverged? Lower `recipe.learning_rate`."
        )
    order = torch.sort(values, descending=True, stable=True).indices[:count]
    mask = torch.zeros_like(alive.flatten())
    mask[candidates[order]] = True
    return mask.reshape(alive.shape)


def _refuse_empty(counts: dict[str, int], level: int) -> dict[str, int]:
    for name, count in counts.items():
        if count < 1:
            raise SpecError(
                f"`prune` must leave every layer at least one weight; got 0 of `{name}` at level"
                f" {level}. Lower the rate of its kind of layer or the number of levels."
            )
    return counts


class Layerwise(Spec):
    """Each tensor by itself, at the rate of its kind of layer.

    Source: Frankle & Carbin 2019 (1803.03635), section 2 (the output layer at half the rate).

    Args:
        hidden: fraction of a fully connected layer's survivors removed per level, in [0, 1).
        convolution: the same for convolutions.
        output: the same for the output layer.
    """

    hidden: Rate = 0.2
    convolution: Rate = 0.2
    output: Rate = 0.1

    def counts(self, totals: dict[str, int], kinds: dict[str, Kind], level: int) -> dict[str, int]:
        """The count each tensor keeps at a level, from the tensors' sizes.

        Raises:
            SpecError: when a tensor would be emptied; the message names it.
        """
        rates: dict[Kind, float] = {
            "hidden": self.hidden,
            "convolution": self.convolution,
            "output": self.output,
        }
        counts = {n: remaining(size, rates[kinds[n]], level) for n, size in totals.items()}
        return _refuse_empty(counts, level)

    def select(self, scores: Scores, alive: Masks, kinds: dict[str, Kind], level: int) -> Masks:
        """The masks of a level, nested in `alive`."""
        counts = self.counts(sizes(alive), kinds, level)
        return {n: highest(scores[n], mask, counts[n]) for n, mask in alive.items()}


class Global(Spec):
    """One threshold for the whole network.

    Args:
        rate: fraction of all survivors removed per level, in [0, 1).
        density: instead of a rate, the fraction of all weights kept at once, in (0, 1].
        exclude: kinds of layers left as they are and not counted.
    """

    rate: Rate = 0.2
    density: float | None = Field(default=None, gt=0, le=1)
    exclude: tuple[Kind, ...] = ()

    @model_validator(mode="after")
    def _one_amount(self) -> "Global":
        default = type(self).model_fields["rate"].default  # what a stored one with a density holds
        if self.density is not None and self.rate != default:
            raise ValueError("must have one of `rate` and `density`; got both")
        return self

    def counts(self, totals: dict[str, int], kinds: dict[str, Kind], level: int) -> dict[str, int]:
        """The count kept at a level: of all tensors together under "", of excluded ones by name.

        Raises:
            SpecError: when there is nothing to prune, or less kept than there are tensors.
        """
        pool = {name: size for name, size in totals.items() if kinds[name] not in self.exclude}
        spared = {name: size for name, size in totals.items() if name not in pool}
        if not pool:
            raise SpecError(
                f"`prune.selection.exclude` must leave a layer to prune; got {list(self.exclude)}."
            )
        pooled = sum(pool.values())
        if self.density is None:
            count = remaining(pooled, self.rate, level)
        else:
            count = round(pooled * _decimal(self.density))
        if count < len(pool):
            raise SpecError(
                f"`prune` must leave every layer at least one weight; got {count} for the layers"
                f" `{'`, `'.join(pool)}` at level {level}. Lower the rate or the number of levels."
            )
        return {"": count, **spared}

    def select(self, scores: Scores, alive: Masks, kinds: dict[str, Kind], level: int) -> Masks:
        """The masks of a level, nested in `alive`.

        Raises:
            SpecError: when a tensor would be emptied; the message names it.
        """
        pool = {name: mask for name, mask in alive.items() if kinds[name] not in self.exclude}
        count = self.counts(sizes(alive), kinds, level)[""]
        joined = torch.cat([scores[name].flatten() for name in pool])
        chosen = highest(joined, flat(pool), count).split([m.numel() for m in pool.values()])
        new = {n: part.reshape(pool[n].shape) for n, part in zip(pool, chosen, strict=True)}
        _refuse_empty(kept(new), level)
        return {name: new.get(name, mask.clone()) for name, mask in alive.items()}


Selection = Annotated[Layerwise | Global, FAMILY]


def uniform(totals: dict[str, int], count: int) -> dict[str, int]:
    """A total count spread over tensors at one density, by largest remainders, ties by position.

    Args:
        totals: each tensor's size.
        count: the total to keep, at most the sum of the sizes.

    Raises:
        SpecError: when a tensor would be emptied; the message names it.
    """
    whole = sum(totals.values())
    shares = {name: divmod(size * count, whole) for name, size in totals.items()}
    missing = count - sum(quotient for quotient, _ in shares.values())
    ranked = sorted(shares, key=lambda name: -shares[name][1])
    extra = set(ranked[:missing])
    counts = {name: quotient + (name in extra) for name, (quotient, _) in shares.items()}
    for name in [name for name, kept_of_it in counts.items() if kept_of_it < 1]:
        raise SpecError(
            f"`arms` with `random` must leave every layer at least one weight; got 0 of `{name}`"
            f" when {count:,} are spread over {whole:,}. Lower the number of levels, or leave"
            " `random` out."
        )
    return counts
