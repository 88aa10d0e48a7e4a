"""A whole model as one GGUF file, for llama.cpp and what stands on it: weights in the format of its folder, not packed.

Written with the package `gguf` for the two architectures whose names and orders are known here, and for tokenizers
whose rule for splitting text llama.cpp knows by a name; anything else is refused by its name. `ftexp.export` reads the
file back with transformers and compares.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftexp.errors import ConfigError
from ftexp.files import read_json
from ftexp.model.embedded import LAYER
from ftexp.progress import progress

if TYPE_CHECKING:
    from gguf import GGUFWriter

NAMES = {theirs: ours for ours, theirs in LAYER.items()}
"""Part of a layer in transformers -> in GGUF."""
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ARCHITECTURES = ("llama", "qwen2")
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The expression by which tokenizers of Qwen2 split a text."""


def write(folder: Path, target: Path) -> None:
    """Write the model of a folder, as transformers saves it, to a GGUF file.

    Raises:
        ConfigError: its architecture or tokenizer is not one that is known here.
    """
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize
    from safetensors import safe_open

    logging.getLogger("gguf").setLevel(logging.WARNING)  # it names every key, on stdout where Hydra logs
    config = read_json(folder / "config.json") or {}
    check(config)
    tokens = _tokenizer(folder)
    stored = torch.float32 if config["dtype"] == "float32" else getattr(torch, config["dtype"])
    kinds = {
        torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
        torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    }
    matrix, kind = kinds[stored]
    made = GGUFWriter(target, config["model_type"])
    made.add_file_type(kind)
    _settings(made, config)
    _tokens(made, tokens, config["vocab_size"])
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with safe_open(path, framework="pt") as kept, progress(path.name, len(kept.keys())) as advance:
            for name in kept.keys():  # noqa: SIM118, it is no mapping
                value = kept.get_tensor(name).float().numpy()
                value = _permuted(value, name, config)
                form = matrix if value.ndim > 1 else GGMLQuantizationType.F32
                made.add_tensor(renamed(name), quantize(value, form), raw_dtype=form)
                advance()
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


def check(config: dict[str, Any]) -> None:
    """Refuse a model that would be written wrong.

    Raises:
        ConfigError: names what is not known here.
    """
    kind = config.get("model_type")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    odd = {
        f"model_type={kind}": kind not in ARCHITECTURES,
        f"rope_type={rope.get('rope_type')}": rope.get("rope_type", "default") != "default",
        "attention_bias": kind == "llama" and config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "use_sliding_window": config.get("use_sliding_window", False),
        f"hidden_act={config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
    }
    found = [name for name, wrong in odd.items() if wrong]
    if found:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(
            f"--form gguf knows plain models of {known}, this one has {', '.join(found)}; "
            "llama.cpp's own converter takes what --form merged writes"
        )


def renamed(name: str) -> str:
    """Return the name of a weight in GGUF.

    >>> renamed("model.layers.3.self_attn.q_proj.weight"), renamed("lm_head.weight")
    ('blk.3.attn_q.weight', 'output.weight')
    """
    place, _, end = name.rpartition(".")
    if place in OUTSIDE:
        return f"{OUTSIDE[place]}.{end}"
    _, _, layer, part = place.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{end}"


def _permuted(value: Any, name: str, config: dict[str, Any]) -> Any:
    """Bring rows of q and k of a Llama into llama.cpp's order of rotary pairs: (heads, 2, half) to (heads, half, 2)."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    part = name.split(".")[-2]
    if config["model_type"] != "llama" or part not in heads:
        return value
    rows, columns = value.shape
    return value.reshape(heads[part], 2, rows // heads[part] // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _settings(made: GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    made.add_context_length(config["max_position_embeddings"])
    made.add_embedding_length(config["hidden_size"])
    made.add_block_count(config["num_hidden_layers"])
    made.add_feed_forward_length(config["intermediate_size"])
    made.add_head_count(heads)
    made.add_head_count_kv(config["num_key_value_heads"])
    size = config.get("head_dim") or config["hidden_size"] // heads
    made.add_key_length(size)  # left out, llama.cpp takes hidden size / heads
    made.add_value_length(size)
    made.add_rope_dimension_count(size)
    made.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    made.add_layer_norm_rms_eps(config["rms_norm_eps"])
    made.add_vocab_size(config["vocab_size"])


def _tokenizer(folder: Path) -> dict[str, Any]:
    """Read a tokenizer of byte pairs, and find llama.cpp's name for the way it splits text.

    Raises:
        ConfigError: it is none, or splits in a way that has no name here.
    """
    told = json.loads((folder / "tokenizer.json").read_text())
    splits = (told.get("pre_tokenizer") or {}).get("pretokenizers") or [told.get("pre_tokenizer") or {}]
    kinds = [part.get("type") for part in splits]
    name = None
    if kinds == ["Digits", "ByteLevel"] and splits[0]["individual_digits"]:
        name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and splits[0]["pattern"].get("Regex") == QWEN2:
        name = "qwen2"
    if told["model"]["type"] != "BPE" or told["model"].get("byte_fallback") or name is None:
        raise ConfigError(
            "--form gguf knows tokenizers of byte pairs that split as SmolLM's or Qwen2's; this one is "
            f"{told['model']['type']} with {', '.join(map(str, kinds))}"
        )
    settings = read_json(folder / "tokenizer_config.json") or {}
    template = folder / "chat_template.jinja"
    settings["chat_template"] = template.read_text() if template.exists() else settings.get("chat_template")
    return {"pre": name, "json": told, "settings": settings}


def _tokens(made: GGUFWriter, tokens: dict[str, Any], size: int) -> None:
    """Write the vocabulary, padded to the rows of the embedding, as llama.cpp's converter does."""
    from gguf import TokenType

    told, settings = tokens["json"], tokens["settings"]
    ids = {**told["model"]["vocab"], **{added["content"]: added["id"] for added in told["added_tokens"]}}
    special = {added["id"]: TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
               for added in told["added_tokens"]}  # fmt: skip
    words = {number: word for word, number in ids.items()}
    made.add_tokenizer_model("gpt2")
    made.add_tokenizer_pre(tokens["pre"])
    made.add_token_list([words.get(n, f"[PAD{n}]") for n in range(size)])
    made.add_token_types([special.get(n, TokenType.NORMAL if n in words else TokenType.UNUSED) for n in range(size)])
    merges = told["model"]["merges"]
    made.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    adders = {"bos_token": made.add_bos_token_id, "eos_token": made.add_eos_token_id,
              "unk_token": made.add_unk_token_id, "pad_token": made.add_pad_token_id}  # fmt: skip
    for key, add in adders.items():
        word = settings.get(key)
        word = word["content"] if isinstance(word, dict) else word
        if word in ids:
            add(ids[word])
    made.add_add_bos_token(False)  # templates write it where it is wanted
    if settings["chat_template"]:
        made.add_chat_template(settings["chat_template"])
