"""Plans against the real thing: the Trainer's own count of operations, optimizers' state, saved checkpoints."""

import math
from dataclasses import replace

import pytest
import torch

from ftexp import data, estimate, experiment, model
from ftexp.config import Format, Kind, Lora, Model, Quant, Run, Trainer
from ftexp.estimate import Rows
from ftexp.model.compute import Compute
from ftexp.train import TRAINERS, checkpoints
from ftexp.train.control import Control

CPU = Compute("cpu", "float32", "default", "eager", "test", 1)
GPU = Compute("cuda", "float32", "default", "sdpa", "test", 1)
LABELS = ["trainer.kind=classify", "data.prompt='{prompt}'", "objectives=[valid/loss]"]


def planned_and_trained(run, folder):
    """Plan a run, then train it."""
    splits = data.load(run.data)
    task = experiment.TASKS[run.trainer.kind](run, splits)
    base = model.load(run.model, run.quant, task.outputs)
    task.ready(base)
    plan = estimate.trial(run, estimate.rows(task.train, run), base.compute, task.outputs)
    with model.adapted(base, run.lora, run.seed) as tuned:
        real = TRAINERS[run.trainer.kind](
            task.run,
            base,
            tuned,
            task.train,
            task.valid,
            checkpoints.store(folder / "t", {}),
            lambda *_: None,
            Control(),
        )
    return plan, real


@pytest.mark.parametrize(
    "given",
    [["trainer.steps=4"], ["trainer.steps=31", "trainer.batch=7", "seed=5"],
     ["trainer.steps=null", "trainer.epochs=1.5", "trainer.batch=16", "trainer.accumulation=3"],
     ["trainer.steps=9", "trainer.accumulation=4", "trainer.extra.data_seed=11"],
     ["trainer.steps=9", "trainer.accumulation=2", "trainer.batch=3", "trainer.group_by_length=true"],
     ["trainer.steps=9", "trainer.batch=2", "data.packing=bfd"],
     ["trainer.steps=null", "trainer.epochs=2.0", "trainer.batch=1", "data.packing=wrapped"],
     ["trainer.steps=3", "lora=dora", "lora.r=3", "lora.targets=[q_proj,down_proj]"],
     ["trainer.steps=3", "lora=none"], ["trainer.steps=3", "lora=none", "lora.train=[layers.1]"],
     ["trainer.steps=5", "data=preference", "trainer=dpo", "trainer.batch=3", "trainer.accumulation=2"],
     ["trainer.steps=null", "data=preference", "trainer=reward", "trainer.batch=7", "lora=pissa"]],
    ids=" ".join,
)  # fmt: skip
def test_steps_and_operations_are_the_trainers(given, tiny, tmp_path):
    overrides = [f"++{g}" if ".extra." in g else g for g in given]
    plan, real = planned_and_trained(tiny(*overrides, "trainer.report_steps=0"), tmp_path)
    assert plan.steps == real["train/steps"]
    assert plan.flops == real["train/flops"]
    assert plan.tokens < plan.padded or "data.packing=wrapped" in given  # whose packs are full


def test_operations_of_a_classifier(composed, tmp_path):
    run = composed("model=tiny", "data=genres", "data.rows=80", "data.valid=10", "trainer=classify", "trainer.steps=5",
                   "trainer.report_steps=0", "track=none", "model.dtype=float32")  # fmt: skip
    plan, real = planned_and_trained(run, tmp_path)
    assert (plan.steps, plan.flops) == (5, real["train/flops"])


def test_an_order_that_is_not_the_trainers_would_be_seen(tiny, tmp_path, monkeypatch):
    usual = estimate.batches
    monkeypatch.setattr(estimate, "batches", lambda given, trainer, seed: usual(given, trainer, seed + 1))
    plan, real = planned_and_trained(tiny("trainer.report_steps=0"), tmp_path)
    assert plan.flops != real["train/flops"]


def test_batches_by_hand():
    """Three rows, two a pass, two passes a step, three steps: each epoch is one step, its last pass has one row."""
    given = Rows((5, 7, 11), (1, 2, 3))
    made = list(estimate.batches(given, Trainer(steps=3, batch=2, accumulation=2), seed=0))
    assert [b.rows for b in made] == [2, 1] * 3
    assert sum(b.tokens for b in made) == 3 * 23
    assert sum(b.supervised for b in made) == 3 * 6
    assert all(b.longest * b.rows >= b.tokens for b in made)


def test_a_training_that_ends_within_an_epoch():
    given = Rows((4,) * 100, (4,) * 100)
    made = list(estimate.batches(given, Trainer(steps=3, batch=8, accumulation=2), seed=0))
    assert [b.rows for b in made] == [8] * 6


def phi3(**trainer):
    lora = Lora(8, 16, targets=["o_proj", "qkv_proj", "gate_up_proj", "down_proj"])
    return Run(Model(kind=Kind.hub, path="microsoft/Phi-3-mini-4k-instruct"), Quant(Format.nf4, True), lora,
               trainer=Trainer(epochs=10, batch=16, optimizer="paged_adamw_8bit", **trainer))  # fmt: skip


def test_phi3_takes_the_steps_and_operations_its_recipe_printed():
    blocks = Rows((64,) * 341, (64,) * 341)  # the recipe packs 720 sentences into 341 blocks
    plan = estimate.trial(phi3(), blocks, GPU)
    assert (plan.steps, plan.tokens, plan.flops) == (220, 218_240, 4_890_970_340_720_640)
    assert (plan.footprint_adapted, plan.trainable, plan.total) == (2_651_074_752, 12_582_912, 3_833_662_464)
    assert f"{plan.share:.2%}" == "0.33%"


def test_five_hours_of_the_rented_card():
    assert estimate.dollars(5 * 3600, 0.29) == 1.45


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adamw_8bit", "paged_adamw_32bit"])
def test_optimizer_state_is_that_of_the_real_one(name):
    import bitsandbytes

    numels = (100, 4095, 4096, 5000, 70_000)
    weights = [torch.nn.Parameter(torch.zeros(n)) for n in numels]
    made = {"adamw_torch": torch.optim.AdamW, "adamw_torch_fused": torch.optim.AdamW, "sgd": torch.optim.SGD,
            "adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_32bit": bitsandbytes.optim.PagedAdamW32bit}  # fmt: skip
    optimizer = made[name](weights, lr=1e-3, **({"fused": True} if "fused" in name else {}))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    shared = {"qmap1", "qmap2"}
    real = sum(
        v.nbytes
        for s in optimizer.state.values()
        for k, v in s.items()
        if isinstance(v, torch.Tensor) and k not in shared
    )
    assert estimate.optimizer_bytes(name, numels) == real


@pytest.mark.parametrize("lora", ["default", "pissa", "none", "loraplus"])
def test_a_checkpoint_is_as_large_as_planned(lora, tiny, tmp_path):
    """Adapter and optimizer; the tokenizer, the schedule and the log are not planned, and are small."""
    run = tiny("trainer.steps=3", "trainer.checkpoint_minutes=0", f"lora={lora}", "lora.r=32")
    splits = data.load(run.data)
    task = experiment.TASKS[run.trainer.kind](run, splits)
    base = model.load(run.model, run.quant)
    plan = estimate.trial(run, estimate.rows(task.train, run), base.compute)
    kept = checkpoints.store(tmp_path / "t", {})
    with model.adapted(base, run.lora, run.seed) as tuned:
        TRAINERS[run.trainer.kind](run, base, tuned, task.train, task.valid, kept, lambda *_: None, Control())
        model.save(base, tuned, tmp_path)
    folder = next((tmp_path / "t").glob("checkpoint-*"))
    real = sum(path.stat().st_size for path in (next(folder.glob("*model.safetensors")), folder / "optimizer.pt"))
    assert plan.checkpoint == pytest.approx(real, rel=0.04)
    assert plan.adapter_file == next(tmp_path.glob("*/*model.safetensors")).stat().st_size


def test_a_base_that_is_trained_is_kept_a_second_time_on_a_cpu(composed):
    rows = Rows((64,) * 64, (32,) * 64)
    on = {name: estimate.trial(composed("model=tiny", "lora=none"), rows, where) for name, where in
          {"cpu": CPU, "gpu": GPU}.items()}  # fmt: skip
    assert on["cpu"].copy == on["cpu"].gradients == 4 * on["cpu"].trainable
    assert (on["gpu"].copy, on["cpu"].adapter) == (0, 0)
    assert on["cpu"].optimizer == pytest.approx(8 * on["cpu"].trainable, rel=0.01)
    parts = ("weights", "adapter", "copy", "gradients", "optimizer", "activations")
    assert on["cpu"].memory == sum(getattr(on["cpu"], part) for part in parts)
    assert (on["cpu"].judge, on["cpu"].written) == (0, 0)


@pytest.mark.parametrize("lora", ["default", "none"])
def test_reinforcement_is_planned_from_above(rewarded, stages, tmp_path, lora):
    """Steps and weights exactly, operations as if every completion were as long as it may be; the reward model counts."""
    from ftexp import plan
    from ftexp.train import rewarder

    run = rewarded(f"lora={lora}", "trainer.steps=null", "trainer.epochs=0.5", "trainer.accumulation=2")
    splits = data.load(run.data)
    task = experiment.TASKS[run.trainer.kind](run, splits)
    base = model.load(run.model, run.quant)
    task.ready(base)
    planned = plan.trial("", run, plan.Wanted()).plan
    told = []
    with model.adapted(base, run.lora, run.seed) as tuned:
        assert planned.trainable == model.count(tuned).trainable
        real = TRAINERS[run.trainer.kind](run, base, tuned, task.train, task.valid, checkpoints.store(tmp_path / "t", {}),
                                          lambda v, s: told.append(v), Control(), **task.more)  # fmt: skip
    prompts = len(task.train)
    assert prompts == 108
    assert planned.steps == real["train/steps"] == len(told) == math.ceil(108 * 4 // 16 / 2) == 14
    assert planned.written == 14 * 16 * 6
    assert 0.5 * planned.flops < real["train/flops"] <= planned.flops
    judge = rewarder.load(run).tuned
    held = [*judge.parameters(), *judge.buffers()]
    assert planned.judge == sum(p.numel() * p.itemsize for p in held)
    parts = ("weights", "adapter", "copy", "gradients", "optimizer", "activations", "judge")
    assert planned.memory == sum(getattr(planned, part) for part in parts)
    assert (
        estimate.missed(
            estimate.against(planned, {"trainable": planned.trainable, "total": planned.total}, real, 1, True)
        )
        == []
    )


def test_pairs_by_hand():
    """A pass holds both answers: twice the rows, as wide as the longest of either."""
    given = Rows((5, 7), (4, 6), worse=(9, 6))
    (made,) = estimate.batches(given, Trainer(steps=1, batch=2), seed=0)
    assert (made.rows, made.longest, made.tokens, made.supervised) == (4, 9, 27, 10)


def test_what_is_not_known_is_said(composed):
    rows = Rows((20,) * 10, (5,) * 10)
    run = composed("model=tiny", "trainer.optimizer=lomo", "++trainer.extra.packing=true")
    plan = estimate.trial(run, rows, CPU)
    assert plan.optimizer is None
    assert plan.memory == plan.weights + plan.adapter + plan.gradients + plan.activations
    assert ["optimizer=lomo" in plan.notes[0], "extra.packing" in plan.notes[1]] == [True, True]


def test_a_model_that_cannot_be_traced_is_planned_without_activations(monkeypatch, composed):
    def looks(*_args, **_kwargs):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(estimate.activations, "trace", looks)
    monkeypatch.setattr(estimate, "_traces", {})
    plan = estimate.trial(composed("model=tiny"), Rows((20,) * 10, (5,) * 10), CPU)
    assert plan.activations is None
    assert "cannot be traced" in plan.notes[0]


def test_trials_that_differ_in_no_size_share_one_model(composed, monkeypatch):
    from ftexp.model import sizes

    made, real = [], sizes.outline
    monkeypatch.setattr(sizes, "outline", lambda *given: made.append(1) or real(*given))
    monkeypatch.setattr(estimate, "_outlines", {})
    lengths = Rows((40,) * 16, (10,) * 16)
    compute = Compute("cpu", "float32", "default", "eager", "", 1)
    plans = {r: [estimate.trial(composed("model=tiny", f"lora.r={r}", f"lora.alpha={a}", f"trainer.lr={lr}"), lengths, compute)
                 for a, lr in ((8, 1e-3), (16, 1e-2))] for r in (2, 4, 2)}  # fmt: skip
    assert len(made) == 2
    assert all(first == second for first, second in plans.values())
    assert plans[2][0].trainable * 2 == plans[4][0].trainable


def test_memory_grows_with_what_makes_it(composed):
    rows = Rows((64,) * 64, (32,) * 64)
    plan = {name: estimate.trial(composed("model=tiny", *given), rows, CPU) for name, given in {
        "plain": [], "wide": ["trainer.batch=16"], "rank": ["lora.r=64"],
        "checkpointed": ["trainer.gradient_checkpointing=true"]}.items()}  # fmt: skip
    assert plan["wide"].activations > 1.8 * plan["plain"].activations
    assert plan["checkpointed"].activations < 0.7 * plan["plain"].activations
    assert plan["rank"].optimizer == pytest.approx(4 * plan["plain"].optimizer, rel=0.01)


ROWS = Rows((30, 60, 41, 17) * 8, (12, 20, 5, 9) * 8)


def forget():
    """Drop what planning keeps, so that the next plan is put together itself."""
    estimate._outlines.clear()
    estimate._traces.clear()


@pytest.mark.parametrize(
    "given",
    [[], ["lora=dora"], ["lora=pissa"], ["lora=rslora", "trainer.gradient_checkpointing=true"], ["trainer.loss=focal"],
     ["lora.targets=[q_proj,lm_head]", "lora.dropout=0.1"], ["trainer.optimizer=adamw_8bit"], ["trainer=reward", "data=preference"],
     *(pytest.param(given, marks=pytest.mark.slow) for given in (
         ["model=hub", "model.path=openai-community/gpt2"], ["model=embedded", "quant=nf4", "lora=loftq"],
         ["model=hub", "model.path=microsoft/Phi-3-mini-4k-instruct", "quant=nf4"]))],
    ids=" ".join,
)  # fmt: skip
def test_ranks_between_and_beyond_two_are_planned_exactly(given, composed):
    """Every number of a plan, files with their headers and the peak of a step too."""
    labels = int("trainer=reward" in given)

    def planned(rank):
        return estimate.trial(composed("model=tiny", "track=none", *given, f"lora.r={rank}"), ROWS, CPU, labels)

    alone = {}
    for rank in (1, 2, 9, 100, 3000):
        forget()
        alone[rank] = planned(rank)
    forget()
    planned(8)
    planned(24)
    assert {rank: planned(rank) for rank in alone} == alone


def test_a_hundred_ranks_are_traced_as_often_as_two(composed, monkeypatch):
    forget()
    outlines, traces = [], []
    outline, trace = estimate.sizes.outline, estimate.activations.trace
    monkeypatch.setattr(estimate.sizes, "outline", lambda *given: outlines.append(1) or outline(*given))
    monkeypatch.setattr(estimate.activations, "trace", lambda *given: traces.append(1) or trace(*given))
    run = composed("model=tiny")
    found = [estimate.trial(replace(run, lora=Lora(r, 2 * r)), ROWS, CPU).trainable for r in range(4, 104)]
    assert (len(outlines), len(traces)) == (2, 2)
    assert len(set(found)) == 100


def test_sabotage_peaks_alone_lie_on_no_line(composed):
    """The greatest of many lines is a broken one: what holds most at rank 8 is another moment than at rank 3000."""
    forget()
    run = composed("model=tiny")
    peaks = {r: estimate.trial(replace(run, lora=Lora(r, r)), ROWS, CPU).activations for r in (8, 24)}
    line = estimate.sizes.line(peaks[8], peaks[24], (8, 24), 3000)
    forget()
    assert line != estimate.trial(replace(run, lora=Lora(3000, 1)), ROWS, CPU).activations


def test_plan_against_real():
    plan = estimate.trial(Run(Model(kind=Kind.tiny)), Rows((20,) * 10, (5,) * 10), CPU)
    parameters = {"trainable": plan.trainable, "total": plan.total}
    trained = {"train/steps": plan.steps, "train/flops": float(plan.flops)}
    told = estimate.against(plan, parameters, trained, plan.memory / estimate.GIB / 2, whole=True)
    assert told["memory_gib"]["error"] == pytest.approx(1.0)
    assert estimate.missed(told) == []
    wrong = estimate.against(plan, parameters | {"total": 7}, trained, 0.0, whole=False)
    assert estimate.missed(wrong) == [f"total {plan.total} planned, 7 real"]
    assert wrong["memory_gib"]["error"] is None
    noted = estimate.against(replace(plan, notes=("x",)), parameters, trained | {"train/flops": 1.0}, 1.0, whole=True)
    assert estimate.missed(noted) == []
    assert math.isclose(told["memory_gib"]["planned"], plan.memory / 2**30)
