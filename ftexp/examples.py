"""Held-out rows side by side: what the base model and the tuned one made of each, and which did better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftexp import labels, metrics

WIN, LOSS, SAME = "win", "loss", "same"
DIGITS = 6
"""Scores of a row that agree to so many digits after the point are the same."""


@dataclass(frozen=True)
class Measure:
    """A score of one row, before and after."""

    name: str
    """As a reader calls it."""
    before: float
    """Of the base model, or of what stands in for it."""
    after: float
    """Of the tuned model."""
    lower_is_better: bool = False
    """Whether it improves downwards."""

    @property
    def gain(self) -> float:
        """How much better it is after; negative where it is worse."""
        gain = self.before - self.after if self.lower_is_better else self.after - self.before
        return round(gain, DIGITS)


@dataclass(frozen=True)
class Example:
    """One held-out row."""

    where: str
    """Its file and line, or its number in a generator."""
    prompt: str
    """What the model is asked."""
    reference: str
    """What it should write, or the labels."""
    before: str | None
    """What the base wrote; None where nothing was generated."""
    after: str | None
    """What the tuned model wrote."""
    measures: tuple[Measure, ...]
    """The first that differs decides who did better."""
    nats: Measure
    """Told beside them: where text is judged, a lower loss alone is no win."""

    @property
    def outcome(self) -> str:
        """`win` where the tuned model did better, `loss` where the base did, else `same`."""
        gain = next((m.gain for m in self.measures if m.gain), 0.0)
        return WIN if gain > 0 else LOSS if gain < 0 else SAME


def of(content: dict[str, list[Any]], separator: str = ",") -> list[Example]:
    """Turn the columns of an `examples.parquet` into rows side by side.

    Text is judged by exact match, then by ROUGE-L, because word order may be the task; labels by all of them right,
    then by F1; completions that a reward model scored by their reward; a row without completions by its nats a token. A
    table without both sides gives no rows.

    Args:
        content: the columns.
        separator: what stands between labels, as `eval.labels` says.

    >>> row = {"prompt": ["2+2"], "reference": ["4"], "prediction": ["4"], "base_prediction": ["5"],
    ...        "nats": [0.1], "base_nats": [2.0], "tokens": [1]}
    >>> [(e.where, e.after, e.outcome) for e in of(row)]
    [('row 0', '4', 'win')]
    """
    rival = "tfidf" if "tfidf_nats" in content else "base"
    if not {"prompt", "reference", "nats", f"{rival}_nats"} <= content.keys():
        return []
    rows = [dict(zip(content, values, strict=True)) for values in zip(*content.values(), strict=True)]
    return [_example(row, n, rival, separator) for n, row in enumerate(rows)]


def rule(rows: Sequence[Example]) -> str:
    """Say what decides between the two, in the order in which it does."""
    return ", then ".join(m.name for m in rows[0].measures) if rows else ""


def count(rows: Sequence[Example]) -> dict[str, int]:
    """Count the outcomes."""
    found = Counter(e.outcome for e in rows)
    return {outcome: found[outcome] for outcome in (WIN, LOSS, SAME)}


def chosen(rows: Sequence[Example], most: int) -> list[Example]:
    """Keep at most so many rows, in their order: what broke first, then what got better."""
    order = {LOSS: 0, WIN: 1, SAME: 2}
    first = sorted(range(len(rows)), key=lambda n: (order[rows[n].outcome], n))[:most]
    return [rows[n] for n in sorted(first)]


def _example(row: dict[str, Any], number: int, rival: str, separator: str) -> Example:
    before, after = row.get(f"{rival}_prediction"), row.get("prediction")
    split = separator if "decisions" in row else None
    measures = _text(row, before, after, split) if before is not None and after is not None else ()
    nats = _nats(row, rival)
    where = row.get("where") or f"row {number}"
    return Example(where, row["prompt"], row["reference"], before, after, measures or (nats,), nats)


def _text(row: dict[str, Any], before: str, after: str, split: str | None) -> tuple[Measure, ...]:
    truth = row["reference"]
    if split is not None:
        sets = [labels.parse(text, split) for text in (truth, before, after)]
        exact = (float(sets[1] == sets[0]), float(sets[2] == sets[0]))
        part = (labels.row(labels.f1, sets[0], sets[1]), labels.row(labels.f1, sets[0], sets[2]))
        return Measure("labels right", *exact), Measure("F1", *part)
    if "reward" in row:
        return (Measure("reward", row["base_reward"], row["reward"]),)
    return (
        Measure("exact match", metrics.exact_match(before, truth), metrics.exact_match(after, truth)),
        Measure("ROUGE-L", metrics.rouge_l(before, truth), metrics.rouge_l(after, truth)),
    )


def _nats(row: dict[str, Any], rival: str) -> Measure:
    over = next(unit for unit in ("decisions", "pairs", "completions", "tokens") if unit in row)
    unit = over.removesuffix("s")
    size = max(1, row[over])
    return Measure(f"nats a {unit}", row[f"{rival}_nats"] / size, row["nats"] / size, lower_is_better=True)
