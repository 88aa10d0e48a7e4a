"""DPO: TRL's loss, a reference that is the untouched base, and a first loss that is known because of it."""

import math

import pytest
import torch
from test_answers import trained

from ftexp import data, experiment, model
from ftexp.config import Trainer
from ftexp.train import dpo, sft


@pytest.fixture
def pairs_of(tiny):
    return lambda *given: tiny("data=preference", "trainer=dpo", "eval.generate=false", *given)


def parts(run):
    task = experiment.TASKS[run.trainer.kind](run, data.load(run.data))
    base = model.load(run.model, run.quant)
    task.ready(base)
    return base, task


@pytest.mark.parametrize("lora", ["default", "dora", "rslora", "pissa", "none"])
def test_first_loss_is_a_coins(pairs_of, tmp_path, lora):
    reports = []
    trained(pairs_of("trainer.steps=1", f"lora={lora}"), tmp_path, reports)
    assert reports[0][1]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_sabotage_reference_with_the_adapter_off_is_no_reference_for_pissa(pairs_of):
    """What TRL takes for adapters that it puts on itself: the base that PiSSA took the first weights out of."""
    run = pairs_of("lora=pissa", "lora.r=32")
    base, task = parts(run)
    with model.adapted(base, run.lora, run.seed) as tuned, tuned.disable_adapter():
        wrong = dpo.refer(base, task.train[:20], "x")
    right = dpo.refer(base, task.train[:20], "x")
    assert max(abs(a - b) for one, two in zip(wrong, right, strict=True) for a, b in zip(one, two, strict=True)) > 0.1


def test_loss_and_first_gradient_are_those_of_trls_trainer(pairs_of, tmp_path):
    """DPOTrainer on the same pairs: its reference is a copy of the adapter, which at the start is the base too."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    run = pairs_of("trainer.beta=0.3")
    base, task = parts(run)
    batch = task.train[:6]
    for pair in batch:
        pair.reference = dpo.refer(base, [pair], "x")[0]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    ids = [
        dict(zip(names, map(list, (p.chosen.prompt, p.chosen.completion, p.rejected.completion)), strict=True))
        for p in batch
    ]
    table = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])  # its own rows are not used
    with model.adapted(base, run.lora, run.seed) as tuned:
        args = DPOConfig(output_dir=str(tmp_path), beta=0.3, max_length=None, use_cpu=True, bf16=False, report_to="none",
                         gradient_checkpointing=False)  # fmt: skip
        their = DPOTrainer(tuned, args=args, train_dataset=table, processing_class=base.tokenizer)
        with torch.no_grad():  # another policy than the reference
            for name, weight in tuned.named_parameters():
                if "lora_B.default" in name:
                    weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        ours = dpo.nats(tuned, dpo.tensors(batch, base.tokenizer.pad_token_id), 0.3).mean()
        ours.backward()
        mine = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
        tuned.zero_grad()
        theirs = their.compute_loss(tuned, their.data_collator(ids))
        theirs.backward()
        other = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
    assert abs(ours.item() - math.log(2)) > 1e-2
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert set(mine) == set(other)
    assert max((mine[n] - other[n]).abs().max() for n in mine) < 1e-5


@pytest.mark.parametrize("given", [{"steps": 3, "batch": 4}, {"steps": 2, "batch": 3, "accumulation": 2},
                                   {"steps": 3, "batch": 4, "extra": {"data_seed": 9}}])  # fmt: skip
@pytest.mark.parametrize("seed", [0, 7])
def test_a_short_training_passes_the_rows_that_were_foreseen(pairs_of, tmp_path, monkeypatch, given, seed):
    run = pairs_of(f"seed={seed}", "trainer.steps=3", "trainer.report_steps=0")
    run.trainer = Trainer(kind=run.trainer.kind, report_steps=0, **given)
    seen, usual = [], dpo.tensors
    monkeypatch.setattr(dpo, "tensors", lambda batch, pad: seen.extend(p.row.where for p in batch) or usual(batch, pad))
    trained(run, tmp_path)
    _, task = parts(run)
    foreseen = {task.train[n].row.where for n in dpo.passed(len(task.train), run.trainer, run.seed)}
    assert set(seen) <= foreseen
    assert len(foreseen) < len(task.train) / 2
    whole = Trainer(steps=None, epochs=1.5, batch=7)
    assert dpo.passed(20, whole, 0) == list(range(20))
    assert sft.planned_steps(whole, 20) == 5


def test_reference_is_asked_once_for_trials_that_share_rows(pairs_of, tmp_path, monkeypatch):
    asked, usual = [], dpo.refer
    monkeypatch.setattr(experiment, "_references", {})
    monkeypatch.setattr(dpo, "refer", lambda base, rows, label: asked.append(label) or usual(base, rows, label))
    for n, lr in enumerate(("1e-3", "2e-3")):
        experiment.execute(pairs_of(f"trainer.lr={lr}"), tmp_path / str(n), "x")
    assert asked == ["reference, train", "reference, valid"]


def test_trial_alone_equals_the_same_trial_after_others(pairs_of, tmp_path, monkeypatch):
    given = ("trainer.neftune=5", "lora.dropout=0.1")
    for kept in ("_references", "_base_scores"):
        monkeypatch.setattr(experiment, kept, {})
    alone = experiment.execute(pairs_of(*given), tmp_path / "alone", "x")
    for n, other in enumerate((["lora=none"], ["lora=pissa", "seed=3"], ["trainer.steps=7"])):
        experiment.execute(pairs_of(*other), tmp_path / str(n), "x")
    after = experiment.execute(pairs_of(*given), tmp_path / "after", "x")
    free = ("cost/seconds", "cost/memory_gib")
    assert {k: v for k, v in alone.items() if k not in free} == {k: v for k, v in after.items() if k not in free}
    files = [(tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in ("alone", "after")]
    assert files[0] == files[1]


def test_it_learns_what_is_preferred(pairs_of, tmp_path):
    run = pairs_of("data.rows=300", "data.valid=48", "trainer.steps=40", "trainer.batch=8", "lora=none", "trainer.lr=1e-3",
                   "objectives=[valid/accuracy]", "trainer.report_steps=0", "eval.generate=true")  # fmt: skip
    experiment.check(run, None)
    experiment.prepare(run)
    scores = experiment.execute(run, tmp_path / "a", "x")
    assert scores["base/accuracy"] == 0.5
    assert scores["base/loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert scores["valid/accuracy"] > 0.6
    assert scores["valid/margin"] > 0
    assert "valid/exact_match" in scores


def test_loss_of_held_out_pairs_by_hand(pairs_of):
    """A policy 2 nats surer of the better answer and 1 nat less sure of the worse one: margin beta * 3."""
    _, task = parts(pairs_of())
    pair = task.valid[0]
    pair.reference = (10.0, 9.0)
    assert dpo.margin((8.0, 10.0), pair, 0.5) == 1.5


def test_pair_without_a_reference_is_an_error(pairs_of):
    _, task = parts(pairs_of())
    task.train[0].reference = None
    with pytest.raises(AssertionError, match="the reference was not asked"):
        dpo.tensors(task.train[:1], 0)
