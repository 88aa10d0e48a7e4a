"""Every trap has its known answer and its twin, and each test that is named is there."""

import ast
from functools import cache
from pathlib import Path

import pytest

from . import traps

TESTS = Path(__file__).resolve().parent.parent


@cache
def defined(file):
    return {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def missing(table):
    """Tests that are named and not there, and traps that lack an answer or a twin."""
    named = {n: (trap, [*answers, *twins]) for n, (trap, answers, twins) in table.items()}
    gone = [
        test for _, tests in named.values() for test in tests if test.split("::")[1] not in defined(test.split("::")[0])
    ]
    bare = [n for n in range(1, 34) if n not in table or not (table[n][1] and table[n][2])]
    return gone, bare


def test_every_trap_has_an_answer_and_a_twin_that_are_there():
    assert missing(traps.TRAPS) == ([], [])
    answers = {test for _, known, _ in traps.TRAPS.values() for test in known}
    twins = {test for _, _, broken in traps.TRAPS.values() for test in broken}
    assert not answers & twins


@pytest.mark.parametrize("broken", ["gone", "renamed", "no twin"])
def test_sabotage_a_test_that_is_gone_is_seen(broken):
    trap, answers, twins = traps.TRAPS[7]
    changed = {
        "gone": None,
        "renamed": (trap, ["train/test_lengths.py::test_renamed"], twins),
        "no twin": (trap, answers, []),
    }
    table = {n: t for n, t in (traps.TRAPS | {7: changed[broken]}).items() if t}
    assert missing(table) != ([], [])
