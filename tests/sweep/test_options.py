import ast
from dataclasses import fields
from pathlib import Path

import pytest

from ftexp import overrides
from ftexp.errors import ConfigError
from ftexp.sweep import options
from ftexp.sweep.options import Options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_trials": 0}, r"sweep\.n_trials must be 1 to 100000, got 0"),
        ({"replicates": 0}, r"sweep\.replicates must be between 1 and 100, got 0"),
        ({"workers": -1}, r"sweep\.workers must be between 0 and 1024, got -1"),
        ({"max_retries": -1}, r"sweep\.max_retries must be between 0 and 100"),
        ({"max_failures": 0}, r"sweep\.max_failures must be null or at least 1, got 0"),
        ({"timeout_minutes": 0.0}, r"sweep\.timeout_minutes must be null or above 0"),
        ({"seed": -1}, r"sweep\.seed must be between 0"),
        ({"storage": "sqlite:///x.db", "join": True}, r"with sweep\.join=true: SQLite hands one trial to two workers"),
        ({"storage": "sqlite:///x.db", "workers": 2}, r"SQLite hands one trial to two workers"),
    ],
)
def test_bad_option_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Options(**given)


def test_command_line_knows_every_option():
    assert {f.name for f in fields(Options) if not f.name.startswith("_")} == set(overrides.SWEEP_KEYS)


def test_every_option_is_documented():
    tree = ast.parse(Path(options.__file__).read_text())
    for cls in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign | ast.Assign) and not ast.unparse(node).startswith("_"):
                assert isinstance(after, ast.Expr), f"{cls.name}: line {node.lineno}"
