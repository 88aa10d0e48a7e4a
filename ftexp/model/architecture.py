"""Shapes of models without their files: what is needed to count them, build them on the meta device and trace them.

`architectures.json` holds the sizes in the `config.json` of each preset model, keyed by hub id, so that a plan needs no
hub and works for `model=mistral_7b` and `model.path=mistralai/Mistral-7B-v0.1` alike; a string names the id with the
same sizes. It is no part of `conf/`: nobody sweeps over the width of a trained model.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftexp import model as models
from ftexp.config import Kind, Model
from ftexp.model import embedded, tiny

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FILE = Path(__file__).with_name("architectures.json")
EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub's name of the embedded model."""


@cache
def known() -> dict[str, dict[str, Any]]:
    """Read the sizes of the models that the project describes, by hub id."""
    told = json.loads(FILE.read_text())
    return {name: told[sizes] if isinstance(sizes, str) else sizes for name, sizes in told.items()}


def described(model: Model) -> PreTrainedConfig:
    """Return the config of a model, its own: a caller may change it.

    A folder is read where there is one; of a hub id that is not described here the hub's `config.json` is, some kB.

    Raises:
        MachineError: there is no such folder, or the hub does not answer.
    """
    from transformers import AutoConfig

    model = models.rooted(model)
    if model.kind is Kind.tiny:
        return tiny.configuration()
    name = EMBEDDED if model.kind is Kind.embedded else model.path
    if name in known() and not Path(name).is_dir():
        return AutoConfig.for_model(**known()[name])
    return models.configuration(model)


def readable(model: Model) -> bool:
    """Tell whether the tokenizer is on this machine, so that loading it fetches nothing."""
    model = models.rooted(model)
    if model.kind is Kind.tiny:
        return True
    if model.kind is Kind.embedded:
        return embedded.ready()
    if (Path(model.path).expanduser() / "config.json").is_file():
        return True
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.path, "tokenizer_config.json", revision=model.revision)
    return isinstance(found, str)
