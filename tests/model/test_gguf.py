"""GGUF files read back by transformers: weights, tokens, settings; and a run's export as one."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ftexp import data, export
from ftexp.config import Data
from ftexp.errors import ConfigError
from ftexp.files import read_json
from ftexp.model import gguf

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0}  # fmt: skip
KINDS = {
    "smollm": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "wide": {"model_type": "llama", "tie_word_embeddings": False, "head_dim": 32},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
}  # fmt: skip
TEXTS = ["In 1984 he had 27 cats, hadn't he?\n\n  Yes!", "é ü 你好 😀", "<|im_start|>user\nhi<|im_end|>\n", "a  b\tc "]


def made(folder: Path, name: str, dtype=torch.float32) -> Path:
    """Save a random model of two layers, biases and norms not at their first values, with byte pairs of the Yoda rows."""
    folder.mkdir()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, **KINDS[name]), dtype=dtype)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn(weight.shape).to(weight)
    model.save_pretrained(folder)
    split = pre_tokenizers.Split(__import__("tokenizers").Regex(gguf.QWEN2), "isolated")
    first = split if name == "qwen2" else pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name != "qwen2")
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.Sequence([first, level])
    pairs.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    rows = data.load(Data(rows=200, valid=10)).train
    pairs.train_from_iterator(
        [f"{r.prompt} {r.completion}" for r in rows],
        trainers.BpeTrainer(vocab_size=500, special_tokens=[AddedToken(t, special=True, normalized=False) for t in special],
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=pairs, bos_token="<|im_start|>", eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", unk_token="<|endoftext|>")  # fmt: skip
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_transformers_reads_back_weights_tokens_and_settings(tmp_path, name, dtype):
    folder = made(tmp_path / "m", name, dtype)
    gguf.write(folder, tmp_path / "m.gguf")
    mine = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    weights = dict(theirs.named_parameters())
    assert all(torch.equal(weights[n], w) for n, w in mine.named_parameters())
    assert len(weights) == len(dict(mine.named_parameters()))
    ids = torch.arange(3, 60)[None]
    assert torch.allclose(mine(ids).logits, theirs(ids).logits, atol=1e-5)
    one, other = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert [one(t).input_ids for t in TEXTS] == [other(t).input_ids for t in TEXTS]
    assert one.chat_template == other.chat_template
    assert (one.eos_token_id, one.pad_token_id) == (other.eos_token_id, other.pad_token_id)


@pytest.mark.parametrize(("name", "size"), [("llama", 16), ("wide", 32)])
def test_size_of_a_head_is_told_where_llama_cpp_looks_for_it(tmp_path, name, size):
    from gguf import GGUFReader

    gguf.write(made(tmp_path / "m", name), tmp_path / "m.gguf")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert fields[f"llama.{key}"].contents() == size


def test_sabotage_rotary_pairs_in_another_order_are_another_model(tmp_path, monkeypatch):
    folder = made(tmp_path / "m", "llama")
    monkeypatch.setattr(gguf, "_permuted", lambda value, *_: value)
    gguf.write(folder, tmp_path / "m.gguf")
    ids = torch.arange(3, 60)[None]
    mine, theirs = (AutoModelForCausalLM.from_pretrained(*given, **more, dtype=torch.float32).eval()(ids).logits
                    for given, more in (((folder,), {}), ((tmp_path,), {"gguf_file": "m.gguf"})))  # fmt: skip
    assert (mine - theirs).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, r"--form gguf knows plain models of llama, qwen2, this one has model_type=mistral"),
        ({"rope_parameters": {"rope_type": "llama3"}}, r"this one has rope_type=llama3"),
        ({"attention_bias": True}, r"this one has attention_bias"),
        ({"model_type": "qwen2", "use_sliding_window": True}, r"this one has use_sliding_window"),
        ({"hidden_act": "gelu"}, r"this one has hidden_act=gelu"),
    ],
)
def test_what_would_be_written_wrong_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        gguf.check({"model_type": "llama", "hidden_act": "silu"} | change)


def test_a_tokenizer_that_has_no_name_is_refused(tmp_path):
    folder = made(tmp_path / "m", "llama")
    told = json.loads((folder / "tokenizer.json").read_text())
    told["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=r"split as SmolLM's or Qwen2's; this one is BPE with ByteLevel"):
        gguf.write(folder, tmp_path / "m.gguf")


def test_a_run_as_one_file_answers_as_the_run(cli, tmp_path, monkeypatch, capsys):
    from conftest import TINY

    folder = made(tmp_path / "base", "smollm")
    given = [t for t in TINY if t != "model=tiny"]
    code, _, err = cli(*given, "model=hub", f"model.path={folder}", "track=none", "name=r")
    assert code == 0, err
    monkeypatch.setattr(sys, "argv", ["ftexp export", "r", "--to", "g", "--form", "gguf", "--json"])
    assert export.main() == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"].keys() == {"README.md", "model.gguf"}
    loss = read_json(tmp_path / "outputs/runs/r/trial.json")["scores"]["valid/loss"]
    assert told["fidelity"]["after"] == pytest.approx(loss, rel=1e-5)
    assert told["fidelity"]["choices"] == 1
    assert "gguf_file='model.gguf'" in (tmp_path / "g" / "README.md").read_text()
    honest = gguf._tokens

    def spoiled(made, tokens, size):
        tokens["json"]["model"]["merges"] = tokens["json"]["model"]["merges"][:-150]
        honest(made, tokens, size)

    monkeypatch.setattr(gguf, "_tokens", spoiled)
    monkeypatch.setattr(sys, "argv", ["ftexp export", "r", "--to", "h", "--form", "gguf"])
    assert export.main() == 5
    assert "held-out rows of r, as yoda:" in capsys.readouterr().err
    assert not (tmp_path / "h").exists()
