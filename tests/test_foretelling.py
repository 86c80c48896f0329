"""What signals foretell, beside plain loops."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from windfall import seeds
from windfall.foretelling import between, told, within
from windfall.stats import mean_interval


def draws(*shape, seed=0):
    return seeds.stream(seed, "test-foretelling").standard_normal(shape)


def ranks(values):
    """Mean ranks, those of equals their mean, by counting."""
    return [sum(x < v for x in values) + (sum(x == v for x in values) + 1) / 2 for v in values]


def pearson(ones, others):
    a, b = (np.asarray(each) - np.mean(each) for each in (ones, others))
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


# -- between and within -----------------------------------------------------------------------


def test_correlations_between_arms_are_of_ranks_seed_by_seed():
    signal, outcome = draws(6, 4), draws(6, 4, seed=1)
    signal[2], outcome[1, 0] = signal[3], outcome[0, 0]  # ties
    expected = [pearson(ranks(signal[:, s]), ranks(outcome[:, s])) for s in range(4)]
    assert between(signal, outcome) == pytest.approx(expected)


def test_correlations_within_arms_are_of_what_arms_do_not_explain():
    signal, outcome = draws(3, 5), draws(3, 5, seed=1)
    signal += [[0], [10], [-20]]
    outcome += [[7], [0], [30]]
    ones, others = [], []
    for arm in range(3):
        ones += [value - sum(signal[arm]) / 5 for value in signal[arm]]
        others += [value - sum(outcome[arm]) / 5 for value in outcome[arm]]
    found = within(signal, outcome)
    assert found.r == pytest.approx(pearson(ones, others))
    assert found.degrees == 15 - 3
    middle, reach = math.atanh(found.r), 1.959964 / math.sqrt(12 - 2)
    assert found.interval.low == pytest.approx(math.tanh(middle - reach), abs=1e-6)
    assert found.interval.high == pytest.approx(math.tanh(middle + reach), abs=1e-6)


def test_within_one_arm_the_interval_is_that_of_a_plain_correlation():
    signal, outcome = draws(1, 12), draws(1, 12, seed=1)
    plain = scipy_stats.pearsonr(signal[0], outcome[0])
    found = within(signal, outcome)
    assert found.r == pytest.approx(plain.statistic)
    assert tuple(found.interval) == pytest.approx(tuple(plain.confidence_interval()))


def test_intervals_within_arms_hold_the_truth_as_often_as_they_say():
    stream, share, held = seeds.stream(2, "test-foretelling"), 0.6, 0
    for _ in range(400):
        signal, noise = stream.standard_normal((2, 4, 6))
        outcome = share * signal + math.sqrt(1 - share**2) * noise
        arms = stream.standard_normal((2, 4, 1))
        low, high = within(signal + 5 * arms[0], outcome + 5 * arms[1]).interval
        held += low <= share <= high
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize("sign", [1, -1])
def test_what_goes_along_exactly_is_told_so(sign):
    arms, some = np.array([[1.0], [2], [3]]), np.array([[0.1, 0.2, 0.4, 0.3]])
    table = arms + some
    assert between(table, sign * table) == pytest.approx([sign] * 4)
    found = within(table, sign * table)
    assert (found.r, *found.interval) == pytest.approx((sign, sign, sign))


def test_what_never_varies_is_unknown():
    same, other = np.full((4, 5), 0.1), draws(4, 5)
    for one, two in ((same, other), (other, same)):
        assert between(one, two) == [None] * 5
        assert within(one, two) is None
    density = np.array([[1.0], [0.3], [0.1], [0.03]]) * np.ones((1, 5))
    assert within(density, other) is None
    assert None not in between(density, other)


def test_too_few_runs_have_no_interval():
    assert within(draws(3, 2), draws(3, 2, seed=1)).interval is not None
    assert within(draws(2, 2), draws(2, 2, seed=1)).interval is None
    assert within(draws(3, 1), draws(3, 1, seed=1)) is None
    assert within(np.empty((3, 0)), np.empty((3, 0))) is None


# -- in words ---------------------------------------------------------------------------------


def rows(**tables):
    """A study's table of arms, of metrics as tables [arm, seed]."""
    return [
        {
            "arm": f"arm{place}",
            "metric": metric.replace("_", "@"),
            "runs": [{"seed": s, "value": v} for s, v in enumerate(values)],
        }
        for metric, table in tables.items()
        for place, values in enumerate(table if isinstance(table, list) else table.tolist())
    ]


NUM = np.arange(5.0)[:, None] + np.array([[0.0, 0.3, 0.1, 0.2]])  # in the order of the arms
DENSITY = np.array([[1.0], [2], [0], [3], [4]]) * np.ones((1, 4))  # rho of .7


def test_a_signal_is_told_beside_density():
    noise = draws(5, 4)
    found = told(rows(accuracy=NUM, density=DENSITY, x_start=-NUM, y_start=noise, d_start=DENSITY))
    assert len(found) == 4
    assert "Over 5 arms" in found[0]
    assert "is +0.70 [+0.70, +0.70], n = 4:" in found[0]
    assert found[1] == (
        "x@start: -1.00 [-1.00, -1.00], n = 4, more than density;"
        " within arms -1.00 [-1.00, -1.00], n = 20."
    )
    rhos = between(noise, NUM)
    low, high = mean_interval(rhos)
    inside = within(noise, NUM)
    assert found[2] == (
        f"y@start: {sum(rhos) / 4:+.2f} [{max(-1, low):+.2f}, {min(1, high):+.2f}], n = 4,"
        f" {'less than' if high < 0.7 else 'not told apart from'} density; within arms"
        f" {inside.r:+.2f} [{inside.interval.low:+.2f}, {inside.interval.high:+.2f}], n = 20."
    )
    assert found[3].startswith("d@start: +0.70 [+0.70, +0.70], n = 4, not told apart from density;")


def test_what_is_the_same_everywhere_is_told_as_unknown():
    found = told(rows(accuracy=NUM, density=DENSITY, x_start=np.zeros((5, 4))))
    assert found[1] == "x@start: unknown; within arms unknown, n = 20."


def test_seeds_of_which_a_run_failed_are_left_out():
    holed, one = NUM.tolist(), DENSITY.tolist()
    holed[3][1] = None
    found = told(rows(accuracy=holed, density=one, x_start=NUM))
    assert "n = 3:" in found[0]
    assert "+1.00 [+1.00, +1.00], n = 3, more" in found[1]
    assert found[1].endswith("n = 15.")
    lost = [[None] * 4, *NUM.tolist()[1:]]
    found = told(rows(accuracy=NUM, density=one, x_start=lost, y_start=NUM))
    assert found[1] == "x@start: unknown; within arms unknown, n = 0."
    assert "n = 4, more" in found[2]


def test_one_seed_has_no_interval():
    found = told(rows(accuracy=NUM[:, :1], density=DENSITY[:, :1], x_start=NUM[:, :1]))
    assert found[1] == (
        "x@start: +1.00, n = 1, not told apart from density; within arms unknown, n = 5."
    )


@pytest.mark.parametrize(
    "tables",
    [
        {"accuracy": NUM[:2], "density": DENSITY[:2], "x_start": NUM[:2]},
        {"accuracy": NUM, "density": DENSITY, "x": NUM},
        {"accuracy": NUM, "x_start": NUM},
        {"density": DENSITY, "x_start": NUM},
        {},
    ],
)
def test_nothing_is_told_of_too_little(tables):
    assert told(rows(**tables)) == []
