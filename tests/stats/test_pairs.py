"""Tests of all pairs: exact answers by enumeration, references in scipy, error rates and power by simulation.

Each guard has a twin: without the correction, the pairing, the seed part or whole groups the rates are far off.
"""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from ftexp.metrics import Direction
from ftexp.stats import columns, pairs
from ftexp.stats.columns import Column, mean, ratio
from ftexp.stats.pairs import compare, holm, indistinguishable

LOW, HIGH = Direction.minimize, Direction.maximize


def enumerated(a, b):
    """Share of all sign vectors that move the mean difference as far as it is."""
    apart = np.asarray(a) - np.asarray(b)
    signs = np.array(list(product([1, -1], repeat=len(apart))))
    return float((abs(signs @ apart) >= abs(apart.sum()) - 1e-9).mean())


def test_permutation_test_by_hand():
    # differences 1, 2, 3: of the 8 sums 6 4 2 0 0 -2 -4 -6 two are as large as 6
    found = compare([[mean([1, 2, 3])], [mean([0, 0, 0])]], LOW)
    assert found.pairs[0].p == 2 / 8
    assert (found.best, found.pairs[0].difference) == (1, 2.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=10))
def test_few_rows_are_counted_exactly(rows):
    a, b = zip(*rows, strict=True)
    found = compare([[mean(a)], [mean(b)]], LOW, draws=2)
    assert found.pairs[0].p == pytest.approx(enumerated(a, b))


def test_many_rows_equal_scipy():
    rng = np.random.default_rng(0)
    a = rng.gamma(1, 1, 60)
    b = a + rng.normal(0.08, 0.4, 60)
    theirs = reference.permutation_test((a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples",
                                        vectorized=True, n_resamples=20_000, rng=1).pvalue  # fmt: skip
    ours = compare([[mean(a)], [mean(b)]], LOW, signs=20_000).pairs[0].p
    assert 0.01 < theirs < 0.9
    assert ours == pytest.approx(theirs, abs=0.01)


def test_ratios_with_the_same_tokens_flip_nats():
    nats_a, nats_b, tokens = [2.0, 9.0, 1.0, 4.0], [1.0, 3.0, 2.0, 3.0], [2, 9, 1, 4]
    found = compare([[ratio(nats_a, tokens)], [ratio(nats_b, tokens)]], LOW)
    assert found.pairs[0].p == enumerated(nats_a, nats_b)
    assert found.pairs[0].difference == pytest.approx((16 - 9) / 16)
    by_row = [n / t for n, t in zip(nats_a, tokens, strict=True)], [n / t for n, t in zip(nats_b, tokens, strict=True)]
    assert found.pairs[0].p != enumerated(*by_row)  # the twin: a mean of means is another test


def test_other_tokenizers_hold_their_rate():
    """The second trial counts about 1.5 times the tokens and as many times the nats: equal loss a token."""
    rng = np.random.default_rng(4)
    false = 0
    for _ in range(400):
        tokens = rng.integers(5, 40, 80)
        others = (tokens * rng.uniform(1.2, 1.8, 80)).round()
        a = ratio(tokens * rng.gamma(4, 0.1, 80), tokens)
        b = ratio(others * rng.gamma(4, 0.1, 80), others)
        false += compare([[a], [b]], LOW, signs=499, draws=2).pairs[0].p <= 0.05
    assert 0.025 <= false / 400 <= 0.08


def test_identical_trials_have_p_one():
    found = compare([[mean([0.1, 0.7, 0.4])]] * 3, LOW)
    assert [p.p for p in found.pairs] == [1.0] * 3
    assert indistinguishable(found).members == (0, 1, 2)
    assert [(p.low, p.high) for p in found.pairs] == [(0, 0)] * 3


def test_one_row_decides_nothing():
    found = compare([[mean([0.1])], [mean([9.0])]], LOW)
    assert found.pairs[0].p == 1
    assert math.isnan(found.pairs[0].low)
    assert indistinguishable(found).members == (0, 1)


def test_one_unit_decides_nothing_however_many_seeds_there_are():
    runs = [[mean([at + seed]) for seed in (0.0, 1e-3, 2e-3)] for at in (0.0, 1.0)]
    found = compare(runs, LOW)
    assert (found.p_best, found.pairs[0].p, found.pairs[0].joint) == ((1.0, 1.0), 1.0, 1.0)
    of_a_group = compare([[mean([at + seed] * 3) for seed in (0.0, 1e-3)] for at in (0.0, 1.0)], LOW, ["a"] * 3)
    assert indistinguishable(of_a_group).members == (0, 1)


def test_one_point_is_alone():
    found = compare([[mean([0.1, 0.2])]], LOW)
    assert (found.best, found.pairs, indistinguishable(found).members) == (0, (), (0,))


@pytest.mark.parametrize(
    ("points", "message"),
    [([[mean([1.0, math.nan])], [mean([1, 2])]], "not finite"), ([[mean([1, 2])], [mean([1, 2, 3])]], "the same rows"),
     ([[mean([1, 2])], []], "at least one run"), ([], "at least one")],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(points, message):
    with pytest.raises(ValueError, match=message):
        compare(points, LOW)


def test_holm_by_hand():
    # sorted 0.01 0.02 0.03 0.04: times 4 3 2 1 is 0.04 0.06 0.06 0.04, never falling: 0.04 0.06 0.06 0.06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([]) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=6), st.floats(0.01, 0.2))
def test_holm_rejects_as_closed_testing_does(p, alpha):
    """Bonferroni on every intersection of hypotheses, enumerated: a hypothesis falls where all that hold it fall."""
    expected = [True] * len(p)
    for chosen in product([False, True], repeat=len(p)):
        if any(chosen) and min(v for v, c in zip(p, chosen, strict=True) if c) * sum(chosen) > alpha:
            expected = [e and not c for e, c in zip(expected, chosen, strict=True)]
    assert [v <= alpha for v in holm(p)] == expected


def test_set_drops_the_worst_first_and_keeps_ties():
    rng = np.random.default_rng(2)
    hard = rng.gamma(1, 1, 60)
    points = [[mean(hard + rng.normal(0, 0.3, 60) + worse)] for worse in (0.02, 0, 0.5, 3.0)]
    found = compare(points, LOW)
    assert indistinguishable(found, costs=[1, 5, 0, 0]).members == (0, 1)
    assert indistinguishable(found, costs=[1, 5, 0, 0]).cheapest == 0
    assert indistinguishable(found).cheapest == found.best
    assert indistinguishable(found, alpha=1e-9).members == (0, 1, 2, 3)
    assert found.p_best[found.best] == 1


def test_direction_turns_best_and_difference():
    points = [[mean([0.1, 0.2, 0.1, 0.3])], [mean([0.4, 0.9, 0.5, 0.6])]]
    up, down = compare(points, HIGH), compare(points, LOW)
    assert (up.best, down.best) == (1, 0)
    assert up.pairs == down.pairs


def test_joint_p_lies_between_one_test_and_bonferroni():
    found = compare(sweep(np.random.default_rng(1), effect=0.3), LOW, signs=1999)
    for pair in found.pairs:
        assert pair.p - 0.01 <= pair.joint <= min(1, 15 * pair.p + 0.01)
        assert pair.p <= pair.holm


def test_same_rows_give_the_same_figures():
    points = sweep(np.random.default_rng(1))
    assert compare(points, LOW, signs=99) == compare(
        [[Column(c.num.copy(), c.den.copy()) for c in r] for r in points], LOW, signs=99
    )


def test_interval_of_a_point_is_the_columns_own():
    points = sweep(np.random.default_rng(1))
    own, found = columns.interval(points[0][0]), compare(points, LOW).scores[0]
    assert (found.value, found.low, found.high) == pytest.approx((own.value, own.low, own.high))


def test_replicates_of_equal_seeds_equal_one_run():
    """Where seeds change nothing there is no seed part, but for Student's more careful draws."""
    alone = sweep(np.random.default_rng(1), trials=2)
    twice = [[runs[0], runs[0]] for runs in alone]
    a, b = compare(alone, LOW), compare(twice, LOW)
    assert b.seeds.sd == 0
    assert b.pairs[0].p == pytest.approx(a.pairs[0].p, abs=0.03)
    assert b.pairs[0].low == pytest.approx(a.pairs[0].low)


def test_noise_is_taken_apart():
    rng = np.random.default_rng(0)
    found = [compare(sweep(rng, runs=3, seed=0.2, rows=80), LOW, signs=9, draws=2).spread for _ in range(60)]
    assert np.mean([f.seed**2 for f in found]) == pytest.approx(0.04, rel=0.15)
    assert np.mean([f.rows for f in found]) == pytest.approx(0.4 * math.sqrt(2), rel=0.05)
    assert np.mean([f.mixed for f in found]) == pytest.approx(0.3, rel=0.05)


def test_optimism_is_how_much_the_best_of_equals_flatters():
    """Common hard rows move all trials and flatter none; the rest is 1.267 standard errors for six."""
    rng = np.random.default_rng(0)
    expected, seen = [], []
    for _ in range(200):
        found = compare(sweep(rng), LOW, signs=199, draws=2)
        expected.append(found.optimism)
        seen.append(np.mean([s.value for s in found.scores]) - found.scores[found.best].value)
    assert np.mean(expected) == pytest.approx(1.267 * 0.5 / math.sqrt(40), rel=0.05)
    assert np.mean(seen) == pytest.approx(np.mean(expected), rel=0.08)


def sweep(rng, trials=6, runs=1, seed=0.0, rows=40, effect=0.0, row=0.5):
    """Trials on the same hard and easy rows; the first is better by `effect`. All but that is noise."""
    hard = rng.gamma(1, 1, rows)
    points = []
    for k in range(trials):
        own = hard - (k == 0) * effect + rng.normal(0, row if runs == 1 else 0.4, rows)
        mixed = rng.normal(0, 0.3, (runs, rows)) if runs > 1 else np.zeros((1, rows))
        points.append([mean(own + m + rng.normal(0, seed)) for m in mixed])
    return points


def rates(make, rounds=400, groups=None, judge=None):
    """Share of sweeps that drop any point, and that Holm finds any pair in."""
    rng = np.random.default_rng(5)
    dropped = paired = 0
    for _ in range(rounds):
        found = compare(make(rng), LOW, groups, signs=299, draws=2)
        dropped += len(indistinguishable(found).members) < len(found.scores)
        paired += min(p.holm for p in found.pairs) <= 0.05
    return dropped / rounds, paired / rounds


def tokens(rng):
    """Six equal trials scored in nats a token, skewed, on few rows."""
    count, hard = rng.integers(5, 30, 24), rng.gamma(1, 1, 24)
    return [[ratio(count * hard * rng.gamma(3, 1 / 3, 24), count)] for _ in range(6)]


def uneven(rng):
    """Six equal trials, two of which are much noisier than the others."""
    hard = rng.gamma(1, 1, 40)
    return [[mean(hard + rng.normal(0, sd, 40))] for sd in (0.1, 0.1, 0.2, 0.2, 1, 2)]


@pytest.mark.parametrize("make", [sweep, tokens, uneven])
def test_six_equal_trials_have_a_false_winner_in_at_most_five_percent(make):
    """At most 0.05 and two standard errors of 400 sweeps, 0.022; a winner is false where any of the six is dropped."""
    dropped, paired = rates(make)
    assert 0.02 <= dropped <= 0.072
    assert paired <= 0.072


def test_training_noise_makes_no_false_winner_with_replicates():
    dropped, paired = rates(lambda rng: sweep(rng, runs=2, seed=0.1))
    assert 0.02 <= dropped <= 0.072
    assert paired <= 0.072


def unstable(rng):
    """Six equal points of three runs; the seeds of the last scatter ten times as far as those of the others."""
    hard = rng.gamma(1, 1, 40)
    points = []
    for scatter in (0.1,) * 5 + (1.0,):
        own = hard + rng.normal(0, 0.1, 40)
        points.append([mean(own + rng.normal(0, 0.1, 40) + rng.normal(0, scatter)) for _ in range(3)])
    return points


def test_a_point_of_unstable_training_makes_no_false_winner(monkeypatch):
    assert rates(unstable, rounds=200)[0] <= 0.12
    monkeypatch.setattr(pairs.noise, "noisier", lambda told: [])  # the twin: all seeds pooled
    assert rates(unstable, rounds=200)[0] > 0.15


def test_a_point_of_unstable_training_blurs_no_other():
    """r=8 and r=16 are told apart, whether or not a third point lands anywhere."""
    calm = sweep(np.random.default_rng(1), trials=2, runs=3, seed=0.02, effect=0.5)
    wild = [[mean(runs.num + far) for runs, far in zip(calm[0], (5.0, 8.0, 3.0), strict=True)]]
    alone, beside = compare(calm, LOW), compare([*calm, *wild], LOW)
    assert (alone.noisier, beside.noisier) == ((), (2,))
    assert beside.seeds == alone.seeds
    assert beside.pairs[0].p == pytest.approx(alone.pairs[0].p, abs=2e-3)
    assert beside.pairs[0].p < 0.01
    for ours, theirs in zip(beside.scores[:2], alone.scores, strict=True):
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)
    far = beside.scores[2]
    df2 = reference.t.isf(0.025, 2) * np.std([c.value for c in wild[0]], ddof=1) / math.sqrt(3)
    assert far.high - far.value == pytest.approx(df2, rel=0.1)  # Student's over its own three seeds
    assert indistinguishable(beside).members == (0, 2)  # nobody knows what the third is worth
    assert (beside.spread.rows, beside.spread.seed) == pytest.approx((alone.spread.rows, alone.spread.seed))
    more = pairs.noise.expected_maximum(3) / pairs.noise.expected_maximum(2)
    assert beside.optimism == pytest.approx(more * alone.optimism, rel=0.03)


def test_noise_of_a_broken_trial_is_not_the_sweeps():
    """The same two points with and without one at 5.6: what is found and how far the best flatters stay."""
    two = sweep(np.random.default_rng(3), trials=2, effect=0.4)
    broken = [[mean(np.random.default_rng(4).gamma(1, 5.6, 40))]]
    alone, beside = compare(two, LOW), compare([*two, *broken], LOW)
    assert beside.spread.rows == pytest.approx(alone.spread.rows)
    more = pairs.noise.expected_maximum(3) / pairs.noise.expected_maximum(2)
    assert beside.optimism == pytest.approx(more * alone.optimism, rel=0.03)


def test_intervals_end_where_the_score_does():
    """Shares of F1 near 1 whose seeds scatter: no share is above 1, no loss below 0."""
    rng = np.random.default_rng(0)
    runs = [[Column(np.clip(rng.normal(0.96, 0.05, 30) + far, 0, 1), np.ones(30), 0.0, 1.0) for far in (0.05, -0.3, 0)]
            for _ in range(2)]  # fmt: skip
    assert all(0 <= score.low < score.high == 1 for score in compare(runs, HIGH).scores)
    free = [[mean(c.num) for c in part] for part in runs]
    assert all(score.high > 1 for score in compare(free, HIGH).scores)  # the twin


def test_one_run_a_point_takes_training_noise_for_a_winner():
    """The twin: without replicates the same noise makes false winners of most sweeps, as the doc string says."""
    assert rates(lambda rng: sweep(rng, seed=0.2), rounds=100)[0] > 0.4


def test_seeds_pooled_with_rows_make_false_winners():
    """The twin: runs taken for more rows of one run, which is what forgets that a run moves as a whole."""

    def stacked(rng):
        return [[mean(np.concatenate([c.num for c in runs]))] for runs in sweep(rng, runs=2, seed=0.3)]

    assert rates(stacked, rounds=100)[0] > 0.3


def test_without_a_correction_false_winners_abound(monkeypatch):
    monkeypatch.setattr(pairs, "holm", lambda p: list(p))
    assert rates(sweep, rounds=100)[1] > 0.2


def test_without_the_joint_maximum_false_winners_abound(monkeypatch):
    """The twin of the set: each step asks only about its own pair."""

    class Alone:
        reduceat = staticmethod(lambda a, first, axis=0: np.take(a, first, axis=axis))
        accumulate = staticmethod(lambda a, axis=0: a)

        def __new__(cls, *given):
            return np.maximum(*given)

    class Numpy:
        maximum = Alone

        def __getattr__(self, name):
            return getattr(np, name)

    monkeypatch.setattr(pairs, "np", Numpy())
    assert rates(sweep, rounds=200)[0] > 0.12


def grouped(rng):
    """Four equal trials on 12 groups of 6 rows, each trial good at groups rather than at rows."""
    return [[mean((rng.normal(0, 1, 12)[:, None] + rng.normal(0, 0.3, (12, 6))).ravel())] for _ in range(4)]


def test_groups_are_flipped_whole_or_false_winners_abound():
    groups = [n // 6 for n in range(72)]
    assert rates(grouped, groups=groups)[0] <= 0.072
    assert rates(grouped, rounds=100)[0] > 0.3


def test_set_finds_more_than_holm():
    """The first of six is better by 0.55 of the paired standard deviation, 40 rows."""
    rng = np.random.default_rng(7)
    by_set, by_holm, unpaired = [], [], 0
    for _ in range(200):
        points = sweep(rng, effect=0.39)
        found = compare(points, LOW, signs=499, draws=2)
        by_set.append(np.mean([p <= 0.05 for p in found.p_best[1:]]))
        by_holm.append(np.mean([p.holm <= 0.05 for p in found.pairs if p.first == 0]))
        unpaired += reference.ttest_ind(points[0][0].num, points[1][0].num).pvalue <= 0.05
    assert np.mean(by_set) > np.mean(by_holm) + 0.04
    assert np.mean(by_set) > 0.6
    assert unpaired / 200 < 0.4  # the twin: without pairing hard rows hide the effect, even uncorrected


def test_difference_intervals_cover_the_truth():
    rng = np.random.default_rng(8)
    for runs, seed in ((1, 0.0), (3, 0.2)):
        hits = []
        for _ in range(250):
            pair = compare(sweep(rng, trials=3, runs=runs, seed=seed, effect=0.4), LOW, signs=9, draws=399).pairs[0]
            hits.append(pair.low <= -0.4 <= pair.high)
        assert 0.92 <= np.mean(hits) <= 0.985


def test_point_interval_counts_seeds_too():
    """The true score is that of the point: over rows and over training again."""
    rng = np.random.default_rng(9)
    both, rows_only = [], []
    for _ in range(250):
        points = sweep(rng, trials=3, runs=3, seed=0.4)
        score = compare(points, LOW, signs=9, draws=399).scores[1]
        both.append(score.low <= 1 <= score.high)
        own = columns.interval(points[1][0], draws=399)
        rows_only.append(own.low <= 1 <= own.high)
    assert 0.91 <= np.mean(both) <= 0.99
    assert np.mean(rows_only) < 0.85  # the twin


def test_optimism_of_few_rows_is_the_mean_over_all_signs():
    """Every one of 2 ** 6 sign vectors by hand, mirror images too; the best of equals never looks worse than it is."""
    one, two = [1.0, 2.0, 4.0, 3.0, 2.5, 1.5], [1.2, 2.1, 3.7, 3.3, 2.4, 1.9]
    centred = np.array([one, two]) - np.mean([one, two], axis=1, keepdims=True)
    by_hand = np.mean([(centred @ np.array(signs) / 6).max() for signs in product([1, -1], repeat=6)])
    found = pairs.compare([[columns.mean(one)], [columns.mean(two)]], Direction.minimize).optimism
    assert found == pytest.approx(by_hand)
    assert found > 0


def test_all_right_in_every_seed_beats_all_wrong():
    """Neither rows nor seeds differ, so there is no noise at all; equal points still cannot be told apart."""
    right, wrong = [mean(np.ones(24))] * 3, [mean(np.zeros(24))] * 3
    found = compare([right, wrong, right], Direction.maximize)
    assert [p.p for p in found.pairs] == [pytest.approx(1e-4, rel=0.2), 1.0, pytest.approx(1e-4, rel=0.2)]
    assert indistinguishable(found).members == (0, 2)


def test_two_runs_that_agree_by_chance_leave_the_rows_their_noise():
    """Each of two runs misses one row, another one: equal scores, and still 20 rows are but 20 rows."""
    one, other = np.ones(20), np.ones(20)
    one[3] = other[5] = 0
    [score] = compare([[mean(one), mean(other)]], Direction.maximize).scores
    assert score.value == 0.95
    assert (score.low, score.high) == pytest.approx(columns.wilson(0.95, 20))
