"""Records of a file, each with its line: csv, tsv, jsonl, json and parquet, as written or refused.

The readers of pandas, pyarrow and datasets guess: `NA` becomes a missing number, a short row is filled up, a second
column of the same name is renamed, the last of two equal JSON keys wins, a line of a gigabyte is loaded whole. Here
every value of a csv or tsv is text, spelled as in the file, and what has no single meaning is refused by
`file:line`. Files are streamed: at most `LONGEST` bytes of text are held beside the rows.

csv and tsv follow RFC 4180: one header line, fields in double quotes may hold separators, line ends and doubled
quotes. A first column without a name, the index that pandas writes, is left out. Text is UTF-8, with or without a byte
order mark.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftexp.config import Source
from ftexp.errors import DataError

LONGEST = 16 * 2**20
"""Bytes that one line, or one object of a json array, may have."""
CHUNK = 2**20
BLANKS = re.compile(r"[ \t\r\n]*")
ENDINGS = {
    ".csv": Source.csv,
    ".tsv": Source.tsv,
    ".tab": Source.tsv,
    ".jsonl": Source.jsonl,
    ".ndjson": Source.jsonl,
    ".json": Source.json,
    ".parquet": Source.parquet,
}
UNPACK = "unpack it first"
SIGNATURES = {  # first bytes of files that are given by mistake -> what they are, and what to do
    b"\x1f\x8b": ("a gzip archive", UNPACK),
    b"PK\x03\x04": ("a zip archive or an .xlsx workbook", "unpack it, or export it as csv"),
    b"\xd0\xcf\x11\xe0": ("an .xls workbook", "export it as csv"),
    b"BZh": ("a bzip2 archive", UNPACK),
    b"\xfd7zXZ\x00": ("an xz archive", UNPACK),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"PAR1": ("a parquet file", "use data=parquet"),
    b"ARROW1": ("an arrow file", "save it as parquet"),
    b"SQLite format 3": ("an SQLite database", "export the table as csv"),
    b"%PDF-": ("a PDF document", "extract its text"),
    b"version https://git-lfs": ("a git-lfs pointer", "run git lfs pull"),
    b"<!DOCTYPE": ("a web page", "download the file itself"),
    b"<!doctype": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
    codecs.BOM_UTF32_LE: ("UTF-32 text", "save it as UTF-8: iconv -f UTF-32 -t UTF-8"),
    codecs.BOM_UTF32_BE: ("UTF-32 text", "save it as UTF-8: iconv -f UTF-32 -t UTF-8"),
    codecs.BOM_UTF16_LE: ("UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    codecs.BOM_UTF16_BE: ("UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
}
Record = tuple[dict[str, Any], str]
"""Column name -> value, and `file:line`."""


def records(path: Path, kind: Source, key: str = "data.path") -> Iterator[Record]:
    """Yield the records of a file.

    Args:
        path: of the file.
        kind: its format.
        key: of the config that names it.

    Raises:
        DataError: the file or one of its records cannot be used; the message starts with the file, and the line.
    """
    kind = _kind(path, kind, key)
    _check_file(path, kind, key)
    match kind:
        case Source.csv:
            yield from _separated(path, ",")
        case Source.tsv:
            yield from _separated(path, "\t")
        case Source.jsonl:
            yield from _json_lines(path)
        case Source.json:
            yield from _json_array(path)
        case Source.parquet:
            yield from _parquet(path)


def _kind(path: Path, kind: Source, key: str) -> Source:
    if kind is not Source.file:
        return kind
    found = ENDINGS.get(path.suffix.lower())
    if found is None:
        raise DataError(f"{path}: {key} must end in {', '.join(ENDINGS)}; or name the format, as in data=csv {key}=...")
    return found


def _check_file(path: Path, kind: Source, key: str) -> None:
    """Refuse what is no regular file, cannot be opened, is empty, or is something else by its first bytes."""
    rule = f"{path}: {key} must be a file"
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise DataError(f"{rule}, and there is none of that name") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{rule}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise DataError(f"{rule}, this is {what}")
    if not found.st_size:
        raise DataError(f"{path}: must have rows, the file is empty")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    for signature, (what, hint) in SIGNATURES.items():
        if head.startswith(signature) and not (kind is Source.parquet and signature == b"PAR1"):
            raise DataError(f"{path}: must be {kind.value}, this is {what}; {hint}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines with their ends."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > LONGEST:
                raise DataError(f"{where}: a line must be at most {LONGEST >> 20} MiB, this one is longer")
            yield number, _decode(line, where, first=number == 1)


def _decode(line: bytes, where: str, first: bool) -> str:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: must be UTF-8, byte {error.start} of the line is 0x{line[error.start]:02x}; if the file is "
            "Windows-1252 or Latin-1: iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
    if "\0" in text:
        raise DataError(f"{where}: must be text, column {text.index(chr(0)) + 1} is a NUL character")
    return text


# csv and tsv


class _Feed:
    """Lines for `csv.reader`, which pulls as many as a record takes; knows where the record began."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, _lines(path)
        self.number = self.first = self.size = 0

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        self.number, line = next(self.lines)
        self.size += len(line)
        if self.size > LONGEST:
            raise DataError(
                f"{self.where()}: a record must be at most {LONGEST >> 20} MiB, this one goes on in line "
                f"{self.number}; is a quote left open?"
            )
        return line

    def begin(self) -> None:
        self.first, self.size = self.number + 1, 0

    def where(self) -> str:
        return f"{self.path}:{self.first}"


def _separated(path: Path, separator: str) -> Iterator[Record]:
    feed = _Feed(path)
    csv.field_size_limit(LONGEST)
    rows = csv.reader(feed, delimiter=separator, strict=True)
    header: list[str] = []
    index, found = 0, False
    while (fields := _record(rows, feed)) is not None:
        where = feed.where()
        if not fields or (header == [] and fields == [""]):  # a blank line
            continue
        if not header:
            header = _header(fields, where, separator)
            index = int(not header[0].strip())
            continue
        if len(fields) != len(header):
            raise DataError(
                f"{where}: a row must have the {len(header)} columns of the header, this one has {len(fields)}: "
                f"{separator.join(fields)!r:.60}"
            )
        found = True
        yield dict(zip(header[index:], fields[index:], strict=True)), where
    if not found:
        raise DataError(f"{path}: must have rows, there is {'only a header' if header else 'nothing but blank lines'}")


def _record(rows: Any, feed: _Feed) -> list[str] | None:
    feed.begin()
    try:
        return next(rows)
    except StopIteration:
        return None
    except csv.Error as error:
        told = str(error)
        if "unexpected end" in told:
            told = "a quote that opens in this record is never closed"
        elif "new-line character" in told:
            told = "lines must end in LF or CRLF, here a CR stands alone; convert the file: tr '\\r' '\\n'"
        elif "expected after" in told:
            told = "a field in quotes must end at its closing quote; write quotes within it twice"
        raise DataError(f"{feed.where()}: {told}") from error


def _header(names: list[str], where: str, separator: str) -> list[str]:
    other = next((s for s in ",;\t|" if s != separator and s in names[0]), None)
    if len(names) == 1 and other is not None:
        wanted = "use data=tsv" if other == "\t" else "use data=csv" if other == "," else "save it with commas"
        raise DataError(f"{where}: columns must be separated by {separator!r}, the header has {other!r}; {wanted}")
    for number, name in enumerate(names, 1):
        if not name.strip() and (number > 1 or len(names) == 1):
            raise DataError(f"{where}: every column must have a name, column {number} has {name!r}")
        if names.index(name) != number - 1:
            raise DataError(f"{where}: column names must differ, {name!r} stands twice")
    return names


# jsonl and json


def _json_lines(path: Path) -> Iterator[Record]:
    found = False
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        yield _object(line, where, array=not found and line.lstrip()[:1] == "["), where
        found = True
    if not found:
        raise DataError(f"{path}: must have rows, there is nothing but blank lines")


def _object(text: str, where: str, array: bool = False) -> dict[str, Any]:
    hint = "; is the file one array? use data=json" if array else ""
    try:
        row = STRICT.decode(text)
    except json.JSONDecodeError as error:
        if "\r" in text.rstrip("\r\n"):
            hint = "; lines must end in LF or CRLF, here a CR stands alone"
        raise DataError(f"{where}: must be one JSON object, {error.msg} at column {error.colno}{hint}") from error
    except ValueError as error:
        raise DataError(f"{where}: must be one JSON object: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where}: must be a flat JSON object, this one is nested too deep") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be one JSON object, got {type(row).__name__}{hint}")
    return row


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for n, name in enumerate(names) if name in names[:n])
        raise ValueError(f"key {twice!r} stands twice")
    return made


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON value")


STRICT = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_no_constant)


class _Window:
    """A stretch of a file's text, the place reached in it, and the line of that place."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line = "", 0, 1
        self.taken, self.ended = 0, False

    def where(self) -> str:
        return f"{self.path}:{self.line}"

    def rest(self) -> str:
        """Return the next few characters, for messages."""
        return self.text[self.at : self.at + 20] or "the end"

    def read(self, size: int) -> None:
        chunk = self.file.read(size)
        self.ended = len(chunk) < size
        try:
            more = self.decoder.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}: must be UTF-8, byte {self.taken + error.start} of the file is "
                f"0x{error.object[error.start]:02x}; if the file is Windows-1252 or Latin-1: "
                "iconv -f WINDOWS-1252 -t UTF-8"
            ) from error
        if "\0" in more:
            line = self.line + self.text.count("\n", self.at) + more.count("\n", 0, more.index("\0"))
            raise DataError(f"{self.path}:{line}: must be text, the line has a NUL character")
        self.taken += len(chunk)
        self.text, self.at = self.text[self.at :] + more, 0

    def go(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def peek(self) -> str:
        """Pass over white space and return the next character, or nothing at the end."""
        while True:
            self.go(BLANKS.match(self.text, self.at).end())  # type: ignore
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read(CHUNK)


def _json_array(path: Path) -> Iterator[Record]:
    """Yield the objects of an array; a file of this ending often holds JSON lines, which are read as such."""
    with path.open("rb") as file:
        window = _Window(path, file)
        first = window.peek()
        if first == "[":
            yield from _elements(window)
            return
        alone = _lone_object(window.text) if first == "{" else None
    if alone is not None:
        names = ", ".join(list(alone)[:5])
        raise DataError(f"{path}: must be an array of objects, or one object a line; got a single object with {names}")
    if first != "{":
        raise DataError(f"{window.where()}: must be an array of objects, got {window.rest()!r}")
    yield from _json_lines(path)


def _lone_object(text: str) -> dict[str, Any] | None:
    """Return the object that is all of a file, where it spreads over lines or lists rows by column or key."""
    line, _, rest = text.lstrip().partition("\n")
    try:
        first = json.loads(line)
        if rest.strip() or not all(isinstance(value, list | dict) for value in first.values()):
            return None  # the first of many lines, or the only row
        return first
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _elements(window: _Window) -> Iterator[Record]:
    window.go(window.at + 1)
    sign = window.peek()
    if sign == "]":
        raise DataError(f"{window.path}: must have rows, the array is empty")
    while True:
        where = window.where()
        if sign != "{":
            raise DataError(f"{where}: must be an array of objects, got {window.rest()!r}")
        yield _element(window, where), where
        sign = window.peek()
        if sign == "]":
            break
        if sign != ",":
            raise DataError(f"{window.where()}: must be ',' or ']' behind an object, got {window.rest()!r}")
        window.go(window.at + 1)
        sign = window.peek()
    window.go(window.at + 1)
    if window.peek():
        raise DataError(f"{window.where()}: must end behind the array, got {window.rest()!r}")


def _element(window: _Window, where: str) -> dict[str, Any]:
    """Parse the object the window begins with, reading on until it is whole."""
    while True:
        try:
            made, end = STRICT.raw_decode(window.text, window.at)
            window.go(end)
            return made
        except json.JSONDecodeError as error:
            held = len(window.text) - window.at
            if held > LONGEST:
                raise DataError(f"{where}: an object must be at most {LONGEST >> 20} MiB, this one is longer or is "
                                f"broken: {error.msg}") from error  # fmt: skip
            if window.ended:
                line = window.line + window.text.count("\n", window.at, error.pos)
                raise DataError(f"{where}: must be a JSON object, {error.msg} in line {line}") from error
            window.read(max(CHUNK, held))
        except ValueError as error:
            raise DataError(f"{where}: must be a JSON object: {error}") from error
        except RecursionError as error:
            raise DataError(f"{where}: must be a flat JSON object, this one is nested too deep") from error


# parquet


def _parquet(path: Path) -> Iterator[Record]:
    """Yield rows; `file:n` counts them from 1, a parquet file has no lines."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for n, name in enumerate(names):
                if name in names[:n]:
                    raise DataError(f"{path}: column names must differ, {name!r} stands twice")
            for batch in file.iter_batches(batch_size=256):
                columns = [_values(column, name, path, number) for name, column in zip(names, batch, strict=True)]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield dict(zip(names, values, strict=True)), f"{path}:{number}"
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        told = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: must be parquet, and cannot be read behind row {number}: {told:.200}") from error
    if not number:
        raise DataError(f"{path}: must have rows, the table is empty")


def _values(column: Any, name: str, path: Path, before: int) -> list[Any]:
    """Return the values of a stretch of a column, which begins behind so many rows; refuse what Python cannot hold."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError) as error:  # also pyarrow's own and text that is no UTF-8
        row = next((n for n, value in enumerate(column, before + 1) if not _holds(value)), before + 1)
        raise DataError(
            f"{path}:{row}: column {name!r} of type {column.type!s:.60} cannot be read: "
            f"{str(error).strip(' .'):.200}; take the column out, or write it as text in UTF-8"
        ) from error


def _holds(value: Any) -> bool:
    try:
        value.as_py()
    except (ValueError, OverflowError):
        return False
    return True
