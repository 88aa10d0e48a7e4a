"""Mixtures of experts: what TRL sets on their config goes off again, and their routers are balanced as by TRL alone."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ftexp import data, evaluate, experiment, model
from ftexp.model import tiny as tiny_model
from ftexp.train import checkpoints, sft
from ftexp.train.control import Control


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A folder with a random Mixtral of two layers and four experts, and the tokenizer of the tiny model."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder, text = tmp_path_factory.mktemp("experts"), cast(Any, tiny_model.tokenizer())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MixtralForCausalLM(MixtralConfig(
            vocab_size=len(text), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=2048,
            pad_token_id=text.pad_token_id, eos_token_id=text.eos_token_id, sliding_window=None,
        ))  # fmt: skip
    made.save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


@pytest.fixture
def mixed(experts, tiny):
    """Return a function that composes a run of the random Mixtral."""
    given = ("model=hub", f"model.path={experts}", "trainer.batch=4", "lora.targets=[q_proj,v_proj,o_proj]")
    return lambda *more: tiny(*given, *more)


def trained(run, tmp_path: Path, between=lambda base: None):
    """Train; returns the adapter's weights, the losses that were reported, and the base."""
    train, valid = experiment.tokenised(run, data.load(run.data))
    base = model.load(run.model, run.quant)
    losses = []

    def told(values, step):
        losses.extend([values["train/loss"]] if "train/loss" in values else [])
        between(base)

    with model.adapted(base, run.lora, run.seed) as tuned:
        sft.train(run, base, tuned, train, valid, checkpoints.store(tmp_path / "t", {}), told, Control())
        return {k: v.clone() for k, v in tuned.state_dict().items() if "lora_" in k}, losses, base


def test_a_second_trial_finds_the_experts_as_the_first_one_did(mixed, tmp_path, monkeypatch):
    """TRL has the router told in the config, and its own loss lets transformers put hooks on: both in one process."""
    from trl import SFTTrainer

    real, run = sft._trainer, mixed()

    def plain(*args):
        trainer = real(*args)
        trainer.compute_loss = SFTTrainer.compute_loss.__get__(trainer)  # as on a GPU
        return trainer

    monkeypatch.setattr(sft, "_trainer", plain)
    base = model.load(run.model, run.quant)
    before = base.model.config.to_dict()
    during = []
    one, first, _ = trained(run, tmp_path, lambda b: during.append(b.model.config.output_router_logits))
    assert {k: v for k, v in base.model.config.to_dict().items() if k != "use_cache"} == {
        k: v for k, v in before.items() if k != "use_cache"
    }
    assert during and not any(during)  # what is scored in training asks no router
    trained(mixed("+trainer.extra.router_aux_loss_coef=7.0"), tmp_path)
    assert base.model.config.router_aux_loss_coef == before["router_aux_loss_coef"]
    two, second, again = trained(run, tmp_path)
    assert again is base
    assert first == second
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_base_whose_config_asks_its_routers_is_scored_as_another(mixed, experts, tmp_path):
    """transformers fails to compute their loss where a prefix of the rows, or all that was written, is in a cache."""
    import json
    import shutil

    shutil.copytree(experts, tmp_path / "asked")
    told = json.loads((tmp_path / "asked/config.json").read_text())
    (tmp_path / "asked/config.json").write_text(json.dumps(told | {"output_router_logits": True}))
    run, asked = mixed(), mixed(f"model.path={tmp_path / 'asked'}")
    valid = experiment.tokenised(run, data.load(run.data))[1]
    scores = []
    for one in (run, asked):
        base = model.load(one.model, one.quant)
        scores.append(evaluate.score(base.model, base.tokenizer, valid, one.eval, "t", evaluate.Seen()).scores)
    assert scores[0] == scores[1]


def test_two_runs_of_experts_in_one_process_score_alike(mixed, tmp_path):
    run = mixed("data.valid=4")
    scores = [experiment.execute(run, tmp_path / name, name) for name in "ab"]
    assert {k: v for k, v in scores[0].items() if not k.startswith("cost/")} == {
        k: v for k, v in scores[1].items() if not k.startswith("cost/")
    }


ONE_STEP = ("trainer.steps=1", "trainer.optimizer=sgd", "trainer.lr=1", "trainer.warmup=0", "trainer.max_grad_norm=0",
            "trainer.scheduler=constant", "trainer.batch=4", "+trainer.extra.router_aux_loss_coef=1.5")  # fmt: skip
"""A step of plain SGD: what it changes is the gradient."""


def told_by_trl(run, tmp_path):
    """Train one step with TRL alone, its trainer and its loss; returns the adapter's weights and the loss it tells."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    train, _ = experiment.tokenised(run, data.load(run.data))
    base, asked = model.load(run.model, run.quant), run.trainer
    with model.adapted(base, run.lora, run.seed) as tuned, sft.routed_as_before(base.model):
        made = SFTTrainer(
            tuned,
            SFTConfig(
                str(tmp_path / "trl"), max_steps=1, learning_rate=1.0, per_device_train_batch_size=asked.batch,
                gradient_accumulation_steps=asked.accumulation, lr_scheduler_type="constant", max_grad_norm=0,
                optim="sgd", seed=run.seed, use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None,
                logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **asked.extra,
            ),
            train_dataset=Dataset.from_list([{"input_ids": list(e.ids), "labels": list(e.labels)} for e in train]),
            processing_class=base.tokenizer,
        )  # fmt: skip
        made.train()
        loss = next(entry["loss"] for entry in made.state.log_history if "loss" in entry)
        return {k: v.clone() for k, v in tuned.state_dict().items() if "lora_" in k}, loss


def furthest(one, other):
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max()) for k in one)


@pytest.mark.parametrize("shape", [("trainer.batch=4",), ("trainer.batch=2", "trainer.accumulation=2")])
def test_routers_are_balanced_as_by_trl_alone(mixed, tmp_path, monkeypatch, shape):
    """Ours, and TRL's as on a GPU; both tell the token mean, TRL alone adds the loss of the routers to it."""
    from ftexp.train import spread

    run = mixed(*ONE_STEP, *shape)
    theirs, summed = told_by_trl(run, tmp_path)
    ours, losses, _ = trained(run, tmp_path)
    without, plain, _ = trained(mixed(*ONE_STEP, *shape, "trainer.extra.router_aux_loss_coef=0.0"), tmp_path)
    assert furthest(ours, theirs) < 1e-6
    assert furthest(ours, without) > 1e-4
    assert losses == plain
    assert summed - losses[0] == pytest.approx(1.5 * 2, rel=0.1)  # 2 experts of 4 a token: 4 * sum(1/2 * 1/4) = 2

    class Elsewhere:
        """Labels that say that they are on a GPU."""

        def __init__(self, labels):
            self.labels, self.device = labels, torch.device("cuda")

    real, blank = sft._trainer, spread.is_blank
    monkeypatch.setattr(spread, "is_blank", lambda labels: blank(getattr(labels, "labels", labels)))

    def on_a_gpu(*args):
        trainer = real(*args)
        honest, its = trainer.compute_loss, type(trainer).__mro__[1].compute_loss

        def moved(model, inputs, return_outputs=False, num_items_in_batch=None):
            return honest(model, inputs | {"labels": Elsewhere(inputs["labels"])}, return_outputs, num_items_in_batch)

        def back(self, model, inputs, *more):
            return its(self, model, inputs | {"labels": inputs["labels"].labels}, *more)

        trainer.compute_loss = moved
        monkeypatch.setattr(type(trainer).__mro__[1], "compute_loss", back)
        return trainer

    monkeypatch.setattr(sft, "_trainer", on_a_gpu)
    monkeypatch.setattr(sft, "token_mean", None)
    there, told, _ = trained(run, tmp_path)
    assert furthest(there, theirs) < 1e-6
    assert told == pytest.approx(losses, rel=1e-6)


def test_loss_of_routers_is_no_part_of_any_score(mixed, tmp_path):
    """With a step too small to learn, held-out losses are those of the base, however much the routers count."""
    given = ("trainer.lr=1e-12", "trainer.steps=2", "trainer.report_steps=1", "eval=loss")
    small, large = (
        experiment.execute(mixed(*given, f"+trainer.extra.router_aux_loss_coef={n}"), tmp_path / n, n)
        for n in ("0.0", "9.0")
    )
    assert small["valid/loss"] == pytest.approx(small["base/loss"], abs=1e-6)
    assert large["valid/loss"] == pytest.approx(large["base/loss"], abs=1e-6)
    assert large["train/loss"] == pytest.approx(small["train/loss"], abs=1e-6)
