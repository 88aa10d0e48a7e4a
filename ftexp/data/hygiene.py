"""Copies of rows: equal, equal after normalisation, nearly equal, or of one meaning; found within and across files.

Near copies: the likeness of two rows is the Jaccard index of their sets of five-letter pieces after normalisation, |A
and B| / |A or B| (Broder 1997, "On the resemblance and containment of documents"). Pairs to compare are found by
MinHash in bands (Leskovec et al., "Mining of Massive Datasets", section 3.4); each is then compared exactly, so a row
is never called a copy by chance. Pieces that nine of ten rows share, such as those of one long prompt around short
texts, are left out of the comparison: they tell no row from another. Two rows of likeness s meet in one of b bands of
r hashes with probability 1 - (1 - s^r)^b; `bands` picks r so that at the threshold fewer than 1 pair of 10 000 is
missed.

What is kept depends on the texts alone, never on their order: rows are visited in the order of their hashes, test
rows first and training rows last, and a row goes where one that was kept is alike. On rows of a sentence this
needs some 130 microseconds a row, datasketch 2.0 some 540 before anything is compared.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import regex

from ftexp.config import Data, Dedup
from ftexp.data import encoder
from ftexp.data.shapes import Row
from ftexp.progress import progress

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, Any]

PIECE = 5
"""Letters in a piece; words are too long for rows of a sentence."""
COMMON, FEW = 0.9, 20
"""Share of rows from which a piece counts as common to all, and rows below which none does."""
HASHES = 128
SAMPLE = 2000
"""Rows in which common pieces are looked for."""
CHUNK = 512
"""Rows hashed at once."""
BLOCK, COMPARED = 1024, 32_768
"""Rows whose embeddings are compared at once, and with how many of those kept: 128 MB of cosines."""
LAST = ("test", "valid", "train")
"""Of two copies in different splits the one in the split named first is kept, so that held-out rows stay as given."""


@dataclass(frozen=True)
class Copy:
    """A row that was left out."""

    row: Row
    of: Row
    """The row that was kept in its place."""
    kind: Dedup
    """How they are alike."""
    likeness: float
    """Jaccard index or cosine, 1 for equal rows."""


def normalise(text: str) -> str:
    """Fold case, width, punctuation and spacing, so that trivially edited copies compare equal.

    >>> normalise("The  Pilot, is ready!") == normalise("the pilot is ready"), normalise("काला") == normalise("कील")
    (True, False)
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    folded = regex.sub(r"(?:[^\w\p{M}\p{N}]|_)+", " ", text).strip()
    return folded or text.strip()  # a prompt of nothing but signs is its own key


def pieces(text: str) -> frozenset[str]:
    """Return the five-letter pieces of a normalised text; a shorter text is one piece.

    >>> sorted(pieces("a robot"))
    [' robo', 'a rob', 'robot']
    """
    return frozenset(text[n : n + PIECE] for n in range(max(1, len(text) - PIECE + 1)))


def common(texts: list[str]) -> frozenset[str]:
    """Return the pieces that nearly all texts share, as they do where one prompt stands around each.

    >>> sorted(common([f"say it: {n * n}" for n in range(100, 130)]))
    [' it: ', 'ay it', 'it: 1', 'say i', 'y it:']
    """
    if len(texts) < FEW:
        return frozenset()
    seen = texts[:: -(-len(texts) // SAMPLE)]
    counts = Counter(piece for text in seen for piece in pieces(text))
    return frozenset(piece for piece, count in counts.items() if count >= COMMON * len(seen))


def shared(rows: list[Row], copies: Sequence[Copy], data: Data) -> frozenset[str]:
    """Return the pieces that nearly all rows of all splits share.

    After `data.dedup=near` they are those by which copies were left out, so that a gate accepts what that kept; where
    splits have files of their own the sample of more than `SAMPLE` rows is another one.

    Args:
        rows: that are kept.
        copies: that are not.
        data: the config.
    """
    if data.dedup is Dedup.near:
        compared = [*rows, *(copy.row for copy in copies if copy.kind is Dedup.near)]
        rows = sorted(compared, key=lambda row: _order((0, row)))
    return common([normalised(row) for row in rows[:: max(1, -(-len(rows) // SAMPLE))]])


def likeness(one: str, other: str, common: frozenset[str] = frozenset()) -> float:
    """Return the Jaccard index of the pieces of two normalised texts, without those common to all.

    Of two texts that have no piece of their own all pieces count.

    >>> likeness("a robot", "a robot"), likeness("a robot", "robots"), likeness("a robot", "robots", pieces("a rob"))
    (1.0, 0.25, 0.3333333333333333)
    """
    a, b = _pieces(one) - common, _pieces(other) - common
    if not a and not b:
        a, b = _pieces(one), _pieces(other)
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


_pieces = lru_cache(maxsize=4096)(pieces)


def deduplicate(parts: dict[str, list[Row]], data: Data) -> tuple[dict[str, list[Row]], list[Copy]]:
    """Leave out the copies of rows, as far as `data.dedup` says.

    Args:
        parts: name of a split, or of the rows still to be split -> its rows.
        data: the config.

    Returns:
        The rows that are kept, in their order, and those that are not, each with the one kept in its place.
    """
    names = sorted(parts, key=lambda name: LAST.index(name) if name in LAST else len(LAST))
    rows = [(rank, row) for rank, name in enumerate(names) for row in parts[name]]
    copies: list[Copy] = []
    if data.dedup is not Dedup.none:
        rows = _unique(rows, copies, Dedup.exact)
    if data.dedup in (Dedup.normalised, Dedup.near, Dedup.semantic):
        rows = _unique(rows, copies, Dedup.normalised)
    if data.dedup is Dedup.near:
        rows = _unlike(rows, copies, data.dedup_threshold)
    if data.dedup is Dedup.semantic:
        rows = _unlike_in_meaning(rows, copies, data.dedup_threshold)
    kept: dict[str, list[Row]] = {name: [] for name in parts}
    for rank, row in rows:
        kept[names[rank]].append(row)
    return kept, copies


def _key(row: Row) -> tuple[object, ...]:
    return row.prompt, row.completion, row.turns, row.rejected


def normalised(row: Row) -> str:
    """Return all the text of a row, normalised."""
    parts = [row.prompt, row.completion, row.rejected] if row.rejected else [row.prompt, row.completion]
    return "\n".join(normalise(part) for part in parts if part)


def _order(ranked: tuple[int, Row]) -> tuple[int, str, str]:
    rank, row = ranked
    return rank, hashlib.sha256(repr(_key(row)).encode()).hexdigest(), row.where


def _unique(rows: list[tuple[int, Row]], copies: list[Copy], kind: Dedup) -> list[tuple[int, Row]]:
    """Keep one row of each text: of equal ones the first, of others the same one in any order of the rows."""
    exact = kind is Dedup.exact
    alike: dict[object, list[int]] = defaultdict(list)
    for n, (_, row) in enumerate(rows):
        alike[_key(row) if exact else normalised(row)].append(n)
    chosen = set()
    for members in alike.values():
        best = members[0] if exact or len(members) == 1 else min(members, key=lambda n: _order(rows[n]))
        chosen.add(best)
        copies += [Copy(rows[n][1], rows[best][1], kind, 1.0) for n in members if n != best]
    return [ranked for n, ranked in enumerate(rows) if n in chosen]


def _unlike(rows: list[tuple[int, Row]], copies: list[Copy], threshold: float) -> list[tuple[int, Row]]:
    """Keep rows of which no two are alike."""
    import numpy as np

    order = sorted(range(len(rows)), key=lambda n: _order(rows[n]))
    texts = [normalised(rows[n][1]) for n in order]  # from here on a row is its place in this order
    alike_anyway = common(texts)
    signatures = minhashes(texts, alike_anyway)
    # The share of equal hashes estimates the likeness; four deviations below the threshold none is worth comparing.
    surely_less = threshold - 4 * (threshold * (1 - threshold) / HASHES) ** 0.5
    seen: dict[int, list[int]] = defaultdict(list)
    gone: set[int] = set()
    with progress("near copies", len(rows)) as advance:
        for n, keys in enumerate(band_keys(signatures, threshold).tolist()):
            met = np.array(sorted({m for key in keys for m in seen.get(key, ())}), dtype=int)
            close = met[(signatures[met] == signatures[n]).mean(axis=1) >= surely_less] if len(met) else ()
            best = max(((likeness(texts[n], texts[m], alike_anyway), -m) for m in close), default=(0.0, 0))
            if best[0] >= threshold:
                copies.append(Copy(rows[order[n]][1], rows[order[-best[1]]][1], Dedup.near, best[0]))
                gone.add(order[n])
            else:
                for key in keys:
                    seen[key].append(n)
            advance()
    return [ranked for n, ranked in enumerate(rows) if n not in gone]


def _unlike_in_meaning(rows: list[tuple[int, Row]], copies: list[Copy], threshold: float) -> list[tuple[int, Row]]:
    """Keep rows of which no two have embeddings of a cosine of `threshold` or more; compares every row with all kept.

    Cosines are rounded to four decimals, so that the last bits of a machine's arithmetic rarely decide.
    """
    import numpy as np

    order = sorted(range(len(rows)), key=lambda n: _order(rows[n]))
    vectors = encoder.embed([rows[n][1].text() for n in order])
    chosen: list[int] = []
    with progress("copies in meaning", len(rows)) as advance:
        for begin in range(0, len(vectors), BLOCK):
            block = vectors[begin : begin + BLOCK]
            # Of the rows kept before the block the most alike; those kept within it are met one after the other.
            best, of = _nearest(block, vectors, chosen)
            among = np.round(block @ block.T, 4)
            for n in range(len(block)):
                if best[n] >= threshold:
                    original = rows[order[of[n]]][1]
                    copies.append(Copy(rows[order[begin + n]][1], original, Dedup.semantic, float(best[n])))
                    continue
                chosen.append(begin + n)
                closer = among[n] > best
                best[closer], of[closer] = among[n][closer], begin + n
            advance(len(block))
    left = {order[n] for n in chosen}
    return [ranked for n, ranked in enumerate(rows) if n in left]


def _nearest(block: Array, vectors: Array, chosen: list[int]) -> tuple[Array, Array]:
    """For each vector of a block its greatest cosine with the chosen ones, rounded, and which one that is first."""
    import numpy as np

    best, of = np.full(len(block), -2.0, dtype=np.float32), np.zeros(len(block), dtype=int)
    for begin in range(0, len(chosen), COMPARED):
        numbers = np.array(chosen[begin : begin + COMPARED])
        cosines = np.round(block @ vectors[numbers].T, 4)
        first = cosines.argmax(axis=1)
        highest = cosines[np.arange(len(block)), first]
        closer = highest > best
        best[closer], of[closer] = highest[closer], numbers[first[closer]]
    return best, of


@lru_cache
def bands(threshold: float) -> tuple[int, int]:
    """Return the number of bands and the hashes in each that miss fewer than 1 of 10 000 pairs at a likeness.

    >>> bands(0.8), bands(0.5)
    ((25, 5), (64, 2))
    """
    fits = [r for r in range(1, 17) if (1 - threshold**r) ** (HASHES // r) < 1e-4]
    r = max(fits, default=1)
    return HASHES // r, r


def band_keys(signatures: Array, threshold: float) -> Array:
    """Return a key for each band of each text, (text, band); texts that share a key are worth comparing."""
    import numpy as np

    count, hashes = bands(threshold)
    keys = np.broadcast_to(np.arange(count, dtype=np.uint64), (len(signatures), count)).copy()
    for n in range(hashes):
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + signatures[:, n : count * hashes : hashes]
        keys ^= keys >> np.uint64(29)
    return keys


def minhashes(texts: list[str], common: frozenset[str] = frozenset()) -> Array:
    """Return the least value of each hash function over the pieces of each text, (text, hash), without the common ones.

    The functions are `a * h + b` modulo 2^64 with fixed a and b, on a mixed hash h of a piece: the same on every
    machine.
    """
    import numpy as np

    draw = np.random.Generator(np.random.PCG64(0)).integers(0, 2**63, (2, HASHES), dtype=np.int64).astype(np.uint64)
    least = np.empty((len(texts), HASHES), dtype=np.uint32)
    out = np.sort(piece_codes(sorted(common))[0]) if common else None
    for start in range(0, len(texts), CHUNK):
        codes, begins = piece_codes(texts[start : start + CHUNK])
        if out is not None:
            codes, begins = _without(codes, begins, out)
        for n in range(HASHES):
            hashed = codes * (draw[0, n] * np.uint64(2) + np.uint64(1)) + draw[1, n]
            # the low bits of a product are poor
            least[start : start + CHUNK, n] = np.minimum.reduceat(hashed, begins) >> np.uint64(32)
    return least


def _without(codes: Array, begins: Array, out: Array) -> tuple[Array, Array]:
    """Leave codes out of the texts; a text that would have none left keeps all of its own."""
    import numpy as np

    text = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(codes))))
    kept = ~np.isin(codes, out)
    kept |= np.bincount(text, kept, len(begins))[text] == 0
    counts = np.bincount(text[kept], minlength=len(begins))
    return codes[kept], np.concatenate([[0], np.cumsum(counts)[:-1]])


def piece_codes(texts: list[str]) -> tuple[Array, Array]:
    """Return a 64-bit code of every piece of the texts, one text after the other, and where each text begins."""
    import numpy as np

    padded = [text.ljust(PIECE, "\0") for text in texts]
    letters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in padded])
    codes = np.zeros(len(letters) - PIECE + 1, dtype=np.uint64)
    for n in range(PIECE):
        codes = codes * np.uint64(0x9E3779B97F4A7C15) + letters[n : n + len(codes)]
    codes ^= codes >> np.uint64(30)  # the finaliser of splitmix64
    codes *= np.uint64(0xBF58476D1CE4E5B9)
    codes ^= codes >> np.uint64(27)
    ends = np.cumsum(lengths)
    within = np.ones(len(codes), dtype=bool)
    for n in range(1, PIECE):  # pieces that reach into the next text
        within[(ends[:-1] - n)] = False
    counts = lengths - PIECE + 1
    return codes[within], np.concatenate([[0], np.cumsum(counts)[:-1]])


def told(copies: list[Copy], read: int) -> str:
    """Say how many rows were left out and why, with the least alike pair of each kind as an example."""
    counts = Counter(copy.kind for copy in copies)
    parts = []
    for kind in Dedup:
        if counts[kind]:
            least = min((c for c in copies if c.kind is kind), key=lambda c: (c.likeness, c.row.where))
            example = f"{least.row.where} of {least.of.where}"
            alike = f", likeness {least.likeness:.2f}" if kind in (Dedup.near, Dedup.semantic) else ""
            parts.append(f"{counts[kind]} {kind.value} copies ({example}{alike})")
    return f"left out {len(copies)} of {read} rows: {', '.join(parts)}"
