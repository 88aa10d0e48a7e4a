"""Whether a model that was exported answers as the run it was made from: loss, choices and completions, compared.

Both are run over the held-out rows. Loss is nats a supervised token (of a classifier: a decision; of a reward model: a
pair). A choice is the likeliest token at a supervised place, given the reference before it (of a classifier: a label
taken or not; of a reward model: the better answer of a pair), so one choice that differs does not change those behind
it, as it would in a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftexp import evaluate, metrics
from ftexp.config import Eval
from ftexp.data.prompts import Example
from ftexp.progress import progress
from ftexp.train import classify, reward
from ftexp.train.answers import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEAR = 1e-3
"""A choice that hangs on less (of a logit; of a probability) is not counted: rounding alone may turn it."""
COMPLETIONS = 16
"""Held-out rows that both complete greedily, to be compared letter by letter; the longest prompts."""


@dataclass(frozen=True)
class Limit:
    """How far an export may be from its run."""

    loss: float
    """Largest change of the held-out loss, in nats: 0.01 changes the perplexity by 1 %."""
    choices: float
    """Least share of equal choices."""


LIMITS = {"float32": Limit(1e-4, 0.999), "bfloat16": Limit(0.01, 0.97), "float16": Limit(3e-3, 0.99)}
"""By the number format of the merged weights, for a run whose base was not packed."""
PACKED = Limit(0.05, 0.85)
"""For a run whose base was packed to 4 or 8 bit: the export stands on the weights before packing."""


@dataclass(frozen=True)
class Answers:
    """What a model says about the held-out rows."""

    loss: float
    choices: list[list[int]]
    """By row."""
    margins: list[list[float]]
    """What each choice hangs on: how far the next best is, or the threshold."""
    completions: list[str]
    """Of the first `COMPLETIONS` rows by length; none where the run writes none."""


@dataclass(frozen=True)
class Fidelity:
    """How an export compares with its run."""

    rows: int
    before: float
    """Held-out loss of the run."""
    after: float
    """Held-out loss of the exported model, read back from its folder."""
    moved: float
    """Change of the loss, without its sign."""
    choices: float
    """Share of equal choices."""
    completions: int | None
    """Completions that are equal to the letter; None where none were written."""
    compared: int
    """Completions that were written."""
    limit: Limit

    @property
    def kept(self) -> bool:
        """Whether the export is within its limit."""
        return self.moved <= self.limit.loss and self.choices >= self.limit.choices


def texts(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], how: Eval, label: str) -> Answers:
    """Ask a language model."""
    table = evaluate.held_out(model, tokenizer, rows, how, label)
    loss = metrics.loss([e["nats"] for e in table], [e["tokens"] for e in table])
    longest = sorted(rows, key=lambda e: -len(e.prompt))[:COMPLETIONS] if how.generate else []
    written = evaluate.generate(model, tokenizer, longest, how, label) if longest else []
    return Answers(loss, *_choices(model, tokenizer, rows, how, label), written)


def _choices(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], how: Eval, label: str
) -> tuple[list[list[int]], list[list[float]]]:
    """Take the likeliest token at each supervised place of each row, and how far the second is behind it."""
    import torch

    told: tuple[list[list[int]], list[list[float]]] = [], []
    with torch.no_grad(), progress(f"{label} choices", len(rows)) as advance:
        for e in rows:
            ids, wanted = (torch.tensor([part], device=model.device) for part in (e.ids, e.labels))
            logits, _ = evaluate.supervised_logits(model, ids, torch.ones_like(ids), wanted)
            best = logits.float().topk(2)
            told[0].append(best.indices[:, 0].tolist())
            told[1].append((best.values[:, 0] - best.values[:, 1]).tolist())
            advance(1)
    return told


def decisions(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[classify.Example], how: Eval, label: str,
    known: list[str], limits: dict[str, float], many: bool,
) -> Answers:  # fmt: skip
    """Ask a classifier: which labels it takes, by the thresholds of the run."""
    told = classify.logits(model, tokenizer, rows, how, label)
    loss = classify.loss(told, rows, known, many)
    if many:
        shares = told.sigmoid().tolist()
        taken = [[int(share >= limits[name]) for name, share in zip(known, line, strict=True)] for line in shares]
        off = [[abs(share - limits[name]) for name, share in zip(known, line, strict=True)] for line in shares]
        return Answers(loss, taken, off, [])
    best = told.softmax(-1).topk(2)
    return Answers(loss, best.indices[:, :1].tolist(), (best.values[:, :1] - best.values[:, 1:]).tolist(), [])


def rewards(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Pair], how: Eval, label: str) -> Answers:
    """Ask a reward model: which answer of each pair it prefers, and by how much."""
    table = reward.score(model, tokenizer, rows, how, label).table
    ahead = [entry["margin"] for entry in table]
    loss = metrics.loss([entry["nats"] for entry in table], [1] * len(table))
    return Answers(loss, [[int(by > 0)] for by in ahead], [[abs(by)] for by in ahead], [])


def compare(before: Answers, after: Answers, limit: Limit) -> Fidelity:
    """Compare the answers of a run with those of its export.

    >>> run = Answers(2.0, [[1, 2], [3, 4]], [[1.0, 1.0], [1.0, 0.0]], ["a"])
    >>> compare(run, Answers(2.1, [[1, 2], [5, 5]], [], ["a"]), PACKED).choices
    0.6666666666666666
    """
    counted = [
        a == b
        for row in zip(before.choices, after.choices, before.margins, strict=True)
        for a, b, margin in zip(*row, strict=True) if margin >= NEAR
    ]  # fmt: skip
    same = [a == b for a, b in zip(before.completions, after.completions, strict=True)]
    return Fidelity(
        rows=len(before.choices), before=before.loss, after=after.loss,
        moved=abs(after.loss - before.loss),
        choices=sum(counted) / len(counted) if counted else 1.0, completions=sum(same) if same else None,
        compared=len(same), limit=limit,
    )  # fmt: skip


def line(told: Fidelity) -> str:
    """Tell it in one line.

    >>> line(Fidelity(8, 2.0, 2.001, 0.001, 0.99, 7, 8, PACKED))
    'held-out loss 2.000000 -> 2.001000 (by 0.001 nats, at most 0.05), 99.00 % of the choices equal (at least 85 %), \
7 of 8 completions equal, 8 rows'
    """
    written = "" if told.completions is None else f"{told.completions} of {told.compared} completions equal, "
    return (
        f"held-out loss {told.before:.6f} -> {told.after:.6f} (by {told.moved:.2g} nats, at most "
        f"{told.limit.loss:g}), {100 * told.choices:.2f} % of the choices equal (at least "
        f"{100 * told.limit.choices:g} %), {written}{told.rows} rows"
    )
