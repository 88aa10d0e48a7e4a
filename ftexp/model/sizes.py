"""Parameters and bytes of a model with its adapter, counted on the meta device: no weight is made or loaded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ftexp import model as models
from ftexp.config import Format, Kind, Lora, Model, Quant, Variant
from ftexp.errors import ConfigError
from ftexp.model import architecture, saved

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
    """A model with a fresh adapter, or thawed weights, on the meta device, and what was counted on the way."""

    model: PeftModel | PreTrainedModel
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
    """Bytes of `adapter_model.safetensors`, or of `model.safetensors` where there is no adapter."""
    trained_file: int
    """The same in a checkpoint; half of it for PiSSA, whose saved adapter has twice the rank."""
    kept: dict[str, tuple[Any, list[int]]]
    """Format and shape of each tensor in a checkpoint's file, by its name."""
    changed: int
    """Bytes of base weights that training changes, so that a copy of them is kept."""
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

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        base = _base(model, dtype, attention, labels)
        head = _head(base, labels) if labels else ()
        matrices = quantized(base, head) if quant.kind is not Format.none else {}
        base.requires_grad_(False)
        full = lora.variant is Variant.none
        mine = models.thawed(base, lora.train, head) if full else []
        models.check_targets(base, lora.targets)
        whole, stored, plain = _footprint(base, matrices, quant), _scales(matrices, quant), _weight_bytes(base)
        tuned: Any = base if full else models.outlined(base, lora, head)
        for weight in mine:
            weight.requires_grad_(True)
        taken = [m.get_base_layer().weight for m in tuned.modules() if lora.variant is Variant.pissa and _adapts(m)]
    trained = [p for p in tuned.parameters() if p.requires_grad]
    counts = models.count(tuned)
    kept = _of_model(tuned) if full else _of_adapter(tuned)
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
        adapter_file=file_bytes(_saved(kept, lora.variant)),
        trained_file=file_bytes(kept),
        kept=kept,
        changed=sum(p.numel() * p.itemsize for p in (*mine, *taken)),
        unpacked=max(matrices.values(), default=0) * getattr(torch, dtype).itemsize,
    )


def check_adapter(model: Model, lora: Lora, labels: int = 0) -> None:
    """Refuse names that match no layer or weight, and what PiSSA cannot take out of one, before weights are loaded.

    Raises:
        ConfigError: names what was asked for and the nearest layer, or the layer and its size.
        MachineError: the config of the model cannot be read.
    """
    import torch

    if lora.targets == ["all-linear"] and lora.variant is not Variant.pissa and not lora.extra and not lora.train:
        return
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        base = _base(model, "float32", "eager", labels)
        head = _head(base, labels) if labels else ()
    models.thawed(base, lora.train, head)
    models.check_targets(base, lora.targets)
    if lora.variant is Variant.pissa:
        models.check_rank(base, lora, head)
    if lora.extra:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            models.outlined(base, lora, head)


def _base(model: Model, dtype: str, attention: str, labels: int) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = architecture.described(model)
    if labels:
        config.num_labels = labels
        config.get_text_config().pad_token_id = 0  # a head asks for one; which does not matter to sizes
    kind: Any = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    try:
        made = kind.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
        if labels or model.kind is not Kind.run or not saved.parts_ends(model, made):
            return made
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
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


def quantized(base: PreTrainedModel, head: tuple[str, ...] = ()) -> dict[str, int]:
    """Name the matrices that transformers hands to bitsandbytes, each with its number of weights.

    All linear layers but the output head and what is tied to it (`replace_with_bnb_linear`), and a fresh head.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    spared = models.not_packed(base, head)
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


def _adapts(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def between(one: Outline, other: Outline, ranks: tuple[int, int], lora: Lora) -> Outline:
    """Return the outline of a rank from those of two others; all of it lies on straight lines, but headers of files.

    Args:
        one: of the first rank.
        other: of the second.
        ranks: both.
        lora: the adapter, like theirs but for rank and alpha.
    """

    def at(name: str) -> int:
        return line(getattr(one, name), getattr(other, name), ranks, lora.r)

    kept = {
        name: (dtype, [line(a, b, ranks, lora.r) for a, b in zip(shape, other.kept[name][1], strict=True)])
        for name, (dtype, shape) in one.kept.items()
    }
    straight = ("weights", "footprint", "adapted", "trainable", "total", "packed", "flop_weights", "trained_bytes",
                "changed", "unpacked")  # fmt: skip
    return Outline(
        model=one.model,
        **{name: at(name) for name in straight},
        tensors=tuple(line(a, b, ranks, lora.r) for a, b in zip(one.tensors, other.tensors, strict=True)),
        adapter_file=file_bytes(_saved(kept, lora.variant)),
        trained_file=file_bytes(kept),
        kept=kept,
    )


def line(one: Any, other: Any, ranks: tuple[int, int], rank: int) -> Any:
    """Return the value at a rank of the straight line through two values, which are whole, or arrays of such.

    >>> line(10, 14, (4, 8), 5)
    11
    """
    low, high = ranks
    return one + (other - one) // (high - low) * (rank - low)


def _of_adapter(tuned: PeftModel) -> dict[str, tuple[Any, list[int]]]:
    """Format and shape of what `save_pretrained` of peft writes."""
    from peft import get_peft_model_state_dict

    return {name: (value.dtype, list(value.shape)) for name, value in get_peft_model_state_dict(tuned).items()}


def _saved(kept: dict[str, tuple[Any, list[int]]], variant: Variant) -> dict[str, tuple[Any, list[int]]]:
    """Return what a run saves: what a checkpoint has, of PiSSA with twice the rank."""
    if variant is not Variant.pissa:
        return kept
    saved = {name: (dtype, list(shape)) for name, (dtype, shape) in kept.items()}
    for name in (name for name in saved if "lora_" in name):
        saved[name][1][0 if "lora_A" in name else 1] *= 2
    return saved


def _of_model(base: PreTrainedModel) -> dict[str, tuple[Any, list[int]]]:
    """Format and shape of what `save_pretrained` of transformers writes: each weight once."""
    named = dict(base.named_parameters())  # tied weights are in it under their first name
    held = {name: value for name, value in base.state_dict().items() if name in named or name not in _tied(base)}
    return {name: (value.dtype, list(value.shape)) for name, value in held.items()}


def _tied(base: PreTrainedModel) -> set[str]:
    """Name the weights that are another's: parameters that stand in the model a second time."""
    every = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in base.named_parameters()}


def file_bytes(tensors: dict[str, tuple[Any, list[int]]]) -> int:
    """Bytes of a safetensors file, from the format and shape of each tensor by its name.

    8 bytes for the length of the header, the header as JSON padded to 8 bytes, and the weights, ordered by the width
    of their numbers and then by name (safetensors' `serialize`).
    """
    from safetensors.torch import _TYPES  # type: ignore

    names = {dtype: name for name, dtype in _TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [begin, end]}
    told = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + 8 * math.ceil(told / 8) + end
