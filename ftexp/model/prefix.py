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
MOVING = ("dynamic", "longrope")
"""Rotary positions that are other ones in longer rows."""


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
    made, settings = cache(model), bare(model).config.get_text_config()
    told = getattr(settings, "rope_parameters", None) or {}
    kinds = {p.get("rope_type") for p in (told, *(v for v in told.values() if isinstance(v, dict)))}
    whole = made is not None and all(type(layer) is DynamicLayer for layer in made.layers)
    return count if whole and kinds.isdisjoint(MOVING) else 0


def read(model: PeftModel | PreTrainedModel, ids: torch.Tensor) -> DynamicCache | None:
    """Read tokens (position,), and no more of their logits than must be.

    Returns:
        What the model keeps of them as one row; None where it keeps it elsewhere.
    """
    made = cast(DynamicCache, cache(model))
    more = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(bare(model).forward).parameters else {}
    cast(Any, model)(input_ids=ids[None], past_key_values=made, use_cache=True, **more)
    return made if made.get_seq_length() == len(ids) else None


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
