"""LoftQ: what 4 bits lost and an adapter of so many ranks gives back, layer by layer."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ftexp import experiment, fidelity, model, reproduce
from ftexp.config import Format, Kind, Lora, Model, Quant, Variant
from ftexp.errors import MachineError, Preempted, Unfaithful
from ftexp.model import loftq
from ftexp.runs import find
from ftexp.train.control import Control

NF4 = Quant(Format.nf4)
SMALL = {
    "llama": {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"model_type": "gpt2", "vocab_size": 300, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4},
}  # fmt: skip


def stored(folder: Path, name: str = "llama", shards: str = "1GB") -> Model:
    """Save a random model with the tokenizer of the tiny one."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL[name]))
    made.save_pretrained(folder, max_shard_size=shards)
    model.tiny.tokenizer().save_pretrained(folder)
    return Model(kind=Kind.hub, path=str(folder))


def weights(folder):
    """Read all weights of a folder by their names."""
    return {name: w for file in folder.glob("*.safetensors") for name, w in load_file(file).items()}


def errors(asked: Model, lora: Lora, file: dict[str, torch.Tensor], bare: str = ""):
    """Return for each layer what 4 bits lost, what is still missing with the adapter, and the least a rank can leave.

    The last comes from a full decomposition in float64.
    """
    base = model.load(asked, NF4)
    told = {}
    with model.adapted(base, lora, 0) as tuned:
        for name, layer in loftq._packed(tuned):
            weight = file[f"{name.removeprefix(bare)}.weight"].double()
            weight = weight.T if "c_" in name else weight
            from bitsandbytes.functional import dequantize_4bit

            packed = layer.get_base_layer().weight
            kept = dequantize_4bit(packed.data, packed.quant_state).double()
            update = layer.get_delta_weight("default").double()
            least = torch.linalg.svdvals(weight - kept)[lora.r :].norm()
            told[name] = float((weight - kept).norm()), float((weight - kept - update).norm()), float(least)
    return told


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("name", "layers"), [("llama", 14), ("gpt2", 8)])
def test_every_layer_starts_as_near_as_its_rank_allows(tmp_path, name, layers, double):
    asked = stored(tmp_path, name)
    base = model.load(asked, Quant(Format.nf4, double))
    before = model.fingerprint(base.model)
    found = errors(asked, Lora(8, 16, variant=Variant.loftq), weights(tmp_path), "")
    assert len(found) == layers
    for lost, missing, least in found.values():
        assert missing == pytest.approx(least, rel=1e-4)
        assert missing < 0.9 * lost
    assert model.fingerprint(base.model) == before
    assert errors(asked, Lora(8, 16), weights(tmp_path)).popitem()[1][0] == pytest.approx(lost)  # LoRA starts at Q


def test_whatever_the_scale(tmp_path):
    """alpha / r multiplies B A; the start is the same for every alpha."""
    asked = stored(tmp_path)
    low, high = (errors(asked, Lora(4, alpha, variant=Variant.loftq), weights(tmp_path)) for alpha in (1, 64))
    assert all(low[name][1] == pytest.approx(high[name][1], rel=1e-4) for name in low)


def test_sabotage_a_start_without_the_scale_is_further_away(tmp_path, monkeypatch):
    """As peft's own replacement does."""
    asked, halves = stored(tmp_path), loftq.halves
    monkeypatch.setattr(loftq, "halves", lambda m, rank: tuple(4 * half for half in halves(m, rank)))
    for lost, missing, _ in errors(asked, Lora(4, 64, variant=Variant.loftq), weights(tmp_path)).values():
        assert missing > lost


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20)])
def test_halves_are_the_nearest_matrix_of_their_rank(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    b, a = loftq.halves(matrix, 5)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert torch.allclose((b @ a).double(), u[:, :5] * s[:5] @ v[:5], atol=1e-4)
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-4)  # both halves hold the root


def test_nothing_lost_starts_at_nothing():
    b, a = loftq.halves(torch.zeros(6, 9), 2)
    assert not b.any() or not a.any()
    assert b.isfinite().all()
    assert a.isfinite().all()


def test_weights_are_read_from_shards_and_without_the_prefix_of_the_model(tmp_path):
    asked = stored(tmp_path, "llama", "100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert all(m < 0.9 * q for q, m, _ in errors(asked, Lora(8, 16, variant=Variant.loftq), weights(tmp_path)).values())
    other = tmp_path / "gpt2"
    other.mkdir()
    asked = stored(other, "gpt2")
    bare = {name.removeprefix("transformer."): w for name, w in weights(other).items()}
    save_file(bare, other / "model.safetensors", metadata={"format": "pt"})
    found = errors(asked, Lora(8, 16, variant=Variant.loftq), bare, "transformer.")
    assert all(missing < 0.9 * lost for lost, missing, _ in found.values())


def test_a_weight_that_is_in_no_file_is_named(tmp_path):
    read = loftq.reader(stored(tmp_path).path, None, "model")
    assert read("model.norm.weight").shape == (64,)
    with pytest.raises(MachineError, match=r"lora=loftq needs the weights as they were .* has no model\.nrom\.weight"):
        read("model.nrom.weight")


@pytest.mark.slow
def test_every_layer_of_the_embedded_model_starts_nearer():
    base, file = model.load(Model(), NF4), weights(model.embedded.folder())
    with model.adapted(base, Lora(8, 16, variant=Variant.loftq), 0) as tuned:
        shares = [float((lost - layer.get_delta_weight("default")).norm() / lost.norm())
                  for name, layer in loftq._packed(tuned) for lost in (loftq.residual(layer, file[f"{name}.weight"]),)]  # fmt: skip
    assert len(shares) == 210
    assert max(shares) < 0.99
    assert model.fingerprint(base.model) == base.weights


@pytest.mark.hub
def test_weights_of_a_hub_id_are_read_one_at_a_time(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    read = loftq.reader("HuggingFaceTB/SmolLM2-135M-Instruct", None, "model")
    assert read("model.layers.0.self_attn.q_proj.weight").shape == (576, 576)


GIVEN = ("quant=nf4", "lora=loftq", "lora.r=4", "eval.generate=false", "trainer.neftune=5", "data.max_length=256")


@pytest.fixture
def small(tiny, tmp_path):
    """Return a function that composes a run of a stored model of two layers in 4 bits."""
    asked = stored(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"vocab_size": 300}
    assert config["hidden_size"] == 64
    return lambda *given: tiny("model=hub", f"model.path={asked.path}", *GIVEN, *given)


def test_killed_training_ends_with_the_same_bits_and_can_be_reproduced(small, tmp_path):
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
    from test_answers import After

    run = small()
    experiment.execute(run, tmp_path / "calm", "x")
    with pytest.raises(Preempted):
        experiment.execute(run, tmp_path / "left", "x", control=Control(leave=After()))
    experiment.execute(run, tmp_path / "left", "x")
    assert find(str(tmp_path / "calm")).weights() == find(str(tmp_path / "left")).weights() is not None
    assert reproduce.reproduce(find(str(tmp_path / "calm"))).verdict == "bit-exact"


def test_a_merged_model_answers_as_base_and_adapter(small, tmp_path):
    """The adapter belongs to the packed weights; on the stored ones it would add what was lost a second time."""
    from ftexp import export

    experiment.execute(small("lora.r=32", "trainer.lr=1e-4"), tmp_path / "run", "x")
    kept = find(str(tmp_path / "run"))
    told = export.export(kept, tmp_path / "merged", "merged")
    assert told.fidelity is not None
    assert told.fidelity.moved < 1e-4
    assert told.fidelity.limit == fidelity.LIMITS["float32"]


def test_sabotage_an_adapter_added_to_the_stored_weights_is_another_model(small, tmp_path, monkeypatch):
    from ftexp import export
    from ftexp.model import saved

    experiment.execute(small("lora.r=32", "trainer.lr=1e-4"), tmp_path / "run", "x")
    honest = saved.merged
    monkeypatch.setattr(saved, "merged", lambda model, folder, labels, packed: honest(model, folder, labels))
    with pytest.raises(Unfaithful):
        export.export(find(str(tmp_path / "run")), tmp_path / "merged", "merged")


def test_an_adapter_on_four_bits_trains_in_float32_and_not_as_trl_has_it(small, monkeypatch, tmp_path):
    from ftexp.train import sft

    formats, real = [], sft.check_weights

    def seen(tuned, steps):
        formats.append({p.dtype for p in tuned.parameters() if p.requires_grad})
        real(tuned, steps)

    monkeypatch.setattr(sft, "check_weights", seen)
    experiment.execute(small(), tmp_path / "ours", "x")
    monkeypatch.setattr(sft, "as_they_are", lambda _: nullcontext())
    experiment.execute(small(), tmp_path / "theirs", "x")
    assert formats == [{torch.float32}, {torch.bfloat16}]
