"""Text of no task in particular: what a model should still predict as well after fine-tuning.

No text of others is kept in this project. The set that is always there is the prose of Python's reference manual, which
comes with every Python as `pydoc_data.topics` (PSF licence); it differs a little from version to version of Python, so
losses on it compare runs of one Python. Any file of one's own does as well.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ftexp.data.prompts import Example
from ftexp.data.rows import Row
from ftexp.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANUAL = "python-docs"
PASSAGES = 32
"""Passages taken from the manual, spread over all of it: some 2,500 tokens, a few seconds of a small model on a CPU."""


def passages(source: str) -> list[Row]:
    """Read the passages of a file, or of Python's manual for `python-docs`.

    Raises:
        DataError: the file is not there, is not UTF-8, or has no passage.
    """
    return _manual() if source == MANUAL else _file(Path(source))


def _manual() -> list[Row]:
    from pydoc_data.topics import topics

    whole = [
        " ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n") if part[:1] != " "
    ]
    prose = list(dict.fromkeys(p for p in whole if 200 <= len(p) <= 400 and re.match(r"[A-Z].*\.$", p)))
    picked = [prose[n * len(prose) // PASSAGES] for n in range(PASSAGES)]
    return [Row("", text, f"{MANUAL}:{n}") for n, text in enumerate(picked)]


def _file(path: Path) -> list[Row]:
    if not path.is_file():
        raise DataError(f"{path}: eval.forgetting must be {MANUAL} or a text file, and there is none of that name")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: eval.forgetting must be UTF-8, byte {error.start} is not") from error
    found = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if not found:
        raise DataError(f"{path}: eval.forgetting must have text, got none")
    return [Row("", part, f"{path}, passage {n}") for n, part in enumerate(found, start=1)]


def digest(rows: list[Row]) -> str:
    """Hash the text, to be stored with the run."""
    return hashlib.sha256("\0".join(row.completion for row in rows).encode()).hexdigest()


def render(rows: list[Row], tokenizer: PreTrainedTokenizerBase, limit: int | None) -> list[Example]:
    """Tokenise passages as plain text: all tokens but the first are supervised, and no end-of-sequence is added.

    The first token stands for the prompt: the tokenizer's BOS where it sets one, else a word that nothing predicts.

    Raises:
        DataError: a passage has fewer than two tokens or more than `limit`.
    """
    made = []
    for row in rows:
        ids = list(cast(list[int], tokenizer(row.completion, verbose=False)["input_ids"]))
        if len(ids) < 2 or (limit is not None and len(ids) > limit):
            rule = f"2 to {limit} tokens" if limit is not None else "at least 2 tokens"
            raise DataError(f"{row.where}: a passage of eval.forgetting must have {rule}, this one has {len(ids)}")
        made.append(Example(row, tuple(ids[:1]), tuple(ids[1:])))
    return made
