"""Train, valid and test rows that share no prompt."""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from dataclasses import dataclass

from ftexp.config import Data
from ftexp.data.rows import Row
from ftexp.errors import DataError


@dataclass(frozen=True)
class Splits:
    """The rows of a run, in the order the file or generator gave them."""

    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    test: tuple[Row, ...]
    """Sealed: nothing in a sweep reads these."""
    read: int
    """Rows read; read = train + valid + test + duplicates."""
    duplicates: int
    """Rows left out because prompt and completion stood in an earlier row."""

    def digest(self) -> str:
        """Hash the content of all three splits: equal text in equal splits, equal digest, on any machine."""
        parts = [[(r.prompt, r.completion) for r in part] for part in (self.train, self.valid, self.test)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def normalise(text: str) -> str:
    """Fold case, width, punctuation and spacing, so that trivially edited copies compare equal.

    >>> normalise("The  Pilot, is ready!") == normalise("the pilot is ready")
    True
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    folded = re.sub(r"[\W_]+", " ", text).strip()
    return folded or text.strip()  # a prompt of nothing but signs is its own key


def split(rows: list[Row], data: Data, source: str) -> Splits:
    """Hold out `data.valid` and `data.test` rows, drawn with `data.seed`.

    Rows whose prompts are equal after `normalise` stay together, so no held-out prompt is trained on. Exact repeats
    of a row are left out and counted.

    Raises:
        DataError: too few rows are left to train on, or the repeats make the counts unreachable.
    """
    groups: dict[str, list[Row]] = {}
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if (row.prompt, row.completion) not in seen:
            seen.add((row.prompt, row.completion))
            groups.setdefault(normalise(row.prompt), []).append(row)
    order = sorted(groups)
    random.Random(data.seed).shuffle(order)
    picked: dict[str, str] = {}
    for name, wanted in (("valid", data.valid), ("test", data.test)):
        _pick(picked, groups, order, name, wanted)
    parts: dict[str, list[Row]] = {"train": [], "valid": [], "test": []}
    for key, members in groups.items():
        parts[picked.get(key, "train")] += members
    for name, wanted in (("valid", data.valid), ("test", data.test)):
        if len(parts[name]) != wanted:
            raise DataError(f"{source}: data.{name}={wanted} rows cannot be held out of {len(seen)} different rows")
    if not parts["train"]:
        raise DataError(
            f"{source}: no row is left to train on: {len(rows)} read, {len(rows) - len(seen)} repeats, "
            f"data.valid={data.valid}, data.test={data.test}"
        )
    return Splits(
        *(tuple(parts[n]) for n in ("train", "valid", "test")), read=len(rows), duplicates=len(rows) - len(seen)
    )


def _pick(picked: dict[str, str], groups: dict[str, list[Row]], order: list[str], name: str, wanted: int) -> None:
    """Give groups to a split until it has `wanted` rows, passing over a group too large for what is missing."""
    for key in order:
        if key not in picked and len(groups[key]) <= wanted:
            picked[key] = name
            wanted -= len(groups[key])
        if not wanted:
            return
