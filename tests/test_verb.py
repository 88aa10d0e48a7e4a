"""How a verb ends: one line, an exit code, and no traceback for what a person caused."""

import json
import os
import subprocess
import sys

import made
import pytest

from ftexp import verb
from ftexp.errors import ConfigError, DataError, Preempted, TrialsFailed


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("lora.r must be"), 2, "ftexp: lora.r must be\n"),
        (DataError("x:1"), 3, "ftexp: x:1\n"),
        (TrialsFailed("2 of 3"), 5, "ftexp: 2 of 3\n"),
        (Preempted("asked to leave"), 75, "ftexp: asked to leave; the same command goes on\n"),
        (KeyboardInterrupt(), 130, "ftexp: interrupted; the same command goes on\n"),
    ],
)
def test_what_a_person_caused_is_one_line_and_a_code(error, code, told, capsys):
    assert verb.ended(raising(error)) == code
    assert capsys.readouterr().err == told


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError):
        verb.ended(raising(KeyError("a bug")))
    assert verb.ended(lambda: 7) == 7


def test_a_reader_that_left_is_no_error():
    code = "import sys; from ftexp import verb; sys.exit(verb.ended(lambda: print('x\\n' * 100_000) or 0))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == verb.PIPE


def test_json_has_null_for_what_it_has_no_number_for():
    told = verb.as_json({"a": [1.5, float("nan")], "b": {"c": (float("-inf"), None, "x")}})
    assert json.loads(told, parse_constant=pytest.fail) == {"a": [1.5, None], "b": {"c": [None, None, "x"]}}


def test_no_colour_where_the_output_is_no_terminal(tmp_path):
    made.sweep(tmp_path / "s")
    env = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "NO_COLOR")}
    done = subprocess.run([sys.executable, "-m", "ftexp", "report", "s"], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout and b"\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("asked", [True, False])
def test_no_colour_on_a_terminal_where_it_is_not_wanted(asked):
    code = "from ftexp.progress import console; console.print('[red]x[/red]')"
    env = os.environ | {"TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if asked else {})
    mine, theirs = os.openpty()
    subprocess.run([sys.executable, "-c", code], env=env, stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    assert (b"\x1b[31m" in os.read(mine, 1000)) is not asked
    os.close(mine)


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        (["shwo"], 2, "ftexp: shwo is no verb, did you mean show?\nusage: "),
        (["qqqq"], 2, "ftexp: qqqq is no verb\nusage: "),
        ([], 2, "usage: "),
        (["--help"], 0, "usage: "),
    ],
)
def test_unknown_verb_is_told_above_the_usage(argv, code, told, monkeypatch, capsys):
    from ftexp import __main__ as command

    monkeypatch.setattr(sys, "argv", ["ftexp", *argv])
    assert command.main() == code
    out, err = capsys.readouterr()
    assert (err if code else out).startswith(told)
    assert not (out if code else err)


def test_version(monkeypatch, capsys):
    from ftexp import __main__ as command

    monkeypatch.setattr(sys, "argv", ["ftexp", "--version"])
    assert command.main() == 0
    assert capsys.readouterr().out.startswith("ftexp ")
