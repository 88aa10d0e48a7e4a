"""Planted copies are found, all of them and nothing else, whatever the order of the rows."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftexp.config import Data, Dedup
from ftexp.data import hygiene
from ftexp.data.shapes import Row

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def sentence(r: random.Random, words=18) -> str:
    return " ".join("".join(r.choice(LETTERS) for _ in range(r.randint(3, 9))) for _ in range(words))


def originals(count=1000, seed=0):
    r = random.Random(seed)
    return [Row(sentence(r), sentence(r), f"o:{n}") for n in range(count)]


def planted(rows):
    """Seven copies that are equal after normalisation, five of them to the letter, and five with a word changed."""
    exact = [Row(r.prompt, r.completion, f"exact:{n}") for n, r in enumerate(rows[:4])]
    edited = [Row(rows[4].prompt.upper(), rows[4].completion, "case:0"),
              Row(rows[5].prompt.replace(" ", "  ") + "!", rows[5].completion, "signs:1"),
              Row(rows[6].prompt, "".join(chr(ord(c) + 0xFEE0) if c != " " else c for c in rows[6].completion), "width:2")]  # fmt: skip
    near = []
    for n, r in enumerate(rows[7:12]):
        words = r.completion.split()
        words[n] = "other"
        near.append(Row(r.prompt, " ".join(words), f"near:{n}"))
    return exact, edited, near


def dropped(rows, dedup, threshold=0.8):
    kept, copies = hygiene.deduplicate({"train": rows}, Data(dedup=dedup, dedup_threshold=threshold))
    assert len(kept["train"]) + len(copies) == len(rows)
    return copies


def test_twelve_of_twelve_planted_copies_are_found_and_none_in_a_thousand():
    rows = originals()
    exact, edited, near = planted(rows)
    mixed = [*rows, *exact, *edited, *near]
    random.Random(1).shuffle(mixed)
    assert len(dropped(mixed, Dedup.exact)) == 4
    assert len(dropped(mixed, Dedup.normalised)) == 7
    copies = dropped(mixed, Dedup.near)
    assert len(copies) == 12
    pairs = {frozenset((c.row.where.split(":")[0], c.of.where.split(":")[0])) for c in copies}
    assert all("o" in pair and len(pair) == 2 for pair in pairs)  # each is a copy of an original, or the reverse
    assert dropped(rows, Dedup.near) == []


def test_short_rows_under_one_long_prompt_are_kept_and_copies_among_them_left_out():
    from test_gates import under_one_prompt

    rows = under_one_prompt(6)
    near = [Row(r.prompt, r.completion + "s", f"n:{n}") for n, r in enumerate(rows[:9])]
    assert dropped(rows, Dedup.near) == []
    copies = dropped([*rows, *near], Dedup.near)
    assert {frozenset(w.split(":")[1] for w in (c.row.where, c.of.where)) for c in copies} == {
        frozenset({str(n)}) for n in range(9)}  # fmt: skip


def test_none_keeps_equal_rows():
    rows = originals(5)
    assert dropped([*rows, *rows], Dedup.none) == []


def test_sabotage_a_higher_threshold_misses_the_planted_ones():
    rows = originals(50)
    *_, near = planted(rows)
    assert len(dropped([*rows, *near], Dedup.near, 0.99)) == 0


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_result_does_not_depend_on_the_order(shuffler):
    rows = originals(30)
    exact, edited, near = planted(rows)
    chain = [Row("p", " ".join(f"word{m}" for m in range(n, n + 30)), f"c:{n}") for n in range(8)]  # each like the next
    mixed = [*rows, *exact, *edited, *near, *chain]
    text = {hygiene._key(r) for r in hygiene.deduplicate({"train": mixed}, Data(dedup=Dedup.near))[0]["train"]}
    shuffler.shuffle(mixed)
    assert {hygiene._key(r) for r in hygiene.deduplicate({"train": mixed}, Data(dedup=Dedup.near))[0]["train"]} == text


def test_no_two_kept_rows_are_alike_and_every_dropped_one_has_its_twin():
    r = random.Random(3)
    rows = [Row(f"p{n}", " ".join(r.choice(["red", "green", "blue", "white"]) for _ in range(7)), f"t:{n}") for n in range(400)]  # fmt: skip
    kept, copies = hygiene.deduplicate({"train": rows}, Data(dedup=Dedup.near, dedup_threshold=0.7))
    texts = [hygiene.pieces(hygiene.normalised(row)) for row in kept["train"]]
    worst = max(len(a & b) / len(a | b) for n, a in enumerate(texts) for b in texts[:n])
    assert worst < 0.7
    for copy in copies:
        assert copy.of in kept["train"]
        assert hygiene.likeness(hygiene.normalised(copy.row), hygiene.normalised(copy.of)) == copy.likeness >= 0.7


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_miss_few(threshold):
    """The formula of the book, and what happens: random sets of a known likeness."""
    count, rows = hygiene.bands(threshold)
    assert count * rows <= hygiene.HASHES
    assert (1 - threshold**rows) ** count < 1e-4
    r, missed = random.Random(0), 0
    pairs = []
    for _ in range(200):
        words = [sentence(r, 1) for _ in range(60)]
        changed = words[:]
        while hygiene.likeness(" ".join(words), " ".join(changed)) > threshold + 0.02 and threshold < 1:
            changed[r.randrange(60)] = sentence(r, 1)
        pairs += [" ".join(words), " ".join(changed)]
    keys = hygiene.band_keys(hygiene.minhashes(pairs), threshold)
    likes = [hygiene.likeness(*pairs[n : n + 2]) for n in range(0, 400, 2)]
    met = (keys[::2] == keys[1::2]).any(axis=1)
    missed = sum(not m for m, like in zip(met, likes, strict=True) if like >= threshold)
    assert missed == 0


def test_equal_hashes_estimate_the_likeness():
    r = random.Random(5)
    words = [sentence(r, 1) for _ in range(80)]
    for changed in (0, 5, 20, 60):
        other = words[: 80 - changed] + [sentence(r, 1) for _ in range(changed)]
        one, two = hygiene.minhashes([" ".join(words), " ".join(other)])
        exact = hygiene.likeness(" ".join(words), " ".join(other))
        assert (one == two).mean() == pytest.approx(exact, abs=0.15)


FROZEN = "b01bad18bfd188b9"


def test_hashes_are_frozen():
    """The same on every machine and version, or splits and kept rows would change."""
    least = hygiene.minhashes(["a robot", "", "한국어 🎉"])
    assert least.shape == (3, hygiene.HASHES)
    assert hashlib_of(least) == FROZEN


def hashlib_of(array: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(array.astype("<u4").tobytes()).hexdigest()[:16]


def test_pieces_do_not_reach_into_the_next_text(monkeypatch):
    alone = [hygiene.minhashes([text])[0] for text in ("abcdefg", "xy", "hijklmnop")]
    assert (hygiene.minhashes(["abcdefg", "xy", "hijklmnop"]) == np.stack(alone)).all()
    monkeypatch.setattr(hygiene, "CHUNK", 1)
    assert (hygiene.minhashes(["abcdefg", "xy", "hijklmnop"]) == np.stack(alone)).all()


def test_held_out_rows_are_kept_and_their_copies_in_training_go():
    row, other = originals(2)
    parts = {"train": [row, other], "valid": [row], "test": [row]}
    kept, copies = hygiene.deduplicate(parts, Data())
    assert {name: len(rows) for name, rows in kept.items()} == {"train": 1, "valid": 0, "test": 1}
    assert len(copies) == 2


def test_what_was_left_out_is_told_with_its_reason():
    rows = originals(20)
    exact, edited, near = planted(rows)
    copies = dropped([*rows, *exact, *edited, *near], Dedup.near)
    told = hygiene.told(copies, 32)
    assert told.startswith("left out 12 of 32 rows: 4 exact copies (exact:0 of o:0), 3 normalised copies (")
    assert "5 near copies (near:" in told.replace("o:", "near:")
    assert "likeness 0." in told


def test_rows_of_one_meaning_are_left_out_by_their_cosine(monkeypatch):
    """Vectors at 0, 30 and 90 degrees: cosines 0.866 and 0.5, by hand."""
    angles = {"a\nx": 0, "b\nx": 30, "c\nx": 90}
    rows = [Row(name[0], "x", f"t:{name[0]}") for name in angles]

    def embed(texts):
        radians = np.radians([angles[text] for text in texts])
        return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)

    monkeypatch.setattr(hygiene.encoder, "embed", embed)
    for shuffled in (rows, rows[::-1]):
        copies = dropped(shuffled, Dedup.semantic, 0.8)
        assert [{c.row.where, c.of.where} for c in copies] == [{"t:a", "t:b"}]
        assert copies[0].likeness == pytest.approx(3**0.5 / 2, abs=1e-4)
    assert dropped(rows, Dedup.semantic, 0.9) == []
    assert "1 semantic copies (" in hygiene.told(copies, 3)


def one_by_one(rows, vectors, threshold):
    """The same rule without blocks: (row, the kept row in its place) of what is left out."""
    order = sorted(rows, key=lambda row: hygiene._order((0, row)))
    kept, found = [], set()
    for row in order:
        cosines = [round(float(vectors[row.prompt] @ vectors[other.prompt]), 4) for other in kept]
        if cosines and max(cosines) >= threshold:
            found.add((row.where, kept[cosines.index(max(cosines))].where))
        else:
            kept.append(row)
    return found


@pytest.mark.parametrize(("block", "compared"), [(1, 1), (7, 5), (64, 16), (1024, 32_768)])
def test_blocks_leave_out_what_one_by_one_would(monkeypatch, block, compared):
    monkeypatch.setattr(hygiene, "BLOCK", block)
    monkeypatch.setattr(hygiene, "COMPARED", compared)
    drawn = np.random.default_rng(5).normal(size=(200, 6)).astype(np.float32)
    vectors = {f"p{n}": v / np.linalg.norm(v) for n, v in enumerate(drawn)}
    rows = [Row(name, "x", f"t:{name}") for name in vectors]
    monkeypatch.setattr(hygiene.encoder, "embed", lambda texts: np.stack([vectors[t.split("\n")[0]] for t in texts]))
    copies = dropped(rows, Dedup.semantic, 0.8)
    assert 40 < len(copies) < 160
    assert {(c.row.where, c.of.where) for c in copies} == one_by_one(rows, vectors, 0.8)


def test_the_same_row_object_twice_is_one_row():
    row = originals(1)[0]
    assert len(dropped([row, row, row], Dedup.exact)) == 2
