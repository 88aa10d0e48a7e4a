"""What the columns of a row mean, and the text that comes of it."""

import json

import pytest

from ftexp.config import Data, Shape, Source
from ftexp.data import rows, shapes
from ftexp.errors import DataError

TALK = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "Goodbye.")]


def messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


def sharegpt(turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[role], "value": text} for role, text in turns]


def one(record, **keys):
    return next(shapes.rows([(record, "t:1")], Data(**keys)))


@pytest.mark.parametrize(
    ("record", "shape", "prompt", "completion"),
    [
        ({"prompt": "a", "completion": "b"}, "completion", "a", "b"),
        ({"messages": messages(TALK[:2])}, "messages", "Hi", "Hello."),
        ({"conversations": sharegpt(TALK[:2])}, "sharegpt", "Hi", "Hello."),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca", "Add.\n\n1 2", "3"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "alpaca", "Add.", "3"),
        ({"instruction": "Add.", "input": None, "output": "3"}, "alpaca", "Add.", "3"),
        ({"instruction": "Add.", "output": "3", "text": "all of it"}, "alpaca", "Add.", "3"),
        ({"text": "a film", "labels": ["drama", "war"]}, "labels", "a film", "drama, war"),
        ({"text": "a film", "label": 3}, "labels", "a film", "3"),
        ({"text": "once upon a time"}, "text", "", "once upon a time"),
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "preference", "q", "good"),
        ({"prompt": "Hi", "chosen": messages(TALK[:2]), "rejected": messages([TALK[0], ("assistant", "No.")])},
         "preference", "Hi", "Hello."),
        ({"prompt": "id 7", "messages": messages(TALK[:2])}, "messages", "Hi", "Hello."),
    ],
)  # fmt: skip
def test_shape_is_recognised_and_converted(record, shape, prompt, completion):
    assert shapes.recognised(record, "t:1", Data()) is Shape(shape)
    row = one(record)
    assert (row.prompt, row.completion) == (prompt, completion)
    assert row.rejected == ({"good": "bad", "Hello.": "No."}[completion] if shape == "preference" else "")


@pytest.mark.parametrize("form", [messages, sharegpt])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_conversation_keeps_its_turns(form, column):
    row = one({column: form([("system", "Be brief."), *TALK])})
    assert row.turns == (("system", "Be brief."), *TALK)
    assert row.completion == "Goodbye."
    assert row.prompt == "system: Be brief.\nuser: Hi\nassistant: Hello.\nuser: Bye"
    assert row.supervised() == "Hello.Goodbye."


CALL = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("answer", "columns", "told"),
    [
        (
            {"tool_calls": [CALL], "content": None},
            {},
            "message 2 of 'messages' must be text alone, it has 'tool_calls'",
        ),
        ({"tool_calls": [CALL]}, {}, "message 2 of 'messages' must be text alone, it has 'tool_calls'"),
        ({"function_call": CALL["function"]}, {}, "message 2 of 'messages' must be text alone, it has 'function_call'"),
        ({}, {"tools": [CALL]}, "column 'tools' must be empty"),
        ({"reasoning_content": "Hm."}, {}, "message 2 of 'messages' must be text alone, it has 'reasoning_content'"),
        ({"reasoning": "Hm."}, {}, "message 2 of 'messages' must be text alone, it has 'reasoning': .*<think>"),
        ({"thinking": "Hm."}, {}, "message 2 of 'messages' must be text alone, it has 'thinking'"),
        ({"weight": 0}, {}, "'weight' of message 2 of 'messages' must be 1, got 0: every answer is learned"),
        ({"weight": 0.5}, {}, "'weight' of message 2 of 'messages' must be 1, got 0.5"),
    ],
)
def test_what_would_be_left_out_of_messages_is_refused(answer, columns, told):
    turns = messages(TALK)
    turns[1] |= answer
    with pytest.raises(DataError, match=f"^t:1: {told}"):
        one({"messages": turns, **columns})
    pair = {"prompt": turns[:1], "chosen": turns[1:2], "rejected": messages([("assistant", "No.")]), **columns}
    with pytest.raises(DataError, match=f"^t:1: {told.replace('messages', 'chosen')}"):
        one(pair)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"role": "assistant", "content": None}, "role and content, its content is null"),
        ({"role": None, "content": "b"}, "role and content, its role is null"),
        ({"from": "gpt", "value": None, "role": None, "content": None}, "from and value, its value is null"),
        ({"from": None, "value": "b"}, "from and value, its from is null"),
        ({"role": "assistant", "text": "b"}, "role and content, got role, text"),
    ],
)
def test_what_a_message_lacks_is_named(answer, told):
    with pytest.raises(DataError, match=f"^t:1: message 2 of 'messages' must have {told}$"):
        one({"messages": [*messages(TALK[:1]), answer]})


def test_messages_without_tools_may_have_their_empty_keys():
    turns = messages(TALK)
    turns[0] |= {"weight": 0, "tool_calls": None}
    turns[1] |= {"weight": 1, "tool_calls": [], "function_call": None, "thinking": "", "reasoning_content": None}
    turns[3] |= {"weight": None, "tool_calls": None}
    assert (
        one({"messages": turns, "tools": None})
        == one({"messages": turns, "tools": []})
        == one({"messages": messages(TALK)})
    )


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


@pytest.mark.parametrize("empty", [None, "", " \n"])
def test_system_prompt_in_a_column_is_the_first_turn_where_exports_have_it_so(empty):
    """As LLaMA-Factory writes ShareGPT's and Alpaca's rows; what it leaves empty is none."""
    asked = (("system", "Be brief."), ("user", "Add.\n\n1 2"), ("assistant", "3"))
    row = one(ALPACA | {"system": "Be brief."})
    assert (row.turns, row.completion, row.prompt) == (asked, "3", "system: Be brief.\nuser: Add.\n\n1 2")
    assert one(ALPACA | {"system": empty, "history": []}) == one(ALPACA)
    plain, begun = sharegpt(TALK), sharegpt([("system", "Be brief."), *TALK])
    row = one({"conversations": plain, "system": "Be brief."})
    assert row.turns == (("system", "Be brief."), *TALK)
    assert row == one({"conversations": begun, "system": empty})
    assert row == one({"conversations": begun, "system": "Be brief."})
    assert row == one({"conversations": plain, "how": "Be brief."}, columns={"system": "how"})


TEXTS = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"messages": messages(TALK), "system": "Be brief."},
         "column 'system' must be empty with rows of messages, got 'Be brief.': .*write it as the first message"),
        ({"messages": messages([("system", "Be long."), *TALK]), "system": "Be brief."}, "column 'system' must be empty"),
        ({"messages": messages(TALK), "history": [["a", "b"]]}, "column 'history' must be empty with rows of messages"),
        ({"conversations": sharegpt(TALK), "history": [["a", "b"]]}, "column 'history' must be .* rows of sharegpt"),
        (ALPACA | {"history": [["a", "b"]]}, r"column 'history' must be .* alpaca, got \[\['a', 'b'\]\]: .* as messages"),
        (TEXTS | {"system": "Be brief."}, "column 'system' must be empty with rows of preference"),
        ({"conversations": sharegpt([("system", "Be long."), *TALK]), "system": "Be brief."},
         "column 'system' must be empty or equal to the system message of the row, got 'Be brief.'"),
        ({"instruction": " ", "output": "3", "system": "Be brief."}, "the prompt must have text"),
        (ALPACA | {"system": 3}, "column 'system' must be text, got 3"),
    ],
)  # fmt: skip
def test_what_was_said_before_a_row_is_refused_where_it_would_be_left_out(record, told):
    with pytest.raises(DataError, match=f"^t:1: {told}"):
        one(record)


def test_system_prompt_may_stand_in_a_column_once_more():
    begun = messages([("system", "Be brief."), *TALK])
    assert one({"messages": begun, "system": "Be brief.", "history": None}) == one({"messages": begun})
    assert one({"prompt": "Of {system}", "completion": "b", "system": "x", "history": "y"}).turns == ()


def test_format_strings_win_over_a_shape():
    record = {"instruction": "Add.", "output": "3", "prompt": "p"}
    assert one(record, prompt="Do: {instruction}", completion="{output}!").completion == "3!"


def test_asked_shape_wins_over_the_recognised_one():
    record = {"prompt": "p", "completion": "c", "text": "whole"}
    assert one(record, shape=Shape.text).completion == "whole"
    assert one(record, shape=Shape.text, completion="{prompt}: {completion}").completion == "p: c"
    assert one(record, shape=Shape.text, completion="{prompt}: {completion}").prompt == ""
    with pytest.raises(DataError, match="t:1: column 'messages' is missing"):
        one(record, shape=Shape.messages)


def test_columns_are_mapped():
    record = {"synopsis": "a film", "genres": ["war"]}
    assert one(record, columns={"text": "synopsis", "labels": "genres"}).completion == "war"
    with pytest.raises(
        DataError, match=r"t:1: column 'plot' is missing, the row has synopsis, genres; data\.columns\.text"
    ):
        one(record, columns={"text": "plot"})


@pytest.mark.parametrize(
    ("columns", "more", "told"),
    [
        (
            {"promt": "q"},
            {},
            r"got a, promt; data\.columns\.promt is no column .*, did you mean data\.columns\.prompt\?$",
        ),
        ({"prompt": "q"}, {}, r"'completion' is missing, the row has a, prompt; data\.columns\.completion tells which"),
        ({"prompt": "q", "completoin": "a"}, {}, r"did you mean data\.columns\.completion\?$"),
        ({}, {}, r"got q, a; set data\.prompt and data\.completion, or data\.columns$"),
        ({"prompts": "q"}, {"prompt": "{prompts}"}, r"data\.columns\.completion tells which"),
    ],
)
def test_column_that_is_missing_is_told_with_what_was_likely_meant(columns, more, told):
    with pytest.raises(DataError, match=told):
        one({"q": "what?", "a": "that"}, columns=columns, **more)


@pytest.mark.parametrize(
    ("columns", "prompt", "completion"),
    [
        ({"prompt": "completion", "completion": "prompt"}, "c", "p"),
        ({"completion": "prompt", "prompt": "note"}, "n", "p"),
        ({"prompt": "note", "completion": "note"}, "n", "n"),
        ({"prompt": "prompt"}, "p", "c"),
    ],
)
def test_columns_are_all_taken_before_they_are_put(columns, prompt, completion):
    row = one({"prompt": "p", "completion": "c", "note": "n"}, columns=columns)
    assert (row.prompt, row.completion) == (prompt, completion)


def test_shape_is_that_of_the_first_row():
    with pytest.raises(DataError, match="t:2: column 'text' is missing"):
        list(shapes.rows([({"text": "a"}, "t:1"), ({"prompt": "a", "completion": "b"}, "t:2")], Data()))


def test_group_and_stratum_are_kept():
    row = one({"prompt": "a", "completion": "b", "by": "me", "kind": 4}, group_by="by", stratify_by="kind")
    assert (row.group, row.stratum) == ("me", "4")
    with pytest.raises(DataError, match=r"column 'by' is missing, .*; data\.group_by names it"):
        one({"prompt": "a", "completion": "b"}, group_by="by")


ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def test_prompts_of_messages_are_read_as_trl_writes_them():
    answer = [{"role": "assistant", "content": "a"}]
    whole = one({"messages": [*ASKED, *answer]})
    assert one({"prompt": ASKED, "completion": answer}) == whole
    assert one({"prompt": ASKED[1:], "completion": answer}) == shapes.Row("u", "a", "t:1")
    pair = {"chosen": answer, "rejected": [{"role": "assistant", "content": "b"}]}
    told = one({"prompt": ASKED, **pair})
    assert told == one({"chosen": [*ASKED, *answer], "rejected": [*ASKED, *pair["rejected"]]})
    assert (told.completion, told.rejected) == ("a", "b")


@pytest.mark.parametrize("prompt", ["Hi", " Bye\n", "", " ", None, 7])
def test_prompt_that_repeats_a_message_of_a_pair_adds_nothing(prompt):
    pair = {"chosen": messages(TALK), "rejected": messages([*TALK[:3], ("assistant", "No.")])}
    assert one({"prompt": prompt, **pair}) == one(pair)
    assert shapes.unread_prompt({"prompt": prompt, **pair}, "t:1", Data()) == ""


def test_label_in_a_list_that_would_be_parted_is_refused():
    told = (
        r"t:1: a label in a list must have no comma, which parts labels, got 'Macau, China'; .* set eval\.labels='\|'$"
    )
    with pytest.raises(DataError, match=told):
        one({"text": "a film", "labels": ["war", "Macau, China"]})
    assert one({"text": "a film", "labels": "war, drama"}).completion == "war, drama"
    grouped = {"text": "a film", "label": "war", "by": ["me, myself"]}
    assert one(grouped, group_by="by").group == "me, myself"


@pytest.mark.parametrize(("separator", "right"), [(None, True), (",", True), (", ", True), (";", False), (" ", False)])
def test_labels_of_a_list_are_parted_by_commas_alone(separator, right):
    row = one({"text": "a film", "labels": ["war", "drama"]})
    if right:
        shapes.check_separator(row, separator)
    else:
        with pytest.raises(
            DataError, match=rf"t:1: eval\.labels must be ', ' or null where .* list, .* {separator!r}$"
        ):
            shapes.check_separator(row, separator)
    shapes.check_separator(one({"text": "a film", "labels": "war;drama"}), separator)


def test_every_format_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [{"prompt": f"naïve {n}", "completion": "NA"} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "a.json").write_text(json.dumps(records))
    for ending, sep in (("csv", ","), ("tsv", "\t")):
        lines = [f"prompt{sep}completion"] + [f"{r['prompt']}{sep}{r['completion']}" for r in records]
        (tmp_path / f"a.{ending}").write_text("\n".join(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for ending in ("jsonl", "json", "csv", "tsv", "parquet"):
        for kind in (Source.file, Source(ending)):
            read = rows.read(Data(kind=kind, path=str(tmp_path / f"a.{ending}")))
            assert [(r.prompt, r.completion) for r in read] == [(r["prompt"], "NA") for r in records]
