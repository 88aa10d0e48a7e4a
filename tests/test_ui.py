import base64
import json
import socket
import sys
import zlib

import pytest
from conftest import UNWRITTEN

from ftexp import track, ui
from ftexp.config import Track
from ftexp.errors import ConfigError, MachineError
from ftexp.files import read_json


def test_store_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MachineError, match=r"no\.db: there are no runs to show yet"):
        ui.command(f"sqlite:///{tmp_path}/no.db", 5000)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "outputs/mlflow.db", "./mlruns", "file:./mlruns", "sqlite"])
def test_store_that_is_no_database_is_refused(uri):
    with pytest.raises(ConfigError, match=r"^--uri must be an address of a database, as sqlite:///outputs/mlflow\.db"):
        ui.command(uri, 5000)


def test_serves_on_this_machine_only(tmp_path):
    (tmp_path / "a.db").touch()
    serve = ui.command(f"sqlite:///{tmp_path}/a.db", 5001)
    assert serve[serve.index("--host") + 1] == "127.0.0.1"
    assert serve[serve.index("--port") + 1] == "5001"


def test_port_that_another_program_has_is_told_before_a_server_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.db").touch()
    monkeypatch.setattr(ui.os, "execv", lambda *_: pytest.fail("a server was started"))
    with socket.socket() as other:
        other.bind((ui.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["ui", "--uri", f"sqlite:///{tmp_path}/a.db", "--port", str(port)])
        assert ui.main() == MachineError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert f"--port {port}: Address already in use; choose another, such as {port + 1}" in err
    ui.check_port(port)  # free now


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_port_that_does_not_exist_is_refused(tmp_path, monkeypatch, capsys, port):
    (tmp_path / "a.db").touch()
    monkeypatch.setattr(sys, "argv", ["ui", "--uri", f"sqlite:///{tmp_path}/a.db", "--port", port])
    assert ui.main() == 2
    assert f"--port must be from 1 to 65535, got {port}" in capsys.readouterr().err


def test_newest_sweep_is_a_view_of_its_trials_best_first_and_its_link_is_printed(cli, tmp_path, monkeypatch, capsys):
    """The table of runs shows no score by itself, and the pages for agents first."""
    uri = f"sqlite:///{tmp_path}/m.db"
    given = [*UNWRITTEN, "eval=loss", f"track.uri={uri}"]
    assert cli(*given, "lora.r=2", "trainer.steps=2", "name=alone")[0] == 0
    assert track.viewed(uri) is None
    assert cli(*given, "lora.r=2,4", "lora=default,dora", "name=first", "-m")[0] == 0
    client, experiment = track.store(Track(uri=uri))

    def view():
        [told] = [json.loads(v) for k, v in client.get_experiment(experiment).tags.items() if k.startswith(track.VIEWS)]
        return told, json.loads(zlib.decompress(base64.b64decode(told["state"].removeprefix("deflate;"))))

    assert [c for c in view()[1]["selectedColumns"] if c.startswith("params.")] == [
        "params.`lora.r`"
    ]  # lora is no one key
    assert cli(*given, "lora.r=2,4", "name=s", "objectives=[train/loss]", "-m")[0] == 0
    told, state = view()
    order = f"{state['orderByKey']} {'ASC' if state['orderByAsc'] else 'DESC'}"
    found = client.search_runs([experiment], state["searchFilter"], order_by=[order])
    assert (told["name"], {run.info.run_name for run in found}) == ("sweep s", {"lora.r=2", "lora.r=4"})
    assert found[0].data.metrics["train/loss"] < found[1].data.metrics["train/loss"]
    there = {f"metrics.`{k}`" for k in found[0].data.metrics} | {f"params.`{k}`" for k in found[0].data.params}
    assert {"metrics.`train/loss`", "params.`lora.r`"} <= set(state["selectedColumns"]) <= there
    monkeypatch.setattr(ui.os, "execv", lambda *_: None)
    with socket.socket() as free:
        free.bind((ui.HOST, 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(sys, "argv", ["ui", "--uri", uri, "--port", str(port)])
    ui.main()
    link = (
        f"http://127.0.0.1:{port}/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=ftexp"
    )
    assert f"newest sweep: {link}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("said", "told"), [("Permission denied", "Permission denied"), ("", "MlflowException")])
def test_sweep_whose_view_is_refused_runs_all_the_same(cli, tmp_path, monkeypatch, said, told):
    """As by a server that lets a person write runs and no tags of the experiment."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def refused(*_):
        raise MlflowException(said)

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refused)
    uri = f"sqlite:///{tmp_path}/m.db"
    code, _, err = cli(*UNWRITTEN, "eval=loss", f"track.uri={uri}", "lora.r=2,4", "name=s", "-m")
    assert code == 0
    assert f"sweep s is no view in MLflow: {told}" in err and "files only" not in err
    client, experiment = track.store(Track(uri=uri))
    assert {run.info.status for run in client.search_runs([experiment])} == {"FINISHED"}


def test_run_of_a_sweep_describes_what_its_ranking_is_worth(cli, tmp_path):
    uri = f"sqlite:///{tmp_path}/m.db"
    assert cli(*UNWRITTEN, "eval=loss", f"track.uri={uri}", "lora.r=2,4", "name=s", "-m")[0] == 0
    parent = read_json(tmp_path / "outputs/sweeps/s/sweep.json")["mlflow_run"]
    note = track.store(Track(uri=uri))[0].get_run(parent).data.tags["mlflow.note.content"]
    assert note.startswith("- lora.r=") and " is best (loss " in note and "\n- 12 rows: " in note
