"""Reward model: known first loss, TRL's loss, padding, what it learns, and the baseline beside it."""

import math

import encoders
import pytest
import torch
from test_answers import trained

from ftexp import data, experiment, model
from ftexp.files import read_json
from ftexp.train import reward


@pytest.fixture
def pairs_of(tiny):
    return lambda *given: tiny("data=preference", "trainer=reward", *given)


def parts(run):
    train, valid = experiment.paired(run, data.load(run.data))
    return model.load(run.model, run.quant, 1), train, valid


@pytest.mark.parametrize("given", [(), ("lora=none",), ("lora=pissa",)])
def test_first_loss_is_a_coins(pairs_of, tmp_path, given):
    reports = []
    trained(pairs_of("trainer.steps=1", "trainer.batch=7", *given), tmp_path, reports)
    assert reports[0][1]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_loss_and_gradient_are_those_of_trls_trainer(pairs_of, tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    run = pairs_of("lora=none")
    base, train, _ = parts(run)
    batch = train[:6]
    table = Dataset.from_list([{"chosen_ids": list(p.chosen.ids), "rejected_ids": list(p.rejected.ids)} for p in batch])
    with model.adapted(base, run.lora, run.seed) as tuned:
        args = RewardConfig(output_dir=str(tmp_path), max_length=None, use_cpu=True, bf16=False, report_to="none",
                            gradient_checkpointing=False)  # fmt: skip
        their = RewardTrainer(tuned, args=args, train_dataset=table, processing_class=base.tokenizer)
        head = tuned.get_submodule(base.head[0]).weight
        head.data.normal_(generator=torch.Generator().manual_seed(0))
        ours = reward.nats(tuned, reward.tensors(batch, base.tokenizer.pad_token_id)).mean()
        ours.backward()
        mine = {n: p.grad.clone() for n, p in tuned.named_parameters()}
        tuned.zero_grad()
        theirs = their.compute_loss(tuned, their.data_collator([table[n] for n in range(6)]))
        theirs.backward()
        off = max((mine[n] - p.grad).abs().max() for n, p in tuned.named_parameters())
    assert abs(ours.item() - math.log(2)) > 1e-3
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert off < 1e-5


def test_rewards_are_the_same_alone_and_in_a_batch(pairs_of):
    base, train, _ = parts(pairs_of())
    head = base.model.get_submodule(base.head[0]).weight
    answers = [p.chosen for p in train[:20]]
    try:
        head.data.normal_(generator=torch.Generator().manual_seed(0))
        alone, together = (
            reward.rewards(base.model, base.tokenizer, answers, pairs_of(f"eval.batch={n}").eval, "x") for n in (1, 20)
        )
    finally:
        head.data.zero_()
    assert alone == pytest.approx(together, abs=1e-5)
    assert max(alone) - min(alone) > 0.01


def test_an_answer_is_read_to_its_end_where_the_end_pads_too(pairs_of):
    """As of GPT-2: the token that ends an answer fills rows up; what stands before it is read, whatever the width."""
    base, train, _ = parts(pairs_of())
    pair = train[0].chosen
    end = pair.completion[-1]
    assert reward.read(pair, end) == pair.ids[:-1]
    assert reward.read(pair, pad=0) == pair.ids


def test_it_learns_and_what_is_saved_gives_the_scores_that_were_reported(pairs_of, tmp_path):
    """Answers behind an empty phrase and answers twice are longer: even random weights tell them apart."""
    from peft import PeftModel

    run = pairs_of("data.rows=400", "data.valid=60", "trainer.steps=60", "trainer.batch=16", "lora.r=8",
                   "objectives=[valid/accuracy]", "trainer.report_steps=0")  # fmt: skip
    experiment.check(run, None)
    experiment.prepare(run)
    scores = experiment.execute(run, tmp_path / "a", "x")
    assert scores["valid/accuracy"] > 0.6
    assert scores["valid/loss"] < math.log(2)
    assert scores["tfidf/accuracy"] > 0.6
    told = read_json(tmp_path / "a" / "trial.json")["plan"]
    assert all(told[key]["planned"] == told[key]["real"] for key in ("trainable", "total", "steps", "flops"))
    fresh = model._load(run.model, run.quant, "fresh", 1)
    loaded = PeftModel.from_pretrained(fresh.model, tmp_path / "a" / "adapter")
    again = reward.score(loaded, fresh.tokenizer, parts(run)[2], run.eval, "again").scores
    assert again == {k.removeprefix("valid/"): v for k, v in scores.items() if k.startswith("valid/")}


def test_head_of_an_encoder_with_a_hidden_layer_learns(pairs_of, tmp_path):
    """RoBERTa's head is a module of its own, which peft wraps unasked."""
    run = pairs_of("model=hub", f"model.path={encoders.save('roberta', tmp_path / 'roberta')}", "trainer.steps=20",
                   "trainer.batch=16", "data.rows=200", "data.valid=40", "trainer.report_steps=0")  # fmt: skip
    scores = experiment.execute(run, tmp_path / "a", "x")
    assert scores["train/loss"] < math.log(2) - 0.02
    assert scores["valid/loss"] < math.log(2)


def test_baseline_has_a_reward_for_each_answer(pairs_of):
    """Where the better answer is always the longer one, length alone tells."""
    from dataclasses import replace

    _, train, valid = parts(pairs_of())
    longer = [
        replace(p, row=replace(p.row, completion="ja " * 9, rejected="ja " * (n % 8 + 1))) for n, p in enumerate(train)
    ]
    told = reward.baseline(longer, longer[:20])
    assert told.scores["accuracy"] == 1.0
    assert told.table[0]["reward_chosen"] == told.table[8]["reward_chosen"]
    flipped = [replace(p, row=replace(p.row, completion=p.row.rejected, rejected=p.row.completion)) for p in longer]
    assert reward.baseline(longer, flipped[:20]).scores["accuracy"] == 0.0


def test_baseline_is_scored_again_where_another_tokenizer_leaves_other_rows(pairs_of, monkeypatch):
    monkeypatch.setattr(experiment, "_tfidf", {})
    asked = []
    monkeypatch.setattr(reward, "baseline", lambda train, valid: asked.append((len(train), len(valid))) or asked[-1])
    told = []
    for name in ("tiny", "embedded", "tiny"):
        run = pairs_of("data.long=drop", "data.max_length=100", "data.allow=[lost]", "data.template=plain",
                       f"model={name}")  # fmt: skip
        task = experiment.rewarding(run, data.load(run.data))
        assert task.before(None) == (len(task.train), len(task.valid))  # type: ignore
        told.append(len(task.train))
    assert told[0] == told[2] < told[1]
    assert len(asked) == 2
