"""Sweeps of the tiny model through the command line."""

import hashlib
import math

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
    assert {"0", "1", "multirun.yaml", "sweep.json", "study.journal"} <= {p.name for p in folder.iterdir()}
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
    code, _, err = cli("lora.r=2,4", *SWEEP, "-m")
    assert code == 0
    assert "0 of 2 trials to do" in err
    assert (folder / "0" / "trial.json").stat().st_mtime_ns == stamp
    assert adapters(folder) == before


def test_other_points_under_the_same_name_are_refused(cli, tmp_path):
    cli("lora.r=2,4", *SWEEP, "-m")
    before = adapters(tmp_path / "outputs" / "sweeps" / "s")
    code, _, err = cli("lora.r=2,8", *SWEEP, "-m")
    assert code == 2
    assert "begun with another search space: space lora.r: 2,4 -> 2,8" in err
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


def test_search_has_exactly_its_trials_and_more_only_when_asked(cli, tmp_path):
    given = [
        "trainer.lr=tag(log,interval(1e-4,1e-1))",
        "sweep.sampler=tpe",
        *[t for t in SWEEP if ".lr=" not in t],
        "eval=loss",
    ]
    for total in (3, 3, 5):
        code, _, err = cli(*given, f"sweep.n_trials={total}")  # -m is added by itself
        assert code == 0, err
        folder = tmp_path / "outputs" / "sweeps" / "s"
        rates = [read_json(p)["config"]["trainer.lr"] for p in sorted(folder.glob("*/trial.json"))]
        assert len(set(rates)) == total
    assert "2 of 5 trials to do" in err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sweep.sampler=tpe"], "sweep.n_trials must be set with sweep.sampler=tpe"),
        (["sweep.n_trials=3"], "a grid has the points it has"),
        (["sweep.sampler=nope"], "expected one of [grid, random, tpe, gp, qmc, nsga2]"),
        (["sweep.replicates=0"], "sweep.replicates must be between 1 and 100, got 0"),
        (["sweep.workrs=2"], "unknown key sweep.workrs in sweep.workrs=2; did you mean sweep.workers?"),
        (["sweep=rnk"], "sweep must be one of alpha_policy, quality_vs_memory, rank, "),
        (
            ["sweep.sampler=tpe", "sweep.n_trials=2", "sweep.sampler_args.nope=1"],
            "sweep.sampler_args is refused by TPESampler",
        ),
        (["sweep.storage=sqlite:///x.db", "sweep.workers=2"], "SQLite hands one trial to two workers"),
    ],
)
def test_bad_sweep_is_refused_before_it_starts(cli, tmp_path, given, message):
    code, _, err = cli("lora.r=2,4", *SWEEP, *given, "-m")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "outputs" / "sweeps" / "s" / "sweep.json").exists()


def test_second_supervisor_is_refused(cli, tmp_path):
    import fcntl

    folder = tmp_path / "outputs" / "sweeps" / "s"
    folder.mkdir(parents=True)
    with (folder / "supervisor.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("4711")
        held.flush()
        code, _, err = cli("lora.r=2,4", *SWEEP, "-m")
    assert code == 4
    assert "name=s is being run by process 4711" in err


def test_replicates_run_over_seeds(cli, tmp_path):
    code, _, err = cli("lora.r=2,4", *SWEEP, "sweep.replicates=2", "eval=loss", "-m")
    assert code == 0, err
    folder = tmp_path / "outputs" / "sweeps" / "s"
    ran = [read_json(folder / str(n) / "trial.json")["config"] for n in range(4)]
    assert [(c["lora.r"], c["seed"]) for c in ran] == [(2, 0), (2, 1), (4, 0), (4, 1)]


def test_pruned_trial_keeps_its_adapter_and_reason(cli, tmp_path):
    """The last of five trials has a useless learning rate; the median pruner stops it at its first rung."""
    code, _, err = cli(
        "trainer.lr=5e-2,4e-2,3e-2,2e-2,1e-9", *[t for t in SWEEP if ".lr=" not in t], "sweep.pruner=median", "-m"
    )
    assert code == 0, err
    last = tmp_path / "outputs" / "sweeps" / "s" / "4"
    assert read_json(last / "trial.json")["state"] == "pruned"
    assert read_json(last / "trial.json")["error"].startswith("pruned at step 2: valid/loss ")
    assert (last / "adapter" / "adapter_model.safetensors").exists()
    assert "trial 4 pruned" in err


def test_memory_that_runs_out_halves_the_forward_pass_and_keeps_the_effective_batch(cli, tmp_path, monkeypatch):
    from ftexp.train import sft

    honest = sft.token_mean

    def small_only(model, inputs, tokens):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(model, inputs, tokens)

    monkeypatch.setattr(sft, "token_mean", small_only)
    code, _, err = cli("lora.r=2", *SWEEP, "trainer.batch=8", "-m")
    assert code == 0, err
    kept = read_json(tmp_path / "outputs/sweeps/s/0/trial.json")
    assert kept["state"] == "complete"
    assert kept["out_of_memory"] == [{"batch": 4, "accumulation": 2}, {"batch": 2, "accumulation": 4}]


def test_time_that_runs_out_ends_the_trial(cli, tmp_path):
    code, _, err = cli("lora.r=2", *SWEEP, "sweep.timeout_minutes=1e-6", "-m")
    assert code == 5
    assert read_json(tmp_path / "outputs/sweeps/s/0/trial.json")["error"].startswith("ran out of time at step 1 of 4")


@pytest.mark.slow
def test_workers_give_the_same_adapters_as_one_process(cli, tmp_path):
    cli("lora.r=2,4,8", *SWEEP, "-m")
    inline = adapters(tmp_path / "outputs" / "sweeps" / "s")
    code, _, err = cli("lora.r=2,4,8", *[t if t != "name=s" else "name=w" for t in SWEEP], "sweep.workers=2", "-m")
    assert code == 0, err
    assert adapters(tmp_path / "outputs" / "sweeps" / "w") == inline
    assert len(inline) == 3


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
