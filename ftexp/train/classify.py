"""Classification: a fresh head on any model and an adapter under it, for one label a row or any number.

The prompt of a row is its text, the completion names its labels (`eval.labels` says what stands between them, a comma
where it is null). The head reads the last token of a causal model, or what an encoder's own head reads. Its last layer
starts at zero, so the first loss is known: ln 2 a decision with many labels, ln n with one of n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ftexp import labels, metrics, passes
from ftexp.config import Eval, Long, Run
from ftexp.data import gates, shapes, splits
from ftexp.data.rows import Row
from ftexp.errors import DataError
from ftexp.evaluate import Scored
from ftexp.model import Base
from ftexp.progress import progress, say
from ftexp.train import sft
from ftexp.train.checkpoints import Store
from ftexp.train.control import Control, Report, Rung

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

FOLDS = 5
"""Held-out rows are decided by thresholds from the other folds; those of all rows are kept for other splits."""


@dataclass(frozen=True)
class Example:
    """A row as the classifier sees it."""

    row: Row
    """Where it comes from."""
    ids: tuple[int, ...]
    """Token ids of the text."""
    labels: frozenset[str]
    """What is true of it."""
    between: str = ", "
    """What stands between labels where they are shown."""
    over: int = 0
    """Tokens that the text has beyond `data.max_length`."""


def render(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, run: Run) -> list[Example]:
    """Tokenise texts and read labels; what `data.long` leaves out or cuts is told.

    Raises:
        DataError: a text is too long or holds the padding token, too many are left out for their length, a row has not
            one label where one is wanted, or labels of a list are to be parted by other than commas.
    """
    made, separator = [], run.eval.labels or ","
    between = ", " if separator.strip() == "," else separator
    for row in rows:
        ids, over = text_ids(row, tokenizer, run)
        shapes.check_separator(row, run.eval.labels)
        told = labels.parse(row.completion, separator)
        if not told or (not run.trainer.multi_label and len(told) > 1):
            wanted = "a label" if run.trainer.multi_label else "one label (trainer.multi_label=false)"
            text = told and run.eval.labels is None and not row.listed
            hint = "; eval.labels='|' takes commas as part of a label" if text else ""
            raise DataError(f"{row.where}: the completion must name {wanted}, got {row.completion!r}{hint}")
        made.append(Example(row, ids, told, between, over))
    if run.data.long is not Long.cut:
        whole = [True] * len(made)
        return [made[n] for n in gates.usable(tuple(rows), [e.over > 0 for e in made], whole, whole, run.data)]
    if over := [e for e in made if e.over]:
        count = f"{len(over)} of {len(rows)} rows have more than data.max_length={run.data.max_length} tokens"
        say(f"cut: {count}, the first is {over[0].row.where}", always=True)
    return made


def text_ids(row: Row, tokenizer: PreTrainedTokenizerBase, run: Run) -> tuple[tuple[int, ...], int]:
    """Tokenise the text of a row, and tell how many tokens it has beyond `data.max_length`.

    With `data.long=cut` as many are taken off its end, as tokenizers do it: their special tokens stay.

    Raises:
        DataError: it is too long and `data.long=refuse`, or holds the padding token.
    """
    ids, most = cast(list[int], tokenizer(row.prompt, verbose=False)["input_ids"]), run.data.max_length
    over = max(0, len(ids) - most)
    if over and run.data.long is Long.refuse:
        raise DataError(f"{row.where}: a row must be at most data.max_length={most} tokens, this one has {len(ids)}")
    if over and run.data.long is Long.cut:
        ids = _cut(row.prompt, tokenizer, most)
    if tokenizer.pad_token_id in ids and not (over and run.data.long is Long.drop):
        raise DataError(f"{row.where}: the text holds the padding token, behind which a classifier sees nothing")
    return tuple(ids), over


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, most: int) -> list[int]:
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        return cast(list[int], tokenizer(text, truncation=True, max_length=most)["input_ids"])
    finally:
        tokenizer.truncation_side = side
        tokenizer("")  # or its file would hold the length, and cut all texts wherever it is loaded


def names(*parts: list[Example]) -> list[str]:
    """List the labels that rows name, in one order for all."""
    return sorted(frozenset().union(*(e.labels for part in parts for e in part)))


def train(
    run: Run,
    base: Base,
    tuned: PeftModel,
    rows: list[Example],
    valid: list[Example],
    kept: Store,
    report: Report,
    control: Control,
) -> dict[str, float]:
    """Train adapter and head in place; arguments, results and errors are those of `sft.train`."""
    steps = sft.planned_steps(run.trainer, len(rows))
    settings = sft.arguments(run.trainer, base.compute.device, run.seed, str(kept.folder), steps)
    settings.remove_unused_columns = False
    known, units = names(rows, valid), splits.units(e.row for e in valid)

    def curve(model: Any, label: str) -> Rung:
        told, many = logits(model, base.tokenizer, valid, run.eval, label), run.trainer.multi_label
        nats = decisions(told, targets(valid, known, many), many, None).reshape(len(valid), -1)
        rows, each = nats.sum(dim=1).tolist(), [nats.shape[1]] * len(valid)
        return Rung(loss(told, valid, known, many), rows, each, units)

    def make(watching: TrainerCallback) -> Any:
        return _trainer(base, tuned, settings, rows, known, run, watching)

    return sft.optimise(run, tuned, steps, curve, make, kept, report, control)


def _trainer(
    base: Base, tuned: PeftModel, settings: Any, rows: list[Example], known: list[str], run: Run, watch: Any
) -> Any:
    from transformers import PrinterCallback, Trainer

    many = run.trainer.multi_label
    weights = class_weights(rows, known, many) if run.trainer.class_weights else None

    class Classifier(Trainer):
        """Trainer with a loss over all decisions of an optimizer step, so that accumulation is exact."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            told = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()
            nats = decisions(told, inputs["labels"], many, weights).sum()
            return nats / (inputs["labels"].numel() if num_items_in_batch is None else num_items_in_batch)

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        chosen = [rows[entry["row"]] for entry in batch]
        ids, mask = _padded([e.ids for e in chosen], cast(int, base.tokenizer.pad_token_id))
        return {"input_ids": ids, "attention_mask": mask, "labels": targets(chosen, known, many)}

    numbers: Any = [{"row": n} for n in range(len(rows))]
    trainer = Classifier(tuned, settings, train_dataset=numbers, data_collator=collate, callbacks=[watch])
    trainer.model_accepts_loss_kwargs = True  # the loss is divided above, by the decisions of the whole step
    with suppress(ValueError):
        trainer.remove_callback(PrinterCallback)
    return trainer


def targets(rows: list[Example], known: list[str], many: bool) -> torch.Tensor:
    """True labels as 0 and 1, (row, label), or with one label a row as its number, (row,)."""
    import torch

    if many:
        return torch.tensor([[float(name in e.labels) for name in known] for e in rows])
    return torch.tensor([known.index(next(iter(e.labels))) for e in rows])


def decisions(logits: torch.Tensor, truth: torch.Tensor, many: bool, weights: torch.Tensor | None) -> torch.Tensor:
    """Nats of each decision: binary cross-entropy of each label, or cross-entropy of each row.

    Args:
        logits: (row, label).
        truth: as `targets` makes it.
        many: whether rows have any number of labels.
        weights: of the labels, as `class_weights` makes them.
    """
    from torch.nn import functional

    if weights is not None:
        weights = weights.to(logits)
    if many:
        return functional.binary_cross_entropy_with_logits(
            logits, truth.to(logits), pos_weight=weights, reduction="none"
        )
    return functional.cross_entropy(logits, truth, weight=weights, reduction="none")


def class_weights(rows: list[Example], known: list[str], many: bool) -> torch.Tensor:
    """Weights that make up for rare labels, from the training rows.

    Many labels: other rows / true rows, the weight of a true decision. One label: rows / (labels * true rows), as
    scikit-learn's "balanced". A label that no training row has gets 1.
    """
    import torch

    true = [sum(name in e.labels for e in rows) for name in known]
    if many:
        return torch.tensor([(len(rows) - n) / n if 0 < n < len(rows) else 1.0 for n in true])
    return torch.tensor([len(rows) / (len(known) * n) if n else 1.0 for n in true])


def _padded(rows: list[tuple[int, ...]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right to the longest row of the batch: ids and mask, (row, position)."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def logits(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[Example], how: Eval, label: str
) -> torch.Tensor:
    """Run a model over rows: (row, label), float64, in the order of the rows."""
    import torch

    told: list[Any] = [None] * len(rows)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), progress(f"{label} labels", len(rows)) as advance:

            def work(numbers: list[int]) -> None:
                ids, mask = _padded([rows[n].ids for n in numbers], cast(int, tokenizer.pad_token_id))
                out = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
                for n, line in zip(numbers, out.double().cpu(), strict=True):
                    told[n] = line
                advance(len(numbers))

            passes.take(passes.batches([len(e.ids) for e in rows], how.batch, spread=0.75), work)
    finally:
        model.train(was_training)
    return torch.stack(told)


def loss(told: torch.Tensor, rows: list[Example], known: list[str], many: bool) -> float:
    """Mean nats of a decision, unweighted: of each label of each row, or of each row where it has one label."""
    nats = decisions(told, targets(rows, known, many), many, None)
    return metrics.loss(nats.flatten().tolist(), [1] * nats.numel())


def score(
    told: torch.Tensor, rows: list[Example], known: list[str], many: bool, limits: dict[str, float] | None = None
) -> tuple[Scored, dict[str, float]]:
    """Score logits on held-out rows, and fit the thresholds that other splits are to be decided by.

    No row is decided by a threshold that it helped to fit: each fifth of the rows takes those of the other four.

    Args:
        told: logits, (row, label).
        rows: what they are of.
        known: names of the labels.
        many: whether rows have any number of labels.
        limits: thresholds from other rows, such as `thresholds` of a `trial.json`; these are then used as they are.

    Returns:
        Scores with a table of rows and one of labels; and the threshold of each label, empty with one label a row.
    """
    shares = (told.sigmoid() if many else told.softmax(-1)).tolist()
    truth = [e.labels for e in rows]
    if not many:
        chosen, limits = labels.choose(shares, known), {}
    elif limits is not None:
        chosen = labels.decide(shares, limits)
    else:
        chosen, limits = cross_decided(truth, shares, known), labels.thresholds(truth, shares, known)
    nats = decisions(told, targets(rows, known, many), many, None).reshape(len(rows), -1)
    sure = odds(told, many).tolist()
    macro, undefined = labels.roc_auc_macro(truth, sure, known)
    scores = {"loss": loss(told, rows, known, many)} | labels.scores(truth, chosen, known)
    scores |= {"roc_auc_macro": macro, "roc_auc_micro": labels.roc_auc_micro(truth, sure, known)}
    scores |= {"rows": float(len(rows)), "roc_auc_undefined": float(undefined)}
    table = [
        {"where": e.row.where, "unit": unit, "prompt": e.row.prompt, "reference": e.between.join(sorted(e.labels)),
         "prediction": e.between.join(sorted(named)), "nats": line.sum().item(), "decisions": len(line),
         "subset_accuracy": float(named == e.labels), "f1_samples": labels.row(labels.f1, e.labels, named),
         "jaccard_samples": labels.row(labels.jaccard, e.labels, named)}
        for e, unit, named, line in zip(rows, splits.units(e.row for e in rows), chosen, nats, strict=True)
    ]  # fmt: skip
    by_label = labels.table(truth, chosen, known)
    for n, line in enumerate(by_label):
        line["roc_auc"] = labels.roc_auc([known[n] in t for t in truth], [line[n] for line in sure])
        line["threshold"] = limits.get(known[n])
    return Scored(scores, table, by_label), limits


def odds(told: torch.Tensor, many: bool) -> torch.Tensor:
    """Log odds of each label in each row, (row, label): the order of the shares, and of those that round to 0 or 1.

    Of many labels the logit itself. Of one label the logit less logsumexp of the others: ln p - ln(1 - p) of softmax.

    >>> import torch
    >>> odds(torch.tensor([[0.0, 50.0], [0.0, 45.0]]), many=False)
    tensor([[-50.,  50.],
            [-45.,  45.]])
    """
    import torch

    if not many and told.shape[1] > 1:
        others = [told[:, [m for m in range(told.shape[1]) if m != n]].logsumexp(-1) for n in range(told.shape[1])]
        told = told - torch.stack(others, 1)
    ends = torch.finfo(told.dtype)
    return told.clamp(ends.min, ends.max)  # an infinite one is sure, as a share of 1 is


def cross_decided(
    truth: Sequence[labels.Labels], shares: Sequence[Sequence[float]], known: Sequence[str], folds: int = FOLDS
) -> list[frozenset[str]]:
    """Decide each row by thresholds that were fitted on the rows of the other folds; row n is in fold n mod `folds`.

    >>> cross_decided([{"a"}, {"a"}, set(), set()], [[0.9], [0.8], [0.2], [0.1]], ["a"], folds=2)
    [frozenset({'a'}), frozenset({'a'}), frozenset(), frozenset()]
    """
    chosen: list[frozenset[str]] = [frozenset()] * len(truth)
    for fold in range(folds):
        others = [n for n in range(len(truth)) if n % folds != fold]
        limits = labels.thresholds([truth[n] for n in others], [shares[n] for n in others], known)
        for n in range(fold, len(truth), folds):
            chosen[n] = labels.decide([shares[n]], limits)[0]
    return chosen


def baseline(rows: list[Example], valid: list[Example], known: list[str], many: bool) -> torch.Tensor:
    """Logits of what needs no language model: TF-IDF of words and pairs of words, and logistic regression.

    Every classifier is shown beside it. Words have two letters or more; where the training rows have none, all labels
    are told by their frequency, and so is a label of one class among them.
    """
    import torch
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    found = words.build_analyzer()
    worded = any(found(e.row.prompt) for e in rows)
    seen = words.fit_transform([e.row.prompt for e in rows]) if worded else None
    asked = words.transform([e.row.prompt for e in valid]) if worded else None
    truth = targets(rows, known, many).numpy()
    least = 1 / (2 * len(rows))
    if many:
        columns = []
        for column in truth.T:
            if worded and 0 < column.sum() < len(rows):
                fitted = LogisticRegression(C=10.0, max_iter=1000).fit(seen, column)
                columns.append(fitted.decision_function(asked).tolist())
            else:
                share = min(max(float(column.mean()), least), 1 - least)
                columns.append([math.log(share / (1 - share))] * len(valid))
        return torch.tensor(columns, dtype=torch.float64).T
    shares = torch.full((len(valid), len(known)), least, dtype=torch.float64)
    present = sorted(set(truth.tolist()))
    if worded and len(present) > 1:
        fitted = LogisticRegression(C=10.0, max_iter=1000).fit(seen, truth)
        shares[:, present] = torch.tensor(fitted.predict_proba(asked), dtype=torch.float64).clamp(min=least)
    else:
        for label in present:
            shares[:, label] = float((truth == label).mean())
    return shares.log()
