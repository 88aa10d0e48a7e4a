"""A base that answers by layers of its own, against peft and transformers."""

import copy

import pytest
import torch
from members import SMALL, adapters, made, rows
from transformers import GenerationConfig

from ftexp import data, evaluate, experiment, model
from ftexp.model import answer, saved

LEFT = [([0, 0, 0, 5, 9], [0, 0, 0, 1, 1]), ([3, 8, 1, 2, 7], [1] * 5), ([0, 4, 4, 6, 2], [0, 1, 1, 1, 1])]
"""Prompts of unequal length, padded on the left, and their masks."""


def built(name, dtype=torch.float32, **more):
    base = made(name, dtype, **more)
    base.set_attn_implementation("eager")
    return base


def logits(scored, ids, mask):
    with torch.no_grad():
        return scored(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_logits_and_completions_are_those_of_peft(name):
    """Rows padded on the right, then prompts padded on the left with their cache; sliding windows and grouped heads."""
    base = built(name)
    tuned = adapters(base)[0][1]
    ids, mask = (torch.tensor(part) for part in zip(*LEFT, strict=True))
    how = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=96)
    flipped = (
        logits(tuned, ids.flip(1), mask.flip(1)),
        tuned.generate(input_ids=ids, attention_mask=mask, generation_config=how),
    )
    bare = tuned.get_base_model()
    assert answer.fits(bare)
    layers = list(bare.model.layers)
    with answer.answering(bare, answer.adapter(tuned, torch.float32)):
        assert answer.fits(bare)
        mine = (
            logits(bare, ids.flip(1), mask.flip(1)),
            bare.generate(input_ids=ids, attention_mask=mask, generation_config=how),
        )
    assert list(bare.model.layers) == layers
    kept = mask.flip(1).bool()
    torch.testing.assert_close(mine[0][kept], flipped[0][kept], rtol=1e-4, atol=1e-5)
    assert torch.equal(mine[1], flipped[1])
    assert not torch.allclose(logits(base, ids.flip(1), mask.flip(1))[kept], flipped[0][kept], atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_by_itself_rounds_as_transformers_does(dtype):
    base = built("Llama", dtype, num_key_value_heads=SMALL["num_attention_heads"])
    ids = torch.tensor([rows(3)[2][0]])
    mask = torch.ones_like(ids)
    own = logits(base, ids, mask)
    with answer.answering(base, answer.NOTHING):
        assert torch.equal(logits(base, ids, mask), own)


def test_a_failure_leaves_the_layers_as_they_were():
    base = built("Llama")
    layers = list(base.model.layers)
    with pytest.raises(KeyError), answer.answering(base, answer.NOTHING):
        raise KeyError
    assert list(base.model.layers) == layers


def test_sabotage_an_adapter_of_other_scale_is_seen():
    base = built("Llama")
    tuned = adapters(base)[0][1]
    ids = torch.tensor([[3, 8, 1, 2, 7]])
    theirs = answer.adapter(tuned, torch.float32)
    theirs.scales = {name: 2 * scale for name, scale in theirs.scales.items()}
    bare = tuned.get_base_model()
    told = logits(tuned, ids, torch.ones_like(ids))
    with answer.answering(bare, theirs):
        assert not torch.allclose(logits(bare, ids, torch.ones_like(ids)), told, atol=1e-3)


def test_a_run_of_the_packed_engine_is_scored_as_its_saved_adapter_is(tiny, tmp_path, monkeypatch):
    """Against peft with the files of the run; and the base's scores are its own, though layers stand in at both."""
    run = tiny("trainer.engine=packed", "trainer.steps=6", "trainer.lr=2e-2", "eval.generate=true",
               "eval.forgetting=python-docs", "model.dtype=float32")  # fmt: skip
    entered = []
    real = answer.answering
    monkeypatch.setattr(answer, "answering", lambda *given: entered.append(given[1]) or real(*given))
    scores = experiment.execute(run, tmp_path / "run", "t")
    assert entered[0] is answer.NOTHING
    assert len(entered) == 2
    base = model.load(run.model, run.quant)
    _, valid = experiment.tokenised(run, data.load(run.data))
    own = evaluate.score(base.model, base.tokenizer, valid, run.eval, "base").scores
    with saved.restored(base, tmp_path / "run" / "adapter") as tuned:
        told = evaluate.score(tuned, base.tokenizer, valid, run.eval, "valid").scores
        text = experiment.general_text(run, base.tokenizer)
        after = experiment.general_loss(run, base, tuned, text, "text")
    assert scores["valid/loss"] != pytest.approx(scores["base/loss"], rel=1e-3)
    for name in ("loss", "exact_match", "jaccard", "chrf"):
        assert scores[f"valid/{name}"] == pytest.approx(told[name], rel=1e-5)
        assert scores[f"base/{name}"] == pytest.approx(own[name], rel=1e-5)
    assert scores["forgetting/after"] == pytest.approx(after, rel=1e-5)
    assert scores["forgetting/before"] == pytest.approx(
        experiment.general_loss(run, base, base.model, text, "text"), rel=1e-5
    )


def test_scores_of_a_base_are_kept_apart_by_how_it_answers(tiny, tmp_path, monkeypatch):
    """It rounds otherwise beside the packed engine, so neither takes the other's scores; a second trial takes its own."""
    scored = []
    real = evaluate.held_out
    monkeypatch.setattr(evaluate, "held_out", lambda *given: scored.append(given[-1]) or real(*given))
    monkeypatch.setattr(experiment, "_base_scores", {})
    monkeypatch.setattr(experiment, "_general", {})
    for n, engine in enumerate(("trl", "packed", "packed", "trl")):
        run = tiny(f"trainer.engine={engine}", "trainer.steps=1", "eval.forgetting=python-docs", f"lora.r={2 + n}")
        experiment.execute(run, tmp_path / str(n), "t")
    assert scored.count("base") == 2
    assert scored.count("base general text") == 2


def test_who_does_not_fit():
    assert not answer.fits(built("Phi3"))
    sdpa = built("Llama")
    sdpa.set_attn_implementation("sdpa")
    assert not answer.fits(sdpa)
    packed = built("Llama")
    packed.quantization_method = "bitsandbytes"
    assert not answer.fits(packed)
    assert not answer.fits(copy.deepcopy(built("Llama")).to("meta"))
