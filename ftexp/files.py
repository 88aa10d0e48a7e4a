"""Files of ours: the cache, and JSON that is whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ftexp.errors import MachineError


def cache() -> Path:
    """Return the folder for what is fetched or built once: `$FTEXP_CACHE`, else `~/.cache/ftexp`."""
    return Path(os.environ.get("FTEXP_CACHE") or Path.home() / ".cache" / "ftexp")


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be made or written, before anything is begun.

    Raises:
        MachineError: names what is in the way.
    """
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise MachineError(f"{there}: must be a folder, a file of this name is in the way")
    if not os.access(there, os.W_OK | os.X_OK):
        raise MachineError(f"{there}: must be a folder that can be written")


def sha256(path: Path) -> str:
    """Hash the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a file that a reader, or a restart after a kill, sees whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(content, out, indent=1, allow_nan=True)
            out.flush()
            os.fsync(out.fileno())
        Path(fresh).replace(path)
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any | None:
    """Read a JSON file, or return None where there is none.

    Raises:
        MachineError: what is there is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise MachineError(f"{path}: is damaged, it must be JSON ({error}); put it back or remove it") from error
