"""Rows -> splits -> tokens. `load` needs no tokenizer and no heavy import, so bad rows are refused at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ftexp import config
from ftexp.config import Data, Source
from ftexp.data import gates, hub, hygiene
from ftexp.data.objects import of
from ftexp.data.rows import Row, read, read_file
from ftexp.data.splits import Splits, split, units
from ftexp.errors import DataError
from ftexp.files import sha256
from ftexp.progress import say, warn

__all__ = ["Row", "Splits", "load", "of", "units"]

KEPT = 4
"""Results of `load` kept in memory; trials of a sweep ask for the same few again and again."""

MUCH = 0.5
"""Share of held-out rows above which a person is told: `data.valid` is a number of rows that fits larger sets."""

_loaded: dict[str, Splits] = {}


def load(data: Data) -> Splits:
    """Read the rows of a run, leave out copies, split them and check that nothing leaks.

    The last few results are kept in memory by the content of config and files, so a file that changed is read anew.

    Raises:
        DataError: a row cannot be used, too few are left, or held-out rows leak; the message starts with `file:line`
            or the source.
    """
    key = config.digest(data) + "".join(sha256(Path(path)) for path in _paths(data) if Path(path).is_file())
    if key not in _loaded:
        made = _load(data)
        while len(_loaded) >= KEPT:
            del _loaded[next(iter(_loaded))]
        _loaded[key] = made
    return _loaded[key]


def _paths(data: Data) -> list[str]:
    if data.kind is Source.hub and (folder := hub.folder(data)) is not None:
        return sorted(str(path) for path in folder.rglob("*"))
    return [path for path in (data.path, data.valid_path, data.test_path) if path]


def _load(data: Data) -> Splits:
    if data.kind is Source.hub:
        commit = hub.commit(data)
        made = _split(replace(data, revision=commit or None))
        return replace(made, commit=commit)
    return _split(data)


def _split(data: Data) -> Splits:
    source = data.path or data.kind.value
    rows = read(data)
    if not rows:
        raise DataError(f"{source}: must have rows, got none")
    paths = {"valid": data.valid_path, "test": data.test_path}
    splits = split(
        rows,
        data,
        source,
        {name: read_file(path, data, key=f"data.{name}_path") for name, path in paths.items() if path},
    )
    if splits.copies:
        say(f"{source}: {hygiene.told(list(splits.copies), splits.read)}")
    gates.leaks(splits, data)
    held, whole = len(splits.valid) + len(splits.test), splits.read - len(splits.copies)
    if held > MUCH * whole and not any(paths.values()):
        warn(f"{source}: of {whole} rows {held} are held out, {len(splits.train)} are left to train on; "
             f"data.valid=0.2 holds out a fifth, got data.valid={data.valid}")  # fmt: skip
    return splits
