"""The proxy of a launch: in front of a database, on loopback, put back when it dies, gone with the launch."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from ftexp.errors import ConfigError
from ftexp.sweep import frozen, proxy, space, study, worker
from ftexp.sweep.options import Engine, Options


def made(tmp_path, **options):
    """A sweep over SQLite: the proxy does not care which database it serves, and no server has to be there."""
    given = Options(storage=f"sqlite:///{tmp_path}/study.db", **options)
    (tmp_path / "workers").mkdir()
    sweep = frozen.Frozen(tmp_path, "s", space.parse(["seed=0,1"]), given, ["valid/loss"], None, "", {})
    sweep.save()
    return sweep


def with_proxy(sweep):
    object.__setattr__(sweep.options, "proxy", 0)  # the options refuse it in front of SQLite
    return sweep


def test_none_is_started_unasked(tmp_path):
    with proxy.serving(made(tmp_path)) as (shared, look):
        look()
        assert shared == {}
    assert not psutil.Process().children()


@pytest.mark.parametrize("storage", [None, "sqlite:///x.db", "grpc://host:1"])
def test_it_stands_in_front_of_a_database(storage):
    with pytest.raises(ConfigError, match=r"sweep.proxy=0 needs a database in sweep.storage"):
        Options(storage=storage, proxy=0)


def test_a_port_is_a_port():
    with pytest.raises(ConfigError, match="sweep.proxy must be null or a port"):
        Options(storage="postgresql://me@db/x", proxy=70_000)


@pytest.mark.parametrize(
    ("engine", "where", "told"), [(Engine.local, "127.0.0.1", "127.0.0.1"), (Engine.slurm, "0.0.0.0", "here")]
)
def test_only_a_cluster_reaches_it_from_outside(tmp_path, monkeypatch, engine, where, told):
    seen = []

    class Serving:
        returncode = None

        def poll(self):
            return None

        kill = wait = poll

    monkeypatch.setattr(proxy, "_started", lambda folder, host, port: seen.append(host) or Serving())
    monkeypatch.setattr(proxy.socket, "gethostname", lambda: "here")
    with proxy.serving(with_proxy(made(tmp_path, engine=engine))) as (shared, _):
        assert shared[worker.RECORD].startswith(f"grpc://{told}:")
    assert seen == [where]


@pytest.mark.slow
def test_workers_reach_the_record_through_it_and_one_that_dies_is_put_back(tmp_path, monkeypatch):
    sweep = with_proxy(made(tmp_path))
    with proxy.serving(sweep) as (shared, look):
        monkeypatch.setenv(worker.RECORD, shared[worker.RECORD])
        monkeypatch.setattr(worker, "LOOK_SECONDS", 0.2)
        record = worker.open_study(sweep)
        assert type(record._storage).__name__ == "GrpcStorageProxy"
        study.queue(record, [{"seed": "0"}, {"seed": "1"}])
        assert study.ticket(study.claim(record)._cached_frozen_trial) == 0
        [serving] = [p for p in psutil.Process().children() if "ftexp.sweep.proxy" in p.cmdline()]
        assert [c.laddr.ip[-9:] for c in serving.net_connections() if c.status == "LISTEN"] == ["127.0.0.1"]
        serving.kill()
        serving.wait()
        look()
        claimed = study.claim(record)  # waits for the new one
        assert study.ticket(claimed._cached_frozen_trial) == 1
    monkeypatch.delenv(worker.RECORD)
    assert [t.state.name for t in study.counted(worker.open_study(sweep))] == ["RUNNING", "RUNNING"]
    assert not [p for p in psutil.Process().children() if "ftexp.sweep.proxy" in p.cmdline()]


@pytest.mark.slow
def test_it_dies_with_a_launch_that_is_killed(tmp_path):
    made(tmp_path)
    code = ("import sys, time; from pathlib import Path; from ftexp.sweep import proxy\n"
            "print(proxy._started(Path(sys.argv[1]), '127.0.0.1', proxy._free()).pid, flush=True); time.sleep(60)")  # fmt: skip
    launch = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    serving = psutil.Process(int(launch.stdout.readline()))
    launch.kill()
    launch.wait()
    until = time.monotonic() + 10
    while serving.is_running() and serving.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_password_is_not_among_what_the_proxy_is_told(tmp_path, monkeypatch):
    """It reads the sweep's file itself; a process list shows folder, host and port alone."""
    seen = []
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: seen.append(words))
    made(tmp_path)
    proxy._started(tmp_path, "127.0.0.1", 5)
    assert seen[0][-3:] == [str(tmp_path), "127.0.0.1", "5"]
    assert os.environ.get(worker.RECORD) is None
