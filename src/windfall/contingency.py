"""Contingency: whether two things that networks either are or are not go together.

    found = Table.of([True, True, False], [True, False, False])
    found.agreement, found.interval(), found.phi, found.p_value

Of a study's table of arms, `told` says whether the networks that match the dense one are those that
are stable.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from windfall.spec import Json
from windfall.stats import Interval, share_interval

PAIR = ("matching", "stable")  # metrics of 0 or 1; Source: 1912.05671, section 4


@dataclass(frozen=True)
class Table:
    """How many of n >= 1 networks are both, one or neither of two things.

    Args:
        both: are the one and the other.
        first: are the one alone.
        second: are the other alone.
        neither: are none.
    """

    both: int
    first: int
    second: int
    neither: int

    def __post_init__(self) -> None:
        """Refuse counts of nothing."""
        counts = (self.both, self.first, self.second, self.neither)
        if min(counts) < 0 or not sum(counts):
            raise ValueError(f"counts must be at least 0, and one of them more; got {counts}.")

    @classmethod
    def of(cls, ones: Sequence[bool], others: Sequence[bool]) -> "Table":
        """The table of two sequences, whose i-th values are of one network."""
        pairs = list(zip(ones, others, strict=True))
        cells = ((True, True), (True, False), (False, True), (False, False))
        return cls(*(pairs.count(cell) for cell in cells))

    @property
    def total(self) -> int:
        """n."""
        return self.both + self.first + self.second + self.neither

    @property
    def agreement(self) -> float:
        """The share of networks that are both or neither, in [0, 1]."""
        return (self.both + self.neither) / self.total

    def interval(self, level: float = 0.95) -> Interval:
        """Wilson's interval of the agreement, for networks that are independent.

        Args:
            level: confidence, in (0, 1).
        """
        return share_interval(self.both + self.neither, self.total, level)

    @property
    def phi(self) -> float | None:
        """The correlation of the two, in [-1, 1]; None where all are alike in one of them.

        (both neither - first second) / sqrt(product of the four margins)
        """
        a, b, c, d = self.both, self.first, self.second, self.neither
        margins = (a + b) * (c + d) * (a + c) * (b + d)
        return (a * d - b * c) / math.sqrt(margins) if margins else None

    @property
    def p_value(self) -> float:
        """Fisher's exact test of independence, two-sided; 1 where all are alike in one of them."""
        tested: Any = stats.fisher_exact([[self.both, self.first], [self.second, self.neither]])
        return float(tested.pvalue)


def told(rows: Iterable[Json]) -> list[str]:
    """In words, whether matching networks are the stable ones, over all arms and seeds.

    Nothing, where no arm has both metrics.

    Args:
        rows: of a study's table of arms, each with `arm`, `metric` and `runs`.
    """
    values = {(row["arm"], row["metric"]): row["runs"] for row in rows}
    arms = [arm for arm, metric in values if metric == PAIR[0] and (arm, PAIR[1]) in values]
    pairs = [pair for arm in arms for pair in _paired(*(values[arm, name] for name in PAIR))]
    return [_sentence(Table.of(*zip(*pairs, strict=True)), arms)] if pairs else []


def _paired(
    ones: Sequence[Mapping[str, float | None]], others: Sequence[Mapping[str, float | None]]
) -> list[tuple[bool, bool]]:
    """Of every seed whose run there is, whether it is the one and the other."""
    found = [(a["value"], b["value"]) for a, b in zip(ones, others, strict=True)]
    return [(bool(a), bool(b)) for a, b in found if a is not None and b is not None]


def _sentence(found: Table, arms: Sequence[str]) -> str:
    low, high = found.interval()
    one, other = PAIR
    phi = "" if found.phi is None else f", phi = {found.phi:.2f}, Fisher's p = {found.p_value:.2g}"
    return (
        f"Is {one} the same as {other}? Of {found.total} pruned networks ({', '.join(arms)})"
        f" {found.both} are both, {found.first} {one} alone, {found.second} {other} alone,"
        f" {found.neither} neither: they agree in {found.agreement:.0%} [{low:.0%}, {high:.0%}]"
        f"{phi}, as if all were independent; those of one seed are not."
    )
