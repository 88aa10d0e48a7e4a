"""Metrics as pure functions, each with formula, source and edge cases, and the table of all that a run can report.

Sums over tokens or rows, never means of means. No model, no files, no torch.
"""

from __future__ import annotations

import difflib
import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import Any

import regex

from ftexp.config import Method
from ftexp.data.splits import normalise
from ftexp.errors import ConfigError


class Direction(Enum):
    """Which way a metric improves."""

    minimize = "minimize"
    maximize = "maximize"


@dataclass(frozen=True)
class Metric:
    """What a name in the leaderboard means."""

    direction: Direction
    """Which way it improves."""
    unit: str
    """What it is measured in."""
    needs: tuple[str, ...] = ()
    """Keys of which one must be switched on for it; empty where every run reports it."""
    sealed: bool = False
    """Whether it is of sealed rows, which only `ftexp confirm` opens: it ranks nothing."""
    afterwards: bool = False
    """Whether it ranks what is there already, and no run reports it."""


def _least(unit: str, *needs: str) -> Metric:
    return Metric(Direction.minimize, unit, needs)


def _most(unit: str, *needs: str) -> Metric:
    return Metric(Direction.maximize, unit, needs)


SFT, CLASSIFY = "trainer.kind=sft", "trainer.kind=classify"
REWARD, DPO, RLOO = "trainer.kind=reward", "trainer.kind=dpo", "trainer.kind=rloo"

SCORES = {
    "loss": _least(
        "nats a token; a decision with trainer.kind=classify, a pair with reward and dpo; with rloo what divergence "
        "costs less the reward, a row"
    ),
    "perplexity": _least("exp(nats a token)", SFT),
    "bits_per_byte": _least("bits a byte of UTF-8", SFT),
    "exact_match": _most("share of rows", "eval.generate"),
    "jaccard": _most("mean over rows", "eval.generate"),
    "f1": _most("mean over rows", "eval.generate"),
    "chrf": _most("mean over rows, 0 to 1", "eval.generate"),
    "rouge_l": _most("mean over rows", "eval.generate"),
    "distinct_1": _most("share of the words written", "eval.generate"),
    "distinct_2": _most("share of the word pairs written", "eval.generate"),
    "memorised": _least("share of rows", "eval.generate"),
    "unparsable": _least("share of rows", "eval.generate"),
    "f1_samples": _most("mean over rows", "eval.labels", CLASSIFY),
    "f1_micro": _most("over all labels of all rows", "eval.labels", CLASSIFY),
    "f1_macro": _most("mean over labels", "eval.labels", CLASSIFY),
    "jaccard_samples": _most("mean over rows", "eval.labels", CLASSIFY),
    "jaccard_micro": _most("over all labels of all rows", "eval.labels", CLASSIFY),
    "jaccard_macro": _most("mean over labels", "eval.labels", CLASSIFY),
    "subset_accuracy": _most("share of rows", "eval.labels", CLASSIFY),
    "roc_auc_macro": _most("mean over labels", CLASSIFY),
    "roc_auc_micro": _most("over all labels of all rows", CLASSIFY),
    "accuracy": _most("share of pairs whose better answer is ahead", REWARD, DPO),
    "margin": _most(
        "what the better answer is ahead by, mean over pairs; with dpo in units of 1 / beta nats", REWARD, DPO
    ),
    "roc_auc": _most("over all answers of all pairs", REWARD),
    "chosen_likelier": _most("share of pairs whose better answer the model finds likelier", DPO),
    "chosen_loss": _least("nats a token of the better answers", DPO),
    "reward": _most("by the reward model, mean over rows", RLOO),
    "win_rate": _most("share of rows whose completion is worth more than the base's", RLOO),
    "kl": _least("nats a token written, away from the base", RLOO),
    "length": _least("tokens written, mean over rows", RLOO),
}
"""What one model gets on one split, by its name without the split."""


def _of(kinds: tuple[str, ...], keys: tuple[str, ...] = ()) -> dict[str, Metric]:
    """Take the scores that methods report of their rival; of some only with another key of theirs."""
    left = {name: tuple(key for key in m.needs if key in (*kinds, *keys)) for name, m in SCORES.items()}
    return {name: replace(m, needs=left[name] or kinds) for name, m in SCORES.items() if left[name] or not m.needs}


GPU_MEMORY = "cost/gpu_memory_gib"
OWN = "valid/own"
"""The score of a function of one's own."""
METRICS = {
    **{f"valid/{name}": m for name, m in SCORES.items()},
    **{f"test/{name}": replace(m, sealed=True) for name, m in SCORES.items()},
    **{f"base/{name}": m for name, m in _of((SFT, DPO, RLOO), ("eval.generate", "eval.labels")).items()},
    **{f"tfidf/{name}": m for name, m in _of((CLASSIFY, REWARD)).items()},
    OWN: Metric(Direction.maximize, "by a function of one's own, mean over rows", afterwards=True),
    "train/loss": _least("nats a token, last step"),
    "forgetting/loss": _least("nats a token of general text, after less before", "eval.forgetting"),
    "forgetting/before": _least("nats a token of general text, base", "eval.forgetting"),
    "forgetting/after": _least("nats a token of general text, tuned", "eval.forgetting"),
    "cost/trainable": _least("weights"),
    "cost/memory_gib": _least("GiB, peak of the process"),
    GPU_MEMORY: _least("GiB, peak of the GPU, where there is one"),
    "cost/seconds": _least("seconds of training and scoring"),
}
"""Every metric that improves in a direction (a number of `COUNTS` does in none); all but the sealed can rank trials,
`OWN` afterwards."""

LOSS_UNITS = {
    Method.sft: "nats a token", Method.classify: "nats a decision", Method.reward: "nats a pair",
    Method.dpo: "nats a pair", Method.rloo: "what divergence costs less the reward, a row",
}  # fmt: skip
"""What the loss of a method is a mean over."""
UNDEFINED = "cannot be told of these held-out rows"
"""What is said of a score that is NaN."""
INFINITE, TOO_LARGE = "is not finite", "is too large for a number: e to a loss above 709"
"""What is said of a loss, and of its exp, that is none; in files both are null."""
ABSENT = "was not measured where it ran"
"""What is said of a score that is not there, as `GPU_MEMORY` of a run without a GPU."""
COUNTS = {
    "rows": "rows scored; all of them, so also the denominator of every share and mean over rows",
    "tokens": "supervised tokens scored; the denominator of the loss",
    "tokens_cut": "supervised tokens that `data.long=cut` left out of them",
    "labels": "labels that training or held-out rows name, with `eval.labels`",
    "labels_undefined": "those that no held-out row has and no completion names; left out of macro averages",
    "roc_auc_undefined": "labels that every held-out row has, or none, with `trainer.kind=classify`",
}
"""Counts that a run reports as `valid/<name>` beside its scores, and as `test/<name>` where sealed rows are opened."""


def check_objective(name: str, given: Collection[str], key: str = "objectives") -> Metric:
    """Look an objective up before anything runs.

    Args:
        name: of the metric.
        given: keys that the run has switched on, among those that metrics need.
        key: of the config, that names the metric.

    Raises:
        ConfigError: the metric is unknown, sealed or has no direction, or needs a key that is off.
    """
    if name in METRICS and METRICS[name].sealed:
        raise ConfigError(
            f"{key}: {name} is of sealed rows, which rank nothing; use valid/{name.removeprefix('test/')}, then "
            "ftexp confirm"
        )
    if name == OWN:
        raise ConfigError(f"{key}: {name} ranks a sweep that is there: ftexp report SWEEP --by scores.py:number")
    if name not in METRICS:
        rankable = [n for n, metric in METRICS.items() if not metric.sealed and not metric.afterwards]
        usual = f"valid/{name}"
        near = [usual] if usual in rankable else difflib.get_close_matches(name, rankable, n=1)
        known = ", ".join(n for n in rankable if not n.startswith(("base/", "tfidf/")))
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key} must be among {known} (base/ and tfidf/ for valid/ too), got {name!r}{hint}")
    needs = METRICS[name].needs
    if needs and not set(needs) & set(given):
        raise ConfigError(f"{key}: {name} needs {' or '.join(needs)}, which is off")
    return METRICS[name]


def ends(name: str) -> tuple[float, float]:
    """Return what a score of one model on one split cannot be below or above, by its name without the split.

    A loss has no ends: with `trainer=rloo` it may be negative.

    >>> ends("f1"), ends("kl"), ends("margin")
    ((0.0, 1.0), (0.0, inf), (-inf, inf))
    """
    if name in ENDLESS or name not in SCORES:
        return -math.inf, math.inf
    return 0.0, math.inf if name in FROM_ZERO else 1.0


ENDLESS = ("loss", "margin", "reward")
FROM_ZERO = ("perplexity", "bits_per_byte", "chosen_loss", "kl", "length")


def better(a: float, b: float, direction: Direction) -> bool:
    """Tell whether score `a` beats `b`. NaN beats nothing, and anything finite beats NaN.

    >>> better(0.1, 0.2, Direction.minimize), better(float("nan"), 9.0, Direction.minimize)
    (True, False)
    """
    if math.isnan(a) or math.isnan(b):
        return not math.isnan(a)
    return a < b if direction is Direction.minimize else a > b


def why_not(name: str, scores: Mapping[str, float]) -> str:
    """Say why a score is no finite number.

    >>> why_not("valid/perplexity", {"valid/perplexity": math.inf, "valid/loss": 800.0})
    'is too large for a number: e to a loss above 709'
    >>> why_not("valid/loss", {"valid/loss": math.nan}), why_not("valid/roc_auc", {"valid/roc_auc": math.nan})
    ('is not finite', 'cannot be told of these held-out rows')
    """
    if name not in scores:
        return ABSENT
    if overflows(name, scores):
        return TOO_LARGE
    return INFINITE if name.endswith(("loss", "perplexity", "bits_per_byte")) else UNDEFINED


def overflows(name: str, scores: Mapping[str, float]) -> bool:
    """Whether a score is a perplexity that is infinite as its finite loss is above the logarithm of all numbers."""
    loss = scores.get(name.removesuffix("perplexity") + "loss", math.nan)
    return name.endswith("/perplexity") and math.log(sys.float_info.max) < loss < math.inf


def written(value: float, style: str = ".4f") -> str:
    """Write a score for a table; a perplexity of a model that learned nothing may have 300 digits, so briefly.

    >>> written(0.25), written(999_999.5, ".3f"), written(-1.25e34), written(math.inf)
    ('0.2500', '999999.500', '-1.2e+34', 'inf')
    """
    return f"{value:.1e}" if 1e6 <= abs(value) < math.inf else format(value, style)


def mean(name: str, values: Sequence[float]) -> float:
    """Mean of a score over the seeds of a point; of perplexities the geometric one, e to the mean loss.

    So the best by perplexity is the best by loss, of which it is another name.

    >>> mean("valid/loss", [1.0, 3.0]), round(mean("valid/perplexity", [2.0, 8.0]), 9)
    (2.0, 4.0)
    """
    if not name.endswith("perplexity") or not all(value > 0 for value in values):
        return math.fsum(values) / len(values)
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def best(values: Sequence[float | None], direction: Direction) -> int | None:
    """Find the index of the best value, the first of equals; None stands for a trial without one.

    >>> best([0.3, None, 0.1, float("nan")], Direction.minimize)
    2
    """
    found: int | None = None
    for n, value in enumerate(values):
        if value is not None and not math.isnan(value):
            rival = math.nan if found is None else values[found]
            if better(value, math.nan if rival is None else rival, direction):
                found = n
    return found


def loss(nats: Sequence[float], tokens: Sequence[int]) -> float:
    """Mean negative log-likelihood of a supervised token: sum of nats over sum of tokens.

    Args:
        nats: summed negative log-likelihood of each row, natural logarithm.
        tokens: supervised tokens of each row.

    A Trainer's `eval_loss` is a mean of batch means, which weights tokens by the company they are scored in and so
    depends on the batch size (transformers issue 39241); this does not.

    >>> loss([2.0, 0.4], [1, 3])
    0.6
    """
    if not sum(tokens):
        raise ValueError("loss needs at least one supervised token, got none")
    return math.fsum(nats) / sum(tokens)


def pair_loss(margin: float) -> float:
    """Negative log-likelihood that the better answer wins, in nats: ln(1 + exp(-margin)) (Bradley and Terry 1952).

    Both answers alike: ln 2.

    >>> pair_loss(0.0) == math.log(2), pair_loss(-1000.0)
    (True, 1000.0)
    """
    return max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))


def preferred(margin: float) -> float:
    """1 where the better answer is ahead, 0 where the worse one is; a tie is a coin's throw.

    TRL counts a tie as wrong, so that a model before its first step scores 0 and not one half.

    >>> [preferred(m) for m in (0.3, 0.0, -0.3)]
    [1.0, 0.5, 0.0]
    """
    return 0.5 if margin == 0 else float(margin > 0)


def price(reward: float, nats: float, beta: float) -> float:
    """What reinforcement learning brings down, of one completion: beta * nats away from the reference - reward.

    The negative of the objective of Stiennon et al. 2020 (arXiv:2009.01325, section 3.4), with the divergence summed
    over the tokens of the completion.

    >>> price(2.0, 3.0, 0.5)
    -0.5
    """
    return beta * nats - reward


def perplexity(nats: Sequence[float], tokens: Sequence[int]) -> float:
    """Exp of `loss`: the size of the fair die that would be as hard to predict. Inf where exp overflows.

    >>> round(perplexity([math.log(10)] * 4, [1] * 4), 9)
    10.0
    """
    try:
        return math.exp(loss(nats, tokens))
    except OverflowError:
        return math.inf


def bits_per_byte(nats: Sequence[float], octets: Sequence[int]) -> float:
    """Bits to encode a byte of the reference text; comparable between tokenizers, as loss a token is not.

    Args:
        nats: summed negative log-likelihood of each row.
        octets: UTF-8 bytes of each reference completion; end-of-sequence counts nats and no byte.

    >>> bits_per_byte([math.log(2) * 6], [3])
    2.0
    """
    if not sum(octets):
        raise ValueError("bits_per_byte needs at least one byte of text, got none")
    return math.fsum(nats) / math.log(2) / sum(octets)


def exact_match(prediction: str, reference: str) -> float:
    """1 where the texts are equal after NFC and with outer space stripped and inner space folded, else 0.

    Case and punctuation count, unlike SQuAD's exact match, which drops both and the articles.

    >>> exact_match(" Ready, I am. ", "Ready, I am."), exact_match("ready, i am", "Ready, I am.")
    (1.0, 0.0)
    """
    return float(_folded(prediction) == _folded(reference))


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def words(text: str) -> list[str]:
    """Split a text as SQuAD v1.1's official scorer does: lower case, no ASCII punctuation, no articles.

    >>> words("The pilot's map, a good one!")
    ['pilots', 'map', 'good', 'one']
    """
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _overlap(prediction: str, reference: str) -> tuple[int, int, int]:
    """Common words, words predicted and words in the reference, each word as often as it occurs."""
    p, r = Counter(words(prediction)), Counter(words(reference))
    return (p & r).total(), p.total(), r.total()


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of word precision and recall over bags of words (Rajpurkar et al. 2016, SQuAD).

    2 * common / (predicted + reference), each word as often as it occurs. Word order does not count. Both empty: 1;
    one empty: 0.

    >>> f1("ready ready", "ready i am")
    0.4
    """
    common, p, r = _overlap(prediction, reference)
    return 1.0 if p == r == 0 else 2 * common / (p + r)


def jaccard(prediction: str, reference: str) -> float:
    """Intersection over union of bags of words, after SQuAD's normalisation.

    The multiset form: min and max of the counts. The set form, which some libraries use, forgives repetition. Word
    order does not count. Both empty: 1; one empty: 0.

    >>> jaccard("ready ready", "ready i am")
    0.25
    """
    common, p, r = _overlap(prediction, reference)
    return 1.0 if p == r == 0 else common / (p + r - common)


def chrf(prediction: str, reference: str) -> float:
    """F2 of character n-grams, n = 1 to 6, without white space (Popovic 2015, W15-3049), as sacrebleu computes it.

    Precision and recall are averaged over the orders that both texts are long enough for; F2 = 5 p r / (4 p + r).
    Case counts. Both empty: 1, where sacrebleu says 0; one empty: 0. sacrebleu's corpus score is on 0 to 100 and sums
    n-gram counts over rows first; a run reports the mean over rows, so that trials can be compared row by row.

    >>> round(chrf("Ready, am I.", "Ready, I am."), 3), chrf("", "Ready")
    (0.521, 0.0)
    """
    if not prediction.strip() and not reference.strip():
        return 1.0
    return _chrf().sentence_score(prediction, [reference]).score / 100


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF(char_order=6, word_order=0, beta=2)


def tokens(text: str) -> list[str]:
    """Split a text into runs of letters, their marks (Indian and Thai vowels, accents) and digits, in lower case.

    On ASCII the tokens of Google's rouge-score without stemmer; that one drops every other script.

    >>> tokens("The pilot's 2nd map; 지도 की")
    ['the', 'pilot', 's', '2nd', 'map', '지도', 'की']
    """
    return regex.findall(r"(?:[^\W_]|[\p{M}\p{N}])+", text.lower())


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L: harmonic mean of precision and recall of the longest common subsequence (Lin 2004, W04-1013).

    2 * LCS / (predicted + reference) over `tokens`, so word order counts and gaps do not. Lin's own F weights recall;
    this is beta = 1, as in rouge-score. Both empty: 1, where rouge-score says 0; one empty: 0.

    >>> rouge_l("ready am I", "Ready, I am.")
    0.6666666666666666
    """
    p, r = tokens(prediction), tokens(reference)
    return 1.0 if not p and not r else 2 * _common_subsequence(p, r) / (len(p) + len(r))


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Crochemore et al. 2001): a zero bit is a match so far."""
    places: dict[str, int] = {}
    for n, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << n
    every = row = (1 << len(a)) - 1
    for token in b:
        hits = row & places.get(token, 0)
        row = (row + hits | row - hits) & every
    return len(a) - row.bit_count()


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of `tokens` over all n-grams, of all texts together (Li et al. 2016, arXiv:1510.03055).

    Falls with the amount of text, so compare models on the same rows only. No n-gram at all: 0.

    >>> distinct(["so it is", "so it was"], 1), distinct(["so it is", "so it was"], 2)
    (0.6666666666666666, 0.75)
    """
    split = [tokens(text) for text in texts]
    grams = [tuple(t[k : k + n]) for t in split for k in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def memorised(prediction: str, completions: Collection[str]) -> float:
    """1 where an output is a copy of a training completion but for case, punctuation and spacing, else 0.

    An empty output copies nothing. Where answers are few (labels, yes and no) right answers are copies too and the
    share says nothing.

    Args:
        prediction: what was written.
        completions: training completions after `normalise`.

    >>> memorised("ready i AM", {"ready i am"}), memorised("Ready, I was.", {"ready i am"})
    (1.0, 0.0)
    """
    return float(bool(prediction.strip()) and normalise(prediction) in completions)


def unparsable(prediction: str) -> float:
    """1 where an output holds nothing that could be scored, no character but white space, else 0.

    Such a row is wrong, not left out: every other score counts it in its denominator.

    >>> unparsable(" "), unparsable("?")
    (1.0, 0.0)
    """
    return float(not prediction.strip())
