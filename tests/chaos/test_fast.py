"""The fast part of `make chaos`: a few blows at a training and a sweep, and what the table does with figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ftexp.files import write_json

HERE = Path(__file__).parent


def script(name, *words):
    done = subprocess.run([sys.executable, str(HERE / name), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_training_goes_on_after_each_kill_and_ends_with_the_same_bits(tmp_path):
    told = script("kills.py", tmp_path / "k", 4)
    assert told["kills"] == told["resumable"] == 4
    assert told["redone"]["most"] <= 1
    assert told["bit_equal"] == told["trainings"] >= 1


@pytest.mark.slow
def test_sweep_under_four_kinds_of_fault_ends_as_a_calm_one(tmp_path):
    """A worker that looks dead, a damaged checkpoint, a torn record and deleted files; all kinds are in `make chaos`."""
    kinds = "worker_stopped,checkpoint_damaged,record_torn,files_deleted"
    told = script("storm.py", tmp_path / "s", 4, 2, 0, kinds)
    assert told["problems"] == []
    assert told["faults"] == len(told["kinds"]) == 4
    assert (told["lost"], told["doubled"], told["points_lost"], told["points_doubled"]) == (0, 0, 0, 0)
    assert told["bit_identical"] == told["trials"] >= 2
    assert told["points"] > 0
    assert told["sees_a_changed_byte"]


@pytest.fixture
def table(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(HERE))
    import table

    monkeypatch.setattr(table, "KEPT", tmp_path / "results.json")
    return table


def test_table_is_whole_and_shows_what_is_missed_stale_or_not_measured(table, monkeypatch, capsys):
    assert list(table.FIGURES) == [f"R{n}" for n in range(1, 19)]
    fine = {"told": "x", "passed": True, "code": table.facts.code()}
    write_json(table.KEPT, dict.fromkeys(table.FIGURES, fine))
    monkeypatch.setattr(sys, "argv", ["table.py", "--show"])
    assert table.main() == 0
    for broken in ({"passed": False}, {"code": "older"}, None):
        write_json(table.KEPT, {name: fine | (broken or {}) for name in table.FIGURES if broken or name != "R9"})
        assert table.main() == 1
    told = capsys.readouterr().out
    assert "MISSED" in told and "stale" in told and "not measured" in told


STORM = {"faults": 300, "kinds": {str(n): 1 for n in range(12)}, "trials": 60, "bit_identical": 60, "points": 9, "problems": [],
         "sees_a_changed_byte": True}  # fmt: skip


@pytest.mark.parametrize(
    ("broken", "passed"),
    [({}, True), ({"faults": 299}, False), ({"lost": 1}, False), ({"doubled": 1}, False), ({"bit_identical": 59}, False),
     ({"points_lost": 1}, False), ({"problems": ["x"]}, False), ({"kinds": {"a": 300}}, False), ({"sees_a_changed_byte": False}, False)],
)  # fmt: skip
def test_storm_is_judged_by_each_of_its_figures(table, monkeypatch, broken, passed):
    monkeypatch.setattr(table, "script", lambda *_: STORM | broken)
    assert table.storm([])[1][1] == passed


def test_pieces_of_one_code_add_up(table, monkeypatch):
    monkeypatch.setattr(table, "script", lambda *_: STORM | {"faults": 150})
    assert table.storm([STORM | {"faults": 150}])[1] == (
        "300 faults of 12 kinds, 0 lost, 0 doubled, 120 of 120 bit-identical; of 18 points 0 lost, 0 doubled",
        True,
    )
