"""Runs that start from runs: what a trained run answers, its successor begins with."""

import pytest
import torch

from ftexp import data, evaluate, experiment, handed, model, trained
from ftexp.config import Kind, Model, Quant
from ftexp.errors import ConfigError, MachineError
from ftexp.files import read_json
from ftexp.model import architecture, sizes


def start(path, **more):
    return Model(Kind.run, path, **more)


def test_a_run_begins_where_the_other_ended(stages, tiny):
    """Scores of the base of the second run are those of the first."""
    for name in ("sft", "whole"):
        before = read_json(stages / name / "trial.json")["scores"]
        run = tiny("model=run", f"model.path={name}", "trainer.steps=1", "trainer.report_steps=0")
        scores = experiment.execute(run, stages / f"{name}_2", "x")
        assert scores["base/loss"] == pytest.approx(before["valid/loss"], abs=1e-5)
        assert before["base/loss"] - before["valid/loss"] > 0.01
        kept = handed.find(f"{name}_2")
        assert kept.trial["facts"]["start"] == handed.identity(handed.find(name))


def test_a_run_of_a_run_of_a_run(stages, tiny):
    name = "sft"
    for n in range(2):
        run = tiny("model=run", f"model.path={name}", "trainer.steps=2", "trainer.report_steps=0")
        scores = experiment.execute(run, stages / f"next{n}", "x")
        assert scores["base/loss"] == pytest.approx(
            read_json(stages / name / "trial.json")["scores"]["valid/loss"], abs=1e-5
        )
        name = f"next{n}"
    assert model.rooted(start("next1")).kind is Kind.tiny
    with trained.load(handed.find("next1")) as loaded:
        rows = experiment.tokenised(run, data.load(run.data))[1]
        table = evaluate.held_out(loaded.tuned, loaded.tokenizer, rows, run.eval, "x")
    nats = sum(e["nats"] for e in table) / sum(e["tokens"] for e in table)
    assert nats == pytest.approx(scores["valid/loss"], abs=1e-9)


@pytest.mark.parametrize("name", ["sft", "whole"])
def test_a_reward_model_may_start_from_a_run_that_writes(stages, tiny, name):
    run = tiny("model=run", f"model.path={name}", "data=preference", "data.valid=12", "data.max_length=256",
               "trainer=reward", "trainer.steps=1", "trainer.report_steps=0")  # fmt: skip
    base = model.load(run.model, run.quant, 1)
    assert base.head == ("score",)
    writer = model.fresh(run.model, run.quant).model.state_dict()
    body = {k: v for k, v in base.model.state_dict().items() if k.startswith("model.")}
    assert len(body) > 10
    assert all(torch.equal(v, writer[k]) for k, v in body.items())
    assert experiment.execute(run, stages / "r", "x")["valid/loss"] > 0


def test_a_run_that_was_trained_again_is_not_taken_from_memory(stages, tiny):
    run = tiny("model=run", "model.path=sft")
    first = model.load(run.model, run.quant)
    assert model.load(run.model, run.quant) is first
    import shutil

    shutil.rmtree(stages / "sft")
    shutil.copytree(stages / "whole", stages / "sft")
    assert model.load(run.model, run.quant).weights != first.weights


def test_what_only_files_can_be_is_refused(stages, tiny):
    with pytest.raises(ConfigError, match=r"quant\.kind=nf4 needs stored weights: .*got run; ftexp export sft"):
        experiment.check(tiny("model=run", "model.path=sft", "quant=nf4"), None)
    with pytest.raises(ConfigError, match=r"quant\.kind must be none with model=run"):
        model.load(start("sft"), Quant(kind=type(Quant().kind).nf4))
    with pytest.raises(MachineError, match=r"model\.path=none must be a run that is complete here"):
        model.tokenizer(start("none"))


def test_shape_and_tokenizer_are_those_of_the_root(stages):
    assert architecture.described(start("sft")).to_dict() == architecture.described(Model(Kind.tiny)).to_dict()
    assert architecture.readable(start("whole"))
    assert model.positions(start("sft")) == model.positions(start("whole")) == 512
    assert model.tokenizer(start("whole")).get_vocab() == model.tokenizer(Model(Kind.tiny)).get_vocab()


@pytest.mark.parametrize(
    ("given", "parted"),
    [(["lora.targets=[embed_tokens,q_proj]"], True), (["lora.targets=[lm_head,q_proj]"], True),
     (["+lora.extra.modules_to_save=[lm_head]"], True), (["+lora.extra.modules_to_save=[embed_tokens]"], True),
     (["+lora.extra.trainable_token_indices=[5,70]"], False), ([], False)],
)  # fmt: skip
def test_plan_of_a_run_whose_start_has_parted_its_ends_is_exact(tiny, tmp_path, monkeypatch, given, parted):
    """Merged, the embedding and the head of a tied base are two weights; a run of such a run has them too."""
    monkeypatch.chdir(tmp_path)
    short = ("trainer.steps=1", "eval=loss", "trainer.report_steps=0", "data.rows=40", "data.valid=6")
    told, tied = [], sizes.outline(Model(Kind.tiny), Quant(), tiny().lora, "float32", "eager").total
    monkeypatch.setattr(experiment, "warn", told.append)
    experiment.execute(tiny(*short, *given), tmp_path / "outputs/runs/a", "a")
    for name, below in (("b", "a"), ("c", "b")):
        run = tiny(*short, "model=run", f"model.path={below}")
        experiment.execute(run, tmp_path / "outputs/runs" / name, name)
        total = sizes.outline(run.model, run.quant, run.lora, "float32", "eager").total
        assert (total > tied) == parted
    assert told == []
