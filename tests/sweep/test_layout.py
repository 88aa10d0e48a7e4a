"""How a CPU is shared out: workers where they finish sooner, chosen once and kept."""

import os
import time
from datetime import datetime, timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import UNWRITTEN

from ftexp import estimate, machine
from ftexp.config import Data, Eval, Kind, Lora, Loss, Method, Model, Run, Trainer
from ftexp.files import read_json
from ftexp.model import compute
from ftexp.sweep import frozen, layout, packs, share, study, supervisor, worker
from ftexp.sweep.options import DRAWN, Engine, Options, Pruner, Sampler

TWO = Options(sampler=Sampler.random, n_trials=8)


def steps(scaling):
    """Stand for a probe: seconds of a step of 1e12 operations by threads."""
    return lambda threads: (scaling[threads], 1e12)


def test_the_soonest_by_hand():
    """Twenty trials of 10 s with both cores and 12 s with one, and the base of half as long, before them.

    205 s, or 10 s of startup, 6.3 s of the base and ten rounds of 12.6 s; and 2 s for each trial.
    """
    told = layout.fastest(20, 1e12, 0.5e12, 2, 2, steps({2: 10.0, 1: 12.0}))
    assert told["seconds"] == {"0": 245.0, "2": 162.3}
    assert told["workers"] == 2
    assert told["why"] == "2 at a time with 1 thread each take 66% of the time of one by one (probe)"


def test_what_disturbs_one_turn_of_the_probe_decides_nothing():
    clock = iter([10.0, 40.0, 30.0, 12.0, 10.0, 12.0, 9.0, 11.0, 11.0, 13.0])  # both cores, one core, and so on
    assert layout.fastest(20, 1e12, 0.0, 2, 2, lambda _: (next(clock), 1e12))["seconds"] == {
        "0": 240.0, "2": 156.0}  # fmt: skip


@pytest.mark.parametrize(
    ("left", "cores", "most", "scaling", "found"),
    [
        (8, 2, 2, {2: 10.0, 1: 20.0}, 0),  # threads share the work out perfectly
        (3, 2, 2, {2: 100.0, 1: 140.0}, 0),  # a second round for one trial
        (100, 2, 2, {2: 10.0, 1: 14.0}, 2),
        (2, 2, 2, {2: 1.0, 1: 1.0}, 0),  # the startup is longer than the trials
        (64, 16, 16, {16: 10.0, 8: 10.0, 4: 11.0, 2: 24.0, 1: 60.0}, 4),  # 227 s, of eight 228 s
        (64, 16, 3, {16: 10.0, 8: 10.0, 5: 11.0}, 3),  # memory for three
        (6, 16, 6, {16: 30.0, 8: 30.0, 4: 33.0, 2: 33.0}, 6),
    ],
)
def test_as_many_as_finish_soonest(left, cores, most, scaling, found):
    assert layout.fastest(left, 1e12, 0.0, cores, most, steps(scaling))["workers"] == found


def test_workers_that_save_little_are_not_taken():
    assert layout.fastest(100, 1e12, 0.0, 2, 2, steps({2: 10.0, 1: 18.8}))["workers"] == 0  # 1097 s of 1200
    assert layout.fastest(100, 1e12, 0.0, 2, 2, steps({2: 10.0, 1: 18.5}))["workers"] == 2  # 1081 s


@pytest.fixture
def calm(monkeypatch):
    monkeypatch.setattr(layout.machine, "cores", lambda: 2)


RUN = Run()


@pytest.mark.parametrize(
    ("options", "runs", "left", "told"),
    [
        (TWO, [RUN], 8, None),
        (TWO, [RUN], 1, "one trial"),
        (Options(sampler=Sampler.tpe, n_trials=8), [RUN], 8, "sweep.sampler=tpe looks at the trials before"),
        (Options(sampler=Sampler.random, n_trials=8, storage="sqlite:///x.db"), [RUN], 8, "sweep.storage"),
        (Options(sampler=Sampler.random, n_trials=8, pruner=Pruner.asha), [RUN], 8, "sweep.pruner=asha"),
        (Options(sampler=Sampler.random, n_trials=8, pack=4), [RUN], 8, "sweep.pack"),
        (Options(sampler=Sampler.random, n_trials=8, pack=0), [RUN], 8, None),
        (Options(sampler=Sampler.random, n_trials=8, timeout_minutes=9.0), [RUN], 8, "sweep.timeout_minutes"),
        (Options(sampler=Sampler.random, n_trials=8, at_most={"cost/seconds": 9.0}), [RUN], 8, "costs"),
        (TWO, [Run(objectives=["valid/loss", "cost/memory_gib"])], 8, "costs"),
        (TWO, [Run(model=Model(kind=Kind.tiny))], 8, "a tiny model"),
        (TWO, [RUN, Run(data=Data(valid=7))], 8, "differ in model or rows"),
        (TWO, [RUN, Run(lora=Lora(r=4))], 8, None),
        (TWO, [Run(trainer=Trainer(kind=Method.dpo))], 8, "trainer.kind=sft"),
        (TWO, [Run(trainer=Trainer(loss=Loss.own, loss_sha256="0" * 64))], 8, "trainer.loss=own"),
    ],
)
def test_what_keeps_trials_in_this_process(calm, options, runs, left, told):
    found = layout._never(SimpleNamespace(options=options), runs, left)
    assert (found is None) if told is None else told in found


def test_one_core_has_nothing_to_share_out(monkeypatch):
    monkeypatch.setattr(layout.machine, "cores", lambda: 1)
    assert layout._never(SimpleNamespace(options=TWO), [RUN], 8) == "one trial, or one core"


def test_room_by_hand(monkeypatch):
    """10 GiB free, of which 8 may be taken; a worker takes 0.8 + 1 + 1.6 * 0.5 = 2.6 GiB."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10 * estimate.GIB))
    plan = SimpleNamespace(weights=estimate.GIB, memory=1.5 * estimate.GIB)
    assert layout.room(plan) == 3
    for most, used in (("memory.max", "memory.current"),
                       ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):  # fmt: skip
        limits = {most: str(8 * estimate.GIB), used: str(estimate.GIB)}
        monkeypatch.setattr(machine, "limit", lambda name, told=limits: told.get(name, ""))
        assert layout.room(plan) == 2  # 7 GiB are left of a container's 8
    monkeypatch.setattr(machine, "limit", lambda name: "max")
    assert layout.room(plan) == 3


def test_operations_by_hand(tiny, monkeypatch):
    """5 steps, of which steps 2 and 4 are rungs: three passes over the held-out rows, and writing, which takes two."""
    run = tiny("trainer.steps=5", "trainer.report_steps=2")
    monkeypatch.setattr(layout.data, "load", lambda _: SimpleNamespace(valid=[None] * 10))
    plan, given = SimpleNamespace(flops=6 * 300 * 1000, padded=300, steps=5), estimate.Rows((10, 30), (1, 1))
    training, one = 4 * 300 * 1000, 2 * 1000 * 10 * 20
    assert layout.flops(run, plan, given) == (training + 5 * one, 3 * one)
    without = Run(**{**vars(run), "eval": Eval(generate=False)})
    assert layout.flops(without, plan, given) == (training + 3 * one, one)


def test_the_probe_times_a_step_and_leaves_everything_as_it_was():
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    seconds, operations = layout.probe(2, 8, "eager", "float32")(1)
    linear = 4 * (576 * (576 + 2 * 192 + 576) + 3 * 576 * 1536) + 4096 * 576
    norms = 576 * (2 * 4 + 1)
    assert operations == 4 * (linear + norms) * 16
    assert 0 < seconds < 60
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_probe_computes_in_the_format_of_the_trials(dtype, monkeypatch):
    seen, usual = set(), torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x, *given: seen.add(x.dtype) or usual(x, *given))
    layout.probe(1, 2, "eager", dtype)(1)
    assert seen == {getattr(torch, dtype)}


def test_a_sweep_of_minutes_is_probed_and_a_short_one_is_not(calm, tiny, tmp_path, monkeypatch):
    """From the config to the choice, with the rule about tiny models taken out."""
    run = tiny("trainer.steps=3")
    sweep = SimpleNamespace(options=TWO, space=SimpleNamespace(axes=()), run=lambda *_: run)
    assert layout.choice(sweep, 8) == {"workers": 0, "why": "a tiny model"}
    monkeypatch.setattr(layout, "_never", lambda *_: None)
    assert layout.choice(sweep, 8) == {"workers": 0, "why": "a short sweep"}
    asked = []
    monkeypatch.setattr(layout, "CORE", 1.0)
    monkeypatch.setattr(layout, "probe", lambda *given: asked.append(given) or steps({2: 1e9, 1: 1e9}))
    settled, applied = [], []
    monkeypatch.setattr(layout.compute, "apply", applied.append)
    monkeypatch.setattr(layout, "_settle", lambda *given: settled.append(given[2]))
    assert layout.choice(sweep, 8)["workers"] == 2
    assert settled == [1]
    assert len(applied) == 1  # before the probe, which computes as trials do
    [(rows, length, *how)] = asked
    assert (rows, 0 < length < 256, how) == (run.trainer.batch, True, ["eager", compute.policy(run.model).dtype])
    monkeypatch.setattr(layout, "TOKENS", 5)
    asked.clear()
    layout.choice(sweep, 8)
    assert [given[:3] for given in asked] == [(1, 5, "eager")]  # long rows are cut: attention grows with their square
    monkeypatch.setattr(layout, "room", lambda _: 1)
    assert layout.choice(sweep, 8) == {"workers": 0, "why": "no memory for two workers"}
    monkeypatch.setattr(layout, "LARGEST", 0)
    assert "large" in layout.choice(sweep, 8)["why"]


def test_a_gpu_that_is_not_listed_is_not_taken_for_a_cpu(calm, tiny, monkeypatch):
    """As of ROCm, or of a container without nvidia-smi."""
    run = tiny()
    sweep = SimpleNamespace(options=TWO, space=SimpleNamespace(axes=()), run=lambda *_: run)
    monkeypatch.setattr(layout, "_never", lambda *_: None)
    monkeypatch.setattr(layout.compute, "policy", lambda *_: SimpleNamespace(device="cuda"))
    assert layout.choice(sweep, 8) == {"workers": 0, "why": "a GPU that nvidia-smi does not list"}


def test_how_workers_compute_is_chosen_before_they_start(tiny, monkeypatch):
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(layout.compute, "policy", lambda *given: seen.append((torch.get_num_threads(), given[1])))
    layout._settle(tiny(), 77, 1)
    assert seen == [(1, 77)]
    assert torch.get_num_threads() == before


SWEEP = [*UNWRITTEN, "track=none", "eval=loss", "lora.r=2,4", "name=s", "-m"]


def test_a_choice_is_made_once_told_and_kept(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    asked = []
    monkeypatch.setattr(layout, "choice", lambda sweep, left: asked.append(left) or {"workers": 2, "why": "take less"})
    code, _, err = cli(*SWEEP)
    assert (code, asked) == (0, [2]), err
    assert "trials take less" in err
    assert "2 workers" in err
    folder = tmp_path / "outputs" / "sweeps" / "s"
    assert len(list((folder / "workers").glob("*.log"))) == 2
    threads = {(read_json(p) or {})["facts"]["compute"]["threads"] for p in folder.glob("*/trial.json")}
    assert threads == {max(1, machine.cores() // 2)}
    record = worker.open_study(frozen.load(folder))
    assert record.user_attrs[f"{layout.CHOSEN} {study.HOST}"] == {"workers": 2, "why": "take less"}
    assert layout.workers(frozen.load(folder), record, 1) == 2
    assert asked == [2]


@pytest.mark.parametrize("given", [{"workers": 3}, {"engine": Engine.slurm, "workers": 2}])
def test_who_says_how_many_is_not_asked(monkeypatch, given):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(layout, "choice", lambda *_: pytest.fail("nothing was to be chosen"))
    options = Options(sampler=Sampler.random, n_trials=8, **given)
    assert layout.workers(SimpleNamespace(options=options), SimpleNamespace(user_attrs={}), 8) == given["workers"]


def test_a_sweep_that_cannot_be_planned_runs_as_it_is(monkeypatch):
    from ftexp.errors import MachineError

    def broken(*_):
        raise MachineError("the config of the model cannot be read")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(layout, "choice", broken)
    told = {}
    record = SimpleNamespace(user_attrs={}, set_user_attr=lambda key, value: told.update({key: value}))
    assert layout.workers(SimpleNamespace(options=TWO), record, 8) == 0
    [kept] = told.values()  # a launch that goes on keeps to it, and so to the threads of its trials
    assert kept == {"workers": 0, "why": "no plan: the config of the model cannot be read"}


def test_a_gpu_each_needs_no_choice(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr(layout, "choice", lambda *_: pytest.fail("nothing was to be chosen"))
    assert layout.workers(SimpleNamespace(options=TWO), SimpleNamespace(user_attrs={}), 8) == 3


def test_a_worker_with_one_gpu_of_many_takes_its_share_of_the_tickets(monkeypatch):
    """It sees one GPU; without being told of the others it would take all that wait into its pack."""
    waiting = [SimpleNamespace(state=SimpleNamespace(name="WAITING"), user_attrs={})] * 16
    monkeypatch.setattr(study, "counted", lambda _: waiting)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    place = supervisor.slots(8)[5]
    for name, value in place.env.items():
        monkeypatch.setenv(name, value)
    sweep = SimpleNamespace(options=Options(sampler=Sampler.random, n_trials=16, pack=16))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    assert packs.size(sweep, SimpleNamespace(), True) == 2
    monkeypatch.delenv(supervisor.COUNT)
    assert packs.size(sweep, SimpleNamespace(), True) == 16  # the guard above is not vacuous


def test_workers_that_start_together_take_equal_shares(monkeypatch):
    """The second takes as many as the first, of which eight minus those wait; later each takes its share of the rest.

    A worker that comes to help does not take for its own what others have been at for a while.
    """
    now = datetime.now()
    running, old = (SimpleNamespace(state=SimpleNamespace(name="RUNNING"), datetime_start=at, user_attrs={})
                    for at in (now, now - timedelta(minutes=5)))  # fmt: skip
    wait = SimpleNamespace(state=SimpleNamespace(name="WAITING"), datetime_start=None, user_attrs={})
    trials = [running] * 4 + [wait] * 4
    monkeypatch.setattr(study, "counted", lambda _: trials)
    monkeypatch.setenv(supervisor.COUNT, "2")
    sweep = SimpleNamespace(options=Options(sampler=Sampler.random, n_trials=8, pack=16))
    assert packs.size(sweep, SimpleNamespace(), True) == 4
    assert packs.size(sweep, SimpleNamespace(), False) == 2
    trials[:] = [old] * 4 + [wait] * 4
    assert packs.size(sweep, SimpleNamespace(), True) == 2
    trials[:] = [running] * 7 + [wait]
    assert packs.size(sweep, SimpleNamespace(), True) == 1
    monkeypatch.setenv(share.TOKEN, "me")
    kept, other = (
        SimpleNamespace(state=wait.state, datetime_start=None,
                        user_attrs={study.KEPT: {"for": token, "until": time.time() + 50}})
        for token in ("me", "other")
    )  # fmt: skip
    trials[:] = [old] * 3 + [kept] * 3 + [other] * 2 + [wait] * 2
    assert packs.size(sweep, SimpleNamespace(), False) == 4  # all that are kept for it, and half of the others


def test_every_sampler_that_looks_at_results_is_left_out():
    assert set(Sampler) - set(DRAWN) == {Sampler.tpe, Sampler.gp, Sampler.nsga2}
