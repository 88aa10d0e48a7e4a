"""Which points of a sweep differ: paired tests of all pairs, and the points that may be the best.

A point is what was swept; its runs differ in the seed alone. All runs are scored on the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from scipy.stats import t

from ftexp.metrics import Direction
from ftexp.stats import noise
from ftexp.stats.columns import (
    CHUNK,
    DRAWS,
    SEED,
    Array,
    Column,
    Interval,
    bca,
    contributions,
    effective,
    grouped,
    resample,
    wilson,
)

SIGNS = 9999
"""Random sign vectors of a test: the smallest p is 1 / 10000. More where many pairs ask for smaller ones."""
MOST_SIGNS = 99_999
NOTHING = 1e-12
"""A difference of scores that is rounding."""


@dataclass(frozen=True)
class Pair:
    """Two points compared."""

    first: int
    """Number of one point."""
    second: int
    """Number of the other."""
    difference: float
    """Score of the first less score of the second."""
    low: float
    """Lower end of the difference's interval, for this pair alone."""
    high: float
    """Upper end of the difference's interval."""
    p: float
    """Two-sided p of this pair alone."""
    holm: float
    """p corrected by Holm over all pairs: at most alpha of all sweeps of equals show one below alpha."""
    joint: float
    """p corrected by the largest of all pairs: how often equal points differ this much somewhere in the sweep."""


@dataclass(frozen=True)
class Comparison:
    """All points of a sweep compared by one score."""

    scores: tuple[Interval, ...]
    """Score of each point, mean over its runs, with its interval."""
    pairs: tuple[Pair, ...]
    """Every pair once, first < second."""
    best: int
    """Number of the point with the best score, the first of equals."""
    p_best: tuple[float, ...]
    """For each point the largest alpha at which it is not told apart from the best; 1 for the best."""
    seeds: noise.Seeds | None
    """Noise between seeds, without that of `noisier`; None without replicates, and then no p knows about it."""
    spread: noise.Spread
    """What a plan for the next sweep needs to know; its `rows` is the median over pairs that may be the best."""
    optimism: float
    """How much too good the best is expected to look, were all points equal; 0 for one point, NaN for one row."""
    noisier: tuple[int, ...]
    """Numbers of the points whose seeds scatter more than those of the others can explain (`noise.noisier`)."""


@dataclass(frozen=True)
class Tied:
    """The points that cannot be told from the best."""

    best: int
    """Number of the point with the best score."""
    members: tuple[int, ...]
    """Numbers of all points that may be the best, `best` included."""
    cheapest: int
    """The cheapest of them; the better score decides between equal costs."""


@dataclass(frozen=True)
class _Table:
    """Points over the same units, lower is better."""

    parts: Array
    """Contributions to the score, mean over a point's runs, (points, units)."""
    values: Array
    """Scores, (points,)."""
    runs: Array
    """Runs of each point, (points,)."""
    seed: Array
    """Variance between runs of each point, pooled over the points of its kind, (points,)."""
    df: Array
    """Its degrees of freedom, (points,); 0 without replicates."""
    mixed: Array
    """Variance between a point's runs at one unit, beyond what moves the run as a whole: run times unit, (points,)."""
    kind: Array
    """Number of the points whose seeds scatter alike, (points,): 0, and one more for each point of `noise.noisier`."""

    @property
    def twice(self) -> Array:
        """What of `mixed` the seed part holds already: no more than that is, which two runs may give as nothing."""
        return np.minimum(self.mixed, self.seed * self.parts.shape[1])

    @property
    def replicated(self) -> bool:
        """Whether the noise between seeds is known."""
        return bool(self.df.any())

    def seed_part(self, couples: Array) -> Array:
        """Variance of the difference of two points by their seeds, (pairs,)."""
        return (self.seed / self.runs)[couples].sum(axis=1)


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values by Holm (1979): sorted, times tests left, never smaller than the one before, at most 1.

    The chance of any false rejection stays at most alpha, however the tests depend on each other.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()


def compare(
    points: Sequence[Sequence[Column]], direction: Direction, groups: Sequence[Hashable] | None = None,
    level: float = 0.95, signs: int = SIGNS, draws: int = DRAWS,
) -> Comparison:  # fmt: skip
    """Compare points pairwise on the rows they share.

    Statistic of a pair: difference of the scores over the root of (seed part + row part).

    - The row part is a paired permutation test: under equality the sign of a row's difference
      (`columns.contributions`; nats over mean tokens where both count the same tokens) is a coin. All 2 ** rows signs
      are counted where there are at most `signs` of them up to mirror images, otherwise random ones, and
      p = (1 + as large) / (1 + drawn) (Phipson and Smyth 2010). Where trials have denominators of their own, as with
      two tokenizers, the ratios' linearised differences are flipped, which holds for many rows.
    - The seed part is normal with the variance between runs of a point, pooled over points, over their number. A point
      whose seeds scatter more than those of the others can explain (`noise.noisier`) keeps its own variance and its own
      few degrees of freedom, so that one unstable point neither blurs the others nor borrows their certainty. What run
      times row adds to both parts is taken out of the row part, whose signs then flip around the pair's difference;
      never more than the seed part holds, for two runs may agree by chance.
      Both variances are estimates, so each part is stretched in each draw as Student's t is (Behrens and Fisher's
      solution, which errs to the safe side: a bootstrap that studentises instead told apart 9 % of equal pairs with two
      runs each, this one 5 %); with no row part this is Tukey's studentised range. Two runs a point are enough, because
      six points then give six degrees of freedom; bootstrapping two seeds would halve their variance. Of six equal
      points with three runs each, one of them ten times as noisy as the others, 7 % of sweeps tell some point apart
      (24 % were it pooled); three times as noisy, which the F test often does not see, 11 %. With two runs a noisy
      point may agree with itself by chance: 20 %.
    - Without replicates there is no seed part: p is then about these adapters on other rows of the kind, not about
      training again.

    One sign serves a row in all pairs, so their dependence is kept; `joint` and `p_best` are maxima over pairs of such
    draws (Westfall and Young 1993). Signs rather than permuting the points within a row: a pair's null distribution of
    rows then depends on this pair alone, so one bad trial does not blur the others, and points that differ in variance
    or in correlation keep their rate.

    What is said of the sweep's noise, `spread` and `optimism`, is measured on the points that may be the best, the two
    best at least: a trial that broke says nothing about how well the others can be told apart.

    Intervals: of a score and of a difference, the BCa interval over rows (`columns.interval`) joined with Student's
    interval over seeds by the root of the sum of squares of the half widths, each side for itself (MOVER, Zou and
    Donner 2008), and end where the score does (`Column.least`). They are not corrected for the number of pairs.

    Args:
        points: for each point, the column of each of its runs; all over the same rows.
        direction: which way the score improves.
        groups: group of each row; rows of a group are one unit.
        level: of the intervals.
        signs: random sign vectors; raised to 40 a pair so that Holm can still find something.
        draws: bootstrap draws of the intervals.

    Edge cases: equal rows in two points give p = 1; one unit gives p = 1, however many runs, intervals of NaN, and
    neither a spread over rows nor optimism; a value that is not finite is refused.

    >>> a, b = [1, 1, 1, 1, 0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    >>> from ftexp.stats.columns import mean
    >>> found = compare([[mean(a)], [mean(b)]], Direction.maximize)
    >>> found.best, found.pairs[0].p == 2 / 2 ** 8  # eight rows differ, all to one side
    (0, True)
    """
    units = [[grouped(column, groups) for column in runs] for runs in points]
    table = _table(units, direction)
    resampled, centred = _resampled(units, draws), _centred(units)
    scores = _scores(points, resampled, centred, table, groups, level)
    best = int(np.argmin(table.values))
    noisier = tuple(np.flatnonzero(table.kind).tolist())
    seeds = noise.seeds([[c.value for c in runs] for runs, kind in zip(units, table.kind, strict=True) if not kind])
    if len(points) == 1:
        return Comparison(tuple(scores), (), 0, (1.0,), seeds, _spread(table, np.empty(0)), 0.0, ())
    couples = np.array(list(combinations(range(len(points)), 2)))
    couples, steps, losers = _elimination(_statistics(table, couples)[0], couples)
    observed, scale, share = _statistics(table, couples)
    bars = np.abs(observed) * (1 - 1e-12)  # sums in another order differ in their last digits
    firsts = np.searchsorted(steps, np.arange(len(losers)))  # where the pairs of each step begin
    asked = np.maximum.reduceat(bars, firsts)
    alone, joint, step = np.zeros(len(couples)), np.zeros(len(couples)), np.zeros(len(losers))
    exact = not table.replicated and table.parts.shape[1] <= 1 + math.log2(signs)
    drawn = 0
    for noisy in _null(table, couples, scale, share, min(max(signs, 40 * len(couples)), MOST_SIGNS), exact):
        drawn += noisy.shape[1]
        largest = np.maximum.reduceat(noisy, firsts, axis=0)
        largest = np.maximum.accumulate(largest[::-1], axis=0)[::-1]  # over all pairs still in at a step
        alone += np.count_nonzero(noisy >= bars[:, None], axis=1)
        joint += noisy.shape[1] - np.searchsorted(np.sort(largest[0]), bars)
        step += np.count_nonzero(largest >= asked[:, None], axis=1)
    more = 0 if exact else 1
    alone, joint, step = ((more + counted) / (more + drawn) for counted in (alone, joint, step))
    single = table.parts.shape[1] == 1  # one unit shows no noise of rows, which is not to say that there is none
    if single:
        alone, joint, step = (np.ones_like(p) for p in (alone, joint, step))
    p_best = np.ones(len(points))
    p_best[losers] = np.maximum.accumulate(step)
    values = np.array([s.value for s in scores])
    difference, low, high = _differences(values, resampled, centred, table, couples, share, level)
    told = zip(couples.tolist(), difference, low, high, alone, holm(alone.tolist()), joint, strict=True)
    pairs = [Pair(a, b, *map(float, found)) for (a, b), *found in told]
    near = _near(table, p_best)
    beside = np.isin(couples, near).all(axis=1)
    apart = table.parts[couples[:, 0]] - table.parts[couples[:, 1]]
    spread = _spread(table, np.empty(0) if single else (share * apart.std(axis=1, ddof=1))[beside])
    pairs.sort(key=lambda pair: (pair.first, pair.second))
    ahead = math.nan if single else _optimism(table, near, float(np.median(share[beside])), signs, exact)
    return Comparison(tuple(scores), tuple(pairs), best, tuple(p_best.tolist()), seeds, spread, ahead, noisier)


def _near(table: _Table, p_best: Array) -> Array:
    """Numbers of the points that may be the best, the two best at least.

    Noise is measured on these: a point that is far behind, as one whose training broke, has noise of another size, and
    so has one of `noise.noisier`, which is never far behind for sure. Only where two others are not left it counts too.
    """
    calm = (table.kind == 0) if (table.kind == 0).sum() > 1 else np.ones(len(table.kind), dtype=bool)
    near = (p_best > noise.ALPHA) & calm
    near[np.argsort(np.where(calm, table.values, np.inf), kind="stable")[:2]] = True
    return np.flatnonzero(near)


def _optimism(table: _Table, near: Array, share: float, signs: int, exact: bool) -> float:
    """How much too good the best is expected to look, were all points equal, and as noisy as those near the best."""
    rng, ahead, drawn = np.random.default_rng(SEED), 0.0, 0
    centred = table.parts[near] - table.parts[near].mean(axis=1, keepdims=True)
    for flips in _flips(rng, table.parts.shape[1], signs, exact, len(near)):
        found = centred @ flips / table.parts.shape[1]  # (points, draws)
        if table.replicated:
            seed = np.sqrt(table.seed / table.runs)[near, None]
            found = found * share + rng.standard_normal(found.shape) * seed
        ahead += float((found.max(axis=0) - found.min(axis=0)).sum()) / 2  # a draw and its mirror image
        drawn += found.shape[1]
    more = noise.expected_maximum(len(table.values)) / noise.expected_maximum(len(near))
    return more * ahead / drawn


def indistinguishable(comparison: Comparison, costs: Sequence[float] | None = None, alpha: float = noise.ALPHA) -> Tied:
    """Find the points that cannot be told from the best, and the cheapest of them.

    The model confidence set of Hansen, Lunde and Nason (2011) with the range statistic: test that all points left are
    equal by their largest pair, drop the worse of that pair where they are not, go on until they may be. At most
    `alpha` of all sweeps lose a point that is truly best, ties included: of six equal points all six stay in 95 of 100
    sweeps, though the best was chosen by the same rows.

    Why not something else:

    - Holm over all pairs holds the same error, and pays for every pair at the first step and for pairs of points
      already out at the later ones. Here only pairs of points still in count, as dependent as they are. Six points,
      one better by 0.55 of the paired standard deviation, 40 rows: this drops 84 % of the worse points, Holm 65 %.
    - Comparing each point with the best alone (Hsu 1981; Dunnett) takes a lower bar, but holds it only against a best
      named beforehand. Its claim for a dropped point is "not better than all others", which six equals fulfil; a
      reader takes it for "worse".

    Args:
        comparison: what `compare` found.
        costs: of each point, lower is better; without, the best is the cheapest.
        alpha: error rate of the sweep.

    >>> from ftexp.stats.columns import mean
    >>> points = [[mean([1.0] * right + [0.0] * (8 - right))] for right in (8, 7, 0)]
    >>> indistinguishable(compare(points, Direction.maximize), costs=[4.0, 1.0, 0.5])
    Tied(best=0, members=(0, 1), cheapest=1)
    """
    members = tuple(n for n, p in enumerate(comparison.p_best) if p > alpha)
    gaps = [abs(s.value - comparison.scores[comparison.best].value) for s in comparison.scores]
    cheapest = comparison.best if costs is None else min(members, key=lambda n: (costs[n], gaps[n]))
    return Tied(comparison.best, members, cheapest)


def _table(units: Sequence[Sequence[Column]], direction: Direction) -> _Table:
    columns = [column for runs in units for column in runs]
    if not columns or not all(units):
        raise ValueError("points must be at least one, each with at least one run")
    if len({len(c.num) for c in columns}) > 1:
        raise ValueError(f"all runs must be scored on the same rows, got {sorted({len(c.num) for c in columns})} rows")
    if not all(np.isfinite(c.num).all() for c in columns):
        raise ValueError("a row's value is not finite; leave the trial out")
    sign = 1.0 if direction is Direction.minimize else -1.0
    at = float(np.mean([c.value for c in columns]))
    parts = [sign * np.stack([contributions(c, at) for c in runs]) for runs in units]  # each (runs, units)
    n = parts[0].shape[1]
    inner = [p - p.mean(axis=0) - p.mean(axis=1, keepdims=True) + p.mean() for p in parts]
    runs = np.array([len(p) for p in parts])
    kind, seed, mixed, df = np.zeros(len(parts), dtype=int), np.zeros(len(parts)), np.zeros(len(parts)), runs - 1
    told = [p.mean(axis=1).tolist() for p in parts]
    for number, apart in enumerate(noise.noisier(told), 1):
        kind[apart] = number
    for number in set(kind.tolist()):
        alike = np.flatnonzero(kind == number)
        seed[alike], df[alike] = noise.pooled([told[k] for k in alike])
        if (more := df[alike[0]] * (n - 1)) > 0:
            mixed[alike] = sum((inner[k] ** 2).sum() for k in alike) / more
    means = np.stack([p.mean(axis=0) for p in parts])
    return _Table(means, means.mean(axis=1), runs.astype(float), seed, df, mixed, kind)


def _spread(table: _Table, rows: Array) -> noise.Spread:
    """Parts of the noise: the median over pairs for rows, and the seeds' own without what run times row adds.

    Of seeds those of the points that scatter alike.
    """
    seed, mixed = (float(part[table.kind == 0][0]) for part in (table.seed, table.mixed))
    own = max(0.0, seed - mixed / table.parts.shape[1])
    return noise.Spread(float(np.median(rows)) if len(rows) else math.nan, math.sqrt(own), math.sqrt(mixed))


def _statistics(table: _Table, couples: Array) -> tuple[Array, Array, Array]:
    """Return T of each pair, its denominator, and the root of the share `_share` leaves of the row part, (pairs,)."""
    a, b = couples.T
    apart = table.parts[a] - table.parts[b]
    share = _share(apart, (table.twice / table.runs)[couples].sum(axis=1))
    n = apart.shape[1]
    if table.replicated:
        scale = np.sqrt(table.seed_part(couples) + share**2 * apart.var(axis=1) / max(1, n - 1))
    else:  # no change of signs moves the mean square, so that this orders draws and pairs as Student's t does
        scale = np.sqrt((apart**2).mean(axis=1) / n)
    middle = apart.mean(axis=1)
    sure = np.where(np.abs(middle) > NOTHING, np.copysign(np.inf, middle), 0.0)  # the same in every row and every seed
    return np.where(scale > 0, middle / np.where(scale > 0, scale, 1), sure), scale, share


def _share(parts: Array, mixed: Array) -> Array:
    """Root of the share of the variance over units that is not run times unit."""
    variance = parts.var(axis=1, ddof=1) if parts.shape[1] > 1 else np.zeros(len(parts))
    return np.sqrt(np.clip(1 - mixed / np.where(variance > 0, variance, 1), 0, 1))


def _elimination(observed: Array, couples: Array) -> tuple[Array, Array, Array]:
    """Order in which points would be dropped: always the worse of the largest |T| left.

    Returns:
        Pairs sorted by the last step at which both their points are in, that step, and the point dropped at each.
    """
    count = int(couples.max()) + 1
    size = np.full((count, count), -np.inf)
    size[couples[:, 0], couples[:, 1]] = np.abs(observed)
    signed = np.zeros((count, count))
    signed[couples[:, 0], couples[:, 1]] = observed
    gone = np.full(count, count)
    losers = []
    for step in range(count - 1):
        a, b = np.unravel_index(np.argmax(size), size.shape)
        loser = a if signed[a, b] > 0 else b
        gone[loser] = step
        losers.append(int(loser))
        size[loser, :] = size[:, loser] = -np.inf
    steps = np.minimum(gone[couples[:, 0]], gone[couples[:, 1]])
    order = np.argsort(steps, kind="stable")
    return couples[order], steps[order], np.array(losers)


def _null(
    table: _Table, couples: Array, scale: Array, share: Array, signs: int, exact: bool
) -> Iterator[Array]:  # fmt: skip
    """Draw |T| under equality, (pairs, draws) a chunk."""
    rng = np.random.default_rng(SEED)
    n = table.parts.shape[1]
    a, b = couples.T
    centred = table.parts - table.parts.mean(axis=1, keepdims=True)
    freedom = np.array([table.df[table.kind == number][0] for number in range(table.kind.max() + 1)])
    for flips in _flips(rng, n, signs, exact, len(couples)):
        flipped = table.parts @ flips / n
        noisy = flipped[a] - flipped[b]
        if table.replicated:
            rows, count = centred @ flips / n, flips.shape[1]  # (points, draws)
            rows = (rows[a] - rows[b]) * math.sqrt(n / max(1, n - 1)) * _unsure(rng, np.array([max(1, n - 1)]), count)
            trained = rng.standard_normal(flipped.shape) * np.sqrt(table.seed / table.runs)[:, None]
            trained *= _unsure(rng, freedom, count)[table.kind]
            noisy = rows * share[:, None] + trained[a] - trained[b]
        yield np.abs(noisy) / np.where(scale > 0, scale, 1)[:, None]


def _flips(rng: np.random.Generator, units: int, signs: int, exact: bool, width: int) -> Iterator[Array]:
    """Draw signs of units, or count them all up to mirror images, (units, draws) a chunk.

    `width` is how many numbers a draw makes where they are more than its units.
    """
    total = 2 ** (units - 1) if exact else signs
    size = max(1, CHUNK // max(width, units))
    for begin in range(0, total, size):
        count = min(size, total - begin)
        if exact:  # the last row keeps its sign: the mirror image has the same |T|
            coins = (np.arange(begin, begin + count) >> np.arange(units)[:, None]) & 1
        else:
            coins = rng.integers(0, 2, (units, count), dtype=np.int8)
        yield 1.0 - 2.0 * coins


def _unsure(rng: np.random.Generator, df: Array, count: int) -> Array:
    """Draw how far an estimated standard deviation may be from the true one, (variances, draws)."""
    return np.sqrt(df[:, None] / rng.chisquare(df[:, None], (len(df), count)))


def _resampled(units: Sequence[Sequence[Column]], draws: int) -> Array:
    """Bootstrap scores of points, mean over their runs, (draws, points)."""
    flat = resample([column for runs in units for column in runs], draws)
    ends = np.cumsum([0, *(len(runs) for runs in units)])
    return np.stack([flat[:, i:j].mean(axis=1) for i, j in pairwise(ends)], axis=1)


def _centred(units: Sequence[Sequence[Column]]) -> Array:
    """Contributions of each point around its own score, mean over its runs, (units, points)."""
    return np.stack([np.mean([contributions(c, c.value) for c in runs], axis=0) for runs in units], axis=1)


def _scores(
    points: Sequence[Sequence[Column]],
    resampled: Array,
    centred: Array,
    table: _Table,
    groups: Sequence[Hashable] | None,
    level: float,
) -> list[Interval]:
    """Interval of each point's mean score over rows and, with replicates, over seeds."""
    values = np.array([np.mean([c.value for c in runs]) for runs in points])
    rows = table.parts.shape[1]
    low, high = bca(resampled, values, centred, level) if rows > 1 else np.full((2, len(values)), np.nan)
    for n, runs in enumerate(points):
        if rows > 1 and all(c.is_share for c in runs):
            worth = min(effective(c, groups, level) for c in runs)
            low[n], high[n] = wilson(float(values[n]), worth, level)
    share = _share(table.parts, table.twice / table.runs)
    low, high = _joined(values, low, high, share, _seed_half(table, np.arange(len(values))[:, None], level))
    low = np.maximum(low, [runs[0].least for runs in points])
    high = np.minimum(high, [runs[0].most for runs in points])
    return [Interval(*map(float, ends)) for ends in zip(values, low, high, strict=True)]


def _joined(values: Array, low: Array, high: Array, share: Array, seed: Array) -> tuple[Array, Array]:
    """Join an interval over rows with the half width of one over seeds (MOVER)."""
    return values - np.hypot(share * (values - low), seed), values + np.hypot(share * (high - values), seed)


def _seed_half(table: _Table, among: Array, level: float) -> Array:
    """Half width of Student's interval over the seeds of points, or of pairs of points, (points, one or two).

    Where the two have variances of their own, the root of the sum of squares of both.
    """
    if not table.replicated:
        return np.zeros(len(among))
    squares = (t.isf((1 - level) / 2, table.df) ** 2 * table.seed / table.runs)[among].sum(axis=1)
    return np.sqrt(squares)


def _differences(
    values: Array, resampled: Array, centred: Array, table: _Table, couples: Array, share: Array, level: float
) -> tuple[Array, Array, Array]:
    """Return the difference of each pair with the ends of its interval, (pairs,) each."""
    a, b = couples.T
    difference = values[a] - values[b]
    low, high = np.full(len(a), np.nan), np.full(len(a), np.nan)
    size = max(1, CHUNK // len(resampled))
    for begin in range(0, len(a) if table.parts.shape[1] > 1 else 0, size):
        part = slice(begin, begin + size)
        i, j = a[part], b[part]
        drawn = resampled[:, i] - resampled[:, j]
        low[part], high[part] = bca(drawn, difference[part], centred[:, i] - centred[:, j], level)
    seed = _seed_half(table, couples, level)
    return difference, *_joined(difference, low, high, share, seed)
