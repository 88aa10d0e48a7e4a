"""LoftQ: an adapter that starts where it makes up for what 4-bit weights lost (Li et al. 2023, arXiv:2310.08659).

The packed base Q stays as it is, so what is saved is an adapter for it: B A starts as the best matrix of its rank for
W - Q, which is one round of the paper's algorithm 1 with its quantization done first. peft's
`replace_lora_weights_loftq` does the same on CUDA alone and leaves the scale alpha / r out, by which B A is multiplied;
its `init_lora_weights=loftq` puts another base in place of Q.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftexp.config import Model
from ftexp.errors import MachineError
from ftexp.progress import progress

if TYPE_CHECKING:
    import torch

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def start(tuned: Any, model: Model, folder: str) -> None:
    """Set the first weights of an adapter on every 4-bit matrix, from the weights as they are stored.

    The same for every seed: only order, dropout and noise of a training differ then.

    Args:
        tuned: a base in 4 bits with a fresh adapter.
        model: what the base was loaded from.
        folder: where that is: a folder or a hub id.

    Raises:
        MachineError: a weight is in no file of the model.
    """
    layers = dict(_packed(tuned))
    read = reader(folder, model.revision, tuned.get_base_model().base_model_prefix)
    with progress("LoftQ", len(layers)) as advance:
        for name, layer in layers.items():
            for adapter in layer.lora_A:
                lost = residual(layer, read(f"{name}.weight"))
                b, a = halves(lost, layer.r[adapter])
                for half, value in ((layer.lora_B, b), (layer.lora_A, a)):
                    weight = half[adapter].weight
                    weight.data.copy_(value / layer.scaling[adapter] ** 0.5)
            advance(1)


def _packed(tuned: Any) -> Iterator[tuple[str, Any]]:
    """Yield the layers that have an adapter on 4-bit weights, with the names of the layers below."""
    from peft.tuners.lora import LoraLayer

    for name, layer in tuned.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and hasattr(layer.get_base_layer().weight, "quant_state"):
            yield name, layer


def residual(layer: Any, stored: torch.Tensor) -> torch.Tensor:
    """Return what 4 bits lost of a weight, W - Q, (out, in) in float32 where the layer is.

    Args:
        layer: with an adapter.
        stored: the weight as its file has it; a `Conv1D` of GPT-2 has (in, out).
    """
    from bitsandbytes.functional import dequantize_4bit
    from transformers.pytorch_utils import Conv1D

    packed = layer.get_base_layer().weight
    kept = dequantize_4bit(packed.data, packed.quant_state).float()
    turned = issubclass(getattr(layer.get_base_layer(), "source_cls", object), Conv1D)
    return (stored.T if turned else stored).to(kept) - kept


def halves(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B (out, rank) and A (rank, in), whose product is the nearest matrix of that rank (Eckart and Young).

    By the eigenvectors of the smaller of M M^T and M^T M: a fifth of the time of a full decomposition.
    """
    import torch
    from torch.nn import functional

    wide = matrix.shape[0] <= matrix.shape[1]
    m = matrix if wide else matrix.T
    vectors = torch.linalg.eigh(m @ m.T).eigenvectors[:, -rank:].flip(1)  # (smaller side, rank), largest first
    other = vectors.T @ m  # (rank, larger side)
    root = other.norm(dim=1).clamp(min=1e-30).sqrt()  # roots of the singular values
    one, two = vectors * root, other / root[:, None]
    if (missing := rank - one.shape[1]) > 0:  # a matrix has no more than its smaller side, and is met exactly
        one, two = functional.pad(one, (0, missing)), functional.pad(two, (0, 0, 0, missing))
    return (one, two) if wide else (two.T, one.T)


def reader(folder: str, revision: str | None, prefix: str) -> Callable[[str], torch.Tensor]:
    """Return a function that reads a weight by its name from the safetensors files of a model, one at a time.

    Args:
        folder: a folder or a hub id.
        revision: branch, tag or commit of a hub model.
        prefix: what stands before names in the model and, of some models, not in their files.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(name: str, must: bool) -> Path | None:
        found = cached_file(folder, name, revision=revision, _raise_exceptions_for_missing_entries=must)
        return None if found is None else Path(found)

    index = find(INDEX, must=False)
    told = json.loads(index.read_text())["weight_map"] if index else None

    def read(name: str) -> torch.Tensor:
        for stored in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            file = WEIGHTS if told is None else told.get(stored)
            path = None if file is None else find(file, must=True)
            if path is None:
                continue
            with safe_open(path, framework="pt") as kept:
                if stored in kept.keys():  # noqa: SIM118, it is no mapping
                    return kept.get_tensor(stored)
        raise MachineError(f"lora=loftq needs the weights as they were before 4 bits; {folder} has no {name}")

    return read
