"""Packs in a sweep: the same trials, bytes and ends as one by one, whatever the size and whoever is killed."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import UNWRITTEN

from ftexp import data, estimate, experiment
from ftexp.config import Run
from ftexp.errors import ConfigError
from ftexp.files import read_json, sha256
from ftexp.sweep import frozen, packs, study, worker
from ftexp.sweep.options import Options, Pruner, Sampler
from ftexp.sweep.space import parse
from ftexp.train import control, lockstep
from ftexp.train.turns import Turns

SWEEP = [*UNWRITTEN, "track=none", "eval=loss", "trainer.engine=packed", "trainer.lr=1e-2", "lora.r=2,4", "seed=0,1",
         "name=s", "-m"]  # fmt: skip


def ends(folder: Path) -> dict[str, tuple]:
    """State, scores but cost, and bytes of the adapter of each trial."""
    found = {}
    for path in sorted(folder.glob("[0-9]*/trial.json")):
        kept: dict = read_json(path) or {}
        scores = {k: v for k, v in kept.get("scores", {}).items() if not k.startswith("cost/")}
        weights = path.parent / "adapter" / "adapter_model.safetensors"
        found[path.parent.name] = (kept["state"], scores, sha256(weights) if weights.exists() else "")
    return found


def told(folder: Path, name: str, key: str) -> list:
    """What the trials of a sweep say of a key."""
    return [(read_json(p) or {}).get(key) for p in sorted((folder / "outputs" / "sweeps" / name).glob("*/trial.json"))]


@pytest.fixture
def swept(cli, tmp_path):
    """Return a function that runs a sweep and tells the ends of its trials."""

    def run(*given, code=0):
        got, _, err = cli(*SWEEP, *given)
        assert got == code, err
        name = next((g.partition("=")[2] for g in given if g.startswith("name=")), "s")
        return ends(tmp_path / "outputs" / "sweeps" / name)

    return run


def test_the_first_of_a_pack_is_raced_by_those_beside_it(swept):
    """It is the worst by far; asked before the others had told of the rung, it would go on as the first of all."""
    found = swept("trainer.lr=1e-6,1e-2,2e-2", "seed=0", "lora.r=4", "trainer.steps=8", "trainer.report_steps=2",
                  "sweep.pruner=race", "sweep.pack=3", "data.valid=24")  # fmt: skip
    assert found["0"][0] == "pruned"


def test_a_sweep_in_packs_is_the_sweep_one_by_one(swept, tmp_path):
    alone = swept("name=alone")
    assert len(alone) == 4
    assert len({sha for _, _, sha in alone.values()}) == 4
    assert swept("name=three", "sweep.pack=3") == alone
    assert told(tmp_path, "three", "pack") == [3, 3, 3, 1]
    assert told(tmp_path, "alone", "pack") == [1, 1, 1, 1]


def test_who_diverges_in_a_pack_fails_alone(swept):
    keys = ("trainer.lr=1e-2,1", "lora.r=4", "lora.alpha=8192", "seed=0", "trainer.max_grad_norm=0", "trainer.steps=30")
    alone = swept(*keys, "name=alone", code=5)
    assert [state for state, _, _ in alone.values()] == ["complete", "failed"]
    assert swept(*keys, "name=two", "sweep.pack=2", code=5) == alone


def test_who_is_pruned_leaves_the_pack(swept):
    keys = ("trainer.lr=1e-2,1e-6", "lora.r=4", "trainer.steps=6")
    alone = swept(*keys, "name=alone")
    found = swept(*keys, "name=four", "sweep.pack=4", "sweep.pruner=asha")
    states = [state for state, _, _ in found.values()]  # four are halved, and those two after twice the steps
    assert (sorted(states[:2]), states[2:]) == (["complete", "pruned"], ["pruned", "pruned"])
    assert all(sha for _, _, sha in found.values())
    best = str(states.index("complete"))
    assert found[best] == alone[best]


def scored_at(folder, name, number):
    lines = (folder / "outputs/sweeps" / name / number / "metrics.jsonl").read_text().splitlines()
    return [e["step"] for e in map(json.loads, lines) if "valid/loss" in e]


@pytest.mark.parametrize("pack", [1, 3])
def test_losses_that_stop_nobody_can_be_left_out_and_nothing_else_changes(swept, tmp_path, pack):
    """Halving judges at rungs 1, 2 and 4, at steps 2, 4 and 8 of 12; the last loss is a score."""
    keys = ("trainer.lr=2e-2,1e-2,1e-6", "seed=0", "lora.r=4", "trainer.steps=12", "trainer.report_steps=2", "data.valid=24",
            "sweep.pruner=halving", f"sweep.pack={pack}")  # fmt: skip
    whole = swept(*keys, "name=whole")
    assert swept(*keys, "sweep.pruner_args.every_rung=false", "name=few") == whole
    assert "pruned" in [state for state, _, _ in whole.values()]
    full = [n for n, (state, _, _) in whole.items() if state == "complete"]
    assert {tuple(scored_at(tmp_path, "whole", n)) for n in full} == {(2, 4, 6, 8, 10, 12)}
    assert {tuple(scored_at(tmp_path, "few", n)) for n in full} == {(2, 4, 8, 12)}


KILLED = """
import os, signal, sys
from ftexp import run
from ftexp.train import lockstep
save, left = lockstep._save, [7]

def dying(trial):
    save(trial)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

lockstep._save = dying
sys.argv = ["ftexp.run", *sys.argv[1:]]
run.main()
"""


def test_a_kill_in_a_pack_loses_no_trial(swept, tmp_path):
    """SIGKILL as the third member writes its second checkpoint; the same command ends with the same bytes."""
    calm = swept("name=calm")
    keys = [*SWEEP, "name=killed", "sweep.pack=3", "trainer.checkpoint_minutes=0"]
    done = subprocess.run([sys.executable, "-c", KILLED, *keys], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "outputs" / "sweeps" / "killed"
    assert {p.parent.parent.name for p in folder.glob("*/checkpoints/*")} == {"0", "1", "2"}
    assert swept("name=killed", "sweep.pack=2", "trainer.checkpoint_minutes=0") == calm
    assert told(tmp_path, "killed", "resumed_at") == [[3], [2], [2], None]


def test_a_pack_that_is_asked_to_leave_is_gone_on_with(swept, tmp_path, monkeypatch):
    calm = swept("name=calm")
    step = lockstep._step

    def leaving(base, pack, trials, together):
        if trials[0].step == 1:
            control.LEAVE.set()
        return step(base, pack, trials, together)

    monkeypatch.setattr(lockstep, "_step", leaving)
    swept("name=left", "sweep.pack=4", code=75)
    assert told(tmp_path, "left", "state") == ["preempted"] * 4
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    control.LEAVE.clear()
    assert swept("name=left", "sweep.pack=3") == calm
    assert told(tmp_path, "left", "resumed_at") == [[2]] * 4


def test_points_of_a_pack_are_proposed_before_any_is_known(swept, monkeypatch):
    """As by so many workers: a sampler sees the others of its pack as pending."""
    seen, propose = [], study.propose

    def watched(space, options, directions, history, number):
        seen.append([t.state.name for t in history])
        return propose(space, options, directions, history, number)

    monkeypatch.setattr(study, "propose", watched)
    swept("trainer.lr=tag(log,interval(1e-3,1e-1))", "lora.r=4", "seed=0", "sweep.sampler=tpe", "sweep.n_trials=4",
          "sweep.pack=2")  # fmt: skip
    assert seen == [[], ["RUNNING"], ["COMPLETE"] * 2, ["COMPLETE"] * 2 + ["RUNNING"]]


def refused(tiny, axes: list[str], options: Options, *given: str) -> str:
    runs: list[Run] = [tiny(*given)]
    with pytest.raises(ConfigError) as caught:
        packs.check(options, parse(axes, {}).axes, runs)
    return str(caught.value)


def test_what_does_not_go_into_a_pack_is_refused(tiny):
    packed = "trainer.engine=packed"
    assert refused(tiny, [], Options(pack=4)) == "sweep.pack must be 1 unless trainer.engine=packed, got 4"
    assert "must be 1 where data.rows is searched, got 0" in refused(tiny, ["data.rows=60,90"], Options(pack=0), packed)
    text = refused(tiny, ["lora.r=2,4"], Options(pack=2, at_most={"cost/memory_gib": 2.0}), packed)
    assert "must be 1 where cost/memory_gib is compared" in text
    rungs, asha = "trainer.report_steps=4", Pruner.asha
    for least in (2, "auto"):
        text = refused(tiny, [], Options(pack=2, pruner=asha, pruner_args={"min_resource": least}), packed, rungs)
        assert text.startswith(
            "sweep.pruner_args.min_resource must be at least trainer.report_steps=4 with sweep.pack=2"
        )
        packs.check(Options(pruner=asha, pruner_args={"min_resource": least}), (), [tiny(packed, rungs)])
    for args in ({}, {"min_resource": 4}):
        packs.check(Options(pack=2, pruner=asha, pruner_args=args), (), [tiny(packed, rungs)])
    packs.check(Options(pack=2), parse(["lora.r=2,4", "trainer.lr=1e-3,1e-2", "seed=0,1"], {}).axes, [tiny(packed)])
    packs.check(Options(), (), [tiny()])


@pytest.fixture
def most(tiny, monkeypatch, tmp_path):
    """Return a function that tells how many trials may share a pass, for so many free bytes."""

    class Sweep:
        options = Options(pack=0)
        space = parse(["lora.r=2,4"], {})
        folder = tmp_path

        @staticmethod
        def run(point, replicate):
            return tiny("trainer.engine=packed", *(f"{k}={v}" for k, v in point.items()))

    def choose(free=1e12):
        monkeypatch.setattr(packs, "free_bytes", lambda base, workers: free)
        return packs._most(Sweep, 1)  # type: ignore

    return choose


@pytest.mark.parametrize(("trials", "size"), [(0, 1), (1, 1), (3, 3), (99, 16)])
def test_auto_tries_no_more_than_caches_hold(most, tiny, monkeypatch, trials, size):
    """A pass for so many trials of a step's tokens."""
    run = tiny("trainer.engine=packed")
    given = estimate.rows(experiment.tokenised(run, data.load(run.data))[0], run)
    tokens = run.trainer.batch * sum(given.lengths) // len(given.lengths)
    monkeypatch.setattr(packs, "PASS", (trials + 0.5) * tokens / torch.get_num_threads())
    found = most()
    assert (found["most"], found["tokens"]) == (size, tokens)
    told = f"{tokens} tokens a step each, for {torch.get_num_threads()} cores"
    assert found["why"] == ("no more are tried" if size == 16 else told)


def test_auto_tries_what_fits_into_memory(most, monkeypatch):
    monkeypatch.setattr(packs, "PASS", 10**9)
    each = most()["trial_gib"] * 2**30
    found = most(5.6 * each / packs.ROOM)
    assert (found["most"], found["why"]) == (5, f"{each / 2**30:.2f} GiB each, of the free memory")
    assert most(0.4 * each / packs.ROOM)["most"] == 1
    monkeypatch.setattr(estimate, "_peak", lambda *_: (None, ("it cannot be traced",)))
    assert most() == {"most": 1, "why": "a trial's memory is not known: it cannot be traced"}


class Record:
    """A study's attributes."""

    def __init__(self, **kept):
        self.user_attrs = {f"{packs.CHOSEN} {study.HOST}": kept} if kept else {}

    def set_user_attr(self, key, value):
        self.user_attrs[key] = value

    @property
    def kept(self):
        return self.user_attrs[f"{packs.CHOSEN} {study.HOST}"]


@pytest.mark.parametrize(("gain", "size", "on"), [(1.5, 8, True), (1.11, 8, True), (1.05, 1, True), (0.95, 1, False)])
def test_auto_goes_on_the_faster_way_and_takes_packs_where_they_clearly_pay(gain, size, on):
    record = Record(most=8)
    turns: Any = packs.turns(SimpleNamespace(options=Options(pack=0)), record, 4)  # type: ignore
    assert turns._seen([1.0, 2.0, 9.0], [gain, 2 * gain, 1.0], None) is on  # the last pair was disturbed
    assert record.kept["size"] == size
    assert record.kept["gain"] == pytest.approx(gain)
    assert (record.kept["most"], record.kept["tried"]) == (8, 4)


def test_auto_takes_what_is_on_record(monkeypatch):
    waiting = [SimpleNamespace(state=SimpleNamespace(name="WAITING"), datetime_start=None, user_attrs={})] * 16
    monkeypatch.setattr(study, "counted", lambda _: waiting)
    sweep: Any = SimpleNamespace(options=Options(sampler=Sampler.random, n_trials=16, pack=0, workers=1))
    assert packs.size(sweep, Record(most=8), True) == 8  # type: ignore
    assert packs.size(sweep, Record(most=8, size=1), True) == 1  # type: ignore
    looks: Any = SimpleNamespace(options=Options(sampler=Sampler.tpe, n_trials=16, pack=0, workers=1))
    assert packs.size(looks, Record(most=8), True) == 4  # type: ignore  # points are proposed before packs are known to pay
    assert packs.size(looks, Record(most=8, size=8), True) == 8  # type: ignore
    assert packs.size(sweep, Record(size=4, tried=4), True) == 4  # type: ignore  # of an older version
    assert packs.turns(sweep, Record(most=8, size=1, gain=0.9), 8).most(8, 99) == 1  # type: ignore
    assert packs.turns(sweep, Record(most=8, size=1, gain=1.05), 8).most(8, 99) == 8  # type: ignore
    assert packs.turns(sweep, Record(size=4), 8).most(8, 99) == 8  # type: ignore
    asked: Any = SimpleNamespace(options=Options(sampler=Sampler.random, n_trials=16, pack=8))
    assert packs.turns(asked, Record(), 8) is None  # type: ignore


def test_what_fits_into_memory_is_on_record(monkeypatch):
    sweep: Any = SimpleNamespace(options=Options(pack=0))
    record = Record(most=8)
    assert packs.turns(sweep, record, 8)._seen([1.0], [2.0], 4)  # type: ignore
    assert record.kept["size"] == 4
    record = Record(most=8)
    assert not packs.turns(sweep, record, 8)._seen([], [], 1)  # type: ignore
    assert record.kept["size"] == 1


def test_a_record_that_cannot_be_reached_while_a_pack_is_heard_ends_no_trial(monkeypatch):
    record = Record(most=8)
    turns: Any = packs.turns(SimpleNamespace(options=Options(pack=0)), record, 8)  # type: ignore
    monkeypatch.setattr(Record, "set_user_attr", lambda *_: (_ for _ in ()).throw(OSError("no route to host")))
    assert turns._seen([1.0], [2.0], None) is True


def test_auto_times_steps_of_the_trials_and_changes_none(swept, tmp_path, monkeypatch):
    alone = swept("name=alone", "trainer.steps=12")
    monkeypatch.setattr(packs, "PASS", 10**9)
    steps, step = [], lockstep._step
    monkeypatch.setattr(lockstep, "_step", lambda *given: steps.append(given[-1]) or step(*given))
    assert swept("name=auto", "trainer.steps=12", "sweep.pack=0") == alone
    assert steps[:9] == [4, 4, 1, 4, 1, 4, 1, 4, 1]
    found = worker.open_study(frozen.load(tmp_path / "outputs" / "sweeps" / "auto")).user_attrs
    kept = found[f"{packs.CHOSEN} {study.HOST}"]
    assert (kept["tried"], kept["most"]) == (4, 16)
    pairs = zip(kept["alone_seconds"], kept["together_seconds"], strict=True)
    assert kept["gain"] == pytest.approx(median(alone / together for alone, together in pairs))
    assert {*steps[9:]} == {4 if kept["gain"] > 1 else 1}
    steps.clear()
    monkeypatch.setattr(packs, "turns", lambda *_: Turns(lambda *_: False))
    assert swept("name=apart", "trainer.steps=12", "sweep.pack=0") == alone
    assert steps[9:] == [1, 1, 1]
