"""Training noise between seeds, what a sweep can detect at all, and how far the best of many looks too good.

The model behind `power`, for the difference of two points with S seeds each on n rows:
variance = 2 * seed ** 2 / S + 2 * mixed ** 2 / (S * n) + rows ** 2 / n, the parts as in `Spread`. More rows never
shrink the first part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import binom, chi2, f, norm, studentized_range, t

ALPHA = 0.05
POWER = 0.8
MOST_ROWS = 10_000_000
"""Beyond this many rows `needed` gives up: more rows do not help against noise between seeds."""


@dataclass(frozen=True)
class Seeds:
    """Noise between runs of one point that differ in nothing but the seed."""

    sd: float
    """Standard deviation of a run's score, pooled over points; on these rows."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    """Upper end of its 95 % interval."""
    df: int
    """Degrees of freedom: runs less points."""


@dataclass(frozen=True)
class Spread:
    """Standard deviations of the noise, in units of the score."""

    rows: float
    """Over rows, of the paired difference of two points (`paired_sd`)."""
    seed: float = 0.0
    """Between runs of one point on endless rows."""
    mixed: float = 0.0
    """Over rows, of what a run adds to a row by chance; measured only with replicates, else it is within `rows`."""


def pooled(scores: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Pool the variance between seeds over points: sum of squares around each point's mean over its degrees.

    Args:
        scores: for each point, the scores of its runs.

    Returns:
        The variance and its degrees of freedom; (0, 0) where no point has two runs.

    >>> pooled([[1.0, 3.0], [5.0, 5.0, 8.0], [9.0]])
    (2.6666666666666665, 3)
    """
    df = sum(len(s) - 1 for s in scores)
    squares = sum(float(((np.asarray(s) - np.mean(s)) ** 2).sum()) for s in scores)
    return (squares / df, df) if df else (0.0, 0)


def noisier(scores: Sequence[Sequence[float]], alpha: float = ALPHA) -> list[int]:
    """Find the points whose seeds scatter more than those of the others can explain; noise is not pooled over them.

    The point with the largest variance against that of all others, as long as the F test tells it at `alpha` over the
    number of points that are left: where all scatter alike, one is found in at most `alpha` of all sweeps.

    Args:
        scores: for each point, the scores of its runs.
        alpha: error rate.

    Edge cases: others that do not scatter at all, as scores of 1 everywhere, say nothing about a point that does.

    >>> noisier([[0.10, 0.12, 0.11], [0.20, 0.19, 0.21], [3.0, 9.0, 5.0], [0.3]])
    [2]
    """
    left, found = [n for n, runs in enumerate(scores) if len(runs) > 1], []
    while len(left) > 1:
        own = {n: float(np.var(scores[n], ddof=1)) for n in left}
        widest = max(left, key=lambda n: own[n])
        rest = [n for n in left if n != widest]
        variance, df = pooled([scores[n] for n in rest])
        if not variance > 0 or f.sf(own[widest] / variance, len(scores[widest]) - 1, df) > alpha / len(left):
            break
        found.append(widest)
        left = rest
    return found


def seeds(scores: Sequence[Sequence[float]], level: float = 0.95) -> Seeds | None:
    """Measure training noise from replicates; None where no point has two runs.

    Pooling takes the noise for equal at all points. The interval is that of a normal variance:
    sd * sqrt(df / chi2 quantile). Two runs of one point tell next to nothing:

    >>> found = seeds([[0.10, 0.12]])
    >>> round(found.sd, 4), round(found.low, 4), round(found.high, 4)
    (0.0141, 0.0063, 0.4513)
    """
    variance, df = pooled(scores)
    if not df:
        return None
    sd = math.sqrt(variance)
    low, high = (sd * math.sqrt(df / chi2.isf(q, df)) for q in ((1 - level) / 2, (1 + level) / 2))
    return Seeds(sd, low, high, df)


def power(effect: float, rows: float, spread: Spread, seeds: int = 1, trials: int = 2, alpha: float = ALPHA) -> float:
    """Chance that two points whose scores truly differ by `effect` are told apart in a sweep.

    The test is the first step of `pairs.indistinguishable`: |T| above the studentised range over sqrt(2), which holds
    `alpha` over all pairs of the sweep (Tukey). With one seed T is noncentral Student's with rows - 1 degrees of
    freedom, here the average of normals over the chi-square distribution. With more, the bar lies between those of the
    seed part (trials * (seeds - 1) degrees of freedom) and of the row part, weighted by their variances (Cochran and
    Cox), and the average is over the seed part. Within 4 points of simulated sweeps from 24 rows on; below, signs give
    coarser p than Student's, and what is told is up to 14 points too high. Later steps find somewhat more.

    With one seed the test does not see training noise. What is returned then is the chance that these two runs are told
    apart; with `effect` 0 it is the rate of false winners a pair, above `alpha` where the noise between seeds matters.
    The exact test counts 2 ** rows signs and has no p below 2 ** (1 - rows): few rows have no power (`can_tell`).

    Args:
        effect: true difference, in units of the score.
        rows: held-out rows, or groups of rows.
        spread: noise of rows and of training.
        seeds: runs of each point.
        trials: points compared, all pairs of them.
        alpha: chance of any false difference in the sweep.

    >>> round(power(0.5, 64, Spread(1.0)), 3), round(power(0.5, 64, Spread(1.0), trials=6), 3)
    (0.976, 0.85)
    """
    row_part = spread.rows**2 / rows
    seed_part = 2 * (spread.seed**2 + spread.mixed**2 / rows) / seeds
    total = row_part + seed_part
    if not can_tell(rows, seeds, alpha):
        return 0.0
    seen = total if seeds > 1 else row_part + 2 * spread.mixed**2 / rows
    if seen == 0:
        return float(effect != 0 or total > 0)
    shift = abs(effect) / math.sqrt(total)
    middles = (np.arange(400) + 0.5) / 400  # of equally likely draws
    if seeds == 1:
        bars = critical(trials, rows - 1, alpha) * np.sqrt(chi2.ppf(middles, rows - 1) / (rows - 1) * seen / total)
    else:
        df = trials * (seeds - 1)
        drawn = seed_part * chi2.ppf(middles, df) / df
        weighted = drawn * critical(trials, df, alpha) + row_part * critical(trials, rows - 1, alpha)
        bars = weighted / np.sqrt((drawn + row_part) * total)
    return float((norm.sf(bars - shift) + norm.cdf(-bars - shift)).mean())


def can_tell(rows: float, seeds: int = 1, alpha: float = ALPHA) -> bool:
    """Tell whether any difference on so few rows can be told: with one seed all signs and their mirror are the best p.

    >>> can_tell(5), can_tell(6)
    (False, True)
    """
    return seeds > 1 or 2.0 ** (1 - rows) <= alpha


def critical(trials: int, df: float, alpha: float = ALPHA) -> float:
    """Bar for the largest |T| over all pairs of equal trials: studentised range over sqrt(2), Student's t for two.

    >>> round(critical(2, 10), 3), round(critical(6, 10), 3)
    (2.228, 3.473)
    """
    if trials == 2:
        return float(t.isf(alpha / 2, df))
    return _range(trials, math.inf if df > 2000 else float(f"{df:.2g}" if df > 30 else f"{df:.3g}"), alpha)


@lru_cache(maxsize=4096)
def _range(trials: int, df: float, alpha: float) -> float:
    return float(studentized_range.isf(alpha, trials, df)) / math.sqrt(2)


@dataclass(frozen=True)
class Plan:
    """A way to reach a power."""

    seeds: int
    """Runs of each point."""
    rows: int | None
    """Held-out rows; None where no number of rows is enough."""
    power: float
    """Chance that the effect is found with them; where `rows` is None, with as many rows as one likes."""
    false: float
    """Chance that two equal points are told apart: at most alpha with two seeds, more with one and training noise."""


def needed(
    effect: float, spread: Spread, seeds: int = 1, trials: int = 2, alpha: float = ALPHA, target: float = POWER
) -> Plan:
    """Fewest rows with which `power` reaches `target`; arguments as there.

    >>> needed(0.5, Spread(1.0)).rows
    34
    >>> needed(0.5, Spread(1.0, seed=0.5), seeds=2).rows is None  # no number of rows helps
    True
    """

    def reached(rows: int, effect: float = effect) -> float:
        return power(effect, rows, spread, seeds, trials, alpha)

    low, high = 1, 2
    while reached(high) < target and high < MOST_ROWS:
        low, high = high, high * 2
    enough = reached(high) >= target
    while enough and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= target else (middle, high)
    return Plan(seeds, high if enough else None, reached(high), reached(high, 0.0))


def detectable(
    rows: int, spread: Spread, seeds: int = 1, trials: int = 2, alpha: float = ALPHA, target: float = POWER
) -> float:
    """Smallest difference that `power` finds with chance `target`; arguments as there.

    NaN for fewer than two rows, for so few that they tell no difference, and where noise that the test does not see
    tells equal points apart with that chance already (`power` with `effect` 0).

    >>> round(detectable(34, Spread(1.0)), 3)
    0.495
    """
    if rows < 2 or math.isnan(spread.rows) or not can_tell(rows, seeds, alpha):
        return math.nan
    scale = math.sqrt(spread.rows**2 / rows + 2 * (spread.seed**2 + spread.mixed**2 / rows) / seeds)

    def missing(effect: float) -> float:
        return power(effect, rows, spread, seeds, trials, alpha) - target

    if scale == 0:
        return 0.0
    if missing(0) >= 0:
        return math.nan
    high = scale
    while missing(high) < 0:
        high *= 2
    return float(brentq(missing, 0, high, xtol=1e-6 * scale))  # type: ignore[arg-type]


def paired_sd(sd: float, correlation: float) -> float:
    """Standard deviation over rows of a paired difference: sd * sqrt(2 * (1 - correlation)).

    Args:
        sd: of one trial's rows.
        correlation: between the rows of two trials; hard rows are hard for both, so it is high.

    >>> round(paired_sd(0.15, 0.8), 4)
    0.0949
    """
    return sd * math.sqrt(2 * (1 - correlation))


@cache
def expected_maximum(trials: int) -> float:
    """Expected maximum of that many standard normal numbers: by how many standard errors the best of equals flatters.

    The integral of x * K * phi(x) * Phi(x) ** (K - 1).

    >>> [round(expected_maximum(k), 3) for k in (1, 2, 3, 6, 50)]
    [0.0, 0.564, 0.846, 1.267, 2.249]
    """

    def part(x: float) -> float:
        return x * trials * math.exp(norm.logpdf(x) + (trials - 1) * norm.logcdf(x))

    return quad(part, -40, 40, points=[0, math.sqrt(2 * math.log(trials))], limit=200)[0]


def expected_best_share(trials: int, rows: int, share: float) -> float:
    """Expected best share of several trials that are all truly `share`: exact for independent binomials.

    1 - mean over j < rows of F(j) ** trials, F the binomial distribution. Trials that err on the same rows differ less,
    and the best of them looks less too good.

    >>> round(expected_best_share(50, 200, 0.7), 3)
    0.771
    """
    return float(1 - (binom.cdf(np.arange(rows), rows, share) ** trials).mean())
