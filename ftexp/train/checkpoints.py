"""Checkpoints that a kill cannot tear and another run cannot take up.

The Trainer writes the files. What is added is the seal: a manifest with the hash of each file and with the
fingerprint of the run, written last. A folder without a whole seal does not count, so the newest sealed one is always
good to go on from.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftexp.errors import MachineError
from ftexp.files import read_json, sha256, write_json
from ftexp.progress import say

SEAL = "manifest.json"
LEFT_OUT = ("training_args.bin",)
"""A pickle of the Trainer's arguments, which nothing reads and which would hold a hub token."""

ROUNDING = {"compute.threads"}
"""May differ between a checkpoint and the run that goes on from it, at the cost of the last bits."""


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint."""

    folder: Path
    step: int
    """Optimizer steps it has behind it."""
    seconds: float
    """Seconds that went into it, over all attempts."""


@dataclass
class Store:
    """The checkpoints of one training. Made by `store`."""

    folder: Path
    fingerprint: dict[str, Any]
    """What decides the bits of the training, flat."""
    resume: Checkpoint | None
    """What to go on from."""
    began: float = field(default_factory=time.monotonic)
    """When this attempt began, on the clock of `time.monotonic`."""

    def seconds(self) -> float:
        """Count the seconds of the attempts whose work is kept: those before the checkpoint, and this one."""
        return time.monotonic() - self.began + (self.resume.seconds if self.resume else 0.0)

    def seal(self, step: int) -> None:
        """Hash what the Trainer wrote at a step, force it to disk, write the manifest, and remove older ones."""
        folder = self.folder / f"checkpoint-{step}"
        for name in LEFT_OUT:
            (folder / name).unlink(missing_ok=True)
        files = {str(p.relative_to(folder)): sha256(p, sync=True) for p in sorted(folder.rglob("*")) if p.is_file()}
        told = {"step": step, "seconds": self.seconds(), "fingerprint": self.fingerprint, "files": files}
        write_json(folder / SEAL, told)
        for other in self.folder.glob("checkpoint-*"):
            if other != folder:
                (other / SEAL).unlink(missing_ok=True)  # first, so that a kill leaves no seal over missing files
                shutil.rmtree(other)


def newest(folder: Path) -> int:
    """Return the step of a trial's newest sealed checkpoint, whatever run it is of; 0 without one."""
    steps = (p.parent.name.removeprefix("checkpoint-") for p in folder.glob(f"checkpoint-*/{SEAL}"))
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def clear(folder: Path) -> None:
    """Remove all of them, once the run is on record as complete, pruned or diverged: none of these goes on."""
    shutil.rmtree(folder, ignore_errors=True)


def clear_torn(folder: Path) -> None:
    """Remove the checkpoints without a seal: of no use, and they hold the room that was missing."""
    for path in folder.glob("checkpoint-*"):
        if not (path / SEAL).exists():
            shutil.rmtree(path, ignore_errors=True)


def store(folder: Path, fingerprint: dict[str, Any]) -> Store:
    """Open the checkpoints of a training and find what to go on from: the newest sealed one that is undamaged.

    A checkpoint of another fingerprint is not taken up, and the difference is told. transformers would go on from it
    and keep its old learning rate without a word.
    """
    found = []
    for path in sorted(folder.glob(f"checkpoint-*/{SEAL}")):
        kept = _read(path)
        if kept is None or not all(_is_whole(path.parent / name, digest) for name, digest in kept["files"].items()):
            say(f"{path.parent}: a damaged checkpoint, not used", always=True)
        elif told := _difference(kept["fingerprint"], fingerprint) - ROUNDING:
            say(f"{path.parent}: not used, it is of a run with another {', '.join(sorted(told))}", always=True)
        else:
            if kept["fingerprint"] != fingerprint:
                say(f"{path.parent}: goes on with another number of threads, so equal up to rounding")
            found.append(Checkpoint(path.parent, kept["step"], kept["seconds"]))
    return Store(folder, fingerprint, max(found, key=lambda c: c.step, default=None))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        kept = read_json(path)
    except MachineError:
        return None
    return kept if isinstance(kept, dict) and {"step", "seconds", "fingerprint", "files"} <= kept.keys() else None


def _is_whole(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def _difference(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    return {k for k in old | new if old.get(k) != new.get(k)}
