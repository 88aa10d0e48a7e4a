"""Small random encoders as a hub has them: with the tokenizer of the tiny model, and no layer of a classifier's head."""

from __future__ import annotations

from pathlib import Path

from ftexp.model import tiny

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = {
    "roberta": SIZES,  # `classifier` holds two layers, as of ELECTRA, XLM-R and CamemBERT
    "electra": {**SIZES, "embedding_size": 32},
    "bert": SIZES,  # `bert.pooler.dense` is missing too
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "modernbert": SIZES,  # `head.dense`, `head.norm` and `classifier`
}


def save(kind: str, folder: Path) -> Path:
    """Save a masked language model of a kind and its tokenizer in a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    tokens = tiny.tokenizer()
    ends = {f"{name}_token_id": tokens.eos_token_id for name in ("bos", "eos", "cls", "sep")}
    config = AutoConfig.for_model(
        kind, vocab_size=259, max_position_embeddings=300, pad_token_id=tokens.pad_token_id, **ends, **KINDS[kind]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder
