"""Runs found by folder or id, and their configs built again."""

import shutil
from pathlib import Path

import pytest

from ftexp import config, experiment, handed, runs
from ftexp.errors import ConfigError, MachineError
from ftexp.files import read_json, write_json


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Three runs in `outputs/`, with ids of a store."""
    monkeypatch.chdir(tmp_path)
    for where, run_id in (("runs/a", "aaaa1111bbbb"), ("sweeps/s/0", "aaaa1111cccc"), ("sweeps/s/1", None)):
        write_json(
            tmp_path / "outputs" / where / "trial.json", {"mlflow_run": run_id, "state": "complete", "config": {}}
        )
    return tmp_path


def test_run_is_found_by_folder_and_by_the_beginning_of_its_id(kept):
    assert runs.find("outputs/runs/a").trial["mlflow_run"] == "aaaa1111bbbb"
    assert runs.find("aaaa1111b").folder.name == "a"
    assert runs.find("aaaa1111cccc").name == "s/0"


@pytest.mark.parametrize(("target", "told"), [("aaaa1111", "2 runs"), ("ffff0000", "no run"), ("aaaa", "no run")])
def test_doubtful_id_is_refused(kept, target, told):
    with pytest.raises(MachineError, match=f"{target}: must be the folder of a run, or an MLflow run id; {told}"):
        runs.find(target)


@pytest.mark.parametrize(
    "given",
    [[], ["lora=dora", "lora.targets=[q_proj,v_proj]", "data.rows=50"], ["++lora.extra.use_rslora=true", "quant=nf4"],
     ["eval=loss", "trainer.checkpoint_minutes=null", "objectives=[valid/loss,cost/seconds]"]],
)  # fmt: skip
def test_config_is_built_again_from_what_a_trial_keeps(composed, given):
    run = composed(*given)
    again = config.rebuild(experiment.identity(run))
    assert experiment.identity(again) == experiment.identity(run)


def test_config_of_another_version_is_refused(composed):
    told = experiment.identity(composed())
    with pytest.raises(ConfigError, match=r"gone"):
        config.rebuild(told | {"lora.gone": 1})
    with pytest.raises(ConfigError, match=r"lora\.r must be a rank"):
        config.rebuild(told | {"lora.r": 0})


def test_torn_last_point_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "tra')
    assert runs.Kept(tmp_path, {}).points() == [{"step": 1, "train/loss": 2.0}]


def test_a_name_that_is_not_there_is_answered_with_those_that_are(kept):
    write_json(kept / "outputs/sweeps/sums/sweep.json", {})
    there = r"; there are: sweeps sums; runs a$"
    with pytest.raises(
        MachineError, match=rf"^smus: must be the folder of a sweep or a run.*did you mean sums\?{there}"
    ):
        runs.shown("smus")
    with pytest.raises(MachineError, match=rf"no run of this id in outputs{there}"):
        runs.find("zzzz")
    with pytest.raises(MachineError, match="2 runs of this id in outputs$"):
        runs.find("aaaa1111")
    for n in range(30):
        write_json(kept / f"outputs/runs/{n:02}/trial.json", {})
    assert runs.there("zzzz").endswith("18, 19, 11 more")


def test_a_sweep_where_a_run_is_wanted_is_told_as_one(kept):
    write_json(kept / "outputs/sweeps/s/sweep.json", {})
    with pytest.raises(MachineError, match="^s: must be a run, this is a sweep; name one of its trials, as s/0$"):
        runs.find("s")
    write_json(kept / "outputs/sweeps/none/sweep.json", {})
    with pytest.raises(MachineError, match="this is a sweep; name one of its trials, none has begun$"):
        runs.find("none")


def test_a_name_of_two_is_refused_and_each_is_found_by_its_folder(kept):
    """`generate` took the sweep, `diff` the run, and `report` whichever lay nearer."""
    write_json(kept / "outputs/sweeps/s/sweep.json", {})
    write_json(kept / "outputs/runs/s/trial.json", {"config": {}, "state": "complete"})
    told = "^s: must be one sweep or run, there are {}outputs/sweeps/s and outputs/runs/s; give one of these folders$"
    for find in (runs.find, runs.shown, runs.place, handed.find):
        with pytest.raises(MachineError, match=told.format("")):
            find("s")
    with pytest.raises(MachineError, match="^model.path=s: must be one sweep or run, there are "):
        handed.stage("model.path", "s", ())
    assert runs.place("s", "sweep.json") == runs.shown("outputs/sweeps/s") == runs.OUTPUTS / "sweeps/s"
    assert runs.find("outputs/runs/s").folder == handed.find("outputs/runs/s").folder == runs.OUTPUTS / "runs/s"
    assert runs.find("s/1").name == "s/1"
    write_json(kept / "s/sweep.json", {})
    with pytest.raises(MachineError, match=told.format(f"{kept}/s and ")):
        runs.shown("s")
    assert runs.shown(f"{kept}/s") == kept / "s"


def test_sweeps_that_lie_elsewhere_are_known_by_name_until_they_are_gone(kept, capsys):
    away = kept.parent / f"{kept.name}-away"
    for folder in (away / "t", kept / "mine", kept / "outputs/sweeps/s"):
        write_json(
            folder / "0" / "trial.json", {"mlflow_run": f"bbbb{folder.name:_<8}", "state": "complete", "config": {}}
        )
        write_json(folder / "sweep.json", {})
        runs.keep(folder, folder.name)
        runs.keep(folder, folder.name)  # when it goes on
    assert runs.elsewhere() == {away / "t": "t", Path("mine"): "mine"}
    assert set(runs.sweeps().values()) == {"s", "t", "mine"}
    assert runs.shown("t") == away / "t" and runs.find("t/0").folder == away / "t/0"
    assert runs.find("bbbbt___").folder == away / "t/0" and runs.find("bbbbmine").folder == Path("mine/0")
    assert runs.there("x").endswith("there are: sweeps mine, s, t; runs a")
    write_json(kept / "outputs/sweeps/t/sweep.json", {})
    with pytest.raises(MachineError, match=f"^t: must be one .* are outputs/sweeps/t and {away}/t; give one"):
        runs.shown("t")
    shutil.rmtree(away)
    assert set(runs.elsewhere().values()) == {"mine"}
    write_json(kept / "other/sweep.json", {})
    runs.keep(kept / "other", "o")
    assert read_json(kept / "outputs/sweeps.json") == {"mine": "mine", "other": "o"}
    assert capsys.readouterr().err == ""


def test_list_that_cannot_be_written_costs_a_warning(kept, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_json", full)
    runs.keep(kept / "mine", "m")
    told = f"outputs/sweeps.json: cannot be written: No space left on device; sweep m is found by its folder alone, {kept}/mine"
    assert told in capsys.readouterr().err


def test_runs_and_sweeps_are_found_by_name(kept):
    assert runs.find("a").folder == runs.find("outputs/runs/a").folder
    assert runs.find("s/1").folder == runs.find("outputs/sweeps/s/1").folder
    write_json(kept / "outputs/sweeps/s/sweep.json", {})
    assert runs.place("s", "sweep.json") == runs.OUTPUTS / "sweeps/s"
    assert str(runs.place("nowhere", "sweep.json")) == "nowhere"
