"""Runs that are there: found by folder or MLflow id, read back, and set side by side."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftexp import config
from ftexp.config import Run
from ftexp.errors import MachineError
from ftexp.files import read_points, read_trial, sha256

OUTPUTS = Path("outputs")
MANY = 20
"""Names of one kind that a message lists."""


@dataclass(frozen=True)
class Kept:
    """A run as its folder tells it."""

    folder: Path
    trial: dict[str, Any]
    """Contents of `trial.json`."""

    @property
    def name(self) -> str:
        """The folder below `outputs/runs` or `outputs/sweeps`."""
        return f"{self.folder.parent.name}/{self.folder.name}" if self.folder.name.isdigit() else self.folder.name

    @property
    def of_sweep(self) -> bool:
        """Whether it is a trial of a sweep; a run may be named by a number too."""
        return self.folder.name.isdigit() and (self.folder.parent / "sweep.json").exists()

    def points(self) -> list[dict[str, float]]:
        """Read the points of `metrics.jsonl`, in order; a line that a kill tore is left out."""
        return read_points(self.folder / "metrics.jsonl")

    @property
    def whole(self) -> bool:
        """Whether the run trained its whole model, in `model/`, and has no adapter.

        Raises:
            MachineError: its folder holds neither.
        """
        if (self.folder / "adapter").is_dir():
            return False
        if (self.folder / "model").is_dir():
            return True
        raise MachineError(f"{self.folder}: must hold what was trained; neither adapter nor model is left")

    def weights(self) -> str | None:
        """Hash the weights that were trained: the adapter, or the whole model where there is none."""
        adapter = self.folder / "adapter" / "adapter_model.safetensors"
        files = [adapter] if adapter.exists() else sorted((self.folder / "model").glob("model*.safetensors"))
        told = [sha256(path) for path in files]
        return hashlib.sha256("".join(told).encode()).hexdigest() if len(told) > 1 else next(iter(told), None)

    def config(self) -> Run:
        """Build the run's config again, checked; its name and tracking are the defaults."""
        return config.rebuild(self.trial["config"])


def place(target: str | Path, *files: str) -> Path:
    """Return the folder that a sweep or run of a name has in `outputs/`, or the one that was given.

    Args:
        target: folder, or name of one.
        files: of which the folder must hold one.
    """
    places = (Path(target), OUTPUTS / "sweeps" / target, OUTPUTS / "runs" / target)
    return next((place for place in places if any((place / name).exists() for name in files)), Path(target))


def shown(target: str | Path) -> Path:
    """Return the folder of a sweep or run, given that or its name.

    Raises:
        MachineError: there is none.
    """
    folder = place(target, "sweep.json", "trial.json")
    if not any((folder / name).exists() for name in ("sweep.json", "trial.json")):
        raise MachineError(
            f"{target}: must be the folder of a sweep or a run; there is no sweep.json or trial.json{there(target)}"
        )
    return folder


def there(target: str | Path) -> str:
    """Tell what `outputs/` holds, as the end of a message on a name that it does not hold."""
    told, every = [], []
    for kind, file in (("sweeps", "sweep.json"), ("runs", "trial.json")):
        names = sorted(path.parent.name for path in (OUTPUTS / kind).glob(f"*/{file}"))
        every += names
        more = [f"{len(names) - MANY} more"] if len(names) > MANY else []
        told += [f"{kind} {', '.join([*names[:MANY], *more])}"] if names else []
    near = difflib.get_close_matches(Path(target).name, every, n=1)
    return (f"; did you mean {near[0]}?" if near else "") + f"; there are: {'; '.join(told) or 'none'}"


def find(target: str) -> Kept:
    """Find a run by its folder or name, or by its MLflow id or the beginning of it (8 letters at least).

    Raises:
        MachineError: there is none, or several begin so.
    """
    folder = place(target, "trial.json")
    if (kept := read_trial(folder)) is not None:
        return Kept(folder, kept)
    if (sweep := place(target, "sweep.json") / "sweep.json").exists():
        trials = sorted(int(path.parent.name) for path in sweep.parent.glob("[0-9]*/trial.json"))
        name = f", as {target}/{trials[0]}" if trials else ", none has begun"
        raise MachineError(f"{target}: must be a run, this is a sweep; name one of its trials{name}")
    found = []
    for path in sorted(OUTPUTS.glob("**/trial.json")) if len(target) >= 8 else ():
        kept = read_trial(path.parent) or {}
        if str(kept.get("mlflow_run") or "").startswith(target) and "repeats" not in kept:  # which took another's
            found.append(Kept(path.parent, kept))
    if len(found) != 1:
        told = "no run" if not found else f"{len(found)} runs"
        raise MachineError(
            f"{target}: must be the folder of a run, or an MLflow run id; {told} of this id in {OUTPUTS}"
            f"{'' if found else there(target)}"
        )
    return found[0]


def facts(kept: Kept) -> dict[str, Any]:
    """What a result depends on beside the config, flat; the time and place it was made are left out."""
    return config.flat({k: v for k, v in kept.trial.get("facts", {}).items() if k != "parameters"})


def changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """List the keys whose values differ, in alphabetical order.

    >>> changed({"a": 1, "b": 2}, {"b": 3})
    {'a': (1, None), 'b': (2, 3)}
    """
    return {k: (old.get(k), new.get(k)) for k in sorted(old | new) if old.get(k) != new.get(k)}
