"""Rows of text from a file or a generator, each with the place it came from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ftexp import config
from ftexp.config import Data
from ftexp.data import reader, shapes, yoda
from ftexp.data.shapes import Row

__all__ = ["GENERATED", "Row", "read", "read_file"]

GENERATED = 2400
"""Rows that a generator makes when `data.rows` is null."""


def read(data: Data) -> list[Row]:
    """Read or generate every row of a source.

    Raises:
        DataError: the file or one of its lines cannot be used; the message starts with `file:line`.
    """
    if data.kind in config.FILES:
        return read_file(data.path, data)
    return list(shapes.rows(islice(_made(data), data.rows or GENERATED), data))


def read_file(path: str, data: Data) -> list[Row]:
    """Read the rows of one file, the first `data.rows` of them where that is set.

    Raises:
        DataError: the file or one of its lines cannot be used; the message starts with `file:line`.
    """
    return list(shapes.rows(islice(reader.records(Path(path), data.kind), data.rows), data))


def _made(data: Data) -> Iterator[tuple[dict[str, Any], str]]:
    """Number the records of a generator."""
    match data.kind:
        case config.Source.yoda:
            made = ({"prompt": a, "completion": b} for a, b in yoda.pairs(data.seed))
        case _:
            raise AssertionError(data.kind)
    for number, record in enumerate(made):
        yield record, f"{data.kind.value}:{number}"
