"""The verb: what it prints, for people and scripts, and how it ends."""

import json
import sys

import pytest
from conftest import TINY

from ftexp import doctor, experiment, model, probe
from ftexp.config import Method
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


PAIRS = ["data=preference", "data.rows=120", "data.valid=24", "data.max_length=256"]
GIVEN = {
    Method.sft: TINY,
    Method.classify: ["data=genres", "data.rows=120", "data.valid=24", "data.max_length=256"],
    Method.reward: PAIRS,
    Method.dpo: PAIRS,
    Method.rloo: [*TINY, "trainer.reward=judge"],
}
"""Rows, and what else a method needs."""


@pytest.mark.parametrize("kind", Method)
def test_every_method_is_probed(told, composed, kind):
    """Pairs of answers ended in a traceback, and no finding was told."""
    tiny = ["model=tiny", "model.dtype=float32", "track=none"]
    if kind is Method.rloo:
        judge = composed(*tiny, *PAIRS, "trainer=reward", "trainer.steps=1", "trainer.report_steps=0")
        experiment.execute(judge, told.folder / "outputs" / "runs" / "judge", "x")
    code, out, err = told(*tiny, *GIVEN[kind], *([] if kind is Method.sft else [f"trainer={kind.value}"]))
    assert code == 0, out + err
    writes = kind not in (Method.classify, Method.reward)
    lines = {line.split()[1]: line for line in out.splitlines()}
    assert all(line.startswith("ok") for line in lines.values()), out
    assert ("no token is supervised" not in lines["supervision"]) == writes
    assert ("not asked of a" not in lines["padding"]) == writes
    assert ("packing" in lines) == writes


def test_supervision_is_counted_in_both_answers_of_a_pair(composed):
    run = composed("model=tiny", *PAIRS, "trainer=dpo")
    found = probe.supervision(run)
    assert found.told.startswith("192 answers: ")
    assert "100.0% of answers show their end" in found.told
