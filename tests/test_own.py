"""Functions of a person's own over completions that are there."""

import re

import pytest

from ftexp import own
from ftexp.errors import ConfigError, DataError

ROWS = {"where": ["a:1", "a:2"], "prompt": ["one", "two"], "reference": ["x 1", "y 2"], "prediction": ["1", "3"],
        "base_prediction": ["1", "2"], "nats": [1.0, 1.0]}  # fmt: skip
NUMBER = "import re\ndef number(completion, reference):\n    return completion == re.findall(r'\\d+', reference)[-1]\n"


@pytest.fixture
def file(tmp_path):
    def write(text, name="scores.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_rows_are_scored_and_their_mean_is_beside_that_of_the_base(file):
    made = own.load(f"{file(NUMBER)}:number")
    assert made.values(ROWS) == [1.0, 0.0]
    assert made.scores(ROWS) == {"valid/own": 0.5, "base/own": 1.0}


def test_function_gets_what_it_asks_for_by_name_and_keeps_its_own_defaults(file):
    text = (
        "def f(prompt, completion, most=2, *more, **others):\n    return len(prompt) * 100 + len(completion) * most\n"
    )
    assert own.load(f"{file(text)}:f").values(ROWS) == [302.0, 302.0]


def test_modules_beside_the_file_can_be_imported(file, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    file("def right(a, b):\n    return a in b\n", "mine_beside.py")
    assert own.load(
        f"{file('from mine_beside import right as inner' + chr(10) + 'def f(completion, reference): return inner(completion, reference)')}:f"
    ).values(ROWS) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "name", "rule"),
    [
        (NUMBER, "numbr", r"scores\.py:numbr: must name a function of \S+scores\.py, which has number"),
        ("X = 1\n", "X", "which has none"),
        ("class F:\n    pass\n", "F", "must name a function"),
        ("def f(text):\n    return 1\n", "f", "must take completion, and may take reference and prompt, by these names; it takes text"),
        ("def f(reference):\n    return 1\n", "f", "it takes no completion"),
        ("def f(completion, /):\n    return 1\n", "f", "it takes completion"),
        ("def f(completion:\n", "f", r"scores\.py:1: cannot be run: SyntaxError"),
        ("import re\n\nre.compile('(')\n", "f", r"scores\.py:3: cannot be run: \w+: missing \)"),
        ("f = max\n", "f", r"scores\.py:f: must tell its parameters: no signature found for builtin"),
        ("raise SystemExit(3)\n", "f", r"scores\.py:1: cannot be run: SystemExit: 3"),
    ],
)  # fmt: skip
def test_what_is_no_score_is_refused_with_its_place(file, text, name, rule):
    with pytest.raises(ConfigError, match=rule):
        own.load(f"{file(text)}:{name}")


@pytest.mark.parametrize("given", ["scores.py", "none.py:f", "scores.txt:f", ":f"])
def test_what_is_no_file_of_python_is_refused(file, monkeypatch, tmp_path, given):
    monkeypatch.chdir(tmp_path)
    file(NUMBER), file(NUMBER, "scores.txt")
    with pytest.raises(ConfigError, match=f"^{re.escape(given)}: must be a function of a file"):
        own.load(given)


@pytest.mark.parametrize(
    ("back", "rule"),
    [
        ("None", r"a:1: \S+scores\.py:f must return a finite number, got None on \{'completion': '1'\}"),
        ("'1'", "got '1'"),
        ("float('nan')", "got nan"),
        ("1j", "got 1j"),
        ("10**400", "got 10+ on"),
        ("exit(3)", r"a:1: \S+scores\.py:f failed \(SystemExit: 3\) on"),
        ("1 / 0", r"a:1: \S+scores\.py:f failed \(ZeroDivisionError: division by zero\) on \{'completion': '1'\}"),
    ],
)
def test_row_that_gets_no_number_is_named(file, back, rule):
    with pytest.raises(DataError, match=rule):
        own.load(f"{file('def f(completion):' + chr(10) + '    return ' + back)}:f").values(ROWS)


def test_table_without_completions_is_refused(file):
    made = own.load(f"{file(NUMBER)}:number")
    with pytest.raises(DataError, match=r"needs completions, this table has none: eval\.generate was off"):
        made.scores({name: rows for name, rows in ROWS.items() if name != "prediction"})


def test_numbers_of_numpy_count(file):
    text = "import numpy\ndef f(completion):\n    return numpy.float32(0.25)\ndef g(completion):\n    return numpy.bool_(True)\n"
    assert own.load(f"{file(text)}:f").scores(ROWS)["valid/own"] == 0.25
    assert own.load(f"{file(text)}:g").scores(ROWS)["valid/own"] == 1.0


def test_file_can_hold_dataclasses(file):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
        "def f(completion):\n    return A(2).x\n"
    )
    assert own.load(f"{file(text)}:f").values(ROWS) == [2.0, 2.0]


def test_what_a_file_prints_is_no_data(file, capsys):
    made = own.load(
        f"{file('print(1)' + chr(10) + 'def f(completion):' + chr(10) + '    print(2)' + chr(10) + '    return 1')}:f"
    )
    assert made.values(ROWS) == [1.0, 1.0] and capsys.readouterr() == ("", "1\n2\n2\n")
