"""Trials in lockstep: each ends with the bytes it has alone, in any pack, whoever leaves it and however it is cut."""

import threading
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
import torch

from ftexp import data, experiment, model
from ftexp.errors import Diverged, OutOfTime, Preempted, Pruned
from ftexp.model import packed as passes
from ftexp.train import checkpoints, lockstep, sft
from ftexp.train.control import Control, Recorded

POINTS = [
    ("lora.r=4",),
    ("lora.r=8", "trainer.neftune=5"),
    ("lora.r=4", "lora.dropout=0.1", "seed=3"),
    ("lora.r=16", "trainer.scheduler=cosine", "trainer.warmup=0.3", "trainer.lr=3e-3"),
    ("lora.r=2", "lora=rslora", "trainer.weight_decay=0.1", "trainer.steps=3"),
]
"""Everything that trials of a pack may differ in: each its own rows, noise, rate and number of steps."""


@pytest.fixture
def point(tiny):
    return lambda *given: tiny("trainer.engine=packed", *given)


def member(run, folder, told=None, **asked):
    """Prepare a trial as `experiment` does."""
    train, valid = experiment.tokenised(run, data.load(run.data))
    base = model.load(run.model, run.quant)
    with model.adapted(base, run.lora, run.seed) as tuned:
        start, scales = passes.taken(tuned)
    reports = told if told is not None else []
    control = Control(**{"leave": threading.Event(), **asked})
    kept = checkpoints.store(folder, {})
    return lockstep.Member(
        run, base, train, valid, start, scales, kept, lambda v, s: reports.append((s, v)), control
    )  # fmt: skip


def digest(weights) -> str:
    total = sha256()
    for name, pair in sorted(weights.items()):
        for weight in pair:
            total.update(name.encode() + weight.numpy().tobytes())
    return total.hexdigest()


def ended(members):
    """Train members; return for each its digest, and what came of it."""
    told = dict(lockstep.train(members))
    return [digest(told[n].weights) for n in range(len(members))], [told[n] for n in range(len(members))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_the_same_alone_and_in_packs_of_2_5_and_16(point, tmp_path, dtype):
    runs = [point(f"model.dtype={dtype}", *given) for given in POINTS]
    reports = [[] for _ in runs]
    alone = [ended([member(run, tmp_path / "x", told)])[0][0] for run, told in zip(runs, reports, strict=True)]
    assert len({*alone}) == len(runs)
    together = [[] for _ in runs]
    five, learned = ended([member(run, tmp_path / "x", told) for run, told in zip(runs, together, strict=True)])
    assert five == alone
    assert together == reports
    assert [one.steps for one in learned] == [4, 4, 4, 4, 3]
    assert [one.pack for one in learned] == [5] * 5
    assert ended([member(run, tmp_path / "x") for run in runs[:0:-3]])[0] == alone[:0:-3]  # two, in another order
    crowd = [point(f"model.dtype={dtype}", f"seed={n}", f"lora.r={1 + n}") for n in range(11)]
    assert ended([member(run, tmp_path / "x") for run in (*runs, *crowd)])[0][:5] == alone


def test_two_threads_change_nothing(point, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [point(*given, "trainer.steps=2", "trainer.report_steps=0") for given in POINTS[1:3]]
        alone = ended([member(runs[0], tmp_path / "x")])[0][0]
        assert ended([member(run, tmp_path / "x") for run in runs])[0][0] == alone
    finally:
        torch.set_num_threads(before)


def test_sabotage_a_shared_generator_is_seen(point, tmp_path, monkeypatch):
    """Noise that members draw from one generator depends on who else draws."""
    runs = [point("lora.r=4", "trainer.neftune=5", f"trainer.lr={rate}") for rate in (1e-2, 2e-2)]
    alone = ended([member(runs[1], tmp_path / "x")])[0][0]
    assert ended([member(run, tmp_path / "x") for run in runs])[0][1] == alone
    begun, shared = lockstep._begun, torch.Generator()

    def sharing(one):
        trial = begun(one)
        trial.adapter.draw = shared.manual_seed(one.run.seed)
        return trial

    monkeypatch.setattr(lockstep, "_begun", sharing)
    assert ended([member(run, tmp_path / "x") for run in runs])[0][1] != alone


@pytest.mark.parametrize(("worth", "prefixes"), [(passes.WORTH, {0, 6, 10}), (2.0, {0})])
def test_losses_are_those_of_trl(point, tiny, tmp_path, monkeypatch, worth, prefixes):
    """Twelve steps in float32 over batches of unequal rows, with warm-up, clipping, decay and accumulation.

    TRL reads the prefix that all rows share in each of them; here it is read once, or in each too.
    """
    monkeypatch.setattr(passes, "WORTH", worth)
    keys = ("trainer.steps=12", "lora.r=8", "trainer.batch=4", "trainer.accumulation=3", "trainer.warmup=0.2",
            "trainer.max_grad_norm=0.5", "trainer.weight_decay=0.05", "trainer.lr=3e-3")  # fmt: skip
    ours, theirs, seen, lay_out = [], [], set(), passes.lay_out

    def laid_out(given, *more):
        made = lay_out(given, *more)
        seen.add(made.own[0][-1].prefixed)
        return made

    monkeypatch.setattr(lockstep, "lay_out", laid_out)
    (_,), (mine,) = ended([member(point(*keys), tmp_path / "x", ours)])
    assert seen == prefixes
    run = tiny(*keys)
    train, valid = experiment.tokenised(run, data.load(run.data))
    base = model.load(run.model, run.quant)
    with model.adapted(base, run.lora, run.seed) as tuned:
        sft.train(run, base, tuned, train, valid, checkpoints.store(tmp_path / "t", {}),
                  lambda v, s: theirs.append((s, v)), Control())  # fmt: skip
        trained, _ = passes.taken(tuned)
    for name in ("train/loss", "train/lr", "train/grad_norm", "valid/loss"):
        curves = [{s: v[name] for s, v in told if name in v} for told in (ours, theirs)]
        assert curves[0] == pytest.approx(curves[1], abs=1e-5)
        assert len(curves[0]) == (5 if name == "valid/loss" else 12)
    start = member(run, tmp_path / "x").start
    for name, pair in mine.weights.items():
        for got, wanted, first in zip(pair, trained[name], start[name], strict=True):
            assert (got - wanted).norm() < 1e-3 * (wanted - first).norm()


def test_what_is_supervised_within_a_prefix_counts_in_each_row(point, tmp_path, monkeypatch):
    """Answers of earlier turns that rows share, read once and predicted in each."""
    keys = ("lora.r=8", "trainer.batch=4", "trainer.steps=6", "trainer.lr=3e-3")

    def curve(worth):
        monkeypatch.setattr(passes, "WORTH", worth)
        told = []
        plain = member(point(*keys), tmp_path / "x", told)
        rows = [replace(e, earlier=((3, 8),)) for e in plain.rows]
        (_,), (learned,) = ended([replace(plain, rows=rows)])
        return learned.weights, [v["train/loss"] for _, v in told if "train/loss" in v]

    (once, losses), (each, wanted) = curve(0.05), curve(2.0)
    assert losses == pytest.approx(wanted, abs=1e-5)
    start = member(point(*keys), tmp_path / "x").start
    for name, pair in once.items():
        for got, right, first in zip(pair, each[name], start[name], strict=True):
            assert (got - right).norm() < 1e-3 * (right - first).norm()


@pytest.mark.parametrize("shape", [("4", "2"), ("2", "4"), ("1", "8")])
def test_accumulation_is_exact(point, tmp_path, shape):
    whole = ended([member(point("trainer.batch=8"), tmp_path / "x")])[1][0]
    pieces = ended([member(point(f"trainer.batch={shape[0]}", f"trainer.accumulation={shape[1]}"), tmp_path / "x")])
    for name, pair in whole.weights.items():
        assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(pair, pieces[1][0].weights[name], strict=True))
    assert pieces[1][0].loss == pytest.approx(whole.loss, rel=1e-6)


def test_who_is_pruned_leaves_the_others_as_they_are(point, tmp_path):
    runs = [point(*given) for given in POINTS]
    alone = [ended([member(run, tmp_path / "x")])[0][0] for run in runs]
    lone = ended([member(runs[1], tmp_path / "x", judge=lambda value, step: "enough")])[0][0]
    members = [member(run, tmp_path / "x") for run in runs]
    members[1] = member(runs[1], tmp_path / "x", judge=lambda value, step: "enough")
    order, told = [], {}
    for n, one in lockstep.train(members):
        order.append(n)
        told[n] = one
    assert order == [1, 4, 0, 2, 3]
    assert isinstance(told[1].ended, Pruned)
    assert told[1].steps == 2
    assert digest(told[1].weights) == lone
    assert [digest(told[n].weights) for n in (0, 2, 3, 4)] == [alone[n] for n in (0, 2, 3, 4)]


def test_all_that_stand_at_a_rung_are_on_record_before_any_is_judged(point, tmp_path):
    told = []

    def judge(name):
        return Recorded(
            lambda rung, step: told.append((step, "told", name, rung.loss > 0)),
            lambda rung, step: told.append((step, "asked", name, rung.loss > 0)),
        )

    ended([member(point("trainer.report_steps=2", "trainer.steps=6"), tmp_path / "x", judge=judge(n)) for n in "ab"])
    assert told == [(step, what, name, True) for step in (2, 4) for what in ("told", "asked") for name in "ab"]


def test_who_diverges_ends_alone(point, tmp_path):
    runs = [point("lora.r=4"), point("lora.r=4", "trainer.lr=1", "trainer.max_grad_norm=0", "trainer.steps=40",
                                     "trainer.report_steps=0", "lora.alpha=8192")]  # fmt: skip
    alone = ended([member(runs[0], tmp_path / "x")])[0][0]
    digests, told = ended([member(run, tmp_path / "x") for run in runs])
    assert digests[0] == alone
    assert told[0].ended is None
    assert isinstance(told[1].ended, Diverged)
    assert "diverged at step" in str(told[1].ended)


def test_who_is_out_of_time_ends_alone(point, tmp_path):
    members = [member(point("lora.r=4"), tmp_path / "x"), member(point("lora.r=8"), tmp_path / "x", deadline=0.0)]
    _, told = ended(members)
    assert told[0].ended is None
    assert isinstance(told[1].ended, OutOfTime)
    assert told[1].steps == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_are_gone_on_with_alone_or_in_another_pack(point, tmp_path, dtype):
    runs = [point(f"model.dtype={dtype}", *given, "trainer.steps=6") for given in POINTS[:3]]
    calm = [ended([member(run, tmp_path / "x")])[0][0] for run in runs]
    leave = threading.Event()

    def stop(values, step):
        if step == 3:
            leave.set()

    asked = [member(run, tmp_path / str(n), leave=leave) for n, run in enumerate(runs)]
    asked[0] = lockstep.Member(**{**vars(asked[0]), "report": stop})
    _, told = ended(asked)
    assert all(isinstance(one.ended, Preempted) for one in told)
    assert [one.steps for one in told] == [3, 3, 3]
    again = [member(run, tmp_path / str(n)) for n, run in enumerate(runs)]
    assert [one.kept.resume and one.kept.resume.step for one in again] == [3, 3, 3]
    assert ended([again[1]])[0][0] == calm[1]
    other = member(point(f"model.dtype={dtype}", "lora.r=3", "seed=9"), tmp_path / "x")
    digests, told = ended([again[2], other, again[0]])
    assert [digests[0], digests[2]] == [calm[2], calm[0]]
    assert told[0].tokens == ended([member(runs[2], tmp_path / "x")])[1][0].tokens


def test_sabotage_a_checkpoint_without_the_generator_is_seen(point, tmp_path, monkeypatch):
    run = point("trainer.neftune=5", "trainer.checkpoint_minutes=0")
    calm = ended([member(run, tmp_path / "x")])[0][0]
    restore = lockstep._restore

    def forgetful(trial, step, state):
        restore(trial, step, state)
        trial.adapter.draw.manual_seed(run.seed)

    leave = threading.Event()
    one = member(run, tmp_path / "t", leave=leave)
    one = lockstep.Member(**{**vars(one), "report": lambda values, step: leave.set() if step == 2 else None})
    ended([one])
    assert ended([member(run, tmp_path / "t")])[0][0] == calm
    monkeypatch.setattr(lockstep, "_restore", forgetful)
    assert ended([member(run, tmp_path / "t")])[0][0] != calm


def test_where_memory_runs_out_fewer_share_a_pass(point, tmp_path, monkeypatch):
    """A pass of three or more runs out of memory after its noise was drawn; bytes stay."""
    runs = [point(*given) for given in POINTS]
    alone = [ended([member(run, tmp_path / "x")])[0][0] for run in runs]
    real = passes.Pack.hidden

    def narrow(self, layout, noise):
        if len(layout.members) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, layout, noise)

    monkeypatch.setattr(passes.Pack, "hidden", narrow)
    digests, told = ended([member(run, tmp_path / "x") for run in runs])
    assert digests == alone
    assert [one.pack for one in told] == [2, 2, 2, 2, 1]


def test_a_trial_that_does_not_fit_alone_ends_alone(point, tmp_path, monkeypatch):
    runs = [point("lora.r=4"), point("lora.r=8", "trainer.batch=16")]
    alone = ended([member(runs[0], tmp_path / "x")])[0][0]
    real = passes.Pack.hidden

    def narrow(self, layout, noise):
        if layout.training and layout.ids.numel() > 1200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, layout, noise)

    monkeypatch.setattr(passes.Pack, "hidden", narrow)
    digests, told = ended([member(run, tmp_path / "x") for run in runs])
    assert digests[0] == alone
    assert isinstance(told[1].ended, torch.OutOfMemoryError)


def test_where_memory_runs_out_in_the_curve_fewer_rows_share_a_pass(point, tmp_path, monkeypatch, capfd):
    run, told, real = point("lora.r=4", "trainer.report_steps=1"), {}, passes.Pack.hidden

    def curve(kind):
        told[kind] = []
        mine = ended([member(run, tmp_path / "x", told[kind])])[0]
        return mine, [(step, v["valid/loss"]) for step, v in told[kind] if "valid/loss" in v]

    whole = curve("whole")

    def narrow(self, layout, noise):
        if not layout.training and len(layout.own[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, layout, noise)

    monkeypatch.setattr(passes.Pack, "hidden", narrow)
    assert curve("cut") == whole
    assert len(whole[1]) > 1
    assert capfd.readouterr().err.count("at most 2 rows are scored at a time") == 1  # found out once, not at each rung


def test_an_error_in_what_a_member_does_alone_is_its_own(point, tmp_path):
    runs = [point("lora.r=4"), point("lora.r=8")]
    alone = ended([member(runs[0], tmp_path / "x")])[0][0]

    def broken(rung, step):
        raise OSError("the record cannot be read")

    digests, told = ended([member(runs[0], tmp_path / "x"), member(runs[1], tmp_path / "x", judge=broken)])
    assert digests[0] == alone
    assert isinstance(told[1].ended, OSError)


def test_other_errors_are_not_taken_for_memory(point, tmp_path, monkeypatch):
    def broken(self, layout, noise):
        raise RuntimeError("a fault of ours")

    one = member(point("lora.r=4"), tmp_path / "x")
    monkeypatch.setattr(passes.Pack, "hidden", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        ended([one])


def test_rows_come_in_the_order_of_the_trainer(point):
    """Against the sampler of accelerate, two epochs long."""
    from accelerate.data_loader import SeedableRandomSampler

    run = point("trainer.batch=4", "trainer.accumulation=2", "seed=5", "trainer.epochs=2", "trainer.steps=null")
    rows: Any = list(range(11))
    drawn = lockstep.batches(rows, run.trainer, run.seed)
    sampler = SeedableRandomSampler(rows, data_seed=5)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        steps = [next(drawn), next(drawn)]
        assert [len(step) for step in steps] == [2, 1]
        assert [n for step in steps for rows in step for n in rows] == order
    assert sft.planned_steps(run.trainer, 11) == 4


@pytest.mark.parametrize(("kind", "steps", "expected"), [
    ("linear", 4, [0, 1, 2 / 3, 1 / 3]), ("constant", 3, [1, 1, 1]), ("constant_with_warmup", 4, [0, 1, 1, 1]),
])  # fmt: skip
def test_schedules_by_hand(point, kind, steps, expected):
    warmup = "trainer.warmup=0" if kind == "constant" else "trainer.warmup=0.25"
    rate = lockstep.schedule(point(f"trainer.scheduler={kind}", warmup).trainer, steps)
    assert [rate(n) for n in range(steps)] == pytest.approx(expected)


def test_seconds_are_shared_out(point, tmp_path, monkeypatch):
    """Ten seconds a step for two members, and fifty while the first of them is scored: by hand."""
    clock = [0.0]
    step = lockstep._step

    def slow(*given):
        clock[0] += 10
        return step(*given)

    monkeypatch.setattr(lockstep.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(lockstep, "_step", slow)
    runs = [point("lora.r=4", f"trainer.steps={steps}", "trainer.report_steps=0") for steps in (2, 3)]
    members = [member(run, tmp_path / "x") for run in runs]
    seconds = []
    for n, _ in lockstep.train(members):
        clock[0] += 50
        seconds.append(members[n].kept.seconds())
    assert seconds == [10 + 50, 10 + 10 + 50]


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_quantized_bases_learn_as_with_trl_and_alone_as_together(point, tiny, tmp_path, quant):
    """Weights are unpacked once for all members; bitsandbytes trains int8 on a CPU with unpacked weights too."""
    base = model.load(tiny().model, tiny().quant)
    base.model.save_pretrained(tmp_path / "m")
    base.tokenizer.save_pretrained(tmp_path / "m")
    keys = ("model=hub", f"model.path={tmp_path}/m", "model.dtype=float32", f"quant={quant}", "trainer.steps=5")
    ours, theirs = [], []
    run = tiny(*keys, "lora.r=4")
    train, valid = experiment.tokenised(run, data.load(run.data))
    loaded = model.load(run.model, run.quant)
    with model.adapted(loaded, run.lora, run.seed) as tuned:
        sft.train(run, loaded, tuned, train, valid, checkpoints.store(tmp_path / "t", {}),
                  lambda v, s: theirs.append(v.get("train/loss")), Control())  # fmt: skip
    runs = [point(*keys, "lora.r=4"), point(*keys, "lora.r=8", "trainer.neftune=5")]
    digests, _ = ended([member(run, tmp_path / "x", ours if n == 0 else None) for n, run in enumerate(runs)])
    mine = [v["train/loss"] for _, v in ours if "train/loss" in v]
    assert mine == pytest.approx([loss for loss in theirs if loss is not None], abs=1e-5)
    assert mine[-1] < mine[0] - 0.01
    assert ended([member(runs[0], tmp_path / "x")])[0][0] == digests[0]
