"""A sweep of several workers told to a real MLflow server that takes artifacts itself, also while it is away."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import servers
from conftest import UNWRITTEN
from mlflow import MlflowClient

WORDS = [*(t for t in UNWRITTEN if ".steps" not in t), "trainer.steps=4", "eval=loss", "name=s"]


def launch(folder, *more):
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ftexp.run", "lora.r=1,2,3,4", *WORDS, "sweep.workers=2", *more, "-m"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def told(uri, scratch, name="ftexp"):
    """Runs of an experiment by trial number, each with the hashes of its artifacts as the server hands them out."""
    client = MlflowClient(uri)
    [experiment] = [e for e in client.search_experiments() if e.name == name]
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert len(parents) == 1
    found = {}
    for run in runs:
        if run is parents[0]:
            continue
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert run.info.status == "FINISHED"
        assert run.info.artifact_uri.startswith("mlflow-artifacts:")  # no path of the server's disk
        into = scratch / run.info.run_id
        into.mkdir(parents=True)
        got = Path(client.download_artifacts(run.info.run_id, "", str(into)))
        hashes = {
            str(p.relative_to(got)): hashlib.sha256(p.read_bytes()).hexdigest() for p in got.rglob("*") if p.is_file()
        }
        steps = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/loss")}
        assert int(run.data.params["lora.r"]) not in found
        found[int(run.data.params["lora.r"])] = (hashes, steps)
    return found


def right(found, folder):
    """Whether the server has what the folder of each trial has, and nothing twice."""
    assert sorted(found) == [1, 2, 3, 4]
    for rank, (hashes, steps) in found.items():
        trial = folder / "outputs/sweeps/s" / str(rank - 1)
        for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "examples.parquet"):
            assert hashes[name] == hashlib.sha256((trial / name).read_bytes()).hexdigest()
        assert sorted(steps) == [1, 2, 3, 4]


@pytest.mark.cluster
def test_a_server_gets_every_point_and_the_bytes_of_every_adapter(tmp_path):
    at = servers.port()
    with servers.mlflow(tmp_path / "server", at) as uri:
        done = launch(tmp_path / "a", f"track.uri={uri}")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "ftexp.sync" not in done.stderr
        right(told(uri, tmp_path / "first"), tmp_path / "a")
    # the server is away: the sweep ends all the same, and is brought to it later
    done = launch(tmp_path / "b", f"track.uri={uri}", "track.experiment=away")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bring them later with: python -m ftexp.sync" in done.stderr
    assert "Retrying" not in done.stdout  # of urllib3, through Hydra's log
    with servers.mlflow(tmp_path / "server", at):
        brought = subprocess.run(
            [sys.executable, "-m", "ftexp.sync"], cwd=tmp_path / "b", capture_output=True, text=True, timeout=300
        )
        assert brought.returncode == 0, brought.stderr[-3000:]
        right(told(uri, tmp_path / "second", "away"), tmp_path / "b")
