"""Layers of a base that score and write: without gradients, with one adapter in the format the base computes in.

peft multiplies adapters by themselves, in float32 beside a base in 16 bits, and transformers takes some sixty small
steps a layer; where few tokens are read at once, as in writing, those take longer than the products. Masks, the cache
of keys and values and the loop that chooses tokens stay transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional

from ftexp.model import block, packed
from ftexp.model.linear import Read

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ATTENTION = "eager"
"""Attention of transformers whose masks are added to scores, as is done here."""


def fits(model: PreTrainedModel) -> bool:
    """Tell whether a model can answer this way: layers of the Llama family on a CPU, with weights as they are.

    On other devices, with weights to unpack, and for long rows, which take another attention, transformers does well.
    """
    if model.device.type != "cpu" or getattr(model, "quantization_method", None) is not None:
        return False
    layers = getattr(model.base_model, "layers", ())
    known = all(isinstance(layer, Layer) or block.fits(layer) for layer in layers)
    return model.config._attn_implementation == ATTENTION and len(layers) > 0 and known


def adapter(tuned: PeftModel | PreTrainedModel, dtype: torch.dtype) -> packed.Adapter:
    """Take the adapter that peft put on a base, in a format.

    Raises:
        ConfigError: it is none that the packed engine trains.
    """
    weights, scales = packed.taken(tuned)
    made = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in weights.items()}
    return packed.Adapter(made, scales, 0.0, torch.Generator())


NOTHING = packed.Adapter({}, {}, 0.0, torch.Generator())
"""Adapter of a base by itself."""


@contextmanager
def answering(model: PreTrainedModel, theirs: packed.Adapter) -> Iterator[None]:
    """Let a base that `fits` answer with an adapter; what peft has put on it sleeps meanwhile.

    Args:
        model: the base, in evaluation mode; adapters of peft may be on it.
        theirs: the adapter it answers with.
    """
    layers = cast(Any, model.base_model).layers
    prefix = next(name for name, module in model.named_modules() if module is layers)
    own = list(layers)
    pack = packed.Pack(model, 1)
    try:
        for n, layer in enumerate(own):
            layers[n] = Layer(layer, f"{prefix}.{n}", pack, theirs)
        yield
    finally:
        for n, layer in enumerate(own):
            layers[n] = layer


class Layer(nn.Module):
    """Stands in for a decoder layer."""

    def __init__(self, base: nn.Module, name: str, pack: packed.Pack, theirs: packed.Adapter) -> None:
        super().__init__()
        own = cast(Any, base).self_attn
        self.base, self.adapter = base, theirs
        self.width, self.scale, self.number = int(own.head_dim), float(own.scaling), int(own.layer_idx)
        self.reads = tuple(
            Read([_bare(base.get_submodule(n)) for n in names], [f"{name}.{n}" for n in names], pack)
            for names in block.READS
        )

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, past_key_values: Any = None,
        position_embeddings: Any = None, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Take hidden states (row, position, width) to as many, as transformers calls it."""
        count, length, _width = hidden_states.shape
        x = hidden_states.reshape(count * length, -1)
        layout = packed.Layout(x.new_empty(1, len(x)), x, ((self.adapter, 0, len(x)),), (), (), False)
        base, (qkv, out, wide, down) = cast(Any, self.base), self.reads
        (q, k, v), _kept = qkv.forward(block.rms_normed(base.input_layernorm, x)[1], layout)
        cos, sin = (t.expand(count, -1, -1).reshape(len(x), -1) for t in position_embeddings)
        q, k = (block.rotated(part.view(len(x), -1, self.width), cos, sin) for part in (q, k))
        k, v = (part.view(count, length, -1, self.width).transpose(1, 2) for part in (k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.number)
        (y,), _kept = out.forward(self._seen(q.view(count, length, -1, self.width), k, v, attention_mask), layout)
        middle = y.add_(x)
        (gate, up), _kept = wide.forward(block.rms_normed(base.post_attention_layernorm, middle)[1], layout)
        (z,), _kept = down.forward(functional.silu(gate).mul_(up), layout)
        return z.add_(middle).view_as(hidden_states)

    def _seen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attend with q (row, position, head, width) to k and v (row, head, key, width), as (row * position, all).

        Heads that share keys are one product.
        """
        (count, length, heads, width), shared, keys = q.shape, k.shape[1], k.shape[2]
        q = q.unflatten(2, (shared, -1)).permute(0, 2, 3, 1, 4).reshape(count * shared, -1, width)
        scores = torch.bmm(q, k.reshape(count * shared, keys, width).transpose(1, 2)).mul_(self.scale)
        if mask is not None:
            scores.view(count, shared, -1, length, keys).add_(mask[:, :, None])
        p = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        seen = torch.bmm(p, v.reshape(count * shared, keys, width)).view(count, heads, length, width)
        return seen.transpose(1, 2).reshape(count * length, -1)


def _bare(layer: nn.Module) -> nn.Module:
    return cast(Any, layer).get_base_layer() if hasattr(layer, "get_base_layer") else layer
