"""Rows -> splits -> tokens. `load` needs no tokenizer and no heavy import, so bad rows are refused at once."""

from __future__ import annotations

from ftexp.config import Data
from ftexp.data.rows import Row, read
from ftexp.data.splits import Splits, split
from ftexp.errors import DataError

__all__ = ["Row", "Splits", "load"]


def load(data: Data) -> Splits:
    """Read the rows of a run and split them. Nothing is cached: a file that changed is read anew.

    Raises:
        DataError: a row cannot be used, or too few are left; the message starts with `file:line` or the source.
    """
    source = data.path or data.kind.value
    rows = read(data)
    if not rows:
        raise DataError(f"{source}: must have rows, got none")
    return split(rows, data, source)
