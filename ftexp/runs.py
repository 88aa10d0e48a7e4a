"""Runs that are there: found by folder or MLflow id, read back, and set side by side."""

from __future__ import annotations

import difflib
import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ftexp import config
from ftexp.config import Run
from ftexp.errors import MachineError
from ftexp.files import read_json, read_points, read_trial, sha256, write_json
from ftexp.progress import warn

OUTPUTS = Path("outputs")
LIST = OUTPUTS / "sweeps.json"
"""Holds the sweeps that do not lie in `outputs/sweeps/<name>`: their folders, and the name of each."""
FILES = ("sweep.json", "trial.json")
"""What tells that a folder is that of a sweep, or of a run."""
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
    """Return the folder of the sweep or run that a name leads to, or the one that was given.

    Args:
        target: folder, or name of one.
        files: of which the folder must hold one; those of a sweep and of a run where none is named.

    Raises:
        MachineError: the name leads to several.
    """
    first, *below = Path(target).parts or (".",)
    listed = (folder.joinpath(*below) for folder, name in elsewhere().items() if name == first)
    places = (Path(target), OUTPUTS / "sweeps" / target, OUTPUTS / "runs" / target, *listed)
    found = {
        place.resolve(): place for place in places[::-1] if any((place / name).exists() for name in files or FILES)
    }
    if len(found) > 1:
        told = [str(place if place != Path(target) else place.absolute()) for place in reversed(found.values())]
        raise MachineError(
            f"{target}: must be one sweep or run, there are {' and '.join(told)}; give one of these folders"
        )
    return next(iter(found.values()), Path(target))


def elsewhere() -> dict[Path, str]:
    """Return the folders of sweeps that do not lie in `outputs/sweeps/<name>`, with their names; none that is gone."""
    kept = {Path(folder): name for folder, name in (read_json(LIST) or {}).items()}
    return {folder: name for folder, name in kept.items() if (folder / "sweep.json").exists()}


def sweeps() -> dict[Path, str]:
    """Return the folders of the sweeps that were launched here, with the name that leads to each."""
    return {path.parent: path.parent.name for path in (OUTPUTS / "sweeps").glob("*/sweep.json")} | elsewhere()


def called(folder: Path, name: str) -> str:
    """Return what leads to a sweep from here: its name, or its folder where that leads to none, or to several."""
    try:
        if place(name, "sweep.json").resolve() == folder.resolve():
            return name
    except MachineError:
        pass
    return shlex.quote(os.path.relpath(folder))


def keep(folder: Path, name: str) -> None:
    """Remember where a sweep lies, unless its name says it; a list that cannot be written costs a warning."""
    if folder.resolve() == (OUTPUTS / "sweeps" / name).resolve():
        return
    place, here = folder.resolve(), Path.cwd().resolve()
    place = place.relative_to(here) if place.is_relative_to(here) else place  # a project may be moved
    try:
        OUTPUTS.mkdir(exist_ok=True)
        with FileLock(LIST.with_suffix(".lock")):
            write_json(LIST, {str(path): known for path, known in (elsewhere() | {place: name}).items()})
    except OSError as error:
        warn(
            f"{LIST}: cannot be written: {error.strerror or error}; sweep {name} is found by its folder alone, {folder}"
        )


def shown(target: str | Path) -> Path:
    """Return the folder of a sweep or run, given that or its name.

    Raises:
        MachineError: there is none, or several have the name.
    """
    folder = place(target)
    if not any((folder / name).exists() for name in FILES):
        raise MachineError(
            f"{target}: must be the folder of a sweep or a run; there is no sweep.json or trial.json{there(target)}"
        )
    return folder


def there(target: str | Path) -> str:
    """Tell what `outputs/` holds, as the end of a message on a name that it does not hold."""
    told, every = [], []
    alone = (path.parent.name for path in (OUTPUTS / "runs").glob("*/trial.json"))
    for kind, names in (("sweeps", sorted(sweeps().values())), ("runs", sorted(alone))):
        every += names
        more = [f"{len(names) - MANY} more"] if len(names) > MANY else []
        told += [f"{kind} {', '.join([*names[:MANY], *more])}"] if names else []
    near = difflib.get_close_matches(Path(target).name, every, n=1)
    return (f"; did you mean {near[0]}?" if near else "") + f"; there are: {'; '.join(told) or 'none'}"


def find(target: str) -> Kept:
    """Find a run by its folder or name, or by its MLflow id or the beginning of it (8 letters at least).

    Raises:
        MachineError: there is none, or several begin so, or have the name.
    """
    folder = place(target)
    if (kept := read_trial(folder)) is not None:
        return Kept(folder, kept)
    if (folder / "sweep.json").exists():
        trials = sorted(int(path.parent.name) for path in folder.glob("[0-9]*/trial.json"))
        name = f", as {target}/{trials[0]}" if trials else ", none has begun"
        raise MachineError(f"{target}: must be a run, this is a sweep; name one of its trials{name}")
    found = []
    places = {path.resolve(): path for place in (OUTPUTS, *elsewhere()) for path in place.glob("**/trial.json")}
    for path in sorted(places.values()) if len(target) >= 8 else ():
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
