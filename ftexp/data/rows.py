"""Rows of text from a file, the hub or a generator, each with the place it came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ftexp import config
from ftexp.config import Data, Source
from ftexp.data import genres, hub, korean, latex, packages, preference, reader, shapes, yoda
from ftexp.data.shapes import Row
from ftexp.errors import DataError
from ftexp.progress import warn

__all__ = ["GENERATED", "Row", "read", "read_file"]

GENERATED = 2400
"""Rows that a generator makes when `data.rows` is null."""


def read(data: Data) -> list[Row]:
    """Read or generate every row of a source.

    Raises:
        DataError: the file or one of its lines cannot be used; the message starts with `file:line`.
    """
    if data.kind in config.FILES:
        return read_file(data.path, data, data.rows)
    if data.kind is Source.hub:
        return _rows(islice(hub.records(data), data.rows), data)
    return _rows(islice(_made(data), data.rows or GENERATED), data)


def read_file(path: str, data: Data, count: int | None = None, key: str = "data.path") -> list[Row]:
    """Read the rows of one file that a key of the config names, or the first `count` of them.

    Raises:
        DataError: the file or one of its lines cannot be used; the message starts with `file:line`.
    """
    if "://" in path and not Path(path).exists():
        raise DataError(f"{path}: {key} must be a file here, addresses are not read; download it, or use data=hub")
    return _rows(islice(reader.records(Path(path), data.kind, key), count), data)


def _rows(records: Iterator[reader.Record], data: Data) -> list[Row]:
    """Convert records, and tell what nothing reads of the first: names in `data.columns`, a prompt beside messages."""
    first = list(islice(records, 1))
    made = list(shapes.rows(chain(first, records), data))
    for record, where in first:
        for name in shapes.unread(record, where, data):
            warn(f"{where}: data.columns.{name}={data.columns[name]} changes nothing, no column {name} is read of rows "
                 "of this shape")  # fmt: skip
        if prompt := shapes.unread_prompt(record, where, data):
            warn(f"{where}: column prompt says what no message of the user does, and is not read where chosen and "
                 f"rejected are messages: {prompt!r:.60}")  # fmt: skip
    return made


def _made(data: Data) -> Iterator[tuple[dict[str, Any], str]]:
    """Number the records of a generator, or of a set inside a package."""
    made: Iterable[Mapping[str, Any]]
    match data.kind:
        case Source.yoda:
            made = _asked(yoda.pairs(data.seed))
        case Source.latex:
            made = _asked(latex.pairs(data.seed))
        case Source.korean:
            made = _asked(korean.pairs(data.seed))
        case Source.genres:
            made = genres.records(data.seed)
        case Source.preference:
            made = preference.records(data.seed)
        case Source.quotes:
            made = packages.quotes()
        case Source.chat:
            made = packages.chat("english")
        case Source.chat_ko:
            made = packages.chat("korean")
        case Source.interface_ko:
            made = packages.interface_ko()
        case _:
            raise AssertionError(data.kind)
    for number, record in enumerate(made):
        yield dict(record), f"{data.kind.value}:{number}"


def _asked(pairs: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    return ({"prompt": prompt, "completion": completion} for prompt, completion in pairs)
