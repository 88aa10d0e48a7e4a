import hashlib
import json
import os
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftexp.config import Data, Dedup, Gate, Source
from ftexp.data import load, units
from ftexp.data.hygiene import normalise
from ftexp.data.rows import Row
from ftexp.data.splits import Splits, split
from ftexp.errors import DataError


def made(*prompts):
    return [Row(p, f"answer {n}", f"t:{n}") for n, p in enumerate(prompts)]


def test_no_prompt_is_in_two_splits():
    splits = load(Data(valid=64, test=32))
    train, valid, test = ({normalise(r.prompt) for r in part} for part in (splits.train, splits.valid, splits.test))
    assert not train & valid
    assert not train & test
    assert not valid & test
    assert (len(splits.valid), len(splits.test)) == (64, 32)


def test_edited_copies_of_a_prompt_stay_together():
    rows = made(*[f"row {n}" for n in range(40)], *[f"ROW  {n}!" for n in range(40)])
    splits = split(rows, Data(valid=10, test=10), "t")
    held = {normalise(r.prompt) for r in (*splits.valid, *splits.test)}
    assert not held & {normalise(r.prompt) for r in splits.train}


def test_sabotage_row_by_row_split_would_leak():
    """The twin of the test above: without grouping, the same rows do leak."""
    rows = made(*[f"row {n}" for n in range(40)], *[f"ROW  {n}!" for n in range(40)])
    held, train = rows[::4], [r for n, r in enumerate(rows) if n % 4]
    assert not {r.prompt for r in held} & {r.prompt for r in train}  # an exact comparison sees nothing
    rows = made(*[f"row {n}" for n in range(40)], *[f"ROW  {(n + 1) % 40}!" for n in range(40)])
    held, train = rows[::4], [r for n, r in enumerate(rows) if n % 4]
    assert {normalise(r.prompt) for r in held} & {normalise(r.prompt) for r in train}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([f"p{n}" for n in range(30)]), min_size=12, max_size=60),
    st.integers(0, 5),
    st.integers(0, 9),
)
def test_counts_add_up(prompts, test, seed):
    rows = made(*prompts) + made(*prompts)[:3]
    try:
        splits = split(rows, Data(valid=2, test=test, seed=seed), "t")
    except DataError:
        return
    parts = (splits.train, splits.valid, splits.test)
    assert sum(map(len, parts)) + splits.duplicates == splits.read == len(rows)
    assert len(splits.valid) == 2
    assert len(splits.test) == test


def test_repeats_are_left_out_and_counted():
    rows = [Row("a", "b", "t:0")] * 3 + made(*"cdefg")
    splits = split(rows, Data(valid=2), "t")
    assert splits.duplicates == 2


def test_seed_moves_the_split_and_nothing_else_does():
    one, same, other = (load(Data(valid=16, seed=s)) for s in (0, 0, 1))
    assert one.digest() == same.digest()
    assert one.digest() != other.digest()
    # frozen: the same rows on every machine and version
    assert one.digest().startswith("9a5740db7c8ea64f")


@pytest.mark.parametrize(
    ("count", "valid", "message"),
    [(4, 5, "data.valid=5 rows cannot be held out of 4"), (5, 5, "no row is left to train on")],
)
def test_too_few_rows_are_refused(count, valid, message):
    with pytest.raises(DataError, match=message):
        split(made(*[str(n) for n in range(count)]), Data(valid=valid), "t")


def test_one_prompt_with_many_answers_cannot_be_split():
    with pytest.raises(DataError, match="cannot be held out"):
        split(made(*["same"] * 9), Data(valid=3), "t")


def test_prompts_with_equally_many_answers_are_held_out_whole(capfd):
    rows = [Row(f"picture {n}", f"caption {n} {m}", f"t:{n}") for n in range(20) for m in range(5)]
    splits = split(rows, Data(valid=48), "t")
    assert (len(splits.valid), len(splits.train)) == (45, 55)
    assert not {r.prompt for r in splits.valid} & {r.prompt for r in splits.train}
    assert "valid: 45 rows of data.valid=48 are held out: rows of one prompt stay together" in capfd.readouterr().err
    with pytest.raises(DataError, match=r"data.valid=4 rows cannot be held out of 100 different rows: rows of one prompt "
                                        r"stay together, at least 5 of them; data.allow=\[leaks\] parts them"):  # fmt: skip
        split(rows, Data(valid=4), "t")
    assert len(split(rows, Data(valid=4, allow=[Gate.leaks]), "t").valid) == 4


def talks(count, turns=4, system=()):
    """Conversations stored one row a turn: a row for each answer, with all that was said before it."""
    rows = []
    for n in range(count):
        said = [*system]
        for m in range(turns):
            said += [("user", f"question {m} of talk {n}"), ("assistant", f"answer {m} of talk {n}")]
            turned = len(said) > 2
            told = "\n".join(f"{role}: {text}" for role, text in said[:-1]) if turned else said[0][1]
            rows.append(Row(told, said[-1][1], f"t:{n}.{m}", tuple(said) if turned else ()))
    return rows


def learned(rows):
    """Every answer with all that stands before it."""
    for row in rows:
        said = row.turns or (("user", row.prompt), ("assistant", row.completion))
        yield from ((row.where, said[: n + 1]) for n, (role, _) in enumerate(said) if role == "assistant")


@pytest.mark.parametrize("system", [(), (("system", "be brief"),)])
def test_no_held_out_answer_of_a_conversation_is_learned(system, capfd):
    rows = talks(30, system=system)
    splits = split(rows, Data(valid=20, test=10), "t")
    assert (len(splits.valid), len(splits.test)) == (20, 8)
    assert "rows of one prompt or conversation stay together, at least 4 of them" in capfd.readouterr().err
    known = {said for _, said in learned(splits.train)}
    assert not known & {said for _, said in learned((*splits.valid, *splits.test))}


def test_sabotage_prompts_alone_would_part_conversations():
    rows = talks(30)
    parted = split(rows, Data(valid=20, allow=[Gate.leaks]), "t")
    known = {said for _, said in learned(parted.train)}
    assert len({where for where, said in learned(parted.valid) if said in known}) > 10


def test_conversations_stay_together_where_they_branch_and_not_where_a_system_message_parts_them():
    one, two = talks(2, turns=2)[1::2]
    branch = replace(one, turns=(*one.turns[:2], ("user", "else?"), ("assistant", "yes")), prompt="else", where="t:b")
    edited = replace(branch, turns=(("user", "Question 0, of talk 0!"), *branch.turns[1:]), prompt="edited")
    other = replace(branch, turns=(("system", "be rude"), *branch.turns), prompt="rude")
    asked = replace(branch, turns=(one.turns[0], ("assistant", "no"), *branch.turns[2:]), prompt="asked")
    assert units([one, two, branch, edited, other, asked]) == [0, 1, 0, 0, 2, 3]


def test_conversations_that_share_no_opening_are_drawn_as_ever():
    """Frozen: the rows that were drawn before openings kept any together."""
    drawn = [f"t:{n}.1" for n in (0, 2, 4, 8, 22, 28, 33, 35)]
    rows = talks(40, turns=2)[1::2]
    held = split(rows, Data(valid=8), "t").valid
    assert [row.where for row in held] == drawn
    bare = [replace(row, turns=()) for row in rows]
    assert [row.where for row in split(bare, Data(valid=8), "t").valid] == drawn


def test_units_are_prompts_and_groups_and_texts_stand_alone():
    rows = [
        Row("Same?", "a", "t:0"), Row("same", "b", "t:1"), Row("other", "c", "t:2"), Row("", "one text", "t:3"),
        Row("", "another", "t:4"), Row("p", "d", "t:5", group="g"), Row("q", "e", "t:6", group="g"),
    ]  # fmt: skip
    told = units(rows)
    assert told[0] == told[1] != told[2]
    assert told[5] == told[6]
    assert len(set(told)) == 5


def test_shares_are_of_the_rows_that_are_left():
    rows = made(*map(str, range(50))) + made(*map(str, range(25)))  # 25 copies
    splits = split(rows, Data(valid=0.2, test=0.1), "t")
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (35, 10, 5)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(DataError, match=r"data\.valid=0\.01 rows cannot be held out of 20 different rows"):
        split(made(*map(str, range(20))), Data(valid=0.01), "t")


def test_sequential_split_is_that_of_the_recipe():
    """12344 rows, the first 80 % rounded up to train on: 9876 and 2468, in their order."""
    rows = made(*map(str, range(12344)))
    splits = split(rows, Data(valid=0.2, shuffle=False), "t")
    assert (len(splits.train), len(splits.valid)) == (9876, 2468)
    assert [*splits.train, *splits.valid] == rows


def test_sequential_test_rows_stand_behind_valid_rows():
    rows = made(*"abcdefgh")
    splits = split(rows, Data(valid=3, test=2, shuffle=False), "t")
    assert [r.prompt for r in splits.valid] == list("def")
    assert [r.prompt for r in splits.test] == list("gh")
    with pytest.raises(DataError, match="cannot be held out"):
        split(rows, Data(valid=5, test=4, shuffle=False), "t")


def grouped(count, groups, seed=0):
    r = random.Random(seed)
    return [Row(f"p{n}", f"c{n}", f"t:{n}", group=f"g{r.randrange(groups)}") for n in range(count)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99))
def test_a_group_is_never_parted(seed):
    rows = [*grouped(200, 40, seed), Row("P1!", "x", "t:x", group="g0"), Row("p2.", "x", "t:y", group="other")]
    splits = split(rows, Data(valid=20, test=20, group_by="g", seed=seed), "t")
    parts = (splits.train, splits.valid, splits.test)
    for keys in (lambda r: r.group, lambda r: normalise(r.prompt)):
        held = [{keys(r) for r in part} for part in parts]
        assert not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]
    assert all(10 <= len(part) <= 20 for part in parts[1:])


def test_sabotage_without_groups_they_are_parted():
    splits = split([replace(r, group="") for r in grouped(200, 40)], Data(valid=20), "t")
    group = {r.where: r.group for r in grouped(200, 40)}
    assert {group[r.where] for r in splits.valid} & {group[r.where] for r in splits.train}


def test_order_of_groups_is_of_no_account():
    rows = grouped(200, 40)
    one, other = (split(r, Data(valid=20, group_by="g"), "t") for r in (rows, rows[::-1]))
    assert {r.where for r in one.valid} == {r.where for r in other.valid}


def test_group_larger_than_what_is_held_out_is_told():
    rows = [replace(r, group="all") for r in made(*map(str, range(9)))]
    told = "cannot be held out of 9 different rows: rows of equal author stay together, in 1 group$"
    with pytest.raises(DataError, match=told):
        split(rows, Data(valid=3, group_by="author"), "t")
    rows[0] = replace(rows[0], group="other")
    with pytest.raises(DataError, match="stay together, in 2 groups$"):
        split(rows[:4], Data(valid=2, test=1, group_by="author"), "t")


@pytest.mark.parametrize(
    ("valid", "keys", "told"),
    [
        (3, {}, "1 different row$"),
        (3, {"shuffle": False}, "1 different row$"),
        (21, {"dedup": Dedup.none, "shuffle": False}, "20 rows, 1 different$"),
        (3, {"dedup": Dedup.none}, "20 rows, 1 different: equal rows .*, at least 20 of them; data.dedup=exact leaves"),
        (
            3,
            {"dedup": Dedup.none, "allow": [Gate.leaks]},
            "20 rows, 1 different: equal rows stay together, at least 20",
        ),
    ],
)
def test_equal_rows_are_not_told_as_different(valid, keys, told):
    with pytest.raises(DataError, match=f"^t: data.valid={valid} rows cannot be held out of {told}"):
        split([Row("a", "b", f"t:{n}") for n in range(20)], Data(valid=valid, **keys), "t")


def test_labels_are_held_out_in_proportion():
    """70, 20, 9 and 1 rows: a tenth of them is 7, 2 and 1, by hand (largest remainders)."""
    labels = ["a"] * 70 + ["b"] * 20 + ["c"] * 9 + ["d"]
    rows = [replace(r, stratum=labels[n]) for n, r in enumerate(made(*map(str, range(100))))]
    for seed in range(20):
        splits = split(rows, Data(valid=0.1, stratify_by="label", seed=seed), "t")
        assert Counter(r.stratum for r in splits.valid) == {"a": 7, "b": 2, "c": 1}


def test_sabotage_plain_draw_is_not_in_proportion():
    labels = ["a"] * 70 + ["b"] * 20 + ["c"] * 9 + ["d"]
    rows = [replace(r, stratum=labels[n]) for n, r in enumerate(made(*map(str, range(100))))]
    draws = {tuple(sorted(Counter(r.stratum for r in split(rows, Data(valid=0.1, seed=s), "t").valid).items()))
             for s in range(20)}  # fmt: skip
    assert len(draws) > 5


def test_given_splits_are_taken_whole(tmp_path):
    for name, rows in (("train", range(6)), ("valid", range(4, 9)), ("test", range(8, 10))):
        lines = [json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) for n in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    given = {"valid_path": str(tmp_path / "valid.jsonl"), "test_path": str(tmp_path / "test.jsonl")}
    splits = load(Data(kind=Source.file, path=str(tmp_path / "train.jsonl"), **given))
    assert [r.prompt for r in splits.test] == ["p8", "p9"]
    assert [r.prompt for r in splits.valid] == ["p4", "p5", "p6", "p7"]  # p8 is a test row
    assert [r.prompt for r in splits.train] == ["p0", "p1", "p2", "p3"]
    assert (splits.read, splits.dropped()) == (13, {"exact": 3})
    first = load(Data(kind=Source.file, path=str(tmp_path / "train.jsonl"), rows=2, **given))
    assert (len(first.train), len(first.valid), len(first.test)) == (2, 4, 2)


def test_turns_and_worse_answers_are_part_of_the_digest():
    rows = made(*"abcd")
    digests = {split([replace(rows[0], **more), *rows[1:]], Data(valid=1), "t").digest()
               for more in ({}, {"turns": (("user", "a"),)}, {"rejected": "no"})}  # fmt: skip
    assert len(digests) == 3


def test_digest_is_that_of_one_json_list():
    splits = split(made(*"abcdé"), Data(valid=1, test=1), "t")
    parts = [[(r.prompt, r.completion) for r in part] for part in (splits.train, splits.valid, splits.test)]
    assert splits.digest() == hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    each = [hashlib.sha256(json.dumps(part).encode()).hexdigest() for part in parts]
    assert splits.digests() == {"train": each[0], "valid": each[1]}  # the sealed rows have theirs in an opening alone


def test_sealed_digest_is_of_the_test_rows_alone_in_any_order():
    rows = made(*"abcdef")
    one = Splits(tuple(rows[:2]), tuple(rows[2:4]), tuple(rows[4:]), 6)
    other = Splits(tuple(rows[1:4]), tuple(rows[:1]), tuple(rows[:3:-1]), 6)
    assert one.sealed_digest() == other.sealed_digest()
    assert replace(one, test=tuple(rows[3:5])).sealed_digest() != one.sealed_digest()
    assert one.sealed_hashes() == other.sealed_hashes()
    assert len({*one.sealed_hashes(), *replace(one, test=tuple(rows[3:5])).sealed_hashes()}) == 3


def test_one_prompt_with_many_answers_can_be_parted_where_leaks_are_allowed():
    rows = made(*["same"] * 9)
    splits = split(rows, Data(valid=3, allow=[Gate.leaks]), "t")
    assert (len(splits.train), len(splits.valid)) == (6, 3)


def test_file_that_changed_is_loaded_anew_though_size_and_time_are_the_same(tmp_path):
    path = tmp_path / "a.jsonl"
    data = Data(kind=Source.file, path=str(path), valid=1)

    def put(word):
        path.write_text("\n".join(json.dumps({"prompt": f"{n} {word}", "completion": word * n}) for n in range(1, 9)))
        os.utime(path, ns=(0, 0))
        return load(data)

    one, other = put("cat"), put("dog")
    assert one.digest() != other.digest()
    assert put("cat") is one


def test_copies_are_told_once(tmp_path, capsys):
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join([json.dumps({"prompt": p, "completion": p}) for p in "abcdea"]))
    for _ in range(3):
        load(Data(kind=Source.file, path=str(path), valid=1))
    assert capsys.readouterr().err.count("left out 1 of 6 rows: 1 exact copies") == 1
