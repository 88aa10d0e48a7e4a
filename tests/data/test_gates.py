"""Each gate stops what it is for, lets through what is right, and can be switched off by its name."""

import json

import pytest
from test_hygiene import originals, planted

from ftexp.config import Data, Dedup, Gate, Long, Source, Template
from ftexp.data import gates, hygiene, load, prompts
from ftexp.data.shapes import Row
from ftexp.data.splits import Splits, split
from ftexp.errors import DataError
from ftexp.model import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def splits(train, valid, test=()):
    return Splits(tuple(train), tuple(valid), tuple(test), read=0)


def alike(held, rows):
    return gates.alike(held, rows, 0.8, gates.shared(held, rows))


def test_twelve_of_twelve_planted_leaks_are_found_and_none_in_a_thousand():
    rows = originals(1100)
    exact, edited, near = planted(rows)
    held = (*exact, *edited, *near, *rows[1000:])
    train = tuple(rows[:1000])
    found = {row.where for row, _, _ in (*gates.equal(held, train), *alike(held, train))}
    assert found == {row.where for row in (*exact, *edited, *near)}
    with pytest.raises(
        DataError,
        match=r"exact:0: 12 of 112 valid rows leak into the training rows, this one has the prompt of o:0; remove",
    ):
        gates.leaks(splits(train, held), Data())
    gates.leaks(splits(train, rows[1000:]), Data())
    gates.leaks(splits(train, held), Data(allow=[Gate.leaks]))


def test_near_copy_under_another_prompt_leaks():
    train = originals(20)
    words = (train[3].prompt + " zzz").split()
    row = Row(" ".join(words), train[3].completion, "v:1")
    with pytest.raises(DataError, match=r"v:1: 1 of 1 valid rows leak .* is a near copy \(likeness 0\.9\d\) of o:3"):
        gates.near_leaks(splits(train, [row]), Data())
    gates.near_leaks(splits(train, [row]), Data(dedup_threshold=1.0))


PROMPT = (
    "You are a careful assistant. Read the topic below and write one quotation about it, in the voice of its author, "
    "no longer than a sentence, without a title, a date or a remark of your own. Topic: "
)


def under_one_prompt(words, count=300, prompt=PROMPT):
    """Rows of a few random words each, all under one long prompt."""
    rows = originals(count, seed=3)
    cut = [(" ".join(r.prompt.split()[:words]), " ".join(r.completion.split()[:words])) for r in rows]
    return [Row(prompt + a, b, f"o:{n}") for n, (a, b) in enumerate(cut)]


@pytest.mark.parametrize("words", [1, 3, 18])
def test_short_rows_under_one_long_prompt_are_no_near_copies(words):
    rows = under_one_prompt(words)
    gates.near_leaks(splits(rows[:250], rows[250:]), Data())


def test_sabotage_prompt_that_counts_as_likeness_makes_copies_of_them(monkeypatch):
    monkeypatch.setattr(hygiene, "common", lambda texts: frozenset())
    rows = under_one_prompt(1)
    with pytest.raises(DataError, match="of 50 valid rows leak .* is a near copy"):
        gates.near_leaks(splits(rows[:250], rows[250:]), Data())


@pytest.mark.parametrize("dedup", [Dedup.exact, Dedup.near])
def test_prompt_of_all_rows_tells_nothing_of_few_held_out_ones(dedup):
    """Sixteen rows alone do not show what all share; those they are drawn from do."""
    rows = under_one_prompt(1)
    gates.near_leaks(splits(rows[16:], rows[:8], rows[8:16]), Data(dedup=dedup))


def test_prompt_of_the_held_out_files_alone_tells_nothing():
    rows = originals(300)
    held = under_one_prompt(1, 60)
    gates.near_leaks(splits(rows, held[:30], held[30:]), Data())


def test_near_copies_among_few_held_out_rows_still_leak():
    rows = under_one_prompt(6)
    copy = Row(rows[0].prompt.replace("Topic: ", "Topic: a "), rows[0].completion, "v:1")
    with pytest.raises(DataError, match=r"v:1: 1 of 8 test rows leak into the valid rows, this one is a near copy"):
        gates.near_leaks(splits(rows[16:], rows[:8], [copy, *rows[8:15]]), Data())


@pytest.mark.parametrize("scale", [1, 16])
def test_what_near_dedup_keeps_passes_the_gate(scale, monkeypatch):
    """With the copies 11 of 12 rows have the prompt, without them 22 of 25: what is common is that of before."""
    rows = under_one_prompt(6, 88 * scale) + originals(12 * scale, seed=5)
    rows += [Row(row.prompt, row.completion + "s", f"c:{n}") for n, row in enumerate(rows[: 44 * scale])]
    data, seen, common = Data(dedup=Dedup.near, valid=8, test=8), [], hygiene.common
    monkeypatch.setattr(hygiene, "common", lambda texts: seen.append(texts) or common(texts))
    made = split(rows, data, "t")
    assert {copy.kind for copy in made.copies} == {Dedup.near}
    assert len(made.copies) == 44 * scale
    gates.near_leaks(made, data)
    one, other = seen
    assert len(one) == 144 * scale
    assert other == one[:: -(-len(one) // hygiene.SAMPLE)]
    assert common(other)
    assert not hygiene.shared([*made.train, *made.valid, *made.test], (), data)  # sabotage: without the copies


@pytest.mark.parametrize("words", [6, 18])
def test_near_copy_under_the_prompt_of_all_rows_still_leaks(words):
    """Each planted copy has the last letter of its text changed; all are found, and nothing else."""
    rows = under_one_prompt(words)
    held = [Row(r.prompt, r.completion[:-1] + "#e", f"v:{n}") for n, r in enumerate(rows[:12])]
    held = [Row(r.prompt.replace("Topic: ", "Topic: a "), r.completion, r.where) for r in held]
    found = {row.where for row, _, _ in alike((*held, *rows[250:]), tuple(rows[:250]))}
    assert found == {r.where for r in held}


def test_rows_of_nothing_but_the_prompt_are_copies():
    """Where a row has no text of its own, all of it counts, and two such rows are equal."""
    rows = [*under_one_prompt(3), Row(PROMPT, "", "bare:0")]
    found = [(row.where, twin.where) for row, twin, _ in alike((Row(PROMPT, "", "v:0"),), tuple(rows))]
    assert found == [("v:0", "bare:0")]


def test_text_of_half_the_rows_is_not_taken_for_a_prompt():
    """Of rows that are copies of one text the leak is found: a prompt stands in nearly all rows."""
    rows, one = originals(40), originals(1, seed=9)[0]
    copies = [Row(one.prompt + f" {n}", one.completion, f"c:{n}") for n in range(40)]
    assert {row.where for row, _, _ in alike(tuple(copies[:3]), (*rows, *copies[3:]))} == {
        "c:0", "c:1", "c:2"}  # fmt: skip


def test_sealed_rows_may_leak_nowhere():
    rows = originals(9)
    with pytest.raises(DataError, match="of 1 test rows leak into the training rows"):
        gates.leaks(splits(rows, [], rows[:1]), Data())
    with pytest.raises(DataError, match="of 1 test rows leak into the valid rows"):
        gates.leaks(splits(rows[3:], rows[:2], rows[:1]), Data())


def test_group_in_two_splits_leaks():
    one, other = originals(2)
    one, other = (Row(r.prompt, r.completion, r.where, group="me") for r in (one, other))
    with pytest.raises(DataError, match="has the group 'me' of"):
        gates.leaks(splits([one], [other]), Data(group_by="author"))


def test_answer_of_a_longer_conversation_leaks():
    """Both ways: an answer that is scored was learned, as the last of a row or before others."""
    short = [Row(f"q{n}", f"a{n}", f"s:{n}") for n in range(3)]
    said = [
        (("user", row.prompt), ("assistant", row.completion), ("user", "and?"), ("assistant", "so")) for row in short
    ]
    longer = [Row(f"then {n}", "so", f"l:{n}", turns) for n, turns in enumerate(said)]
    told = (
        r"2 of 2 valid rows leak into the training rows, this one begins, up to an answer, with the turns of {}:0; put"
    )
    with pytest.raises(DataError, match="s:0: " + told.format("l")):
        gates.leaks(splits(longer[:2], short[:2]), Data())
    with pytest.raises(DataError, match="l:0: " + told.format("s")):
        gates.leaks(splits(short[:2], longer[:2]), Data())
    with pytest.raises(DataError, match="of 1 test rows leak into the valid rows"):
        gates.leaks(splits(short[2:], longer[:1], short[:1]), Data())
    gates.leaks(splits(longer[:2], short[2:]), Data())
    gates.leaks(splits(longer[:2], short[:2]), Data(allow=[Gate.leaks]))


def test_one_opening_of_all_rows_is_looked_at_once():
    """Of rows that all begin alike each is told once, not once for each row that it leaks into."""
    rows = [Row(f"r {n}", "so", f"r:{n}", (("user", "hi"), ("assistant", "hello"), ("user", f"{n}"), ("assistant", "so")))
            for n in range(300)]  # fmt: skip
    assert len(list(gates.equal(tuple(rows[:100]), tuple(rows[100:])))) == 100


def test_conversation_in_a_file_of_its_own_is_held_to_its_answers(tmp_path):
    said = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("user", "r"))]
    last = {"role": "assistant", "content": "b"}
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": said[:2]}))
    (tmp_path / "v.jsonl").write_text(json.dumps({"messages": [*said, last]}))
    keys = {"kind": Source.file, "path": str(tmp_path / "t.jsonl"), "valid_path": str(tmp_path / "v.jsonl")}
    with pytest.raises(
        DataError, match=r"v\.jsonl:1: 1 of 1 valid rows leak into the training rows, .*t\.jsonl:1; put"
    ):
        load(Data(**keys))


def test_sequential_split_of_repeated_prompts_is_stopped(tmp_path):
    lines = [f'{{"prompt": "topic {n % 5}", "completion": "quote {n} is {"xyz"[n % 3] * 9}"}}' for n in range(30)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    keys = {"kind": Source.file, "path": str(tmp_path / "q.jsonl"), "valid": 0.2}
    with pytest.raises(DataError, match=r"q\.jsonl:25: 5 of 6 valid rows leak|q\.jsonl:2\d: \d of 6 valid rows leak"):
        load(Data(**keys, shuffle=False))
    load(Data(**keys, shuffle=False, allow=[Gate.leaks]))


def rows_of(*lengths):
    return tuple(Row("a" * 4, "b" * n, f"r:{at}") for at, n in enumerate(lengths))


def render(tokenizer, rows, **keys):
    return prompts.render(rows, tokenizer, Data(template=Template.plain, max_length=32, **keys))


def test_long_row_is_refused_by_default(tokenizer):
    with pytest.raises(
        DataError,
        match=r"r:1: a row must be at most data\.max_length=32 tokens, this one has 45; data\.max_length=45 takes it",
    ):
        render(tokenizer, rows_of(5, 40))


def test_dropped_rows_are_counted_and_more_than_a_twentieth_is_refused(tokenizer, capsys):
    rows = rows_of(*[5] * 39, 40)
    assert len(render(tokenizer, rows, long=Long.drop)) == 39
    assert (
        "left out: 1 of 40 rows have more than data.max_length=32 tokens, the first is r:39"
        in capsys.readouterr().err.replace("\n", " ")
    )
    with pytest.raises(
        DataError, match=r"r:5: 2 of 7 rows have more than .*; more than 5% may be lost with data\.allow=\[lost\]"
    ):
        render(tokenizer, rows_of(5, 5, 5, 5, 5, 40, 41), long=Long.drop)
    assert len(render(tokenizer, rows_of(5, 40), long=Long.drop, allow=[Gate.lost])) == 1
    with pytest.raises(DataError, match="no row is left of 2"):
        render(tokenizer, rows_of(40, 40), long=Long.drop, allow=[Gate.lost])


def test_cut_rows_that_do_not_show_the_end_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"r:1: 1 of 2 rows lost their end-of-sequence token to data\.long=cut"):
        render(tokenizer, rows_of(5, 40), long=Long.cut)
    cut = render(tokenizer, rows_of(5, 40), long=Long.cut, allow=[Gate.no_eos])[1]
    assert len(cut.ids) == 32
    assert cut.supervised == cut.bytes == 28  # a token of this tokenizer is a byte
    assert tokenizer.eos_token_id not in cut.completion


def test_few_cut_rows_pass(tokenizer):
    assert len(render(tokenizer, rows_of(*[5] * 39, 40), long=Long.cut)) == 40


def test_row_without_supervised_tokens_is_refused(tokenizer):
    rows = (*rows_of(*[5] * 39), Row("a" * 40, "b", "r:x"))
    with pytest.raises(DataError, match=r"r:x: 1 of 40 rows have no supervised token within data\.max_length=32"):
        render(tokenizer, rows, long=Long.cut)
    kept = render(tokenizer, rows, long=Long.cut, allow=[Gate.unsupervised])
    assert len(kept) == 39
    assert all(example.supervised for example in kept)


def test_two_bos_are_refused_unless_allowed(tokenizer):
    row = (Row("<|im_start|><|im_start|>twice", "b", "t:1"),)
    with pytest.raises(DataError, match="t:1: the row begins with two BOS"):
        render(tokenizer, row)
    assert len(render(tokenizer, row, allow=[Gate.double_bos])) == 1


def test_no_rows_pass(tokenizer):
    assert render(tokenizer, ()) == []
