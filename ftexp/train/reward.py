"""Reward model: a head with one output on any model, which scores the better answer of a pair above the worse one.

The head reads the last token of an answer, or what an encoder's own head reads. It starts at zero, so the first loss is
ln 2 a pair. A pair tells nothing of where zero is: rewards of two prompts are not comparable by training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ftexp import metrics, passes
from ftexp.config import Eval, Run
from ftexp.data import splits
from ftexp.data.prompts import Example
from ftexp.evaluate import Scored
from ftexp.model import Base
from ftexp.progress import progress
from ftexp.train import answers, sft
from ftexp.train.answers import Pair
from ftexp.train.checkpoints import Store
from ftexp.train.control import Control, Report, Rung

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback


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
    """Train adapter and head in place; arguments, results and errors are those of `sft.train`."""
    steps = sft.planned_steps(run.trainer, len(rows))
    settings = sft.arguments(run.trainer, base.compute.device, run.seed, str(kept.folder), steps)
    pad = cast(int, base.tokenizer.pad_token_id)

    units = splits.units(p.row for p in valid)

    def curve(model: Any, label: str) -> Rung:
        margins = _margins(rewards(model, base.tokenizer, answers.sides(valid), run.eval, label))
        lost, ones = [metrics.pair_loss(m) for m in margins], [1] * len(margins)
        return Rung(metrics.loss(lost, ones), lost, ones, units)

    def make(watching: TrainerCallback) -> Any:
        return answers.trainer(base, tuned, settings, rows, lambda batch: tensors(batch, pad), nats, watching)

    with answers.undisturbed(base.model):
        return sft.optimise(run, tuned, steps, curve, make, kept, report, control)


def tensors(batch: list[Pair], pad: int) -> dict[str, torch.Tensor]:
    """Make the inputs of a forward pass: ids and mask, (row, position), better answers first."""
    ids = [read(e, pad) for e in answers.sides(batch)]
    return {"input_ids": answers.padded(ids, pad), "attention_mask": answers.padded([[1] * len(row) for row in ids], 0)}


def read(example: Example, pad: int) -> list[int]:
    """Return the tokens that are read. Where end-of-sequence pads too, an answer is scored at its last token before it.

    transformers takes the last token that is no padding, whatever the mask says.
    """
    ids = example.ids
    while ids[-1] == pad and len(ids) > 1:
        ids.pop()
    return ids


def nats(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Loss of each pair: softplus(-(reward of the better answer less that of the worse)), (pair,)."""
    import torch

    told = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()[:, 0]
    chosen, rejected = told.chunk(2)
    return torch.nn.functional.softplus(rejected - chosen)


def rewards(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], how: Eval, label: str
) -> list[float]:
    """Score answers, in their order."""
    import torch

    pad = cast(int, tokenizer.pad_token_id)
    ids, told = [read(e, pad) for e in rows], [0.0] * len(rows)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), progress(f"{label} rewards", len(rows)) as advance:

            def work(numbers: list[int]) -> None:
                some = [ids[n] for n in numbers]
                mask = answers.padded([[1] * len(row) for row in some], 0)
                out = model(
                    input_ids=answers.padded(some, pad).to(model.device), attention_mask=mask.to(model.device)
                ).logits[:, 0]
                for n, value in zip(numbers, out.double().tolist(), strict=True):
                    told[n] = value
                advance(len(numbers))

            passes.take(passes.batches([len(row) for row in ids], how.batch, spread=0.75), work)
    finally:
        model.train(was_training)
    return told


def _margins(told: Sequence[float]) -> list[float]:
    half = len(told) // 2
    return [a - b for a, b in zip(told[:half], told[half:], strict=True)]


def score(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Pair], how: Eval, label: str) -> Scored:
    """Score a reward model on held-out pairs."""
    told = rewards(model, tokenizer, answers.sides(rows), how, label)
    return answers.rewarded(rows, told[: len(rows)], told[len(rows) :])


def baseline(train: Sequence[Pair], valid: Sequence[Pair]) -> Scored:
    """Score what needs no language model: logistic regression on words, pairs of words and the length of an answer.

    TF-IDF of the better answer less that of the worse, and the difference of the logarithms of their lengths. A pair
    and its mirror image are both rows and there is no intercept, so an answer has a reward of its own.
    """
    import numpy as np
    from scipy.sparse import csr_matrix, hstack, vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"(?u)\w+|[^\w\s]", lowercase=False)
    words.fit([text for p in train for text in (p.row.completion, p.row.rejected)])

    def described(texts: list[str]) -> Any:
        lengths = csr_matrix(np.log1p([[len(text)] for text in texts]))
        return hstack([words.transform(texts), lengths]).tocsr()

    def both(rows: Sequence[Pair]) -> tuple[Any, Any]:
        return described([p.row.completion for p in rows]), described([p.row.rejected for p in rows])

    chosen, rejected = both(train)
    ahead = vstack([chosen - rejected, rejected - chosen])
    truth = [1] * len(train) + [0] * len(train)
    fitted = LogisticRegression(C=10.0, max_iter=1000, fit_intercept=False).fit(ahead, truth)
    better, worse = (fitted.decision_function(part).tolist() for part in both(valid))
    return answers.rewarded(valid, better, worse)
