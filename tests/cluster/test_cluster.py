"""The same sweep on Slurm, on two Ray nodes and over PostgreSQL, workers killed on the way: the same adapters.

`make test` runs it as jobs of submitit's on this machine and, where its programs are, over PostgreSQL, with fewer steps.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import optuna
import psutil
import pytest
import servers
from conftest import UNWRITTEN

from ftexp.files import read_json
from ftexp.sweep import frozen, study, worker

cluster = pytest.mark.cluster
POINTS = ["lora.r=1,2,3,4,5,6", "seed=0,1,2,3"]
BRIEF = 8
"""Steps of a trial where every machine runs the test."""
PLAIN = [*[t for t in UNWRITTEN if ".steps" not in t], "track=none", "eval=loss", "name=s", "sweep.max_retries=9"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def launch(folder, points, *more, steps=30):
    folder.mkdir(exist_ok=True)
    out = (folder / "out.txt").open("a")
    command = [sys.executable, "-m", "ftexp.run", *points, *PLAIN, f"trainer.steps={steps}", *more, "-m"]
    return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, start_new_session=True)


def hashes(folder):
    found = folder.glob("outputs/sweeps/s/*/adapter/adapter_model.safetensors")
    return {p.parts[-3]: hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def undisturbed(folder, steps):
    os.environ["OMP_NUM_THREADS"] = "1"
    assert launch(folder, POINTS, steps=steps).wait(300) == 0, (folder / "out.txt").read_text()
    return hashes(folder)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("calm"), 30)


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("brief"), BRIEF)


def record_of(folder):
    return worker.open_study(frozen.load(folder / "outputs" / "sweeps" / "s"))


def running(folder):
    """Workers at a trial, by their process ids."""
    if not (folder / "outputs/sweeps/s/identity.json").exists():
        return []
    trials = record_of(folder).get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    return [t.user_attrs["ftexp:worker"]["pid"] for t in trials if "ftexp:worker" in t.user_attrs]


def killed_on_the_way(folder, process, blows=4):
    """Kill a worker now and then; tell how many blows met one."""
    dice, met = random.Random(7), 0
    until = time.monotonic() + 300
    while process.poll() is None and met < blows:
        assert time.monotonic() < until
        time.sleep(dice.uniform(1.0, 2.5))
        pids = running(folder)
        if pids and psutil.pid_exists(pid := dice.choice(pids)):
            psutil.Process(pid).send_signal(signal.SIGKILL)
            met += 1
    assert process.wait(400) == 0, (folder / "out.txt").read_text()[-3000:]
    return met


def exact(folder, calm):
    trials = study.counted(record_of(folder))
    assert Counter(t.state.name for t in trials) == {"COMPLETE": 24}
    assert [study.ticket(t) for t in trials] == list(range(24))
    assert hashes(folder) == calm


@cluster
def test_slurm(tmp_path, calm):
    with servers.slurm(tmp_path):
        process = launch(tmp_path / "s", POINTS, "sweep.engine=slurm", "sweep.workers=2")
        assert killed_on_the_way(tmp_path / "s", process) == 4
    exact(tmp_path / "s", calm)


@cluster
def test_slurm_takes_a_job_away_and_the_trial_goes_on(tmp_path):
    """The signal before a time limit or a preemption: a checkpoint is kept, the job comes back, no retry is counted."""
    assert launch(tmp_path / "calm", ["seed=0,1"], steps=300).wait(200) == 0
    folder = tmp_path / "s"
    with servers.slurm(tmp_path):
        process = launch(folder, ["seed=0,1"], "sweep.engine=slurm", "sweep.workers=1", steps=300)
        metrics = folder / "outputs/sweeps/s/0/metrics.jsonl"
        until = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text()):
            assert time.monotonic() < until and process.poll() is None, (folder / "out.txt").read_text()[-3000:]
            time.sleep(0.05)
        [job] = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True).stdout.split()
        subprocess.run(["scancel", "--signal=USR2", job], check=True)
        assert process.wait(300) == 0, (folder / "out.txt").read_text()[-3000:]
    assert len(read_json(folder / "outputs/sweeps/s/0/trial.json")["resumed_at"]) == 1
    assert all(not t.user_attrs.get("ftexp:retries") for t in study.counted(record_of(folder)))
    assert hashes(folder) == hashes(tmp_path / "calm")


@cluster
def test_slurm_job_that_is_cancelled_is_missed(tmp_path, calm):
    with servers.slurm(tmp_path):
        process = launch(tmp_path / "s", POINTS, "sweep.engine=slurm", "sweep.workers=2")
        until = time.monotonic() + 120
        while not running(tmp_path / "s"):
            assert time.monotonic() < until
            time.sleep(0.2)
        job = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True).stdout.split()[0]
        subprocess.run(["scancel", job], check=True)
        assert process.wait(400) == 0, (tmp_path / "s" / "out.txt").read_text()[-3000:]
    exact(tmp_path / "s", calm)


@cluster
def test_two_ray_nodes(tmp_path, calm):
    with servers.ray_nodes(2) as address:
        process = launch(
            tmp_path / "s", POINTS, "sweep.engine=ray", "sweep.workers=2", f"sweep.engine_args.address={address}"
        )
        assert killed_on_the_way(tmp_path / "s", process) == 4
    exact(tmp_path / "s", calm)


@pytest.mark.slow
def test_jobs_of_submitit(tmp_path, brief):
    """`cluster: local` runs each job as a process here; what Slurm itself does is above."""
    local = ["sweep.engine=slurm", "sweep.workers=2", "sweep.engine_args.cluster=local"]
    process = launch(tmp_path / "s", POINTS, *local, steps=BRIEF)
    assert killed_on_the_way(tmp_path / "s", process, blows=2) == 2
    exact(tmp_path / "s", brief)


@pytest.mark.slow
def test_postgres(tmp_path, brief):
    with servers.postgres() as url:
        process = launch(tmp_path / "s", POINTS, "sweep.workers=2", f"sweep.storage={url}", steps=BRIEF)
        assert killed_on_the_way(tmp_path / "s", process, blows=2) == 2
        exact(tmp_path / "s", brief)


@cluster
def test_postgres_behind_the_proxy_of_the_launch(tmp_path, calm):
    """Workers are killed, and the proxy with them; none of them ever holds a connection of its own."""
    with servers.postgres() as url:
        process = launch(tmp_path / "s", POINTS, "sweep.workers=2", f"sweep.storage={url}", "sweep.proxy=0")
        until = time.monotonic() + 200
        while not running(tmp_path / "s"):
            assert time.monotonic() < until and process.poll() is None, (tmp_path / "s" / "out.txt").read_text()
            time.sleep(0.2)
        [serving] = [p for p in psutil.Process(process.pid).children() if "ftexp.sweep.proxy" in p.cmdline()]
        workers = [p for p in psutil.Process(process.pid).children() if "ftexp.sweep.worker" in p.cmdline()]
        ports = [c.raddr.port for p in workers for c in p.net_connections() if c.raddr and c.status == "ESTABLISHED"]
        assert ports and int(url.split(":")[-1].split("/")[0]) not in ports
        serving.kill()
        assert killed_on_the_way(tmp_path / "s", process, blows=3) == 3
        exact(tmp_path / "s", calm)
    assert "the proxy of the record died" in (tmp_path / "s" / "out.txt").read_text()
