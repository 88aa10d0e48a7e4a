"""MLflow as the view: what arrives, eight openers of an empty store, and a server that is not there."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftexp import track
from ftexp.config import Track, Tracker
from ftexp.errors import MachineError


@pytest.fixture
def store(tmp_path):
    return Track(uri=f"sqlite:///{tmp_path}/ml.db", experiment="t")


@pytest.fixture
def tracked(tiny, store):
    run = tiny()
    run.track = store
    return run


def test_run_arrives_whole(tracked, tmp_path):
    parent = track.open_parent(tracked.track, "sweep", tmp_path, {"lora.r": "4,8"})
    (tmp_path / "file.txt").write_text("x")
    with track.start(tracked, tmp_path / "0", "lora.r=4", parent) as log:
        log.params(track.params(tracked))
        for _ in range(2):  # a run that goes on tells them again
            log.inputs([{"name": "my.jsonl/train", "sha256": "ab" * 32, "rows": 7, "kind": "jsonl", "context": "training",
                         "source": {"path": "my.jsonl"}}])  # fmt: skip
        log.tags({"ftexp.weights": "abc"})
        for step in range(5):
            log.metrics({"train/loss": 1 / (step + 1)}, step)
        log.table([{"prompt": "a", "prediction": "b"}], "examples")
        log.files(tmp_path / "file.txt")
    track.end(tracked.track, parent, {}, {"trials": 1.0}, "FINISHED")
    client, experiment = track.store(tracked.track)
    runs = {r.info.run_name: r for r in client.search_runs([experiment])}
    trial = runs["lora.r=4"]
    assert trial.info.status == "FINISHED"
    assert trial.data.tags["mlflow.parentRunId"] == parent == runs["sweep"].info.run_id
    assert trial.data.params["lora.r"] == "16"
    assert trial.data.tags["ftexp.weights"] == "abc"
    (given,) = trial.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest, given.dataset.source_type) == (
        "my.jsonl/train",
        "ab" * 18,
        "jsonl",
    )
    assert json.loads(given.dataset.profile) == {"num_rows": 7}
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]
    assert [m.value for m in client.get_metric_history(trial.info.run_id, "train/loss")] == [1 / n for n in range(1, 6)]
    assert {f.path for f in client.list_artifacts(trial.info.run_id)} == {"examples.json", "file.txt"}
    assert runs["sweep"].data.metrics["trials"] == 1


def test_files_hold_every_point_without_a_store(tiny, tmp_path):
    with track.start(tiny(), tmp_path, "x", None) as log:
        log.metrics({"train/loss": 2.0, "train/lr": 0.1}, 1)
        log.metrics({"valid/loss": 1.5}, 1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.pop("time") > 1e12 for line in lines] == [True, True]
    assert lines == [{"step": 1, "train/loss": 2.0, "train/lr": 0.1}, {"step": 1, "valid/loss": 1.5}]


def test_points_that_are_not_finite_are_json_and_go_on_as_they_were(tiny, tmp_path):
    """A bare NaN is none; a run that goes on writes the points before again."""
    for done in (0, 1):
        with track.start(tiny(), tmp_path, "x", None, done=done) as log:
            log.metrics({"valid/f1": math.nan}, 1 + done)
    told = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail)["valid/f1"] for line in told.splitlines()] == [None, None]
    assert [(math.isnan(value), step) for value, step in track.curve(tmp_path / "metrics.jsonl", "valid/f1")] == [
        (True, 1), (True, 2)]  # fmt: skip


def test_failed_run_says_why(tracked, tmp_path):
    with pytest.raises(ZeroDivisionError), track.start(tracked, tmp_path / "0", "x", None):
        raise ZeroDivisionError("by zero")
    client, experiment = track.store(tracked.track)
    run = client.search_runs([experiment])[0]
    assert run.info.status == "FAILED"
    assert run.data.tags["ftexp.error"] == "ZeroDivisionError: by zero"


def test_store_that_fails_midway_costs_one_warning(tracked, tmp_path, capfd, monkeypatch):
    from mlflow.exceptions import MlflowException

    with track.start(tracked, tmp_path / "0", "x", None) as log:

        def fail(*_, **__):
            raise MlflowException("database is gone")

        monkeypatch.setattr(log.client, "log_batch", fail)
        for step in range(3):
            log.metrics({"train/loss": 1.0}, step)
            log.flush()
    assert len((tmp_path / "0" / "metrics.jsonl").read_text().splitlines()) == 3
    assert capfd.readouterr().err.count("MLflow failed") == 1


def test_store_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "ml.db").write_text("this is no database, but it is long enough to be read as the header of one" * 9)
    with pytest.raises(MachineError, match=r"track\.uri=sqlite:.*ml\.db cannot be opened"):
        track.store(Track(uri=f"sqlite:///{tmp_path}/ml.db"))


@pytest.mark.parametrize("uri", ["./mlruns", "mlruns.db", "file:./mlruns"])
def test_folder_that_mlflow_takes_no_more_is_refused_with_a_database_to_take(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = f"track.uri={uri} must be a database, as track.uri=sqlite:///mlruns.db: MLflow takes no folder"
    with pytest.raises(MachineError, match=f"^{re.escape(wanted)}$"):
        track.store(Track(uri=uri))


def test_dead_server_is_named_soon(monkeypatch):
    started = time.monotonic()
    with pytest.raises(MachineError, match="cannot be opened"):
        track.store(Track(uri="http://127.0.0.1:9"))
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_four_processes_open_an_empty_store(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ftexp import track; from ftexp.config import Track\n"
        "t = Track(uri=sys.argv[1]); p = track.open_parent(t, 'x', Path('.'), {}); track.end(t, p, {}, {'a': 1.0}, 'FINISHED')"
    )
    uri = f"sqlite:///{tmp_path}/ml.db"
    children = [
        subprocess.Popen([sys.executable, "-c", code, uri], stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert [(c.communicate()[1], c.returncode)[1] for c in children] == [0] * 4
    client, experiment = track.store(Track(uri=uri))
    assert [r.info.status for r in client.search_runs([experiment])] == ["FINISHED"] * 4


def test_no_tracker_opens_nothing(tmp_path):
    assert track.open_parent(Track(kind=Tracker.none), "x", tmp_path, {}) is None
    track.end(Track(kind=Tracker.none), None, {}, {}, "FINISHED")


def test_parameter_that_changed_between_attempts_is_a_tag_and_nothing_is_lost(composed, tmp_path):
    """After memory ran out the batch is another; MLflow takes no second value of a parameter."""
    run = composed(f"track.uri=sqlite:///{tmp_path}/m.db", "trainer.batch=8")
    with track.start(run, tmp_path / "r", "t", None) as log:
        log.params(track.params(run))
        before = log.run_id
    less = composed(f"track.uri=sqlite:///{tmp_path}/m.db", "trainer.batch=4", "trainer.accumulation=2")
    with track.start(less, tmp_path / "r", "t", None, before) as log:
        log.params(track.params(less))
        log.metrics({"valid/loss": 0.5}, 1)
        assert (log.run_id, log.client is None) == (before, False)
    stored = track.store(run.track)[0].get_run(before)
    assert (stored.info.status, stored.data.params["trainer.batch"]) == ("FINISHED", "8")
    assert stored.data.tags["ftexp.changed.trainer.batch"] == "4"
    assert stored.data.metrics["valid/loss"] == 0.5


def test_store_prints_nothing_on_our_stdout():
    """MLflow greets with a picture of a runner when a run of a server ends: in JSON, and where there are no such letters."""
    from mlflow.environment_variables import MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT

    track._restrain()
    assert MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.get() is True


def test_empty_store_is_copied_where_one_is_kept(tmp_path, monkeypatch):
    """MLflow takes seconds to make the tables of one; a copy has the same tables, and experiments of its own place."""
    import sqlite3
    from contextlib import closing

    from mlflow.db import upgrade

    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path / "cache"))
    made, honest = [], upgrade.callback
    monkeypatch.setattr(upgrade, "callback", lambda url: (made.append(url), honest(url)))
    honest(f"sqlite:///{tmp_path}/own.db")
    (tmp_path / "a").mkdir()
    client, experiment = track.store(Track(uri=f"sqlite:///{tmp_path}/a/first.db"))
    track.store(Track(uri=f"sqlite:///{tmp_path}/b/second.db"))
    assert len(made) == 1
    assert client.get_experiment(experiment).artifact_location == f"file://{tmp_path}/a/mlartifacts"

    def told(path):
        with closing(sqlite3.connect(path)) as store:
            tables = store.execute("select name from sqlite_master order by name").fetchall()
            return tables, store.execute("select * from alembic_version").fetchall()

    assert told(tmp_path / "a/first.db") == told(tmp_path / "b/second.db") == told(tmp_path / "own.db")
    assert sorted(path.name for path in (tmp_path / "b").iterdir() if path.name.startswith("second")) == [
        "second.db",
        "second.db.lock",
    ]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_store_that_code_of_ones_own_opened_by_name_in_another_folder_is_another(tmp_path, monkeypatch):
    """MLflow keeps its stores by their addresses as given, and would hand out the first one."""
    from mlflow import MlflowClient

    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    own = MlflowClient(tracking_uri="sqlite:///m.db")
    own.create_experiment("own")
    monkeypatch.chdir(tmp_path / "b")
    client, _ = track.store(Track(uri="sqlite:///m.db"))
    assert [one.name for one in client.search_experiments() if one.name != "Default"] == ["ftexp"]
    assert own.get_experiment_by_name("ftexp") is None
    run = client.create_run("1").info.run_id
    (tmp_path / "b" / "page.html").write_text("page")
    track.attach("sqlite:///m.db", run, Path("page.html"), "told")
    assert [one.path for one in client.list_artifacts(run)] == ["page.html"]


def test_store_is_made_where_none_can_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path / "file" / "cache"))
    client, experiment = track.store(Track(uri=f"sqlite:///{tmp_path}/m.db"))
    assert client.get_experiment(experiment).name == "ftexp"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that is there and takes no file")
def test_store_is_made_where_the_cache_is_there_and_takes_no_file(tmp_path, monkeypatch):
    """MLflow would ask a base that cannot be made for minutes, and then fail."""
    monkeypatch.setenv("FTEXP_CACHE", "/proc/self")
    track.store(Track(uri=f"sqlite:///{tmp_path}/m.db"))
    assert (tmp_path / "m.db").stat().st_size > 100_000


def test_torn_cached_store_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path / "cache"))
    track.store(Track(uri=f"sqlite:///{tmp_path}/a.db"))
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:50_000])
    track.store(Track(uri=f"sqlite:///{tmp_path}/b.db"))
    assert len(kept.read_bytes()) == len(whole)


def test_store_with_a_query_or_behind_a_link_is_where_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path / "cache"))
    track.store(Track(uri=f"sqlite:///{tmp_path}/a/m.db?timeout=5"))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["m.db", "m.db.lock"]
    (tmp_path / "m.db").symlink_to("a/there.db")
    track.store(Track(uri=f"sqlite:///{tmp_path}/m.db"))
    assert (tmp_path / "m.db").is_symlink() and (tmp_path / "a/there.db").is_file()
