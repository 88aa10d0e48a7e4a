"""Checks that the rows of a run must pass, each switched off by its name in `data.allow`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from ftexp.config import Data, Dedup, Gate
from ftexp.data import hygiene
from ftexp.data.hygiene import normalise
from ftexp.data.shapes import Row
from ftexp.data.splits import Splits, openings
from ftexp.errors import DataError
from ftexp.progress import say

if TYPE_CHECKING:
    from ftexp.data.prompts import Example

LOST = 0.05
"""Largest share of rows that may be lost to their length, or not show the model where to stop."""
CHUNK = 4096
TURNS = "begins, up to an answer, with the turns of"
Leak = tuple[Row, Row, str]
"""A held-out row, the row that gives it away, and how."""


def leaks(splits: Splits, data: Data) -> None:
    """Refuse held-out rows whose prompt, group or opening stands in another split; needs no import.

    Raises:
        DataError: names the first such row, its twin, and how many there are.
    """
    _refuse(splits, data, equal)


def near_leaks(splits: Splits, data: Data) -> None:
    """Refuse held-out rows whose text is nearly that of a row in another split.

    What nearly all rows share tells nothing, be it the rows of all splits, as few are held out, or of the two compared.

    Raises:
        DataError: names the first such row, its twin, and how many there are.
    """
    if Gate.leaks in data.allow:
        return
    whole = hygiene.shared([*splits.train, *splits.valid, *splits.test], splits.copies, data)

    def search(held: tuple[Row, ...], rows: tuple[Row, ...]) -> Iterator[Leak]:
        common = whole if data.dedup is Dedup.near else whole | shared(held, rows)
        return alike(held, rows, data.dedup_threshold, common)

    _refuse(splits, data, search)


def _refuse(splits: Splits, data: Data, search: Callable[[tuple[Row, ...], tuple[Row, ...]], Iterator[Leak]]) -> None:
    if Gate.leaks in data.allow:
        return
    for name, held, other, rows in (
        ("valid", splits.valid, "training", splits.train),
        ("test", splits.test, "training", splits.train),
        ("test", splits.test, "valid", splits.valid),
    ):
        found: dict[int, Leak] = {}
        for leak in search(held, rows):
            found.setdefault(id(leak[0]), leak)
        if found:
            row, twin, how = next(iter(found.values()))
            remedy = "put whole conversations in one split" if how == TURNS else "remove copies with data.dedup=near"
            raise DataError(
                f"{row.where}: {len(found)} of {len(held)} {name} rows leak into the {other} rows, this one {how} "
                f"{twin.where}; {remedy}, or accept them with data.allow=[leaks]"
            )


def equal(held: tuple[Row, ...], rows: tuple[Row, ...]) -> Iterator[Leak]:
    """Yield held-out rows that have the prompt, the group or an opening of another row."""
    prompts = {normalise(row.prompt or row.completion): row for row in held}
    groups = {row.group: row for row in held if row.group}
    for row in rows:
        if (found := prompts.get(normalise(row.prompt or row.completion))) is not None:
            yield found, row, "has the prompt of"
        if (found := groups.get(row.group)) is not None:
            yield found, row, f"has the group {row.group!r} of"
    if not any(row.turns for part in (held, rows) for row in part):
        return  # an opening is a prompt and its answer then
    begun: dict[bytes, list[Row]] = {}
    for row in held:
        for part in openings(row):
            begun.setdefault(part, []).append(row)
    for row in rows:
        for part in openings(row):
            for found in begun.pop(part, ()):
                yield found, row, TURNS


def shared(held: tuple[Row, ...], rows: tuple[Row, ...]) -> frozenset[str]:
    """Return the pieces that nearly all of the rows of two splits share."""
    sample = rows[:: max(1, -(-len(rows) // hygiene.SAMPLE))]
    return hygiene.common([hygiene.normalised(row) for row in (*held, *sample)])


def alike(
    held: tuple[Row, ...], rows: tuple[Row, ...], threshold: float, common: frozenset[str] = frozenset()
) -> Iterator[Leak]:
    """Yield held-out rows whose text is nearly that of another row, without the pieces that are common to all."""
    import numpy as np

    if not held or not rows:
        return
    texts = [hygiene.normalised(row) for row in held]
    keys = hygiene.band_keys(hygiene.minhashes(texts, common), threshold)
    known = np.unique(keys)
    for start in range(0, len(rows), CHUNK):
        others = [hygiene.normalised(row) for row in rows[start : start + CHUNK]]
        theirs = hygiene.band_keys(hygiene.minhashes(others, common), threshold)
        for n in np.flatnonzero(np.isin(theirs, known).any(axis=1)):
            for m in np.flatnonzero((keys == theirs[n]).any(axis=1)):
                if (likeness := hygiene.likeness(texts[m], others[n], common)) >= threshold:
                    yield held[m], rows[start + n], f"is a near copy (likeness {likeness:.2f}) of"


def tokens(rows: tuple[Row, ...], made: list[Example | None], ends: int, data: Data) -> list[Example]:
    """Return the rendered rows that teach something; as `usable`, from the rows themselves.

    Args:
        rows: before they were rendered.
        made: one for each row, None where it was dropped for its length.
        ends: id of the end-of-sequence token.
        data: the config.

    Raises:
        DataError: as of `usable`.
    """
    found = usable(
        rows,
        [e is None for e in made],
        [0 if e is None else e.supervised for e in made],
        [e is not None and e.completion[-1:] == (ends,) for e in made],
        data,
    )
    return [cast("Example", made[n]) for n in found]


def usable(
    rows: tuple[Row, ...], lost: Sequence[bool], supervised: Sequence[int], ended: Sequence[bool], data: Data
) -> list[int]:
    """Refuse rendered rows of which too many were lost, teach nothing, or do not show where to stop.

    Args:
        rows: before they were rendered.
        lost: whether a row was dropped for its length.
        supervised: supervised tokens of a row.
        ended: whether a row ends with the end-of-sequence token.
        data: the config.

    Returns:
        The numbers of the rows that teach something.

    Raises:
        DataError: names the first such row and how many there are.
    """
    kept = [n for n, gone in enumerate(lost) if not gone]
    if not rows:
        return kept
    gone = [rows[n] for n in range(len(rows)) if lost[n]]
    if gone:
        told = f"{len(gone)} of {len(rows)} rows have more than data.max_length={data.max_length} tokens"
        say(f"left out: {told}, the first is {gone[0].where}", always=True)
        if len(gone) > LOST * len(rows) and Gate.lost not in data.allow:
            raise DataError(f"{gone[0].where}: {told}; more than {LOST:.0%} may be lost with data.allow=[lost]")
    mute = [n for n in kept if not supervised[n]]
    if mute:
        told = f"{len(mute)} of {len(rows)} rows have no supervised token within data.max_length={data.max_length}"
        if Gate.unsupervised not in data.allow:
            raise DataError(f"{rows[mute[0]].where}: {told}; leave them out with data.allow=[unsupervised]")
        say(f"left out: {told}, the first is {rows[mute[0]].where}", always=True)
        kept = [n for n in kept if supervised[n]]
    endless = [n for n in kept if not ended[n]]
    if len(endless) > LOST * len(rows) and Gate.no_eos not in data.allow:
        raise DataError(
            f"{rows[endless[0]].where}: {len(endless)} of {len(rows)} rows lost their end-of-sequence token to "
            f"data.long=cut, so the model would not learn to stop; accept it with data.allow=[no_eos]"
        )
    if not kept:
        raise DataError(f"{rows[0].where}: no row is left of {len(rows)}")
    return kept
