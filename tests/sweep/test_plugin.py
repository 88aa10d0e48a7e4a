"""Sweeps of the tiny model through the command line."""

import hashlib
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from conftest import TINY, UNWRITTEN
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from ftexp import config, data, experiment, runs, track
from ftexp.config import Track
from ftexp.errors import ConfigError
from ftexp.files import read_json, write_json
from ftexp.sweep import frozen, plugin, space, study, worker
from ftexp.sweep.options import Options, Pruner, Sampler

SWEEP = [*TINY, "track=none", "name=s"]
UNWRITTEN_SWEEP = [*UNWRITTEN, "track=none", "name=s"]


def adapters(folder):
    return {p.parts[-3]: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*/adapter/*.safetensors")}


def record_of(folder):
    """List what became of the tickets of a sweep."""
    return study.counted(worker.open_study(frozen.load(folder)))


def _only(count, honest):
    """Claim so many times; the launch is interrupted where it asks for one more."""
    left = iter(range(count))

    def claimed(*given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return honest(*given)

    return claimed


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
    assert f"1 of 2 trials failed: 0 ({trials[0]['error']}); see " in err
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


def test_brackets_of_hyperband_are_frozen_and_killed_sweeps_end_as_undisturbed_ones(cli, tmp_path):
    """Those of a second process were laid out by what was complete then: other trials were stopped."""
    command = [*UNWRITTEN, "track=none", "trainer.report_steps=1", "sweep.pruner=hyperband", "trainer.lr=1e-2,1e-4",
               "trainer.steps=3,12", "-m"]  # fmt: skip
    cli(*command, "name=calm")
    calm, folder = tmp_path / "outputs/sweeps/calm", tmp_path / "outputs/sweeps/killed"
    assert read_json(calm / frozen.FILE)["longest"] == 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_claimed", _only(1, worker._claimed))
        cli(*command, "name=killed")
    assert [t.state.name for t in record_of(folder)] == ["COMPLETE", "WAITING", "WAITING", "WAITING"]
    cli(*command, "name=killed")
    assert [t.state for t in record_of(folder)] == [t.state for t in record_of(calm)]
    assert {t.state.name for t in record_of(calm)} == {"COMPLETE", "PRUNED"}


def test_longest_trial_is_counted_in_steps(composed):
    options = Options(pruner=Pruner.hyperband)
    runs = [
        composed("model=tiny", "data.rows=64", "trainer.batch=8", "trainer.steps=null", f"trainer.epochs={n}")
        for n in (2, 3)
    ]
    rows = len(data.load(runs[0].data).train)
    assert plugin.longest(runs, options) == 3 * math.ceil(rows / 8)
    assert plugin.longest([composed("model=tiny", "trainer.steps=7")], options) == 7
    assert plugin.longest(runs, Options()) == 0


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
    shared, one = dict(parent.data.params), dict(runs["lora.r=2"].data.params)
    assert (shared.pop("lora.r"), shared.pop("sweep.sampler"), one.pop("lora.r")) == ("2,4", "grid", "2")
    assert {k: v for k, v in one.items() if k in shared} == {k: v for k, v in shared.items() if k in one}
    assert one.keys() - shared.keys() == {"name", "lora.alpha", "trainer.checkpoint_minutes"}
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
        *[t for t in UNWRITTEN_SWEEP if ".lr=" not in t],
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
        (["sweep.n_trials=3"], "needs a sampler that draws, such as sweep.sampler=tpe; a grid has the points it has"),
        (["sweep.sampler=nope"], "expected one of [grid, random, tpe, gp, qmc, nsga2]"),
        (["sweep.replicates=0"], "sweep.replicates must be between 1 and 100, got 0"),
        (["sweep.workrs=2"], "unknown key sweep.workrs in sweep.workrs=2; did you mean sweep.workers?"),
        (["sweep=rnk"], "sweep must be one of accumulation, alpha_policy, effective_rate, "),
        (
            ["sweep.sampler=tpe", "sweep.n_trials=2", "sweep.sampler_args.nope=1"],
            "sweep.sampler_args is refused by TPESampler",
        ),
        (
            ["sweep.sampler=tpe", "sweep.n_trials=2", "sweep.sampler_args.n_ei_candidates=0"],
            "sweep.sampler_args must be keywords that TPESampler can work with, got {n_ei_candidates: 0}: ",
        ),
        (
            ["sweep.pruner=hyperband", "sweep.pruner_args.reduction_factor=1"],
            "sweep.pruner_args must be keywords that HyperbandPruner can work with, got {reduction_factor: 1}: ",
        ),
        (
            ["sweep.sampler=qmc", "sweep.n_trials=2", "sweep.sampler_args.scramble=true"],
            "sweep.sampler_args must be left out with sweep.sampler=qmc, whose points hang on sweep.seed alone, got scr",
        ),
        (
            ["sweep.sampler_args.n_startup_trials=3"],
            "sweep.sampler_args.n_startup_trials would change nothing, got 3: sweep.sampler=grid, which draws nothing",
        ),
        (["sweep.seed=3"], "sweep.seed would change nothing, got 3: sweep.sampler=grid, which draws nothing"),
        (["hydra.sweeper.seed=3"], "sweep.seed would change nothing, got 3: sweep.sampler=grid, which draws nothing"),
        (
            ["sweep.pruner_args.n_startup_trials=3"],
            "sweep.pruner_args.n_startup_trials would change nothing, got 3: sweep.pruner=none",
        ),
        (
            ["sweep.tokens_per_second=9", "sweep.plan_at_most.tflop=1"],
            "sweep.tokens_per_second would change nothing, got 9: no bound on hours or usd in sweep.plan_at_most",
        ),
        (
            ["sweep.tokens_per_second=9", "sweep.usd_per_hour=9", "sweep.plan_at_most.hours=1"],
            "sweep.usd_per_hour would change nothing, got 9: no bound on usd in sweep.plan_at_most",
        ),
        (["sweep.storage=sqlite:///x.db", "sweep.workers=2"], "SQLite hands one trial to two workers"),
        (["sweep.at_most={cost/secnds: 9}"], "sweep.at_most must be among"),
        (["name=a,b"], "name must be one value for the whole sweep, got a,b"),
        (["objectives=[valid/loss],[valid/f1]"], "objectives must be one value for the whole sweep"),
        (
            ["sweep.baselines=[{lora.r: 4}]"],
            "sweep.baselines need a sampler that draws, such as sweep.sampler=tpe; a grid",
        ),
        (
            ["sweep.sampler=tpe", "sweep.n_trials=2", "sweep.baselines=[{lora.r: 3}]"],
            "sweep.baselines: lora.r must be among 2,4, got 3",
        ),
        (
            ["sweep.pruner=asha", "objectives=[valid/loss,cost/memory_gib]"],
            "sweep.pruner=asha needs one objective, got valid/loss, cost/memory_gib",
        ),
        (
            ["sweep.pruner=asha", "trainer.report_steps=0"],
            "sweep.pruner=asha needs trainer.report_steps above 0, got 0",
        ),
    ],
)
def test_bad_sweep_is_refused_before_it_starts(cli, tmp_path, given, message):
    code, _, err = cli("lora.r=2,4", *SWEEP, *given, "-m")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "outputs" / "sweeps" / "s" / "sweep.json").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sweep=rank", "lora=none"], "lora.r must not be searched, its trials would be the same: lora.variant=none"),
        (["trainer.epochs=1,2"], "trainer.epochs must not be searched, its trials would be the same: trainer.steps=20"),
        (["eval=loss", "eval.max_new_tokens=8,9"], "eval.max_new_tokens must not be searched"),
    ],
)
def test_search_without_effect_is_refused_before_it_starts(cli, tmp_path, given, message):
    code, _, err = cli("model=tiny", *given, "track=none", "name=s", "-m")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


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


@pytest.fixture
def sweeps_file(tmp_path_factory, monkeypatch):
    """Return a function that makes a file the `sweeps/` folder of the command."""
    from hydra.core.config_store import ConfigStore

    from ftexp import overrides

    folder = tmp_path_factory.mktemp("sweeps")
    monkeypatch.setattr(overrides, "SWEEPS", folder)

    def write(name, text):
        (folder / f"{name}.yaml").write_text(text)

    yield write
    for path in folder.glob("*.yaml"):
        ConfigStore.instance().repo["sweep"].pop(path.name)


CONDITIONAL = """# Does DoRA need a smaller rank?
# python -m ftexp.run sweep=branches
hydra:
  sweeper:
    params:
      lora: default,dora
      lora.r: {when: {lora: dora}, is: "2,4"}
"""


def test_conditional_values_of_a_sweeps_file(cli, tmp_path, sweeps_file):
    sweeps_file("branches", CONDITIONAL)
    code, _, err = cli("sweep=branches", *UNWRITTEN_SWEEP, "eval=loss")
    assert code == 0, err
    ran = [read_json(tmp_path / f"outputs/sweeps/s/{n}/trial.json") for n in range(3)]
    assert [(t["config"]["lora.variant"], t["config"]["lora.r"]) for t in ran] == [
        ("lora", 16),
        ("dora", 2),
        ("dora", 4),
    ]
    code, _, err = cli(
        "sweep=branches", "lora.r=8", *[t if t != "name=s" else "name=t" for t in UNWRITTEN_SWEEP], "eval=loss"
    )
    assert code == 0, err  # the command line wins over the file, condition and all
    assert "2 of 2 trials to do" in err


@pytest.mark.parametrize("entry", ["{when: {lora: dora}}", "{is: '2,4'}", "{when: dora, is: '2,4'}"])
def test_half_a_condition_is_refused(cli, sweeps_file, entry):
    sweeps_file("branches", CONDITIONAL.replace('{when: {lora: dora}, is: "2,4"}', entry))
    code, _, err = cli("sweep=branches", *SWEEP)
    assert code == 2
    assert "sweep.params.lora.r must be values, or {when: {key: values}, is: values}" in err


@pytest.mark.parametrize("entry", ["[2, 4]", "{when: {lora: dora}, is: [2, 4]}"])
def test_list_of_single_values_is_refused_with_what_is_wanted(cli, sweeps_file, entry):
    sweeps_file("branches", CONDITIONAL.replace('{when: {lora: dora}, is: "2,4"}', entry))
    code, _, err = cli("sweep=branches", *SWEEP)
    assert code == 2
    assert err == 'ftexp: sweep.params.lora.r must be text with commas for several values, "2,4", got [2, 4]\n'


def test_list_of_a_key_that_takes_one_stays_a_value():
    texts, _ = plugin._params({"lora.targets": ["q_proj"], "trainer.extra.betas": [0.9, 0.99]}, [])
    assert texts == ["lora.targets=['q_proj']", "trainer.extra.betas=[0.9, 0.99]"]


def test_same_command_after_max_failures_trains_nothing(cli, tmp_path, monkeypatch):
    def crash(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(experiment, "_execute", crash)
    given = [*UNWRITTEN, "lora.r=2,4,8", "track=none", "name=s", "-m"]
    for _ in range(2):
        code, _, err = cli(*given, "sweep.max_failures=1")
        assert code == 5 and "stopped: 1 trials failed, sweep.max_failures=1" in err
        assert [t.state.name for t in record_of(tmp_path / "outputs/sweeps/s")] == ["FAIL", "WAITING", "WAITING"]
    assert cli(*given, "sweep.max_failures=2")[0] == 5
    assert [t.state.name for t in record_of(tmp_path / "outputs/sweeps/s")] == ["FAIL", "FAIL", "WAITING"]


@pytest.mark.slow
def test_second_launch_helps_when_asked_to(cli, tmp_path):
    """Two commands share one sweep: no trial twice, and the results are those of one command alone."""
    import subprocess
    import sys

    points = "lora.r=1,2,3,4,5,6"
    cli(points, *UNWRITTEN_SWEEP, "eval=loss", "-m")
    calm = adapters(tmp_path / "outputs" / "sweeps" / "s")
    given = [t if t != "name=s" else "name=w" for t in UNWRITTEN_SWEEP]
    command = [sys.executable, "-m", "ftexp.run", points, *given, "eval=loss", "sweep.join=true", "-m"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=240)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert sorted("helping process" in text for text in said) == [False, True]
    assert adapters(tmp_path / "outputs" / "sweeps" / "w") == calm
    assert all("trial" in text for text in said)
    ran = [n for text in said for n in range(6) if f"trial {n} complete" in text]
    assert sorted(ran) == list(range(6))


@pytest.mark.parametrize("killed", [True, False])
def test_who_helped_closes_the_sweep_of_a_launch_that_was_killed(cli, tmp_path, monkeypatch, killed):
    """Its page and its run in MLflow stayed open until the same command was given again."""
    import subprocess
    import sys

    from ftexp.sweep import worker

    uri = f"track.uri=sqlite:///{tmp_path}/m.db"
    given = [t for t in SWEEP if not t.startswith("track")]
    assert cli("lora.r=2,4", *given, uri, "-m")[0] == 0
    folder = tmp_path / "outputs" / "sweeps" / "s"
    sweep = frozen.load(folder)
    if killed:  # a launch that has closed its sweep left no name
        worker.open_study(sweep).set_user_attr(worker.LAUNCH, "1 on elsewhere")
    track.reopen_parent(Track(uri=uri.removeprefix("track.uri=")), sweep.mlflow_run)
    (folder / "report.html").unlink()
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(99)"
    other = subprocess.Popen([sys.executable, "-c", hold, folder / plugin.LOCK], stdout=subprocess.PIPE)
    other.stdout.readline()
    run_left = plugin._run_left

    def helped(*given, **more):
        run_left(*given, **more)
        other.kill()
        other.wait()

    monkeypatch.setattr(plugin, "_run_left", helped)
    code, out, err = cli("lora.r=2,4", *given, uri, "sweep.join=true", "-m")
    assert code == 0, err
    client, _ = track.store(Track(uri=uri.removeprefix("track.uri=")))
    assert client.get_run(sweep.mlflow_run).info.status == ("FINISHED" if killed else "RUNNING")
    assert (folder / "report.html").exists() is killed and ("ranked by" in out) is killed


def test_helper_of_another_space_is_refused(cli, tmp_path):
    import fcntl

    assert cli("lora.r=2,4", *SWEEP, "-m")[0] == 0
    with (tmp_path / "outputs" / "sweeps" / "s" / "supervisor.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, err = cli("lora.r=2,8", *SWEEP, "sweep.join=true", "-m")
    assert code == 2
    assert "begun with another search space" in err


def test_worker_started_after_an_edit_of_the_code_takes_no_trial(cli, tmp_path, monkeypatch):
    """What a worker that is replaced in mid-sweep would import is not what the launch ran."""
    import sys

    from ftexp import facts
    from ftexp.sweep import frozen, study, worker

    assert cli("lora.r=2", *SWEEP, "-m")[0] == 0
    folder = tmp_path / "outputs" / "sweeps" / "s"
    (folder / study.JOURNAL).unlink()
    record = worker.open_study(frozen.load(folder))
    study.queue(record, [{"lora.r": "2"}])
    monkeypatch.setattr(sys, "argv", ["worker", str(folder)])
    monkeypatch.setattr(facts, "code", lambda: "edited")
    assert worker.main() == 4
    assert "the code of ftexp was edited" in record.user_attrs[worker.STOP]
    assert [t.state.name for t in study.counted(record)] == ["WAITING"]


def test_resume_with_other_code_says_so(cli, monkeypatch):
    from ftexp import facts

    assert cli("lora.r=2", *SWEEP, "-m")[0] == 0
    monkeypatch.setattr(facts, "code", lambda: "edited")
    assert "the code of ftexp is not that of the launch" in cli("lora.r=2", *SWEEP, "-m")[2]


def test_dashboard_of_optuna_opens_the_default_store(cli, tmp_path):
    """`optuna-dashboard study.journal` shows the trials with their values."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna_dashboard import wsgi

    assert cli("lora.r=2,4", *UNWRITTEN_SWEEP, "eval=loss", "-m")[0] == 0
    folder = tmp_path / "outputs" / "sweeps" / "s"
    app = wsgi(JournalStorage(JournalFileBackend(str(folder / "study.journal"))))
    studies = ask(app, "/api/studies")["study_summaries"]
    assert [s["study_name"] for s in studies] == ["s"]
    told = ask(app, f"/api/studies/{studies[0]['study_id']}?after=0")["trials"]
    assert [t["state"] for t in told] == ["Complete", "Complete"]
    losses = [read_json(folder / str(n) / "trial.json")["scores"]["valid/loss"] for n in range(2)]
    assert [t["values"] for t in told] == [[pytest.approx(loss)] for loss in losses]


def ask(app, path):
    import io
    import json

    status = []
    path, _, query = path.partition("?")
    told = app(
        {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": query, "wsgi.input": io.BytesIO(),
         "SERVER_NAME": "x", "SERVER_PORT": "80", "wsgi.url_scheme": "http", "wsgi.errors": io.StringIO()},
        lambda line, headers, *_: status.append(line),
    )  # fmt: skip
    body = b"".join(told)
    assert status[0].startswith("200"), body
    return json.loads(body)


def test_replicates_run_over_seeds(cli, tmp_path):
    code, _, err = cli("lora.r=2,4", *UNWRITTEN_SWEEP, "sweep.replicates=2", "eval=loss", "-m")
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

    def small_only(model, inputs, *rest):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(model, inputs, *rest)

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


def test_launch_that_ended_before_its_trials_leaves_nothing_to_the_next(cli, tmp_path):
    """It froze a config of its own, which is not that of the command that is corrected."""
    (tmp_path / "file").touch()
    given = ["lora.r=2", *UNWRITTEN, "eval=loss", "name=s", "-m"]
    code, _, err = cli(*given, "track.uri=sqlite:///file/x.db")
    assert code == 4, err
    code, _, err = cli(*given, "track=none", "trainer.lr=1e-3")
    assert code == 0, err
    assert read_json(tmp_path / "outputs/sweeps/s/0/trial.json")["config"]["trainer.lr"] == 1e-3


def test_search_without_keys_is_refused(cli):
    code, _, err = cli(*SWEEP, "sweep.sampler=tpe", "sweep.n_trials=2", "-m")
    assert code == 2
    assert "sweep.sampler=tpe needs keys to search, got none" in err


def test_sqlite_is_refused_where_gpus_make_several_workers(cli, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    code, _, err = cli("lora.r=2,4", *SWEEP, "sweep.storage=sqlite:///x.db", "-m")
    assert code == 2
    assert "with 2 GPUs, so 2 workers: SQLite hands one trial to two workers" in err


def test_trial_whose_folder_is_gone_runs_again(cli, tmp_path):
    import shutil

    given = ["lora.r=2,4", *UNWRITTEN_SWEEP, "eval=loss", "-m"]
    assert cli(*given)[0] == 0
    folder = tmp_path / "outputs" / "sweeps" / "s"
    before = adapters(folder)
    shutil.rmtree(folder / "1")
    code, _, err = cli(*given)
    assert code == 0, err
    assert "files of trials 1 are gone; they run again" in err
    assert "1 of 2 trials to do" in err
    assert adapters(folder) == before


def test_storage_that_holds_another_sweep_of_the_name_is_refused(cli, tmp_path):
    import shutil

    given = [*UNWRITTEN_SWEEP, "eval=loss", f"sweep.storage=sqlite:///{tmp_path}/x.db", "-m"]
    assert cli("lora.r=2", *given)[0] == 0
    shutil.rmtree(tmp_path / "outputs")
    told = Track(uri=f"sqlite:///{tmp_path}/ml.db")
    code, _, err = cli("lora.r=4", *[text for text in given if text != "track=none"], f"track.uri={told.uri}")
    assert code == 2
    assert "holds another sweep of this name" in err
    client, experiment = track.store(told)
    assert [run.info.status for run in client.search_runs([experiment])] == ["KILLED"]


def test_helper_of_a_launch_that_died_before_its_trials_does_not_wait_for_ever(tmp_path, composed):
    from ftexp.errors import MachineError
    from ftexp.sweep import space
    from ftexp.sweep.options import Options

    with pytest.raises(MachineError, match="name=s: the launch to help ended before its trials began"):
        plugin.help_out(tmp_path, space.parse(["lora.r=2,4"]), Options(), [composed("name=s")])


def test_helper_waits_until_the_launch_takes_back_an_old_order_to_stop(cli, tmp_path, monkeypatch):
    """Both are started at once after `ftexp sweep stop`: the helper left again, and had helped nobody."""
    from ftexp.sweep import __main__ as verbs
    from ftexp.sweep import worker

    given = [*UNWRITTEN, "lora.r=2,4", "track=none", "eval=loss", "name=h", "-m"]
    assert cli(*given)[0] == 0
    folder = tmp_path / "outputs/sweeps/h"
    _, record = verbs.opened(folder)
    record.set_user_attr(worker.STOP, "stopped by `ftexp sweep stop`")
    record.set_user_attr(worker.LAUNCH, "1 on another")
    seen, honest = [], plugin.time.sleep

    def settled(seconds):
        record.set_user_attr(worker.STOP, None)
        record.set_user_attr(worker.LAUNCH, plugin._holder(folder))
        honest(0)

    monkeypatch.setattr(plugin.time, "sleep", settled)
    monkeypatch.setattr(plugin, "_run_left", lambda sweep, its, *_, **__: seen.append(its.user_attrs[worker.STOP]))
    with plugin.only_supervisor(folder, "h"):
        code, _, err = cli(*given, "sweep.join=true")
    assert (code, seen) == (0, [None]), err


def test_launch_waits_for_the_trials_of_its_helpers(tmp_path, composed, monkeypatch):
    """A helper that is asked to leave gives its trial back, and nobody else would take it."""
    import threading
    import time

    from ftexp import experiment
    from ftexp.sweep import frozen, space, study, worker
    from ftexp.sweep.options import Options

    run = composed("model=tiny")
    monkeypatch.setattr(frozen.Frozen, "run", lambda *given: run)
    monkeypatch.setattr(experiment, "execute", lambda *given: {"valid/loss": 1.0})
    made = frozen.Frozen(tmp_path, "s", space.parse(["lora.r=2,4"]), Options(), ["valid/loss"], None, "", {})
    made.save()
    record = worker.open_study(made)
    study.queue(record, [{"lora.r": "2"}, {"lora.r": "4"}])
    held = study.claim(record)

    def leave():
        time.sleep(1)
        worker.give_back(record, held)

    helper = threading.Thread(target=leave)
    helper.start()
    plugin._run_left(made, record, 2, 0)
    helper.join()
    assert [t.state.name for t in study.counted(record)] == ["COMPLETE", "COMPLETE"]


def test_launch_takes_up_what_a_killed_helper_was_giving_back(tmp_path, composed, monkeypatch):
    """Its ticket counts nowhere until somebody queues it again; the launch ended, with exit code 0."""
    from ftexp import experiment
    from ftexp.errors import TrialsFailed
    from ftexp.sweep import frozen, space, study, worker
    from ftexp.sweep.options import Options

    run = composed("model=tiny", "track=none")
    monkeypatch.setattr(frozen.Frozen, "run", lambda *given: run)
    monkeypatch.setattr(experiment, "execute", lambda *given: {"valid/loss": 1.0})
    made = frozen.Frozen(tmp_path, "s", space.parse(["lora.r=2,4"]), Options(), ["valid/loss"], None, "", {}, tickets=2)
    made.save()
    record = worker.open_study(made)
    study.queue(record, [{"lora.r": "2"}, {"lora.r": "4"}])
    held, ends = study.claim(record), []
    with monkeypatch.context() as patch:
        patch.setattr(study, "requeue", lambda *_, **__: None)  # the kill
        worker.give_back(record, held)
    with monkeypatch.context() as patch:
        patch.setattr(study, "mend", lambda record: 0)  # as it was
        patch.setattr(plugin.track, "end", lambda *told: ends.append(told[-1]))
        plugin._run_left(made, record, 1, 0)
        with pytest.raises(TrialsFailed, match="1 of 2 trials have not begun; the same command goes on"):
            plugin._finish(made, record, run)
    assert ends == ["KILLED"]
    monkeypatch.setattr(study, "MEND_SECONDS", 0.5)
    plugin._run_left(made, record, 1, 0)
    assert [t.state.name for t in study.counted(record)] == ["COMPLETE", "COMPLETE"]
    plugin._finish(made, record, run)


def test_trial_whose_workers_died_has_failed_in_its_folder_and_in_the_store_too(tmp_path, composed, monkeypatch):
    """It was "running" on the leaderboard, on the page and in MLflow, for ever."""
    from ftexp import board, track
    from ftexp.errors import TrialsFailed
    from ftexp.files import write_json
    from ftexp.sweep import frozen, space, study, worker
    from ftexp.sweep.options import Options

    run = composed("model=tiny", "track=none")
    made = frozen.Frozen(tmp_path, "s", space.parse(["lora.r=2,4"]), Options(), ["valid/loss"], None, "", {}, tickets=2)
    made.save()
    record = worker.open_study(made)
    study.queue(record, [{"lora.r": "2"}, {"lora.r": "4"}])
    kept = {"label": "lora.r=2", "config": {"lora.r": 2, "objectives": ["valid/loss"]}, "mlflow_run": "abc"}
    write_json(tmp_path / "0" / "trial.json", kept | {"state": "running"})
    study.claim(record, "w")
    study.reap(record, 0, ended={"w"})
    done = study.claim(record, "w")
    write_json(tmp_path / "1" / "trial.json", kept | {"state": "complete", "scores": {"valid/loss": 0.5}})
    record.tell(done, 0.5)
    ended = []
    monkeypatch.setattr(track, "end", lambda *told: ended.append((told[1], told[-1])))
    with pytest.raises(TrialsFailed, match="1 of 2 trials failed: 0"):
        plugin._finish(made, record, run)
    told = read_json(tmp_path / "0" / "trial.json")
    assert (told["state"], told["error"]) == ("failed", "crash: worker died")
    assert [t["state"] for t in board.read(tmp_path).trials] == ["failed", "complete"]
    assert ended[0] == ("abc", "FAILED")


def test_helper_with_other_code_is_refused_and_stops_nobody(cli, tmp_path, monkeypatch):
    from ftexp.sweep import __main__ as verbs
    from ftexp.sweep import worker

    given = [*UNWRITTEN, "lora.r=2,4", "track=none", "eval=loss", "name=h", "-m"]
    assert cli(*given)[0] == 0
    folder = tmp_path / "outputs/sweeps/h"
    monkeypatch.setattr(plugin.facts, "code", lambda: "other")
    monkeypatch.setattr(plugin, "_run_left", lambda *_, **__: pytest.fail("helped"))
    with plugin.only_supervisor(folder, "h"):
        code, _, err = cli(*given, "sweep.join=true")
    assert code == 4 and "the launch runs other code of ftexp than this process has" in err
    assert verbs.opened(folder)[1].user_attrs.get(worker.STOP) is None


def test_bound_is_given_on_the_command_line_and_holds_in_leaderboard_and_summary(cli, tmp_path):
    given = ["lora.r=2,4", *UNWRITTEN, "eval=loss", "name=s", "-m"]
    code, out, err = cli(*given, "sweep.at_most={cost/trainable: 5000}", "track.uri=sqlite:///m.db")
    assert code == 0, err
    trials = [read_json(tmp_path / "outputs/sweeps/s" / str(n) / "trial.json")["scores"] for n in range(2)]
    assert trials[0]["cost/trainable"] <= 5000 < trials[1]["cost/trainable"]
    assert trials[1]["valid/loss"] < trials[0]["valid/loss"]
    assert "0 best" in out
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri="sqlite:///m.db")
    parent = client.get_run(read_json(tmp_path / "outputs/sweeps/s/sweep.json")["mlflow_run"])
    assert parent.data.tags["ftexp.best_trial"] == "0"
    assert parent.data.metrics["valid/loss"] == trials[0]["valid/loss"]


@pytest.mark.parametrize("edited", [True, False])
def test_model_that_was_written_to_between_two_trials_of_a_sweep_is_refused(cli, tmp_path, edited):
    """The trials of one leaderboard have one base; unedited, the missing trial runs."""
    from safetensors.torch import load_file, save_file

    from ftexp import model
    from ftexp.config import Dtype, Kind, Model, Quant

    base = model.fresh(Model(kind=Kind.tiny, dtype=Dtype.float32), Quant())
    base.model.save_pretrained(tmp_path / "mine")
    base.tokenizer.save_pretrained(tmp_path / "mine")
    given = [*UNWRITTEN[1:], "model=hub", f"model.path={tmp_path}/mine", "eval=loss", "track=none", "name=k", "lora.r=2,4",
             "trainer.steps=1", "trainer.report_steps=0", "-m"]  # fmt: skip
    assert cli(*given)[0] == 0
    shutil.rmtree(tmp_path / "outputs" / "sweeps" / "k" / "1")
    if edited:
        path = tmp_path / "mine" / "model.safetensors"
        weights = load_file(path)
        weights["model.norm.weight"][0] += 1e-3
        save_file(weights, path, metadata={"format": "pt"})
        model._warm = None
    code, _, err = cli(*given)
    assert code == (5 if edited else 0), err
    assert ("mine: weights changed after the sweep was launched" in err) == edited


def test_same_sweep_in_another_store_is_refused(cli, tmp_path):
    given = [*UNWRITTEN, "eval=loss", "name=k", "lora.r=2", "trainer.steps=1", "-m"]
    assert cli(*given, "track.uri=sqlite:///a.db")[0] == 0
    code, _, err = cli(*given, "track.uri=sqlite:///b.db")
    assert code == 2
    assert "name=k was launched with track.uri=sqlite:///a.db, got sqlite:///b.db" in err
    assert not (tmp_path / "b.db").exists()


def test_changed_rule_for_alpha_is_refused(cli):
    assert cli("lora.r=2,4", *SWEEP, "-m")[0] == 0
    code, _, err = cli("lora.r=2,4", "lora.alpha='${mul:4,${lora.r}}'", *SWEEP, "-m")
    assert code == 2
    assert "begun with another search space: depending lora.alpha: [4.0, 8.0] -> [8.0, 16.0]" in err


def test_another_record_under_the_same_name_is_refused(cli, tmp_path):
    """It would begin empty, and run all trials over those that are there."""
    assert cli("lora.r=2,4", *SWEEP, "-m")[0] == 0
    before = adapters(tmp_path / "outputs" / "sweeps" / "s")
    code, _, err = cli("lora.r=2,4", *SWEEP, f"sweep.storage=sqlite:///{tmp_path}/s.db", "sweep.workers=1", "-m")
    assert code == 2
    assert "name=s was launched with sweep.storage=null, got sqlite:///" in err
    assert adapters(tmp_path / "outputs" / "sweeps" / "s") == before


def test_run_that_another_process_is_at_is_refused(cli, tmp_path):
    folder = tmp_path / "outputs" / "runs" / "one"
    with plugin.only(folder, "one"):
        code, _, err = cli(*TINY, "track=none", "name=one")
    assert code == 4
    assert err.strip().endswith("wait for it, or choose another name")
    assert not (folder / "trial.json").exists()
    assert cli(*TINY, "track=none", "name=one")[0] == 0


def test_point_that_is_drawn_again_takes_the_result_there_is(cli, tmp_path, monkeypatch):
    """By the same seed it would be the same; each of two ranks is trained once for each of two seeds."""
    trained = []
    execute = experiment._execute

    def counted(run, folder, *more):
        trained.append((folder.name, run.lora.r, run.seed))
        return execute(run, folder, *more)

    monkeypatch.setattr(experiment, "_execute", counted)
    given = [
        *UNWRITTEN,
        "lora.r=choice(2,4)",
        "sweep.sampler=random",
        "sweep.n_trials=5",
        "sweep.replicates=2",
        "eval=loss",
    ]
    code, out, err = cli(*given, "track.uri=sqlite:///m.db", "name=again")
    assert code == 0, err
    folder = tmp_path / "outputs/sweeps/again"
    told = [read_json(folder / str(n) / "trial.json") for n in range(10)]
    assert sorted((r, seed) for _, r, seed in trained) == [(2, 0), (2, 1), (4, 0), (4, 1)]
    repeats = {n: t["repeats"] for n, t in enumerate(told) if "repeats" in t}
    assert len(repeats) == 6
    assert read_json(folder / "sweep.json")["tickets"] == 10
    for n, first in repeats.items():
        assert told[n]["config"] == told[first]["config"] and told[n]["scores"] == told[first]["scores"]
        assert (folder / str(n) / "adapter/adapter_config.json").read_bytes()
        assert f"trial {n} is trial {first} again" in err
    assert "3 points were drawn again" in " ".join((out + err).split())
    monkeypatch.chdir(tmp_path)
    first = min(repeats.values())
    assert runs.find(told[first]["mlflow_run"]).folder.name == str(first)  # one run in MLflow, and one folder of it
    where, n = Track(uri="sqlite:///m.db"), max(repeats)
    killed = track.create(where, "killed", folder / str(n), None)  # as of an attempt before, when it was no repeat
    write_json(folder / str(n) / "trial.json", told[n] | {"mlflow_run": killed, "state": "running"})
    shutil.rmtree(folder / str(n) / "adapter")
    assert cli(*given, "track.uri=sqlite:///m.db", "name=again")[0] == 0
    run = track.store(where)[0].get_run(killed)
    assert (run.info.status, run.data.tags["ftexp.repeats"]) == ("KILLED", str(repeats[n]))


def test_sabotage_point_of_other_versions_is_trained_again(cli, tmp_path, monkeypatch):
    given = [*UNWRITTEN, "lora.r=choice(2,4)", "sweep.sampler=random", "track=none", "eval=loss", "name=other"]
    assert cli(*given, "sweep.n_trials=2")[0] == 0
    folder = tmp_path / "outputs/sweeps/other"
    for n in range(2):
        path = folder / str(n) / "trial.json"
        told = read_json(path)
        told["facts"]["versions"]["torch"] = "0.0"
        write_json(path, told)
    code, _, err = cli(*given, "sweep.n_trials=5")
    assert code == 0, err
    made = [read_json(folder / str(n) / "trial.json") for n in range(2, 5)]
    assert {t["facts"]["versions"]["torch"] for t in made if "repeats" not in t} == {
        made[0]["facts"]["versions"]["torch"]
    }
    assert "repeats" not in made[0]


def test_command_line_wins_over_a_file_in_open_keys_too(cli, tmp_path):
    """`trainer.extra.adam_beta1` of a sweep's file and of the command line are one key, searched or not."""
    (tmp_path / "mine/sweeps").mkdir(parents=True)
    text = "hydra:\n  sweeper:\n    params:\n      lora.r: 2,4\n      trainer.extra.adam_beta1: 0.8,0.9\n"
    (tmp_path / "mine/sweeps/betas.yaml").write_text(text)
    given = [*UNWRITTEN, "--config-dir=mine", "sweep=betas", "track=none", "eval=loss"]
    for more, wanted in (([], [0.8, 0.9] * 2), (["trainer.extra.adam_beta1=0.7"], [0.7] * 2),
                         (["trainer.extra.adam_beta1=0.6,0.7"], [0.6, 0.7] * 2)):  # fmt: skip
        name = f"b{len(more)}{len(wanted)}"
        code, _, err = cli(*given, *more, f"name={name}")
        assert code == 0, err
        told = [read_json(tmp_path / f"outputs/sweeps/{name}/{n}/trial.json") for n in range(len(wanted))]
        assert [t["config"]["trainer.extra.adam_beta1"] for t in told] == wanted
        assert not (tmp_path / f"outputs/sweeps/{name}/{len(wanted)}").exists()
        assert "+" not in told[0]["label"]
        kept = read_json(tmp_path / f"outputs/sweeps/{name}/identity.json")
        assert not [k for k in kept if k.startswith("depending") and "adam_beta1" in k]
    code, _, err = cli(*given, "sweep.sampler=random", "sweep.n_trials=2", "name=base",
                       "sweep.baselines=[{lora.r: 4, trainer.extra.adam_beta1: 0.8}]")  # fmt: skip
    assert code == 0, err


def aged(folder):
    """Make of a sweep one of 011d5ae, which had no `data.packing` and `trainer.engine`, and did not say `tickets`."""
    later = ("data.packing", "trainer.engine")
    identity, sweep = read_json(folder / "identity.json"), read_json(folder / "sweep.json")
    write_json(
        folder / "identity.json", {k: v for k, v in identity.items() if not k.endswith((*later, "sampler_args"))}
    )
    [path] = (folder / "frozen").glob("*.yaml")
    composed = yaml.safe_load(path.read_text())
    del composed["data"]["packing"], composed["trainer"]["engine"]
    path.write_text(yaml.safe_dump(composed))
    [digest] = sweep["rows"].values()
    sweep |= {"rows": {config.digest(composed["data"]): digest}, "code": "0" * 64}
    del sweep["tickets"], sweep["config_dir"], sweep["cwd"]
    write_json(folder / "sweep.json", sweep)


def test_sweep_of_an_ftexp_with_fewer_keys_goes_on(cli, tmp_path):
    (tmp_path / "my.jsonl").write_text(lines := "".join(f'{{"text": "row {n} of many"}}\n' for n in range(40)))
    given = [t for t in UNWRITTEN if not t.startswith("data.")]
    given += ["data=jsonl", "data.path=my.jsonl", "data.valid=8", "track=none", "eval=loss", "lora.r=2", "name=s", "-m"]
    folder = tmp_path / "outputs/sweeps/s"
    assert cli(*given)[0] == 0
    aged(folder)
    code, _, err = cli(*given, "data.packing=bfd")
    assert code == 2
    assert 'another search space: config data.packing: "none" -> "bfd"; choose another name, or go on' in err
    (tmp_path / "my.jsonl").write_text(lines.replace("many", "more"))
    code, _, err = cli(*given)
    assert code == 2
    assert "the rows changed since the sweep was launched" in err
    with pytest.raises(ConfigError, match="the rows changed since the sweep was launched"):
        plugin.go_on(frozen.load(folder), None)
    (tmp_path / "my.jsonl").write_text(lines)
    code, _, err = cli(*given)
    assert code == 0, err
    assert "the code of ftexp is not that of the launch" in err
    assert "0 of 1 trials to do" in err
    assert frozen.load(folder).tickets == 1
    plugin.go_on(replace(frozen.load(folder), tickets=0), None)
    assert frozen.load(folder).tickets == 1


def test_range_goes_on_in_the_numbers_it_was_begun_in(cli, tmp_path):
    """As a sweep of an earlier ftexp, for which `interval(0,1)` was of whole numbers."""
    given = [
        *UNWRITTEN,
        "trainer.weight_decay=interval(0,1)",
        "lora.r=2,4",
        "sweep.sampler=random",
        "track=none",
        "eval=loss",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space.config, "is_real", lambda key: False)
        assert cli(*given, "sweep.n_trials=1", "name=up", "-m")[0] == 0
    code, _, err = cli(*given, "sweep.n_trials=3", "name=up", "-m")
    assert code == 0, err
    told = [
        read_json(tmp_path / f"outputs/sweeps/up/{n}/trial.json")["config"]["trainer.weight_decay"] for n in range(3)
    ]
    assert {float(v) for v in told} <= {0.0, 1.0}


def test_search_goes_on_in_the_order_of_keys_it_was_begun_in(cli, tmp_path):
    """A sampler draws key by key: the same search with its keys in another order went on with other points."""
    search = [*UNWRITTEN, "track=none", "sweep.sampler=random", "-m"]
    keys = ["trainer.lr=interval(1e-3,1e-2)", "lora.r=2,4", "lora.dropout=interval(0.0,0.5)"]
    for name, again in (("same", keys), ("turned", keys[::-1])):
        assert cli(*search, *keys, "sweep.n_trials=1", f"name={name}")[0] == 0
        assert cli(*search, *again, "sweep.n_trials=3", f"name={name}")[0] == 0
    same, turned = ([t.params for t in record_of(tmp_path / "outputs/sweeps" / name)] for name in ("same", "turned"))
    assert same == turned


def test_grid_that_was_begun_with_a_seed_goes_on_with_it(tmp_path):
    made = plugin.Sweeper()
    made.master = OmegaConf.create({"hydra": {"overrides": {"hydra": ["hydra.sweeper.seed=3"]}}})
    made._check_typed(Options(seed=3), begun=True)
    with pytest.raises(ConfigError, match=r"^sweep\.seed would change nothing"):
        made._check_typed(Options(seed=3), begun=False)
    made._check_typed(Options(seed=3, sampler=Sampler.tpe, n_trials=2), begun=False)


def test_another_space_is_left_as_it_is(tmp_path):
    begun = space.parse(["lora.r=2,4", "trainer.lr=interval(0.1,0.2)"])
    frozen.Frozen(tmp_path, "s", begun, Options(), ["valid/loss"], None, "", {}).save()
    turned = space.parse(["trainer.lr=interval(0.1,0.2)", "lora.r=2,4"])
    assert plugin.as_begun(tmp_path, turned) == begun
    for other in (space.parse(["seed=1,2", "lora.r=2,4"]), space.parse([])):
        assert plugin.as_begun(tmp_path, other) is other


def test_helper_stops_nothing(cli, tmp_path, monkeypatch):
    """It says so to what looks after its workers: where they die, it leaves the sweep to the launch."""
    given = [*UNWRITTEN, "lora.r=2,4", "track=none", "eval=loss", "name=h", "-m"]
    assert cli(*given)[0] == 0
    seen = []
    monkeypatch.setattr(plugin, "_run_left", lambda *_, helps=False: seen.append(helps))
    with plugin.only_supervisor(tmp_path / "outputs/sweeps/h", "h"):
        code, _, err = cli(*given, "sweep.join=true")
    assert (code, seen) == (0, [True]), err


LAUNCH_KILLED = """
import os, signal, sys
from ftexp import run, track
from ftexp.sweep import frozen
def kill(*given, **keys):
    os.kill(os.getpid(), signal.SIGKILL)
{how}
sys.argv = ["ftexp.run", *sys.argv[1:]]
run.main()
"""
PARAMS = "track.Log.params = kill"
"""Killed with the parent in the store, and no parameter."""
SAVE = "frozen.Frozen.save = kill"
"""Killed with all of the parent in the store, and nothing that says so in `sweep.json`."""


def _parents(uri):
    client, experiment = track.store(Track(uri=uri))
    return [r for r in client.search_runs([experiment]) if "mlflow.parentRunId" not in r.data.tags]


@pytest.mark.parametrize("how", [PARAMS, SAVE])
def test_launch_that_is_killed_with_its_parent_open_is_gone_on_with(cli, tmp_path, how):
    """The run stayed RUNNING for ever, and a second one of the same name stood beside it."""
    uri = f"sqlite:///{tmp_path}/ml.db"
    given = ["lora.r=2,4", *UNWRITTEN, "name=s", "eval=loss", f"track.uri={uri}", "-m"]
    code = LAUNCH_KILLED.format(how=how)
    done = subprocess.run([sys.executable, "-c", code, *given], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    (left,) = _parents(uri)
    folder = tmp_path / "outputs" / "sweeps" / "s"
    assert left.info.status == "RUNNING" and not (folder / "sweep.json").exists()
    assert ("lora.r" in left.data.params) == (how == SAVE)
    code, _, err = cli(*given)
    assert code == 0, err
    (parent,) = _parents(uri)
    assert (parent.info.run_id, parent.info.status) == (left.info.run_id, "FINISHED")
    assert read_json(folder / "sweep.json")["mlflow_run"] == left.info.run_id
    assert parent.data.params["lora.r"] == "2,4" and parent.data.params["trainer.steps"] == "4"
    assert not (folder / "parent.json").exists()


@pytest.mark.parametrize("other", ["lora.r=2,8", "track.experiment=other", "track=none"])
def test_parent_of_a_killed_launch_that_does_not_fit_is_ended(cli, tmp_path, other):
    uri = f"sqlite:///{tmp_path}/ml.db"
    given, there = [*UNWRITTEN, "name=s", "eval=loss", "-m"], f"track.uri={uri}"
    code = LAUNCH_KILLED.format(how=SAVE)
    command = [sys.executable, "-c", code, "lora.r=2,4", *given, there]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    (left,) = _parents(uri)
    more = {"lora.r=2,8": (there,), "track=none": ("lora.r=2,4",)}.get(other, ("lora.r=2,4", there))
    code, _, err = cli(*given, *more, other)
    assert code == 0, err
    told = {r.info.run_id: r.info.status for r in _parents(uri)}
    assert told.pop(left.info.run_id) == "KILLED"
    assert list(told.values()) == ["FINISHED"] * other.startswith("lora")
