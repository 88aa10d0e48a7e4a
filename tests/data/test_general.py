"""General text: the manual that is always there, a file of one's own, and what of it is scored."""

import pytest

from ftexp.data import general
from ftexp.errors import DataError
from ftexp.model import tiny


def test_manual_is_prose_and_always_the_same():
    rows = general.passages("python-docs")
    assert len({row.completion for row in rows}) == len(rows) == general.PASSAGES
    assert all(200 <= len(row.completion) <= 400 and row.completion.endswith(".") for row in rows)
    assert general.digest(rows) == general.digest(general.passages("python-docs"))


def test_file_is_parted_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo\n \n\nthree\n", "utf-8")
    rows = general.passages(str(tmp_path / "a.txt"))
    assert [row.completion for row in rows] == ["one\ntwo", "three"]
    assert rows[1].where == f"{tmp_path}/a.txt, passage 2"
    assert general.digest(rows) != general.digest(rows[:1])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is none of that name"), (b"a\xff", "must be UTF-8, byte 1"), (b" \n", "must have text")],
)
def test_unusable_file_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        general.passages(str(tmp_path / "a.txt"))


def test_all_tokens_but_the_first_are_scored_and_no_end_is_added():
    tokenizer = tiny.tokenizer()
    made = general.render([general.Row("", "abc", "x:1")], tokenizer, 3)[0]
    assert tokenizer.decode([*made.prompt]) == "a"
    assert tokenizer.decode([*made.completion]) == "bc"
    assert tokenizer.eos_token_id not in made.ids


@pytest.mark.parametrize(("text", "limit"), [("a", None), ("abcd", 3)])
def test_passage_of_another_length_is_refused(text, limit):
    with pytest.raises(DataError, match="x:1: a passage of eval.forgetting must have"):
        general.render([general.Row("", text, "x:1")], tiny.tokenizer(), limit)
