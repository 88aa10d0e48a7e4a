"""A random two-layer Llama with a byte-level tokenizer, made in the process: the real code path in seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

POSITIONS = 512
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of 256 bytes and three markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    made.decoder = decoders.ByteLevel()  # type: ignore
    pad, start, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        chat_template=TEMPLATE,
        model_max_length=POSITIONS,
    )


def configuration(attention: str = "eager", labels: int = 0) -> LlamaConfig:
    """Describe the model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation=attention,  # type: ignore
        **({"num_labels": labels} if labels else {}),
    )


def model(attention: str, labels: int = 0) -> LlamaForCausalLM | LlamaForSequenceClassification:
    """Make the model, in float32 and always with the same weights; with a head for `labels`, where there are any."""
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    config = configuration(attention, labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config) if labels else LlamaForCausalLM(config)
