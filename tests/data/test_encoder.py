"""The encoder finds paraphrases, and what it computed is found again by content."""

import numpy as np
import pytest

from ftexp.config import Data, Dedup
from ftexp.data import encoder, hygiene
from ftexp.data.shapes import Row

PARAPHRASES = [
    ("How do I reset my password?", "What is the way to change a forgotten password?"),
    ("The cat sleeps on the sofa.", "A cat is sleeping on the couch."),
    ("He bought a new car yesterday.", "Yesterday he purchased a new automobile."),
]


@pytest.mark.slow
def test_paraphrases_are_close_and_other_texts_are_not():
    texts = [text for pair in PARAPHRASES for text in pair]
    vectors = encoder.embed(texts)
    assert vectors.shape == (6, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    cosines = vectors @ vectors.T
    for n in range(6):
        other = n + 1 if n % 2 == 0 else n - 1
        rest = [m for m in range(6) if m not in (n, other)]
        assert cosines[n, other] > 0.6 > 0.4 > cosines[n, rest].max()


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "kept"), [(0.8, 4), (0.9, 4), (0.95, 5)])
def test_of_five_texts_two_say_the_same(threshold, kept):
    """Their cosine is 0.912; no other pair comes to 0.2."""
    texts = ["The film was wonderful from start to finish.", "From beginning to end, the movie was wonderful.",
             "The recipe needs two eggs and a cup of flour.", "Her train to Vienna leaves at noon.",
             "Rust keeps memory safe without a garbage collector."]  # fmt: skip
    rows = [Row("", text, f"t:{n}") for n, text in enumerate(texts)]
    asked = Data(dedup=Dedup.semantic, dedup_threshold=threshold)
    left = hygiene.deduplicate({"train": rows}, asked)[0]["train"]
    assert len(left) == kept
    assert {row.where for row in left} >= {"t:2", "t:3", "t:4"}


@pytest.mark.slow
def test_padding_changes_no_vector(monkeypatch, tmp_path):
    texts = ["short", "a somewhat longer text about nothing in particular", "mid length text"]
    together = encoder._embedded(texts)
    for n, text in enumerate(texts):
        assert np.allclose(encoder._embedded([text])[0], together[n], atol=1e-5)


def test_vectors_are_kept_by_content(monkeypatch, tmp_path):
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path))
    calls = []

    def fake(texts):
        calls.append(texts)
        return np.full((len(texts), 2), len(calls), dtype=np.float32)

    monkeypatch.setattr(encoder, "_embedded", fake)
    assert (encoder.embed(["a", "b"]) == 1).all()
    assert (encoder.embed(["a", "b"]) == 1).all()
    assert (encoder.embed(["a", "c"]) == 2).all()
    assert len(calls) == 2
    assert not list((tmp_path / "embeddings").glob("*.part"))
