"""Tables of two things that networks are or are not."""

import pytest

from windfall.contingency import Table, told


def test_a_table_by_hand():
    found = Table.of([True] * 8 + [False] * 4, [True] * 6 + [False] * 5 + [True])
    assert (found.both, found.first, found.second, found.neither) == (6, 2, 1, 3)
    assert found.agreement == 0.75
    assert found.phi == pytest.approx((6 * 3 - 2 * 1) / (8 * 4 * 7 * 5) ** 0.5)
    # Wilson, z = 1.96: (p + z²/2n -+ z sqrt(p q / n + z²/4n²)) / (1 + z²/n)
    low, high = found.interval()
    z, n, p = 1.959964, 12, 0.75
    middle, reach = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert low == pytest.approx((middle - reach) / (1 + z**2 / n), abs=1e-6)
    assert high == pytest.approx((middle + reach) / (1 + z**2 / n), abs=1e-6)
    # hypergeometric: margins 8, 4 and 7, 5; tables as rare as this one or rarer
    assert found.p_value == pytest.approx(0.2222222, abs=1e-6)


def test_things_that_never_vary_are_not_correlated():
    found = Table(5, 0, 3, 0)
    assert found.phi is None
    assert found.p_value == 1


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (-1, 2, 0, 0)])
def test_counts_of_nothing_are_refused(counts):
    with pytest.raises(ValueError, match="counts must be at least 0"):
        Table(*counts)


def row(arm, metric, *values):
    return {"arm": arm, "metric": metric, "runs": [{"value": value} for value in values]}


def test_a_study_tells_whether_matching_is_stable():
    rows = [
        row("ticket", "matching", 1.0, 1.0, None),
        row("ticket", "stable", 1.0, 0.0, 1.0),
        row("random", "matching", 0.0, 0.0, 0.0),
        row("random", "stable", 0.0, 0.0, 0.0),
        row("dense", "stable", 1.0, 1.0, 1.0),  # nothing to match
    ]
    (sentence,) = told(rows)
    assert "Of 5 pruned networks (ticket, random) 1 are both, 1 matching alone" in sentence
    assert "0 stable alone, 3 neither: they agree in 80%" in sentence
    assert told(rows[-1:]) == []
