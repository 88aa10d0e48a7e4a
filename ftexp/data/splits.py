"""Train, valid and test rows: drawn or in the order of the file, in groups that stay together, or as given."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from ftexp.config import Data, Gate
from ftexp.data.hygiene import Copy, deduplicate, normalise
from ftexp.data.shapes import Row
from ftexp.errors import DataError
from ftexp.progress import say


@dataclass(frozen=True)
class Splits:
    """The rows of a run, in the order the file or generator gave them."""

    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    test: tuple[Row, ...]
    """Sealed: nothing in a sweep reads these."""
    read: int
    """Rows read; read = train + valid + test + copies."""
    copies: tuple[Copy, ...] = ()
    """Rows left out because another says the same."""
    commit: str = ""
    """Of the data set on the hub that the rows are from."""

    @property
    def duplicates(self) -> int:
        """Count the rows that were left out as copies."""
        return len(self.copies)

    def dropped(self) -> dict[str, int]:
        """Count the rows that were left out, by reason."""
        return dict(Counter(copy.kind.value for copy in self.copies))

    def digest(self) -> str:
        """Hash the content of all three splits: equal text in equal splits, equal digest, on any machine."""
        return self._digests[0]

    def digests(self) -> dict[str, str]:
        """Hash the content of the training and of the held-out rows, each for itself and in its order."""
        return dict(zip(("train", "valid"), self._digests[1:3], strict=True))

    def sealed_digest(self) -> str:
        """Hash the content of the test rows alone, in any order: an opening of them is known by it."""
        contents = sorted(json.dumps(_content(row)) for row in self.test)
        return hashlib.sha256("\n".join(contents).encode()).hexdigest()

    def sealed_hashes(self) -> list[str]:
        """Hash the content of each test row, sorted: another opening may hold some of them."""
        return sorted(hashlib.sha256(json.dumps(_content(row)).encode()).hexdigest()[:16] for row in self.test)

    @cached_property
    def _digests(self) -> tuple[str, ...]:
        """Of all three splits, and of each: the bytes of one JSON list of lists, and of its lists, piece by piece."""
        whole, parts = hashlib.sha256(), []
        for n, part in enumerate((self.train, self.valid, self.test)):
            whole.update(b", " if n else b"[")
            own = hashlib.sha256()
            for piece in _pieces(part):
                whole.update(piece)
                own.update(piece)
            parts.append(own.hexdigest())
        whole.update(b"]")
        return whole.hexdigest(), *parts


def _pieces(part: tuple[Row, ...]) -> Iterator[bytes]:
    yield b"["
    for n, row in enumerate(part):
        yield (", " if n else "").encode() + json.dumps(_content(row)).encode()
    yield b"]"


def _content(row: Row) -> list[object]:
    more = [*([row.turns] if row.turns else []), *([row.rejected] if row.rejected else [])]
    return [row.prompt, row.completion, *more]


def split(rows: list[Row], data: Data, source: str, given: dict[str, list[Row]] | None = None) -> Splits:
    """Leave out copies, and hold out `data.valid` and `data.test` rows, drawn with `data.seed` or the last ones.

    Rows that are drawn stay together where their prompts are equal after `normalise`, where they begin with the same
    turns up to an answer, and where `data.group_by` is equal, so no held-out prompt, answer of a conversation or group
    is trained on; `data.allow=[leaks]` lets all but groups be parted. Where rows stay together the counts are the most
    that is held out.

    Args:
        rows: of the source.
        data: the config.
        source: for messages.
        given: rows of splits that have their own files; those splits are not drawn.

    Raises:
        DataError: too few rows are left to train on, or the groups make the counts unreachable.
    """
    given = given or {}
    kept, copies = deduplicate({"train": rows, **given}, data)
    amounts = {name: getattr(data, name) for name in ("valid", "test") if name not in given}
    wanted = {name: counted(amount, len(kept["train"])) for name, amount in amounts.items()}
    parts = kept | (_drawn if data.shuffle else _last)(kept["train"], wanted, data)
    for name in wanted:
        if len(parts[name]) != wanted[name] or (name == "valid" and not parts[name]):
            together = _together(kept["train"], data)
            if not parts[name] or not together:
                told = f"cannot be held out of {_different(kept['train'])}{together}"
                raise DataError(f"{source}: data.{name}={amounts[name]} rows {told}")
            say(f"{name}: {len(parts[name])} rows of data.{name}={amounts[name]} are held out{together}")
    if not parts["train"]:
        raise DataError(
            f"{source}: no row is left to train on: {len(rows)} read, {len(copies)} copies, data.valid={data.valid}, "
            f"data.test={data.test}"
        )
    for name in given:
        if not parts[name]:
            raise DataError(f"{source}: no {name} row is left, all are copies of test rows")
    read = len(rows) + sum(map(len, given.values()))
    return Splits(*(tuple(parts[name]) for name in ("train", "valid", "test")), read=read, copies=tuple(copies))


def _different(rows: list[Row]) -> str:
    different = len({tuple(_content(row)) for row in rows})
    if different < len(rows):
        return f"{len(rows)} rows, {different} different"
    return f"{different} different row{'s' * (different != 1)}"


def _together(rows: list[Row], data: Data) -> str:
    """Tell what keeps rows together when they are drawn; nothing where each stands alone."""
    if not data.shuffle:
        return ""
    groups = grouped(rows, by_prompt=Gate.leaks not in data.allow)
    if data.group_by:
        return f": rows of equal {data.group_by} stay together, in {len(groups)} group{'s' * (len(groups) != 1)}"
    smallest = min(map(len, groups.values()), default=1)
    if smallest == 1:
        return ""
    equal = min(map(len, grouped(rows, by_prompt=False).values()))
    if equal > 1:
        return f": equal rows stay together, at least {equal} of them; data.dedup=exact leaves copies out"
    what = "one prompt or conversation" if any(row.turns for row in rows) else "one prompt"
    return f": rows of {what} stay together, at least {smallest} of them; data.allow=[leaks] parts them"


def counted(amount: int | float, rows: int) -> int:
    """Return how many rows a count or a share of all rows is, rounded down.

    >>> counted(48, 1000), counted(0.2, 12344), counted(0.29, 100)
    (48, 2468, 29)
    """
    return int(amount if amount >= 1 else Fraction(repr(amount)) * rows)


def _last(rows: list[Row], wanted: dict[str, int], _: Data) -> dict[str, list[Row]]:
    """Take the rows at the end, test behind valid; a split that cannot be filled stays empty."""
    parts, end = {}, len(rows)
    for name in sorted(wanted):  # test, valid
        begin = end - wanted[name]
        parts[name] = rows[begin:end] if begin >= 0 else []
        end = max(begin, 0)
    return parts | {"train": rows[:end]}


def _drawn(rows: list[Row], wanted: dict[str, int], data: Data) -> dict[str, list[Row]]:
    groups = grouped(rows, by_prompt=Gate.leaks not in data.allow)
    order = sorted(groups)
    random.Random(data.seed).shuffle(order)
    picked: dict[str, str] = {}
    for name, count in wanted.items():
        if data.stratify_by is None:
            _pick(picked, groups, order, name, count)
        else:
            _pick_alike(picked, groups, order, name, count)
    chosen = {id(row): picked.get(key, "train") for key, members in groups.items() for row in members}
    return {name: [row for row in rows if chosen[id(row)] == name] for name in ("train", *wanted)}


def grouped(rows: Iterable[Row], by_prompt: bool = True) -> dict[str, list[Row]]:
    """Put rows together that may not be parted: equal prompts after `normalise`, openings and `group`, in any chain.

    Rows without a prompt are compared by their whole text, and so are all rows where prompts may be parted.
    """
    rows = list(rows)
    conversations = by_prompt and any(row.turns for row in rows)
    first: dict[bytes, str] = {}  # opening -> the key of the first row that has it
    found: dict[str, str] = {}  # key -> a key of the same group, up to the group's name, which names itself

    def name(key: str) -> str:
        while found.setdefault(key, key) != key:
            found[key] = found[found[key]]
            key = found[key]
        return key

    def join(key: str, other: str) -> None:
        one, other = sorted((name(key), name(other)))
        found[other] = one

    keys = []
    for row in rows:
        key = normalise(row.prompt or row.completion) if by_prompt else row.text()
        if row.group:
            join(key, f"group\0{row.group}")
        for part in openings(row) if conversations else ():
            join(key, first.setdefault(part, key))
        keys.append((key, row))
    groups: dict[str, list[Row]] = {}
    for key, row in keys:
        groups.setdefault(name(key), []).append(row)
    return groups


def openings(row: Row) -> list[bytes]:
    """Hash a row up to each of its answers, normalised: all of them are learned, so what begins alike gives them away.

    A row without turns is a question and its answer; a text is no conversation.
    """
    whole, hashes = hashlib.blake2b(digest_size=16), []
    for role, text in row.turns or ((("user", row.prompt), ("assistant", row.completion)) if row.prompt else ()):
        whole.update(f"{role}\0{normalise(text)}\0".encode())
        if role == "assistant":
            hashes.append(whole.digest())
    return hashes


def units(rows: Iterable[Row]) -> list[int]:
    """Number each row's unit for statistics, from 0: rows of one prompt or of one `group` are one.

    They are hard or easy together, so that many of them tell less than as many others.
    """
    rows = list(rows)
    numbers = {id(row): n for n, members in enumerate(grouped(rows).values()) for row in members}
    return [numbers[id(row)] for row in rows]


def _pick(picked: dict[str, str], groups: dict[str, list[Row]], order: list[str], name: str, wanted: int) -> None:
    """Give groups to a split until it has `wanted` rows, passing over a group too large for what is missing."""
    for key in order:
        if key not in picked and len(groups[key]) <= wanted:
            picked[key] = name
            wanted -= len(groups[key])
        if not wanted:
            return


def _pick_alike(picked: dict[str, str], groups: dict[str, list[Row]], order: list[str], name: str, wanted: int) -> None:
    """Give groups to a split so that it has each stratum in proportion; a group counts as the stratum of its first.

    Every stratum gets its share rounded down; rows that are still missing come from those with the largest
    remainders (Hamilton's method).
    """
    strata: dict[str, list[str]] = {}
    for key in order:
        strata.setdefault(min(row.stratum for row in groups[key]), []).append(key)
    sizes = {stratum: sum(len(groups[key]) for key in keys) for stratum, keys in strata.items()}
    total = sum(sizes.values())
    shares = {stratum: divmod(wanted * size, total) for stratum, size in sizes.items()}
    quota = {stratum: whole for stratum, (whole, _) in shares.items()}
    largest = sorted(shares, key=lambda stratum: (-shares[stratum][1], stratum))
    for stratum in largest[: wanted - sum(quota.values())]:
        quota[stratum] += 1
    for stratum in sorted(strata):
        before = len(picked)
        _pick(picked, groups, strata[stratum], name, quota[stratum])
        wanted -= sum(len(groups[key]) for key in list(picked)[before:])
    _pick(picked, groups, order, name, wanted)  # what groups larger than a quota left over
