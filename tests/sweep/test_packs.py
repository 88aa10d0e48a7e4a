"""Packs in a sweep: the same trials, bytes and ends as one by one, whatever the size and whoever is killed."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from conftest import TINY

from ftexp import data, estimate, experiment, model
from ftexp.config import Run
from ftexp.errors import ConfigError
from ftexp.files import read_json, sha256
from ftexp.sweep import packs, study, worker
from ftexp.sweep.options import Options
from ftexp.sweep.space import parse
from ftexp.train import control, lockstep

SWEEP = [*TINY, "track=none", "eval=loss", "trainer.engine=packed", "trainer.lr=1e-2", "lora.r=2,4", "seed=0,1",
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
    assert [state for state, _, _ in found.values()] == ["complete", "complete", "pruned", "pruned"]
    assert all(sha for _, _, sha in found.values())
    assert [found[n] for n in "01"] == [alone[n] for n in "01"]


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
    packs.check(Options(pack=2), parse(["lora.r=2,4", "trainer.lr=1e-3,1e-2", "seed=0,1"], {}).axes, [tiny(packed)])
    packs.check(Options(), (), [tiny()])


@pytest.fixture
def measured(tiny, monkeypatch, tmp_path):
    """Return a function that chooses a size for figures of a probe and free bytes."""
    monkeypatch.setattr(packs, "FULL", 10**9)
    monkeypatch.setattr(packs, "PASS", 10**9)

    class Sweep:
        options = Options(pack=0)
        space = parse(["lora.r=2,4"], {})
        folder = tmp_path

        @staticmethod
        def run(point, replicate):
            return tiny("trainer.engine=packed", *(f"{k}={v}" for k, v in point.items()))

    def choose(alone, together, free, most=16):
        counts = []
        together = together if isinstance(together, list) else [together]
        monkeypatch.setattr(packs, "seconds", lambda *given: counts.append(given[-2]) or (
            [alone] * given[-1] if given[-2] == 1 else together))  # fmt: skip
        monkeypatch.setattr(packs, "free_bytes", lambda base, workers: free)
        return packs._measured(Sweep, most, 1), counts  # type: ignore

    return choose


def test_auto_takes_what_pays(measured):
    found, counts = measured(alone=1.0, together=4.0, free=1e12)
    assert (found["size"], found["gain"], counts) == (16, 4.0, [1, 16, 1])
    assert found["why"] == "16 trials in one pass are 4.00 times as fast as one by one"
    found, _ = measured(alone=1.0, together=15.0, free=1e12)
    assert (found["size"], found["tried"]) == (1, 16)
    found, _ = measured(alone=1.0, together=[4.0, 90.0, 4.0], free=1e12)  # a step that something else disturbed
    assert (found["size"], found["gain"]) == (16, 4.0)


@pytest.mark.parametrize(("trials", "size"), [(1, 2), (3, 2), (5, 4), (99, 16)])
def test_auto_tries_no_more_than_caches_hold(measured, tiny, monkeypatch, trials, size):
    """A pass for so many trials of a step's tokens; two are always tried, that is what FULL is for."""
    run = tiny("trainer.engine=packed")
    given = estimate.rows(experiment.tokenised(run, data.load(run.data))[0], run)
    tokens = run.trainer.batch * sum(given.lengths) / len(given.lengths)
    monkeypatch.setattr(packs, "PASS", trials * tokens / torch.get_num_threads() + 1)
    found, counts = measured(alone=1.0, together=1.0, free=1e12)
    assert (found["size"], counts) == (size, [1, size, 1])


def test_auto_tries_nothing_where_a_trial_fills_the_cores(measured, monkeypatch):
    monkeypatch.setattr(packs, "FULL", 1)
    found, counts = measured(alone=1.0, together=1.0, free=1e12)
    assert (found["size"], counts) == (1, [])
    assert re.fullmatch(r"a trial's step has \d+ tokens, enough for \d+ cores", found["why"])


def test_a_probe_ends_in_time(measured, tiny, monkeypatch):
    """Steps of 1.5 s by the clock: with 2 s to spend two are taken behind those that warm up, of 3 at most."""
    run = tiny("trainer.engine=packed")
    train, valid = experiment.tokenised(run, data.load(run.data))
    base = model.load(run.model, run.quant)
    clock = iter(x for n in range(99) for x in (2.0 * n, 2.0 * n + 1.5))
    monkeypatch.setattr(lockstep.time, "perf_counter", lambda: next(clock))
    steps, real = [], lockstep._step
    monkeypatch.setattr(lockstep, "_step", lambda *given: steps.append(given[-1]) or real(*given))
    assert packs.seconds(run, base, train, valid, 2, 3) == [1.5, 1.5]
    assert packs.seconds(run, base, train, valid, 1, 3) == [1.5, 1.5, 1.5]
    assert steps == [2] * 4 + [1] * 5


def test_auto_takes_what_fits(measured):
    found, _ = measured(alone=1.0, together=1.0, free=1e12, most=5)
    assert found["size"] == 4
    gib = found["trial_gib"]
    found, counts = measured(alone=1.0, together=1.0, free=2.6 * gib * 2**30 / packs.ROOM)
    assert (found["size"], counts) == (2, [1, 2, 1])
    found, counts = measured(alone=1.0, together=1.0, free=1.5 * gib * 2**30 / packs.ROOM)
    assert (found["size"], counts) == (1, [])
    assert found["why"].startswith("1 trials of ")


def test_auto_measures_once_and_puts_it_on_record(swept, tmp_path, monkeypatch):
    from ftexp.sweep import frozen

    alone = swept("name=alone")
    monkeypatch.setattr(packs, "FULL", 10**9)
    monkeypatch.setattr(packs, "PASS", 10**9)
    calls, real = [], packs._measured
    monkeypatch.setattr(packs, "_measured", lambda *given: calls.append(given) or real(*given))
    assert swept("name=auto", "sweep.pack=0") == alone
    assert len(calls) == 1
    record = worker.open_study(frozen.load(tmp_path / "outputs" / "sweeps" / "auto"))
    found = record.user_attrs[f"{packs.CHOSEN} {study.HOST}"]
    assert found["tried"] == 4
    shares = zip(found["alone_seconds"], found["together_seconds"], strict=True)
    assert found["gain"] == pytest.approx(median(4 * alone / together for alone, together in shares))
