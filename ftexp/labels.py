"""Scores of label sets, multi-label and single-label: pure functions over sets of names and over scores of labels.

A row has a set of true labels and a set of predicted ones; a single-label row has sets of one. Everything is built from
three counts, of hits (true and predicted), extra (predicted only) and missed (true only), taken over a row, over a
label, or over everything. Where a count is 0 / 0 these functions say what they do:

| average | over            | 0 / 0                                                                            |
|---------|-----------------|----------------------------------------------------------------------------------|
| samples | rows, then mean | no true and no predicted label: right, 1 (sklearn: `zero_division`, by default 0) |
| micro   | everything      | not one label anywhere: 1 (sklearn: 0)                                           |
| macro   | labels, then mean | never true and never predicted: left out and counted (sklearn: 0 is averaged in) |

No model, no files, no numpy.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

Labels = AbstractSet[str]
Measure = Callable[[int, int, int], float | None]
"""Takes hits, extra and missed; returns None for 0 / 0."""
DEFAULT = 0.5
"""Threshold of a label for which none can be fitted."""


def parse(text: str, separator: str) -> frozenset[str]:
    """Split a text into a set of labels; case and outer spaces do not count, order and repeats neither.

    Args:
        text: a completion, of the reference or written by a model.
        separator: what stands between labels; spaces around it are optional in the text.

    >>> sorted(parse("Drama,slice  of life , drama", ", "))
    ['drama', 'slice of life']
    """
    parts = text.split(separator.strip() or separator)
    folded = (" ".join(unicodedata.normalize("NFC", part).casefold().split()) for part in parts)
    return frozenset(part for part in folded if part)


def f1(hits: int, extra: int, missed: int) -> float | None:
    """Harmonic mean of precision and recall, 2 hits / (2 hits + extra + missed).

    >>> f1(1, 1, 0), f1(0, 0, 0)
    (0.6666666666666666, None)
    """
    total = 2 * hits + extra + missed
    return 2 * hits / total if total else None


def jaccard(hits: int, extra: int, missed: int) -> float | None:
    """Intersection over union, hits / (hits + extra + missed); never above F1.

    >>> jaccard(1, 1, 0), jaccard(0, 0, 0)
    (0.5, None)
    """
    total = hits + extra + missed
    return hits / total if total else None


def row(measure: Measure, truth: Labels, predicted: Labels) -> float:
    """Score one row; no true and no predicted label is right, 1.

    >>> row(f1, {"a"}, {"a", "b"}), row(f1, set(), set()), row(f1, set(), {"a"})
    (0.6666666666666666, 1.0, 0.0)
    """
    value = measure(*_counts(truth, predicted))
    return 1.0 if value is None else value


def _counts(truth: Labels, predicted: Labels) -> tuple[int, int, int]:
    return len(truth & predicted), len(predicted - truth), len(truth - predicted)


def samples(measure: Measure, truth: Sequence[Labels], predicted: Sequence[Labels]) -> float:
    """Mean over rows of `row`: each row weighs the same.

    >>> samples(jaccard, [{"a"}, set()], [{"a", "b"}, set()])
    0.75
    """
    return math.fsum(row(measure, t, p) for t, p in zip(truth, predicted, strict=True)) / len(truth)


def micro(measure: Measure, truth: Sequence[Labels], predicted: Sequence[Labels]) -> float:
    """Measure of the counts over all rows and labels: each decision weighs the same.

    With one label a row, true and predicted, micro F1 is accuracy.

    >>> micro(f1, [{"a"}, {"b"}], [{"a"}, set()])
    0.6666666666666666
    """
    counts = [_counts(t, p) for t, p in zip(truth, predicted, strict=True)]
    value = measure(*(sum(part) for part in zip(*counts, strict=True)))
    return 1.0 if value is None else value


def macro(
    measure: Measure, truth: Sequence[Labels], predicted: Sequence[Labels], labels: Collection[str]
) -> tuple[float, int]:
    """Mean over `labels` of each label's own measure: each label weighs the same, however rare.

    Returns:
        The mean over the defined labels (NaN without any), and how many are undefined: never true, never predicted.

    >>> macro(f1, [{"a"}, {"b"}, set()], [{"a"}, set(), set()], ["a", "b", "c"])
    (0.5, 1)
    """
    values = [measure(*_of_label(label, truth, predicted)) for label in labels]
    return _mean_of_defined(values)


def _of_label(label: str, truth: Sequence[Labels], predicted: Sequence[Labels]) -> tuple[int, int, int]:
    pairs = [(label in t, label in p) for t, p in zip(truth, predicted, strict=True)]
    return pairs.count((True, True)), pairs.count((False, True)), pairs.count((True, False))


def _mean_of_defined(values: Sequence[float | None]) -> tuple[float, int]:
    defined = [v for v in values if v is not None]
    return math.fsum(defined) / len(defined) if defined else math.nan, len(values) - len(defined)


def subset_accuracy(truth: Sequence[Labels], predicted: Sequence[Labels]) -> float:
    """Share of rows whose set is predicted whole and without an extra; of single-label rows: accuracy.

    >>> subset_accuracy([{"a", "b"}, {"a"}], [{"a"}, {"a"}])
    0.5
    """
    return sum(set(t) == set(p) for t, p in zip(truth, predicted, strict=True)) / len(truth)


def roc_auc(truth: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Probability that a row with the label scores above one without it, ties one half (Mann and Whitney 1947).

    (sum of the ranks of the true rows - n (n + 1) / 2) / (n m) for n true and m other rows, ties at their mean rank.
    Only the order of the scores counts. None where all rows are of one class (sklearn: NaN with a warning).

    >>> roc_auc([True, False, True], [0.9, 0.5, 0.5]), roc_auc([True, True], [0.1, 0.2])
    (0.75, None)
    """
    if not all(map(math.isfinite, scores)):
        raise ValueError("roc_auc needs finite scores")
    true, other = sum(truth), len(truth) - sum(truth)
    if not true or not other:
        return None
    order = sorted(range(len(scores)), key=lambda n: scores[n])
    ranks, start = 0.0, 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        ranks += sum(truth[n] for n in order[start:end]) * (start + 1 + end) / 2
        start = end
    return (ranks - true * (true + 1) / 2) / (true * other)


def roc_auc_macro(
    truth: Sequence[Labels], scores: Sequence[Sequence[float]], labels: Sequence[str]
) -> tuple[float, int]:
    """Mean over labels of `roc_auc`, and how many are undefined: true in every row or in none.

    Args:
        truth: true labels of each row.
        scores: (row, label), in the order of `labels`.
        labels: names.

    >>> roc_auc_macro([{"a"}, set()], [[0.9, 0.1], [0.2, 0.3]], ["a", "b"])
    (1.0, 1)
    """
    columns = _columns(scores, labels)
    return _mean_of_defined([roc_auc([label in t for t in truth], column) for label, column in columns])


def roc_auc_micro(truth: Sequence[Labels], scores: Sequence[Sequence[float]], labels: Sequence[str]) -> float:
    """`roc_auc` over all (row, label) pairs as if they were one label; NaN where all pairs are of one class.

    Scores of different labels are compared with each other, so they must be on one scale.

    >>> roc_auc_micro([{"a"}, set()], [[0.9, 0.1], [0.2, 0.3]], ["a", "b"])
    1.0
    """
    true = [label in t for t in truth for label in labels]
    value = roc_auc(true, [s for line in scores for s in line])
    return math.nan if value is None else value


def _columns(scores: Sequence[Sequence[float]], labels: Sequence[str]) -> list[tuple[str, list[float]]]:
    return [(label, [line[n] for line in scores]) for n, label in enumerate(labels)]


def threshold(truth: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Fit the threshold of one label: rows that score at least this get it, F1 is highest, of equals the highest.

    Half-way between two neighbouring scores. None where the label is never true, so that no F1 could tell thresholds
    apart. Fit it on other rows than those it is scored on: fitted on the same rows, scores of pure chance with a tenth
    of true rows reach F1 0.21 where they are worth 0.17 (200 rows).

    >>> threshold([True, False, True], [0.9, 0.2, 0.6])
    0.4
    """
    true = sum(truth)
    if not true:
        return None
    pairs = sorted(zip(scores, truth, strict=True), reverse=True)
    best, found, hits = -1.0, 0.0, 0
    for n, (score, is_true) in enumerate(pairs, start=1):
        hits += is_true
        after = pairs[n][0] if n < len(pairs) else None
        if after == score:
            continue
        value = 2 * hits / (n + true)
        if value > best:
            middle = (score + (0.0 if after is None else after)) / 2  # below the last one there is 0
            best, found = value, score if after is not None and middle <= after else middle
    return found


def thresholds(truth: Sequence[Labels], scores: Sequence[Sequence[float]], labels: Sequence[str]) -> dict[str, float]:
    """Fit a threshold for each label; `DEFAULT` where none can be fitted.

    >>> thresholds([{"a"}, set()], [[0.9, 0.1], [0.3, 0.3]], ["a", "b"])
    {'a': 0.6, 'b': 0.5}
    """
    fitted = {label: threshold([label in t for t in truth], column) for label, column in _columns(scores, labels)}
    return {label: DEFAULT if value is None else value for label, value in fitted.items()}


def decide(scores: Sequence[Sequence[float]], limits: Mapping[str, float]) -> list[frozenset[str]]:
    """Turn scores into label sets: each label whose score reaches its threshold.

    >>> [sorted(found) for found in decide([[0.9, 0.5], [0.1, 0.2]], {"a": 0.6, "b": 0.5})]
    [['a', 'b'], []]
    """
    return [frozenset(label for label, s in zip(limits, line, strict=True) if s >= limits[label]) for line in scores]


def choose(scores: Sequence[Sequence[float]], labels: Sequence[str]) -> list[frozenset[str]]:
    """Turn scores into sets of one: the label with the highest score, the first of equals.

    >>> choose([[0.1, 0.9], [0.5, 0.5]], ["a", "b"])
    [frozenset({'b'}), frozenset({'a'})]
    """
    return [frozenset({labels[max(range(len(labels)), key=line.__getitem__)]}) for line in scores]


def scores(truth: Sequence[Labels], predicted: Sequence[Labels], labels: Collection[str]) -> dict[str, float]:
    """Compute every score that needs sets alone, and the counts `labels` and `labels_undefined`.

    A predicted name that is not in `labels` is extra in its row and in the micro average; it has no row of its own in
    the macro average.

    >>> told = scores([{"a"}, {"b"}, set()], [{"a"}, set(), set()], ["a", "b", "c"])
    >>> told["f1_macro"], told["subset_accuracy"], told["labels_undefined"]
    (0.5, 0.6666666666666666, 1.0)
    """
    told: dict[str, float] = {"subset_accuracy": subset_accuracy(truth, predicted)}
    undefined = 0
    for name, measure in (("f1", f1), ("jaccard", jaccard)):
        told[f"{name}_samples"] = samples(measure, truth, predicted)
        told[f"{name}_micro"] = micro(measure, truth, predicted)
        told[f"{name}_macro"], undefined = macro(measure, truth, predicted, labels)
    return told | {"labels": float(len(labels)), "labels_undefined": float(undefined)}


def table(truth: Sequence[Labels], predicted: Sequence[Labels], labels: Collection[str]) -> list[dict[str, Any]]:
    """Tell each label's own counts and scores; None is undefined.

    >>> table([{"a"}, {"a"}], [{"a"}, set()], ["a"])
    [{'label': 'a', 'true': 2, 'predicted': 1, 'precision': 1.0, 'recall': 0.5, 'f1': 0.6666666666666666}]
    """
    rows = []
    for label in labels:
        hits, extra, missed = _of_label(label, truth, predicted)
        rows.append({
            "label": label, "true": hits + missed, "predicted": hits + extra,
            "precision": hits / (hits + extra) if hits + extra else None,
            "recall": hits / (hits + missed) if hits + missed else None,
            "f1": f1(hits, extra, missed),
        })  # fmt: skip
    return rows
