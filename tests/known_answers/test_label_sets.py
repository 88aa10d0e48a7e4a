"""Known answers about sets of labels."""

import random
from statistics import mean

import pytest
from sklearn.metrics import f1_score

from ftexp import labels

TRUTH, PREDICTED, NAMES = [{"a"}, {"b"}, set()], [{"a"}, set(), set()], ["a", "b", "c"]


def three_rows():
    """a: one hit, F1 1; b: one missed, F1 0; c: never true and never predicted. Row by row: right, wrong, right."""
    told = labels.scores(TRUTH, PREDICTED, NAMES)
    assert told["f1_micro"] == pytest.approx(2 / 3)
    assert told["f1_macro"] == pytest.approx(1 / 2)
    assert told["f1_samples"] == pytest.approx(2 / 3)
    assert told["jaccard_micro"] == pytest.approx(1 / 2)
    assert told["jaccard_macro"] == pytest.approx(1 / 2)
    assert told["subset_accuracy"] == pytest.approx(2 / 3)
    assert told["labels_undefined"] == 1


def test_three_rows_and_an_undefined_label():
    three_rows()


def test_a_librarys_default_says_something_else():
    y, p = ([[name in row for name in NAMES] for row in rows] for rows in (TRUTH, PREDICTED))
    told = {average: f1_score(y, p, average=average, zero_division=0) for average in ("micro", "macro", "samples")}
    assert told == {"micro": pytest.approx(2 / 3), "macro": pytest.approx(1 / 3), "samples": pytest.approx(1 / 3)}


@pytest.mark.parametrize(("guard", "broken"), [("row", 0.0), ("macro", 0.0)])
def test_sabotage_zero_for_what_is_undefined_changes_the_answer(monkeypatch, guard, broken):
    if guard == "row":  # a row without labels, left without, as wrong
        monkeypatch.setattr(labels, "row", lambda m, t, p: m(len(t & p), len(p - t), len(t - p)) or broken)
    else:  # a label that never occurs as one that is always missed
        monkeypatch.setattr(labels, "_mean_of_defined", lambda values: (mean(v or broken for v in values), 0))
    with pytest.raises(AssertionError):
        three_rows()


def chance(r, rows=200, names=20):
    """Labels that a tenth of the rows have, and scores that know nothing of them."""
    known = [f"l{n}" for n in range(names)]
    truth = [frozenset(n for n in known if r.random() < 0.1) for _ in range(rows)]
    return truth, [[r.random() for _ in known] for _ in range(rows)], known


def gain_of_thresholds():
    """Macro F1 on test rows, over that of a threshold of one half, with thresholds from held-out rows."""
    gains = []
    for seed in range(8):
        r = random.Random(seed)
        (valid, fitted_on, names), (test, scores, _) = chance(r), chance(r)
        limits = labels.thresholds(valid, fitted_on, names)
        told = [labels.macro(labels.f1, test, labels.decide(scores, how), names)[0]
                for how in (limits, dict.fromkeys(names, 0.5))]  # fmt: skip
        gains.append(told[0] - told[1])
    return mean(gains)


def test_thresholds_of_chance_gain_nothing():
    assert gain_of_thresholds() < 0.01


def test_sabotage_thresholds_fitted_on_the_test_rows_gain_from_chance(monkeypatch):
    honest, rows = chance, []

    def same_rows_twice(r):
        rows.append(honest(r) if len(rows) % 2 == 0 else rows[-1])
        return rows[-1]

    monkeypatch.setitem(globals(), "chance", same_rows_twice)
    assert gain_of_thresholds() > 0.03
