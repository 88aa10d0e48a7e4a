"""A trained run, ready to be used: found by its folder, name or id, its base loaded and its adapter put on.

This is the one place that knows how a run is loaded; `generate` and `export` take what it lends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftexp import model
from ftexp.config import Method, Run
from ftexp.errors import MachineError
from ftexp.files import read_json
from ftexp.handed import RUN_HELP as RUN_HELP
from ftexp.handed import find as find
from ftexp.handed import winner as winner
from ftexp.model import Base
from ftexp.runs import Kept

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Trained:
    """A run with its model in memory."""

    kept: Kept
    run: Run
    """Its config; `model.dtype` and `model.attention` are those it was trained with, where the device is the same."""
    base: Base
    tuned: PeftModel

    @contextmanager
    def untuned(self) -> Iterator[PeftModel]:
        """Switch the adapter off for a while: the base as it was before training."""
        with self.tuned.disable_adapter():
            yield self.tuned


def names(kept: Kept) -> list[str]:
    """List the labels of a classifier in the order of its outputs; none where the model writes text."""
    return kept.trial.get("labels", []) if kept.config().trainer.kind is Method.classify else []


def check_adapter(kept: Kept) -> None:
    """Refuse a run that trained its whole model.

    Raises:
        MachineError: it has no adapter to be put on its base.
    """
    if (kept.folder / "model").is_dir():
        raise MachineError(
            f"{kept.folder}: must hold an adapter, this run trained its whole model; another run begins with it: "
            f"model=run model.path={kept.name}"
        )


@contextmanager
def load(kept: Kept) -> Iterator[Trained]:
    """Load the base of a run, put its adapter on, and take it off again.

    Raises:
        MachineError: the run trained its whole model, base or adapter cannot be loaded, or the base's weights are not
            those it was trained on.
    """
    from ftexp.model import saved

    check_adapter(kept)
    run, same = saved.as_trained(kept, kept.config())
    base = model.load(run.model, run.quant, len(names(kept)))
    if same:
        saved.check_weights(kept, run, base)
    with saved.restored(base, kept.folder / "adapter") as tuned:
        yield Trained(kept, run, base, tuned)


def confirmed(kept: Kept) -> str | None:
    """Return the line of the last confirmation of the sweep whose winner this trial is; None where there is none."""
    told: dict[str, Any] = read_json(kept.folder.parent / "confirm.json") or {"openings": []}
    entry = told["openings"][-1] if told["openings"] and kept.folder.name.isdigit() else {}
    winner = entry.get("result", {"members": []})["members"][:1]
    return told["line"] if winner and int(kept.folder.name) in winner[0]["trials"] else None
