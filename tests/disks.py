"""A small disk that fills up at a chosen moment. As root a file system of its own; else a limit on file sizes."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BALLAST = "ballast"


@dataclass
class Disk:
    """Where a test writes, and how it is made full."""

    folder: Path
    mounted: bool
    """Whether it is a file system of its own; else no file of this process may grow while it is full."""

    def fill(self) -> None:
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        with (self.folder / BALLAST).open("wb", buffering=0) as out:
            for size in (2**20, 4096, 1):
                try:
                    while True:
                        out.write(bytes(size))
                except OSError:
                    continue

    def free(self) -> None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        (self.folder / BALLAST).unlink(missing_ok=True)


def can_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["mount", "--help"], capture_output=True).returncode == 0


@contextmanager
def disk(folder: Path, mib: int = 48, mounted: bool | None = None) -> Iterator[Disk]:
    """Lend a disk of a few MiB at a folder; `mounted` None takes a file system where one can be made."""
    folder.mkdir(parents=True, exist_ok=True)
    made = False
    if mounted is None or mounted:
        made = (
            can_mount()
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True
            ).returncode
        )
    lent = Disk(folder, made)
    try:
        yield lent
    finally:
        lent.free()
        if made:
            subprocess.run(["umount", "-l", str(folder)], check=True)
