"""Rows of text from a file or a generator, each with the place it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ftexp import config
from ftexp.config import Data
from ftexp.data import yoda
from ftexp.errors import DataError

LONGEST_LINE = 16 * 2**20
GENERATED = 2400
"""Rows that a generator makes when `data.rows` is null."""


@dataclass(frozen=True)
class Row:
    """One example, before any tokenizer has seen it."""

    prompt: str
    """What the model is given."""
    completion: str
    """What it should answer."""
    where: str
    """`file:line`, or the generator and number."""


def read(data: Data) -> list[Row]:
    """Read or generate every row of a source.

    Raises:
        DataError: the file or one of its lines cannot be used; the message starts with `file:line`.
    """
    match data.kind:
        case config.Source.yoda:
            made = enumerate(islice(yoda.pairs(data.seed), data.rows or GENERATED))
            return [_row({"prompt": a, "completion": b}, f"yoda:{n}", data) for n, (a, b) in made]
        case config.Source.jsonl:
            return list(islice(_jsonl(Path(data.path), data), data.rows))


def _jsonl(path: Path, data: Data):
    if not path.is_file():
        raise DataError(f"{path}: data.path must be a file, and there is none of that name")
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > LONGEST_LINE:
                raise DataError(f"{where}: a line must be at most {LONGEST_LINE >> 20} MiB, this one is longer")
            text = _decode(line, where, first=number == 1)
            if text.strip():
                yield _row(_object(text, where), where, data)


def _decode(line: bytes, where: str, first: bool) -> str:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: must be UTF-8, byte {error.start} of the line is 0x{line[error.start]:02x}"
        ) from error
    if "\0" in text:
        raise DataError(f"{where}: must be text, column {text.index(chr(0)) + 1} is a NUL character")
    return text


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: must be one JSON object, {error.msg} at column {error.colno}") from error
    except ValueError as error:
        raise DataError(f"{where}: must be one JSON object: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where}: must be a flat JSON object, this one is nested too deep") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be one JSON object, got {type(row).__name__}")
    return row


def _row(row: dict[str, Any], where: str, data: Data) -> Row:
    values = {}
    for name in (*config.columns(data.prompt), *config.columns(data.completion)):
        if name not in row:
            have = ", ".join(row) or "none"
            raise DataError(
                f"{where}: column {name!r} is missing, the row has {have}; set data.prompt and data.completion"
            )
        if not isinstance(row[name], str):
            raise DataError(f"{where}: column {name!r} must be text, got {row[name]!r:.60}")
        if any("\ud800" <= c <= "\udfff" for c in row[name]):
            raise DataError(f"{where}: column {name!r} must be text, it holds half of a surrogate pair")
        values[name] = row[name]
    made = Row(data.prompt.format(**values), data.completion.format(**values), where)
    for part in ("prompt", "completion"):
        if not getattr(made, part).strip():
            raise DataError(f"{where}: the {part} must have text, got {getattr(made, part)!r}")
    return made
