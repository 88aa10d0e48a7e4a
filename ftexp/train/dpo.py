"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290).

The margin of a pair is beta * (log-likelihood of the better answer less that of the worse, both less what the reference
gives them). Before the first step it is 0 and the loss ln 2, unless the adapter's start is not that of the base: LoftQ
changes it, and `lora.extra.init_lora_weights=false` draws both matrices. The reference is the untouched base, asked
once before an adapter goes on or a weight is thawed: so PiSSA and training without an adapter have the right one, no
second model is in memory, and trials of the same rows share the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ftexp import evaluate, metrics
from ftexp.config import Eval, Run, Trainer
from ftexp.data import splits
from ftexp.evaluate import Scored, Seen
from ftexp.model import Base
from ftexp.train import answers, sft
from ftexp.train.answers import Pair
from ftexp.train.checkpoints import Store
from ftexp.train.control import Control, Report, Rung

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

REFERENCE = Eval(batch=32)
"""How the reference is asked: always so, since other batches would move its last digits."""


def train(
    run: Run,
    base: Base,
    tuned: PeftModel | PreTrainedModel,
    rows: list[Pair],
    valid: list[Pair],
    kept: Store,
    report: Report,
    control: Control,
) -> dict[str, float]:
    """Train the adapter in place, on pairs that `refer` has seen; all else is as of `sft.train`."""
    steps = sft.planned_steps(run.trainer, len(rows))
    settings = sft.arguments(run.trainer, base.compute.device, run.seed, str(kept.folder), steps)
    pad, beta = cast(int, base.tokenizer.pad_token_id), run.trainer.beta

    units = splits.units(p.row for p in valid)

    def curve(model: Any, label: str) -> Rung:
        margins = [
            margin(now, p, beta) for now, p in zip(asked(model, base, valid, run.eval, label), valid, strict=True)
        ]
        lost, ones = [metrics.pair_loss(m) for m in margins], [1] * len(margins)
        return Rung(metrics.loss(lost, ones), lost, ones, units)

    def make(watching: TrainerCallback) -> Any:
        def loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return nats(model, inputs, beta)

        return answers.trainer(base, tuned, settings, rows, lambda batch: tensors(batch, pad), loss, watching)

    with answers.undisturbed(base.model):
        return sft.optimise(run, tuned, steps, curve, make, kept, report, control)


def passed(count: int, trainer: Trainer, seed: int) -> list[int]:
    """Number the rows that a training passes, of a short one not all: only those need a reference.

    One step more is counted, since the Trainer's loader reads ahead. The first epoch of several passes all rows.
    """
    most = (sft.planned_steps(trainer, count) + 1) * trainer.batch * trainer.accumulation
    return sorted(next(sft.orders(count, trainer, seed))[:most])


def asked(model: Any, base: Base, rows: Sequence[Pair], how: Eval, label: str) -> list[tuple[float, float]]:
    """Nats of both answers of each pair: the better one's and the worse one's."""
    told = [e["nats"] for e in evaluate.held_out(model, base.tokenizer, answers.sides(rows), how, label)]
    return list(zip(told[: len(rows)], told[len(rows) :], strict=True))


def refer(base: Base, rows: Sequence[Pair], label: str) -> list[tuple[float, float]]:
    """Ask the reference: the base as it is now, before anything is put on it."""
    return asked(base.model, base, rows, REFERENCE, label)


def margin(now: tuple[float, float], pair: Pair, beta: float) -> float:
    """What the better answer is ahead by, given the nats of both answers, the better one's first."""
    return beta * ((now[1] - now[0]) - _ahead(pair))


def _ahead(pair: Pair) -> float:
    """Nats by which the reference likes the better answer more."""
    if pair.reference is None:
        raise AssertionError(f"{pair.row.where}: the reference was not asked")
    return pair.reference[1] - pair.reference[0]


def tensors(batch: list[Pair], pad: int) -> dict[str, torch.Tensor]:
    """Make the inputs of a forward pass.

    Ids, mask and targets, (row, position), better answers first; and what the reference is ahead by, (pair,).
    """
    import torch

    both = answers.sides(batch)
    return {
        "input_ids": answers.padded([e.ids for e in both], pad),
        "attention_mask": answers.padded([[1] * len(e.ids) for e in both], 0),
        "targets": answers.padded([e.labels for e in both], -100),
        "ahead": torch.tensor([_ahead(p) for p in batch]),
    }


def nats(model: Any, inputs: dict[str, torch.Tensor], beta: float) -> torch.Tensor:
    """Loss of each pair, (pair,): softplus(-margin)."""
    import torch

    logits, targets = evaluate.supervised_logits(
        model, inputs["input_ids"], inputs["attention_mask"], inputs["targets"]
    )
    each = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    chosen, rejected = torch.stack([part.sum() for part in each.split(answers.counted(inputs["targets"]))]).chunk(2)
    return torch.nn.functional.softplus(-beta * ((rejected - chosen) - inputs["ahead"]))


def score(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Pair], told: Sequence[tuple[float, float]], run: Run,
    label: str, known: Seen,
) -> Scored:  # fmt: skip
    """Score a model on held-out pairs, and what it writes beside the better answers.

    Args:
        model: trained, or the base.
        tokenizer: its tokenizer.
        rows: held-out pairs, with their reference.
        told: nats of both answers by this model.
        run: the config.
        label: name of the work on the screen.
        known: what the rows of the run answer.
    """
    table = answers.table(rows, [margin(now, p, run.trainer.beta) for now, p in zip(told, rows, strict=True)])
    for entry, p, (better, worse) in zip(table, rows, told, strict=True):
        entry |= {"chosen_nats": better, "chosen_tokens": p.chosen.supervised, "rejected_nats": worse}
        entry |= {"chosen_likelier": metrics.preferred(worse - better)}
    chosen = [p.chosen for p in rows]
    written = evaluate.generate(model, tokenizer, chosen, run.eval, label) if run.eval.generate else []
    for entry, text in zip(table, written, strict=False):
        entry |= {"prediction": text} | evaluate.compare(text, entry["reference"], known, run.eval)
    scores = answers.summary(table)
    scores["chosen_loss"] = metrics.loss([e["chosen_nats"] for e in table], [e["chosen_tokens"] for e in table])
    if written:
        scores |= {f"distinct_{n}": metrics.distinct(written, n) for n in (1, 2)}
    return Scored(scores, table)
