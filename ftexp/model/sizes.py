"""Parameters and bytes of a model with its adapter, counted on the meta device: no weight is made or loaded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ftexp import model as models
from ftexp.config import Format, Lora, Model, Quant
from ftexp.errors import ConfigError
from ftexp.model import architecture

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

BLOCK = 64
"""Weights of one scale in bitsandbytes' 4-bit formats."""
NESTED = 256
"""Scales of one scale where they are quantized too."""


@dataclass(frozen=True)
class Outline:
    """A model with a fresh adapter on the meta device, and what was counted while it was put together."""

    model: PeftModel
    weights: int
    """Bytes of the base as stored: packed weights, their scales, and buffers."""
    footprint: int
    """Bytes that `get_memory_footprint` of transformers tells of the base: it leaves the scales out. A table held
    twice (`original_inv_freq`, a buffer since transformers 5 alone) counts once."""
    adapted: int
    """`footprint` with the adapter on."""
    trainable: int
    """Weights the optimizer changes."""
    total: int
    """All weights, each once."""
    packed: int
    """All weights as tutorials print them: `numel` of a packed 4-bit weight is half of what it stands for."""
    flop_weights: int
    """Weights in transformers' count of operations: all but those of embedding tables."""
    tensors: tuple[int, ...]
    """Weights in each trainable tensor."""
    trained_bytes: int
    """Bytes of the trainable weights; their gradients take as many."""
    adapter_file: int
    """Bytes of `adapter_model.safetensors`."""
    unpacked: int
    """Bytes of the largest quantized matrix unpacked for its product; 0 without quantization."""


def outline(model: Model, quant: Quant, lora: Lora, dtype: str, attention: str, labels: int = 0) -> Outline:
    """Put a model and its adapter together on the meta device.

    Args:
        model: what to describe.
        quant: how its weights would be stored.
        lora: the adapter.
        dtype: format of the weights that are not quantized, by its name in torch.
        attention: implementation of attention, by its name in transformers.
        labels: outputs of a classification head; 0 for a language model.

    Raises:
        ConfigError: the model has no head of the kind, or peft refuses the adapter.
        MachineError: the config of the model cannot be read.
    """
    import torch
    from peft import get_peft_model

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        base = _base(model, dtype, attention, labels)
        head = _head(base, labels) if labels else ()
        matrices = quantized(base) if quant.kind is not Format.none else {}
        base.requires_grad_(False)
        models.check_targets(base, lora.targets)
        whole, stored, plain = _footprint(base, matrices, quant), _scales(matrices, quant), _weight_bytes(base)
        wanted = models.adapter(lora, head)
        wanted.init_lora_weights = False  # sizes do not depend on it, and some ways of it need the weights
        try:
            tuned = cast("PeftModel", get_peft_model(base, wanted))
        except ValueError as error:
            raise ConfigError(f"lora is refused by peft: {error}") from error
    trained = [p for p in tuned.parameters() if p.requires_grad]
    counts = models.count(tuned)
    return Outline(
        model=tuned,
        weights=whole + stored + _copies(base),
        footprint=whole,
        adapted=whole + _weight_bytes(tuned) - plain,
        trainable=counts.trainable,
        total=counts.total,
        packed=counts.total - sum(n - packed(n) for n in matrices.values())
        if quant.kind is Format.nf4
        else counts.total,
        flop_weights=cast(Any, tuned).num_parameters(exclude_embeddings=True),
        tensors=tuple(p.numel() for p in trained),
        trained_bytes=sum(p.numel() * p.itemsize for p in trained),
        adapter_file=adapter_file(tuned),
        unpacked=max(matrices.values(), default=0) * getattr(torch, dtype).itemsize,
    )


def _base(model: Model, dtype: str, attention: str, labels: int) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = architecture.described(model)
    if labels:
        config.num_labels = labels
        config.get_text_config().pad_token_id = 0  # any: a classifier of unequal rows must have one
    kind: Any = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    try:
        return kind.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    except ValueError as error:
        text = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.path={model.path} has no {'classifier' if labels else 'text'} to learn: {text}"
        ) from error


def _head(base: PreTrainedModel, labels: int) -> tuple[str, ...]:
    """Name the modules that no file of the model has: those beside the one all its kinds share."""
    body = f"{base.base_model_prefix}."
    return models.fresh_head(base, {name for name in base.state_dict() if not name.startswith(body)}, labels)


def quantized(base: PreTrainedModel) -> dict[str, int]:
    """Name the matrices that transformers hands to bitsandbytes, each with its number of weights.

    All linear layers but the output head and what is tied to it (`replace_with_bnb_linear`).
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    spared = HfQuantizer.get_modules_to_not_convert(base, None, cast(Any, base)._keep_in_fp32_modules)
    return {
        name: module.weight.numel()
        for name, module in base.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, spared)
    }


def packed(weights: int) -> int:
    """Bytes of 4-bit weights, two in each.

    >>> packed(7)
    4
    """
    return (weights + 1) // 2


def scale_bytes(weights: int, double: bool) -> int:
    """Bytes bitsandbytes keeps beside the 4-bit weights of one matrix (`quantize_4bit`).

    A float32 scale for each block of 64; with `double` one byte for each instead, a float32 for each 256 of those, and
    their mean. The tables of values (16 and 256 float32) are shared by all matrices and left out.

    >>> scale_bytes(64 * 256, double=False), scale_bytes(64 * 256, double=True)
    (1024, 264)
    """
    blocks = math.ceil(weights / BLOCK)
    return blocks + 4 * math.ceil(blocks / NESTED) + 4 if double else 4 * blocks


def _footprint(base: PreTrainedModel, matrices: dict[str, int], quant: Quant) -> int:
    """Bytes of parameters and buffers of the base as it would be stored, without scales."""
    stored = {f"{name}.weight": packed(n) if quant.kind is Format.nf4 else n for name, n in matrices.items()}
    weights = sum(stored.get(name, p.numel() * p.itemsize) for name, p in base.named_parameters())
    buffers = sum(b.numel() * b.itemsize for b in base.buffers())
    return weights + buffers - _copies(base)


def _weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in model.parameters())


def _copies(base: torch.nn.Module) -> int:
    return sum(b.numel() * b.itemsize for n, b in base.named_buffers() if n.endswith("original_inv_freq"))


def _scales(matrices: dict[str, int], quant: Quant) -> int:
    """Bytes of all scales; those of int8, a float32 for each output, are left out: below 1 %."""
    if quant.kind is not Format.nf4:
        return 0
    return sum(scale_bytes(n, quant.double) for n in matrices.values())


def adapter_file(tuned: PeftModel) -> int:
    """Bytes of the safetensors file that `save_pretrained` of peft writes.

    8 bytes for the length of the header, the header as JSON padded to 8 bytes, and the weights, ordered by the width
    of their numbers and then by name (safetensors' `serialize`).
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import _TYPES  # type: ignore

    names = {dtype: name for name, dtype in _TYPES.items()}
    kept = get_peft_model_state_dict(tuned)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in sorted(kept.items(), key=lambda item: (-item[1].itemsize, item[0])):
        begin, end = end, end + value.numel() * value.itemsize
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    told = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + 8 * math.ceil(told / 8) + end
