"""Counts and bytes on the meta device against real models, saved files, bitsandbytes, and the numbers of the recipes."""

from dataclasses import replace

import encoders
import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ftexp import model
from ftexp.config import Dtype, Format, Kind, Lora, Model, Quant, Variant
from ftexp.errors import ConfigError
from ftexp.model import sizes, tiny

LLAMA = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
SMALL = {
    "llama": {**LLAMA, "model_type": "llama"},
    "tied": {**LLAMA, "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {**LLAMA, "model_type": "mistral"},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "phi3": {**LLAMA, "model_type": "phi3", "pad_token_id": 0},
    "gpt2": {"model_type": "gpt2", "vocab_size": 300, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "distilbert": {"model_type": "distilbert", "vocab_size": 300, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    "bert": {"model_type": "bert", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 2, "num_attention_heads": 4},
    "roberta": {"model_type": "roberta", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128,
                "num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip
HEADS = {"distilbert": ("pre_classifier", "classifier"), "bert": ("classifier",),
         "roberta": ("classifier.dense", "classifier.out_proj")}  # fmt: skip
NF4 = Quant(Format.nf4, double=True)


@pytest.fixture
def stored(tmp_path):
    """Return a function that saves a small random model and returns its config here and the model itself."""

    def make(name: str, labels: int = 0):
        given = SMALL[name] | ({"num_labels": labels} if labels else {})
        config = AutoConfig.for_model(**given)
        kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
        real = kind.from_config(config)
        real.save_pretrained(tmp_path / name)
        return Model(kind=Kind.hub, path=str(tmp_path / name)), real

    return make


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "lora", [Lora(4, 8), Lora(4, 8, variant=Variant.dora), Lora(3, 8, extra={"lora_bias": True})],
    ids=["plain", "dora", "bias"],
)  # fmt: skip
def test_counts_and_files_are_those_of_the_real_model(name, lora, stored, tmp_path):
    labels = 5 if name in HEADS else 0
    asked, real = stored(name, labels)
    head = HEADS.get(name, ())
    footprint = real.get_memory_footprint() - sum(
        b.numel() * 4 for n, b in real.named_buffers() if n.endswith("original_inv_freq")
    )
    plain = sum(p.nbytes for p in real.parameters())
    real.requires_grad_(False)
    tuned = get_peft_model(real, model.adapter(lora, head))
    told = sizes.outline(asked, Quant(), lora, "float32", "eager", labels)
    assert (told.trainable, told.total) == (model.count(tuned).trainable, model.count(tuned).total)
    assert told.packed == told.total
    assert told.footprint == footprint
    assert told.flop_weights == tuned.num_parameters(exclude_embeddings=True)
    assert told.adapted - told.footprint == sum(p.nbytes for p in tuned.parameters()) - plain
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert told.adapter_file == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size


def test_an_adapter_on_the_head_is_saved_with_the_head(stored, tmp_path):
    """What `save_pretrained` writes by default there, and what a run therefore leaves."""
    asked, real = stored("llama")
    lora = Lora(4, 8, targets=["q_proj", "lm_head"])
    get_peft_model(real, model.adapter(lora)).save_pretrained(tmp_path / "adapter")
    told = sizes.outline(asked, Quant(), lora, "float32", "eager")
    assert told.adapter_file == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_packed_counts_and_scales_are_those_of_bitsandbytes(name, double, stored):
    from bitsandbytes.nn import Params4bit

    asked, _ = stored(name)
    quant = Quant(Format.nf4, double)
    kept = AutoModelForCausalLM.from_pretrained(
        asked.path, dtype=torch.bfloat16, device_map={"": "cpu"},
        quantization_config=model._quantization(quant, type("C", (), {"dtype": "bfloat16"})),
    )  # fmt: skip
    weights = [p for p in kept.parameters() if isinstance(p, Params4bit)]
    states = [w.quant_state for w in weights]
    scales = sum(s.absmax.nbytes + (s.state2.absmax.nbytes + s.offset.nbytes if double else 0) for s in states)
    told = sizes.outline(asked, quant, Lora(4, 8), "bfloat16", "eager")
    copies = sum(b.nbytes for n, b in kept.named_buffers() if n.endswith("original_inv_freq"))
    assert told.footprint == kept.get_memory_footprint() - copies
    assert told.weights == kept.get_memory_footprint() + scales
    assert told.packed == sum(p.numel() for p in kept.parameters()) + told.trainable
    assert told.total == model.count(kept).total + told.trainable
    assert told.unpacked == 2 * max(s.shape.numel() for s in states)


def test_int8_weights_are_those_of_bitsandbytes(stored):
    asked, _ = stored("llama")
    quant = Quant(Format.int8)
    kept = AutoModelForCausalLM.from_pretrained(
        asked.path, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=model._quantization(quant, None)
    )
    told = sizes.outline(asked, quant, Lora(4, 8), "bfloat16", "eager")
    copies = sum(b.nbytes for n, b in kept.named_buffers() if n.endswith("original_inv_freq"))
    assert told.footprint == kept.get_memory_footprint() - copies
    assert told.packed == told.total == model.count(kept).total + told.trainable


@pytest.mark.parametrize("quant", [Quant(Format.int8), NF4], ids=["int8", "nf4"])
@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_a_fresh_head_is_planned_as_it_is_kept(kind, quant, tmp_path):
    asked = Model(kind=Kind.hub, path=str(encoders.save(kind, tmp_path)), dtype=Dtype.float32)
    base = model._load(asked, quant, "x", 5)
    told = sizes.outline(asked, quant, Lora(4, 8), "float32", "eager", 5)
    assert told.footprint == base.model.get_memory_footprint()
    with model.adapted(base, Lora(4, 8), 0) as tuned:
        assert (told.trainable, told.total) == (model.count(tuned).trainable, model.count(tuned).total)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHI3 = ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"]


def outlined(name, quant, r, targets, dtype):
    return sizes.outline(Model(kind=Kind.hub, path=name), quant, Lora(r, 16, targets=targets), dtype, "sdpa")


def test_mistral_as_printed_by_its_recipe():
    told = outlined("mistralai/Mistral-7B-Instruct-v0.1", NF4, 8, [*LINEAR, "lm_head"], "float16")
    assert (told.trainable, told.packed) == (21_260_288, 3_773_331_456)
    assert f"{100 * told.trainable / told.packed:.13f}" == "0.5634354746704"
    assert told.total == 7_262_992_384  # what the recipe's count hides


def test_phi3_as_printed_by_its_recipe():
    """16-bit as loaded; the recipe then makes all that is not packed float32 (`prepare_model_for_kbit_training`)."""
    assert outlined("microsoft/Phi-3-mini-4k-instruct", NF4, 8, PHI3, "bfloat16").footprint == 2_206_341_312
    told = outlined("microsoft/Phi-3-mini-4k-instruct", NF4, 8, PHI3, "float32")
    assert told.adapted == 2_651_074_752
    assert (told.trainable, told.total) == (12_582_912, 3_833_662_464)
    assert round(told.adapter_file / 1e6, 1) == 50.4


@pytest.mark.parametrize(("r", "trainable"), [(8, 4_194_304), (64, 33_554_432)])
def test_llama2_as_its_recipes_have_it(r, trainable):
    told = outlined("NousResearch/Llama-2-7b-chat-hf", Quant(Format.nf4), r, ["q_proj", "v_proj"], "float16")
    assert told.trainable == trainable


def test_a_packed_head_would_be_seen(monkeypatch):
    usual = sizes.quantized
    monkeypatch.setattr(
        sizes, "quantized", lambda base, head: usual(base, head) | {"lm_head": base.lm_head.weight.numel()}
    )
    told = outlined("mistralai/Mistral-7B-v0.1", NF4, 8, [*LINEAR, "lm_head"], "float16")
    assert told.packed != 3_773_331_456


def test_what_the_libraries_refuse_is_told(stored):
    with pytest.raises(ConfigError, match=r"lora\.targets: 'q_prj' matches no layer, did you mean q_proj"):
        sizes.outline(Model(kind=Kind.tiny), Quant(), Lora(targets=["q_prj"]), "float32", "eager")
    asked, _ = stored("distilbert", 3)
    with pytest.raises(ConfigError, match="has no text to learn"):
        sizes.outline(asked, Quant(), Lora(), "float32", "eager")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rank_pattern": {"q_porj": 4}}, r"rank_pattern: 'q_porj' matches no layer with an adapter, did you mean q_proj"),
        ({"rank_pattern": {r"layers\.7\..*q_proj": 4}}, r"rank_pattern: .* matches no layer .*; adapters are on down_proj,"),
        ({"rank_pattern": {"lm_head": 4}}, "rank_pattern: 'lm_head' matches no layer with an adapter; adapters are on"),
        ({"alpha_pattern": {"v_proj": 4, "v_prj": 4}}, "alpha_pattern: 'v_prj' matches no .*, did you mean v_proj"),
        ({"exclude_modules": ["q_proj", "k_porj"]}, "exclude_modules: 'k_porj' matches no layer .*, did you mean k_proj"),
        ({"exclude_modules": ["layers.0"]}, "exclude_modules: 'layers.0' matches no layer with weights; there are"),
        ({"exclude_modules": "layers.0.*"}, "exclude_modules: 'layers.0.*' matches no layer"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save: 'lm_haed' matches no module, did you mean lm_head"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names, got 'lm_head'"),
        ({"target_parameters": ["q_proj.weigth"]}, "target_parameters: 'q_proj.weigth' matches no weight; names end with"),
        ({"rank_pattern": {"q_proj(": 4}}, "lora is refused by peft: "),
    ],
)  # fmt: skip
def test_name_in_extra_that_matches_nothing_is_refused(extra, message):
    """peft trains on without a word, so that a sweep would compare equal trials."""
    with pytest.raises(ConfigError, match=message):
        sizes.check_adapter(Model(kind=Kind.tiny), Lora(extra=extra))


@pytest.mark.parametrize(
    "extra",
    [{"rank_pattern": {"q_proj": 4, r"layers\.0\..*_proj": 2}}, {"alpha_pattern": {"model.layers.0.mlp.up_proj": 4}},
     {"exclude_modules": ["q_proj", "lm_head", "layers.0.mlp.up_proj"]}, {"exclude_modules": r".*layers\.0.*"},
     {"modules_to_save": ["lm_head", "norm"]}, {"lora_bias": True}],
    ids=lambda extra: next(iter(extra)),
)  # fmt: skip
def test_name_in_extra_that_matches_is_taken(extra):
    sizes.check_adapter(Model(kind=Kind.tiny), Lora(extra=extra))


def test_number_of_no_layer_is_refused():
    asked = Lora(targets=["q_proj"], extra={"layers_to_transform": [0, 1]})
    sizes.check_adapter(Model(kind=Kind.tiny), asked)
    with pytest.raises(ConfigError, match=r"layers_to_transform: no layer 7 has one of lora\.targets"):
        sizes.check_adapter(Model(kind=Kind.tiny), replace(asked, extra={"layers_to_transform": [0, 7]}))


def test_part_that_is_in_the_name_of_no_weight_is_refused():
    sizes.check_adapter(Model(kind=Kind.tiny), Lora(variant=Variant.none, train=["layers.1"]))
    for labels in (0, 2):
        with pytest.raises(ConfigError, match=r"^lora\.train: 'layres\.1' is in the name of no weight"):
            sizes.check_adapter(Model(kind=Kind.tiny), Lora(variant=Variant.none, train=["layres.1"]), labels)


def test_pattern_of_a_layer_that_gets_no_adapter_is_refused():
    lora = Lora(targets=["v_proj"], extra={"rank_pattern": {"q_proj": 4}})
    with pytest.raises(ConfigError, match=r"'q_proj' matches no layer with an adapter; adapters are on v_proj$"):
        sizes.check_adapter(Model(kind=Kind.tiny), lora)


def test_distilbert_with_its_last_two_layers_thawed_as_its_recipe_counts():
    """Layers 4 and 5 and the head for 42 labels."""
    asked = Model(kind=Kind.hub, path="distilbert/distilbert-base-uncased")
    lora = Lora(variant=Variant.none, train=["layer.4", "layer.5"])
    told = sizes.outline(asked, Quant(), lora, "float32", "eager", 42)
    assert (told.trainable, told.total) == (14_798_634, 66_985_770)
    assert told.adapted == told.footprint
    assert told.changed == told.trained_bytes == 4 * 14_798_634


@pytest.mark.parametrize("name", SMALL)
def test_counts_and_files_without_an_adapter_are_those_of_the_real_model(name, stored, tmp_path):
    labels = 5 if name in HEADS else 0
    asked, real = stored(name, labels)
    told = sizes.outline(asked, Quant(), Lora(variant=Variant.none), "float32", "eager", labels)
    assert told.trainable == told.total == sum(p.numel() for p in real.parameters())
    assert told.changed == told.trained_bytes == sum(p.nbytes for p in real.parameters())
    real.save_pretrained(tmp_path / "again")
    assert told.adapter_file == told.trained_file == (tmp_path / "again" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pissa_is_saved_with_twice_its_rank(name, stored, tmp_path):
    asked, _ = stored(name)
    tiny.tokenizer().save_pretrained(asked.path)
    base = model._load(replace(asked, dtype=Dtype.float32), Quant(), "x")
    lora = Lora(4, 8, variant=Variant.pissa)
    told = sizes.outline(asked, Quant(), lora, "float32", "eager")
    before = {n: p.data_ptr() for n, p in base.model.named_parameters()}
    with model.adapted(base, lora, 0) as tuned:
        model.save(base, tuned, tmp_path)
        moved = [
            p for n, p in tuned.named_parameters() if "base_layer.weight" in n and p.data_ptr() not in before.values()
        ]
        assert told.changed == sum(p.nbytes for p in moved) > 0
        tuned.save_pretrained(tmp_path / "raw")
    assert told.adapter_file == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert told.trained_file == (tmp_path / "raw" / "adapter_model.safetensors").stat().st_size
