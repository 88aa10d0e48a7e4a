"""A trained reward model at work: what a completion is worth, in the template and tokenizer of the reward run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from ftexp import handed, model
from ftexp.config import Long, Method, Run
from ftexp.data import prompts
from ftexp.data.shapes import Row
from ftexp.errors import DataError, Diverged
from ftexp.model import Base
from ftexp.runs import Kept
from ftexp.train import reward


@dataclass(frozen=True)
class Rewarder:
    """A reward model in memory."""

    run: Run
    """Its config."""
    base: Base
    tuned: Any
    """The base with the run's adapter on, or the whole model that it trained."""

    def rewards(self, rows: Sequence[Row], texts: Sequence[str], batch: int, label: str) -> list[float]:
        """Score a text as the answer to each row, as the reward run scored its answers.

        Args:
            rows: with the prompts; of a conversation all before the last answer.
            texts: what was written, special tokens left out; one that spells the end-of-sequence token out ends there.
            batch: texts in a forward pass.
            label: name of the work on the screen.

        Raises:
            DataError: a text is longer than the reward model.
            Diverged: a reward is not a finite number.
        """
        ends = cast(str, self.base.tokenizer.eos_token)
        asked = tuple(_answered(row, text.split(ends)[0]) for row, text in zip(rows, texts, strict=True))
        roomy = replace(self.run.data, max_length=1 << 20, long=Long.refuse)  # the model's own length is what counts
        made = [e for e in prompts.examples(asked, self.base.tokenizer, roomy) if e is not None]
        limit = model.positions(self.run.model)
        for example in made:
            if limit is not None and len(example.ids) > limit:
                raise DataError(
                    f"{example.row.where}: the reward model takes at most {limit} tokens, prompt and completion have "
                    f"{len(example.ids)}; trainer.max_new_tokens and eval.max_new_tokens bound the completion"
                )
        told = reward.rewards(self.tuned, self.base.tokenizer, made, replace(self.run.eval, batch=batch), label)
        for row, value in zip(rows, told, strict=True):
            if not math.isfinite(value):
                raise Diverged(f"the reward model scores an answer to {row.where} with {value}")
        return told


def _answered(row: Row, text: str) -> Row:
    turns = (*row.turns[:-1], ("assistant", text)) if row.turns else ()
    return replace(row, completion=text, turns=turns)


def found(run: Run) -> Kept:
    """Find the reward run that a config names; nothing is loaded.

    Raises:
        ConfigError: it trained no reward model.
        MachineError: it is not there or not complete, or its weights or its base are not.
    """
    kept = handed.stage("trainer.reward", run.trainer.reward, (Method.reward,))
    below = kept.config().model
    if not kept.whole and model.rooted(below).path:
        model.source(below)
    return kept


_kept: tuple[str, Rewarder] | None = None


def load(run: Run) -> Rewarder:
    """Load the reward model of a config, or hand out the one in memory; it stays beside the bases of all trials.

    Raises:
        MachineError: it cannot be loaded, or its base is no longer the one that it was trained on.
    """
    global _kept
    kept = found(run)
    key = str(sorted(handed.identity(kept).items()))
    if _kept is None or _kept[0] != key:
        _kept = None
        _kept = key, _load(kept)
    return _kept[1]


def _load(kept: Kept) -> Rewarder:
    from ftexp.model import compute, saved

    run, same = saved.as_trained(kept, kept.config())
    if kept.whole:
        base = saved.read(kept.folder / "model", compute.policy(run.model), 1)
        return Rewarder(run, base, base.model)
    base = model.fresh(run.model, run.quant, 1)
    if same:
        saved.check_weights(kept, run, base)
    return Rewarder(run, base, saved.attached(base.model, kept.folder / "adapter"))
