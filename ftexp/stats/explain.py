"""What moved the objective in a search, and which trials no other beats in every respect."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t

from ftexp.metrics import Direction
from ftexp.stats.columns import SEED, Array, Interval

FEWEST = 10
"""Trials below which `importance` says nothing: the better and the worse half then hold fewer than five."""
FEW_VALUES = 8
"""Numbers with at most so many values are choices: a density over three ranks has spikes where a resample is narrow."""
RESAMPLES = 100
QUANTILE = 0.25
"""Share of the trials that count as the best; Optuna takes a tenth, which is two trials of twenty."""


@dataclass(frozen=True)
class Bin:
    """Trials with one value of a key, or with values in one range."""

    low: Any
    """The value, or the lowest in the range."""
    high: Any
    """The value, or the highest in the range."""
    trials: int
    """How many trials."""
    mean: float
    """Mean objective over them."""
    sd: float
    """Standard deviation of the objective over them; NaN for one."""
    ends: tuple[float, float]
    """95 % interval of the mean; NaN for one trial."""


def importance(
    params: Mapping[str, Sequence[Any]], values: Sequence[float], direction: Direction, level: float = 0.95,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:  # fmt: skip
    """Share of each key in what sets the best trials apart, most important first.

    PED-ANOVA (Watanabe, Bansal and Hutter 2023, arXiv:2304.10255) as Optuna computes it: the Pearson divergence between
    the values of a key in the best trials and in all, by Parzen estimators; shares sum to 1. "Best" is the best
    quarter, and at least five trials, as Optuna advises. The interval is a percentile bootstrap over trials. A key that
    does nothing keeps a share, because five trials never spread like fifty: believe an order only where intervals part.

    It tells what mattered within the ranges searched, of each key alone; a key that acts only together with another may
    show little. A key that some trials do not search counts over those that do, weighed by how many of the best they
    are (Conditional PED-ANOVA, arXiv:2601.20800, Theorem 4.2).

    Args:
        params: key -> its value in each trial. Names, and numbers of at most `FEW_VALUES` values, are choices; other
            numbers above 0 that span more than a factor of 20 count by their logarithm. None is where a trial does not
            search it. A key with one value has no part.
        values: objective of each trial; trials that are not finite are left out.
        direction: which way the objective improves.
        level: of the intervals.
        resamples: bootstrap draws.

    Returns:
        Key -> share; empty with fewer than `FEWEST` finite trials or no key that varies.

    >>> lr = [10 ** (-4 + n / 10) for n in range(20)]
    >>> seed = [n * 7 % 20 for n in range(20)]
    >>> found = importance({"lr": lr, "seed": seed}, lr, Direction.minimize, resamples=2)
    >>> list(found)[0], found["lr"].value > 0.8
    ('lr', True)
    """
    kept = [n for n, v in enumerate(values) if math.isfinite(v)]
    columns = {key: [column[n] for n in kept] for key, column in params.items()}
    varied = {key: column for key, column in columns.items() if len({v for v in column if v is not None}) > 1}
    if len(kept) < FEWEST or not varied:
        return {}
    target = np.array([values[n] for n in kept]) * (1 if direction is Direction.minimize else -1)
    spaces = {key: _distribution(column) for key, column in varied.items()}
    shares = _shares(varied, target, spaces, np.arange(len(kept)))
    rng = np.random.default_rng(SEED)
    drawn = [_shares(varied, target, spaces, rng.integers(0, len(kept), len(kept))) for _ in range(resamples)]
    found = {}
    for key in sorted(shares, key=lambda k: -shares[k]):
        low, high = np.quantile([d.get(key, 0.0) for d in drawn], [(1 - level) / 2, (1 + level) / 2])
        found[key] = Interval(shares[key], float(low), float(high))
    return found


@dataclass(frozen=True)
class Together:
    """How far one number explains an objective, two factors of it apart, and their product."""

    product: float
    """Share of the variance that a parabola in the logarithm of the product predicts."""
    apart: float
    """Share that the sum of a parabola in the logarithm of each predicts."""
    first: float
    """Share that a parabola in the logarithm of the first alone predicts."""
    second: float
    """Share that a parabola in the logarithm of the second alone predicts."""


def together(first: Sequence[float], second: Sequence[float], values: Sequence[float]) -> Together | None:
    """Tell whether two factors act through their product, as alpha and learning rate of an adapter do.

    Each share is the predicted R2, 1 - PRESS / SST: every trial is predicted by the fit to the others (Allen 1974), so
    that two parabolas do not win over one by their number of coefficients. At or below 0 nothing is predicted. A
    parabola, because a rate has a best value.

    Args:
        first: values of one key, above 0.
        second: values of the other, above 0.
        values: objective of each trial; trials that are not finite are left out.

    Returns:
        None with fewer than `FEWEST` finite trials, or where a key has one value.

    >>> alpha = [8, 16, 32, 64] * 3
    >>> lr = [1e-4] * 4 + [1e-3] * 4 + [1e-2] * 4
    >>> told = together(alpha, lr, [(math.log10(a * r) + 1.5) ** 2 for a, r in zip(alpha, lr)])
    >>> round(told.product, 3), told.apart < 0.95
    (1.0, True)
    """
    kept = [n for n, v in enumerate(values) if math.isfinite(v)]
    pairs = [(float(first[n]), float(second[n])) for n in kept]
    if len(kept) < FEWEST or any(len(set(column)) < 2 for column in zip(*pairs, strict=True)):
        return None
    if any(a <= 0 or b <= 0 for a, b in pairs):
        raise ValueError("factors must be above 0")
    a, b = np.log(np.array(pairs)).T
    target = np.array([float(values[n]) for n in kept])
    return Together(*(_predicted(logs, target) for logs in ((a + b,), (a, b), (a,), (b,))))


def _predicted(logs: Sequence[Array], target: Array) -> float:
    """Predicted R2 of a sum of parabolas; a trial that alone fixes a coefficient counts as predicted by the mean."""
    columns = [np.ones_like(target)]
    for log in logs:
        x = (log - log.mean()) / (log.std() or 1.0)
        columns += [x, x**2]
    basis, size, _ = np.linalg.svd(np.stack(columns, axis=1), full_matrices=False)
    basis = basis[:, size > 1e-9 * size[0]]
    leverage = (basis**2).sum(axis=1)
    left = target - basis @ (basis.T @ target)
    around = target - target.mean()
    alone = leverage > 1 - 1e-9
    press = np.where(alone, around, left / np.where(alone, 1.0, 1 - leverage))
    total = float((around**2).sum())
    return 1 - float((press**2).sum()) / total if total > 0 else 0.0


def _distribution(column: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    known = [v for v in column if v is not None]
    if _continuous(known):
        low, high = float(min(known)), float(max(known))
        return FloatDistribution(low, high, log=low > 0 and high / low > 20)
    return CategoricalDistribution(tuple(dict.fromkeys(known)))


def _numeric(column: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in column)


def _continuous(column: Sequence[Any]) -> bool:
    return _numeric(column) and len(set(column)) > FEW_VALUES


def _shares(
    params: Mapping[str, Sequence[Any]], target: Array, spaces: Mapping[str, Any], chosen: Array
) -> dict[str, float]:
    """PED-ANOVA of the chosen trials, which may come more than once."""
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    numbers = {key for key, space in spaces.items() if isinstance(space, FloatDistribution)}
    searched = {n: [key for key, column in params.items() if column[n] is not None] for n in set(chosen.tolist())}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
        study.add_trials([
            optuna.trial.create_trial(
                params={k: float(params[k][n]) if k in numbers else params[k][n] for k in searched[n]},
                distributions={k: spaces[k] for k in searched[n]}, value=float(target[n]),
            )
            for n in chosen.tolist()
        ])  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of draws whose better trials are all of the trials
            judge = PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(QUANTILE, 5 / len(chosen))))
            return get_param_importances(study, evaluator=judge)
    finally:
        optuna.logging.set_verbosity(verbosity)


def marginal(column: Sequence[Any], values: Sequence[float], bins: int = 4, level: float = 0.95) -> list[Bin]:
    """Mean objective by value of one key, over whatever the other keys were.

    Each value stands alone where there are at most 2 * `bins` of them or they are names; otherwise numbers are cut into
    `bins` ranges of equally many trials (all trials of one value in one range). The interval is Student's, over trials:
    it holds the other keys' effect too, and so is wide where they matter. In a search, not a grid, a sampler tries the
    good region more often, which bends the mean of the other keys.

    >>> [(b.low, b.mean) for b in marginal([8, 16, 8, 16], [0.2, 0.1, 0.4, 0.2])]
    [(8, 0.30000000000000004), (16, 0.15000000000000002)]
    """
    kept = [(c, float(v)) for c, v in zip(column, values, strict=True) if math.isfinite(v)]
    known = list(dict.fromkeys(c for c, _ in kept))
    if len(known) <= 2 * bins or not _numeric(known):
        members = [[(c, v) for c, v in kept if c == one] for one in (sorted(known) if _numeric(known) else known)]
    else:
        edges = np.quantile([c for c, _ in kept], np.linspace(0, 1, bins + 1)[1:-1])
        place = np.searchsorted(edges, [c for c, _ in kept])
        members = [[pair for pair, at in zip(kept, place, strict=True) if at == n] for n in range(bins)]
    return [_bin(m, level) for m in members if m]


def _bin(members: list[tuple[Any, float]], level: float) -> Bin:
    names, values = [c for c, _ in members], np.array([v for _, v in members])
    n, middle = len(values), float(values.mean())
    low, high = (min(names), max(names)) if _numeric(names) else (names[0], names[-1])
    if n == 1:
        return Bin(low, high, 1, middle, math.nan, (math.nan, math.nan))
    sd = float(values.std(ddof=1))
    half = float(t.isf((1 - level) / 2, n - 1)) * sd / math.sqrt(n)
    return Bin(low, high, n, middle, sd, (middle - half, middle + half))


def pareto(scores: Sequence[Sequence[float]], directions: Sequence[Direction]) -> list[bool]:
    """Tell which trials are on the Pareto front: no other is at least as good in all objectives and better in one.

    Trials with equal scores are all on it or all off; one that only equals another in some objectives and is worse in
    the rest is off. A trial with a NaN is off and beats nobody.

    Args:
        scores: (trials, objectives).
        directions: of each objective.

    >>> pareto([[0.1, 9], [0.2, 5], [0.2, 6], [0.3, 5]], [Direction.minimize] * 2)
    [True, True, False, False]
    """
    signs = np.array([1.0 if d is Direction.minimize else -1.0 for d in directions])
    table = np.asarray(scores, dtype=float).reshape(len(scores), len(directions)) * signs
    return [
        not np.isnan(row).any() and not ((table <= row).all(axis=1) & (table < row).any(axis=1)).any() for row in table
    ]
