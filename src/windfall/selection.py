"""Selection: how many weights stay, and where.

A selection states exact counts: at level l a tensor (or the whole network) of n weights keeps
round(n (1 - rate)^l), halves rounded to even, so that pruning at once and level by level agree to
the weight. Among equal scores the earlier position stays.

    new = Layerwise(hidden=0.2, output=0.1).select(scores, masks, kinds, level=3)
"""

from fractions import Fraction
from typing import Annotated, Literal

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


def _refuse_empty(
    counts: dict[str, int], level: int, rate: str = "the rate of its kind of layer"
) -> dict[str, int]:
    for name, count in counts.items():
        if count < 1:
            raise SpecError(
                f"`prune` must leave every layer at least one weight; got 0 of `{name}` at level"
                f" {level}. Lower {rate} or the number of levels."
            )
    return counts


def best(scores: Scores, alive: Masks, counts: dict[str, int]) -> Masks:
    """The masks of the highest scores, of stated counts, nested in `alive`.

    Args:
        scores: by tensor.
        alive: masks by tensor.
        counts: as a selection states them: of a tensor by its name; of all those without one
            together under "", and of each of these the best stays whatever its score.
    """
    own = {n: highest(scores[n], mask, counts[n]) for n, mask in alive.items() if n in counts}
    pool = {name: mask for name, mask in alive.items() if name not in counts}
    if not pool:
        return own
    joined = torch.cat([scores[name].flatten() for name in pool])
    firsts = flat({name: highest(scores[name], mask, 1) for name, mask in pool.items()})
    others = highest(joined, flat(pool) & ~firsts, counts[""] - len(pool))
    chosen = (firsts | others).split([mask.numel() for mask in pool.values()])
    own |= {n: part.reshape(pool[n].shape) for n, part in zip(pool, chosen, strict=True)}
    return {name: own[name] for name in alive}


def eased(counts: dict[str, int], alive: Masks, share: float) -> dict[str, int]:
    """Counts a part of the way from whole tensors to those stated: n (c / n)^share, rounded.

    Args:
        counts: c, as a selection states them, in all n that there are.
        alive: masks by tensor, which no count exceeds.
        share: of the way, in [0, 1]; at 1 they are the counts stated.
    """
    pools = {name: [name] for name in counts if name}
    pools |= {"": [name for name in alive if name not in counts]} if "" in counts else {}
    whole, left = sizes(alive), kept(alive)
    found = dict[str, int]()
    for pool, names in pools.items():
        size = sum(whole[name] for name in names)
        count = round(size * (counts[pool] / size) ** share)
        found[pool] = min(max(count, counts[pool]), sum(left[name] for name in names))
    return found


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
        return best(scores, alive, self.counts(sizes(alive), kinds, level))


class Global(Spec):
    """One threshold for the whole network; the best of every tensor stays whatever its score.

    Args:
        rate: fraction of all survivors removed per level, in [0, 1).
        density: instead of a rate, the fraction of all weights kept at once, in (0, 1].
        exclude: kinds of layers left as they are and not counted; blocks are of none.
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
        pool = {n: size for n, size in totals.items() if kinds.get(n) not in self.exclude}
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
        """The masks of a level, nested in `alive`."""
        return best(scores, alive, self.counts(sizes(alive), kinds, level))


class Ratios(Spec):
    """Each tensor, or group of channels, by itself, at a fraction of its own.

    Args:
        removed: the fractions of survivors removed per level, each in [0, 1), one for every tensor
            or group that may be pruned, in the order of the network.
    """

    removed: tuple[Rate, ...] = Field(min_length=1)

    def counts(self, totals: dict[str, int], kinds: dict[str, Kind], level: int) -> dict[str, int]:  # noqa: ARG002
        """The count each tensor keeps at a level, from the tensors' sizes.

        Raises:
            SpecError: when there are more or fewer fractions than tensors, or one would be emptied.
        """
        if len(self.removed) != len(totals):
            raise SpecError(
                f"`prune.selection.removed` must have a fraction for each of {len(totals)}; got"
                f" {len(self.removed)}. They are, in order: {', '.join(totals)}."
            )
        pairs = zip(totals.items(), self.removed, strict=True)
        counts = {name: remaining(size, rate, level) for (name, size), rate in pairs}
        return _refuse_empty(counts, level, "its fraction")

    def select(self, scores: Scores, alive: Masks, kinds: dict[str, Kind], level: int) -> Masks:
        """The masks of a level, nested in `alive`."""
        return best(scores, alive, self.counts(sizes(alive), kinds, level))


class Positive(Spec):
    """All whose score is above 0, and the best of every group whatever its score.

    How many these are, only the training tells: until then nothing is taken to be removed, and
    what is counted before is the most that may stay.

    Source: Huang & Wang 2018 (1707.01213), section 3.2: a block is removed if its gate is 0.
    """

    def counts(self, totals: dict[str, int], kinds: dict[str, Kind], level: int) -> dict[str, int]:  # noqa: ARG002
        """The most that each group keeps: all of it."""
        return dict(totals)

    def select(self, scores: Scores, alive: Masks, kinds: dict[str, Kind], level: int) -> Masks:  # noqa: ARG002
        """The masks of a level, nested in `alive`."""
        counts = {name: int((scores[name][mask] > 0).sum()) for name, mask in alive.items()}
        return best(scores, alive, {name: max(1, count) for name, count in counts.items()})


class SmartRatios(Spec):
    """Each tensor by itself, the less of it the deeper it lies; the total is exact.

    Of L tensors, number l from the input keeps a fraction in proportion to
    p_l = (L - l + 1)^2 + (L - l + 1), at most all of it; the output layer keeps a fraction of its
    own. With the criterion `random` these are the paper's random tickets.

    Source: Su et al. 2020 (2009.11094), section 4 (smart ratios).

    Note:
        What a full tensor cannot take is shared by those that are not full in proportion to their
        p; in the released code it goes to the next. There every fully connected layer keeps
        `output`; here only the last, or networks of such layers would have no ratios. Counts are
        made whole by the highest averages (D'Hondt), so that levels are nested.

    Args:
        rate: fraction of all survivors removed per level, in [0, 1).
        output: fraction of the output layer kept at every level, in (0, 1], or more where no other
            layer has room.
        steep: p_l is also divided by l^2, as the paper does for VGG.
    """

    rate: Rate = 0.2
    output: float = Field(default=0.3, gt=0, le=1)
    steep: bool = False

    def counts(self, totals: dict[str, int], kinds: dict[str, Kind], level: int) -> dict[str, int]:
        """The count each tensor keeps at a level, from the tensors' sizes.

        Raises:
            SpecError: when a tensor would be emptied; the message names it.
        """
        outputs = {n: size for n, size in totals.items() if kinds.get(n) == "output"}
        others = {n: size for n, size in totals.items() if n not in outputs}
        count = remaining(sum(totals.values()), self.rate, level)
        least = {n: round(size * _decimal(self.output)) for n, size in outputs.items()}
        spread = apportioned(others, self._weights(totals), max(0, count - sum(least.values())))
        extra = {n: size - least[n] for n, size in outputs.items()}
        beyond = max(0, count - sum(least.values()) - sum(spread.values()))
        more = apportioned(extra, dict.fromkeys(extra, Fraction(1)), beyond)
        found = spread | {n: least[n] + more[n] for n in outputs}
        return _refuse_empty({n: found[n] for n in totals}, level, "`rate`, `output`")

    def _weights(self, totals: dict[str, int]) -> dict[str, Fraction]:
        depth = len(totals)
        return {
            name: Fraction((depth - index) * (depth - index + 1), (index + 1) ** (2 * self.steep))
            for index, name in enumerate(totals)
        }

    def select(self, scores: Scores, alive: Masks, kinds: dict[str, Kind], level: int) -> Masks:
        """The masks of a level, nested in `alive`."""
        return best(scores, alive, self.counts(sizes(alive), kinds, level))


def apportioned(totals: dict[str, int], weights: dict[str, Fraction], count: int) -> dict[str, int]:
    """A count spread over tensors at densities in proportion to weights, none above 1.

    One more to spread is one more for one tensor, and less for none: highest averages (D'Hondt),
    ties by position.

    Args:
        totals: each tensor's size.
        weights: above 0, of each tensor.
        count: to spread; if the tensors are smaller than it, all of them are full.
    """
    claims = {name: size * weights[name] for name, size in totals.items() if size}
    count = min(count, sum(totals.values()))
    level = _filled(totals, claims, count)
    found = {n: min(size, int(level * claims.get(n, 0))) for n, size in totals.items()}
    for _ in range(count - sum(found.values())):
        open_ones = [name for name in claims if found[name] < totals[name]]
        found[min(open_ones, key=lambda name: (found[name] + 1) / claims[name])] += 1
    return found


def _filled(totals: dict[str, int], claims: dict[str, Fraction], count: int) -> Fraction:
    """The level s at which min(size, s claim) adds up to the count."""
    full = 0
    rest = sum(claims.values(), Fraction(0))
    for name in sorted(claims, key=lambda name: Fraction(totals[name]) / claims[name]):
        if (count - full) * claims[name] <= totals[name] * rest:
            return (count - full) / rest
        full, rest = full + totals[name], rest - claims[name]
    return Fraction(max(totals.values(), default=0))


Target = Literal["vgg-16-a", "resnet-56-a", "resnet-56-b", "resnet-110-a", "resnet-110-b"]
_BLOCKS = {"resnet-56": 9, "resnet-110": 18}  # in a stage
_STAGES: dict[Target, tuple[tuple[float, float, float], tuple[int, ...]]] = {
    # of each stage the fraction removed; the blocks of all stages, from 1, that are left whole
    "resnet-56-a": ((0.1, 0.1, 0.1), (8, 10, 19, 27)),
    "resnet-56-b": ((0.6, 0.3, 0.1), (8, 9, 10, 17, 19, 27)),
    "resnet-110-a": ((0.5, 0.0, 0.0), (18,)),
    "resnet-110-b": ((0.5, 0.4, 0.3), (18, 19, 37)),
}


class Published(Spec):
    """The channels of a network that the literature prunes to, for the zoo's network of that name.

    Of VGG-16, half of the first convolution's and of the last six's; of a residual network, the
    stages' fractions of the first convolution in each block, but for the blocks most sensitive.
    Counts are rounded down.

    Source: Li et al. 2017 (1608.08710), Table 1, as 1810.05270's code has them.

    Args:
        target: one of the networks.
    """

    target: Target

    def removed(self) -> dict[str, float]:
        """The fractions removed by group's name; groups that are not among them stay whole."""
        if self.target == "vgg-16-a":
            return {f"conv{index}.weight": 0.5 for index in (1, *range(8, 14))}
        fractions, whole = _STAGES[self.target]
        length = _BLOCKS[self.target.rpartition("-")[0]]
        return {
            f"stage{stage}.block{block}.conv1.weight": fraction
            for stage, fraction in enumerate(fractions, start=1)
            for block in range(1, length + 1)
            if fraction and (stage - 1) * length + block not in whole
        }

    def counts(self, totals: dict[str, int], kinds: dict[str, Kind], level: int) -> dict[str, int]:  # noqa: ARG002
        """The count each group keeps at a level, from the groups' sizes.

        Raises:
            SpecError: when the network is another one.
        """
        removed = self.removed()
        missing = [name for name in removed if name not in totals]
        if missing:
            raise SpecError(
                f"`prune.selection` {self.target} must prune channels of the network of that name,"
                f" whose `{missing[0]}` this one has not; use layerwise, global or ratios."
            )
        return {n: int(s * (1 - _decimal(removed.get(n, 0.0))) ** level) for n, s in totals.items()}

    def select(self, scores: Scores, alive: Masks, kinds: dict[str, Kind], level: int) -> Masks:
        """The masks of a level, nested in `alive`."""
        return best(scores, alive, self.counts(sizes(alive), kinds, level))


Selection = Annotated[Layerwise | Global | Ratios | SmartRatios | Published | Positive, FAMILY]


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
