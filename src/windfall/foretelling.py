"""Foretelling: whether what networks are at their start says how accurate they are at the end.

between(signal, accuracy)                 # over arms, seed by seed
within(signal, accuracy)                  # over seeds, arm by arm

Both are of tables [arm, seed]. Of a study's table of arms, `told` says it for every signal at the
start, beside what the density alone foretells.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from windfall.measures import START
from windfall.spec import Json
from windfall.stats import Interval, mean_interval

OUTCOME, YARDSTICK = "accuracy", "density"
FEWEST = 3  # arms: two are always in order

Table = NDArray[np.float64]  # [arm, seed], NaN where a run failed
Runs = Sequence[Mapping[str, Any]]


class Within(NamedTuple):
    """A correlation pooled over arms.

    Args:
        r: in [-1, 1].
        degrees: of freedom, values less arms.
        interval: of r; None for fewer than 3 degrees.
    """

    r: float
    degrees: int
    interval: Interval | None


def between(signal: Table, outcome: Table) -> list[float | None]:
    """Spearman's rank correlation over arms, in [-1, 1], of every seed.

    None where the signal or the outcome is the same in all arms.

    Source: Spearman, "The Proof and Measurement of Association between Two Things", 1904.

    Args:
        signal: finite, [arm, seed].
        outcome: the same.
    """
    return [_spearman(*pair) for pair in zip(signal.T, outcome.T, strict=True)]


def _spearman(ones: Table, others: Table) -> float | None:
    if not np.ptp(ones) or not np.ptp(others):
        return None
    tested: Any = stats.spearmanr(ones, others)
    return float(tested.statistic)


def within(signal: Table, outcome: Table, level: float = 0.95) -> Within | None:
    """Pearson's correlation of what is left without each arm's mean over seeds, over all arms.

    Its interval is Fisher's, tanh(artanh r -+ z / sqrt(degrees - 2)), for values that are
    independent: an arm's mean takes one degree of freedom. None where the signal or the outcome is
    the same in all seeds of every arm, or where there are no seeds.

    Source: Fisher, "On the 'Probable Error' of a Coefficient of Correlation Deduced from a Small
    Sample", Metron 1, 1921.

    Args:
        signal: finite, [arm, seed].
        outcome: the same.
        level: confidence, in (0, 1).
    """
    if not signal.size or not np.ptp(signal, axis=1).any() or not np.ptp(outcome, axis=1).any():
        return None
    left = [(table - table.mean(1, keepdims=True)).ravel() for table in (signal, outcome)]
    tested: Any = stats.pearsonr(*left)
    r, degrees = float(tested.statistic), signal.size - len(signal)
    if degrees < 3:
        return Within(r, degrees, None)
    if abs(r) == 1:
        return Within(r, degrees, Interval(r, r))
    ends = stats.norm.interval(level, loc=math.atanh(r), scale=1 / math.sqrt(degrees - 2))
    return Within(r, degrees, Interval(*(math.tanh(end) for end in ends)))


# -- in words --------------------------------------------------------------------------------------


def told(rows: Iterable[Json]) -> list[str]:
    """In words, whether each signal at the start foretells the accuracy at the end.

    Seeds of which a run failed are left out. Nothing, where fewer than 3 arms have both.

    Args:
        rows: of a study's table of arms, each with `arm`, `metric` and `runs`.
    """
    values = {(row["arm"], row["metric"]): row["runs"] for row in rows}
    names = list(dict.fromkeys(name for _, name in values if name.endswith(START)))
    needed = (OUTCOME, YARDSTICK, *names)
    arms = list(dict.fromkeys(arm for arm, _ in values))
    arms = [arm for arm in arms if all((arm, name) in values for name in needed)]
    if not names or len(arms) < FEWEST:
        return []
    tables = {name: _table([values[arm, name] for arm in arms]) for name in needed}
    outcome, yardstick = tables[OUTCOME], tables[YARDSTICK]
    known = _spread(between(*_whole(yardstick, outcome)))
    lead = (
        f"Do signals at the start foretell the accuracy at the end? Over {len(arms)} arms, the rank"
        f" correlation of {YARDSTICK} with it (Spearman's, mean over seeds and 95% interval) is"
        f" {known}: a signal that does not exceed it foretells no more than the number of weights"
        " does. Within arms, over seeds, correlations are Pearson's less each arm's means, as if"
        " all runs were independent; those of one seed are not."
    )
    return [lead, *(_sentence(name, tables[name], outcome, yardstick) for name in names)]


def _table(rows: Sequence[Runs]) -> Table:
    return np.array([[run["value"] for run in runs] for runs in rows], dtype=np.float64)


def _whole(*tables: Table) -> list[Table]:
    """The tables without the seeds of which a run failed."""
    is_known = np.isfinite(np.stack(tables)).all((0, 1))
    return [table[:, is_known] for table in tables]


def _sentence(name: str, signal: Table, outcome: Table, yardstick: Table) -> str:
    signal, outcome, yardstick = _whole(signal, outcome, yardstick)
    rhos, inside = between(signal, outcome), within(signal, outcome)
    beside = _beside(rhos, between(yardstick, outcome))
    told = "unknown" if inside is None else f"{inside.r:+.2f}{_ends(inside.interval)}"
    return f"{name}: {_spread(rhos)}{beside}; within arms {told}, n = {signal.size}."


def _spread(rhos: Sequence[float | None]) -> str:
    """Mean and interval of those that are known, no farther than correlations can be."""
    known = [rho for rho in rhos if rho is not None]
    if not known:
        return "unknown"
    interval = mean_interval(known)
    possible = None if interval is None else Interval(max(-1, interval.low), min(1, interval.high))
    return f"{fmean(known):+.2f}{_ends(possible)}, n = {len(known)}"


def _ends(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval.low:+.2f}, {interval.high:+.2f}]"


def _beside(rhos: Sequence[float | None], others: Sequence[float | None]) -> str:
    """Whether a signal's correlation is further from 0 than the yardstick's, seed by seed.

    Each counts in the direction of its own mean.
    """
    pairs = [(a, b) for a, b in zip(rhos, others, strict=True) if a is not None and b is not None]
    if not pairs:
        return ""
    ones, bases = (np.multiply(each, np.sign(fmean(each))) for each in zip(*pairs, strict=True))
    interval = mean_interval((ones - bases).tolist())
    if interval is None or interval.low <= 0 <= interval.high:
        return f", not told apart from {YARDSTICK}"
    return f", {'more' if interval.low > 0 else 'less'} than {YARDSTICK}"
