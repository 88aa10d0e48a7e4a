"""Label scores against scikit-learn over random sets, with each documented difference, and by hand."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from ftexp import labels

NAMES = ["a", "b", "c", "d"]
SETS = st.lists(
    st.tuples(st.frozensets(st.sampled_from(NAMES)), st.frozensets(st.sampled_from(NAMES))), min_size=1, max_size=12
)
MEASURES = [(labels.f1, sk.f1_score), (labels.jaccard, sk.jaccard_score)]


def matrix(sets):
    return np.array([[name in s for name in NAMES] for s in sets], dtype=int)


@pytest.mark.parametrize(("measure", "reference"), MEASURES, ids=["f1", "jaccard"])
@settings(max_examples=150, deadline=None)
@given(rows=SETS)
def test_averages_equal_sklearn(measure, reference, rows):
    truth, predicted = zip(*rows, strict=True)
    y, p = matrix(truth), matrix(predicted)
    assert labels.samples(measure, truth, predicted) == pytest.approx(
        reference(y, p, average="samples", zero_division=1)  # a row without labels, left without, is right
    )
    assert labels.micro(measure, truth, predicted) == pytest.approx(reference(y, p, average="micro", zero_division=1))
    value, undefined = labels.macro(measure, truth, predicted, NAMES)
    used = np.flatnonzero(y.sum(0) + p.sum(0))
    assert undefined == 4 - len(used)
    each = reference(y, p, average=None, zero_division=0)
    assert value == pytest.approx(np.mean(each[used]) if len(used) else math.nan, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(rows=SETS)
def test_macro_f1_is_sklearns_with_undefined_labels_as_nan(rows):
    truth, predicted = zip(*rows, strict=True)
    expected = sk.f1_score(matrix(truth), matrix(predicted), average="macro", zero_division=np.nan)
    assert labels.macro(labels.f1, truth, predicted, NAMES)[0] == pytest.approx(expected, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(rows=SETS)
def test_subset_accuracy_and_table_equal_sklearn(rows):
    truth, predicted = zip(*rows, strict=True)
    y, p = matrix(truth), matrix(predicted)
    assert labels.subset_accuracy(truth, predicted) == pytest.approx(sk.accuracy_score(y, p))
    precision, recall, f1, support = sk.precision_recall_fscore_support(y, p, zero_division=np.nan)
    for n, row in enumerate(labels.table(truth, predicted, NAMES)):
        assert (row["label"], row["true"], row["predicted"]) == (NAMES[n], support[n], p[:, n].sum())
        told = [math.nan if row[k] is None else row[k] for k in ("precision", "recall", "f1")]
        assert told == pytest.approx([precision[n], recall[n], f1[n]], nan_ok=True)


SCORED = st.lists(
    st.tuples(
        st.frozensets(st.sampled_from(NAMES)), st.lists(st.integers(0, 5).map(lambda n: n / 5), min_size=4, max_size=4)
    ),
    min_size=1,
    max_size=15,
)  # few different scores, so that ties are the rule


@settings(max_examples=200, deadline=None)
@given(rows=SCORED)
def test_roc_auc_equals_sklearn(rows):
    truth, scores = zip(*rows, strict=True)
    y, s = matrix(truth), np.array(scores)
    two = [n for n in range(4) if 0 < y[:, n].sum() < len(y)]
    value, undefined = labels.roc_auc_macro(truth, scores, NAMES)
    assert undefined == 4 - len(two)
    expected = np.mean([sk.roc_auc_score(y[:, n], s[:, n]) for n in two]) if two else math.nan
    assert value == pytest.approx(expected, nan_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = sk.roc_auc_score(y.ravel(), s.ravel())
    assert labels.roc_auc_micro(truth, scores, NAMES) == pytest.approx(flat, nan_ok=True)


def test_roc_auc_by_hand():
    # pairs (true, other): .9 > .5, .9 > .1, .5 = .5 counts a half, .5 > .1
    assert labels.roc_auc([True, False, True, False], [0.9, 0.5, 0.5, 0.1]) == 3.5 / 4
    with pytest.raises(ValueError, match="finite"):
        labels.roc_auc([True, False], [math.nan, 0.1])


@settings(max_examples=200, deadline=None)
@given(rows=SCORED)
def test_no_threshold_has_a_higher_f1(rows):
    """Against every cut that the scores allow, scored by sklearn."""
    truth, scores = [("a" in t) for t, _ in rows], [s[0] for _, s in rows]
    fitted = labels.threshold(truth, scores)
    if not any(truth):
        assert fitted is None
        return
    reached = sk.f1_score(truth, [s >= fitted for s in scores], zero_division=0)
    assert reached == pytest.approx(
        max(sk.f1_score(truth, [s >= cut for s in scores], zero_division=0) for cut in scores)
    )


def test_threshold_between_neighbouring_floats_still_parts_them():
    low = 0.1
    high = math.nextafter(low, 1)
    assert labels.threshold([True, False], [high, low]) == high


def test_single_label_rows():
    """With sets of one, micro F1, subset accuracy and accuracy are one number."""
    truth, scores = [{"a"}, {"b"}, {"b"}], [[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]]
    predicted = labels.choose(scores, ["a", "b"])
    assert predicted == [{"a"}, {"a"}, {"b"}]
    assert labels.micro(labels.f1, truth, predicted) == labels.subset_accuracy(truth, predicted) == pytest.approx(2 / 3)
    # a: 1 hit, 1 extra: 2/3; b: 1 hit, 1 missed: 2/3
    assert labels.macro(labels.f1, truth, predicted, ["a", "b"]) == (pytest.approx(2 / 3), 0)


def test_name_that_is_no_label_counts_against_its_row():
    told = labels.scores([{"a"}, {"b"}], [{"a", "zzz"}, {"b"}], ["a", "b"])
    assert told["f1_micro"] == pytest.approx(4 / 5)
    assert told["f1_samples"] == pytest.approx((2 / 3 + 1) / 2)
    assert told["jaccard_samples"] == pytest.approx(3 / 4)
    assert told["subset_accuracy"] == 0.5
    assert told["f1_macro"] == 1
    assert (told["labels"], told["labels_undefined"]) == (2, 0)


@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("Drama, Slice of  Life", ", ", {"drama", "slice of life"}),
        ("drama,comedy,, drama", ", ", {"drama", "comedy"}),
        ("red green", " ", {"red", "green"}),
        ("one\ntwo words", "\n", {"one", "two words"}),
        ("a | b", "|", {"a", "b"}),
        (" , ", ", ", set()),
        ("코미디, 드라마", ",", {"코미디", "드라마"}),
        ("no separator here", ";", {"no separator here"}),
    ],
)
def test_text_to_labels(text, separator, expected):
    assert labels.parse(text, separator) == expected
