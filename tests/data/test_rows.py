"""Bad rows are refused with file, line and rule; good text survives as it is."""

import json
from dataclasses import replace

import pytest

from ftexp import data
from ftexp.config import Data, Source
from ftexp.data import reader, rows
from ftexp.errors import DataError


def jsonl(path, *lines: bytes | str | dict, **keys):
    encoded = [
        json.dumps(x).encode() if isinstance(x, dict) else x.encode() if isinstance(x, str) else x for x in lines
    ]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return Data(kind=Source.jsonl, path=str(path), **keys)


GOOD = {"prompt": "a", "completion": "b"}


def test_address_is_refused_with_what_to_do():
    with pytest.raises(
        DataError, match=r"^https://x/y\.csv: data\.path must be a file here, addresses are not read; down"
    ):
        data.load(Data(kind=Source.csv, path="https://x/y.csv"))


def test_file_that_is_not_there_is_told_by_its_key(tmp_path):
    asked = jsonl(tmp_path / "a.jsonl", *({"prompt": f"p{n}", "completion": f"c{n}"} for n in range(9)), valid=2)
    for key in ("valid_path", "test_path"):
        with pytest.raises(DataError, match=rf"none\.jsonl: data\.{key} must be a file, and there is none"):
            data.load(replace(asked, **{key: str(tmp_path / "none.jsonl")}))
    with pytest.raises(DataError, match=r"none\.txt: data\.valid_path must end in \.csv"):
        data.load(replace(asked, kind=Source.file, valid_path="none.txt"))
    with pytest.raises(DataError, match=r"none\.jsonl: data\.path must be a file"):
        data.load(replace(asked, path=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "a", "completion": "b"', "must be one JSON object, .* at column"),
        ("[1]", "must be one JSON object, got list"),
        ({"prompt": "a"}, "column 'completion' is missing, the row has prompt"),
        ({"prompt": "a", "completion": None}, "column 'completion' must be text, got None"),
        ({"prompt": 5, "completion": "b"}, "column 'prompt' must be text, got 5"),
        ({"prompt": "a", "completion": " "}, "the completion must have text"),
        ({"prompt": "", "completion": "b"}, "the prompt must have text"),
        (b'{"prompt": "a", "completion": "\xff"}', "must be UTF-8, byte 31 of the line is 0xff"),
        (b'{"prompt": "a", "completion": "\x00"}', "NUL character"),
        ('{"prompt": ' + "9" * 5000 + "}", "must be one JSON object"),
        ('{"prompt": "a", "completion": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 20000, "nested too deep|must be one JSON object"),
    ],
)
def test_bad_line_is_named(tmp_path, bad, message):
    data = jsonl(tmp_path / "my.jsonl", GOOD, bad, GOOD)
    with pytest.raises(DataError, match=f"my.jsonl:2: .*({message})"):
        rows.read(data)


def test_line_that_never_ends_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "LONGEST", 2**20)
    data = jsonl(tmp_path / "my.jsonl", GOOD, "x" * 2**21)
    with pytest.raises(DataError, match=r"my\.jsonl:2: a line must be at most 1 MiB"):
        rows.read(data)


def test_missing_file_and_folder_are_named(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="data.path must be a file"):
            rows.read(Data(kind=Source.jsonl, path=str(path)))


def test_text_survives_as_it_is(tmp_path):
    odd = [
        {"prompt": t, "completion": t} for t in ("NA", "null", "None", "naïve 한국어", "a\nb", "{x}", "ends\u2028here")
    ]
    read = rows.read(jsonl(tmp_path / "my.jsonl", *odd))
    assert [r.prompt for r in read] == [r["prompt"] for r in odd]
    assert read[1].where.endswith("my.jsonl:2")


def test_byte_order_mark_and_blank_lines_are_passed_over(tmp_path):
    read = rows.read(jsonl(tmp_path / "my.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "", GOOD))
    assert [r.where.rsplit(":", 1)[1] for r in read] == ["1", "3"]


def test_columns_of_ones_own(tmp_path):
    row = {"topic": "dreams", "author": "me", "quote": "go"}
    data = jsonl(tmp_path / "q.jsonl", row, prompt="{topic} by {author}:", completion="{quote}!")
    assert rows.read(data)[0].prompt == "dreams by me:"
    assert rows.read(data)[0].completion == "go!"


@pytest.mark.parametrize(
    ("row", "columns", "idle"),
    [
        (GOOD | {"why": "c"}, {"input": "why"}, "input=why"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "g": "x"},
         {"label": "g"}, "label=g"),
        ({"text": "a", "labels": "b", "g": "c"}, {"label": "g"}, "label=g"),
        ({"text": "a", "g": "c"}, {"label": "g"}, ""),
        ({"instruction": "a", "output": "b", "why": "c"}, {"input": "why"}, ""),
        ({"q": [{"role": "user", "content": "a"}], "a": [{"role": "assistant", "content": "b"}]},
         {"prompt": "q", "completion": "a"}, ""),
        (GOOD | {"by": "me"}, {"author": "by"}, "author=by"),
    ],
    ids=["alpaca's", "of labels", "one of two labels", "a label", "input", "lists", "of nothing"],
)  # fmt: skip
def test_mapped_column_that_nothing_reads_is_told(tmp_path, capsys, row, columns, idle):
    read = rows.read(jsonl(tmp_path / "a.jsonl", row, row, columns=columns))
    told = " ".join(capsys.readouterr().err.split())
    assert (len(read), told.count("changes nothing")) == (2, int(bool(idle)))
    assert f"data.columns.{idle} changes nothing" in told or not idle
    kept = rows.read(jsonl(tmp_path / "b.jsonl", row, columns=columns, group_by=next(iter(columns)))) if idle else []
    assert "changes nothing" not in capsys.readouterr().err
    assert [r.group for r in kept] == ([row[columns[next(iter(columns))]]] if idle else [])


@pytest.mark.parametrize(
    ("asked", "told"),
    [("Speak like a pirate. Hi", True), ("Goodbye.", True), ("Hi", False), (" Hi\n", False), ("", False)],
)
@pytest.mark.parametrize("columns", [{}, {"prompt": "asked"}])
def test_prompt_that_no_message_of_a_pair_holds_is_told(tmp_path, capsys, asked, told, columns):
    """Some sets repeat the user's message there, some keep a whole prompt of their own, which a model never sees."""
    talk = [{"role": "user", "content": "Hi"}]
    pair = {name: [*talk, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    row = pair | {columns.get("prompt", "prompt"): asked}
    [first, _] = rows.read(jsonl(tmp_path / "a.jsonl", row, row, columns=columns))
    assert (first.prompt, first.completion, first.rejected) == ("Hi", "chosen", "rejected")
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("column prompt says what no message of the user does") == told


def test_rows_keeps_the_first(tmp_path):
    assert len(rows.read(jsonl(tmp_path / "my.jsonl", *[GOOD] * 5, rows=3))) == 3


def test_changed_file_is_read_anew_though_size_and_time_are_the_same(tmp_path):
    import os

    path = tmp_path / "my.jsonl"
    data = jsonl(path, {"prompt": "a", "completion": "1"})
    stamp = path.stat().st_mtime_ns
    assert rows.read(data)[0].completion == "1"
    jsonl(path, {"prompt": "a", "completion": "2"})
    os.utime(path, ns=(stamp, stamp))
    assert rows.read(data)[0].completion == "2"


def test_generator_makes_as_many_as_asked():
    assert len(rows.read(Data(rows=7))) == 7
    assert len(rows.read(Data())) == rows.GENERATED
