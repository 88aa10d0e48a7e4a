"""The prefix that rows share, such as the system prompt of a template, read once for all rows of a pass.

Where nothing is learned a base remembers what it read as keys and values, which are the same in front of every row.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

WORTH = 0.2
"""Share of the tokens of a pass from which on reading them once saves more than the pass costs that reads them."""
KNOWN = frozenset({
    "arcee", "biogpt", "bloom", "cohere", "falcon", "gemma", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite",
    "granitemoe", "llama", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmoe", "opt", "persimmon",
    "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm",
    "starcoder2", "xglm",
})  # fmt: skip
"""Models of transformers whose tokens see those before them and nothing else, by the positions that a mask counts.

Others see tokens that follow (BERT), number positions otherwise behind what was read (RoBERTa), or count places, of
which padding takes some (GPT-Neo, RoFormer). All were compared with whole rows, in losses and in completions.
"""
STILL = ("default", "linear", "llama3", "yarn")
"""Rotary positions that are the same ones in longer rows."""


def common(rows: Sequence[Sequence[int]], most: int) -> int:
    """Count the tokens, at most so many, that all rows begin with.

    >>> common([[1, 2, 3, 4], [1, 2, 5]], 9), common([[1, 2, 3], [1, 2, 3]], 2), common([[7]], 0)
    (2, 2, 0)
    """
    first, last = min(map(tuple, rows)), max(map(tuple, rows))  # in the order of their tokens: these differ first
    most = min(most, len(first), len(last))
    return next((n for n in range(most) if first[n] != last[n]), most)


def cache(model: PeftModel | PreTrainedModel) -> DynamicCache | None:
    """Make the cache of keys and values that rows can leave; None for a model with another kind of memory."""
    asked = bare(model)
    takes = "past_key_values" in inspect.signature(asked.forward).parameters
    if not takes or asked._is_stateful or not asked._supports_default_dynamic_cache():
        return None
    made = DynamicCache(config=asked.config)
    return made if all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in made.layers) else None


def bare(model: Any) -> Any:
    """Return the model of transformers behind adapters, and behind what shares it out to devices."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def shared(model: PeftModel | PreTrainedModel, rows: Sequence[Sequence[int]], most: int, width: int) -> int:
    """Count the tokens in front of rows that are to be read once.

    Args:
        model: what reads them.
        rows: token ids.
        most: tokens that may be read before; each row keeps at least one of its own.
        width: tokens of a row in the pass, with its padding.

    Returns:
        0 where it is not worth it, or what the model makes of those tokens depends on what follows.
    """
    count = common(rows, most)
    if count * (len(rows) - 1) < WORTH * width * len(rows) or len(rows) < 2:
        return 0
    return count if _causal(bare(model)) else 0


def _causal(asked: PreTrainedModel) -> bool:
    """Whether what a model makes of tokens is the same whatever follows, and keys of all of them are kept."""
    settings = asked.config
    if settings.model_type not in KNOWN or not type(asked).__module__.startswith("transformers.models."):
        return False
    turned = getattr(settings, "rope_parameters", None) or {}
    if not getattr(settings, "is_causal", True) or turned.get("rope_type", STILL[0]) not in STILL:
        return False
    made = cache(asked)
    return made is not None and all(type(layer) is DynamicLayer for layer in made.layers)


def read(model: PeftModel | PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    """Read tokens (position,), and no more of their logits than must be; return what is kept of them as one row."""
    made = cast(DynamicCache, cache(model))
    more = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(bare(model).forward).parameters else {}
    cast(Any, model)(input_ids=ids[None], past_key_values=made, use_cache=True, **more)
    return made


def before_all(made: DynamicCache) -> DynamicCache:
    """Put what was read as one row in front of every row of a pass, of which nothing is kept."""
    made.layers[:] = [_Held(layer) for layer in made.layers]
    return made


class _Held(DynamicLayer):
    """Keys and values (1, head, position, width) in front of those of every row, which it forgets."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.lazy_initialization(read.keys, read.values)
        self.keys, self.values = cast(torch.Tensor, read.keys), cast(torch.Tensor, read.values)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any):
        """Return those of a row's whole text; takes (row, head, position, width)."""
        kept = (cast(torch.Tensor, t).expand(len(key_states), -1, -1, -1) for t in (self.keys, self.values))
        return tuple(torch.cat([a, b], -2) for a, b in zip(kept, (key_states, value_states), strict=True))
