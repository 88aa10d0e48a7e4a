"""Rows that a program holds: a pandas table, a table of the datasets library, or a list of dicts.

They are written once as JSON lines, to a file named after its content, and from there on are a file like any other:
checked by line, hashed, frozen with a sweep. Running again needs that file, never a pickle and never the program.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ftexp.data import hub
from ftexp.errors import DataError
from ftexp.files import cache


def of(rows: Any) -> list[str]:
    """Keep rows in the cache and return the overrides that read them.

    Args:
        rows: a `pandas.DataFrame` (its index is not a column), a `datasets.Dataset`, or dicts.

    Raises:
        DataError: names the row and column that are no text, number, list or mapping.
    """
    return ["data=jsonl", f"data.path='{_escaped(str(write(rows)))}'"]


def write(rows: Any) -> Path:
    """Write rows as JSON lines to `rows/<sha256>.jsonl` in the cache; equal rows give the same file.

    Raises:
        DataError: names the row and column that are no text, number, list or mapping.
    """
    into = cache() / "rows"
    into.mkdir(parents=True, exist_ok=True)
    handle, fresh = tempfile.mkstemp(dir=into)
    try:
        digest, count = hashlib.sha256(), 0
        with os.fdopen(handle, "wb") as out:
            for record in _records(rows):
                count += 1
                line = json.dumps(_plain(record, f"row {count}"), ensure_ascii=False).encode() + b"\n"
                digest.update(line)
                out.write(line)
        if not count:
            raise DataError("rows: must have rows, got none")
        path = into / f"{digest.hexdigest()}.jsonl"
        Path(fresh).replace(path)
        return path
    except UnicodeEncodeError as error:
        raise DataError(f"row {count}: must be text, it holds half of a surrogate pair") from error
    finally:
        Path(fresh).unlink(missing_ok=True)


def _records(rows: Any) -> Iterator[dict[str, Any]]:
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")  # what was not imported was not given
    if pandas is not None and isinstance(rows, pandas.DataFrame):
        if not rows.columns.is_unique:
            raise DataError(f"rows: column names must differ, got {', '.join(map(str, rows.columns))}")
        names = list(rows.columns)
        yield from (dict(zip(names, values, strict=True)) for values in rows.itertuples(index=False, name=None))
    elif datasets is not None and isinstance(rows, datasets.Dataset):
        yield from (record for record, _ in hub.numbered(rows, "rows"))
    elif isinstance(rows, Iterable) and not isinstance(rows, str | bytes | dict) and not hasattr(rows, "column_names"):
        for number, record in enumerate(rows, 1):
            if not isinstance(record, dict):
                raise DataError(f"row {number}: must be a dict of columns, got {type(record).__name__}")
            yield record
    else:
        raise DataError(f"rows: must be a DataFrame, a datasets.Dataset or a list of dicts, got {type(rows).__name__}")


def _plain(value: Any, where: str) -> Any:
    """Return what JSON can say of a value, exactly: a missing one of pandas is null, a number of numpy a number."""
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise DataError(f"{where}: column names must be text, got {name!r:.60}")
        return {name: _plain(each, f"{where}, column {name!r}") for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, where) for each in value]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return _plain(value.tolist(), where)
    if value is None or type(value).__name__ in ("NAType", "NaTType") or value is math.nan:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return None
        raise DataError(f"{where}: must be a finite number, got {value}")
    if isinstance(value, str | bool | int | float):
        return value
    raise DataError(f"{where}: must be text, a number, a list or a mapping, got {type(value).__name__}")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")
