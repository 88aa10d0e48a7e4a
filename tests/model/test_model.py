"""Base and adapter: seeds, scaling, targets, and a base that is as before once the adapter is off."""

import dataclasses
import gc
import json
import logging
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from typing import Literal, Optional

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers.utils import is_flash_attn_2_available

from ftexp import model
from ftexp.config import Attention, Dtype, Format, Kind, Lora, Model, Quant, Variant
from ftexp.errors import ConfigError, MachineError
from ftexp.model import compute, tiny

TINY = Model(kind=Kind.tiny)


@pytest.fixture
def base():
    return model.load(TINY, Quant())


def adapter_state(tuned):
    return {k: v.clone() for k, v in tuned.state_dict().items() if "lora_" in k}


@pytest.mark.parametrize("torn", [False, True])
def test_report_of_missing_weights_is_told_unless_it_is_of_a_fresh_head_alone(base, tmp_path, monkeypatch, torn):
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    if torn:
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    told: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("transformers.modeling_utils"), "callHandlers", told.append)
    _, fresh = model.stored(Model(kind=Kind.hub, path=str(tmp_path)), Quant(), base.compute, 3)
    assert "score.weight" in fresh
    assert [" LOAD REPORT" in record.getMessage() for record in told] == [True] * torn


def test_pooler_that_a_masked_language_model_lacks_is_of_the_fresh_head(base, tmp_path, monkeypatch):
    """BERT's classifier reads its pooler, which is trained whole like the head, and of which its checkpoints have none."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=len(base.tokenizer), **sizes)).save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    told: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("transformers.modeling_utils"), "callHandlers", told.append)
    _, fresh = model.stored(Model(kind=Kind.hub, path=str(tmp_path)), Quant(), base.compute, 3)
    assert "bert.pooler.dense.weight" in fresh and "classifier.weight" in fresh
    assert not told


def test_base_is_loaded_once_and_anew_for_another_config(base):
    assert model.load(TINY, Quant()) is base
    other = model.load(Model(kind=Kind.tiny, attention=model.config.Attention.sdpa), Quant())
    assert other is not base


def test_garbage_of_libraries_is_not_looked_through_and_another_base_can_go():
    """The first trial of a base sets libraries aside, a second one the base; where it changes, it can be collected."""
    model.load(Model(kind=Kind.tiny, dtype=Dtype.bfloat16), Quant())  # the first load of a process leaves frames behind
    model.forget()
    first = weakref.ref(model.load(Model(kind=Kind.tiny), Quant()).model)
    libraries = gc.get_freeze_count()
    assert libraries > 100_000
    more = [[] for _ in range(1000)]
    model.load(Model(kind=Kind.tiny), Quant())
    settled = gc.get_freeze_count()
    assert settled > libraries + len(more)
    later = [[] for _ in range(1000)]
    model.load(Model(kind=Kind.tiny), Quant())
    # A third trial sets nothing aside; what was set aside and is no longer used leaves the count.
    assert settled - len(later) < gc.get_freeze_count() <= settled
    model.load(Model(kind=Kind.tiny, dtype=Dtype.bfloat16), Quant())
    gc.collect()
    assert first() is None
    model.thaw()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("trials", [1, 2])
def test_another_base_has_no_look_through_libraries_unless_what_was_set_aside_holds_the_first(trials, held):
    model.load(Model(kind=Kind.tiny, dtype=Dtype.bfloat16), Quant())
    libraries, seen = gc.get_freeze_count(), []
    first = weakref.ref(model.load(Model(kind=Kind.tiny), Quant()).model)
    if held:
        first().itself = [first()]  # goes with a look alone
    for _ in range(trials - 1):
        model.load(Model(kind=Kind.tiny), Quant())

    def look(phase, info):
        seen.append((phase, info["generation"], gc.get_freeze_count()))

    gc.callbacks.append(look)
    try:
        model.load(Model(kind=Kind.tiny, dtype=Dtype.bfloat16), Quant())
    finally:
        gc.callbacks.remove(look)
    whole = [aside for phase, generation, aside in seen if (phase, generation) == ("start", 2)]
    assert whole
    assert any(aside < libraries / 2 for aside in whole) is (held and trials == 2)
    assert first() is None


def test_nothing_is_looked_for_while_libraries_are_imported():
    code = (
        "import gc; from ftexp import model; n = lambda: sum(s['collections'] for s in gc.get_stats()); a = n(); "
        "model.libraries(); print(n() - a, gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    looks, enabled = done.stdout.split()
    assert int(looks) <= 1  # as soon as it may again; else it is hundreds
    assert enabled == "True"


def test_adapter_follows_the_seed_alone(base):
    states = []
    for seed in (0, 0, 1):
        torch.rand(7)  # whatever was drawn before must not matter
        with model.adapted(base, Lora(r=4), seed) as tuned:
            states.append(adapter_state(tuned))
    same = [all(torch.equal(states[0][k], s[k]) for k in s) for s in states]
    assert same == [True, True, False]


@pytest.mark.parametrize("variant", [v for v in Variant if v is not Variant.loftq])  # test_loftq.py
def test_base_is_untouched_after_an_adapter(base, variant):
    ids = torch.arange(3, 20)[None]
    before = base.model(ids).logits.detach()
    with model.adapted(base, Lora(r=4, variant=variant), 0) as tuned:
        for p in tuned.parameters():
            if p.requires_grad:
                p.data += 0.1
        assert not torch.equal(tuned(ids).logits, before)
    assert torch.equal(base.model(ids).logits, before)
    assert model.load(TINY, Quant()) is base
    assert not any(p.requires_grad for p in base.model.parameters())


FLOAT = Model(kind=Kind.tiny, dtype=Dtype.float32)
PISSA = Lora(r=4, alpha=8.0, variant=Variant.pissa)


def moved(tuned):
    """Change what is trained, as an optimizer would."""
    for n, p in enumerate(p for p in tuned.parameters() if p.requires_grad):
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(n)).to(p) * 0.05


def test_pissa_starts_where_the_base_is_and_gives_its_weights_back():
    base = model.load(FLOAT, Quant())
    ids, weights = torch.arange(3, 20)[None], {n: p.clone() for n, p in base.model.named_parameters()}
    places = {n: p.stride() for n, p in base.model.named_parameters()}
    before = base.model(ids).logits.detach()
    with model.adapted(base, PISSA, 0) as tuned:
        assert (tuned(ids).logits - before).abs().max() < 1e-5
        assert all(v.abs().max() > 0 for v in adapter_state(tuned).values())
        with tuned.disable_adapter():
            assert (tuned(ids).logits - before).abs().max() > 1e-3  # the base lost what the adapter has
        moved(tuned)
    assert all(torch.equal(p, weights[n]) and p.stride() == places[n] for n, p in base.model.named_parameters())
    assert model.load(FLOAT, Quant()) is base
    assert not base.start


def test_sabotage_weights_that_are_not_given_back_are_seen(monkeypatch):
    base = model.load(FLOAT, Quant())
    usual = model._with_adapter
    monkeypatch.setattr(model, "_with_adapter", lambda *given: (usual(*given)[0], []))
    with model.adapted(base, PISSA, 0):
        pass
    assert model.load(FLOAT, Quant()) is not base


def loaded(folder, labels=0):
    """Put a saved adapter on a base of its own."""
    fresh = model._load(FLOAT, Quant(), "fresh", labels)
    return PeftModel.from_pretrained(fresh.model, folder / "adapter")


def test_saved_pissa_fits_the_untouched_base(tmp_path):
    """As peft's own conversion does, to the bit; without it the same file is another model."""
    base, ids = model.load(FLOAT, Quant()), torch.arange(3, 20)[None]
    with model.adapted(base, PISSA, 0) as tuned:
        tuned.save_pretrained(tmp_path / "start")
        moved(tuned)
        told = tuned(ids).logits.detach()
        model.save(base, tuned, tmp_path / "ours")
        tuned.save_pretrained(tmp_path / "raw" / "adapter")
        tuned.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    again = loaded(tmp_path / "ours").eval()
    assert again.peft_config["default"].r == 2 * PISSA.r
    assert (again(ids).logits - told).abs().max() < 1e-5
    assert (loaded(tmp_path / "raw").eval()(ids).logits - told).abs().max() > 1e-3
    ours, theirs = (load_file(tmp_path / end / "adapter_model.safetensors") for end in ("ours/adapter", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_saved_pissa_keeps_a_head(tmp_path):
    """peft's conversion keeps the matrices A and B alone."""
    base, ids = model.load(FLOAT, Quant(), 3), torch.arange(3, 20)[None]
    with model.adapted(base, PISSA, 0) as tuned:
        moved(tuned)
        told = tuned(ids).logits.detach()
        model.save(base, tuned, tmp_path)
    assert (loaded(tmp_path, 3).eval()(ids).logits - told).abs().max() < 1e-5
    assert told.abs().max() > 1e-3


NONE = Lora(variant=Variant.none)


def test_whole_model_is_trained_saved_and_put_back(tmp_path):
    base, ids = model.load(FLOAT, Quant()), torch.arange(3, 20)[None]
    with model.adapted(base, NONE, 0) as tuned:
        assert tuned is base.model
        assert model.count(tuned).trainable == model.count(tuned).total
        moved(tuned)
        told = tuned(ids).logits.detach()
        model.save(base, tuned, tmp_path)
    assert model.fingerprint(base.model) == base.weights
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())
    saved = Model(kind=Kind.hub, path=str(tmp_path / "model"), dtype=Dtype.float32)
    assert torch.equal(model.load(saved, Quant()).model(ids).logits, told)
    assert model.tokenizer(saved).eos_token == base.tokenizer.eos_token


def test_a_failure_leaves_the_whole_model_as_it_was():
    base = model.load(FLOAT, Quant())
    with pytest.raises(KeyError), model.adapted(base, NONE, 0) as tuned:
        moved(tuned)
        raise KeyError
    assert model.load(FLOAT, Quant()) is base
    assert model.fingerprint(base.model) == base.weights


def test_named_weights_and_the_head_are_trained_alone():
    base = model.load(FLOAT, Quant(), 3)
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    with model.adapted(base, replace(NONE, train=["layers.1.mlp", "q_proj.weight"]), 0) as tuned:
        trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
        moved(tuned)
        changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
    mlp = {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert trained == changed == {*mlp, *(f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)), "score.weight"}


@pytest.mark.parametrize(("part", "message"), [("layers.7", r"'layers\.7' is in the name of no weight"),
                                               ("q_prj", r"did you mean q_proj\?"), ("ayers", "did you mean layers")])  # fmt: skip
def test_part_of_no_name_is_refused(part, message):
    base = model.load(FLOAT, Quant())
    with pytest.raises(ConfigError, match=message), model.adapted(base, replace(NONE, train=[part]), 0):
        pass
    assert model.load(FLOAT, Quant()) is base


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_4", "olora", "LoftQ", "corda"])
def test_way_to_start_that_changes_the_base_is_refused(way):
    with pytest.raises(ConfigError, match=r"lora\.extra\.init_lora_weights must not change the base"):
        model.adapter(Lora(extra={"init_lora_weights": way}))
    assert model.adapter(Lora(extra={"init_lora_weights": "gaussian"})).init_lora_weights == "gaussian"


def test_base_that_changed_is_dropped(base):
    with model.adapted(base, Lora(r=4), 0):
        next(iter(base.model.parameters())).data += 1e-3
    assert model.load(TINY, Quant()) is not base


@pytest.mark.parametrize("place", [0, 3, 4, 6])
def test_one_bit_of_one_weight_is_seen_and_so_is_another_name(place):
    """Seven numbers of 16 bits: the last three are no whole number of 64; then the same bits from an odd address."""
    made = torch.nn.Module()
    made.register_buffer("weight", torch.arange(9, dtype=torch.bfloat16)[1:8])
    before = model.checksums(made)
    made.weight = torch.arange(1, 8, dtype=torch.bfloat16)
    assert model.checksums(made) == before
    made.weight.view(torch.int16)[place] ^= 1
    assert model.checksums(made) != before
    made.weight.view(torch.int16)[place] ^= 1
    made.register_buffer("other", made.weight)
    del made.weight
    assert model.checksums(made) != before


@pytest.mark.parametrize("r", [1, 8, 64])
@pytest.mark.parametrize("variant", [Variant.lora, Variant.rslora])
def test_scaling_is_alpha_over_rank_or_its_root(base, r, variant):
    expected = 16 / (r if variant is Variant.lora else math.sqrt(r))
    with model.adapted(base, Lora(r=r, alpha=16, variant=variant), 0) as tuned:
        scalings = [m.scaling["default"] for m in tuned.modules() if isinstance(getattr(m, "scaling", None), dict)]
    assert scalings == pytest.approx([expected] * 14, abs=1e-12)


def test_trainable_parameters_by_hand(base):
    # r * (in + out) for q, k, v, o (64-64, 64-32, 64-32, 64-64), gate, up (64-128) and down (128-64), in two layers
    per_rank = 2 * (128 + 96 + 96 + 128 + 192 + 192 + 192)
    with model.adapted(base, Lora(r=5), 0) as tuned:
        counted = model.count(tuned)
    assert counted.trainable == 5 * per_rank
    assert counted.total == 5 * per_rank + sum(p.numel() for p in base.model.parameters())


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["q_porj", "v_proj"], r"'q_porj' matches no layer, did you mean q_proj\?"), (["zzz"], r"the model has .*q_proj")],
)
def test_target_that_matches_nothing_is_refused(base, targets, message):
    with pytest.raises(ConfigError, match=message), model.adapted(base, Lora(r=4, targets=targets), 0):
        pass


def test_named_targets_get_adapters(base):
    with model.adapted(base, Lora(r=4, targets=["q_proj", "v_proj"]), 0) as tuned:
        names = {n.split(".")[-4] for n, p in tuned.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"alhpa_pattern": {}}, r"lora\.extra is refused by LoraConfig: .*alhpa_pattern"),
        ({"r": 4}, r"lora\.extra\.r must not be set, it has a key of its own"),
        ({"lora_alpha": 4}, r"a key of its own: lora\.alpha"),
    ],
)
def test_library_keyword_that_does_not_exist_is_refused(extra, message):
    with pytest.raises(ConfigError, match=message):
        model.adapter(Lora(extra=extra))


def test_library_keyword_reaches_the_library():
    assert model.adapter(Lora(extra={"rank_pattern": {"q_proj": 2}})).rank_pattern == {"q_proj": 2}


def test_adapter_that_cannot_learn_is_refused(base):
    with (
        pytest.raises(ConfigError, match="leaves no weight to train"),
        model.adapted(base, Lora(extra={"inference_mode": True}), 0),
    ):
        pass


def test_revision_of_a_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.revision must be null for a folder, got 'v1'"):
        model.source(Model(kind=Kind.hub, path=str(tmp_path), revision="v1"))


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(MachineError, match=r"model\.path must be a folder with a config\.json"):
        model.source(Model(kind=Kind.hub, path=str(tmp_path / "none")))


def test_folder_of_another_kind_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(MachineError, match=r"model\.path=.* cannot be loaded: "):
        model.tokenizer(Model(kind=Kind.hub, path=str(tmp_path)))


def test_hub_model_loads_from_a_folder(base, tmp_path):
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    weights = base.weights
    loaded = model.load(Model(kind=Kind.hub, path=str(tmp_path)), Quant())
    assert loaded.weights == weights
    assert loaded.tokenizer.chat_template == base.tokenizer.chat_template


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is there")
@pytest.mark.parametrize("kind", [Kind.tiny, Kind.hub])
def test_attention_that_is_not_installed_is_named_by_its_key(base, kind, tmp_path):
    """By the machine that is to compute, and before weights are read; transformers raises an ImportError."""
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # no such weights are told of
    path = str(tmp_path) if kind is Kind.hub else ""
    asked = Model(kind=kind, path=path, dtype=Dtype.bfloat16, attention=Attention.flash_attention_2)
    with pytest.raises(
        MachineError, match=r"model\.attention must be .*, got flash_attention_2: FlashAttention2 has"
    ) as told:
        model.load(asked, Quant())
    assert "\n" not in str(told.value)


def test_another_import_error_is_no_matter_of_attention():
    with pytest.raises(ImportError), model.attending("sdpa"):
        raise ImportError


def gradients(loaded):
    """Gradients of an adapter on the layer furthest from the loss; all of the path goes through 4-bit weights."""
    ids = torch.arange(3, 20)[None]
    with model.adapted(loaded, Lora(r=2, targets=["q_proj"]), 0) as tuned:
        tuned.train()
        tuned(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.abs().sum().item() for n, p in tuned.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_base_gives_the_same_gradients_once_it_was_scored(base, tmp_path, double):
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    loaded = model.load(Model(kind=Kind.hub, path=str(tmp_path)), Quant(Format.nf4, double))
    before = gradients(loaded)
    with torch.no_grad():
        loaded.model(input_ids=torch.arange(3, 20)[None])
    assert any(before.values())
    assert gradients(loaded) == before


def test_four_bit_weights_that_are_repacked_lose_gradients(base, tmp_path, monkeypatch):
    """The fault of bitsandbytes that `keep_gradients` guards against, on chips that have it."""
    if not compute.has_bfloat16():
        pytest.skip("only CPUs with bfloat16 units (avx512_bf16) repack weights")
    monkeypatch.setattr(model, "keep_gradients", lambda _: None)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    loaded = model.load(Model(kind=Kind.hub, path=str(tmp_path)), Quant(Format.nf4))
    before = gradients(loaded)
    with torch.no_grad():
        loaded.model(input_ids=torch.arange(3, 20)[None])
    assert gradients(loaded) != before


def test_four_bit_base_trains_an_adapter_and_counts_true_weights(base, tmp_path):
    full = model.count(base.model).total
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    loaded = model.load(Model(kind=Kind.hub, path=str(tmp_path)), Quant(kind=Format.nf4))
    assert any(hasattr(p, "quant_state") for p in loaded.model.parameters())
    assert model.count(loaded.model).total == full
    with model.adapted(loaded, Lora(r=2), 0) as tuned:
        ids = torch.arange(3, 20)[None]
        tuned(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)


@dataclasses.dataclass
class Settings:
    """Keywords of a library."""

    beta: float = 0.9
    rows: int | None = None
    on: bool = False
    name: "Optional[str]" = None  # noqa: UP045
    either: int | str = 0
    way: Literal["a", "b"] = "a"
    several: list[int] | None = None


@pytest.mark.parametrize(
    "extra",
    [{"beta": 0.5}, {"beta": 1}, {"rows": None}, {"rows": 3}, {"on": True}, {"name": "x"}, {"either": "x"}, {"way": 1},
     {"several": "x"}, {"unknown": 1}],
    ids=str,
)  # fmt: skip
def test_library_keyword_of_its_type_is_taken_and_what_is_not_plain_left_to_the_library(extra):
    model.check_types(Settings, extra, "x")


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ({"beta": "high"}, "beta must be a number, got 'high'"),
        ({"beta": None}, "beta must be a number, got None"),
        ({"beta": True}, "beta must be a number, got True"),
        ({"rows": 2.0}, "rows must be a whole number or null, got 2.0"),
        ({"on": 1}, "on must be true or false, got 1"),
        ({"name": 1}, "name must be text or null, got 1"),
        ({"either": [1]}, r"either must be a whole number or text, got \[1\]"),
    ],
    ids=str,
)
def test_library_keyword_of_another_type_is_refused(extra, wanted):
    with pytest.raises(ConfigError, match=rf"^trainer\.extra\.{wanted}$"):
        model.check_types(Settings, extra, "trainer.extra")


def test_settings_for_writing_are_those_that_a_loaded_model_has(tmp_path):
    made = tiny.model("eager")
    made.generation_config.eos_token_id = [2, 0]
    made.save_pretrained(tmp_path)
    of = Model(kind=Kind.hub, path=str(tmp_path))
    assert model.writing(of).eos_token_id == [2, 0]
    (tmp_path / "generation_config.json").unlink()
    assert model.writing(of).eos_token_id == model.writing(Model(kind=Kind.tiny)).eos_token_id == 2
