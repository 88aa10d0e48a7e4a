"""Metrics as pure functions, each with formula, source and edge cases, and the table of all that a run can report.

Sums over tokens or rows, never means of means. No model, no files, no torch.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

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
    generates: bool
    """True when it needs written completions, so `eval.generate`."""


METRICS = {
    "valid/loss": Metric(Direction.minimize, "nats a token", False),
    "valid/perplexity": Metric(Direction.minimize, "exp(nats a token)", False),
    "valid/bits_per_byte": Metric(Direction.minimize, "bits a byte of UTF-8", False),
    "valid/exact_match": Metric(Direction.maximize, "share of rows", True),
    "valid/jaccard": Metric(Direction.maximize, "mean over rows", True),
    "valid/f1": Metric(Direction.maximize, "mean over rows", True),
    "cost/trainable": Metric(Direction.minimize, "weights", False),
    "cost/memory_gib": Metric(Direction.minimize, "GiB, peak of the process", False),
    "cost/gpu_memory_gib": Metric(Direction.minimize, "GiB, peak of the GPU", False),
    "cost/seconds": Metric(Direction.minimize, "seconds of training and scoring", False),
}


def check_objective(name: str, generates: bool) -> Metric:
    """Look an objective up before anything runs.

    Raises:
        ConfigError: the metric is unknown, or needs generation and the run does none.
    """
    if name not in METRICS:
        raise ConfigError(f"objectives must be among {', '.join(METRICS)}, got {name!r}")
    if METRICS[name].generates and not generates:
        raise ConfigError(f"objectives: {name} needs eval.generate=true, got false")
    return METRICS[name]


def better(a: float, b: float, direction: Direction) -> bool:
    """Tell whether score `a` beats `b`. NaN beats nothing, and anything finite beats NaN.

    >>> better(0.1, 0.2, Direction.minimize), better(float("nan"), 9.0, Direction.minimize)
    (True, False)
    """
    if math.isnan(a) or math.isnan(b):
        return not math.isnan(a)
    return a < b if direction is Direction.minimize else a > b


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
