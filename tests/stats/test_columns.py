"""Intervals by hand, against scipy, and by their coverage of a known truth."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from ftexp import metrics
from ftexp.stats import columns
from ftexp.stats.columns import Column, Interval, interval, mean, ratio, wilson

ROWS = st.lists(st.tuples(st.floats(0, 50), st.integers(1, 40)), min_size=1, max_size=12)


def test_loss_is_the_metric_of_the_leaderboard():
    nats, tokens = [2.0, 0.4, 7.5], [1, 3, 11]
    assert ratio(nats, tokens).value == pytest.approx(metrics.loss(nats, tokens), abs=1e-15)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.floats(-2, 2))
def test_contributions_average_to_the_score(rows, at):
    column = ratio(*zip(*rows, strict=True))
    assert columns.contributions(column, at).mean() == pytest.approx(column.value - at, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.data())
def test_grouping_keeps_the_score_and_the_sums(rows, data):
    column = ratio(*zip(*rows, strict=True))
    groups = data.draw(st.lists(st.sampled_from("abc"), min_size=len(rows), max_size=len(rows)))
    units = columns.grouped(column, groups)
    assert len(units.num) == len(set(groups))
    assert units.value == pytest.approx(column.value)
    for name, total in zip(dict.fromkeys(groups), units.den, strict=True):
        assert total == sum(d for (_, d), g in zip(rows, groups, strict=True) if g == name)


@pytest.mark.parametrize("column", [lambda: ratio([1.0], [0]), lambda: ratio([1.0, 2], [1]), lambda: mean([]),
                                    lambda: ratio([1.0, 1.0], [3, -1])])  # fmt: skip
def test_impossible_column_is_refused(column):
    with pytest.raises(ValueError):
        column()


def test_groups_of_another_length_are_refused():
    with pytest.raises(ValueError, match="one group a row, got 2 for 3 rows"):
        interval(mean([1, 2, 3]), ["a", "b"])


def test_bca_equals_scipy():
    """For many rows the tails widen by nothing that shows; scipy resamples rows of the ratio by itself."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(5, 40, 300)
    nats = tokens * rng.lognormal(-1, 1, 300)
    ours = interval(ratio(nats, tokens), draws=9999)
    theirs = reference.bootstrap((nats, tokens), lambda n, d, axis: n.sum(axis) / d.sum(axis), paired=True,
                                 vectorized=True, n_resamples=9999, rng=1).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)
    symmetric = 2 * ours.value - ours.high
    assert ours.low - symmetric > 0.05 * width  # skewed rows: the interval leans, as a normal one would not


def test_wilson_by_hand():
    # share 0 of 10 rows: low 0, high z^2 / (n + z^2) = 3.8415 / 13.8415
    assert columns.wilson(0, 10) == pytest.approx((0, 3.8415 / 13.8415), abs=1e-4)
    ours = columns.wilson(0.75, 24)
    theirs = reference.binomtest(18, 24).proportion_ci(method="wilson")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_all_right_is_not_certain():
    found = interval(mean([1.0] * 24))
    assert found.high == 1
    assert found.low < 0.9


@pytest.mark.parametrize("column", [mean([0.3]), mean([1.0]), ratio([1.0, math.nan], [2, 2]), mean([1, math.inf])])
def test_one_row_or_nan_has_no_interval(column):
    found = interval(column)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_one_group_has_no_interval():
    assert math.isnan(interval(mean([0.1, 0.2]), ["a", "a"]).low)


def test_equal_rows_give_no_width():
    assert interval(mean([0.3] * 9)) == columns.Interval(*[pytest.approx(0.3)] * 3)


def test_same_table_gives_same_interval_and_no_other_table_the_same_draws():
    column = mean([0.1, 0.5, 0.2, 0.9, 0.4])
    assert interval(column) == interval(Column(column.num.copy(), column.den.copy()))


def covered(make, truth, groups=None, rounds=400, draws=799):
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(rounds):
        found = interval(make(rng), groups, draws=draws)
        hits += found.low <= truth <= found.high
    return hits / rounds


def nats(rng):
    tokens = rng.integers(5, 40, 60)
    return ratio(tokens * rng.gamma(1, 0.1, 60), tokens)


def f1(rng):
    return mean(np.where(rng.random(40) < 0.7, 1.0, rng.random(40)))


def exact(rng):
    return mean(rng.random(24) < 0.95)


@pytest.mark.parametrize(("make", "truth"), [(nats, 0.1), (f1, 0.85), (exact, 0.95)])
def test_intervals_cover_the_truth(make, truth):
    assert 0.92 <= covered(make, truth) <= 0.985


def clustered(rng):
    """12 groups of 8 rows; most of the variance is between groups."""
    return mean((rng.normal(0, 1, 12)[:, None] + rng.normal(0, 0.3, (12, 8))).ravel())


def test_groups_are_drawn_whole_or_coverage_is_lost():
    groups = [n // 8 for n in range(96)]
    assert 0.91 <= covered(clustered, 0.0, groups) <= 0.985
    assert covered(clustered, 0.0) < 0.7  # the twin: rows drawn one by one


def test_widened_tails_are_needed(monkeypatch):
    def few(rng):
        return mean(rng.normal(0, 1, 8))

    widened = covered(few, 0.0)
    monkeypatch.setattr(columns.t, "isf", lambda q, df: reference.norm.isf(q) * math.sqrt(df / (df + 1)))  # plain BCa
    assert widened > 0.9
    assert covered(few, 0.0) < widened - 0.02


@pytest.mark.parametrize("units", [2, 3, 5])
def test_intervals_of_few_units_cover_the_truth(units, monkeypatch):
    def few(rng):
        return mean(rng.normal(0, 1, units))

    assert covered(few, 0.0) >= 0.92
    monkeypatch.setattr(columns, "FEW", 0)  # the twin: draws never leave the range of the rows
    assert covered(few, 0.0) < {2: 0.6, 3: 0.8, 5: 0.94}[units]


def test_one_prompt_twice_leaves_a_share_its_width():
    """All of 128 rows right, two of one prompt: as wide as 127 rows alone."""
    groups = [0, *range(127)]
    found = interval(mean([1.0] * 128), groups)
    assert (found.low, found.high) == wilson(1.0, 127)
    assert interval(mean([0.0] * 128), groups).high > 0.02


def test_grouped_rows_of_one_answer_are_worth_their_groups():
    """Groups of six equal rows: the variance by groups is n - 1 times that of the groups' own binomial over n."""
    rows, groups = [float(n % 3 > 0) for n in range(30) for _ in range(6)], [n for n in range(30) for _ in range(6)]
    careful = (reference.norm.isf(0.025) / reference.t.isf(0.025, 29)) ** 2
    assert columns.effective(mean(rows), groups) == pytest.approx(careful * 29)
    assert columns.effective(mean(rows), None) == 180


def correlated(rng):
    """12 groups of 6 answers, correlated by 0.5."""
    return mean((rng.random((12, 6)) < rng.beta(0.85, 0.15, 12)[:, None]).ravel())


def test_shares_of_groups_cover_the_truth():
    groups = [n // 6 for n in range(72)]
    assert covered(correlated, 0.85, groups) >= 0.9
    assert covered(correlated, 0.85) < 0.85  # the twin: rows for independent


def test_difference_of_independent_scores_covers_the_truth():
    """Shares of 0.6 on 60 rows and 0.9 on 200: halves of unequal width, the difference in 95 of 100 intervals."""
    rng = np.random.default_rng(0)
    hits = 0
    for a, b in zip(rng.binomial(60, 0.6, 2000) / 60, rng.binomial(200, 0.9, 2000) / 200, strict=True):
        found = columns.difference(Interval(a, *wilson(a, 60)), Interval(b, *wilson(b, 200)))
        hits += found.low <= -0.3 <= found.high
        assert found.low < found.value == a - b < found.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)
