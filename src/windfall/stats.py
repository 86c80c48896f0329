"""Paired differences over seeds: intervals, equivalence, Holm's correction, verdicts.

Pure functions of plain numbers: one value per seed, or one difference per pair of runs that share
a seed, all in the metric's own unit. What the numbers cannot tell (a spread from one seed) is
None, never NaN. An argument outside the range stated for it raises ValueError.

    >>> effect = paired([0.94, 0.93, 0.95, 0.94], [0.90, 0.91, 0.91, 0.91])
    >>> low, high = effect.interval(level=0.95)
    >>> f"{effect.mean:.4f} [{low:.4f}, {high:.4f}], p = {effect.p_value():.4f}"
    '0.0325 [0.0173, 0.0477], p = 0.0065'
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple, get_args

import numpy as np
from scipy import stats

Kind = Literal["superior", "non-inferior"]
Method = Literal["t", "bca"]
Word = Literal["supported", "refuted", "undecided"]

MAX_SEEDS = 100_000  # an effect that needs more cannot be told from none
_ROUNDING = 1e-10  # relative; accuracies differ by 1e-6 or more, and are rounded by 1e-16
_MAX_NONCENTRALITY = 1e4  # scipy's series fails near 1e5; a lower one never asks for too few seeds


class Interval(NamedTuple):
    """A closed interval, in the unit of the values it was made from."""

    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Differences d_i = a_i - b_i of two arms, finite, one for each of the n >= 1 seeds."""

    differences: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse differences that have no mean."""
        _check_numbers("differences", self.differences)

    @property
    def num_seeds(self) -> int:
        """Number of pairs n."""
        return len(self.differences)

    @property
    def mean(self) -> float:
        """Mean difference."""
        return fmean(self.differences)

    @property
    def sd(self) -> float | None:
        """Standard deviation, n - 1 in its denominator; None for a single seed."""
        return _sd(self.differences)

    def interval(
        self,
        level: float = 0.95,
        method: Method = "t",
        generator: np.random.Generator | None = None,
    ) -> Interval | None:
        """Return the mean's confidence interval: `mean_interval` ("t") or `bca_interval` ("bca").

        Args:
            level: Confidence, in (0, 1).
            method: "t" or "bca".
            generator: Draws the resamples of "bca", which requires one.
        """
        _check_method(method, generator)
        if generator is None or method == "t":
            return mean_interval(self.differences, level)
        return bca_interval(self.differences, level, generator=generator)

    def p_value(self, null: float = 0.0) -> float | None:
        """Return the two-sided p-value of the paired t-test.

            p = 2 P(T > |mean - null| sqrt(n) / sd),  T of Student's t, n - 1 degrees

        It is 1 when all differences equal `null`, 0 when all equal another value, None for n = 1.

        Source: Student, "The Probable Error of a Mean", Biometrika 6, 1908.

        Args:
            null: The mean under the hypothesis, finite.
        """
        t = _t_statistic(self, null)
        return None if t is None else float(2 * stats.t.sf(abs(t), self.num_seeds - 1))


def paired(a: Sequence[float | int], b: Sequence[float | int]) -> Paired:
    """Return the differences a_i - b_i of two arms whose i-th values share a seed.

    Args:
        a: Values of the arm, finite, n >= 1.
        b: Values of the arm it is compared with, finite, as many.
    """
    _check_numbers("a", a)
    _check_numbers("b", b)
    if len(a) != len(b):
        raise ValueError(f"`a` and `b` must have equal lengths; got {len(a)} and {len(b)}.")
    return Paired(tuple(float(x - y) for x, y in zip(a, b, strict=True)))


def mean_interval(values: Sequence[float | int], level: float = 0.95) -> Interval | None:
    """Return Student's confidence interval of a mean.

        mean -+ t_{(1 + level) / 2, n - 1} sd / sqrt(n)

    It is a point when all values are equal, None for a single value.

    Source: Student, "The Probable Error of a Mean", Biometrika 6, 1908.

    Args:
        values: Independent values, finite, n >= 1.
        level: Confidence, in (0, 1).
    """
    _check_numbers("values", values)
    _check_fraction("level", level)
    mean, sd, n = fmean(values), _sd(values), len(values)
    if sd is None:
        return None
    reach = float(stats.t.isf((1 - level) / 2, n - 1)) * sd / math.sqrt(n)
    return Interval(mean - reach, mean + reach)


def share_interval(count: int, num: int, level: float = 0.95) -> Interval:
    """Return Wilson's confidence interval of a share, count of num independent cases; in [0, 1].

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference",
    J. Am. Stat. Assoc. 22, 1927.

    Args:
        count: Cases in which it was so, in 0 ... num.
        num: At least 1.
        level: Confidence, in (0, 1).
    """
    _check_fraction("level", level)
    if not 0 <= count <= num or num < 1:
        raise ValueError(f"`count` must lie in [0, num], num at least 1; got {count} of {num}.")
    low, high = stats.binomtest(count, num).proportion_ci(level, method="wilson")
    return Interval(float(low), float(high))


def bca_interval(
    values: Sequence[float | int],
    level: float = 0.95,
    *,
    generator: np.random.Generator,
    num_resamples: int = 9_999,
) -> Interval | None:
    """Return the bias-corrected, accelerated bootstrap interval of a mean.

    It is a point when all values are equal, None for a single value, and too short for a few,
    since no resampled mean leaves their range.

    Source: Efron, "Better Bootstrap Confidence Intervals", J. Am. Stat. Assoc. 82, 1987.

    Args:
        values: Independent values, finite, n >= 1.
        level: Confidence, in (0, 1).
        generator: Draws the resamples.
        num_resamples: Number of resamples, at least 1.
    """
    _check_numbers("values", values)
    _check_fraction("level", level)
    _require(num_resamples >= 1, "num_resamples", "be at least 1", num_resamples)
    if not _sd(values):
        return mean_interval(values, level)
    low, high = stats.bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=num_resamples,
        confidence_level=level,
        method="BCa",
        rng=generator,
    ).confidence_interval
    return Interval(float(low), float(high))


def holm(p_values: Sequence[float | int | None]) -> list[float | None]:
    """Return the Holm-adjusted p-values of a family, in the order given.

        p~_(k) = max_{j <= k} min(1, (m - j + 1) p_(j)),  p_(1) <= ... <= p_(m)

    Rejecting where p~ < alpha keeps the chance of any false rejection at most alpha.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scand. J. Stat., 1979.

    Args:
        p_values: Each in [0, 1]; None (no test was possible) counts as 1 and stays None.
    """
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for i, num_left in _step_down(p_values):
        p = p_values[i]
        if p is not None:
            largest = max(largest, min(1.0, num_left * p))
            adjusted[i] = largest
    return adjusted


def holm_levels(p_values: Sequence[float | int | None], alpha: float = 0.05) -> list[float]:
    """Return the level of the interval that each row of a family is shown with.

        level_(k) = 1 - alpha / (m - k + 1),  k the rank of p, 1 for the smallest

    Note:
        Holm stops at the first p-value it does not reject. The interval of a later row may then
        exclude the null though its adjusted p-value does not reject; the p-value has the say.

    Args:
        p_values: Each in [0, 1]; None counts as 1; ties rank by position.
        alpha: Chance of any false rejection, in (0, 1).
    """
    _check_fraction("alpha", alpha)
    levels = {i: 1 - alpha / num_left for i, num_left in _step_down(p_values)}
    return [levels[i] for i in range(len(p_values))]


def seeds_needed(
    mean: float, sd: float | None, null: float = 0.0, alpha: float = 0.05, power: float = 0.8
) -> int | None:
    """Return the fewest seeds that tell `mean` from `null`, if `mean` and `sd` are the truth.

        smallest n with P(T' > t_{1 - alpha / 2, n - 1}) >= power,
        T' of the noncentral t, n - 1 degrees, noncentrality |mean - null| sqrt(n) / sd

    The test is the two-sided t-test; only its rejections on the side of `mean` count. None means
    that the mean equals the null, that the sd is unknown, or that `MAX_SEEDS` do not suffice.

    Source: Johnson and Welch, "Applications of the Non-Central t-Distribution", Biometrika, 1940.

    Args:
        mean: Mean difference, finite.
        sd: Standard deviation of the differences, finite, at least 0; None when unknown.
        null: The mean to be told apart from, finite.
        alpha: Level of the test, in (0, 1).
        power: Chance of the rejection, in (0, 1).
    """
    for name, value in (("mean", mean), ("null", null), ("sd", sd or 0.0)):
        _require(math.isfinite(value), name, "be finite", value)
    _require(sd is None or sd >= 0, "sd", "be at least 0", sd)
    _check_fraction("alpha", alpha)
    _check_fraction("power", power)
    if sd is None or _is_close(mean, null):
        return None
    effect = abs(mean - null) / sd if sd > 0 else math.inf
    candidates = range(2, MAX_SEEDS + 1)
    index = bisect_left(candidates, power, key=lambda n: _power(n, effect, alpha))
    return candidates[index] if index < len(candidates) else None


@dataclass(frozen=True)
class Equivalence:
    """Whether a mean difference lies within a margin; one seed has no p-value and no interval."""

    p_value: float | None
    interval: Interval | None
    is_equivalent: bool


def equivalent(
    differences: Sequence[float | int], margin: float, alpha: float = 0.05
) -> Equivalence:
    """Test that a mean difference lies within a margin on both sides (TOST).

        p = max(P(T > (mean + margin) sqrt(n) / sd), P(T > (margin - mean) sqrt(n) / sd))

    p < alpha just when the interval, of level 1 - 2 alpha, lies inside the margin.

    Source: Schuirmann, "A Comparison of the Two One-Sided Tests Procedure and the Power Approach",
    J. Pharmacokinet. Biopharm. 15, 1987.

    Args:
        differences: Paired differences, finite, n >= 1.
        margin: Largest difference that does not matter, at least 0.
        alpha: Level of each one-sided test, in (0, 0.5).
    """
    _check_margin(margin)
    _require(0 < alpha < 0.5, "alpha", "lie in (0, 0.5)", alpha)
    effect = Paired(tuple(map(float, differences)))
    lower, upper = _t_statistic(effect, -margin), _t_statistic(effect, margin)
    if lower is None or upper is None:
        return Equivalence(p_value=None, interval=None, is_equivalent=False)
    degrees = effect.num_seeds - 1
    p = float(max(stats.t.sf(lower, degrees), stats.t.cdf(upper, degrees)))
    return Equivalence(p, effect.interval(1 - 2 * alpha), is_equivalent=p < alpha)


@dataclass(frozen=True)
class Claim:
    """One row of a family: what is claimed of a mean difference d, and the evidence.

    Args:
        differences: One per seed, finite, n >= 1; None when a run failed.
        kind: "superior" claims d > 0, "non-inferior" claims d > -margin.
    """

    differences: Sequence[float | int] | None
    kind: Kind = "superior"

    def __post_init__(self) -> None:
        """Refuse differences that have no mean, and an unknown kind."""
        if self.differences is not None:
            _check_numbers("differences", self.differences)
        _check_known("kind", self.kind, get_args(Kind))


@dataclass(frozen=True)
class Verdict:
    """What a family says of one claim: the numbers that decide, then the word.

    `level` is that of the interval, `p_value` is two-sided against the claim's null. A row without
    differences knows no number. Only an undecided row has `seeds_needed`, if it can be told.
    """

    difference: float | None = None
    interval: Interval | None = None
    level: float | None = None
    num_seeds: int | None = None
    p_value: float | None = None
    p_adjusted: float | None = None
    word: Word = "undecided"
    seeds_needed: int | None = None


def decide(
    rows: Sequence[Claim],
    margin: float = 0.005,
    alpha: float = 0.05,
    method: Method = "t",
    generator: np.random.Generator | None = None,
) -> list[Verdict]:
    """Return the verdict on each claim of a family, in the order given.

    *Supported*: the `holm` p-value against the claim's null is below `alpha` and the mean is above
    that null. *Refuted*: not so, and the interval at the row's own of the `holm_levels` lies wholly
    below the claim's bound. *Undecided*: neither; a large p-value alone refutes nothing. Null and
    bound are 0 and margin for "superior", -margin and -margin for "non-inferior".

    An undecided row's `seeds_needed` tell the mean, at the row's own level with 80 % power, from
    the null or from the bound, whichever takes fewer, and are more than there were.

    Args:
        rows: The claims; one without differences counts as p = 1.
        margin: Smallest difference that matters, at least 0.
        alpha: Chance of any false support in the family, in (0, 1).
        method: Of the intervals, as in `Paired.interval`; p-values are those of the t-test.
        generator: Draws the resamples of "bca", which requires one.
    """
    _check_margin(margin)
    _check_method(method, generator)
    aims = [_Aim(0.0, margin) if row.kind == "superior" else _Aim(-margin, -margin) for row in rows]
    effects = [_effect(row) for row in rows]
    p_values = [e and e.p_value(aim.null) for e, aim in zip(effects, aims, strict=True)]
    family = zip(effects, aims, holm_levels(p_values, alpha), p_values, holm(p_values), strict=True)
    verdicts: list[Verdict] = []
    for effect, aim, level, p, p_adjusted in family:
        if effect is None:
            verdicts.append(Verdict())
            continue
        interval = effect.interval(level, method, generator)
        is_rejected = p_adjusted is not None and p_adjusted < alpha
        word = _word(effect.mean, aim, interval, is_rejected=is_rejected)
        needed = _seeds_to_decide(effect, aim, 1 - level) if word == "undecided" else None
        numbers = (effect.mean, interval, level, effect.num_seeds, p, p_adjusted)
        verdicts.append(Verdict(*numbers, word, needed))
    return verdicts


class _Aim(NamedTuple):
    """The mean that a supported claim exceeds, and the one that a refuted claim stays below."""

    null: float
    bound: float


def _effect(row: Claim) -> Paired | None:
    return None if row.differences is None else Paired(tuple(map(float, row.differences)))


def _word(mean: float, aim: _Aim, interval: Interval | None, *, is_rejected: bool) -> Word:
    if is_rejected and mean > aim.null:
        return "supported"
    if interval is None or interval.high >= aim.bound or _is_close(interval.high, aim.bound):
        return "undecided"
    return "refuted"


def _seeds_to_decide(effect: Paired, aim: _Aim, alpha: float) -> int | None:
    target = aim.null if effect.mean - aim.null >= aim.bound - effect.mean else aim.bound
    needed = seeds_needed(effect.mean, effect.sd, target, alpha)
    # A row that Holm holds back for the sake of another may have had enough for itself.
    return None if needed is None else max(needed, effect.num_seeds + 1)


def _power(n: int, effect: float, alpha: float) -> float:
    noncentrality = min(effect * math.sqrt(n), _MAX_NONCENTRALITY)
    return float(stats.nct.sf(stats.t.isf(alpha / 2, n - 1), n - 1, noncentrality))


def _step_down(p_values: Sequence[float | int | None]) -> list[tuple[int, int]]:
    """Positions by ascending p, each with the number of hypotheses from there on."""
    counted = [1.0 if p is None else p for p in p_values]
    for p in counted:
        _require(0 <= p <= 1, "p_values", "lie in [0, 1]", p)
    order = sorted(range(len(counted)), key=counted.__getitem__)
    return [(i, len(order) - k) for k, i in enumerate(order)]


def _sd(values: Sequence[float | int]) -> float | None:
    if len(values) < 2:
        return None
    return 0.0 if _is_close(min(values), max(values)) else float(np.std(values, ddof=1))


def _t_statistic(effect: Paired, null: float) -> float | None:
    _require(math.isfinite(null), "null", "be finite", null)
    sd, distance = effect.sd, effect.mean - null
    if sd is None:
        return None
    if _is_close(effect.mean, null):
        return 0.0
    return distance * math.sqrt(effect.num_seeds) / sd if sd else math.copysign(math.inf, distance)


def _is_close(x: float, y: float) -> bool:
    return math.isclose(x, y, rel_tol=_ROUNDING)


def _require(ok: bool | np.bool_, name: str, rule: str, value: object) -> None:
    if not ok:
        raise ValueError(f"`{name}` must {rule}; got {value}.")


def _check_numbers(name: str, values: Sequence[float | int]) -> None:
    _require(len(values) > 0, name, "hold at least one number", "none")
    for value in values:
        _require(math.isfinite(value), name, "hold finite numbers", value)


def _check_fraction(name: str, value: float) -> None:
    _require(0 < value < 1, name, "lie in (0, 1)", value)


def _check_margin(margin: float) -> None:
    _require(math.isfinite(margin), "margin", "be finite", margin)
    _require(margin >= 0, "margin", "be at least 0", margin)


def _check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, name, f"be one of {', '.join(known)}", repr(value))


def _check_method(method: Method, generator: np.random.Generator | None) -> None:
    _check_known("method", method, get_args(Method))
    has_source = method == "t" or generator is not None
    _require(has_source, "generator", "be given for method 'bca'", generator)
