"""Noise between seeds, power and the flattery of the best, by hand and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats as reference

from ftexp.metrics import Direction
from ftexp.stats import noise, pairs
from ftexp.stats.columns import mean
from ftexp.stats.noise import Spread, detectable, needed, power


def test_pooled_variance_by_hand():
    # around 2: 1 + 1, around 6: 1 + 1 + 4; degrees 1 + 2
    assert noise.pooled([[1, 3], [5, 5, 8], [9]]) == (pytest.approx(8 / 3), 3)
    assert noise.pooled([[1], [2]]) == (0.0, 0)


def test_points_without_replicates_tell_no_noise():
    assert noise.seeds([[0.1], [0.2]]) is None


def test_interval_of_the_seed_noise_covers_it():
    rng = np.random.default_rng(0)
    found = [noise.seeds(rng.normal(0, 0.02, (4, 3)).tolist()) for _ in range(500)]
    assert 0.92 <= np.mean([f.low <= 0.02 <= f.high for f in found]) <= 0.98


def test_power_of_two_trials_is_that_of_the_paired_t_test():
    # statsmodels' TTestPower(0.5, 64, 0.05): 0.976; here from scipy's noncentral t
    bar = reference.t.isf(0.025, 63)
    expected = reference.nct.sf(bar, 63, 4.0) + reference.nct.cdf(-bar, 63, 4.0)
    assert power(0.5, 64, Spread(1.0)) == pytest.approx(expected, abs=1e-4)


def test_power_at_no_effect_is_alpha():
    assert power(0, 50, Spread(1.0)) == pytest.approx(0.05, abs=1e-4)
    assert power(0, 50, Spread(0.5, 0.1, 0.2), seeds=3) <= 0.05
    assert power(0, 50, Spread(0.5, 0.1), seeds=1) > 0.3  # one seed and training noise: false winners


def test_critical_values_are_those_of_the_tables():
    # Tukey's q(0.05; 6, 10) = 4.91 in any table of the studentised range
    assert noise.critical(6, 10) * math.sqrt(2) == pytest.approx(4.91, abs=0.005)
    assert noise.critical(2, 10) == pytest.approx(reference.t.isf(0.025, 10))


def told_apart(effect, rows, spread, seeds, trials, rounds=500, signs=999):
    """Share of simulated sweeps in which point 0, better by `effect`, is told from point 1."""
    rng = np.random.default_rng(3)
    first, later = 0, 0
    for _ in range(rounds):
        points = []
        for k in range(trials):
            own = 10 - (k == 0) * effect + rng.normal(0, spread.rows / math.sqrt(2), rows)
            runs = own + rng.normal(0, spread.seed, (seeds, 1)) + rng.normal(0, spread.mixed, (seeds, rows))
            points.append([mean(run) for run in runs])
        found = pairs.compare(points, Direction.minimize, signs=signs, draws=2)
        first += found.pairs[0].joint <= 0.05
        later += found.p_best[1] <= 0.05
    return first / rounds, later / rounds


@pytest.mark.parametrize(
    ("effect", "rows", "spread", "seeds", "trials"),
    [
        (0.5, 40, Spread(1.0), 1, 2),
        (0.8, 40, Spread(1.0), 1, 6),
        (0.45, 60, Spread(0.5, 0.1, 0.3), 3, 6),
        (0.2, 60, Spread(0.5, 0.1), 1, 2),
    ],
)
def test_power_equals_simulated_sweeps(effect, rows, spread, seeds, trials):
    first, later = told_apart(effect, rows, spread, seeds, trials)
    assert first == pytest.approx(power(effect, rows, spread, seeds, trials), abs=0.04)
    assert later >= first or seeds == 1


def test_uncorrected_power_is_far_from_simulated_sweeps(monkeypatch):
    """The twin: a bar that ignores how many points are compared promises too much."""
    first, _ = told_apart(0.45, 60, Spread(0.5, 0.1, 0.3), 3, 6, rounds=200)
    monkeypatch.setattr(noise, "critical", lambda trials, df, alpha: reference.t.isf(alpha / 2, df))
    assert power(0.45, 60, Spread(0.5, 0.1, 0.3), 3, 6) > first + 0.1


@pytest.mark.parametrize("seeds", [1, 3])
def test_needed_rows_are_just_enough(seeds):
    spread = Spread(0.3, 0.01)
    plan = needed(0.1, spread, seeds, trials=4)
    assert plan.power == power(0.1, plan.rows, spread, seeds, 4) >= 0.8
    assert power(0.1, plan.rows - 1, spread, seeds, 4) < 0.8
    assert detectable(plan.rows, spread, seeds, 4) <= 0.1 < detectable(plan.rows - 1, spread, seeds, 4)


def test_no_number_of_rows_beats_training_noise():
    assert needed(0.1, Spread(0.3, 0.2), seeds=2).rows is None
    assert needed(0.1, Spread(0.3, 0.2), seeds=100).rows is not None


def test_usersmd_example_paired_and_unpaired():
    """Per-row sd 0.15, correlation 0.8, 200 rows, a true 0.02: 0.84 paired, as simulated there."""
    assert power(0.02, 200, Spread(noise.paired_sd(0.15, 0.8))) == pytest.approx(0.84, abs=0.01)


def test_smallest_effect_is_found_for_any_noise():
    for rows, sd, trials in ((40, 0.14, 18), (6, 1e-9, 2), (5000, 1e6, 50)):
        found = detectable(rows, Spread(sd), trials=trials)
        assert power(found, rows, Spread(sd), trials=trials) == pytest.approx(0.8, abs=0.001)


def test_noise_that_the_test_does_not_see_finds_nothing():
    """One run a point, training noise five times that of rows: equal points are told apart in most sweeps."""
    spread = Spread(0.1, 0.5)
    assert power(0.0, 1000, spread) > 0.8
    assert math.isnan(detectable(1000, spread))
    assert math.isfinite(detectable(1000, spread, seeds=3))


def test_noisier_points_by_hand():
    """Variances 1, 1 and 100 of three runs each: F = 100 on 2 and 4 degrees, p 0.0004; of 1, 1 and 4 it is 0.11."""
    calm, other = [0.0, 1.0, 2.0], [5.0, 6.0, 7.0]
    assert reference.f.sf(100, 2, 4) < 0.05 / 3 < reference.f.sf(4, 2, 4)
    assert noise.noisier([calm, [0.0, 10.0, 20.0], other]) == [1]
    assert noise.noisier([calm, [0.0, 2.0, 4.0], other]) == []
    assert noise.noisier([[0.0, 1e3, 2e3], calm, [0.0, 30.0, 60.0], other, [9.0]]) == [0, 2]  # the widest first
    assert noise.noisier([[1.0, 1.0], [0.5, 0.9], [1.0, 1.0]]) == []  # others that do not scatter say nothing
    assert noise.noisier([[0.1], [0.2]]) == noise.noisier([]) == []


def test_points_that_scatter_alike_are_rarely_taken_for_noisier():
    rng = np.random.default_rng(0)
    assert np.mean([bool(noise.noisier(rng.normal(0, 1, (6, 3)).tolist())) for _ in range(2000)]) <= 0.06


def test_detectable_without_noise_or_rows():
    assert detectable(50, Spread(0.0)) == 0
    assert math.isnan(detectable(1, Spread(1.0)))
    assert math.isnan(detectable(50, Spread(math.nan)))


@pytest.mark.parametrize(("alpha", "fewest"), [(0.05, 6), (0.01, 8), (0.5, 2)])
def test_rows_whose_signs_cannot_tell_promise_nothing(alpha, fewest):
    """All signs and their mirror are the smallest p of the exact test, 2 / 2 ** rows, however large the effect is."""
    for spread in (Spread(0.1), Spread(0.0)):
        told = [power(100.0, rows, spread, alpha=alpha) > 0 for rows in range(2, 12)]
        assert told == [rows >= fewest for rows in range(2, 12)]
        assert [math.isfinite(detectable(rows, spread, alpha=alpha)) for rows in range(2, 12)] == told
        assert needed(100.0, spread, alpha=alpha).rows == fewest
    for rows in (fewest - 1, fewest):
        better, worse = mean([0.0] * rows), mean([1.0 + n / 10 for n in range(rows)])
        (pair,) = pairs.compare([[better], [worse]], Direction.minimize).pairs
        assert (pair.p <= alpha) == (rows == fewest)
    assert power(100.0, 3, Spread(0.1), seeds=2, alpha=alpha) > 0.5  # the test over seeds counts no signs


def test_expected_maximum_equals_simulation():
    rng = np.random.default_rng(0)
    for trials in (2, 6, 50):
        simulated = rng.standard_normal((20_000, trials)).max(axis=1).mean()
        assert noise.expected_maximum(trials) == pytest.approx(simulated, abs=0.02)
    assert noise.expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi))


@pytest.mark.parametrize(("rows", "trials", "points"), [(200, 50, 7.1), (100, 200, 12.1), (2000, 50, 2.3)])
def test_best_of_equal_shares_flatters_by_known_points(rows, trials, points):
    """The figures simulated for trap P19: all trials truly 0.70."""
    exact = noise.expected_best_share(trials, rows, 0.7)
    assert 100 * (exact - 0.7) == pytest.approx(points, abs=0.1)
    simulated = np.random.default_rng(0).binomial(rows, 0.7, (4000, trials)).max(axis=1).mean() / rows
    assert exact == pytest.approx(simulated, abs=0.001)
