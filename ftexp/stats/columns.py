"""A score as a column over held-out rows, and its interval.

Every score is a ratio of two sums over rows: loss is nats over tokens, bits a byte is bits over bytes, a mean is values
over ones. Rows that hang together (one document, one author) are summed into one unit first; all that follows counts
units.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, t

Array = np.ndarray

SEED = 0
"""Seed of every draw below: the same table gives the same figures, and no table gets draws of its own."""
DRAWS = 4999
"""Resamples of an interval; its ends then move by 1 to 2 % of its width from seed to seed."""
FEW = 10
"""Units below which an interval is at least as wide as Student's."""
CHUNK = 1 << 22
"""Numbers held at once while draws are made."""


@dataclass(frozen=True, eq=False)
class Column:
    """One score of one trial, row by row: sum of `num` over sum of `den`."""

    num: Array
    """What is added up, (rows,): nats, or values of a mean."""
    den: Array
    """What it is divided by, (rows,): tokens, bytes, or ones."""
    least: float = -math.inf
    """What the score cannot be below; its interval ends there."""
    most: float = math.inf
    """What it cannot be above."""

    def __post_init__(self) -> None:
        if self.num.ndim != 1 or self.num.shape != self.den.shape or not len(self.num):
            raise ValueError(f"num and den must be rows of one length, got {self.num.shape} and {self.den.shape}")
        if not (self.den >= 0).all() or not self.den.sum() > 0:
            raise ValueError("den must be at least 0 in every row and above 0 in one")

    @property
    def value(self) -> float:
        """The score."""
        return float(self.num.sum() / self.den.sum())

    @property
    def is_share(self) -> bool:
        """Whether each row counts 0 or 1."""
        return bool((self.den == 1).all() and np.isin(self.num, (0, 1)).all())


@dataclass(frozen=True)
class Interval:
    """A score and where its true value lies."""

    value: float
    """The score."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""


def mean(values: ArrayLike) -> Column:
    """Make the column of a mean over rows.

    >>> mean([1, 0, 1, 1]).value
    0.75
    """
    num = np.asarray(values, dtype=float)
    return Column(num, np.ones_like(num))


def ratio(num: ArrayLike, den: ArrayLike) -> Column:
    """Make the column of a ratio of sums, such as nats over tokens.

    >>> ratio([2.0, 0.4], [1, 3]).value
    0.6
    """
    return Column(np.asarray(num, dtype=float), np.asarray(den, dtype=float))


def grouped(column: Column, groups: Sequence[Hashable] | None) -> Column:
    """Add up the rows of each group, in the order in which groups first occur; the score stays.

    >>> grouped(mean([1, 0, 1, 1]), ["a", "b", "a", "b"])
    Column(num=array([2., 1.]), den=array([2., 2.]), least=-inf, most=inf)
    """
    if groups is None:
        return column
    if len(groups) != len(column.num):
        raise ValueError(f"groups must name one group a row, got {len(groups)} for {len(column.num)} rows")
    numbers = {name: n for n, name in enumerate(dict.fromkeys(groups))}
    index = np.array([numbers[name] for name in groups])
    return replace(column, num=np.bincount(index, column.num), den=np.bincount(index, column.den))


def contributions(column: Column, at: float) -> Array:
    """Write a score as a mean over rows, (rows,): (num - at * den) / mean(den), whose mean is the score less `at`.

    This is the ratio's linearisation (Taylor series, Cochran 1977, section 2.11); for a mean it is `num - at`. Two
    trials with the same denominators differ by (num_a - num_b) / mean(den), whatever `at` is.

    >>> contributions(ratio([2.0, 0.4], [1, 3]), 0.0)
    array([1. , 0.2])
    """
    return (column.num - at * column.den) / column.den.mean()


def interval(
    column: Column, groups: Sequence[Hashable] | None = None, level: float = 0.95, draws: int = DRAWS
) -> Interval:
    """Interval of a score over the rows, or over the groups, that might have been held out.

    Bootstrap of whole units (Efron 1987, BCa), its tails widened for few units as an expanded percentile interval is
    (Hesterberg 2015, arXiv:1411.5279): each end takes the tail norm.cdf(-sqrt(n / (n - 1)) * t) in place of
    (1 - level) / 2. Coverage of 95 % intervals in 600 simulations, 24 rows / 128 rows (percentile, BCa, this one):

    - means of gamma(0.5) rows: 88.7, 90.0, 92.3 / 92.7, 92.7, 93.0
    - nats over tokens, exponential nats a token: 89.8, 89.7, 92.2 / 93.0, 94.0, 94.0
    - F1 with 70 % of rows at 1: 90.7, 94.0, 95.0 / 92.3, 93.3, 93.8

    A bootstrap of Student's ratio covers more of the skewed ones (94) and has no upper bound where rows are 0 or 1.
    Draws of few units never leave their range, so below `FEW` units an end is Student's where that lies farther out:
    of 2, 3, 5 and 8 normal rows 96, 95, 96 and 96 % are covered, where the bootstrap alone covers 51, 75, 92 and 94; of
    gamma(0.5) rows 83, 81, 84 and 90 (1000 simulations).
    Columns of 0 and 1 take Wilson's score interval (1927), which keeps its width at 0 and at 1, over as many rows as
    their groups are worth (`effective`).

    Edge cases: one unit, or a number that is not finite, gives NaN for both ends; equal rows give an interval of no
    width, unless they are all 0 or all 1.

    >>> found = interval(mean([1.0] * 24))
    >>> round(found.low, 3), found.high
    (0.862, 1.0)
    """
    units = grouped(column, groups)
    if not np.isfinite(units.num).all() or len(units.num) < 2:
        return Interval(column.value, np.nan, np.nan)
    if column.is_share:
        return Interval(column.value, *wilson(column.value, effective(column, groups, level), level))
    resampled = resample([units], draws)
    low, high = bca(resampled, np.array([units.value]), contributions(units, units.value)[:, None], level)
    return Interval(column.value, max(column.least, float(low[0])), min(column.most, float(high[0])))


def effective(column: Column, groups: Sequence[Hashable] | None, level: float = 0.95) -> float:
    """Count the independent rows of 0 and 1 that grouped ones are worth: rows over the design effect (Kish 1965).

    The design effect is the share's variance by groups over that of independent rows. It is an estimate, so the count
    is taken times the square of the normal quantile over Student's (Korn and Graubard 1998), and is never above the
    rows. Where all rows are alike nothing tells how groups hang together, and each counts as one row. In 1000
    simulations each of 6, 12 and 20 groups, correlated by 0.5, 0.5 and 0.9, intervals covered 99, 93 and 95 %.

    >>> round(effective(mean([1, 1, 0, 0, 1, 1, 0, 0] * 4), list("aabbccdd" * 4)), 1), effective(mean([1, 0, 1]), None)
    (1.1, 3)
    >>> effective(mean([1, 1, 1, 1]), ["a", "a", "b", "c"])
    3
    """
    rows = len(column.num)
    if groups is None:
        return rows
    units, share = grouped(column, groups), column.value
    n = len(units.num)
    variance = float(contributions(units, share).var(ddof=1)) / n if n > 1 else 0.0
    if share in (0, 1) or n < 2:
        return n
    careful = (norm.isf((1 - level) / 2) / t.isf((1 - level) / 2, n - 1)) ** 2
    return float(careful * min(rows, share * (1 - share) / variance if variance > 0 else rows))


def difference(a: Interval, b: Interval) -> Interval:
    """Interval of the difference of two scores of independent rows, from the intervals of both.

    Each end takes the root of the sum of squares of the half widths that lead there (MOVER, Zou and Donner 2008).

    >>> difference(Interval(9.0, 6.0, 13.0), Interval(3.0, 0.0, 7.0))
    Interval(value=6.0, low=1.0, high=11.0)
    """
    value = a.value - b.value
    low, high = math.hypot(a.value - a.low, b.high - b.value), math.hypot(a.high - a.value, b.value - b.low)
    return Interval(value, value - low, value + high)


def wilson(share: float, rows: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share: all p with |share - p| <= z * sqrt(p * (1 - p) / rows).

    >>> [round(end, 4) for end in wilson(0.75, 24)]
    [0.551, 0.88]
    """
    z2 = norm.isf((1 - level) / 2) ** 2
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = np.sqrt(z2 * (share * (1 - share) / rows + z2 / (4 * rows**2))) / (1 + z2 / rows)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def resample(units: Sequence[Column], draws: int = DRAWS) -> Array:
    """Bootstrap several trials over the same units, the same draw for all of them.

    Returns:
        Scores, (draws, trials). A draw whose denominators are all 0 counts as the score itself.
    """
    n = len(units[0].num)
    num, den = (np.stack([getattr(u, part) for u in units], axis=1) for part in ("num", "den"))  # (units, trials)
    values = num.sum(axis=0) / den.sum(axis=0)
    rng, size, drawn = np.random.default_rng(SEED), max(1, CHUNK // n), []
    for begin in range(0, draws, size):
        counts = rng.multinomial(n, np.full(n, 1 / n), min(size, draws - begin)).astype(float)  # (draws, units)
        below = counts @ den
        drawn.append(np.where(below > 0, counts @ num / np.where(below > 0, below, 1), values))
    return np.concatenate(drawn)


def bca(resampled: Array, values: Array, parts: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Ends of bias-corrected and accelerated intervals with widened tails, or Student's; see `interval`.

    Args:
        resampled: bootstrap scores, (draws, scores).
        values: the scores, (scores,).
        parts: their centred contributions, (units, scores); their skewness is the acceleration.
        level: share of true values that intervals should cover.

    Returns:
        Low and high ends, (scores,) each.
    """
    n = len(parts)
    wide = math.sqrt(n / (n - 1)) * float(t.isf((1 - level) / 2, n - 1))
    below = ((resampled < values).mean(axis=0) + (resampled <= values).mean(axis=0)) / 2
    bias = norm.ppf(np.clip(below, 1 / len(resampled), 1 - 1 / len(resampled)))
    squares = (parts**2).sum(axis=0)
    skewness = (parts**3).sum(axis=0) / np.where(squares > 0, squares, 1) ** 1.5
    ends = []
    for z in (bias - wide, bias + wide):
        at = norm.cdf(bias + z / np.maximum(1 - skewness / 6 * z, 1e-3))  # few skewed rows reach the outermost draw
        ends.append(np.array([np.quantile(c, a) for c, a in zip(resampled.T, at, strict=True)]))
    if n >= FEW:
        return ends[0], ends[1]
    half = float(t.isf((1 - level) / 2, n - 1)) * np.sqrt(squares / (n - 1) / n)
    return np.minimum(ends[0], values - half), np.maximum(ends[1], values + half)
