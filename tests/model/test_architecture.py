"""The described models have the parameters that their authors publish, and need no hub."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from ftexp import model, overrides
from ftexp.config import Kind, Model
from ftexp.errors import MachineError
from ftexp.model import architecture, embedded

PUBLISHED = {  # weights in the safetensors files of the hub; a tied head is stored once
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "NousResearch/Llama-2-7b-chat-hf": 6_738_415_616,
    "openai-community/gpt2": 124_439_808,
    "distilbert/distilbert-base-uncased": 66_362_880,
    "sentence-transformers/all-MiniLM-L6-v2": 22_713_216,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
}
ENCODERS = ("distilbert", "bert")


def counted(config) -> int:
    kind = AutoModel if config.model_type in ENCODERS else AutoModelForCausalLM
    with torch.device("meta"):
        return sum(p.numel() for p in kind.from_config(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_the_authors_publish(name):
    assert counted(architecture.described(Model(kind=Kind.hub, path=name))) == PUBLISHED[name]


def test_a_wrong_size_would_be_seen():
    config = architecture.described(Model(kind=Kind.hub, path="Qwen/Qwen2.5-0.5B"))
    config.num_key_value_heads *= 2
    assert counted(config) != PUBLISHED["Qwen/Qwen2.5-0.5B-Instruct"]


def test_every_described_model_has_its_sizes_checked():
    sizes = [json.dumps(architecture.known()[name], sort_keys=True) for name in PUBLISHED]
    free = ("max_position_embeddings", "sliding_window")  # no weights
    checked = {tuple(sorted((k, v) for k, v in json.loads(s).items() if k not in free)) for s in sizes}
    for name, told in architecture.known().items():
        assert tuple(sorted((k, v) for k, v in told.items() if k not in free)) in checked, name


def test_the_embedded_model_is_described_as_it_is_stored():
    told = architecture.described(Model()).to_dict()
    stored = json.loads((embedded.folder() / "config.json").read_text())
    for key, value in architecture.known()[architecture.EMBEDDED].items():
        assert told[key] == stored[key] == value


def test_nothing_is_fetched_for_a_described_model(monkeypatch):
    monkeypatch.setattr(model, "configuration", lambda _: pytest.fail("asked for files"))
    monkeypatch.setattr(embedded, "_acquire", lambda _: pytest.fail("fetched"))
    monkeypatch.setenv("FTEXP_CACHE", "nowhere")
    assert architecture.described(Model()).num_hidden_layers == 30
    assert not architecture.readable(Model())
    assert not architecture.readable(Model(kind=Kind.hub, path="mistralai/Mistral-7B-v0.1"))


def test_a_folder_is_read_and_an_unknown_id_is_told(tmp_path):
    made = architecture.described(Model(kind=Kind.tiny))
    made.save_pretrained(tmp_path)
    asked = Model(kind=Kind.hub, path=str(tmp_path))
    assert architecture.described(asked).hidden_size == made.hidden_size
    assert architecture.readable(asked)
    with pytest.raises(MachineError, match="no/such-model"):
        architecture.described(Model(kind=Kind.hub, path="no/such-model"))


NAMED = sorted(path for path in (overrides.CONF / "model").glob("*.yaml") if path.stem not in ("hub", "run"))
"""All but those that leave the model to `model.path`."""


@pytest.mark.parametrize("path", NAMED, ids=lambda p: p.stem)
def test_every_model_of_the_config_is_described(path, composed):
    chosen = composed(f"model={path.stem}").model
    assert chosen.kind is Kind.tiny or (chosen.path or architecture.EMBEDDED) in architecture.known()
    assert chosen.revision is None or len(chosen.revision) == 40
