"""The verb: what it prints, for people and scripts, and how it ends."""

import json
import sys

import pytest
from conftest import TINY

from ftexp import doctor, model, probe
from ftexp.probe import Finding, State


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["ftexp doctor", *argv])
        code = doctor.main()
        return code, *capsys.readouterr()

    run.folder = tmp_path
    return run


def test_a_line_for_each_probe_and_nothing_is_written(told):
    code, out, err = told(*TINY, "lora.r=8")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines] == ["ok"] * 10
    assert {line[1] for line in lines} == {"versions", "disk", "folders", "tracking", "device", "supervision",
                                           "accumulation", "neftune", "padding", "packing"}  # fmt: skip
    assert not list(told.folder.iterdir())


def test_a_sweep_is_probed_once_for_each_model_and_data(told, monkeypatch):
    asked = []
    monkeypatch.setattr(probe, "every", lambda run, *more: asked.append((run.data.seed, *more[1:])) or [])
    code, out, err = told(*TINY, "lora.r=2,4", "data.seed=0,1", "sweep.replicates=3", "-m")
    assert code == 0, err
    assert asked == [(0, 12, 1), (1, 12, 1)]


def test_failure_ends_in_4_and_json_says_which(told, monkeypatch):
    found = [Finding("disk", State.ok, "9 GiB"), Finding("neftune", State.fail, "1 hooks left", "pin versions")]
    monkeypatch.setattr(probe, "every", lambda *_: found)
    code, out, _ = told(*TINY)
    assert code == 4
    assert out.splitlines() == ["ok    disk          9 GiB", "FAIL  neftune       1 hooks left -> pin versions"]
    code, out, _ = told(*TINY, "--json")
    assert code == 4
    kept = json.loads(out)
    assert kept["ok"] is False
    assert [p["state"] for p in kept["probes"]["tiny on yoda"]] == ["ok", "FAIL"]


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [(["lora.rank=8"], 2, "ftexp calls it lora.r"), (["--cfg", "job"], 2, "doctor takes overrides"),
     ([*TINY, "data.max_length=16"], 3, "at most data.max_length=16 tokens"), (["lora.r=0,2", "-m"], 2, "lora.r must be"),
     ([*TINY, "lora.r=2,4", "lora.extra.nope=1", "-m"], 2, "lora.extra is refused")],
)  # fmt: skip
def test_what_a_run_would_refuse_is_refused_alike(told, monkeypatch, given, code, message):
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("a model was loaded"))
    got, out, err = told(*given)
    assert (got, out) == (code, "")
    assert message in err


def test_a_classifier_is_probed(told):
    code, out, err = told("model=tiny", "model.dtype=float32", "data=genres", "data.rows=120", "data.valid=24",
                          "trainer=classify", "data.max_length=256", "track=none")  # fmt: skip
    assert code == 0, out + err
    assert "no token is supervised" in out
