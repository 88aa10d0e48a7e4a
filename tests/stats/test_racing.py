"""Races: the level is kept over whole sweeps of equals, and clear losers are stopped early."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from ftexp.stats import racing
from ftexp.stats.columns import mean, ratio

TRIALS, RUNGS, ROWS = 8, 4, 48


def raced(draw, rule=racing.level, trials=TRIALS, rungs=RUNGS):
    """Run a sweep whose trials take turns, rung by rung and in a random order; return who was stopped and at which."""
    rng = np.random.default_rng(draw)
    hard = rng.gamma(1.0, 1.0, ROWS)[:, None]  # what makes a row hard for all
    lost = hard + rng.gamma(0.5, 0.4, (rungs, ROWS, trials)) + SHIFT[:trials]  # (rung, row, trial)
    stopped: dict[int, int] = {}
    for rung in range(1, rungs + 1):
        there: list[int] = []
        for trial in (n for n in rng.permutation(trials).tolist() if n not in stopped):
            here = {n: mean(lost[rung - 1, :, n]) for n in (*there, trial)}
            there.append(trial)
            best = min(here, key=lambda n: here[n].value)
            if best != trial and racing.behind(here[trial], here[best]) < rule(0.05, rung, trials):
                stopped[trial] = rung
    return stopped


SHIFT = np.zeros(TRIALS)


def test_p_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.gamma(1.0, 1.0, (2, 40))
    assert racing.behind(mean(a), mean(b)) == pytest.approx(
        min(1.0, ttest_rel(a, b, alternative="greater").pvalue) if a.mean() > b.mean() else 1.0
    )
    worse = b + np.linspace(0.0, 0.4, 40)
    assert racing.behind(mean(worse), mean(b)) == pytest.approx(ttest_rel(worse, b, alternative="greater").pvalue)


def test_rows_count_by_their_tokens():
    """By hand: with tokens 1 and 3, nats (2, 3) against (1, 3) differ by (1, 0) / 2 a row, so t is 1 with one degree."""
    assert racing.behind(ratio([2.0, 3.0], [1, 3]), ratio([1.0, 3.0], [1, 3])) == pytest.approx(0.25)


def test_rows_of_a_group_are_one():
    rng = np.random.default_rng(0)
    a = rng.gamma(1.0, 1.0, 40)
    worse = a + np.repeat(rng.normal(0.1, 0.2, 8), 5)
    groups = np.repeat(np.arange(8), 5).tolist()
    by_hand = ttest_rel(worse.reshape(8, 5).mean(1), a.reshape(8, 5).mean(1), alternative="greater").pvalue
    assert racing.behind(mean(worse), mean(a), groups) == pytest.approx(by_hand)
    assert racing.behind(mean(worse), mean(a)) < by_hand  # as if there were 40


def test_levels_of_all_rungs_and_rivals_add_up_to_alpha():
    spent = sum(racing.level(0.05, rung, 16) * 15 for rung in range(1, 10_000))
    assert spent == pytest.approx(0.05, rel=1e-3)
    assert racing.level(0.05, 1, 1) == 0.025


def test_equal_rows_and_one_row_stop_nobody():
    assert racing.behind(mean([1.0, 2.0]), mean([1.0, 2.0])) == 1.0
    assert racing.behind(mean([9.0]), mean([1.0])) == 1.0
    assert racing.behind(mean([2.0, 3.0]), mean([1.0, 2.0])) == 0.0
    with pytest.raises(ValueError, match="same rows, got 2 and 1"):
        racing.behind(mean([1.0, 2.0]), mean([1.0]))


def test_a_trial_of_equals_is_stopped_in_at_most_alpha_of_sweeps():
    """Of equals each is a true best: trial 0 stands for it."""
    sweeps = 400
    lost = sum(0 in raced(draw) for draw in range(sweeps))
    assert lost / sweeps <= 0.05


def test_without_the_correction_the_best_is_lost_too_often():
    """Twin: the same simulation with 0.05 for each test stops trial 0 far more often than alpha."""
    lost = sum(0 in raced(draw, rule=lambda *_: 0.05) for draw in range(200))
    assert lost / 200 > 0.1


def test_clear_losers_go_at_the_first_rung_and_the_best_stays(monkeypatch):
    """Six of eight are behind by two standard deviations: most of the steps are saved, the winner never."""
    monkeypatch.setitem(globals(), "SHIFT", np.array([0.0, 0.02, *[0.8] * 6]))
    steps = 0
    for draw in range(50):
        stopped = raced(draw)
        assert 0 not in stopped
        steps += sum(stopped.get(n, RUNGS + 1) for n in range(TRIALS))
    assert steps / (50 * TRIALS * (RUNGS + 1)) < 0.5
