"""Pairs of answers to one prompt, one better than the other: what a reward model and DPO learn from.

Both lose softplus(-margin) nats a pair, the negative log-likelihood of the better answer winning (Bradley and Terry
1952); they differ in what the margin is. transformers' Trainer does the steps, and not TRL's for the two methods: those
take the mean of the batches' means, so that accumulation and the last batch of an epoch change the gradient; DPOTrainer
puts a second adapter on the model and switches dropout off for good. The tests hold our losses against theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from ftexp import labels, metrics
from ftexp.config import Data, Method
from ftexp.data import gates, prompts, splits
from ftexp.data.prompts import Example
from ftexp.data.shapes import Row
from ftexp.evaluate import Scored
from ftexp.progress import progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from ftexp.model import Base

KINDS = (Method.reward, Method.dpo)
"""Methods that learn from pairs."""


@dataclass
class Pair:
    """Two answers as the model sees them; of a conversation the last answer alone counts."""

    row: Row
    """Where they come from."""
    chosen: Example
    """The better one."""
    rejected: Example
    """The worse one."""
    reference: tuple[float, float] | None = None
    """Nats of both answers by the reference of DPO."""


def render(rows: tuple[Row, ...], tokenizer: PreTrainedTokenizerBase, data: Data) -> list[Pair]:
    """Tokenise both answers of each row; what `data.long` and `data.allow` leave out is told.

    Raises:
        DataError: as of `prompts.render`.
    """
    worse = tuple(_worse(row) for row in rows)
    with progress("tokenising", 2 * len(rows)) as advance:
        better, others = (prompts.examples(part, tokenizer, data, advance) for part in (rows, worse))
    both = [None if a is None or b is None else Pair(row, replace(a, earlier=()), replace(b, earlier=()))
            for row, a, b in zip(rows, better, others, strict=True)]  # fmt: skip
    ends = prompts.end(tokenizer)
    found = gates.usable(
        rows,
        [p is None for p in both],
        [0 if p is None else min(p.chosen.supervised, p.rejected.supervised) for p in both],
        [p is not None and all(e.completion[-1:] == (ends,) for e in (p.chosen, p.rejected)) for p in both],
        data,
    )
    return [cast(Pair, both[n]) for n in found]


def _worse(row: Row) -> Row:
    turns = (*row.turns[:-1], ("assistant", row.rejected)) if row.turns else ()
    return replace(row, completion=row.rejected, turns=turns)


def sides(pairs: Sequence[Pair]) -> list[Example]:
    """List the better answers, then the worse ones."""
    return [*(p.chosen for p in pairs), *(p.rejected for p in pairs)]


def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """Fill rows up on the right to the longest: (row, position)."""
    import torch

    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def trainer(
    base: Base, tuned: Any, settings: Any, rows: list[Pair], tensors: Callable[[list[Pair]], dict[str, torch.Tensor]],
    nats: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor], watching: TrainerCallback,
) -> Any:  # fmt: skip
    """Make a Trainer over pairs. Its loss is a mean over all pairs of an optimizer step, so accumulation is exact.

    Args:
        base: the model, and its tokenizer.
        tuned: the same with the adapter on.
        settings: arguments of the Trainer.
        rows: training pairs.
        tensors: makes the inputs of a forward pass; `input_ids` are those of the better answers, then the worse ones.
        nats: takes the model and such inputs, and returns the loss of each pair, (pair,).
        watching: the callback of `sft.watch`.
    """
    import torch
    from transformers import PrinterCallback, Trainer

    class Pairs(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            each = nats(model, inputs)
            return each.sum() / (len(each) if num_items_in_batch is None else num_items_in_batch)

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        chosen = [rows[entry["row"]] for entry in batch]
        return tensors(chosen) | {"labels": torch.ones(len(chosen))}  # the Trainer counts pairs by them

    settings.remove_unused_columns = False
    numbers: Any = [{"row": n} for n in range(len(rows))]
    made = Pairs(tuned, settings, train_dataset=numbers, data_collator=collate, callbacks=[watching])
    made.model_accepts_loss_kwargs = True  # the loss is divided above, by the pairs of the whole step
    made._loss_shifts_labels = False  # of a language model it would count one pair less in each forward pass
    made.remove_callback(PrinterCallback)
    return made


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Switch the base's own dropout off while the block runs: both answers are to pass through one network.

    `lora.dropout` stays as it was asked for.
    """
    before = [(module, name, vars(module)[name]) for module, name in _dropouts(model)]
    try:
        for module, name, _ in before:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, share in before:
            setattr(module, name, share)


def _dropouts(model: PreTrainedModel) -> Iterator[tuple[Any, str]]:
    """Find where shares to drop stand: in modules, and as numbers that layers hand to a function, as OPT's do."""
    from torch import nn

    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.Dropout):
            yield module, "p"
        yield from ((module, key) for key, value in vars(module).items() if "drop" in key and isinstance(value, float))


def table(rows: Sequence[Pair], margins: Sequence[float]) -> list[dict[str, Any]]:
    """Tell each pair with its margin: what the better answer is ahead by."""
    return [
        {"where": p.row.where, "unit": unit, "prompt": p.row.prompt, "reference": p.row.completion,
         "rejected": p.row.rejected, "nats": metrics.pair_loss(margin), "pairs": 1,
         "margin": margin, "accuracy": metrics.preferred(margin)}
        for p, unit, margin in zip(rows, splits.units(p.row for p in rows), margins, strict=True)
    ]  # fmt: skip


def summary(told: list[dict[str, Any]]) -> dict[str, float]:
    """Mean over the pairs of each score in a table."""
    names = ("margin", "accuracy", *(name for name in metrics.SCORES if name in told[0]))
    means = {name: sum(entry[name] for entry in told) / len(told) for name in dict.fromkeys(names)}
    loss = metrics.loss([e["nats"] for e in told], [e["pairs"] for e in told])
    return {"loss": loss, **means, "rows": float(len(told))}


def rewarded(rows: Sequence[Pair], chosen: Sequence[float], rejected: Sequence[float]) -> Scored:
    """Score rewards of both answers of each pair."""
    told = table(rows, [a - b for a, b in zip(chosen, rejected, strict=True)])
    for entry, a, b in zip(told, chosen, rejected, strict=True):
        entry |= {"reward_chosen": a, "reward_rejected": b}
    auc = labels.roc_auc([True] * len(chosen) + [False] * len(rejected), [*chosen, *rejected])
    return Scored(summary(told) | ({} if auc is None else {"roc_auc": auc}), told)


def counted(data: torch.Tensor) -> list[int]:
    """Count the supervised tokens of each row of targets, the first position aside, which nothing predicts."""
    return (data[:, 1:] != -100).sum(1).tolist()
