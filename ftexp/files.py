"""Files of ours: the cache, and files and folders that are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftexp.errors import ConfigError, Damaged, MachineError, NoRoom

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
"""A full disk, a used-up quota, a limit on file sizes, a disk that has become read-only or fails."""
NO_NUMBER = ("No space left on device", "unexpected pos", "iostream error", "PytorchStreamWriter")
"""What safetensors and torch say of a disk that takes no more; their errors have no number."""


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


def sha256(path: Path, sync: bool = False) -> str:
    """Hash the bytes of a file; `sync` forces them to the disk first."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a file that a reader, or a restart after a kill, sees whole or not at all; null is what is not finite."""
    text = json.dumps(finite(content), indent=1)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a file of text, in a folder that is there, that a reader or a restart sees whole or not at all."""
    with naming(path), replacing(path) as fresh, fresh.open("x", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lend the name of a file that takes the place of another where the work ends well, and is removed where not."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield fresh
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of the disk the path it is about: what fails while it writes knows none."""
    try:
        yield
    except OSError as error:
        if error.errno in UNWRITABLE:
            error.filename = str(path)
        raise


def no_room(error: BaseException, place: Path | None = None) -> NoRoom | None:
    """Return what to raise instead of an error that a full or failing disk is behind; None where none is.

    Args:
        error: as a library or Python raised it, perhaps from another one.
        place: told where the error names no path.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NoRoom):
            return cause
        number = getattr(cause, "errno", None) if isinstance(cause, OSError) else None
        foreign = type(cause) is RuntimeError or type(cause).__name__ == "SafetensorError"
        if foreign and any(text in str(cause) for text in NO_NUMBER):
            number = errno.ENOSPC
        if number in UNWRITABLE:
            where = getattr(cause, "filename", None) or place or "the disk"
            return NoRoom(f"{where}: cannot be written: {os.strerror(number)}; make room, and the same command goes on")
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Lend an empty folder that takes the name `target` where the work ends well, and is removed where it does not.

    An empty folder that is there may be the current one or a mount point, which cannot be replaced: the work is done
    inside of it, and moved up.

    Raises:
        ConfigError: the name is taken.
        MachineError: the folder cannot be made.
    """
    taken = ConfigError(f"{target}: must be a new or an empty folder, there is something of this name")
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise taken
    inside = target.exists()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = target if inside else target.parent
        fresh = Path(tempfile.mkdtemp(dir=place, prefix=f".{target.absolute().name}.")).absolute()
    except OSError as error:
        raise MachineError(f"{target}: cannot be made: {error.strerror or error}") from error
    try:
        yield fresh
        os.umask(mask := os.umask(0))
        fresh.chmod(0o777 & ~mask)  # a temporary folder is made for its owner alone
        for path in fresh.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        _move(fresh, fresh.parent if inside else target, taken)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _move(fresh: Path, target: Path, taken: ConfigError) -> None:
    """Give a folder its name, or move what it holds up into the folder that it lies in.

    Raises:
        ConfigError: another process has filled the target meanwhile.
        MachineError: the target cannot be written.
    """
    try:
        if fresh.parent != target:
            fresh.replace(target)
            return
        if len(list(target.iterdir())) > 1:
            raise taken
        for path in list(fresh.iterdir()):
            path.rename(target / path.name)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise taken from error
        raise MachineError(f"{target}: cannot be written: {error.strerror or error}") from error


def read_json(path: Path, *needs: str, of: type = dict) -> Any | None:
    """Read a JSON file, or return None where there is none.

    Args:
        path: of the file.
        needs: keys without which it is not what was written there.
        of: what it holds, an object where nothing else is said.

    Raises:
        Damaged: what is there is not JSON, not of that type, or lacks a key.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise Damaged(f"{path}: is damaged, it must be JSON ({error}); put it back or remove it") from error
    if not isinstance(told, of):
        raise Damaged(f"{path}: is damaged, it must hold {_JSON.get(of, of.__name__)}; put it back or remove it")
    if lacking := [key for key in needs if key not in told]:
        raise Damaged(f"{path}: is damaged, it lacks {', '.join(lacking)}; put it back or remove it")
    return told


_JSON: dict[type, str] = {dict: "an object in braces", list: "a list in brackets"}


def finite(value: Any) -> Any:
    """Put None for NaN and the infinities, which JSON does not have, however deep."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_trial(folder: Path) -> dict[str, Any] | None:
    """Read the `trial.json` of a run's folder, scores that are null as NaN; None where there is none.

    Raises:
        Damaged: what is there is not JSON, or no record of a trial.
    """
    told = read_json(folder / "trial.json", "state", "config")
    for key in {"config", "scores"} & (told or {}).keys():
        _check_object(folder / "trial.json", told, key)
    return told | {"scores": _numbers(told["scores"])} if told and "scores" in told else told


def read_sweep(folder: Path, *needs: str) -> dict[str, Any] | None:
    """Read the `sweep.json` of a sweep's folder; None where there is none.

    Args:
        folder: of the sweep.
        needs: keys beside `options` and `objectives` that it must have.

    Raises:
        Damaged: what is there is not JSON, or no record of a sweep.
    """
    told = read_json(folder / "sweep.json", "options", "objectives", *needs)
    if told is not None:
        _check_object(folder / "sweep.json", told, "options")
    return told


def _check_object(path: Path, told: Any, key: str) -> None:
    if not isinstance(told[key], dict):
        raise Damaged(f"{path}: is damaged, {key} must be an object in braces; put it back or remove it")


def read_points(path: Path) -> list[dict[str, Any]]:
    """Read the points of a file of metrics, in order, null as NaN; a last line that a kill tore is left out.

    Raises:
        Damaged: another line is not JSON, or no numbers at a step.
    """
    if not path.exists():
        return []
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [_point(line, f"{path}:{number}") for number, line in enumerate(whole, 1)]


def _point(line: bytes, where: str) -> dict[str, Any]:
    try:
        told = json.loads(line)
    except ValueError as error:
        raise Damaged(f"{where}: is damaged, a line must be JSON ({error}); put it back or remove it") from error
    if not isinstance(told, dict):
        raise Damaged(f"{where}: is damaged, a line must be a JSON object, got {told!r:.40}; remove it")
    for name, value in told.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise Damaged(f"{where}: is damaged, {name} must be a number, got {value!r:.40}; remove it")
    if not isinstance(told.get("step"), int):
        raise Damaged(f"{where}: is damaged, a line must have a step; remove it")
    return _numbers(told)


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in values.items()}
