"""A trained run, ready to be used: found by its folder, name or id, its base loaded and its adapter put on.

This is the one place that knows how a run is loaded; `generate` and `export` take what it lends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftexp import board, model, runs
from ftexp.config import Attention, Dtype, Format, Method, Run
from ftexp.errors import MachineError
from ftexp.files import read_json
from ftexp.model import Base
from ftexp.progress import say
from ftexp.runs import Kept

if TYPE_CHECKING:
    from peft import PeftModel

RUN_HELP = "folder of a run, trial or sweep, name of a run or sweep, or MLflow id of a run (8 letters at least)"


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


def find(target: str) -> Kept:
    """Find a complete run; of a sweep its winner, of several seeds of the winner the first.

    Args:
        target: folder of a run, trial or sweep, name of one in `outputs/`, or an MLflow id or the beginning of it.

    Raises:
        MachineError: there is none, or it is not complete.
    """
    places = (Path(target), runs.OUTPUTS / "sweeps" / target, runs.OUTPUTS / "runs" / target)
    sweep = next((place for place in places if (place / "sweep.json").exists()), None)
    if sweep is not None:
        return winner(sweep)
    run = next((place for place in places if (place / "trial.json").exists()), None)
    kept = runs.find(str(run) if run is not None else target)
    if kept.trial.get("state") != "complete":
        raise MachineError(f"{kept.folder}: must be complete, it is {kept.trial.get('state')}")
    return kept


def winner(folder: Path) -> Kept:
    """Return the run of a sweep's best point.

    Raises:
        MachineError: no point is complete within the bounds of the sweep.
    """
    found = board.read(folder)
    if found.best is None:
        raise MachineError(f"{folder}: no point of this sweep is complete within its bounds: it has no winner")
    point = found.points[found.best]
    first = point.trials[0]
    seeds = f", the first of its {len(point.trials)} seeds" if len(point.trials) > 1 else ""
    say(f"{folder.resolve().name}: the winner by {found.objective} is trial {first['number']}, "
        f"{board.label(point)}{seeds}")  # fmt: skip
    return runs.find(str(folder / str(first["number"])))


def names(kept: Kept) -> list[str]:
    """List the labels of a classifier in the order of its outputs; none where the model writes text."""
    return kept.trial.get("labels", []) if kept.config().trainer.kind is Method.classify else []


@contextmanager
def load(kept: Kept) -> Iterator[Trained]:
    """Load the base of a run, put its adapter on, and take it off again.

    Raises:
        MachineError: base or adapter cannot be loaded, or the base's weights are not those it was trained on.
    """
    from ftexp.model import compute, saved

    run = kept.config()
    before = kept.trial["facts"]["compute"]
    now = compute.policy(run.model)
    same = before["device"] == now.device
    if same:
        run = replace(run, model=replace(run.model, dtype=Dtype(before["dtype"]),
                                         attention=Attention(before["attention"])))  # fmt: skip
    base = model.load(run.model, run.quant, len(names(kept)))
    if same:
        _check_weights(kept, run, base)
    else:
        say(f"{kept.name} was trained on {before['device']} in {before['dtype']}; this is {now.device} in {now.dtype}, "
            "and its answers may differ in places")  # fmt: skip
    with saved.restored(base, kept.folder / "adapter") as tuned:
        yield Trained(kept, run, base, tuned)


def _check_weights(kept: Kept, run: Run, base: Base) -> None:
    """Refuse another base than the run's; packed weights may differ with the chip that packed them."""
    told = kept.trial["facts"]["weights_sha256"]
    if base.weights == told:
        return
    text = f"{kept.folder}: was trained on weights {told[:12]}, those of the base model are now {base.weights[:12]}"
    if run.quant.kind is Format.none:
        raise MachineError(text)
    say(f"warning: {text}; they are packed on load, and another chip may pack them otherwise")


def confirmed(kept: Kept) -> str | None:
    """Return the line of the last confirmation of the sweep whose winner this trial is; None where there is none."""
    told: dict[str, Any] = read_json(kept.folder.parent / "confirm.json") or {"openings": []}
    entry = told["openings"][-1] if told["openings"] and kept.folder.name.isdigit() else {}
    winner = entry.get("result", {"members": []})["members"][:1]
    return told["line"] if winner and int(kept.folder.name) in winner[0]["trials"] else None
