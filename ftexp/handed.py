"""A trained run that another is made from, such as its start or its reward: found by folder, name or id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftexp import board, runs
from ftexp.config import Method
from ftexp.errors import ConfigError, MachineError
from ftexp.progress import say
from ftexp.runs import Kept

RUN_HELP = "folder of a run, trial or sweep, name of a run or sweep, or MLflow id of a run (8 letters at least)"


def find(target: str, aloud: bool = True) -> Kept:
    """Find a complete run; of a sweep its winner, of several seeds of the winner the first.

    Args:
        target: folder of a run, trial or sweep, name of one in `outputs/`, or an MLflow id or the beginning of it.
        aloud: whether to say which trial is the winner of a sweep.

    Raises:
        MachineError: there is none, several have the name, or it is not complete.
    """
    sweep = runs.place(target)
    if (sweep / "sweep.json").exists():
        return winner(sweep, aloud)
    kept = runs.find(target)
    if kept.trial.get("state") != "complete":
        raise MachineError(f"{kept.folder}: must be complete, it is {kept.trial.get('state')}")
    return kept


def winner(folder: Path, aloud: bool = True) -> Kept:
    """Return the run of a sweep's best point.

    Raises:
        MachineError: no point is complete within the bounds of the sweep, or scores are of different kinds.
    """
    found = board.read(folder)
    if found.unlike is not None:
        raise MachineError(f"{folder}: this sweep has no winner, {found.unlike}; name one of its trials")
    if found.best is None:
        raise MachineError(f"{folder}: no point of this sweep is complete within its bounds: it has no winner")
    point = found.points[found.best]
    first = point.trials[0]
    seeds = f", the first of its {len(point.trials)} seeds" if len(point.trials) > 1 else ""
    if aloud:
        say(f"{folder.resolve().name}: the winner by {found.objective} is trial {first['number']}, "
            f"{board.label(point)}{seeds}")  # fmt: skip
    return runs.find(str(folder / str(first["number"])))


def stage(key: str, target: str, kinds: tuple[Method, ...]) -> Kept:
    """Find the run that a key of the config names.

    Args:
        key: of the config.
        target: its value.
        kinds: methods that it may have been trained with.

    Raises:
        ConfigError: it was trained with another method.
        MachineError: there is no such run or several, it is not complete, or its weights are gone.
    """
    try:
        runs.place(target)
    except MachineError as error:
        raise MachineError(f"{key}={error}") from error
    try:
        kept = find(target, aloud=False)
    except MachineError as error:
        raise MachineError(f"{key}={target} must be a run that is complete here, train it first: {error}") from error
    kind = kept.config().trainer.kind
    if kind not in kinds:
        wanted = " or ".join(k.value for k in kinds)
        raise ConfigError(f"{key}={target} must be a run with trainer.kind={wanted}, its is {kind.value}")
    try:
        _ = kept.whole
    except MachineError as error:
        raise MachineError(f"{key}={target}: {error}") from error
    return kept


def identity(kept: Kept) -> dict[str, Any]:
    """Tell what a run answers with: its name, and hashes of what it trained and of the base below it."""
    hashes = {"trained_sha256": kept.weights(), "base_sha256": kept.trial["facts"]["weights_sha256"]}
    return {"run": kept.name, **hashes}
