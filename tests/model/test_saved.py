"""Adapters put back and merged: against the sums done by hand, and what does not fit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import is_flash_attn_2_available

from ftexp import model
from ftexp.config import Kind, Lora, Model, Quant
from ftexp.errors import MachineError
from ftexp.files import read_json, write_json
from ftexp.model import compute, saved, tiny

TRIAL = Path("outputs/sweeps/s/1/adapter")
FLAT = Model(kind=Kind.tiny)


def test_merged_weights_are_the_sums_by_hand(at):
    """W + alpha / r * B A, from the file of the adapter and a fresh base, without peft."""
    stored, told = load_file(TRIAL / "adapter_model.safetensors"), read_json(TRIAL / "adapter_config.json")
    fresh = tiny.model("eager").state_dict()
    made = saved.merged(FLAT, TRIAL).state_dict()
    assert set(made) == set(fresh)
    touched = 0
    for name, weight in made.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        wanted = fresh[name]
        if f"{key}.lora_A.weight" in stored:
            scale = told["lora_alpha"] / told["r"]
            wanted = wanted + scale * stored[f"{key}.lora_B.weight"] @ stored[f"{key}.lora_A.weight"]
            touched += not torch.equal(wanted, fresh[name])
        assert torch.allclose(weight, wanted, atol=1e-6), name
    assert touched == 14  # seven linear layers in each of two blocks


def test_adapter_is_put_on_and_taken_off(at):
    base = model.load(FLAT, Quant())
    before = base.weights
    ids = torch.tensor([[5, 6, 7]])
    bare = base.model(ids).logits
    with saved.restored(base, TRIAL) as tuned:
        assert not torch.equal(tuned(ids).logits, bare)
        with tuned.disable_adapter():
            assert torch.equal(tuned(ids).logits, bare)
    assert torch.equal(base.model(ids).logits, bare)
    assert model.fingerprint(base.model) == before
    assert model.load(FLAT, Quant()) is base
    with model.adapted(base, Lora(r=2, alpha=4), 0) as other:  # a trial may follow
        assert model.count(other).trainable


def test_a_base_that_a_reader_changed_is_dropped(at):
    base = model.load(FLAT, Quant())
    with saved.restored(base, TRIAL):
        next(base.model.parameters()).data[0, 0] += 1
    assert model.load(FLAT, Quant()) is not base


def test_adapter_of_another_shape_is_refused_and_the_base_dropped(at, tmp_path):
    wrong = Path(shutil.copytree(TRIAL, tmp_path / "wrong"))
    write_json(wrong / "adapter_config.json", read_json(wrong / "adapter_config.json") | {"r": 3})
    base = model.load(FLAT, Quant())
    with pytest.raises(MachineError, match=r"wrong: the adapter does not fit its base model: .*size mismatch"), \
         saved.restored(base, wrong):  # fmt: skip
        pass
    assert model.load(FLAT, Quant()) is not base
    with pytest.raises(MachineError, match=r"must hold an adapter; there is no adapter_config\.json"):
        saved.merged(FLAT, tmp_path)


def test_adapter_whose_weights_are_gone_is_refused_and_not_sought_on_the_hub(at, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(at / TRIAL, "runs/adapter")  # relative, it reads as the name of a repository
    Path("runs/adapter/adapter_model.safetensors").unlink()
    monkeypatch.setattr("peft.utils.save_and_load.hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(MachineError, match=r"must hold an adapter; there is no adapter_model\.safetensors"):
        saved.attached(tiny.model("eager"), Path("runs/adapter"))


def test_adapter_that_is_not_finite_is_not_merged(at, tmp_path):
    from safetensors.torch import save_file

    broken = Path(shutil.copytree(TRIAL, tmp_path / "broken"))
    stored = load_file(broken / "adapter_model.safetensors")
    next(iter(stored.values()))[0, 0] = float("nan")
    save_file(stored, broken / "adapter_model.safetensors")
    with pytest.raises(MachineError, match="broken: the adapter cannot be merged: NaNs detected"):
        saved.merged(FLAT, broken)


def test_folder_is_read_as_it_was_written(at, tmp_path):
    made = saved.merged(FLAT, TRIAL)
    made.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    again = saved.read(tmp_path, compute.policy(Model(kind=Kind.tiny, dtype=config_dtype())))
    assert all(
        torch.equal(a, b) for a, b in zip(made.state_dict().values(), again.model.state_dict().values(), strict=True)
    )
    assert again.tokenizer("abc").input_ids == tiny.tokenizer()("abc").input_ids


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is there")
def test_folder_read_with_an_attention_that_is_not_installed(tmp_path):
    tiny.model("eager").save_pretrained(tmp_path)
    chosen = replace(compute.policy(FLAT), dtype="bfloat16", attention="flash_attention_2")
    with pytest.raises(MachineError, match=r"model\.attention must be .*, got flash_attention_2"):
        saved.read(tmp_path, chosen)


def config_dtype():
    from ftexp.config import Dtype

    return Dtype.float32
