"""A worker without tickets takes half of another's pack: who asks whom, what is given, and that no ticket is lost."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from conftest import UNWRITTEN
from optuna.trial import TrialState, create_trial

from ftexp.files import read_json, sha256
from ftexp.sweep import frozen, share, study, worker
from ftexp.sweep.options import Engine, Options, Sampler
from ftexp.train import control, lockstep

SWEEP = [*UNWRITTEN, "track=none", "eval=loss", "trainer.engine=packed", "trainer.lr=1e-2", "-m"]


def ends(folder: Path) -> dict[str, tuple]:
    """State, checkpoint it went on from, and bytes of the adapter of each trial."""
    found = {}
    for path in sorted(folder.glob("[0-9]*/trial.json")):
        kept: dict = read_json(path) or {}
        weights = path.parent / "adapter" / "adapter_model.safetensors"
        found[path.parent.name] = (kept["state"], kept.get("resumed_at"), sha256(weights))
    return found


def bytes_of(found: dict[str, tuple]) -> list[str]:
    return [sha for _, _, sha in found.values()]


@pytest.fixture
def wished(cli, tmp_path, monkeypatch):
    """Return a function that runs a sweep in a pack, of which another worker asks for half at a step."""

    def run(name, how=None, worth=1e-9, **more):
        folder, heard, step = tmp_path / "outputs" / "sweeps" / name, [], lockstep._step
        monkeypatch.setenv(share.TOKEN, "me")
        monkeypatch.setattr(lockstep, "WORTH_SECONDS", worth)
        monkeypatch.setattr(worker, "look_seconds", lambda workers: 0.01)
        monkeypatch.setattr(study, "KEPT_SECONDS", 0.0)  # there is no other worker to come for them

        def asking(base, pack, trials, together):
            if trials[0].step == 2 and not heard:
                sweep = frozen.load(folder)
                record, key = worker.open_study(sweep), f"{share.WISH} me"
                record.set_user_attr(key, {"to": "other", "how": share.how(sweep) if how is None else how})
                until = time.monotonic() + 30
                while record.user_attrs[key] is not None and not trials[0].wished.wished and time.monotonic() < until:
                    time.sleep(0.01)
                heard.append(trials[0].wished.wished)
            return step(base, pack, trials, together)

        until_one_ends = lockstep._until_one_ends

        def watched(base, trials, together, turns, wish):
            for trial in trials:
                trial.wished = wish
            return until_one_ends(base, trials, together, turns, wish)

        monkeypatch.setattr(lockstep, "_step", asking)
        monkeypatch.setattr(lockstep, "_until_one_ends", watched)
        for name_, value in more.items():
            monkeypatch.setattr(lockstep, name_, value)
        got, _, err = cli(*SWEEP, "lora.r=2,4", "seed=0,1", f"name={name}", "sweep.pack=4")
        assert (got, len(heard)) == (0, 1), err
        monkeypatch.setattr(lockstep, "_step", step)
        monkeypatch.setattr(lockstep, "_until_one_ends", until_one_ends)
        record = worker.open_study(frozen.load(folder))
        assert record.user_attrs[f"{share.WISH} me"] is None
        assert all(t.user_attrs[study.KEPT]["for"] == "other" for t in record.trials[4:])
        return ends(folder), heard[0], len(record.trials)

    return run


@pytest.fixture
def calm(cli, tmp_path):
    """Bytes of the adapters of that sweep, undisturbed."""
    got, _, err = cli(*SWEEP, "lora.r=2,4", "seed=0,1", "name=calm")
    assert got == 0, err
    return bytes_of(ends(tmp_path / "outputs" / "sweeps" / "calm"))


def test_half_of_a_pack_is_handed_over_and_ends_with_the_same_bytes(calm, wished):
    found, heard, attempts = wished("handed")
    assert heard
    assert bytes_of(found) == calm
    assert [resumed for _, resumed, _ in found.values()] == [None, [3], None, [3]]
    assert attempts == 6


def test_who_computes_otherwise_gets_nothing(calm, wished):
    found, heard, attempts = wished("other", how={"threads": 7})
    assert not heard
    assert (bytes_of(found), attempts) == (calm, 4)


def test_nothing_is_handed_over_for_the_last_seconds(calm, wished):
    found, heard, attempts = wished("late", worth=1e9)
    assert heard
    assert (bytes_of(found), attempts) == (calm, 4)


def test_whose_checkpoint_cannot_be_written_stays(calm, wished):
    def full(trial):
        raise PermissionError(13, "Permission denied")

    found, heard, attempts = wished("full", _save=full)
    assert heard
    assert (bytes_of(found), attempts) == (calm, 4)


def member(step: int, steps: int) -> Any:
    return SimpleNamespace(step=step, steps=steps, ended=None)


def test_every_second_of_those_with_enough_to_do_is_handed_over(monkeypatch):
    """At half a second a step 0.5 s, 5 s, 10 s, 40 s, 20 s and 45 s of work are left; the last, the longest, stays."""
    monkeypatch.setattr(lockstep, "_save", lambda trial: None)
    members = [member(99, 100), member(90, 100), member(80, 100), member(0, 80), member(20, 60), member(10, 100)]
    lockstep._hand_over(members, 0.5)
    over = ["", "", "handed over at step 80 of 100", "handed over at step 0 of 80", "", ""]
    assert [str(m.ended or "") for m in members] == over


def running(record, number: int, token: str, pack: int, host: str = study.HOST, alive: bool = True):
    """Put a running attempt of a ticket on record."""
    signed = {"host": host, "token": token, "pid": os.getpid(), "start": study.started(os.getpid()) if alive else 0.0}
    record.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={
        "ftexp:ticket": number, "ftexp:worker": signed, study.PACK: pack}))  # fmt: skip


@pytest.fixture
def idle(monkeypatch):
    """A record with packs, its sweep, and a function that sets what happens while the idle worker `me` waits."""
    record: Any = optuna.create_study()
    for number, token in enumerate("aabbbcdd"):
        running(record, number, token, 1 if token == "c" else 3)
    running(record, 8, "f", 3)  # the last of its pack
    for number in (9, 10, 11, 12):
        running(record, number, "e", 4, "elsewhere")
    for number in (13, 14, 15, 16):
        running(record, number, "g", 4, alive=False)
    monkeypatch.setattr(share, "how", lambda sweep: {"threads": 1})
    monkeypatch.setenv(share.TOKEN, "me")
    sweep: Any = SimpleNamespace(options=Options(sampler=Sampler.random, n_trials=17, pack=0, workers=4))
    asked: list[str] = []

    def meanwhile(*acts):
        left = iter(acts)

        class Leave:
            @staticmethod
            def wait(seconds):
                wishes = {k: v for k, v in record.user_attrs.items() if k.startswith(share.WISH) and v}
                mine = [k.split()[-1] for k, v in wishes.items() if v["to"] == "me"]
                asked.extend(mine)
                return next(left)(mine[0] if mine else "")

        monkeypatch.setattr(share.control, "LEAVE", Leave)

    def refuse(token):
        record.set_user_attr(f"{share.WISH} {token}", None)

    return SimpleNamespace(record=record, sweep=sweep, asked=asked, meanwhile=meanwhile, refuse=refuse)


def wishes(record) -> list[str]:
    return [k for k, v in record.user_attrs.items() if k.startswith(share.WISH) and v]


def give_back(record, number: int, to: str) -> None:
    record._storage.set_trial_user_attr(record.trials[number]._trial_id, "ftexp:lost", True)
    record._storage.set_trial_state_values(record.trials[number]._trial_id, TrialState.FAIL)
    study.requeue(record, record.trials[number], to=to)


def end(record, token: str) -> None:
    for t in record.trials:
        if t.user_attrs["ftexp:worker"]["token"] == token:
            record._storage.set_trial_state_values(t._trial_id, TrialState.FAIL)


def test_an_idle_worker_asks_the_largest_pack_of_its_machine_then_the_next(idle):
    idle.meanwhile(idle.refuse, lambda token: end(idle.record, token), idle.refuse)
    assert share.awaited(idle.sweep, idle.record, 0.0) is False
    assert idle.asked[0] == "b"
    assert {*idle.asked} == {"a", "b", "d"}
    assert not wishes(idle.record)


def test_what_it_is_given_is_kept_for_it(idle, monkeypatch):
    def give(token):
        give_back(idle.record, 2, "me")
        idle.refuse(token)

    idle.meanwhile(give)
    assert share.awaited(idle.sweep, idle.record, 0.0) is True
    assert idle.asked == ["b"]
    assert not study.waiting(idle.record)
    assert study.claim(idle.record, "other") is None
    assert study.ticket(study.claim(idle.record, "me")._cached_frozen_trial) == 2  # type: ignore


def test_an_asker_waits_for_all_that_it_is_given(idle):
    """It took the first of two alone, and the other went back to who had given it once it had waited a minute."""
    seen = []
    idle.meanwhile(
        lambda token: give_back(idle.record, 2, "me"), lambda token: give_back(idle.record, 3, "me"), idle.refuse,
        lambda token: seen.append(token),
    )  # fmt: skip
    assert share.awaited(idle.sweep, idle.record, 0.0) is True
    assert sorted(study.ticket(t) for t in study.waiting(idle.record, "me")) == [2, 3] and not seen


def test_what_nobody_comes_for_is_anybodys_after_a_while(idle, monkeypatch):
    give_back(idle.record, 2, "dead")
    now = time.time()
    monkeypatch.setattr(study.time, "time", lambda: now + study.KEPT_SECONDS - 1)
    assert study.claim(idle.record, "me") is None
    monkeypatch.setattr(study.time, "time", lambda: now + study.KEPT_SECONDS + 1)
    assert study.claim(idle.record, "me") is not None


def test_a_ticket_that_waits_ends_the_asking(idle):
    idle.meanwhile(lambda token: study.requeue(idle.record, idle.record.trials[5]))
    assert share.awaited(idle.sweep, idle.record, 0.0) is True
    assert not wishes(idle.record)


def test_two_that_ask_do_not_ask_the_same(idle):
    idle.record.set_user_attr(f"{share.WISH} b", {"to": "other", "how": {}})
    idle.meanwhile(idle.refuse, idle.refuse, lambda token: end(idle.record, "b"))
    assert share.awaited(idle.sweep, idle.record, 0.0) is False
    assert {*idle.asked} == {"a", "d"}
    assert wishes(idle.record) == [f"{share.WISH} b"]


def test_a_sweep_that_is_stopped_or_left_keeps_no_wish(idle):
    idle.meanwhile(lambda token: idle.record.set_user_attr(share.STOP, "enough"))
    assert share.awaited(idle.sweep, idle.record, 0.0) is False
    assert not wishes(idle.record)
    idle.record.set_user_attr(share.STOP, None)
    idle.meanwhile(lambda token: True)
    with pytest.raises(control.Preempted):
        share.awaited(idle.sweep, idle.record, 0.0)
    assert not wishes(idle.record)


@pytest.mark.parametrize("more", [{"pack": 1}, {"engine": Engine.slurm}, {"timeout_minutes": 5.0}])
def test_who_is_not_to_wait_or_has_a_time_of_his_own_asks_nobody(idle, more):
    told = {"sampler": Sampler.random, "n_trials": 17, "pack": 4, "workers": 4, **more}
    assert share.awaited(SimpleNamespace(options=Options(**told)), idle.record, 0.0) is False  # type: ignore
    assert not idle.asked


def test_one_wish_is_heard_once_and_none_after_a_stop(monkeypatch):
    monkeypatch.setenv(share.TOKEN, "me")
    record: Any = optuna.create_study()
    wish, asked = f"{share.WISH} me", share.Wished(record, {"threads": 1}, control.Share())
    asked.look()
    assert not asked.share.wished
    record.set_user_attr(wish, {"to": "x", "how": {"threads": 1}})
    asked.look()
    assert (asked.share.wished, asked.to) == (True, "x")
    asked.share.dealt.set()
    assert not asked.share.wished
    asked.look()
    assert (record.user_attrs[wish], asked.share.wished) == (None, False)
    record.set_user_attr(wish, {"to": "y", "how": {"threads": 1}})
    asked.look()
    assert (asked.share.wished, asked.to) == (True, "y")
    asked.share.dealt.set()
    asked.look()
    record.set_user_attr(share.STOP, "enough")
    record.set_user_attr(wish, {"to": "x", "how": {"threads": 1}})
    asked.look()
    assert not asked.share.wished


@pytest.mark.slow
def test_two_workers_share_what_is_left(cli, tmp_path):
    """One has four short trials, the other four long ones: two of those end in the first, from their checkpoints."""
    axes = ["trainer.steps=2,900", "seed=0,1,2,3", "trainer.report_steps=0"]
    got, _, err = cli(*SWEEP, *axes, "name=two", "sweep.workers=2", "sweep.pack=4")
    assert got == 0, err
    folder = tmp_path / "outputs" / "sweeps" / "two"
    record = worker.open_study(frozen.load(folder))
    last = study.counted(record)
    tokens = [t.user_attrs["ftexp:worker"]["token"] for t in last]
    handed = [n for n in range(4, 8) if tokens[n] == tokens[0]]
    found = ends(folder)
    assert len(handed) == 2, json.dumps(tokens)
    assert [bool(found[str(n)][1]) for n in range(8)] == [n in handed for n in range(8)]
