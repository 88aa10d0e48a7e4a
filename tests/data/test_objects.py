"""Rows from Python: written as they are, or refused by row and column."""

import json
import math

import pytest

from ftexp import data
from ftexp.config import Data, Source
from ftexp.data import objects, rows
from ftexp.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path / "cache"))


RECORDS = [{"prompt": t, "completion": str(n)} for n, t in enumerate(("NA", "a\nb", "한국어 {x}", 'q"\\', "a\u2028b"))]


def tables():
    import datasets
    import pandas

    return [RECORDS, iter(RECORDS), pandas.DataFrame(RECORDS), datasets.Dataset.from_list(RECORDS)]


def test_equal_rows_of_any_kind_are_one_file_and_read_as_they_were(tmp_path):
    paths = {objects.write(each) for each in tables()}
    assert len(paths) == 1
    read = rows.read(Data(kind=Source.jsonl, path=str(paths.pop())))
    assert [(row.prompt, row.completion) for row in read] == [(r["prompt"], r["completion"]) for r in RECORDS]
    assert [p.suffix for p in (tmp_path / "cache" / "rows").iterdir()] == [".jsonl"]


def test_other_rows_are_another_file():
    assert objects.write(RECORDS) != objects.write(RECORDS[::-1])


def test_numbers_and_missing_values_of_pandas():
    import numpy
    import pandas

    frame = pandas.DataFrame({"text": ["a", "b"], "labels": numpy.array([1, 2]), "gone": [math.nan, "x"]})
    frame["none"] = pandas.array([None, 3], dtype="Int64")
    kept = [json.loads(line) for line in objects.write(frame).read_text().splitlines()]
    assert kept == [
        {"text": "a", "labels": 1, "gone": None, "none": None},
        {"text": "b", "labels": 2, "gone": "x", "none": 3},
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "rows: must have rows, got none"),
        ("prompt", "rows: must be a DataFrame, .*, got str"),
        ({"prompt": ["a"]}, "rows: must be a DataFrame, .*, got dict"),
        (5, "rows: must be a DataFrame, .*, got int"),
        ([{"prompt": "a"}, "b"], "row 2: must be a dict of columns, got str"),
        ([{"prompt": "a"}, {"prompt": b"a"}], r"row 2, column 'prompt': must be text, .*, got bytes"),
        ([{"prompt": math.inf}], r"row 1, column 'prompt': must be a finite number, got inf"),
        (
            [{"messages": [{"role": object()}]}],
            r"row 1, column 'messages', column 'role': must be text, .*, got object",
        ),
        ([{1: "a"}], "row 1: column names must be text, got 1"),
        ([{"prompt": "\ud800"}], "row 1: must be text, it holds half of a surrogate pair"),
    ],
)
def test_what_is_no_row_is_named(given, message, tmp_path):
    with pytest.raises(DataError, match=message):
        objects.write(given)
    assert not list((tmp_path / "cache" / "rows").glob("*"))


def test_equal_column_names_are_refused():
    import pandas

    with pytest.raises(DataError, match="column names must differ, got a, a"):
        objects.write(pandas.DataFrame([[1, 2]], columns=["a", "a"]))


def test_set_of_several_tables_is_refused():
    from datasets import Dataset, DatasetDict

    with pytest.raises(DataError, match="got DatasetDict"):
        objects.write(DatasetDict(train=Dataset.from_list(RECORDS)))


def test_overrides_read_them_from_a_cache_of_any_name(composed, tmp_path, monkeypatch):
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path / "it's, a=cache"))
    run = composed(*data.of(RECORDS), "data.valid=2")
    assert [row.prompt for row in rows.read(run.data)] == [r["prompt"] for r in RECORDS]
