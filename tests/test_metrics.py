"""Metrics against independent implementations and numbers worked out by hand."""

import math
from collections import Counter

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


SMALLER_IS_BETTER = {"loss", "perplexity", "bits_per_byte", "memorised", "unparsable", "trainable", "memory_gib",
                     "gpu_memory_gib", "seconds", "before", "after", "chosen_loss", "kl", "length"}  # fmt: skip


def test_directions_by_hand():
    assert {name.split("/")[1] for name, m in METRICS.items() if m.direction is Direction.minimize} == SMALLER_IS_BETTER


def test_base_and_tuned_model_have_the_same_metrics():
    for rival in ("base", "tfidf"):
        shared = [name for name in metrics.SCORES if f"{rival}/{name}" in METRICS]
        told = [
            (METRICS[f"{s}/{name}"].direction, METRICS[f"{s}/{name}"].unit) for s in ("valid", rival) for name in shared
        ]
        assert len(shared) >= 10 and told[: len(shared)] == told[len(shared) :]
    assert not set(metrics.SCORES) & set(metrics.COUNTS)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("valid/los", {"eval.generate"}, r"objectives must be among .*, got 'valid/los'; did you mean valid/loss\?"),
        ("valid/tokens", {"eval.generate"}, "objectives must be among"),
        ("train/grad_norm", {"eval.generate"}, "objectives must be among"),
        ("valid/f1", set(), r"objectives: valid/f1 needs eval\.generate, which is off"),
        ("base/chrf", set(), r"needs eval\.generate"),
        (
            "test/loss",
            set(),
            r"objectives: test/loss is of sealed rows, which rank nothing; use valid/loss, then ftexp",
        ),
        ("perplexity", set(), r"did you mean valid/perplexity\?$"),
        ("loss", set(), r"did you mean valid/loss\?$"),
        ("tst/loss", set(), r"did you mean (?!test)\w+/loss\?"),
    ],
)
def test_impossible_objective_is_refused(name, given, message):
    with pytest.raises(ConfigError, match=message):
        metrics.check_objective(name, given)


@pytest.mark.parametrize(
    "name", [name for name, metric in METRICS.items() if not metric.sealed and not metric.afterwards]
)
def test_every_metric_can_be_the_objective(name):
    assert metrics.check_objective(name, {key for m in METRICS.values() for key in m.needs}) is METRICS[name]


def test_nan_never_wins():
    for direction in Direction:
        assert not metrics.better(math.nan, 1.0, direction)
        assert metrics.better(1.0, math.nan, direction)


def chrf_by_formula(prediction, reference):
    """Popovic 2015: precision and recall averaged over the orders both texts have, then F2."""
    p, r = ("".join(t.split()) for t in (prediction, reference))
    precisions, recalls = [], []
    for n in range(1, 7):
        grams = [Counter(t[k : k + n] for k in range(len(t) - n + 1)) for t in (p, r)]
        totals = [g.total() for g in grams]
        if all(totals):
            common = sum(min(count, grams[1][gram]) for gram, count in grams[0].items())
            precisions.append(common / totals[0])
            recalls.append(common / totals[1])
    if not any(precisions):
        return float(not p and not r)
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * precision * recall / (4 * precision + recall)


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS)
def test_chrf_equals_its_formula(a, b):
    assert metrics.chrf(a, b) == pytest.approx(chrf_by_formula(a, b), abs=1e-12)


def test_chrf_by_hand():
    # unigrams 2 of 3 and 2 of 2, bigrams 1 of 2 and 1 of 1: p = (2/3 + 1/2) / 2, r = 1, F2 = 5 p / (4 p + 1)
    assert metrics.chrf("abc", "ab") == pytest.approx(5 * (7 / 12) / (4 * (7 / 12) + 1))


def rouge_by_table(prediction, reference):
    """The textbook table of longest common subsequences, cell by cell."""
    a, b = metrics.tokens(prediction), metrics.tokens(reference)
    if not a and not b:
        return 1.0
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    if not common:
        return 0.0
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall)


LONG = st.text(alphabet="ab  c,", max_size=150)  # more than 64 tokens: no machine word holds them


@settings(max_examples=200, deadline=None)
@given(LONG, LONG)
def test_rouge_l_equals_the_textbook_table(a, b):
    assert metrics.rouge_l(a, b) == pytest.approx(rouge_by_table(a, b))


@settings(max_examples=200, deadline=None)
@given(LONG, LONG)
def test_rouge_l_equals_googles(a, b):
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="pip install rouge-score").RougeScorer(["rougeL"])
    if metrics.tokens(a) or metrics.tokens(b):
        assert metrics.rouge_l(a, b) == pytest.approx(scorer.score(b, a)["rougeL"].fmeasure)


def test_rouge_l_counts_order_where_f1_does_not():
    assert metrics.rouge_l("am I ready", "Ready, I am.") == pytest.approx(1 / 3)
    assert metrics.f1("am I ready", "Ready, I am.") == 1
    assert metrics.rouge_l("지도", "지도") == 1  # every script has words


def test_distinct_by_hand():
    written = ["A b a b", "", "b"]
    assert metrics.distinct(written, 1) == 2 / 5
    assert metrics.distinct(written, 2) == 2 / 3  # ab ba ab; no pair crosses from one text to the next
    assert metrics.distinct(["", "!"], 1) == 0


def test_copies_of_training_rows_are_found():
    trained = {"very brave the pilot is", "?!"}
    assert metrics.memorised("VERY  brave, the pilot is", trained) == 1
    assert metrics.memorised("Very brave the pilot was", trained) == 0
    assert metrics.memorised("", trained | {""}) == 0  # silence copies nothing


@pytest.mark.parametrize("margin", [-1000.0, -30.0, -0.5, 0.0, 1e-9, 2.0, 800.0])
def test_loss_of_a_pair_equals_torchs(margin):
    expected = -torch.nn.functional.logsigmoid(torch.tensor(margin, dtype=torch.float64))
    assert metrics.pair_loss(margin) == pytest.approx(expected.item(), rel=1e-12, abs=1e-300)


def test_metrics_of_pairs_belong_to_their_methods():
    needs = {name: set(metrics.METRICS[name].needs) for name in metrics.METRICS}
    both = {metrics.REWARD, metrics.DPO}
    assert needs["valid/accuracy"] == needs["valid/margin"] == both
    assert needs["base/accuracy"] == needs["base/chosen_loss"] == {metrics.DPO}
    assert needs["tfidf/accuracy"] == needs["tfidf/roc_auc"] == {metrics.REWARD}
    assert needs["tfidf/f1_macro"] == {metrics.CLASSIFY}
    assert needs["tfidf/loss"] == {metrics.CLASSIFY, metrics.REWARD}
    assert needs["base/loss"] == {metrics.SFT, metrics.DPO, metrics.RLOO}
    assert needs["base/reward"] == needs["valid/win_rate"] == needs["valid/kl"] == {metrics.RLOO}
    assert needs["base/exact_match"] == {"eval.generate"}
    assert not {"base/roc_auc", "tfidf/perplexity", "base/roc_auc_macro"} & needs.keys()
