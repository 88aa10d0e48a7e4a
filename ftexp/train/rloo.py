"""Reinforcement learning against a reward model (RLOO: Ahmadian et al. 2024, arXiv:2402.14740).

The model writes `trainer.generations` completions for each prompt. One that is worth more than the mean of the others
becomes likelier, one that is worth less does not: the weight is reward - beta * nats away from the reference, less that
mean. TRL's RLOOTrainer writes, weighs and steps. Three things are ours. Prompts go in as the ids that all else here is
asked with. The reference is the base without its adapter, or with the weights it had before training: the trainer would
put a second adapter on, which with PiSSA takes a second start out of the base, or load a whole model from files, which
are not what a run began with that was handed over. And the order of the prompts follows from seed and epoch, so that a
killed run goes on as it would have.

A step is a mean over equally many completions in each forward pass, all written before the first pass, so accumulation
is exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ftexp import evaluate, metrics, model
from ftexp.config import Eval, Run
from ftexp.data import splits
from ftexp.data.prompts import Example
from ftexp.errors import ConfigError
from ftexp.evaluate import Scored, Seen
from ftexp.model import Base
from ftexp.train import answers, sft
from ftexp.train.checkpoints import Store
from ftexp.train.control import Control, Report, Rung
from ftexp.train.rewarder import Rewarder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerCallback

NOTHING = Seen()
KEPT = ("reward", "win_rate", "kl", "length")
"""Scores of the curve beside its loss."""


def room(run: Run, rows: Sequence[Example]) -> int:
    """Return the longest completion that is written in training, in tokens."""
    return evaluate.planned_tokens(rows, Eval(max_new_tokens=run.trainer.max_new_tokens))


def train(
    run: Run,
    base: Base,
    tuned: PeftModel | PreTrainedModel,
    rows: Sequence[Example],
    valid: Sequence[Example],
    kept: Store,
    report: Report,
    control: Control,
    rewarder: Rewarder,
) -> dict[str, float]:
    """Train the adapter in place; `rewarder` says what a completion is worth, all else is as of `sft.train`."""
    steps = sft.planned_steps(run.trainer, len(rows))
    settings: Any = sft.arguments(run.trainer, base.compute.device, run.seed, str(kept.folder), steps)
    settings.max_completion_length = room(run, rows)
    beside: dict[str, float] = {}

    def curve(scored: Any, label: str) -> Rung:
        found = score(scored, base, valid, run, rewarder, label)
        beside.update({f"valid/{name}": found.scores[name] for name in KEPT if name in found.scores})
        return Rung(found.scores["loss"], [e["nats"] for e in found.table], [e["completions"] for e in found.table],
                    [e["unit"] for e in found.table])  # fmt: skip

    def told(values: dict[str, float], step: int) -> None:
        report(values | (beside if "valid/loss" in values else {}), step)

    def make(watching: TrainerCallback) -> Any:
        return _trainer(base, tuned, settings, rows, run, rewarder, watching)

    with answers.undisturbed(base.model), _settings_put_back(base.model):
        return sft.optimise(run, tuned, steps, curve, make, kept, told, control)


def _trainer(
    base: Base, tuned: Any, settings: Any, rows: Sequence[Example], run: Run, rewarder: Rewarder,
    watching: TrainerCallback,
) -> Any:  # fmt: skip
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import RLOOTrainer

    if sft.has_adapted_head(tuned):
        raise ConfigError(
            "lora.targets names the output head, which RLOOTrainer would not train: it multiplies with frozen weights"
        )

    class Policy(RLOOTrainer):
        def _tokenize_prompts(self, prompts):
            return [list(rows[int(number)].prompt) for number in prompts], None, {}

        def _get_train_sampler(self, dataset=None):
            return Order(len(rows), run, settings.generation_batch_size // settings.num_generations)

        def _get_per_token_logps_and_entropies(self, asked, *given, **more):
            if asked is not self.ref_model:
                return super()._get_per_token_logps_and_entropies(asked, *given, **more)
            with model.untrained(base, tuned):
                return super()._get_per_token_logps_and_entropies(self.model, *given, **more)

        def floating_point_ops(self, inputs):
            """Count a step as transformers counts those of supervised training: 6 * tokens * weights outside tables."""
            passes = cast(list[dict[str, Any]], self._buffered_inputs)
            taken = passes[(self._step - 1) % len(passes)]
            tokens = taken["prompt_ids"].numel() + taken["completion_ids"].numel()
            return 6 * tokens * tuned.num_parameters(exclude_embeddings=True)

    def worth(prompts: list[str], completions: list[str], **_: Any) -> Any:
        asked = [rows[int(number)] for number in prompts]
        texts = [evaluate.answer(text, evaluate.opening(base.tokenizer, e))
                 for text, e in zip(completions, asked, strict=True)]  # fmt: skip
        return rewarder.rewards([e.row for e in asked], texts, run.eval.batch, "sampled")

    numbers = Dataset.from_list([{"prompt": str(n)} for n in range(len(rows))])
    with _one_adapter(tuned):
        made = Policy(tuned, worth, settings, numbers, processing_class=base.tokenizer, callbacks=[watching])
    made.beta, made.ref_model = run.trainer.beta, REFERENCE
    made.remove_callback(PrinterCallback)
    return made


REFERENCE: Any = object()
"""Stands for the reference where RLOOTrainer asks its `ref_model`."""


class Order:
    """Rows in the order of `sft.orders`, as many at a time as a step has prompts, each as often as it is answered.

    TRL's own sampler begins anew where a killed training goes on, whatever epoch it is in.
    """

    def __init__(self, count: int, run: Run, prompts: int) -> None:
        """Take the number of rows and the prompts of a step."""
        self.count, self.run, self.prompts, self.epoch = count, run, prompts, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the epoch to draw; called by the Trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Count what is drawn in an epoch."""
        return self.count // self.prompts * self.prompts * self._times()

    def __iter__(self) -> Iterator[int]:
        """Draw; the loader asks for all completions of a step at once, and again for each forward pass of it."""
        order = next(itertools.islice(sft.orders(self.count, self.run.trainer, self.run.seed), self.epoch, None))
        for begin in range(0, self.count - self.prompts + 1, self.prompts):
            step = [n for n in order[begin : begin + self.prompts] for _ in range(self.run.trainer.generations)]
            for _ in range(self.run.trainer.accumulation):
                yield from step

    def _times(self) -> int:
        return self.run.trainer.generations * self.run.trainer.accumulation


@contextmanager
def _one_adapter(tuned: Any) -> Iterator[None]:
    """Take the second adapter off that RLOOTrainer puts on while it is made, and keep it from changing the base."""
    adapters = getattr(tuned, "peft_config", {})
    first = {name: adapters[name].init_lora_weights for name in adapters}
    try:
        for name in first:
            adapters[name].init_lora_weights = True
        yield
    finally:
        for name in [name for name in adapters if name not in first]:
            tuned.delete_adapter(name)
        for name, value in first.items():
            adapters[name].init_lora_weights = value


@contextmanager
def _settings_put_back(base: PreTrainedModel) -> Iterator[None]:
    """Put back what RLOOTrainer writes into the config of a model."""
    text, written = base.config.get_text_config(), base.generation_config
    before, generating, tags = text.pad_token_id, getattr(written, "pad_token_id", None), base.model_tags
    base.model_tags = list(tags) if tags is not None else None
    try:
        yield
    finally:
        text.pad_token_id, base.model_tags = before, tags
        cast(Any, written).pad_token_id = generating


def score(
    scored: Any, base: Base, rows: Sequence[Example], run: Run, rewarder: Rewarder, label: str,
    known: Seen = NOTHING, rival: Sequence[float] | None = None,
) -> Scored:  # fmt: skip
    """Let a model answer held-out prompts greedily, and score what it wrote.

    Args:
        scored: the model in training, or the base itself, which is the reference.
        base: the base, and its tokenizer.
        rows: held-out rows.
        run: the config.
        rewarder: says what a completion is worth.
        label: name of the work on the screen.
        known: what the rows of the run answer.
        rival: rewards of the base's completions; None where nothing is compared with them.
    """
    tokenizer, batch = base.tokenizer, run.eval.batch
    settings = evaluate.greedy(scored, tokenizer, rows, run.eval)
    written = evaluate.continued(scored, tokenizer, [e.prompt for e in rows], settings, batch, label)
    decoded = tokenizer.batch_decode([list(ids) for ids in written], skip_special_tokens=True)
    texts = [evaluate.answer(text, evaluate.opening(tokenizer, e)) for text, e in zip(decoded, rows, strict=True)]
    gained = rewarder.rewards([e.row for e in rows], texts, batch, label)
    if scored is base.model and not base.changed:
        nats = [0.0] * len(rows)
    else:
        answered = [replace(e, completion=ids, earlier=()) for e, ids in zip(rows, written, strict=True)]
        nats = evaluate.divergence(scored, tokenizer, answered, run.eval, label, partial(model.untrained, base, scored))
    table: list[dict[str, Any]] = []
    units = splits.units(e.row for e in rows)
    for n, (e, ids, text, worth, away) in enumerate(zip(rows, written, texts, gained, nats, strict=True)):
        table.append(
            {"where": e.row.where, "unit": units[n], "prompt": e.row.prompt, "reference": e.row.completion,
             "prediction": text, "nats": metrics.price(worth, away, run.trainer.beta), "completions": 1,
             "reward": worth, "kl_nats": away,
             "written": len(ids), "length": float(len(ids)),
             **({} if rival is None else {"win_rate": metrics.preferred(worth - rival[n])}),
             **evaluate.compare(text, e.row.completion, known, run.eval)}
        )  # fmt: skip
    return Scored(_summary(table), table)


def _summary(table: list[dict[str, Any]]) -> dict[str, float]:
    """Compute a split's scores from its rows."""
    written = [entry["prediction"] for entry in table]
    return {
        "loss": metrics.loss([e["nats"] for e in table], [e["completions"] for e in table]),
        "kl": metrics.loss([e["kl_nats"] for e in table], [e["written"] for e in table]),
        **{name: sum(e[name] for e in table) / len(table) for name in metrics.SCORES if name in table[0]},
        **{f"distinct_{n}": metrics.distinct(written, n) for n in (1, 2)},
        "rows": float(len(table)),
    }
