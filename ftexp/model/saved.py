"""What a run saved: its adapter put back on the base, merged into it, and a whole model read from a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftexp.config import Attention, Dtype, Format, Kind, Model, Quant, Run
from ftexp.errors import Damaged, MachineError
from ftexp.model import (
    Base,
    _greedy,
    _hooks,
    _quantization,
    _strip,
    answer_alone,
    attending,
    checksums,
    compute,
    forget,
    keep_gradients,
    loading,
    not_packed,
    origin,
    source,
    stored,
    wrapped,
)
from ftexp.progress import say
from ftexp.runs import Kept

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER = "adapter_config.json"
"""File that a folder with an adapter has."""
WEIGHTS = "adapter_model.safetensors"
"""The other one: what the adapter learned."""


def as_trained(kept: Kept, run: Run) -> tuple[Run, bool]:
    """Return a run's config with the number format and attention it was trained in, and whether the device is the same.

    On another device the config stays as it is: formats differ there.

    Raises:
        Damaged: the record of the run does not tell how it was computed.
    """
    if "compute" not in kept.trial.get("facts", {}):
        raise Damaged(f"{kept.folder / 'trial.json'}: is damaged, it lacks facts of its device; put it back")
    before, now = kept.trial["facts"]["compute"], compute.policy(run.model)
    if before["device"] != now.device:
        say(f"{kept.name} was trained on {before['device']} in {before['dtype']}; this is {now.device} in {now.dtype}, "
            "and its answers may differ in places")  # fmt: skip
        return run, False
    how: dict[str, Any] = {"dtype": Dtype(before["dtype"]), "attention": Attention(before["attention"])}
    return replace(run, model=replace(run.model, **how)), True


def check_weights(kept: Kept, run: Run, base: Base) -> None:
    """Refuse another base than the run's; packed weights may differ with the chip that packed them."""
    told = kept.trial["facts"]["weights_sha256"]
    if base.weights == told:
        return
    text = f"{kept.folder}: was trained on weights {told[:12]}, those of the base model are now {base.weights[:12]}"
    if run.quant.kind is Format.none:
        raise MachineError(text)
    say(f"warning: {text}; they are packed on load, and another chip may pack them otherwise")


@contextmanager
def restored(base: Base, folder: Path) -> Iterator[PeftModel]:
    """Lend out a base with the adapter of a folder, in evaluation mode, and take the adapter off again.

    Raises:
        MachineError: the folder holds no adapter of this base.
    """
    heads = {name: base.model.get_submodule(name) for name in wrapped(base.head)}
    forward, hooks = base.model.__dict__.get("forward"), _hooks(base.model)
    try:
        tuned = attached(base.model, folder)
    except BaseException:
        forget()  # half of the layers may be wrapped
        raise
    try:
        yield tuned
    finally:
        _strip(base, tuned, forward, hooks)
        for name, module in heads.items():  # peft leaves the trained one
            base.model.set_submodule(name, module.requires_grad_(False))
        if checksums(base.model) != base.sums:
            forget()


def attached(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter of a folder on a base, for good, in evaluation mode.

    Raises:
        MachineError: the folder holds no adapter of this base.
    """
    from peft import PeftModel

    for name in (ADAPTER, WEIGHTS):
        if not (folder / name).is_file():  # the library would ask the hub for a repository of the folder's name
            raise MachineError(f"{folder}: must hold an adapter; there is no {name}")
    try:
        return cast("PeftModel", PeftModel.from_pretrained(model, str(folder.absolute())).eval())
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        told = " ".join(str(error).split())[:300]
        raise MachineError(f"{folder}: the adapter does not fit its base model: {told}") from error


def merged(
    model: Model, folder: Path, labels: int = 0, packed: Quant | None = None, attention: str | None = None
) -> PreTrainedModel:
    """Load the base in float32, however the run stored it, and add the adapter to its weights; on the CPU.

    Sums in 16 bit would round twice, and sums with 4-bit weights would be rounded to 4 bit (peft#1043).

    Args:
        model: the base.
        folder: of the adapter.
        packed: how the weights are to be packed and unpacked before the sum, for an adapter that makes up for what
            that loses (LoftQ); None adds to the weights as they are stored.
        labels: outputs of a classification head; 0 for a language model.
        attention: its implementation by its name in transformers; None takes the policy's.

    Raises:
        MachineError: base or adapter cannot be loaded, or a merged weight is not finite.
    """
    import torch

    policy = compute.policy(model)
    plain = replace(policy, device="cpu", dtype="float32", attention=attention or policy.attention)
    base, _ = stored(model, packed or Quant(), plain, labels)
    if packed:
        base = cast("Any", base).dequantize(torch.float32)
    tuned: Any = attached(base, folder)
    _untied(base)
    try:
        made = tuned.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        raise MachineError(f"{folder}: the adapter cannot be merged: {error}") from error
    if not labels:
        made.generation_config = _greedy(made)
    return made.requires_grad_(False).eval()


def _untied(base: PreTrainedModel) -> None:
    """Give input embedding and output head a weight each where they share one and an adapter is on either.

    Merged into the shared weight, what one of them learned would change the other too.
    """
    import torch

    ends: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    plain = [getattr(end, "base_layer", end) for end in ends]
    if None in ends or plain[0].weight is not plain[1].weight or plain == ends:
        return
    plain[1].weight = torch.nn.Parameter(plain[1].weight.detach().clone(), requires_grad=False)
    base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False


def parts_ends(model: Model, base: PreTrainedModel) -> bool:
    """Tell whether an adapter on the way to a run made `_untied` part what is one weight in the model at its root.

    An adapter of single tokens (`trainable_token_indices`) parts nothing: it is on both ends alike.

    Args:
        model: the run.
        base: the model at its root; shapes are enough.
    """
    from safetensors import safe_open

    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    names = [f"base_model.model.{name}." for name, module in base.named_modules() if any(module is end for end in ends)]
    while model.kind is Kind.run:
        model, adapter = origin(model)
        if adapter is None:
            continue
        with loading(str(adapter)), safe_open(adapter / WEIGHTS, "pt") as file:
            kept = list(file.keys())
        if any(key.startswith((f"{name}weight", f"{name}lora_")) for key in kept for name in names):
            return True
    return False


def read(
    folder: Path, chosen: compute.Compute, labels: int = 0, nf4: bool = False, gguf: str | None = None,
    trained: Sequence[str] = (),
) -> Base:  # fmt: skip
    """Read a whole model from a folder, as anybody would; nothing of the run it was made from is in memory.

    Args:
        folder: with config, weights and tokenizer.
        chosen: device and number format to compute in.
        labels: outputs of its classification head; 0 for a language model.
        nf4: whether its weights are to be packed into 4 bit while they are read.
        gguf: name of the GGUF file that holds it all, where there is one.
        trained: names of modules that are not to be packed, beside a classification head.

    Raises:
        MachineError: a file of it is missing or broken, or names code or a file outside.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind: Any = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    file = {"gguf_file": gguf} if gguf else {}
    made_from = Model(kind=Kind.hub, path=str(folder))
    if gguf is None:
        source(made_from)  # refuses what leads out of the folder
    with loading(str(folder)), attending(chosen.attention):
        spared = _spared_head(kind, folder, trained) if nf4 and labels else None
        packing = _quantization(Quant(Format.nf4), chosen, spared) if nf4 else None
        more = {"quantization_config": packing} if packing else {}  # None hides the file's own
        model = kind.from_pretrained(
            folder,
            dtype=getattr(torch, chosen.dtype),
            attn_implementation=chosen.attention,
            device_map={"": 0} if chosen.device == "cuda" else None,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            **more,
            **file,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **file)
    model.requires_grad_(False).eval()
    keep_gradients(model)
    answer_alone(model)
    return Base(model, tokenizer, chosen, "", "", made_from)


def _spared_head(kind: Any, folder: Path, trained: Sequence[str]) -> list[str]:
    """Name the modules of a whole classifier that stay as they are: all beside its base model, and what was trained."""
    found = kind.from_pretrained(folder, device_map={"": "meta"}, trust_remote_code=False, local_files_only=True)
    beside = [name for name, _ in found.named_children() if name != found.base_model_prefix]
    return not_packed(found, (*beside, *trained))
