"""Files a person may give by mistake, as bytes: name of the case -> ending and content.

Every one of them must be refused with the message in `messages.txt`. Run this file to write that one anew, and read
the difference before it is committed.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import tempfile
import zipfile
from pathlib import Path

GOOD = {"prompt": "a", "completion": "b"}
LINE = json.dumps(GOOD).encode() + b"\n"
CSV = b"prompt,completion\na,b\n"


def chat(*messages: object, column: str = "messages") -> bytes:
    return json.dumps({column: list(messages)}).encode() + b"\n"


def turn(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def parquet(columns: dict[str, object]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo("xl/workbook.xml"), "<x/>")
    return out.getvalue()


def parquet_with_bad_text() -> bytes:
    import pyarrow

    return parquet({"prompt": ["a", "b"], "completion": pyarrow.array([b"x", b"\xff"]).view("string")})


def parquet_with_equal_names() -> bytes:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def cases() -> dict[str, tuple[str, bytes]]:
    user, answer = turn("user", "hi"), turn("assistant", "yo")
    table = parquet({"prompt": ["a"], "completion": ["b"]})
    return {
        # the file as a whole
        "empty csv": ("csv", b""),
        "empty jsonl": ("jsonl", b""),
        "empty json": ("json", b""),
        "empty parquet": ("parquet", b""),
        "blank lines": ("jsonl", b"\n \n\t\n"),
        "blank csv": ("csv", b"\n\n"),
        "blank json": ("json", b" \n "),
        "byte order mark and nothing": ("csv", b"\xef\xbb\xbf"),
        "gzip": ("csv", gzip.compress(CSV, mtime=0)),
        "gzip of jsonl": ("jsonl", gzip.compress(LINE, mtime=0)),
        "workbook": ("csv", zipped()),
        "old workbook": ("csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
        "bzip2": ("jsonl", b"BZh91AY&SY"),
        "xz": ("csv", b"\xfd7zXZ\x00\x00"),
        "zstd": ("jsonl", b"\x28\xb5\x2f\xfd\x04"),
        "SQLite": ("csv", b"SQLite format 3\0"),
        "PDF": ("csv", b"%PDF-1.7\n"),
        "git-lfs pointer": ("csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "web page": ("jsonl", b"<!DOCTYPE html><html></html>"),
        "parquet named csv": ("csv", table),
        "csv named parquet": ("parquet", CSV),
        "UTF-16 little": ("csv", CSV.decode().encode("utf-16")),
        "UTF-16 big": ("jsonl", b"\xfe\xff" + LINE.decode().encode("utf-16-be")),
        "UTF-16 without a mark": ("csv", CSV.decode().encode("utf-16-le")),
        "UTF-32": ("csv", b"\xff\xfe\x00\x00" + CSV.decode().encode("utf-32-le")),
        "unknown ending": ("txt", LINE),
        "no ending": ("", LINE),
        # csv and tsv
        "Latin-1": ("csv", CSV + "café,b\n".encode("latin-1")),
        "half a character": ("csv", CSV + b"a,\xe2\x82\n"),
        "NUL in csv": ("csv", CSV + b"a,b\0c\n"),
        "short row": ("csv", CSV + b"a\n"),
        "long row": ("csv", CSV + b"a,b,c\n"),
        "comma left out of quotes": ("csv", CSV + b"well, then,b\n"),
        "quote never closed": ("csv", CSV + b'a,"b\nc,d\ne,f\n'),
        "quote closed in a later row": ("csv", CSV + b'a,"b\nc,"d"\n'),
        "text behind a quote": ("csv", CSV + b'a,"b" c\n'),
        "backslash before a quote": ("csv", CSV + b'a,"say \\"hi\\""\n'),
        "header only": ("csv", b"prompt,completion\n"),
        "column without a name": ("csv", b"prompt,,completion\na,b,c\n"),
        "two columns of one name": ("csv", b"prompt,prompt\na,b\n"),
        "semicolons": ("csv", b"prompt;completion\na;b\n"),
        "tabs in csv": ("csv", b"prompt\tcompletion\na\tb\n"),
        "commas in tsv": ("tsv", CSV),
        "short row in tsv": ("tsv", b"prompt\tcompletion\na b\n"),
        "quote never closed in tsv": ("tsv", b'prompt\tcompletion\n"a\tb\n'),
        "CR alone": ("csv", b"prompt,completion\ra,b\rc,d\r"),
        "no header": ("csv", b"what is two,two\nwhat is three,three\n"),
        "header in capitals": ("csv", b"Prompt,Completion\na,b\n"),
        "empty completion": ("csv", CSV + b"a,\n"),
        "blank prompt": ("csv", CSV + b'" ",b\n'),
        "unknown columns": ("csv", b"a,b\nc,d\n"),
        "text without labels": ("csv", b"text,labels\na, \n"),
        # jsonl
        "Latin-1 in jsonl": ("jsonl", LINE + '{"prompt": "café"}\n'.encode("latin-1")),
        "NUL in jsonl": ("jsonl", LINE + b'{"prompt": "a\0"}\n'),
        "escaped NUL": ("jsonl", LINE + b'{"prompt": "a\\u0000", "completion": "b"}\n'),
        "cut off": ("jsonl", LINE + LINE[:-5]),
        "key twice": ("jsonl", LINE + b'{"prompt": "a", "prompt": "c", "completion": "b"}\n'),
        "key twice inside": ("jsonl", LINE + b'{"prompt": "a", "completion": "b", "x": {"y": 1, "y": 2}}\n'),
        "NaN": ("jsonl", LINE + b'{"prompt": "a", "completion": "b", "score": NaN}\n'),
        "Infinity": ("jsonl", LINE + b'{"prompt": "a", "completion": "b", "score": -Infinity}\n'),
        "single quotes": ("jsonl", LINE + b"{'prompt': 'a', 'completion': 'b'}\n"),
        "trailing comma": ("jsonl", LINE[:-1] + b",\n" + LINE),
        "comment": ("jsonl", b"// rows\n" + LINE),
        "two objects on a line": ("jsonl", LINE[:-1] + LINE),
        "CR between objects": ("jsonl", LINE[:-1] + b"\r" + LINE),
        "array in jsonl": ("jsonl", b"[\n" + LINE[:-1] + b"\n]\n"),
        "array on a line": ("jsonl", LINE + b'["a", "b"]\n'),
        "text on a line": ("jsonl", LINE + b'"a"\n'),
        "number on a line": ("jsonl", LINE + b"5\n"),
        "null on a line": ("jsonl", LINE + b"null\n"),
        "bare tab in a string": ("jsonl", LINE + b'{"prompt": "a\tb", "completion": "c"}\n'),
        "deep list": ("jsonl", LINE + b"[" * 20000 + b"\n"),
        "deep object": ("jsonl", LINE + b'{"a":' * 20000 + b"1" + b"}" * 20000 + b"\n"),
        "number of 5000 digits": ("jsonl", LINE + b'{"prompt": ' + b"9" * 5000 + b"}\n"),
        "half a surrogate pair": ("jsonl", LINE + b'{"prompt": "a", "completion": "\\ud83d"}\n'),
        "missing key": ("jsonl", LINE + b'{"prompt": "a"}\n'),
        "null": ("jsonl", LINE + b'{"prompt": null, "completion": "b"}\n'),
        "number among text": ("jsonl", LINE + b'{"prompt": 5, "completion": "b"}\n'),
        "list among text": ("jsonl", LINE + b'{"prompt": ["a"], "completion": "b"}\n'),
        "truth among text": ("jsonl", LINE + b'{"prompt": true, "completion": "b"}\n'),
        # json
        "array cut off": ("json", b"[" + LINE[:-1] + b",\n" + LINE[:20]),
        "array not closed": ("json", b"[" + LINE),
        "empty array": ("json", b"[]"),
        "array of texts": ("json", b'["a", "b"]'),
        "array of arrays": ("json", b"[[1], [2]]"),
        "comma behind the last object": ("json", b"[" + LINE + b",\n]"),
        "comma left out": ("json", b"[" + LINE + LINE + b"]"),
        "text behind the array": ("json", b"[" + LINE + b"]\n[]"),
        "object of columns": ("json", b'{"prompt": ["a", "b"], "completion": ["c", "d"]}'),
        "object around the rows": ("json", b'{"version": 1,\n "data": [' + LINE + b"]}"),
        "key twice in json": ("json", b'[\n{"prompt": "a",\n "prompt": "b"}]'),
        "NaN in json": ("json", b'[{"prompt": NaN}]'),
        "Latin-1 in json": ("json", b'[{"prompt": "caf\xe9"}]'),
        "NUL in json": ("json", b'[\n{"prompt": "a\0"}]'),
        "deep json": ("json", b"[" + b'{"a":' * 20000),
        "number alone": ("json", b"5"),
        # parquet
        "parquet cut off": ("parquet", table[:-20]),
        "parquet of zeros": ("parquet", table[:4] + bytes(len(table) - 8) + table[-4:]),
        "parquet without rows": ("parquet", parquet({"prompt": [], "completion": []})),
        "parquet with null": ("parquet", parquet({"prompt": ["a", None], "completion": ["b", "c"]})),
        "parquet with numbers": ("parquet", parquet({"prompt": [1], "completion": ["b"]})),
        "parquet with bytes": ("parquet", parquet({"prompt": [b"a"], "completion": ["b"]})),
        "parquet with bad text": ("parquet", parquet_with_bad_text()),
        "parquet with equal names": ("parquet", parquet_with_equal_names()),
        # conversations
        "messages as text": ("jsonl", chat(user, answer) + b'{"messages": "oops"}\n'),
        "no messages": ("jsonl", chat()),
        "message as text": ("jsonl", chat("hi")),
        "message without content": ("jsonl", chat({"role": "user"})),
        "message of null": ("jsonl", chat(user, turn("assistant", None))),
        "message of parts": ("jsonl", chat(turn("user", [{"type": "image"}]), answer)),
        "empty answer": ("jsonl", chat(user, turn("assistant", ""))),
        "unknown role": ("jsonl", chat(turn("tool", "x"), answer)),
        "question without answer": ("jsonl", chat(user, answer, user)),
        "answer first": ("jsonl", chat(answer, user, answer)),
        "late system message": ("jsonl", chat(user, turn("system", "x"), answer)),
        "sharegpt without value": ("jsonl", chat({"from": "human"}, column="conversations")),
        # other shapes
        "alpaca with a list": ("jsonl", b'{"instruction": ["a"], "input": "", "output": "b"}\n'),
        "no label": ("jsonl", b'{"text": "a", "labels": []}\n'),
        "label of a fraction": ("jsonl", b'{"text": "a", "labels": [0.5]}\n'),
        "blank text": ("jsonl", b'{"text": "  "}\n'),
        "equal answers": ("jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n'),
        "worse answer missing": ("jsonl", b'{"prompt": "a", "chosen": "b"}\n'),
        "answers to different questions": (
            "jsonl",
            json.dumps({"chosen": [user, answer], "rejected": [answer, user]}).encode(),
        ),
    }


def told(folder: Path, ending: str, content: bytes) -> str:
    """Read a case and return the message it is refused with."""
    from ftexp.config import Data, Source
    from ftexp.data import rows
    from ftexp.errors import DataError

    path = folder / f"rows.{ending}".rstrip(".")
    path.write_bytes(content)
    try:
        read = rows.read(Data(kind=Source.file, path=str(path)))
    except DataError as error:
        return str(error).replace(str(folder), "DIR")
    return f"read: {[(r.prompt, r.completion) for r in read]}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"{name}: {told(Path(folder), *case)}" for name, case in cases().items()]
    (Path(__file__).parent / "messages.txt").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
