"""Statistics against scipy, brute force, simulation and answers worked out by hand."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import scipy.stats

from windfall import stats

SAMPLES = [
    np.random.default_rng(i).normal(0.01, 0.02, size=n).tolist()
    for i, n in enumerate([2, 3, 5, 10, 40])
]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def around(mean: float, sd: float, n: int) -> list[float]:
    """Numbers with exactly this mean and standard deviation, up to rounding."""
    z = np.random.default_rng(n).normal(size=n)
    return (mean + sd * (z - z.mean()) / z.std(ddof=1)).tolist()


def closed_testing(p_values: list[float | None]) -> list[float]:
    """Adjusted p by closed testing: the worst Bonferroni p among all subsets that hold the row."""
    p = [1.0 if x is None else x for x in p_values]
    subsets = [s for r in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), r)]
    return [
        max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s)
        for i in range(len(p))
    ]


# -- paired differences ----------------------------------------------------------------------


@pytest.mark.parametrize("b", SAMPLES)
@pytest.mark.parametrize("null", [0.0, -0.005, 0.01])
def test_the_paired_t_test_is_that_of_scipy(b: list[float], null: float) -> None:
    a = (np.asarray(b) * 0.7 + generator(len(b)).normal(0.01, 0.01, size=len(b))).tolist()
    effect = stats.paired(a, b)
    twin = scipy.stats.ttest_1samp(np.subtract(a, b), popmean=null)
    assert effect.p_value(null) == pytest.approx(twin[1], rel=1e-9)
    assert effect.interval(0.9) == pytest.approx(tuple(twin.confidence_interval(0.9)), rel=1e-9)
    assert effect.p_value() == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue, rel=1e-9)


def test_a_pair_is_summarized_by_what_can_be_computed_by_hand() -> None:
    effect = stats.paired([3, 5, 10], [2, 3, 7])
    assert effect.differences == (1.0, 2.0, 3.0)
    assert (effect.mean, effect.sd, effect.num_seeds) == (2.0, 1.0, 3)
    # t = 2 sqrt(3) with 2 degrees has p = 1 - sqrt(12 / 14), and t_{.975, 2} = 4.302653
    assert effect.p_value() == pytest.approx(1 - math.sqrt(12 / 14))
    assert effect.interval() == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)


def test_swapping_the_arms_mirrors_the_effect() -> None:
    a, b = SAMPLES[3], [*SAMPLES[3][::-1][1:], 0.2]
    there, back = stats.paired(a, b), stats.paired(b, a)
    interval = there.interval()
    assert interval is not None
    assert there.p_value(0.003) == pytest.approx(back.p_value(-0.003))
    assert back.interval() == pytest.approx((-interval.high, -interval.low))


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99, 0.9999])
def test_the_interval_excludes_a_null_just_when_its_p_value_is_below_one_minus_level(
    level: float,
) -> None:
    effect = stats.Paired(tuple(SAMPLES[2]))
    interval = effect.interval(level)
    assert interval is not None
    for edge, outward in ((interval.low, -1), (interval.high, 1)):
        assert effect.p_value(edge) == pytest.approx(1 - level)
        p = effect.p_value(edge + outward * 1e-6)
        assert p is not None
        assert p < 1 - level


@pytest.mark.parametrize("null", [0.0, 0.1, -0.005, 1 / 3])
def test_differences_that_all_equal_the_null_have_p_one(null: float) -> None:
    effect = stats.Paired((null,) * 3)
    assert effect.sd == 0.0
    assert effect.p_value(null) == 1.0
    assert effect.interval() == pytest.approx((null, null), rel=1e-12)
    assert effect.p_value(null + 1e-6) == 0.0


def test_rounding_does_not_make_equal_differences_unequal() -> None:
    effect = stats.paired([0.8, 0.3, 0.02], [0.805, 0.305, 0.025])
    assert len(set(effect.differences)) > 1  # else there is nothing to forgive
    assert effect.sd == 0.0
    assert effect.p_value(-0.005) == 1.0


def test_one_seed_has_a_mean_and_nothing_else() -> None:
    effect = stats.paired([0.9], [0.8])
    assert effect.mean == pytest.approx(0.1)
    assert (effect.sd, effect.interval(), effect.p_value()) == (None, None, None)
    assert effect.interval(method="bca", generator=generator()) is None


def test_a_pair_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        stats.paired([1.0], [0.0]).differences = ()  # pyright: ignore[reportAttributeAccessIssue]


# -- intervals of a mean ---------------------------------------------------------------------


@pytest.mark.parametrize("values", SAMPLES)
def test_the_t_interval_is_that_of_scipy(values: list[float]) -> None:
    twin = scipy.stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values)
    )
    assert stats.mean_interval(values) == pytest.approx(twin)


def test_the_t_interval_covers_the_mean_as_often_as_it_says() -> None:
    num_trials, level = 2_000, 0.9
    trials = generator(1).normal(3.0, 2.0, size=(num_trials, 4)).tolist()
    intervals = [stats.mean_interval(values, level) for values in trials]
    num_covered = sum(i is not None and i.low <= 3.0 <= i.high for i in intervals)
    four_errors = 4 * math.sqrt(level * (1 - level) / num_trials)
    assert num_covered / num_trials == pytest.approx(level, abs=four_errors)


@pytest.mark.parametrize("values", SAMPLES)
def test_the_bca_interval_is_that_of_scipy(values: list[float]) -> None:
    twin = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, method="BCa", rng=generator(7)
    ).confidence_interval
    interval = stats.bca_interval(values, 0.9, generator=generator(7))
    assert interval == pytest.approx((twin.low, twin.high))
    via_pair = stats.Paired(tuple(values)).interval(0.9, "bca", generator(7))
    assert via_pair == interval


def test_the_bca_interval_follows_its_formula() -> None:
    values = np.random.default_rng(3).exponential(size=12)
    means = generator(5).choice(values, size=(9_999, 12)).mean(axis=1)
    bias = scipy.stats.norm.ppf((means < values.mean()).mean())
    leave_one_out = (values.sum() - values) / 11
    spread = leave_one_out.mean() - leave_one_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    z = bias + scipy.stats.norm.ppf([0.025, 0.975])
    twin = np.quantile(means, scipy.stats.norm.cdf(bias + z / (1 - acceleration * z)))
    interval = stats.bca_interval(values.tolist(), generator=generator(6))
    assert interval == pytest.approx(tuple(twin), abs=0.03)  # Monte-Carlo error of both is 0.01


def test_the_bca_interval_of_many_symmetric_values_is_nearly_the_t_interval() -> None:
    values = around(0.5, 0.1, 200)
    bca = stats.bca_interval(values, generator=generator(2))
    assert bca == pytest.approx(stats.mean_interval(values), abs=1.5e-3)


def test_the_bca_interval_belongs_to_its_generator() -> None:
    values = SAMPLES[3]
    first, again, other = (stats.bca_interval(values, generator=generator(s)) for s in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("values", [[0.1] * 3, [0.0] * 10, [-2.0] * 2])
def test_equal_values_have_a_point_for_an_interval(values: list[float]) -> None:
    point = (values[0], values[0])
    assert stats.mean_interval(values) == pytest.approx(point)
    assert stats.bca_interval(values, generator=generator()) == pytest.approx(point)


# -- Holm ------------------------------------------------------------------------------------


def test_holm_is_closed_testing_with_bonferroni() -> None:
    draw = generator(4)
    for size in (1, 2, 3, 5, 8):
        for _ in range(10):
            # one decimal makes ties, and zeros and ones, common
            p_values = np.round(draw.uniform(0, 1, size) ** 3, draw.integers(1, 5)).tolist()
            assert stats.holm(p_values) == pytest.approx(closed_testing(p_values))


def test_holm_counts_a_missing_p_value_as_one_and_keeps_it_missing() -> None:
    p_values = [0.04, None, 0.01, None]
    adjusted, twin = stats.holm(p_values), closed_testing(p_values)
    assert (adjusted[1], adjusted[3]) == (None, None)
    assert (adjusted[0], adjusted[2]) == pytest.approx((twin[0], twin[2]))
    assert (adjusted[0], adjusted[2]) == pytest.approx((0.12, 0.04))


def test_holm_of_nothing_is_nothing() -> None:
    assert stats.holm([]) == []
    assert stats.holm_levels([]) == []
    assert stats.decide([]) == []


@pytest.mark.parametrize(
    ("p_values", "num_left"),
    [
        ([0.01, 0.02, 0.03], [3, 2, 1]),
        ([0.03, 0.01, 0.02], [1, 3, 2]),
        ([0.02, 0.02, 0.01], [2, 1, 3]),
        ([None, 1.0, 0.5], [2, 1, 3]),
        ([1.0, None], [2, 1]),
        ([0.7], [1]),
    ],
)
def test_each_row_has_its_own_holm_level(p_values: list[float | None], num_left: list[int]) -> None:
    assert stats.holm_levels(p_values) == pytest.approx([1 - 0.05 / k for k in num_left])
    assert stats.holm_levels(p_values, 0.1) == pytest.approx([1 - 0.1 / k for k in num_left])


def test_stepping_down_the_levels_rejects_what_the_adjusted_p_values_reject() -> None:
    draw = generator(9)
    for _ in range(200):
        p_values = (draw.uniform(0, 0.1, 5)).tolist()
        levels = stats.holm_levels(p_values)
        rejected = [False] * 5
        for i in np.argsort(p_values):
            if p_values[i] >= 1 - levels[i]:
                break
            rejected[i] = True
        assert [p is not None and p < 0.05 for p in stats.holm(p_values)] == rejected


# -- power -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("effect", "num_seeds"),
    [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)],  # R: power.t.test(type = "one.sample")
)
def test_seeds_needed_agree_with_published_tables(effect: float, num_seeds: int) -> None:
    assert stats.seeds_needed(effect, 1.0) == num_seeds
    assert stats.seeds_needed(-effect, 1.0) == num_seeds
    assert stats.seeds_needed(0.3 + 0.01 * effect, 0.01, null=0.3) == num_seeds


@pytest.mark.parametrize(
    ("mean", "null", "alpha", "power"),
    [(0.9, 0.0, 0.05, 0.8), (0.5, -0.5, 0.05 / 6, 0.8), (-0.7, 0.0, 0.05, 0.9)],
)
def test_the_needed_seeds_have_the_power_and_one_fewer_have_not(
    mean: float, null: float, alpha: float, power: float
) -> None:
    needed = stats.seeds_needed(mean, 1.0, null, alpha, power)
    assert needed is not None
    num_trials = 200_000  # the standard error of a simulated power is below 0.001

    def simulated(n: int) -> float:
        x = generator(n).normal(mean, 1.0, size=(num_trials, n))
        t = (x.mean(axis=1) - null) / (x.std(axis=1, ddof=1) / math.sqrt(n))
        critical = scipy.stats.t.isf(alpha / 2, n - 1)
        return float((np.sign(mean - null) * t > critical).mean())

    assert simulated(needed) > power - 0.004
    assert simulated(needed - 1) < power + 0.004


def test_the_power_is_that_of_an_integral_over_the_standard_deviation() -> None:
    # scipy's noncentral t has been wrong before, so the search is repeated without it
    def power(n: int, effect: float, alpha: float) -> float:
        low, high = scipy.stats.chi.ppf([1e-12, 1 - 1e-12], n - 1)
        s = np.linspace(low, high, 4_001)
        critical = scipy.stats.t.isf(alpha / 2, n - 1)
        above = scipy.stats.norm.sf(critical * s / math.sqrt(n - 1) - effect * math.sqrt(n))
        return float(np.trapezoid(above * scipy.stats.chi.pdf(s, n - 1), s))

    settings = itertools.product([0.2, 0.6, 1.0, 1.5, 2.2, 3.0, 5.0, 8.0], [0.05, 0.05 / 6])
    for effect, alpha in settings:
        twin = next(n for n in itertools.count(2) if power(n, effect, alpha) >= 0.8)
        assert stats.seeds_needed(effect, 1.0, alpha=alpha) == twin


def test_more_is_needed_for_smaller_effects_stricter_levels_and_more_power() -> None:
    def increases(needed: list[int | None]) -> bool:
        return None not in needed and needed == sorted({n for n in needed if n is not None})

    assert increases([stats.seeds_needed(m, 1.0) for m in (2.0, 1.0, 0.5, 0.1, 0.01)])
    assert increases([stats.seeds_needed(0.5, 1.0, alpha=a) for a in (0.2, 0.05, 0.01, 1e-6)])
    assert increases([stats.seeds_needed(0.5, 1.0, power=p) for p in (0.5, 0.8, 0.9, 0.99)])


@pytest.mark.parametrize(
    ("mean", "sd", "needed"),
    [
        (0.1, None, None),  # one seed knows no spread
        (0.0, 1.0, None),  # nothing to find
        (0.0, 0.0, None),
        (0.01, 0.0, 2),  # the fewest that have a spread
        (1e9, 1.0, 2),
        (1e300, 1e-300, 2),
        (0.0089, 1.0, 99_092),  # (z_.975 + z_.8)^2 / 0.0089^2 + z_.975^2 / 2 = 99,091.4
        (0.0088, 1.0, None),  # 101,355.5 by the same formula
    ],
)
def test_seeds_needed_at_the_edges(mean: float, sd: float | None, needed: int | None) -> None:
    assert stats.seeds_needed(mean, sd) == needed


@pytest.mark.parametrize("alpha", [0.5, 0.05, 1e-4, 1e-8])
@pytest.mark.parametrize("mean", [1e-8, 1.0, 1e3, 1e5, 1e7, 1e12])
def test_seeds_needed_never_warn(mean: float, alpha: float) -> None:
    needed = stats.seeds_needed(mean, 1.0, alpha=alpha)
    assert needed is None or needed >= 2


# -- equivalence -----------------------------------------------------------------------------


@pytest.mark.parametrize("values", SAMPLES)
@pytest.mark.parametrize("margin", [0.0, 0.005, 0.02, 0.1])
def test_equivalence_is_two_one_sided_t_tests(values: list[float], margin: float) -> None:
    result = stats.equivalent(values, margin)
    above = scipy.stats.ttest_1samp(values, -margin, alternative="greater")[1]
    below = scipy.stats.ttest_1samp(values, margin, alternative="less")[1]
    assert result.p_value == pytest.approx(np.max([above, below]))
    assert result.interval == pytest.approx(stats.mean_interval(values, 0.9))
    assert result.interval is not None
    is_inside = -margin < result.interval.low and result.interval.high < margin
    assert result.is_equivalent is is_inside


@pytest.mark.parametrize(
    ("differences", "margin", "p_value", "is_equivalent"),
    [
        ([0.0] * 5, 0.005, 0.0, True),
        ([0.004] * 5, 0.005, 0.0, True),
        ([0.006] * 5, 0.005, 1.0, False),
        ([-0.006] * 5, 0.005, 1.0, False),
        ([0.005] * 5, 0.005, 0.5, False),
        ([0.0] * 5, 0.0, 0.5, False),
        ([0.0], 0.005, None, False),
    ],
)
def test_equivalence_without_a_spread(
    differences: list[float], margin: float, p_value: float | None, *, is_equivalent: bool
) -> None:
    result = stats.equivalent(differences, margin)
    assert (result.p_value, result.is_equivalent) == (p_value, is_equivalent)


def test_a_large_p_value_is_not_equivalence() -> None:
    noisy = around(0.0, 0.1, 5)
    assert stats.Paired(tuple(noisy)).p_value() == pytest.approx(1.0)
    assert not stats.equivalent(noisy, 0.005).is_equivalent


# -- verdicts --------------------------------------------------------------------------------

SUPERIOR: list[tuple[list[float], str]] = [
    (around(0.03, 0.01, 10), "supported"),
    (around(0.002, 0.0005, 10), "supported"),  # real, if smaller than the margin
    ([0.01] * 3, "supported"),
    (around(0.0, 0.002, 10), "refuted"),  # an interval of +-0.0014
    (around(-0.03, 0.01, 10), "refuted"),
    ([0.0] * 5, "refuted"),
    ([-0.01] * 2, "refuted"),
    (around(0.0, 0.02, 10), "undecided"),  # an interval of +-0.014
    (around(0.01, 0.02, 10), "undecided"),
    (around(-0.01, 0.03, 10), "undecided"),
    ([0.5], "undecided"),
]
NON_INFERIOR: list[tuple[list[float], str]] = [
    (around(0.0, 0.002, 10), "supported"),
    (around(-0.003, 0.001, 10), "supported"),  # worse, but by less than the margin
    (around(0.03, 0.01, 10), "supported"),
    ([0.0] * 5, "supported"),
    ([-0.004] * 2, "supported"),
    (around(-0.03, 0.01, 10), "refuted"),
    (around(-0.007, 0.002, 10), "refuted"),
    ([-0.006] * 2, "refuted"),
    (around(0.0, 0.02, 10), "undecided"),
    (around(-0.006, 0.002, 10), "undecided"),
    ([-0.005] * 4, "undecided"),
    ([-0.5], "undecided"),
]
TABLE = [("superior", *row) for row in SUPERIOR] + [("non-inferior", *row) for row in NON_INFERIOR]


@pytest.mark.parametrize(("kind", "differences", "word"), TABLE)
def test_each_claim_gets_the_word_its_numbers_earn(
    kind: stats.Kind, differences: list[float], word: str
) -> None:
    [verdict] = stats.decide([stats.Claim(differences, kind)])
    assert verdict.word == word
    effect = stats.Paired(tuple(differences))
    assert verdict.difference == effect.mean
    assert verdict.num_seeds == len(differences)
    assert verdict.level == pytest.approx(0.95)
    assert verdict.interval == effect.interval(0.95)
    assert verdict.p_value == effect.p_value(0.0 if kind == "superior" else -0.005)
    assert verdict.p_adjusted == verdict.p_value
    assert word == "undecided" or verdict.seeds_needed is None


@pytest.mark.parametrize(("kind", "differences", "word"), TABLE)
def test_a_verdict_does_not_depend_on_the_unit(
    kind: stats.Kind, differences: list[float], word: str
) -> None:
    percent = [100 * d for d in differences]
    [fraction_verdict] = stats.decide([stats.Claim(differences, kind)], margin=0.005)
    [percent_verdict] = stats.decide([stats.Claim(percent, kind)], margin=0.5)
    assert percent_verdict.word == fraction_verdict.word == word
    assert percent_verdict.seeds_needed == fraction_verdict.seeds_needed


def test_a_difference_at_the_margin_is_not_below_it_by_rounding() -> None:
    effect = stats.paired([0.8, 0.7, 0.6], [0.805, 0.705, 0.605])
    assert max(effect.differences) < -0.005
    [verdict] = stats.decide([stats.Claim(effect.differences, "non-inferior")])
    assert (verdict.word, verdict.p_value, verdict.seeds_needed) == ("undecided", 1.0, None)


def test_a_word_can_change_with_the_family_it_belongs_to() -> None:
    borderline = stats.Claim(around(0.01, 0.012, 10))  # p = 0.027
    noise = stats.Claim(around(0.0, 0.02, 10))
    assert stats.decide([borderline])[0].word == "supported"
    in_company, other = stats.decide([borderline, noise])
    assert in_company.p_value == stats.decide([borderline])[0].p_value
    assert in_company.p_adjusted == pytest.approx(2 * (in_company.p_value or 0.0))
    assert in_company.word == "undecided"
    assert (in_company.level, other.level) == pytest.approx((0.975, 0.95))


def test_a_row_is_refuted_at_its_own_level() -> None:
    # high = -0.002 + t 0.008 / sqrt(10): 0.0037 at 95 % and 0.0048, 0.0055 at 97.5 %, 98.33 %
    harmful = stats.Claim(around(-0.002, 0.008, 10))
    noise = stats.Claim(around(0.0, 0.5, 10))
    assert [v.word for v in stats.decide([harmful, noise])] == ["refuted", "undecided"]
    three = stats.decide([harmful, noise, noise])
    assert [v.word for v in three] == ["undecided"] * 3
    assert three[0].interval == stats.mean_interval(harmful.differences or [], 1 - 0.05 / 3)


def test_a_family_of_both_kinds_is_adjusted_together() -> None:
    rows = [
        stats.Claim(around(0.01, 0.01, 8)),
        stats.Claim(around(0.0, 0.004, 8), "non-inferior"),
        stats.Claim(around(0.002, 0.01, 8)),
    ]
    verdicts = stats.decide(rows)
    p_values = [v.p_value for v in verdicts]
    nulls = (0.0, -0.005, 0.0)
    for row, null, p in zip(rows, nulls, p_values, strict=True):
        twin = scipy.stats.ttest_1samp(np.asarray(row.differences), null)[1]
        assert p == pytest.approx(twin)
    assert [v.p_adjusted for v in verdicts] == pytest.approx(closed_testing(p_values))
    assert [v.level for v in verdicts] == stats.holm_levels(p_values)


def test_a_failed_row_is_null_and_still_counts() -> None:
    good = stats.Claim(around(0.03, 0.01, 10))
    failed, verdict, one_seed = stats.decide(
        [stats.Claim(None, "non-inferior"), good, stats.Claim([0.1])]
    )
    assert failed == stats.Verdict(None, None, None, None, None, None, "undecided", None)
    assert verdict.word == "supported"
    assert verdict.level == pytest.approx(1 - 0.05 / 3)
    assert verdict.p_adjusted == pytest.approx(3 * (verdict.p_value or 0.0))
    assert (one_seed.difference, one_seed.num_seeds) == (0.1, 1)
    assert (one_seed.interval, one_seed.p_value, one_seed.p_adjusted) == (None, None, None)
    assert (one_seed.word, one_seed.seeds_needed) == ("undecided", None)


def test_tied_rows_rank_by_position() -> None:
    row = stats.Claim(around(0.01, 0.01, 10))
    first, second = stats.decide([row, row])
    assert first.p_adjusted == second.p_adjusted == pytest.approx(2 * (first.p_value or 0.0))
    assert (first.level, second.level) == pytest.approx((0.975, 0.95))


@pytest.mark.parametrize(
    ("kind", "mean", "target"),
    [
        ("superior", 0.004, 0.0),  # further from the null than from the margin
        ("superior", 0.008, 0.0),
        ("superior", 0.001, 0.005),  # further from the margin than from the null
        ("superior", -0.01, 0.005),
        ("non-inferior", 0.0, -0.005),
        ("non-inferior", -0.008, -0.005),
    ],
)
def test_an_undecided_row_says_how_many_seeds_would_decide_it(
    kind: stats.Kind, mean: float, target: float
) -> None:
    row = stats.Claim(around(mean, 0.03, 10), kind)
    [verdict] = stats.decide([row])
    assert verdict.word == "undecided"
    assert verdict.seeds_needed == stats.seeds_needed(mean, 0.03, target)
    failed = stats.Claim(None)
    stricter = stats.decide([row, failed, failed])[0]
    assert stricter.seeds_needed == stats.seeds_needed(mean, 0.03, target, alpha=0.05 / 3)


@pytest.mark.parametrize(("mean", "word"), [(0.008, "supported"), (-0.004, "refuted")])
def test_the_seeds_that_are_needed_decide_four_times_in_five(mean: float, word: str) -> None:
    sd, num_trials = 0.012, 400
    [verdict] = stats.decide([stats.Claim(around(mean, sd, 6))])
    assert verdict.seeds_needed is not None
    trials = generator(8).normal(mean, sd, size=(num_trials, verdict.seeds_needed)).tolist()
    words = [stats.decide([stats.Claim(d)])[0].word for d in trials]
    four_errors = 4 * math.sqrt(0.8 * 0.2 / num_trials)
    assert words.count(word) / num_trials == pytest.approx(0.8, abs=four_errors)


def test_a_row_that_waits_for_another_asks_for_more_seeds_than_it_had() -> None:
    # p = 0.0026 of 20 rows is not below 0.05 / 20, though the last row's own level would take it
    sd = 0.01 * math.sqrt(14) / float(scipy.stats.t.isf(0.0026 / 2, 13))
    twenty = stats.decide([stats.Claim(around(0.01, sd, 14))] * 20)
    assert {v.word for v in twenty} == {"undecided"}
    assert twenty[-1].p_value == pytest.approx(0.0026)
    alone = stats.seeds_needed(0.01, sd)
    assert alone is not None
    assert alone <= 14
    assert twenty[-1].seeds_needed == 15


@pytest.mark.parametrize("kind", ["superior", "non-inferior"])
def test_a_true_null_is_seldom_supported(kind: stats.Kind) -> None:
    num_families, null = 300, 0.0 if kind == "superior" else -0.005
    draws = generator(11).normal(null, 0.01, size=(num_families, 4, 5)).tolist()
    num_wrong = 0
    for family in draws:
        verdicts = stats.decide([stats.Claim(d, kind) for d in family])
        num_wrong += any(v.word == "supported" for v in verdicts)
    # two-sided at 5 %, and only one side supports
    four_errors = 4 * math.sqrt(0.025 * 0.975 / num_families)
    assert num_wrong / num_families <= 0.025 + four_errors


def test_the_bootstrap_can_give_the_intervals() -> None:
    rows = [stats.Claim(SAMPLES[3]), stats.Claim(None), stats.Claim([0.0] * 4)]
    with_t = stats.decide(rows)
    with_bca = stats.decide(rows, method="bca", generator=generator(3))
    assert [v.p_adjusted for v in with_bca] == [v.p_adjusted for v in with_t]
    assert [v.level for v in with_bca] == [v.level for v in with_t]
    level = with_t[0].level
    assert level is not None
    twin = stats.bca_interval(SAMPLES[3], level, generator=generator(3))
    assert with_bca[0].interval == twin != with_t[0].interval
    assert with_bca[2].interval == (0.0, 0.0)


# -- rejections ------------------------------------------------------------------------------

GOOD = [0.1, 0.2]
REJECTIONS: list[tuple[Callable[[], object], str]] = [
    (lambda: stats.paired([1.0], [1.0, 2.0]), "`a` and `b` must have equal lengths; got 1 and 2."),
    (lambda: stats.paired([], []), "`a` must hold at least one number; got none."),
    (lambda: stats.paired(GOOD, [0.1, math.nan]), "`b` must hold finite numbers; got nan."),
    (lambda: stats.paired([1e308], [-1e308]), "`differences` must hold finite numbers; got inf."),
    (lambda: stats.Paired(()), "`differences` must hold at least one number; got none."),
    (lambda: stats.Paired((0.1,)).p_value(math.nan), "`null` must be finite; got nan."),
    (lambda: stats.Paired((0.1,)).interval(1.0), "`level` must lie in (0, 1); got 1.0."),
    (lambda: stats.mean_interval([]), "`values` must hold at least one number; got none."),
    (lambda: stats.mean_interval([math.inf]), "`values` must hold finite numbers; got inf."),
    (lambda: stats.mean_interval(GOOD, 0.0), "`level` must lie in (0, 1); got 0.0."),
    (lambda: stats.mean_interval(GOOD, 95.0), "`level` must lie in (0, 1); got 95.0."),
    (
        lambda: stats.bca_interval(GOOD, generator=generator(), num_resamples=0),
        "`num_resamples` must be at least 1; got 0.",
    ),
    (
        lambda: stats.Paired((0.1, 0.2)).interval(method="bca"),
        "`generator` must be given for method 'bca'; got None.",
    ),
    (
        lambda: stats.decide([], method="bca"),
        "`generator` must be given for method 'bca'; got None.",
    ),
    (lambda: stats.holm([0.1, 1.5]), "`p_values` must lie in [0, 1]; got 1.5."),
    (lambda: stats.holm([math.nan]), "`p_values` must lie in [0, 1]; got nan."),
    (lambda: stats.holm_levels([-0.1]), "`p_values` must lie in [0, 1]; got -0.1."),
    (lambda: stats.holm_levels([0.1], 1.0), "`alpha` must lie in (0, 1); got 1.0."),
    (lambda: stats.seeds_needed(math.inf, 1.0), "`mean` must be finite; got inf."),
    (lambda: stats.seeds_needed(1.0, -1.0), "`sd` must be at least 0; got -1.0."),
    (lambda: stats.seeds_needed(1.0, math.nan), "`sd` must be finite; got nan."),
    (lambda: stats.seeds_needed(1.0, 1.0, math.nan), "`null` must be finite; got nan."),
    (lambda: stats.seeds_needed(1.0, 1.0, alpha=0.0), "`alpha` must lie in (0, 1); got 0.0."),
    (lambda: stats.seeds_needed(1.0, 1.0, power=1.0), "`power` must lie in (0, 1); got 1.0."),
    (lambda: stats.equivalent(GOOD, -1.0), "`margin` must be at least 0; got -1.0."),
    (lambda: stats.equivalent(GOOD, 1.0, 0.5), "`alpha` must lie in (0, 0.5); got 0.5."),
    (lambda: stats.equivalent([], 1.0), "`differences` must hold at least one number; got none."),
    (lambda: stats.Claim([]), "`differences` must hold at least one number; got none."),
    (lambda: stats.Claim([math.nan]), "`differences` must hold finite numbers; got nan."),
    (lambda: stats.decide([], margin=-1.0), "`margin` must be at least 0; got -1.0."),
    (lambda: stats.decide([], margin=math.inf), "`margin` must be finite; got inf."),
    (lambda: stats.decide([], alpha=0.0), "`alpha` must lie in (0, 1); got 0.0."),
]


@pytest.mark.parametrize(("call", "message"), REJECTIONS)
def test_what_is_out_of_range_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_an_unknown_name_is_refused() -> None:
    # a TypeError where annotations are checked
    with pytest.raises((ValueError, TypeError), match="kind"):
        stats.Claim(GOOD, "better")  # pyright: ignore[reportArgumentType]
    with pytest.raises((ValueError, TypeError), match="method"):
        stats.decide([], method="median")  # pyright: ignore[reportArgumentType]


def test_a_share_has_wilsons_interval() -> None:
    z, n = 1.959963984540054, 5
    for count in range(n + 1):
        share = count / n
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        low, high = stats.share_interval(count, n)
        assert low == pytest.approx(middle - reach, abs=1e-9)
        assert high == pytest.approx(middle + reach, abs=1e-9)
    with pytest.raises(ValueError, match="`count` must lie in"):
        stats.share_interval(6, 5)
