"""The traced peak against what PyTorch's CPU allocator hands out in the same step."""

import gc

import pytest
import torch

from ftexp import model
from ftexp.config import Attention, Dtype, Kind, Lora, Model, Quant, Variant
from ftexp.model import activations, sizes
from ftexp.train.sft import token_mean


def allocated(asked: Model, lora: Lora, rows: int, length: int, supervised: int, checkpointing: bool) -> int:
    """Peak of the allocator over a real step with padding, gradients there already: the profiler's own record."""
    base = model.load(asked, Quant())
    with model.adapted(base, lora, 0) as tuned:
        tuned.train()
        if checkpointing:
            tuned.gradient_checkpointing_enable({"use_reentrant": False})
        ids, mask = torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)
        mask[0, length // 2 :] = 0
        labels = torch.full_like(ids, -100)
        spots = torch.randperm(rows * (length - 1))[:supervised]
        labels[spots // (length - 1), 1 + spots % (length - 1)] = 1
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        token_mean(tuned, given, supervised).backward()
        gc.collect()
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            token_mean(tuned, given, supervised).backward()
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak


def peak(*given, **named):
    return activations.trace(*given, **named).max()


def both(kind, lora, rows, length, supervised, attention, checkpointing=False, dtype=Dtype.float32):
    told = sizes.outline(Model(kind=kind), Quant(), lora, dtype.value, attention)
    planned = peak(told.model, rows, length, supervised, attention, checkpointing, head=False)
    asked = Model(kind=kind, dtype=dtype, attention=Attention(attention))
    return planned, allocated(asked, lora, rows, length, supervised, checkpointing)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("lora", "rows", "length", "supervised", "checkpointing"),
    [(Lora(), 8, 64, 150, False), (Lora(64), 2, 32, 20, False), (Lora(), 4, 256, 500, False),
     (Lora(), 4, 128, 100, True), (Lora(dropout=0.1), 4, 128, 100, False),
     (Lora(variant=Variant.dora), 4, 128, 100, False)],
)  # fmt: skip
def test_peak_is_that_of_the_allocator(lora, rows, length, supervised, checkpointing, attention):
    planned, real = both(Kind.tiny, lora, rows, length, supervised, attention, checkpointing)
    assert planned == pytest.approx(real, rel=activations.ERROR)


def test_peak_in_16_bits():
    planned, real = both(Kind.tiny, Lora(), 4, 128, 100, "eager", dtype=Dtype.bfloat16)
    assert planned == pytest.approx(real, rel=activations.ERROR)


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "checkpointing"), [("eager", False), ("sdpa", False), ("eager", True)])
def test_peak_of_the_embedded_model(attention, checkpointing):
    planned, real = both(Kind.embedded, Lora(), 4, 96, 100, attention, checkpointing)
    assert planned == pytest.approx(real, rel=activations.ERROR)


def test_attention_that_is_not_fused_would_be_seen(monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(activations, "_fused", nullcontext)
    planned, real = both(Kind.tiny, Lora(), 4, 256, 500, "sdpa")
    assert planned > 1.5 * real


def test_a_trace_leaves_no_trace():
    told = sizes.outline(Model(kind=Kind.tiny), Quant(), Lora(), "float32", "eager")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = peak(told.model, 4, 64, 30, "eager", False, head=False)
    checkpointed = peak(told.model, 4, 64, 30, "eager", True, head=False)
    assert peak(told.model, 4, 64, 30, "eager", False, head=False) == first > checkpointed
    assert torch.rand(1) == expected


@pytest.mark.parametrize("kind", ["embedded", "mistral", "phi3", "gpt2", "qwen"])
def test_presets_can_be_traced(kind):
    paths = {"mistral": "mistralai/Mistral-7B-v0.1", "phi3": "microsoft/Phi-3-mini-4k-instruct",
             "gpt2": "openai-community/gpt2", "qwen": "Qwen/Qwen2.5-0.5B"}  # fmt: skip
    asked = Model(kind=Kind.hub, path=paths[kind]) if kind in paths else Model()
    told = sizes.outline(asked, Quant(), Lora(), "bfloat16", "sdpa")
    small, large = (peak(told.model, rows, 64, 30, "sdpa", False, head=False) for rows in (1, 2))
    assert 1.5 * small < large < 2 * small + 30 * 200_000 * 8


def test_encoders_can_be_traced():
    for path in ("distilbert/distilbert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2"):
        for attention in ("eager", "sdpa"):
            told = sizes.outline(Model(kind=Kind.hub, path=path), Quant(), Lora(), "float32", attention, labels=4)
            assert peak(told.model, 2, 64, 0, attention, False, head=True) > 1e6


def test_a_head_on_a_model_without_a_padding_token_is_traced():
    """SmolLM2's outline names none; transformers refuses more than one row there."""
    told = sizes.outline(Model(), Quant(), Lora(), "float32", "eager", labels=1)
    assert peak(told.model, 2, 16, 1, "eager", False, head=True) > 0
    told.model.config.get_text_config().pad_token_id = None
    with pytest.raises(ValueError, match="no padding token"):
        peak(told.model, 2, 16, 1, "eager", False, head=True)
