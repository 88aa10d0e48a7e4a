"""Slots and real workers: pinned, replaced when killed, and no trial lost or doubled."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext

import psutil
import pytest
from conftest import UNWRITTEN
from optuna.trial import TrialState

from ftexp.files import read_json
from ftexp.sweep import study, supervisor


def test_each_gpu_gets_its_worker(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    places = supervisor.slots(3)
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in places] == ["3", "GPU-abc", "3"]


@pytest.mark.parametrize(("given", "found"), [("", []), ("-1", []), ("0,1", ["0", "1"])])
def test_gpus_follow_the_environment(monkeypatch, given, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert supervisor.gpus() == found


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert [p.cores for p in supervisor.slots(2)] == [{0, 1}, {2, 3}]
    assert supervisor.slots(2)[0].env["OMP_NUM_THREADS"] == "2"


def test_threads_keep_to_the_quota_of_a_container(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(supervisor.machine, "cores", lambda: 4)
    assert [p.env["OMP_NUM_THREADS"] for p in supervisor.slots(2)] == ["2", "2"]
    assert supervisor.slots(2, each=2)[0].env["OMP_NUM_THREADS"] == "1"
    assert supervisor.slots(8)[0].env["OMP_NUM_THREADS"] == "1"


def test_last_trials_get_the_threads_of_the_first(monkeypatch, tmp_path):
    """One ticket left of a sweep with two workers: its worker gets half the machine, as it would have had before."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    seen = []
    monkeypatch.setattr(supervisor, "_tend", lambda sweep, record, slot, *_: seen.append(slot.env["OMP_NUM_THREADS"]))
    waiting = iter([1, 0, 0, 0])
    monkeypatch.setattr(supervisor, "_waiting", lambda record: next(waiting))
    monkeypatch.setattr(supervisor, "_running", lambda record: 0)
    import optuna

    from ftexp.sweep import frozen, space
    from ftexp.sweep.options import Options

    sweep = frozen.Frozen(tmp_path, "s", space.parse(["a=1"]), Options(), ["valid/loss"], None, "", {})
    supervisor.supervise(sweep, optuna.create_study(), 2, 1)
    assert seen == ["2"]


COMMAND = [
    sys.executable,
    "-m",
    "ftexp.run",
    *UNWRITTEN,
    "track=none",
    "eval=loss",
    "name=k",
    "sweep.workers=2",
    "sweep.max_retries=9",
]


def launch(folder, *given):
    out = (folder / "out.txt").open("a")
    return subprocess.Popen([*COMMAND, *given, "-m"], cwd=folder, stdout=out, stderr=out, start_new_session=True)


def hashes(folder):
    import hashlib

    found = folder.glob("outputs/sweeps/k/*/adapter/adapter_model.safetensors")
    return {p.parts[-3]: hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@pytest.mark.slow
def test_killed_worker_and_supervisor_lose_and_double_nothing(cli, tmp_path):
    """Kill a worker, then the supervisor alone; the same command ends with the same six adapters.

    The calm sweep runs in this process: where a trial runs changes no bit.
    """
    points = "lora.r=1,2,3,4,5,6"
    wild = tmp_path / "wild"
    wild.mkdir()
    code, _, err = cli(*COMMAND[3:-2], points, "-m")
    assert code == 0, err
    process = launch(wild, points)
    try:
        _until_trials_run(wild, process)
        first = psutil.Process(process.pid).children(recursive=True)
        random.Random(0).choice(first).send_signal(signal.SIGKILL)
        _until(lambda: {*psutil.Process(process.pid).children(recursive=True)} - {*first}, process)
        workers = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive  # workers end with their supervisor
    assert launch(wild, points).wait(240) == 0, (wild / "out.txt").read_text()
    assert hashes(wild) == hashes(tmp_path)
    assert len(hashes(wild)) == 6
    from pathlib import Path

    import optuna

    from ftexp.sweep import study

    record = optuna.load_study(study_name="k", storage=study.storage(Path(wild / "outputs/sweeps/k"), None))
    assert Counter(t.state.name for t in study.counted(record)) == {"COMPLETE": 6}
    assert [study.ticket(t) for t in study.counted(record)] == list(range(6))


def _until(ready, process):
    for _ in range(600):
        if process.poll() is not None or ready():
            return
        time.sleep(0.1)


def _until_trials_run(folder, process):
    for _ in range(600):
        running = [
            p for p in folder.glob("outputs/sweeps/k/*/trial.json") if (read_json(p) or {}).get("state") == "running"
        ]
        if running or process.poll() is not None:
            return
        time.sleep(0.1)


class Job:
    """A worker of a cluster: pending, or ended with a code."""

    def __init__(self, code=None):
        self.code = code

    def poll(self):
        return self.code

    def kill(self):
        self.code = -9


@pytest.fixture
def queued(tmp_path):
    """A sweep with four tickets, and its record."""
    from ftexp.sweep import frozen, space, worker
    from ftexp.sweep.options import Options

    sweep = frozen.Frozen(tmp_path, "s", space.parse(["a=1,2,3,4"]), Options(), ["valid/loss"], None, "", {})
    record = worker.open_study(sweep)
    study.queue(record, sweep.space.grid())
    return sweep, record


def test_launch_does_not_end_with_a_ticket_that_nobody_queued_again(queued, monkeypatch):
    """A worker tells three ends and is killed while it gives the fourth ticket back."""
    sweep, record = queued
    monkeypatch.setattr(study, "MEND_SECONDS", 0.3)
    taken: list[int] = []

    def start(name, token, env, cores):
        while (trial := study.claim(record, token)) is not None:
            taken.append(study.ticket(trial._cached_frozen_trial))
            if taken == [0, 1, 2, 3]:
                trial.set_user_attr("ftexp:lost", True)
                record._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                return Job(-9)
            record.tell(trial, 0.5)
        return Job(0)

    monkeypatch.setattr(supervisor.engines, "starter", lambda *_: start)
    supervisor.supervise(sweep, record, 1, 4)
    assert taken == [0, 1, 2, 3, 3]
    assert [t.state.name for t in study.counted(record)] == ["COMPLETE"] * 4


def tend(sweep, record, slot, places, code):
    """Have the worker of a slot end, and say whether another one was started."""
    slot.process, before = Job(code), slot.token
    supervisor._tend(sweep, record, slot, places, lambda *_: Job(), set())
    return slot.token != before


def test_deaths_count_from_the_last_trial_that_came_to_its_end(queued):
    """Two points that kill their worker, and others between them, end no sweep."""
    sweep, record = queued
    slot = supervisor.Slot("0", {}, token="t0")
    for _ in range(4):
        for _ in range(3):
            assert tend(sweep, record, slot, [slot], -9)
        if (trial := study.claim(record, slot.token)) is not None and study.ticket(trial._cached_frozen_trial) < 3:
            record.tell(trial, 0.5)
            assert tend(sweep, record, slot, [slot], -9)
            assert slot.deaths == 1
    assert record.user_attrs.get(supervisor.STOP) is None


def test_place_where_every_worker_dies_is_shut_and_the_others_go_on(queued, capfd):
    sweep, record = queued
    places = [supervisor.Slot("0", {}, token="a"), supervisor.Slot("1", {}, token="b")]
    for _ in range(7):
        tend(sweep, record, places[0], places, 4)
    assert places[0].shut
    assert record.user_attrs.get(supervisor.STOP) is None
    assert "worker 0 died 6 times in a row; the others go on without it" in capfd.readouterr().err
    assert not supervisor._given_up(record, places, helps=False)
    for _ in range(6):
        tend(sweep, record, places[1], places, 4)
    study.claim(record, "of another machine")
    assert not supervisor._given_up(record, places, helps=False)
    assert supervisor._given_up(record, places, helps=True)  # a helper leaves, and stops nobody
    assert record.user_attrs.get(supervisor.STOP) is None
    assert "worker 1 died 6 times in a row; this machine helps no further" in capfd.readouterr().err
    study.reap(record, 2, ended={"of another machine"})
    assert not supervisor._given_up(record, places, helps=False)
    assert record.user_attrs[supervisor.STOP] == "worker 1 died 6 times in a row"


def test_place_with_two_faults_of_the_machine_in_a_row_is_shut_while_there_are_others(queued, capfd, monkeypatch):
    """The GPU of one place is broken: it fails no ticket, and takes each once at most before it is left alone."""
    monkeypatch.setattr(supervisor, "REST_SECONDS", 0.0)
    sweep, record = queued
    places = [supervisor.Slot("0", {}, token="a"), supervisor.Slot("1", {}, token="b")]
    taken = []
    for _ in range(3):
        if (trial := study.claim(record, places[0].token)) is not None:
            taken.append(study.ticket(trial._cached_frozen_trial))
            trial.set_user_attr(study.FAULT, "the GPU failed")
        token = places[0].token
        if not tend(sweep, record, places[0], places, 4):
            break
        study.reap(record, 2, ended={token})
    assert (taken, places[0].shut) == ([0, 1], True)
    assert "worker 0 died 2 times in a row; the others go on without it" in capfd.readouterr().err
    study.reap(record, 2, ended={token})
    last = [study.ticket(study.claim(record, "b")._cached_frozen_trial) for _ in range(4)]
    assert last == [2, 3, 0, 1]  # those that met a fault come last


def test_fault_that_all_places_meet_shuts_none_of_them_and_each_rests(queued, monkeypatch):
    """A mount is gone for a minute: no place is to blame, and one that tried at once would meet it again."""
    sweep, record = queued
    clock = [0.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock[0])
    places, began = [supervisor.Slot(name, {}) for name in "01"], []

    def start(name, token, env, cores):
        began.append((clock[0], name))
        study.claim(record, token).set_user_attr(study.FAULT, "no folder /mnt/m")
        return Job(4)

    for second in range(150):
        clock[0] = float(second)
        for place in places:
            supervisor._tend(sweep, record, place, places, start, ended := set())
            study.reap(record, 2, ended)
        assert not any(place.shut for place in places)
    assert [when for when, name in began if name == "0"] == [0.0, 11.0, 32.0, 73.0, 134.0]


def test_trial_that_kills_its_workers_counts_as_a_failure_of_the_sweep(queued, monkeypatch):
    """No worker is left to count it; the supervisor tells once, however often it looks."""
    from dataclasses import replace

    sweep, record = queued
    sweep = replace(sweep, options=replace(sweep.options, max_failures=1, max_retries=0))
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.0)
    told, honest = [], record.set_user_attr
    monkeypatch.setattr(record, "set_user_attr", lambda *what: (told.append(what), honest(*what)))

    def start(number, token, env, cores):
        study.claim(record, token)
        return Job(-9)

    monkeypatch.setattr(supervisor.engines, "starter", lambda *_: start)
    supervisor.supervise(sweep, record, 1, 4)
    assert told == [(supervisor.STOP, "1 trials failed, sweep.max_failures=1")]
    supervisor.stop_after_failures(sweep, record)
    assert len(told) == 1


def test_supervisor_looks_for_checkpoints_and_excuses_what_it_killed(queued, monkeypatch):
    """A kill after a newer checkpoint is no retry, nor is one by a second ctrl-c."""
    sweep, record = queued
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.0)
    seen, honest = [], study.reap

    def reap(*given, **keys):
        seen.append(keys.get("folder", given[4] if len(given) > 4 else None))
        return honest(*given, **keys)

    class Deaf(Job):
        """Hears nothing until it is killed."""

        def terminate(self):
            pass

        def wait(self, timeout=None):
            if self.code is None:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            return self.code

        def kill(self):
            self.code = -9

    def start(name, token, env, cores):
        study.claim(record, token)
        return Deaf(None)

    looks = iter([None, None])

    def show():
        if next(looks, True):
            raise KeyboardInterrupt

    monkeypatch.setattr(supervisor.study, "reap", reap)
    monkeypatch.setattr(supervisor.engines, "starter", lambda *_: start)
    monkeypatch.setattr(supervisor.screen, "live", lambda *_: nullcontext(show))
    monkeypatch.setattr(study, "alive", lambda trial: False)
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        supervisor.supervise(sweep, record, 1, 4)
    assert {*seen} == {sweep.folder} and len(seen) > 1
    again = [t for t in study.waiting(record) if study.ticket(t) == 0]
    assert [t.user_attrs["ftexp:retries"] for t in again] == [0]


def test_helper_tells_its_supervisor_that_it_helps(queued, monkeypatch):
    from ftexp.sweep import plugin

    seen = []
    monkeypatch.setattr(supervisor, "supervise", lambda *given: seen.append(given[-1]))
    for helps in (False, True):
        plugin._run_left(*queued, 4, 2, helps)
    assert seen == [False, True]


def test_helper_writes_to_no_log_of_the_launch(queued, monkeypatch):
    """Over NFS two machines that append to one file overwrite each other's lines."""
    sweep, record = queued
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.0)
    names = []

    def start(name, token, env, cores):
        names.append(name)
        record.set_user_attr(supervisor.STOP, "seen")
        return Job(0)

    monkeypatch.setattr(supervisor.engines, "starter", lambda *_: start)
    for helps in (False, True):
        record.set_user_attr(supervisor.STOP, None)
        supervisor.supervise(sweep, record, 1, 4, helps)
    assert names == ["0", f"{study.HOST}-{os.getpid()}-0"]


def test_jobs_that_a_cluster_has_not_begun_are_cancelled_when_nothing_is_left(queued, monkeypatch, capfd):

    monkeypatch.setattr(supervisor, "IDLE_SECONDS", 0.0)
    sweep, record = queued
    busy, pending = (
        supervisor.Slot("0", {}, process=Job(), token="a"),
        supervisor.Slot("1", {}, process=Job(), token="b"),
    )
    assert supervisor._end_idle(record, [busy, pending], None) is None  # tickets wait
    last = [study.claim(record, "a") for _ in range(4)]
    for trial in last[:3]:
        record.tell(trial, 0.5)
    supervisor._end_idle(record, [busy, pending], None)
    assert (busy.process.code, pending.process.code) == (None, -9)
    pending.process.kill = lambda: pytest.fail("cancelled a second time")
    supervisor._end_idle(record, [busy, pending], None)
    supervisor._tend(sweep, record, pending, [busy, pending], lambda *_: Job(), set())
    assert (pending.process, pending.deaths) == (None, 0)
    assert "died" not in capfd.readouterr().err


def test_database_that_is_being_restarted_ends_no_sweep(monkeypatch):
    from optuna.exceptions import StorageInternalError

    from ftexp.errors import MachineError

    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.0)
    turns = iter([StorageInternalError("server closed"), False, StorageInternalError("starting up"), True])

    def work():
        turn = next(turns)
        if isinstance(turn, Exception):
            raise turn
        return turn

    supervisor._repeat(work, "the record")
    monkeypatch.setattr(supervisor, "SILENT_SECONDS", 0.0)
    turns = iter([StorageInternalError("server closed")])
    with pytest.raises(MachineError, match="the record cannot be reached: server closed; the same command goes on"):
        supervisor._repeat(work, "the record")
