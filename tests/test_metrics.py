"""Metrics against independent implementations and numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from ftexp import metrics
from ftexp.errors import ConfigError
from ftexp.metrics import METRICS, Direction

TEXTS = st.text(alphabet="ab cde", max_size=12)


def test_loss_equals_cross_entropy_of_torch():
    torch.manual_seed(0)
    logits, targets = torch.randn(37, 11, dtype=torch.float64), torch.randint(11, (37,))
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    rows, tokens = nats.split([5, 1, 31]), [5, 1, 31]
    measured = metrics.loss([r.sum().item() for r in rows], tokens)
    assert measured == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), abs=1e-12)


def test_perplexity_of_known_probabilities():
    # two documents, tokens of probability 1/2 (3 of them) and 1/4 (1): exp((3 ln 2 + ln 4) / 4) = 2 ** (5 / 4)
    assert metrics.perplexity([3 * math.log(2), math.log(4)], [3, 1]) == pytest.approx(2**1.25, abs=1e-12)


def test_perplexity_of_uniform_model_is_vocabulary():
    assert metrics.perplexity([math.log(49152) * 7], [7]) == pytest.approx(49152)


def test_mean_of_row_means_is_another_number():
    nats, tokens = [3 * math.log(2), math.log(4)], [3, 1]
    means = sum(n / t for n, t in zip(nats, tokens, strict=True)) / 2
    assert abs(metrics.loss(nats, tokens) - means) > 0.1


def test_perplexity_overflow_is_inf():
    assert metrics.perplexity([1e6], [1]) == math.inf


def test_bits_per_byte_by_hand():
    # 16 bits in all, for 2 + 4 bytes ("é" is two)
    assert metrics.bits_per_byte([16 * math.log(2)], [len("é".encode()) + 4]) == pytest.approx(16 / 6)


@pytest.mark.parametrize("function", [metrics.loss, metrics.bits_per_byte])
def test_nothing_to_score_is_an_error(function):
    with pytest.raises(ValueError, match="at least one"):
        function([0.0], [0])


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "jaccard", "f1"),
    [
        ("Ready, I am.", "Ready, I am.", 1, 1, 1),
        ("ready i am", "Ready, I am.", 0, 1, 1),
        ("I am ready.", "Ready, I am.", 0, 1, 1),  # a bag of words has no order
        ("", "Ready, I am.", 0, 0, 0),
        ("", "", 1, 1, 1),
        ("the", "a", 0, 1, 1),  # articles are dropped, both are empty
        ("a b b c", "b c c d", 0, 2 / 5, 4 / 7),  # "a" is an article: {b2 c1} and {b1 c2 d1}: common 2, union 5
        ("x  y", "x y", 1, 1, 1),
    ],
)
def test_text_metrics_by_hand(prediction, reference, exact, jaccard, f1):
    assert metrics.exact_match(prediction, reference) == exact
    assert metrics.jaccard(prediction, reference) == pytest.approx(jaccard)
    assert metrics.f1(prediction, reference) == pytest.approx(f1)


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS)
def test_jaccard_equals_sklearn_on_sets(a, b):
    """Where no word repeats, the multiset form is the set form, which sklearn has."""
    a, b = (" ".join(dict.fromkeys(metrics.words(t))) for t in (a, b))
    vocabulary = sorted({*a.split(), *b.split()})
    if not vocabulary:
        return
    present = [[w in t.split() for w in vocabulary] for t in (a, b)]
    assert metrics.jaccard(a, b) == pytest.approx(jaccard_score(*present))


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS)
def test_f1_equals_squad_scorer(a, b):
    """The loop of SQuAD's evaluation script, v1.1, rewritten from its formula: precision and recall over words."""
    p, r = metrics.words(a), metrics.words(b)
    left = list(r)
    common = sum(1 for w in p if w in left and not left.remove(w))
    if not p or not r:
        expected = float(p == r)
    elif common == 0:
        expected = 0.0
    else:
        precision, recall = common / len(p), common / len(r)
        expected = 2 * precision * recall / (precision + recall)
    assert metrics.f1(a, b) == pytest.approx(expected)


def test_every_metric_has_a_direction():
    assert {name: m.direction.value for name, m in METRICS.items() if name.startswith("valid/")} == {
        "valid/loss": "minimize",
        "valid/perplexity": "minimize",
        "valid/bits_per_byte": "minimize",
        "valid/exact_match": "maximize",
        "valid/jaccard": "maximize",
        "valid/f1": "maximize",
    }


def test_costs_are_minimized():
    assert {m.direction for name, m in METRICS.items() if name.startswith("cost/")} == {Direction.minimize}


@pytest.mark.parametrize(
    ("name", "generates", "message"),
    [("valid/los", True, "objectives must be among"), ("valid/f1", False, "needs eval.generate=true")],
)
def test_impossible_objective_is_refused(name, generates, message):
    with pytest.raises(ConfigError, match=message):
        metrics.check_objective(name, generates)


def test_nan_never_wins():
    for direction in Direction:
        assert not metrics.better(math.nan, 1.0, direction)
        assert metrics.better(1.0, math.nan, direction)
