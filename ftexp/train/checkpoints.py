"""Checkpoints that a kill cannot tear and another run cannot take up.

The Trainer writes the files. What is added is the seal: a manifest with the hash of each file and with the
fingerprint of the run, written last. A folder without a whole seal does not count, so the newest sealed one is always
good to go on from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftexp.errors import MachineError
from ftexp.files import read_json, write_json
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


@dataclass(frozen=True)
class Store:
    """The checkpoints of one training. Made by `store`."""

    folder: Path
    fingerprint: dict[str, Any]
    """What decides the bits of the training, flat."""
    resume: Checkpoint | None
    """What to go on from."""

    def seal(self, step: int) -> None:
        """Hash what the Trainer wrote at a step, force it to disk, write the manifest, and remove older ones."""
        folder = self.folder / f"checkpoint-{step}"
        for name in LEFT_OUT:
            (folder / name).unlink(missing_ok=True)
        files = {str(p.relative_to(folder)): _hash(p, sync=True) for p in sorted(folder.rglob("*")) if p.is_file()}
        write_json(folder / SEAL, {"step": step, "fingerprint": self.fingerprint, "files": files})
        for other in self.folder.glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other)

    def clear(self) -> None:
        """Remove all of them; the adapter that came of them is kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)


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
            found.append(Checkpoint(path.parent, kept["step"]))
    return Store(folder, fingerprint, max(found, key=lambda c: c.step, default=None))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        kept = read_json(path)
    except MachineError:
        return None
    return kept if isinstance(kept, dict) and {"step", "fingerprint", "files"} <= kept.keys() else None


def _is_whole(path: Path, digest: str) -> bool:
    return path.is_file() and _hash(path) == digest


def _hash(path: Path, sync: bool = False) -> str:
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        if sync:
            os.fsync(content.fileno())
    return digest


def _difference(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    return {k for k in old | new if old.get(k) != new.get(k)}
