"""Sweeps of the tiny model through the command line."""

import hashlib
import math
import shutil

import pytest
from conftest import TINY
from hydra.core.plugins import Plugins

from ftexp.files import read_json
from ftexp.sweep import plugin

SWEEP = [*TINY, "track=none", "name=s"]


def adapters(folder):
    return {p.parts[-3]: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*/adapter/*.safetensors")}


def test_hydra_finds_the_sweeper_under_the_name_it_wants():
    plugin.register()
    assert Plugins.instance().class_name_to_class[plugin.TARGET] is plugin.Sweeper


def test_sweep_runs_exactly_its_points(cli, tmp_path):
    code, out, err = cli("lora.r=2,4", *SWEEP, "-m")
    assert code == 0, err
    folder = tmp_path / "outputs" / "sweeps" / "s"
    trials = [read_json(folder / str(n) / "trial.json") for n in range(2)]
    assert [t["config"]["lora.r"] for t in trials] == [2, 4]
    assert [t["config"]["lora.alpha"] for t in trials] == [4, 8]
    assert [t["label"] for t in trials] == ["lora.r=2", "lora.r=4"]
    assert sorted(p.name for p in folder.iterdir()) == ["0", "1", "multirun.yaml", "sweep.json"]
    assert (folder / "1" / ".hydra" / "overrides.yaml").exists()
    assert "base" in out
    assert "best" in out


def test_trial_of_a_sweep_equals_the_single_run(cli, tmp_path):
    cli("lora.r=2,4", *SWEEP, "-m")
    cli("lora.r=4", *SWEEP)
    swept = adapters(tmp_path / "outputs" / "sweeps" / "s")["1"]
    single = tmp_path / "outputs" / "runs" / "s" / "adapter" / "adapter_model.safetensors"
    assert hashlib.sha256(single.read_bytes()).hexdigest() == swept


def test_one_bad_point_stops_the_sweep_before_it_starts(cli, tmp_path):
    code, _, err = cli("lora.r=8,0", "-m")
    assert code == 2
    assert "lora.r must be a rank between 1 and 4096, got 0 (trial 1" in err
    assert not (tmp_path / "outputs").exists()


def test_diverged_trial_is_recorded_and_the_others_go_on(cli, tmp_path, monkeypatch):
    from ftexp.train import sft

    honest, calls = sft.token_mean, []

    def poisoned(*args):
        calls.append(1)
        return honest(*args) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(sft, "token_mean", poisoned)
    code, out, err = cli("lora.r=2,4", *SWEEP, "-m")
    trials = [read_json(tmp_path / "outputs/sweeps/s" / str(n) / "trial.json") for n in range(2)]
    assert [t["state"] for t in trials] == ["failed", "complete"]
    assert trials[0]["error"].startswith("diverged at step 2: ")
    assert code == 5
    assert "1 of 2 trials failed: 0" in err
    assert "diverged at step 2" in out
    assert "1 best" in out


def test_crash_in_a_trial_is_recorded_and_the_others_go_on(cli, tmp_path, monkeypatch):
    from ftexp import experiment

    honest = experiment._execute

    def crash(run, *rest):
        if run.lora.r == 2:
            raise RuntimeError("a bug")
        return honest(run, *rest)

    monkeypatch.setattr(experiment, "_execute", crash)
    code, out, err = cli("lora.r=2,4", *SWEEP, "-m")
    assert code == 5
    assert "1 of 2 trials failed: 0" in err
    assert read_json(tmp_path / "outputs/sweeps/s/0/trial.json")["error"] == "RuntimeError: a bug"
    assert read_json(tmp_path / "outputs/sweeps/s/1/trial.json")["state"] == "complete"


def test_same_command_runs_only_what_is_missing(cli, tmp_path):
    folder = tmp_path / "outputs" / "sweeps" / "s"
    cli("lora.r=2,4", *SWEEP, "-m")
    before = adapters(folder)
    stamp = (folder / "0" / "trial.json").stat().st_mtime_ns
    shutil.rmtree(folder / "1")
    code, _, err = cli("lora.r=2,4", *SWEEP, "-m")
    assert code == 0
    assert "complete already" in err
    assert (folder / "0" / "trial.json").stat().st_mtime_ns == stamp
    assert adapters(folder) == before


def test_other_points_under_the_same_name_are_refused(cli, tmp_path):
    cli("lora.r=2,4", *SWEEP, "-m")
    before = adapters(tmp_path / "outputs" / "sweeps" / "s")
    code, _, err = cli("lora.r=2,8", *SWEEP, "-m")
    assert code == 2
    assert "lora.r 4 -> 8" in err
    assert adapters(tmp_path / "outputs" / "sweeps" / "s") == before


def test_parent_and_children_in_mlflow(cli, tmp_path):
    from ftexp import track
    from ftexp.config import Track

    code, _, err = cli("lora.r=2,4", *TINY, "name=s", f"track.uri=sqlite:///{tmp_path}/ml.db", "-m")
    assert code == 0, err
    client, experiment = track.store(Track(uri=f"sqlite:///{tmp_path}/ml.db"))
    runs = {r.info.run_name: r for r in client.search_runs([experiment])}
    assert set(runs) == {"s", "lora.r=2", "lora.r=4"}
    parent = runs.pop("s")
    assert {r.data.tags["mlflow.parentRunId"] for r in runs.values()} == {parent.info.run_id}
    for run in runs.values():
        assert {"valid/loss", "base/loss", "train/loss", "valid/exact_match"} <= set(run.data.metrics)
        assert len(client.get_metric_history(run.info.run_id, "valid/loss")) == 2  # one rung, and the end
        assert {f.path for f in client.list_artifacts(run.info.run_id)} == {
            "adapter",
            "examples.json",
            "examples.parquet",
        }


@pytest.mark.slow
def test_sweep_of_the_embedded_model_learns(cli, tmp_path):
    """Four steps of the real demo: the held-out loss falls by a third at either rank."""
    code, _, err = cli(
        "lora.r=8,64", "trainer.steps=4", "trainer.batch=4", "data.valid=8", "eval=loss", "track=none", "name=e", "-m"
    )
    assert code == 0, err
    for n in range(2):
        scores = read_json(tmp_path / "outputs" / "sweeps" / "e" / str(n) / "trial.json")["scores"]
        assert 2.0 < scores["base/loss"] < 2.8
        assert scores["valid/loss"] < scores["base/loss"] * 0.67
