"""Engines start the worker command and tell whether it runs; what they cannot start is refused before anything is."""

import os
import signal
import subprocess
import sys

import optuna
import pytest
from conftest import UNWRITTEN

from ftexp.errors import ConfigError
from ftexp.sweep import engines, study, worker
from ftexp.sweep.options import Engine, Options

SWEEP = [*UNWRITTEN, "track=none", "eval=loss", "lora.r=2,4,8"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sweep.engine=slurm"], "sweep.workers must be set with sweep.engine=slurm, got 0"),
        (["sweep.engine=ray"], "sweep.workers must be set with sweep.engine=ray, got 0"),
        (["sweep.engine_args.num_cpus=2"], "sweep.engine_args are for sweep.engine=slurm or ray, got num_cpus"),
        (["sweep.engine=k8s"], "k8s"),
        (["sweep.storage=grpc://nowhere"], "must be grpc://host:port"),
        (["sweep.storage=postgresql://me:hunter2@db/x"], "sweep.storage must not hold a user or password"),
    ],
)
def test_what_cannot_start_is_refused(cli, tmp_path, given, message):
    code, _, err = cli(*SWEEP, *given, "name=s", "-m")
    assert code in (2, 4)
    assert message in err
    assert "hunter2" not in err
    assert not list(tmp_path.glob("outputs/sweeps/s/[0-9]*"))


def test_a_name_without_a_password_is_no_secret():
    from ftexp import config

    config.refuse_secret("sweep.storage", "postgresql+psycopg://me@db/x")
    for secret in ("https://hf_token@host/x", "postgresql://me:pass@db/x", "see https://me@host"):
        with pytest.raises(ConfigError, match="must not hold"):
            config.refuse_secret("k", secret)


def test_an_engine_that_is_not_installed_names_its_extra(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ftexp\[ray\]'"):
        engines.check(Options(engine=Engine.ray, workers=2))


def test_keywords_submitit_does_not_know_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"sweep.engine_args is refused by submitit: .*partitio"):
        engines.starter(
            Options(engine=Engine.slurm, workers=1, engine_args={"cluster": "local", "partitio": "x"}), tmp_path, {}
        )


def stubborn(tmp_path, answer):
    """A process that answers SIGUSR2 as told."""
    code = f"import signal,time; signal.signal(signal.SIGUSR2, {answer}); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_a_worker_leaves_by_itself_or_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "GRACE_SECONDS", 0.5)
    willing, deaf = stubborn(tmp_path, "lambda *_: exit(75)"), stubborn(tmp_path, "signal.SIG_IGN")
    engines.leave(willing)
    engines.leave(deaf)
    assert willing.wait(5) == worker.PREEMPTED
    assert deaf.wait(5) == -signal.SIGKILL


def test_a_second_signal_of_a_scheduler_says_nothing_new(tmp_path):
    code = ("import os,signal,time\nfrom ftexp.train import control\ncontrol.listen()\n"
            "with control.at_work():\n for _ in range(2): os.kill(os.getpid(), signal.SIGUSR2); time.sleep(.1)\n"
            "print(control.LEAVE.is_set())")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_ticket_of_a_worker_known_to_be_gone_is_queued_at_once(tmp_path):
    """A worker of another machine is silent for minutes before it is taken for dead; its job's end says so at once."""
    record = optuna.create_study()
    study.queue(record, [{}, {}])
    for token in ("a", "b"):
        trial = study.claim(record, token)
        away = {**trial.user_attrs["ftexp:worker"], "host": "elsewhere"}
        record._storage.set_trial_user_attr(trial._trial_id, "ftexp:worker", away)
    assert study.reap(record, 3) == []
    assert study.reap(record, 3, {"b"}) == [1]


def test_the_worker_signs_with_its_token(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **_: seen.update(env, command=command))
    (tmp_path / "workers").mkdir()
    engines.launched(tmp_path, 1, {"CUDA_VISIBLE_DEVICES": "1"}, "3", "abc")
    assert (seen[worker.TOKEN], seen["CUDA_VISIBLE_DEVICES"]) == ("abc", "1")
    assert seen["command"][-1] == str(tmp_path)
    assert (tmp_path / "workers" / "3.log").exists()
    assert os.environ.get(worker.TOKEN) is None
    engines.launched(tmp_path, 2, {}, "3", "abc")
    assert seen["command"][-3:] == ["ftexp.sweep.torchrun", "2", str(tmp_path)]
