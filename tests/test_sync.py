"""A tracking store that was not there: training is unharmed, and every point is brought later, once."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import made
import pytest
from conftest import TINY, UNWRITTEN

from ftexp import config, sync, track
from ftexp.config import Track
from ftexp.errors import MachineError, Preempted
from ftexp.files import read_json, write_json
from ftexp.sweep import worker

DEAD = "track.uri=http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(track, "_dead", set())
    monkeypatch.setattr(track, "_stores", {})


@pytest.fixture
def verb(monkeypatch, capsys):
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["ftexp.sync", *argv])
        code = sync.main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


def histories(uri):
    """All points of all runs in a store: run name -> metric -> [(step, value)]."""
    client, experiment = track.store(Track(uri=uri))
    return {
        r.info.run_name: {
            name: sorted((m.step, m.value) for m in client.get_metric_history(r.info.run_id, name)) for name in r.data.metrics
        }
        for r in client.search_runs([experiment])
    }  # fmt: skip


def in_files(folder):
    told = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        point = json.loads(line)
        for name in point.keys() - {"step", "time"}:
            told.setdefault(name, []).append((point["step"], point[name]))
    return {name: sorted(points) for name, points in told.items()}


def test_sweep_without_its_server_ends_well_and_is_brought_later_once(cli, verb, tmp_path):
    code, _, err = cli("lora.r=2,4", *TINY, "name=s", "data.test=4", DEAD, "-m")
    assert code == 0, err
    assert err.count("warning: track.uri=http://127.0.0.1:9 cannot be opened") == 1
    uri = f"sqlite:///{tmp_path}/ml.db"
    code, out, err = verb("--uri", uri)
    assert code == 0, err
    points = [in_files(tmp_path / "outputs" / "sweeps" / "s" / str(n)) for n in range(2)]
    total = sum(len(p) for told in points for p in told.values())
    assert out == f"brought 3 runs, {total} points and 7 files that were not there\n"
    told = histories(uri)
    assert [told["lora.r=2"], told["lora.r=4"]] == points
    client, experiment = track.store(Track(uri=uri))
    runs = {r.info.run_name: r for r in client.search_runs([experiment])}
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    assert runs["lora.r=2"].data.tags["mlflow.parentRunId"] == runs["s"].info.run_id
    assert runs["lora.r=4"].data.params["lora.r"] == "4"
    scores = [read_json(tmp_path / f"outputs/sweeps/s/{n}/trial.json")["scores"]["valid/loss"] for n in range(2)]
    assert runs["s"].data.metrics == {"trials": 2.0, "failed": 0.0, "valid/loss": min(scores)}  # as the launch tells it
    assert runs["s"].data.tags["ftexp.best_trial"] == str(scores.index(min(scores)))
    paths = {f.path for f in client.list_artifacts(runs["lora.r=4"].info.run_id)}
    assert paths == {"adapter", "examples.json", "examples.parquet"}  # as of a run whose server was there
    assert {f.path for f in client.list_artifacts(runs["s"].info.run_id)} == {"report.html"}
    given = {i.tags[0].value: i.dataset for i in runs["lora.r=4"].inputs.dataset_inputs}
    rows = {context: json.loads(one.profile)["num_rows"] for context, one in given.items()}
    assert rows == {"training": 104, "validation": 12}  # and nothing of the 4 sealed rows
    assert verb("--uri", uri)[1] == "brought 0 runs, 0 points and 0 files that were not there\n"
    assert histories(uri) == told
    sweep, trial = tmp_path / "outputs/sweeps/s", read_json(tmp_path / "outputs/sweeps/s/0/trial.json")
    for name, more in (("confirm/0", {"label": "again", "opened": 1}), ("7", {"label": "drawn again", "repeats": 0})):
        shutil.copytree(sweep / "0", sweep / name)
        (sweep / name / "mlflow.json").unlink()
        write_json(sweep / name / "trial.json", trial | more)
    assert verb("--uri", uri)[1].startswith("brought 1 runs")  # the repetition is the run that is there
    after = {r.info.run_name: r for r in client.search_runs([experiment])}
    assert after["again"].data.tags["mlflow.parentRunId"] == runs["s"].info.run_id
    assert after["again"].data.tags["ftexp.test_opened"] == "1"


def test_points_missed_in_mid_run_are_brought_and_the_others_not_again(cli, verb, tmp_path, monkeypatch):
    from mlflow.exceptions import MlflowException

    uri = f"sqlite:///{tmp_path}/ml.db"
    honest, calls = track.Log.flush, []

    def breaks(log):
        calls.append(1)
        if len(calls) == 1:
            honest(log)
            monkeypatch.setattr(
                log.client, "log_batch", lambda *_, **__: (_ for _ in ()).throw(MlflowException("gone"))
            )
        else:
            honest(log)

    monkeypatch.setattr(track, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(track.Log, "flush", breaks)
    code, _, err = cli(*TINY, "name=one", f"track.uri={uri}")
    assert code == 0, err
    assert err.count("MLflow failed") == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    track._stores.clear()
    run = tmp_path / "outputs" / "runs" / "one"
    before = histories(uri)["one"]
    assert 0 < sum(map(len, before.values())) < sum(map(len, in_files(run).values()))
    run_id = read_json(run / "trial.json")["mlflow_run"]
    assert sync.sync([tmp_path / "outputs"]).runs == 0
    assert histories(uri)["one"] == in_files(run)
    assert read_json(run / "trial.json")["mlflow_run"] == run_id


def test_sabotage_without_a_look_at_the_store_points_are_brought_again(cli, tmp_path, monkeypatch):
    """SQLite drops a point that is equal to the millisecond; a server behind another database would show it twice."""
    from mlflow import MlflowClient

    assert cli(*TINY, "name=one", f"track.uri=sqlite:///{tmp_path}/ml.db")[0] == 0
    assert sync.sync([tmp_path / "outputs"]).points == 0
    monkeypatch.setattr(MlflowClient, "get_metric_history", lambda *_: [])
    assert sync.sync([tmp_path / "outputs"]).points > 0


def stored(client, run_id):
    return Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://"))


def test_files_of_an_adapter_that_came_by_half_are_brought(cli, verb, tmp_path):
    """An upload that broke off left one file out and one torn."""
    assert cli(*UNWRITTEN, "eval=loss", "name=one", f"track.uri=sqlite:///{tmp_path}/ml.db")[0] == 0
    run = tmp_path / "outputs/runs/one"
    client, _ = track.store(Track(uri=f"sqlite:///{tmp_path}/ml.db"))
    there = stored(client, read_json(run / "trial.json")["mlflow_run"]) / "adapter"
    whole = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    assert {path.name: path.read_bytes() for path in there.iterdir()} == whole
    (there / "adapter_model.safetensors").unlink()
    (there / "adapter_config.json").write_text("{")
    assert json.loads(verb("--json")[1])["files"] == 1
    assert {path.name: path.read_bytes() for path in there.iterdir()} == whole
    assert json.loads(verb("--json")[1])["files"] == 0


@pytest.mark.parametrize("lost", ["inputs", "params"])
def test_data_sets_and_parameters_that_were_missed_are_brought_each_for_itself(cli, tmp_path, monkeypatch, lost):
    """The store failed after the parameters, or after the first call of them."""
    honest = track.Log.params
    if lost == "inputs":
        monkeypatch.setattr(track.Log, "inputs", lambda *_: None)
    else:
        monkeypatch.setattr(track.Log, "params", lambda log, told: honest(log, dict(list(told.items())[:3])))
    assert cli(*UNWRITTEN, "eval=loss", "name=one", f"track.uri=sqlite:///{tmp_path}/ml.db")[0] == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    kept = read_json(tmp_path / "outputs/runs/one/trial.json")
    client, _ = track.store(Track(uri=f"sqlite:///{tmp_path}/ml.db"))
    for _ in range(2):
        sync.sync([tmp_path / "outputs"])
        run = client.get_run(kept["mlflow_run"])
        assert sorted(one.tags[0].value for one in run.inputs.dataset_inputs) == ["training", "validation"]
        assert config.effective(kept["config"]).keys() <= run.data.params.keys()
        assert not [tag for tag in run.data.tags if tag.startswith(track.CHANGED)]


def test_store_in_another_spelling_or_seen_from_another_folder_takes_no_run_twice(cli, verb, tmp_path, monkeypatch):
    assert cli("lora.r=2,4", *UNWRITTEN, "eval=loss", "name=s", "-m")[0] == 0
    files = {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*.json")}
    (tmp_path / "away").mkdir()
    for folder in (tmp_path, tmp_path / "away"):
        monkeypatch.chdir(folder)
        code, out, err = verb(str(tmp_path / "outputs"), "--uri", f"sqlite:///{tmp_path}/away/../outputs/mlflow.db")
        assert (code, out) == (0, "brought 0 runs, 0 points and 0 files that were not there\n"), err
    code, _, err = verb(str(tmp_path / "outputs"))
    assert (code, err.count("\n")) == (4, 1)
    assert f"track.uri=sqlite:///outputs/mlflow.db is not there from {tmp_path}/away; call this from the folder" in err
    assert ", or give --uri" in err
    assert not list((tmp_path / "away").iterdir())
    track.store(Track())  # of another project
    code, _, err = verb(str(tmp_path / "outputs"))
    assert code == 4 and f"in {tmp_path}/away does not hold {tmp_path}/outputs/sweeps/s/0; call this from" in err
    assert {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*.json")} == files
    assert not histories("sqlite:///outputs/mlflow.db")


def test_a_store_that_was_deleted_is_made_anew_beside_its_runs(cli, tmp_path):
    assert cli(*UNWRITTEN, "eval=loss", "name=one")[0] == 0
    for path in (tmp_path / "outputs").glob("mlflow.db*"):
        path.unlink()
    again = subprocess.run([sys.executable, "-m", "ftexp.sync", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["runs"] == 1  # another process: MLflow holds the file that was deleted


def test_second_store_in_another_spelling_takes_no_run_twice(cli, verb, tmp_path):
    assert cli(*UNWRITTEN, "eval=loss", "name=one", f"track.uri=sqlite:///{tmp_path}/own.db")[0] == 0
    uris = ("sqlite:///team.db", f"sqlite:///{tmp_path}/team.db", "sqlite:///outputs/../team.db")
    assert [json.loads(verb("--uri", uri, "--json")[1])["runs"] for uri in uris] == [1, 0, 0]


class Silent:
    """A store whose calls of some names time out, as of a server that is stopped."""

    def __init__(self, client, *names):
        self.client, self.names = client, names

    def __getattr__(self, name):
        from mlflow.exceptions import MlflowException

        if name in self.names:
            raise MlflowException("API request to http://x failed with exception: Read timed out")
        return getattr(self.client, name)


@pytest.mark.parametrize("call", ["create_run", "get_run", "update_run", "get_metric_history"])
def test_server_that_stops_answering_as_a_run_is_opened_fails_no_trial_and_doubles_no_run(
    cli, tmp_path, monkeypatch, call
):
    """A trial that goes on after a kill keeps its run, whichever call was not answered; `sync` finds it again."""
    uri = f"sqlite:///{tmp_path}/ml.db"
    given = [*UNWRITTEN, "eval=loss", "name=one", f"track.uri={uri}"]
    run = tmp_path / "outputs" / "runs" / "one"
    if call != "create_run":
        assert cli(*given)[0] == 0
        kept = read_json(run / "trial.json")
        (run / "trial.json").write_text(json.dumps(kept | {"state": "running"}))
    honest = track.store
    monkeypatch.setattr(track, "store", lambda how: (Silent(honest(how)[0], call), honest(how)[1]))
    code, _, err = cli(*given)
    assert code == 0, err
    assert err.count("MLflow failed, the run goes on with files only") == 1
    monkeypatch.setattr(track, "store", honest)
    sync.sync([tmp_path / "outputs"])
    assert sync.sync([tmp_path / "outputs"]).points == 0
    client, experiment = honest(Track(uri=uri))
    (only,) = client.search_runs([experiment])
    assert only.info.run_id == read_json(run / "trial.json")["mlflow_run"]
    told = {name: [step for step, _ in points] for name, points in histories(uri)["one"].items()}
    steps = {name: [step for step, _ in points] for name, points in in_files(run).items()}
    assert {n: s for n, s in told.items() if not n.startswith(("cost/", "plan/"))} == {
        n: s for n, s in steps.items() if not n.startswith(("cost/", "plan/"))}  # fmt: skip


def test_launch_that_is_not_answered_runs_its_trials(cli, tmp_path, monkeypatch):
    honest = track.store
    monkeypatch.setattr(track, "store", lambda how: (Silent(honest(how)[0], "create_run"), honest(how)[1]))
    code, _, err = cli("lora.r=2,4", *UNWRITTEN, "eval=loss", "name=s", f"track.uri=sqlite:///{tmp_path}/ml.db", "-m")
    assert code == 0, err
    monkeypatch.setattr(track, "store", honest)
    assert sync.sync([tmp_path / "outputs"]).runs == 3


def test_sync_without_an_answer_makes_no_second_run(cli, verb, tmp_path, monkeypatch):
    assert cli(*UNWRITTEN, "eval=loss", "name=one", f"track.uri=sqlite:///{tmp_path}/ml.db")[0] == 0
    honest = track.store
    monkeypatch.setattr(track, "store", lambda how: (Silent(honest(how)[0], "get_run"), honest(how)[1]))
    code, _, err = verb()
    assert code == 4
    assert "the tracking store does not answer" in err
    client, experiment = honest(Track(uri=f"sqlite:///{tmp_path}/ml.db"))
    assert len(client.search_runs([experiment])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("locked", [True, False])
def test_two_nodes_that_bring_the_same_sweep_bring_each_point_once(cli, tmp_path, locked):
    """Without the lock both find the runs missing and make them: its sabotage twin."""
    code, _, err = cli("lora.r=2,4", *UNWRITTEN, "name=s", "eval=loss", DEAD, "-m")
    assert code == 0, err
    uri = f"sqlite:///{tmp_path}/ml.db"
    track.store(Track(uri=uri, experiment="ftexp"))
    code = ("import contextlib, socket, sys, time\nfrom ftexp import sync, track\nsocket.gethostname = lambda: sys.argv[1]\n"
            "if sys.argv[2] == 'False': sync.FileLock = lambda path: contextlib.nullcontext()\n"
            "known = sync._known\n"
            "def slowly(*given):\n    told = known(*given)\n    time.sleep(1)\n    return told\n"
            "sync._known = slowly\n"
            "print('ready', flush=True); sys.stdin.readline()\n"
            "sys.argv[1:] = ['--uri', sys.argv[3]]; sys.exit(sync.main())")  # fmt: skip
    nodes = [subprocess.Popen([sys.executable, "-c", code, f"node-{n}", str(locked), uri], cwd=tmp_path, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for n in range(2)]  # fmt: skip
    for node in nodes:
        assert node.stdout.readline() == "ready\n"
    for node in nodes:
        node.stdin.write("go\n")
        node.stdin.flush()
    told = [node.communicate(timeout=200)[0] for node in nodes]
    client, experiment = track.store(Track(uri=uri))
    names = sorted(run.info.run_name for run in client.search_runs([experiment]))
    if not locked:
        assert len(names) > 3, told
        return
    assert names == ["lora.r=2", "lora.r=4", "s"], told
    for name, number in (("lora.r=2", 0), ("lora.r=4", 1)):
        assert histories(uri)[name] == in_files(tmp_path / "outputs/sweeps/s" / str(number))


def test_sweep_whose_launch_was_killed_at_its_end_is_closed_in_the_store_with_its_page(cli, verb, tmp_path):
    """The trials are all there; the parent runs and has no page, as where the server was down in the last second."""
    import shutil

    uri = f"sqlite:///{tmp_path}/own.db"
    assert cli("lora.r=2,4", *TINY, "name=s", f"track.uri={uri}", "-m")[0] == 0
    client, _ = track.store(Track(uri=uri))
    folder = tmp_path / "outputs/sweeps/s"
    parent = read_json(folder / "sweep.json")["mlflow_run"]
    where = client.get_run(parent).info.artifact_uri.removeprefix("file://")

    def told():
        return client.get_run(parent).info.status, [entry.path for entry in client.list_artifacts(parent)]

    before = told()
    shutil.rmtree(where)
    client.update_run(parent, status="RUNNING")
    assert json.loads(verb("--json")[1])["files"] == 1
    assert told() == before == ("FINISHED", ["report.html"])
    client.update_run(parent, status="RUNNING")
    for tickets in (3, 0):  # one has not begun; a sweep of before its number was kept
        write_json(folder / "sweep.json", read_json(folder / "sweep.json") | {"tickets": tickets})
        assert json.loads(verb("--json")[1])["runs"] == 0
        assert told()[0] == "RUNNING"
    write_json(folder / "sweep.json", read_json(folder / "sweep.json") | {"tickets": 2})
    trial = read_json(folder / "1/trial.json")
    write_json(folder / "1/trial.json", trial | {"scores": trial["scores"] | {"valid/loss": math.nan}})
    verb("--json")
    assert told()[0] == "FAILED"  # as its launch would have called a sweep with a score that is undefined


def test_dead_store_is_named(cli, verb, tmp_path):
    assert cli(*TINY, "name=one", DEAD)[0] == 0
    code, _, err = verb()
    assert code == 4
    assert "track.uri=http://127.0.0.1:9 cannot be opened" in err
    with pytest.raises(MachineError):
        sync.sync([tmp_path / "outputs"])


def test_damaged_run_is_told_and_the_others_are_brought(cli, verb, tmp_path):
    assert cli("lora.r=2,4", *UNWRITTEN, "eval=loss", "name=s", DEAD, "-m")[0] == 0
    path = tmp_path / "outputs/sweeps/s/0/trial.json"
    path.write_text(path.read_text()[:40])
    uri = f"sqlite:///{tmp_path}/ml.db"
    code, out, err = verb("--uri", uri, "--json")
    assert (code, json.loads(out)["runs"], json.loads(out)["damaged"]) == (4, 2, 1)
    assert err.count("outputs/sweeps/s/0/trial.json: is damaged, it must be JSON") == 1
    assert set(histories(uri)) == {"s", "lora.r=4"}


def test_each_damaged_file_is_told_once_and_holds_back_what_needs_it_alone(cli, verb, tmp_path):
    assert cli("lora.r=2,4", *UNWRITTEN, "eval=loss", "name=s", DEAD, "-m")[0] == 0
    assert cli(*UNWRITTEN, "eval=loss", "name=one", DEAD)[0] == 0
    sweep, every = tmp_path / "outputs/sweeps/s", {"s", "lora.r=2", "lora.r=4", "one"}
    made.confirmed(sweep)
    held = {
        "sweep.json": every - {"one"},
        "identity.json": every - {"one"},
        "confirm.json": set(),
        "0/metrics.jsonl": {"lora.r=2"},
    }
    for number, (name, left_out) in enumerate(held.items()):
        whole = (sweep / name).read_text()
        where = f"{name}:1" if name.endswith("l") else name
        (sweep / name).write_text(whole[:7] + "\n" + whole[whole.find("\n") + 1 :] if where != name else whole[:7])
        uri = f"sqlite:///{tmp_path}/{number}.db"
        code, out, err = verb("--uri", uri, "--json")
        assert (code, json.loads(out)["runs"], json.loads(out)["damaged"]) == (4, 4 - len(left_out), 1), err
        assert err.count("is damaged") == err.count(f"outputs/sweeps/s/{where}: is damaged, ") == 1
        assert set(histories(uri)) == every - left_out
        (sweep / name).write_text(whole)
        assert json.loads(verb("--uri", uri, "--json")[1])["runs"] == len(left_out)
        client, experiment = track.store(Track(uri=uri))
        stored = {r.info.run_name: r.data for r in client.search_runs([experiment])}
        assert stored["s"].params["lora.r"] == "2,4" and track.CONFIRMED in stored["lora.r=2"].tags
        assert histories(uri)["lora.r=2"] == in_files(sweep / "0")
    with (sweep / "0" / "metrics.jsonl").open("a") as out:
        out.write('{"step": 5, "tra')  # as a kill leaves it
    assert verb("--uri", uri)[::2] == (0, "")


def test_damaged_rows_hold_back_their_table_alone(cli, verb, tmp_path):
    for name in ("one", "two"):
        assert cli(*TINY, f"name={name}", DEAD)[0] == 0
    rows = tmp_path / "outputs/runs/one/examples.parquet"
    rows.write_bytes(rows.read_bytes()[:-8])
    uri = f"sqlite:///{tmp_path}/ml.db"
    code, out, err = verb("--uri", uri, "--json")
    assert (code, json.loads(out)["runs"], json.loads(out)["damaged"]) == (4, 2, 1)
    assert err.count("outputs/runs/one/examples.parquet: is damaged, it must be Parquet") == 1
    client, experiment = track.store(Track(uri=uri))
    there = {r.info.run_name: client.list_artifacts(r.info.run_id) for r in client.search_runs([experiment])}
    assert {name: "examples.json" in {a.path for a in kept} for name, kept in there.items()} == {
        "one": False, "two": True,
    }  # fmt: skip
    assert all(r.info.status == "FINISHED" for r in client.search_runs([experiment]))


def test_run_without_tracking_is_left_out(cli, verb):
    assert cli(*TINY, "name=one", "track=none")[0] == 0
    assert json.loads(verb("--json")[1]) == {"runs": 0, "points": 0, "files": 0, "running": 0, "damaged": 0}


def test_sweeps_that_lie_elsewhere_are_brought_too(cli, verb, tmp_path):
    """Once each; one inside of outputs/ is found there."""
    for name, place in (("far", "away/far"), ("near", "outputs/mine")):
        code, _, err = cli("lora.r=2", *UNWRITTEN, "eval=loss", f"name={name}", f"hydra.sweep.dir={place}", DEAD, "-m")
        assert code == 0, err
    uri = f"sqlite:///{tmp_path}/ml.db"
    assert json.loads(verb("--uri", uri, "--json", "outputs")[1])["runs"] == 2
    code, out, err = verb("--uri", uri, "--json")
    assert (code, json.loads(out)["runs"]) == (0, 2), err
    client, experiment = track.store(Track(uri=uri))
    assert sorted(r.info.run_name for r in client.search_runs([experiment])) == ["far", "far", "near", "near"]
    shutil.rmtree(tmp_path / "away")
    assert json.loads(verb("--uri", uri, "--json")[1])["runs"] == 0


def test_help_names_the_folder_that_is_searched(verb, capsys):
    with pytest.raises(SystemExit):
        verb("--help")
    out = capsys.readouterr().out
    told = "default: outputs, and the sweeps of outputs/sweeps.json, which lie elsewhere"
    assert told in " ".join(out.split()) and "PosixPath" not in out


def test_folders_go_by_name_and_one_that_is_not_there_is_told(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(sync, "sync", lambda folders, uri: asked.append(folders) or sync.Brought())
    assert verb()[0] == 0  # nothing was run yet
    made.sweep(tmp_path / "outputs" / "sweeps" / "s")
    assert verb("s", "outputs")[0] == 0
    assert asked == [[Path("outputs")], [Path("outputs/sweeps/s"), Path("outputs")]]
    code, _, err = verb("ss")
    assert code == 4
    assert err == "ftexp: ss: must be a folder with runs in it, there is none; did you mean s?; there are: sweeps s\n"


def test_interruption_ends_in_one_line(monkeypatch, capsys):
    def interrupted(folders, uri):
        raise KeyboardInterrupt

    monkeypatch.setattr(sync, "sync", interrupted)
    monkeypatch.setattr(sys, "argv", ["sync"])
    assert sync.main() == 130
    assert capsys.readouterr().err == "ftexp: interrupted; the same command goes on\n"


def test_second_store_takes_each_run_once_and_leaves_the_first_alone(cli, verb, tmp_path):
    own, team = (f"sqlite:///{tmp_path}/{name}.db" for name in ("own", "team"))
    assert cli("lora.r=2,4", *TINY, "name=s", f"track.uri={own}", "-m")[0] == 0
    told = [json.loads(verb("--json", *given)[1]) for given in (["--uri", team], [], ["--uri", team], ["--uri", own])]
    assert [t["runs"] for t in told] == [3, 0, 0, 0]
    assert len(histories(own)) == len(histories(team)) == 3
    params = []
    for uri in (own, team):
        client, experiment = track.store(Track(uri=uri))
        params += [r.data.params for r in client.search_runs([experiment]) if r.info.run_name == "s"]
    assert params[0] == params[1] and params[0]["lora.r"] == "2,4"
    assert team not in "".join(p.read_text() for p in (tmp_path / "outputs").rglob("*.json"))


def test_keys_without_effect_are_in_no_store_and_in_the_folder(cli, verb, tmp_path):
    """A rank beside `lora=none` misleads where trials are compared; run, sweep and `sync` leave out the same."""
    own, team = (f"sqlite:///{tmp_path}/{name}.db" for name in ("own", "team"))
    assert cli("seed=0,1", "lora=none", *UNWRITTEN, "eval=loss", "name=s", f"track.uri={own}", "-m")[0] == 0
    assert cli("lora=none,default", *UNWRITTEN, "eval=loss", "name=both", f"track.uri={own}", "-m")[0] == 0
    assert json.loads(verb("--uri", team, "--json")[1])["runs"] == 6
    told = {}
    for uri in (own, team):
        client, experiment = track.store(Track(uri=uri))
        told[uri] = {r.info.run_name: r.data.params for r in client.search_runs([experiment])}
    for name in told[own]:
        assert told[own][name].keys() - told[team][name].keys() <= {"name", "trainer.checkpoint_minutes"}
        assert told[team][name].items() <= told[own][name].items()
    for uri in (own, team):
        rank = {name: params.get("lora.r") for name, params in told[uri].items()}
        assert rank == {"s": None, "seed=0": None, "seed=1": None, "both": "16", "lora=none": None, "lora=default": "16"}  # fmt: skip
        assert {name: p.get("lora.variant") for name, p in told[uri].items()} == {
            "s": "none", "seed=0": "none", "seed=1": "none", "both": None, "lora=none": "none", "lora=default": "lora"}  # fmt: skip
    assert read_json(tmp_path / "outputs/sweeps/s/0/trial.json")["config"]["lora.r"] == 16


def test_run_that_went_on_while_its_server_was_down_stays_one_run(cli, verb, tmp_path, monkeypatch):
    """Asked to leave, gone on with without an answer, and brought: one run, finished, with no word of the first end."""
    from ftexp.train import control

    uri = f"sqlite:///{tmp_path}/ml.db"
    given = [*TINY, "name=pre", f"track.uri={uri}", "trainer.steps=6"]
    seen = []
    monkeypatch.setattr(control.LEAVE, "is_set", lambda: len(seen.append(1) or seen) > 2)
    code, _, err = cli(*given)
    assert code in (75, 130), err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    control.LEAVE.clear()
    client, experiment = track.store(Track(uri=uri))
    [before] = client.search_runs([experiment])
    assert before.info.status == "KILLED"  # not a failure
    assert track.ERROR in before.data.tags
    monkeypatch.setattr(track, "_dead", {uri})  # no answer from here on
    code, _, err = cli(*given)
    assert code == 0, err
    kept = read_json(tmp_path / "outputs/runs/pre/trial.json")
    assert kept["mlflow_run"] == before.info.run_id
    monkeypatch.setattr(track, "_dead", set())
    assert verb()[0] == 0
    [after] = client.search_runs([experiment])
    assert (after.info.run_id, after.info.status) == (before.info.run_id, "FINISHED")
    assert track.ERROR not in after.data.tags
    assert histories(uri)["pre"] == in_files(tmp_path / "outputs/runs/pre")


def test_run_that_failed_says_why_in_the_store_it_is_brought_to_and_when_it_was(cli, verb, tmp_path):
    assert cli(*TINY, "name=bad", DEAD)[0] == 0
    path = tmp_path / "outputs/runs/bad/trial.json"
    write_json(path, read_json(path) | {"state": "failed", "error": "diverged at step 2: train/loss is nan"})
    write_json(
        tmp_path / "outputs/runs/k/trial.json",
        read_json(tmp_path / "outputs/runs/bad/trial.json") | {"state": "running"},
    )
    uri = f"sqlite:///{tmp_path}/other.db"
    code, out, _ = verb("--uri", uri)
    assert (code, "left out 1 that are not over" in out) == (0, True)
    client, experiment = track.store(Track(uri=uri))
    [run] = client.search_runs([experiment])
    times = [
        json.loads(line)["time"] for line in (tmp_path / "outputs/runs/bad/metrics.jsonl").read_text().splitlines()
    ]
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FAILED", int(min(times)), int(max(times)))
    assert "diverged" in run.data.tags[track.ERROR]


def stopped(sweep, record, *_):
    record.set_user_attr(worker.LEAVE, True)


def asked_by_a_signal(*_):
    raise Preempted("asked to leave at step 1 of 2")


@pytest.mark.parametrize("ended", [stopped, asked_by_a_signal])
def test_sweep_that_was_stopped_is_killed_in_the_store_and_runs_again_when_it_goes_on(
    cli, tmp_path, monkeypatch, ended
):
    from ftexp.sweep import plugin

    uri = f"sqlite:///{tmp_path}/ml.db"
    given = [*UNWRITTEN, "lora.r=2,4", "name=s", f"track.uri={uri}", "eval=loss", "-m"]
    honest, seen = plugin._run_left, []
    monkeypatch.setattr(plugin, "_run_left", ended)
    assert cli(*given)[0] == 75
    client, experiment = track.store(Track(uri=uri))
    parent = read_json(tmp_path / "outputs/sweeps/s/sweep.json")["mlflow_run"]
    assert client.get_run(parent).info.status == "KILLED"

    def watched(*all_of):
        seen.append(client.get_run(parent).info.status)
        return honest(*all_of)

    monkeypatch.setattr(plugin, "_run_left", watched)
    assert cli(*given)[0] == 0
    assert (seen, client.get_run(parent).info.status) == (["RUNNING"], "FINISHED")


def test_what_is_written_while_the_store_is_asked_stays(cli, verb, tmp_path, monkeypatch):
    """A launch that goes on, and a trial that ends, were put back to what had been read before."""
    uri = f"sqlite:///{tmp_path}/ml.db"
    assert cli("lora.r=2", *UNWRITTEN, "name=s", f"track.uri={uri}", "eval=loss", "-m")[0] == 0
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    for path in (sweep / "sweep.json", sweep / "0" / "trial.json"):
        write_json(path, read_json(path) | {"mlflow_run": None})
    honest = track.create

    def slow(*given):
        for path in (sweep / "sweep.json", sweep / "0" / "trial.json"):
            write_json(path, read_json(path) | {"meanwhile": 1})
        return honest(*given)

    monkeypatch.setattr(track, "create", slow)
    assert verb()[0] == 0
    for path in (sweep / "sweep.json", sweep / "0" / "trial.json"):
        assert read_json(path)["meanwhile"] == 1 and read_json(path)["mlflow_run"]
