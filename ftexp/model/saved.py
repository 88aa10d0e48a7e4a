"""What a run saved: its adapter put back on the base, merged into it, and a whole model read from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftexp.config import Format, Kind, Model, Quant
from ftexp.errors import MachineError
from ftexp.model import Base, _greedy, _hooks, _pretrained, _quantization, _strip, compute, fingerprint, forget, tiny

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER = "adapter_config.json"
"""File that a folder with an adapter has."""


@contextmanager
def restored(base: Base, folder: Path) -> Iterator[PeftModel]:
    """Lend out a base with the adapter of a folder, in evaluation mode, and take the adapter off again.

    Raises:
        MachineError: the folder holds no adapter of this base.
    """
    heads = {name: base.model.get_submodule(name) for name in base.head}
    forward, hooks = base.model.__dict__.get("forward"), _hooks(base.model)
    try:
        tuned = _attached(base.model, folder)
    except BaseException:
        forget()  # half of the layers may be wrapped
        raise
    try:
        yield tuned
    finally:
        _strip(base, tuned, forward, hooks)
        for name, module in heads.items():  # peft leaves the trained one
            base.model.set_submodule(name, module.requires_grad_(False))
        if fingerprint(base.model) != base.weights:
            forget()


def _attached(model: PreTrainedModel, folder: Path) -> PeftModel:
    from peft import PeftModel

    if not (folder / ADAPTER).is_file():
        raise MachineError(f"{folder}: must hold an adapter; there is no {ADAPTER}")
    try:
        return cast("PeftModel", PeftModel.from_pretrained(model, str(folder)).eval())
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        told = " ".join(str(error).split())[:300]
        raise MachineError(f"{folder}: the adapter does not fit its base model: {told}") from error


def merged(model: Model, folder: Path, labels: int = 0, packed: Quant | None = None) -> PreTrainedModel:
    """Load the base in float32, however the run stored it, and add the adapter to its weights; on the CPU.

    Sums in 16 bit would round twice, and sums with 4-bit weights would be rounded to 4 bit (peft#1043).

    Args:
        model: the base.
        folder: of the adapter.
        packed: how the weights are to be packed and unpacked before the sum, for an adapter that makes up for what
            that loses (LoftQ); None adds to the weights as they are stored.
        labels: outputs of a classification head; 0 for a language model.

    Raises:
        MachineError: base or adapter cannot be loaded, or a merged weight is not finite.
    """
    import torch

    plain = replace(compute.policy(model), device="cpu", dtype="float32")
    if model.kind is Kind.tiny:
        base: Any = tiny.model(plain.attention, labels)
    else:
        base, _ = _pretrained(model, packed or Quant(), plain, labels)
        if packed:
            base = base.dequantize(torch.float32)
    tuned: Any = _attached(base, folder)
    try:
        made = tuned.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise MachineError(f"{folder}: the adapter cannot be merged: {error}") from error
    if not labels:
        made.generation_config = _greedy(made)
    return made.requires_grad_(False).eval()


def read(folder: Path, chosen: compute.Compute, labels: int = 0, nf4: bool = False, gguf: str | None = None) -> Base:
    """Read a whole model from a folder, as anybody would; nothing of the run it was made from is in memory.

    Args:
        folder: with config, weights and tokenizer.
        chosen: device and number format to compute in.
        labels: outputs of its classification head; 0 for a language model.
        nf4: whether its weights are to be packed into 4 bit while they are read.
        gguf: name of the GGUF file that holds it all, where there is one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind: Any = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    more = {"quantization_config": _quantization(Quant(Format.nf4), chosen)} if nf4 else {}  # None hides the file's own
    more |= {"gguf_file": gguf} if gguf else {}
    model = kind.from_pretrained(
        folder,
        dtype=getattr(torch, chosen.dtype),
        attn_implementation=chosen.attention,
        device_map={"": 0} if chosen.device == "cuda" else None,
        **more,
    )
    model.requires_grad_(False).eval()
    made_from = Model(kind=Kind.hub, path=str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
    return Base(model, tokenizer, chosen, "", "", made_from)
