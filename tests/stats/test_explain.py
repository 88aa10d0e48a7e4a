"""Importance, marginal means and the Pareto front with known answers."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftexp.metrics import Direction
from ftexp.stats import explain
from ftexp.stats.explain import importance, marginal, pareto, together

LOW, HIGH = Direction.minimize, Direction.maximize


def search(trials=40, seed=0):
    rng = np.random.default_rng(seed)
    lr = 10 ** rng.uniform(-4, -2, trials)
    params = {"trainer.lr": lr.tolist(), "lora.r": rng.choice([8, 16, 64], trials).tolist(),
              "lora": rng.choice(["dora", "default"], trials).tolist(), "seed": [0] * trials}  # fmt: skip
    return params, ((np.log10(lr) + 3) ** 2 + 0.01 * rng.normal(size=trials)).tolist()


def test_what_decides_is_most_important():
    params, values = search()
    found = importance(params, values, LOW, resamples=30)
    assert next(iter(found)) == "trainer.lr"
    assert set(found) == {"trainer.lr", "lora.r", "lora"}  # seed has one value
    assert sum(i.value for i in found.values()) == pytest.approx(1)
    assert found["trainer.lr"].low > max(found["lora.r"].value, found["lora"].value)
    assert all(0 <= i.low <= i.high <= 1 for i in found.values())


def test_importance_follows_the_direction():
    """The best by the other direction lie at both ends of the learning rate, which is no news where few trials are."""
    params, values = search()
    assert importance(params, [-v for v in values], HIGH, resamples=5) == importance(params, values, LOW, resamples=5)
    assert importance(params, values, HIGH, resamples=5) != importance(params, values, LOW, resamples=5)


def test_importance_equals_optuna_on_a_study():
    import optuna

    params, values = search()
    study = optuna.create_study()
    space = {"trainer.lr": optuna.distributions.FloatDistribution(min(params["trainer.lr"]), max(params["trainer.lr"]), log=True),
             "lora.r": optuna.distributions.CategoricalDistribution(tuple(dict.fromkeys(params["lora.r"]))),
             "lora": optuna.distributions.CategoricalDistribution(tuple(dict.fromkeys(params["lora"])))}  # fmt: skip
    for n, value in enumerate(values):
        study.add_trial(
            optuna.trial.create_trial(params={k: params[k][n] for k in space}, distributions=space, value=value)
        )
    judge = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    theirs = optuna.importance.get_param_importances(study, evaluator=judge)
    ours = importance(params, values, LOW, resamples=1)
    assert {k: i.value for k, i in ours.items()} == pytest.approx(theirs)


def test_a_key_counts_over_the_trials_that_search_it():
    """As optuna does where a trial lacks the key, whatever the other keys are."""
    import optuna

    params, values = search()
    params["lora.r"] = [
        None if lora == "default" else r for r, lora in zip(params["lora.r"], params["lora"], strict=True)
    ]
    searched = sum(r is not None for r in params["lora.r"])
    assert 0 < searched < 40
    found = importance(params, values, LOW, resamples=20)
    assert set(found) == {"trainer.lr", "lora.r", "lora"}
    assert sum(i.value for i in found.values()) == pytest.approx(1)
    study = optuna.create_study()
    space = {"trainer.lr": optuna.distributions.FloatDistribution(min(params["trainer.lr"]), max(params["trainer.lr"]), log=True),
             "lora.r": optuna.distributions.CategoricalDistribution((8, 16, 64)),
             "lora": optuna.distributions.CategoricalDistribution(("dora", "default"))}  # fmt: skip
    for n, value in enumerate(values):
        there = {k: params[k][n] for k in space if params[k][n] is not None}
        study.add_trial(
            optuna.trial.create_trial(params=there, distributions={k: space[k] for k in there}, value=value)
        )
    judge = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    theirs = optuna.importance.get_param_importances(study, evaluator=judge)
    assert {k: i.value for k, i in found.items()} == pytest.approx(theirs)


def test_a_key_that_few_trials_search_may_miss_a_resample():
    params, values = search(20)
    params["rare"] = [1, 2, *[None] * 18]
    found = importance(params, values, LOW, resamples=40)
    assert found["rare"].low == 0


def test_few_or_constant_trials_tell_no_importance():
    params, values = search(explain.FEWEST - 1)
    assert importance(params, values, LOW) == {}
    params, values = search(12)
    assert importance(params, [*values[:5], *[math.nan] * 7], LOW) == {}
    assert importance({"seed": [0] * 12}, values, LOW) == {}


def test_marginal_means_by_hand():
    found = marginal([8, 16, 8, 16, 16], [0.2, 0.1, 0.4, 0.2, 0.3])
    assert [(b.low, b.high, b.trials) for b in found] == [(8, 8, 2), (16, 16, 3)]
    assert [b.mean for b in found] == pytest.approx([0.3, 0.2])
    # sd of 0.2 and 0.4 is 0.1414, over root 2 is 0.1, times t(1) = 12.706
    assert found[0].ends == pytest.approx((0.3 - 1.2706, 0.3 + 1.2706), abs=1e-4)


def test_marginal_of_names_alone_and_of_nan():
    found = marginal(["dora", "default", "dora"], [0.1, math.nan, 0.3])
    assert [(b.low, b.trials) for b in found] == [("dora", 2)]
    assert math.isnan(marginal(["a"], [0.1])[0].sd)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-4, 1e-2), min_size=12, max_size=60, unique=True), st.integers(2, 5))
def test_ranges_hold_each_trial_once_and_in_order(column, bins):
    found = marginal(column, column, bins)
    assert sum(b.trials for b in found) == len(column)
    assert all(a.high < b.low for a, b in pairwise(found))
    assert len(column) <= 2 * bins or max(b.trials for b in found) - min(b.trials for b in found) <= 2


def test_pareto_front_by_hand():
    table = [[1, 5], [2, 3], [2, 4], [4, 1], [4, 1], [5, 1], [math.nan, 0]]
    #         front  front  weakly   equals on it     weakly   nothing known
    assert pareto(table, [LOW, LOW]) == [True, True, False, True, True, False, False]
    assert pareto(table[:3], [LOW, HIGH]) == [True, False, False]
    assert pareto([], [LOW, LOW]) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
def test_pareto_equals_brute_force(table):
    def beats(a, b):
        a, b = (a[0], -a[1], a[2]), (b[0], -b[1], b[2])
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    assert pareto(table, [LOW, HIGH, LOW]) == [not any(beats(o, t) for o in table) for t in table]


def rates(trials=24, seed=0):
    rng = np.random.default_rng(seed)
    return 2.0 ** rng.integers(3, 8, trials), 10 ** rng.uniform(-4, -2, trials), 0.05 * rng.normal(size=trials)


def left_out(columns, values):
    """R2 by really leaving each trial out."""
    told = 0.0
    for n in range(len(values)):
        rest = [k for k in range(len(values)) if k != n]
        found, *_ = np.linalg.lstsq(np.stack([c[rest] for c in columns], axis=1), values[rest], rcond=None)
        told += (values[n] - sum(c[n] * f for c, f in zip(columns, found, strict=True))) ** 2
    return 1 - told / ((values - values.mean()) ** 2).sum()


def test_shares_are_those_of_leaving_each_trial_out():
    alpha, lr, noise = rates()
    loss = (np.log10(alpha * lr) + 1.5) ** 2 + noise
    a, b, one = np.log(alpha), np.log(lr), np.ones(24)
    told = together(alpha.tolist(), lr.tolist(), loss.tolist())
    assert told.product == pytest.approx(left_out([one, a + b, (a + b) ** 2], loss))
    assert told.apart == pytest.approx(left_out([one, a, a**2, b, b**2], loss))
    assert told.first == pytest.approx(left_out([one, a, a**2], loss))
    assert told.second == pytest.approx(left_out([one, b, b**2], loss))


def test_product_explains_what_is_its_doing_and_not_what_is_of_the_ratio():
    alpha, lr, noise = rates()
    through = together(alpha.tolist(), lr.tolist(), ((np.log10(alpha * lr) + 1.5) ** 2 + noise).tolist())
    other = together(alpha.tolist(), lr.tolist(), ((np.log10(alpha / lr) - 4) ** 2 + noise).tolist())
    assert through.product > 0.95 > through.apart
    assert other.product < 0.5


def test_too_few_trials_and_one_value_say_nothing():
    assert together([8, 16] * 4, [1e-3, 1e-2] * 4, [1.0] * 8) is None
    assert together([8] * 12, [1e-3, 1e-2] * 6, list(range(12))) is None
    assert together([8, 16] * 6, [1e-3, 1e-2] * 6, [math.nan] * 12) is None
