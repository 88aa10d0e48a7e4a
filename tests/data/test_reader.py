"""Files are refused with their line, or read exactly as written."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftexp.config import Source
from ftexp.data import reader
from ftexp.errors import DataError

BAD = Path(__file__).parent.parent / "badinput"
sys.path.insert(0, str(BAD))
import files  # noqa: E402

MESSAGES = dict(line.split(": ", 1) for line in (BAD / "messages.txt").read_text().splitlines())
CASES = files.cases()


def read(path, content: bytes, kind=Source.file):
    path.write_bytes(content)
    return list(reader.records(path, kind))


def values(path, content: bytes, kind=Source.file):
    return [list(record.values()) for record, _ in read(path, content, kind)]


@pytest.mark.parametrize("sign", [",", "\t"])
def test_index_of_a_table_of_pandas_is_left_out(tmp_path, sign):
    path = tmp_path / ("rows.csv" if sign == "," else "rows.tsv")
    told = read(path, sign.join(["", "a", "b\n0", "x", "y\n"]).encode())
    assert told == [({"a": "x", "b": "y"}, f"{path}:2")]


def test_there_are_many_bad_files_and_each_has_its_message():
    assert len(CASES) >= 100
    assert list(MESSAGES) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_bad_file_is_refused_with_its_message(name, tmp_path):
    told = files.told(tmp_path, *CASES[name])
    assert told == MESSAGES[name]
    assert told.startswith("DIR/rows")  # refused, with the file first
    assert "\n" not in told


TAKEN = ["short row", "header only", "two columns of one name", "column without a name", "no header", "key twice",
         "NaN", "null", "number among text", "list among text"]  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_sabotage_pandas_takes_what_is_refused_here(name):
    """The twin of the test above: files that need a reader of our own."""
    import pandas

    ending, content = CASES[name]
    parse = pandas.read_csv if ending in ("csv", "tsv") else lambda f: pandas.read_json(f, lines=True)
    parse(io.BytesIO(content))


def test_special_files_are_refused_and_nothing_hangs(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    (tmp_path / "folder.csv").mkdir()
    told = {
        tmp_path / "none.csv": "there is none of that name",
        tmp_path / "folder.csv": "this is a folder",
        tmp_path / "pipe.csv": "this is a pipe, socket or device",
        tmp_path / "loop.csv": "symbolic link|there is none",
        tmp_path / ("x" * 300 + ".csv"): "File name too long",
        Path("/dev/zero"): "this is a pipe, socket or device",
    }
    for path, message in told.items():
        with pytest.raises(DataError, match=f"data.path must be a file.*({message})"):
            list(reader.records(path, Source.csv))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything; run the tests as another user")
def test_file_without_permission_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(files.CSV)
    (tmp_path / "a.csv").chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        list(reader.records(tmp_path / "a.csv", Source.csv))


def test_refused_permission_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_bytes(files.CSV)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.csv: cannot be read: Permission denied"):
        list(reader.records(tmp_path / "a.csv", Source.csv))


ODD = ["NA", "N/A", "null", "None", "nan", "", "007", "1e5", "TRUE", " a ", "naïve 한국어 🎉", "{x}", "=1+1", "a\tb",
       "ends\u2028here", "next\x85line", 'say "hi"', "a,b;c", "two\nlines", "two\r\nlines", "old\rline", "\\n", "'", "#"]  # fmt: skip


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_of_a_table_survives_as_it_is(tmp_path, ending, separator, end):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["n", "text"], *[[str(n), text] for n, text in enumerate(ODD)]])
    got = values(tmp_path / f"a.{ending}", b"\xef\xbb\xbf" + out.getvalue().encode())
    assert got == [[str(n), text] for n, text in enumerate(ODD)]


def test_sabotage_pandas_changes_text_that_survives_here():
    import pandas

    text = "n,text\n" + "".join(f'{n},"{t}"\n' for n, t in enumerate(["NA", "null", "None", ""]))
    assert pandas.read_csv(io.StringIO(text))["text"].isna().all()


cells = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6))
def test_any_table_is_read_as_written(tmp_path_factory, rows):
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    got = values(tmp_path_factory.mktemp("t") / "a.csv", out.getvalue().encode())
    assert got == [list(row) for row in rows]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(cells, st.one_of(cells, st.integers(), st.lists(cells)), max_size=4), min_size=1))
def test_any_objects_are_read_as_written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("t")
    for indent, ascii_only in ((None, True), (1, False)):
        content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
        assert [r for r, _ in read(folder / "a.json", content)] == rows
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    assert [r for r, _ in read(folder / "a.jsonl", lines)] == rows


def test_lines_are_counted_through_records_of_several_lines(tmp_path):
    got = read(tmp_path / "a.csv", b'a,b\n"1\n\n2",x\n\n3,y\n')
    assert [where.rsplit(":", 1)[1] for _, where in got] == ["2", "6"]
    got = read(tmp_path / "a.json", b'\n[\n  {"a":\n 1},\n\n {"a": 2}, {"a": 3}]')
    assert [where.rsplit(":", 1)[1] for _, where in got] == ["3", "6", "6"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_array_is_read_the_same_in_pieces_of_any_size(tmp_path, monkeypatch, chunk):
    rows = [{"a": "naïve 한 🎉\n", "b": [1, {"c": "}]"}]}, {"a": "\\"}]
    monkeypatch.setattr(reader, "CHUNK", chunk)
    got = read(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps(rows, indent=1, ensure_ascii=False).encode())
    assert [record for record, _ in got] == rows


def test_json_lines_may_be_named_json(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": ["c"], "completion": ["d"]}]
    for held in (rows, rows[:1]):
        content = "\n".join(json.dumps(r) for r in held).encode()
        assert [r for r, _ in read(tmp_path / "a.json", content)] == held


def test_format_may_be_named_where_the_ending_does_not(tmp_path):
    assert values(tmp_path / "rows.dat", files.CSV, Source.csv) == [["a", "b"]]
    assert values(tmp_path / "ROWS.CSV", files.CSV) == [["a", "b"]]


def test_parquet_rows_are_counted(tmp_path):
    messages = [[{"role": "user", "content": "a"}]] * 600
    got = read(tmp_path / "a.parquet", files.parquet({"messages": messages}))
    assert got[-1] == ({"messages": messages[0]}, f"{tmp_path}/a.parquet:600")


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl:1: a line must be at most 1 MiB, this one is longer"),
        ("a.csv", b"a,b\n", r"a\.csv:2: a line must be at most 1 MiB, this one is longer"),
        ("a.json", b'[{"a": "', r"a\.json:1: an object must be at most 1 MiB, this one is longer or is broken"),
    ],
)
def test_line_without_end_is_refused(tmp_path, monkeypatch, name, head, message):
    monkeypatch.setattr(reader, "LONGEST", 2**20)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, head + b"x" * 2**23)


def test_record_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "LONGEST", 2**20)
    with pytest.raises(DataError, match=r"a\.csv:2: a record must be at most 1 MiB, .* is a quote left open\?"):
        read(tmp_path / "a.csv", b'a,b\n1,"2\n' + b"3,4\n" * 2**19)


PEAK = """
import sys
from pathlib import Path
from ftexp.config import Source
from ftexp.data import reader
from ftexp.errors import DataError
try:
    print(len(list(reader.records(Path(sys.argv[1]), Source.file))))
except DataError as error:
    print(error)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from /proc; run the tests on Linux"
)
@pytest.mark.parametrize(
    ("name", "head", "unit"),
    [("a.jsonl", b'{"a": "', b"x"), ("b.csv", b'a,b\n1,"', b"x\n"), ("c.json", b'[{"a": "', b"x")],
)
def test_memory_is_bounded_by_the_longest_line(tmp_path, name, head, unit):
    """One record of 150 MB, which parsed whole takes more than 300 MB."""
    with (tmp_path / name).open("wb") as out:
        out.write(head)
        for _ in range(150):
            out.write(unit * (2**20 // len(unit)))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    told, peak = done.stdout.splitlines()
    assert "at most 16 MiB" in told
    assert int(peak) < 160 * 1024  # KiB


TABLE = files.parquet({"prompt": ["a", "b"] * 20, "completion": ["x", "y"] * 20})
SEEDS = [content for _, content in CASES.values() if len(content) < 400] + [TABLE]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_read_or_refused_without_a_traceback(tmp_path_factory, data):
    """Bad files with bytes changed, put in and taken out."""
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    ending = data.draw(st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet"]))
    told = files.told(tmp_path_factory.mktemp("f"), ending, bytes(content))
    assert told.startswith(("DIR/rows", "read: "))


def odd_columns():
    """Yield columns of 300 rows that Python has no value for from row 298 on, their type and what is told of them."""
    import pyarrow

    field = pyarrow.field("a", pyarrow.int64())
    none, twice = pyarrow.nulls(297, pyarrow.struct([field] * 2)), pyarrow.array([1, 2, 3])
    twice = pyarrow.StructArray.from_arrays([twice] * 2, fields=[field] * 2)
    yield pyarrow.concat_arrays([none, twice]), "struct<a: int64, a: int64>", ".* duplicate field names"
    late = [None] * 297 + [4_000_000] * 3  # in the year 12921
    yield pyarrow.array(late, pyarrow.date32()), "date32[day]", "date value out of range"
    yield pyarrow.array(late, pyarrow.timestamp("ms", tz="Mars/Base")), "timestamp[ms, tz=Mars/Base]", "."


@pytest.mark.parametrize(("column", "kind", "told"), odd_columns(), ids=["equal fields", "late date", "unknown zone"])
def test_column_that_python_cannot_hold_is_named(tmp_path, column, kind, told):
    """Also where nothing reads it."""
    content = files.parquet({"prompt": ["a"] * 300, "odd": column})
    kind = re.escape(f"a.parquet:298: column 'odd' of type {kind} cannot be read: ")
    with pytest.raises(DataError, match=f"{kind}{told}.*; take the column out, or write it as text in UTF-8$"):
        read(tmp_path / "a.parquet", content)
