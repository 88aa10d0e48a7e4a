"""A trained run, ready to be used: found by its folder, name or id, its base loaded with its adapter, or its model.

This is the one place that knows how a run is loaded; `generate` and `export` take what it lends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftexp import model
from ftexp.config import Method, Run
from ftexp.files import read_json
from ftexp.handed import RUN_HELP as RUN_HELP
from ftexp.handed import find as find
from ftexp.handed import winner as winner
from ftexp.model import Base
from ftexp.runs import Kept

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ftexp.model.compute import Compute


@dataclass(frozen=True)
class Trained:
    """A run with its model in memory."""

    kept: Kept
    run: Run
    """Its config; `model.dtype` and `model.attention` are those it was trained with, where the device is the same."""
    tokenizer: PreTrainedTokenizerBase
    compute: Compute
    tuned: PeftModel | PreTrainedModel
    """Its base with the adapter on, or the whole model that it trained."""
    untuned: Callable[[], AbstractContextManager[Any]]
    """Lends the base as it was before training, for a while; where no adapter can be switched off, it is loaded too."""


def names(kept: Kept) -> list[str]:
    """List the labels of a classifier in the order of its outputs; none of another model."""
    return kept.trial.get("labels", []) if kept.config().trainer.kind is Method.classify else []


def outputs(kept: Kept) -> int:
    """Count the outputs of a head: the labels of a classifier, the one of a reward model; 0 where text is written."""
    return 1 if kept.config().trainer.kind is Method.reward else len(names(kept))


@contextmanager
def load(kept: Kept) -> Iterator[Trained]:
    """Load the base of a run and put its adapter on, to be taken off again; or load the whole model that it trained.

    Raises:
        MachineError: base, adapter or model cannot be loaded, or the base's weights are not those it was trained on.
    """
    from ftexp.model import compute, saved

    run, same = saved.as_trained(kept, kept.config())

    def base() -> Base:
        found = model.load(run.model, run.quant, outputs(kept))
        if same:
            saved.check_weights(kept, run, found)
        return found

    @contextmanager
    def before() -> Iterator[Any]:
        yield base().model

    if kept.whole:
        chosen = compute.policy(run.model)
        compute.apply(chosen)
        found = saved.read(kept.folder / "model", chosen, outputs(kept))
        yield Trained(kept, run, found.tokenizer, chosen, found.model, before)
        return

    @contextmanager
    def switched_off() -> Iterator[Any]:
        with tuned.disable_adapter():
            yield tuned

    below = base()
    with saved.restored(below, kept.folder / "adapter") as tuned:
        yield Trained(kept, run, below.tokenizer, below.compute, tuned, switched_off)


def confirmed(kept: Kept) -> str | None:
    """Return the line of the last confirmation of the sweep whose winner this trial is; None where there is none."""
    told: dict[str, Any] = read_json(kept.folder.parent / "confirm.json", "openings") or {"openings": []}
    entry = told["openings"][-1] if told["openings"] and kept.of_sweep else {}
    winner = entry.get("result", {"members": []})["members"][:1]
    return told["line"] if winner and int(kept.folder.name) in winner[0]["trials"] else None
