"""Records of a file -> rows: what the columns mean, and one row of text from each.

| shape      | columns                                                    | prompt                  | completion      |
|------------|------------------------------------------------------------|-------------------------|-----------------|
| completion | prompt, completion, or format strings                      | as it is                | as it is        |
| messages   | messages: role and content                                 | all before the answer   | the last answer |
| sharegpt   | conversations: from and value; perhaps system              | all before the answer   | the last answer |
| alpaca     | instruction, perhaps input and system, and output          | instruction, then input | output          |
| preference | prompt (perhaps in the answers), chosen, rejected          | prompt                  | chosen          |
| labels     | text, and label or labels: one or a list                   | text                    | joined by ", "  |
| text       | text, or the format string data.completion                 | none                    | all             |
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ftexp import config
from ftexp.config import Data, Shape
from ftexp.errors import DataError

COLUMNS = {
    Shape.completion: ("prompt", "completion"),
    Shape.messages: ("messages",),
    Shape.sharegpt: ("conversations",),
    Shape.alpaca: ("instruction", "output"),
    Shape.preference: ("chosen", "rejected"),
    Shape.labels: ("text", "labels"),
    Shape.text: ("text",),
}
"""What a shape is recognised by; the first that fits counts, so a set with `text` beside its parts is read by parts."""
ROLES = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip

CALLS = ("tool_calls", "function_call")
"""What a message of OpenAI's API has beside its text."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names of what a model thought before it wrote the text of a message."""
EARLIER = {
    Shape.messages: ("system", "history"),
    Shape.sharegpt: ("history",),
    Shape.alpaca: ("history",),
    Shape.preference: ("system", "history"),
}
"""Columns of other conventions with what was said before a row of a shape, which no part of it takes up."""

Turn = tuple[str, str]
"""Role and text."""


class StandIn(str):
    """An answer that a record has not, put there so that it is read as a row; messages do not name its column."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example, before any tokenizer has seen it."""

    prompt: str
    """What the model is given; of a conversation all before the last answer, to be read by people."""
    completion: str
    """What it should answer; without a prompt all of a text."""
    where: str
    """`file:line`, or the generator and number."""
    turns: tuple[Turn, ...] = ()
    """A conversation that is more than one question and its answer; every answer is supervised."""
    rejected: str = ""
    """The worse answer of a preference pair."""
    group: str = ""
    """Value of `data.group_by`."""
    stratum: str = ""
    """Value of `data.stratify_by`."""
    listed: bool = False
    """Whether the completion joins the labels of a list, with commas."""

    def text(self) -> str:
        """Return all the row says, for comparison with other rows."""
        return f"{self.prompt}\n{self.completion}" if self.prompt else self.completion

    def supervised(self) -> str:
        """Return all the text that is learned."""
        return "".join(text for role, text in self.turns if role == "assistant") or self.completion


def rows(records: Iterable[tuple[dict[str, Any], str]], data: Data) -> Iterator[Row]:
    """Convert records; their shape is that of the first one.

    Raises:
        DataError: a record lacks a column, or holds what is no text; the message starts with its place.
    """
    shape = None
    for record, where in records:
        record = _joined(_renamed(record, where, data))
        shape = shape or recognised(record, where, data)
        yield _row(record, where, shape, data)


def unread(record: dict[str, Any], where: str, data: Data) -> list[str]:
    """Name our names in `data.columns` that nothing reads of a record, as those of another shape than it has."""
    made = _joined(_renamed(record, where, data))
    shape = recognised(made, where, data)
    read = config.read_of(data, shape)
    if shape is Shape.messages:
        read -= {"prompt", "completion"}  # those that are read are in `messages` by now
    if shape is Shape.labels and "labels" in made:
        read -= {"label"}
    read |= {str(data.group_by), str(data.stratify_by)}
    return [ours for ours in data.columns if ours in made and ours not in read]


def unread_prompt(record: dict[str, Any], where: str, data: Data) -> str:
    """Return a text `prompt` that is not read, beside answers of messages none of which says the same; else nothing."""
    made = _joined(_renamed(record, where, data))
    prompt, answer = made.get("prompt"), made.get("chosen")
    if recognised(made, where, data) is not Shape.preference or not (
        isinstance(answer, list) and isinstance(prompt, str)
    ):
        return ""
    said = {text.strip() for role, text in _turns(made, "chosen", where)[:-1] if role == "user"}
    return prompt.strip() if prompt.strip() not in said else ""


def _joined(record: dict[str, Any]) -> dict[str, Any]:
    """Put a prompt that is a list of messages in front of its answers, as TRL's conversational sets part the two."""
    prompt = record.get("prompt")
    if not isinstance(prompt, list):
        return record
    answers = {
        name: record[name] for name in ("completion", "chosen", "rejected") if isinstance(record.get(name), list)
    }
    whole = {"messages" if name == "completion" else name: [*prompt, *answer] for name, answer in answers.items()}
    return {k: v for k, v in record.items() if k not in ("prompt", *answers)} | whole if whole else record


def recognised(record: dict[str, Any], where: str, data: Data) -> Shape:
    """Return the shape of a record: the one asked for, else by its columns."""
    if data.shape is not Shape.auto:
        return data.shape
    if (data.prompt, data.completion) != ("{prompt}", "{completion}"):
        return Shape.completion
    names = {"labels" if name == "label" else name for name in record}
    found = next((shape for shape, needed in COLUMNS.items() if names.issuperset(needed)), None)
    if found is None and not names & {"prompt", "completion"}:
        shapes = "; ".join(", ".join(needed) for needed in COLUMNS.values())
        raise DataError(
            f"{where}: the columns must have a known shape ({shapes}), got {_have(record)}; {_advice(data)}"
        )
    return found or Shape.completion


def _renamed(record: dict[str, Any], where: str, data: Data) -> dict[str, Any]:
    for ours, theirs in data.columns.items():
        if theirs not in record:
            _missing(theirs, record, where, f"data.columns.{ours} names it")
    others = {name: value for name, value in record.items() if name not in data.columns.values()}
    return others | {ours: record[theirs] for ours, theirs in data.columns.items()}


def _row(record: dict[str, Any], where: str, shape: Shape, data: Data) -> Row:
    match shape:
        case Shape.messages:
            made = _conversation(_turns(record, "messages", where), where)
        case Shape.sharegpt:
            made = _conversation(_begun(record, _turns(record, "conversations", where), where), where)
        case Shape.preference:
            made = _preference(record, where)
        case Shape.alpaca:
            given = "" if record.get("input") is None else _text(record, "input", where)
            asked = _text(record, "instruction", where)
            made = Row(f"{asked}\n\n{given}" if given.strip() else asked, _text(record, "output", where), where)
            begun = _begun(record, [("user", made.prompt), ("assistant", made.completion)], where)
            made = _conversation(begun, where) if made.prompt.strip() else made
        case Shape.labels:
            name = "label" if "label" in record and "labels" not in record else "labels"
            made = _labelled(record, name, where)
        case Shape.text:
            own = data.completion != "{completion}"
            made = Row(
                "", _filled(data.completion, record, where, data) if own else _text(record, "text", where), where
            )
        case _:
            texts = [_filled(template, record, where, data) for template in (data.prompt, data.completion)]
            made = Row(texts[0], texts[1], where)
    _check_earlier(record, made, shape, where)
    for part in ("completion",) if shape is Shape.text else ("prompt", "completion"):
        if not getattr(made, part).strip():
            raise DataError(f"{where}: the {part} must have text, got {getattr(made, part)!r}")
    if data.group_by is None and data.stratify_by is None:
        return made
    group, stratum = (
        "" if name is None else _value(record, name, where, f"{key} names it")
        for key, name in (("data.group_by", data.group_by), ("data.stratify_by", data.stratify_by))
    )
    return replace(made, group=group, stratum=stratum)


def _begun(record: dict[str, Any], turns: list[Turn], where: str) -> list[Turn]:
    """Put the column `system` in front of a conversation, as LLaMA-Factory reads ShareGPT's and Alpaca's rows."""
    told = "" if record.get("system") is None else _text(record, "system", where)
    if not told.strip() or turns[0] == ("system", told):
        return turns
    if turns[0][0] == "system":
        raise DataError(
            f"{where}: column 'system' must be empty or equal to the system message of the row, got {told!r:.60}"
        )
    return [("system", told), *turns]


def _check_earlier(record: dict[str, Any], row: Row, shape: Shape, where: str) -> None:
    """Refuse what was said before a row and would be left out; a system message may stand in a column once more."""
    for name in EARLIER.get(shape, ()):
        value = record.get(name)
        if isinstance(value, str) and (not value.strip() or row.turns[:1] == (("system", value),)):
            continue
        if value:
            way = "write it as the first message" if name == "system" else "write them as messages"
            raise DataError(
                f"{where}: column {name!r} must be empty with rows of {shape.value}, got {value!r:.60}: it is not "
                f"read; {way}, or take the column out"
            )


def _filled(template: str, record: dict[str, Any], where: str, data: Data) -> str:
    names = config.columns(template)
    return template.format(**{name: _text(record, name, where, _advice(data, name)) for name in names})


def _advice(data: Data, name: str | None = None) -> str:
    """Say how columns get the names that are wanted; a misspelt one of `data.columns` is named.

    Args:
        data: what was asked for.
        name: of the column that is missing; None where none is known.
    """
    known = {"label", "input", "system", *(name for needed in COLUMNS.values() for name in needed)}
    used = {*config.columns(data.prompt), *config.columns(data.completion), data.group_by, data.stratify_by}
    for ours in data.columns.keys() - used:
        if ours not in known and (near := difflib.get_close_matches(ours, known, n=1)):
            return f"data.columns.{ours} is no column that is read, did you mean data.columns.{near[0]}?"
    if data.columns and name is not None:
        return f"data.columns.{name} tells which column of the file it is"
    return "set data.prompt and data.completion" + (", or data.columns" if name is None else "")


def _missing(name: str, record: dict[str, Any], where: str, hint: str) -> None:
    raise DataError(f"{where}: column {name!r} is missing, the row has {_have(record)}" + (f"; {hint}" if hint else ""))


def _have(record: dict[str, Any]) -> str:
    """Name the columns of a record, but those of stand-ins."""
    own = (name for name, value in record.items() if not isinstance(value, StandIn))
    return ", ".join(own) or "none"


def _text(record: dict[str, Any], name: str, where: str, hint: str = "") -> str:
    if name not in record:
        _missing(name, record, where, hint)
    return _checked(record[name], f"column {name!r}", where)


def _checked(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} must be text, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {what} must be text, it holds half of a surrogate pair") from error
    if "\0" in value:
        raise DataError(f"{where}: {what} must be text, it holds a NUL character")
    return value


def _value(record: dict[str, Any], name: str, where: str, hint: str = "") -> str:
    """Return a label or key as text: text, a whole number, or a list of such, joined by commas."""
    if name not in record:
        _missing(name, record, where, hint)
    value = record[name]
    parts = value if isinstance(value, list) else [value]
    texts = [str(p) if type(p) is int else _checked(p, f"column {name!r}", where) for p in parts]
    if not texts or not all(text.strip() for text in texts):
        raise DataError(f"{where}: column {name!r} must hold a label, got {value!r:.60}")
    return ", ".join(texts)


def _labelled(record: dict[str, Any], name: str, where: str) -> Row:
    text, told = _text(record, "text", where), _value(record, name, where)
    value = record[name]
    if not isinstance(value, list):
        return Row(text, told, where)
    held = next((label for label in value if isinstance(label, str) and "," in label), None)
    if held is not None:
        raise DataError(
            f"{where}: a label in a list must have no comma, which parts labels, got {held!r}; write the labels of a "
            "row as one text, like 'war|Hong Kong, China', and set eval.labels='|'"
        )
    return Row(text, told, where, listed=True)


def check_separator(row: Row, separator: str | None) -> None:
    """Refuse labels of a list, which commas part, where they are to be parted by something else.

    Args:
        row: any row.
        separator: `eval.labels`.

    Raises:
        DataError: each combination of labels would be one label.
    """
    if row.listed and separator is not None and separator.strip() != ",":
        raise DataError(
            f"{row.where}: eval.labels must be ', ' or null where labels are a list, as in this row, got {separator!r}"
        )


def _turns(record: dict[str, Any], name: str, where: str) -> list[Turn]:
    """Read a list of messages, under the names of either convention; what would be left out of them is refused."""
    if name not in record:
        _missing(name, record, where, "")
    messages = record[name]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: column {name!r} must be a list of messages, got {messages!r:.60}")
    if record.get("tools"):
        raise DataError(f"{where}: column 'tools' must be empty: messages are rendered without tools")
    turns = []
    for number, message in enumerate(messages, 1):
        what = f"message {number} of {name!r}"
        if not isinstance(message, dict):
            raise DataError(f"{where}: {what} must have role and content, got {message!r:.60}")
        held = {key: value for key, value in message.items() if value is not None}  # parquet fills up with nulls
        if (call := next((key for key in CALLS if held.get(key)), None)) is not None:
            raise DataError(f"{where}: {what} must be text alone, it has {call!r}: no call of a tool is rendered")
        if (thought := next((key for key in THOUGHTS if held.get(key)), None)) is not None:
            raise DataError(
                f"{where}: {what} must be text alone, it has {thought!r}: no thoughts are rendered; write them into "
                "the text, as <think>...</think>, or take the key out"
            )
        theirs = "from" in held or ("from" in message and "role" not in message)
        keys = ("from", "value") if theirs else ("role", "content")
        for key in keys:
            if key not in held:
                got = f"its {key} is null" if key in message else f"got {', '.join(message) or 'none'}"
                raise DataError(f"{where}: {what} must have {keys[0]} and {keys[1]}, {got}")
        role, text = held[keys[0]], _checked(held[keys[1]], what, where)
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{where}: the role of {what} must be one of {', '.join(ROLES)}, got {role!r:.60}")
        if not text.strip():
            raise DataError(f"{where}: {what} must have text, got {text!r}")
        if ROLES[role] == "assistant" and held.get("weight", 1) != 1:
            raise DataError(
                f"{where}: 'weight' of {what} must be 1, got {held['weight']!r:.60}: every answer is learned"
            )
        turns.append((ROLES[role], text))
    return turns


def _conversation(turns: list[Turn], where: str) -> Row:
    roles = [role for role, _ in turns]
    if roles[-1] != "assistant":
        raise DataError(f"{where}: the last message must be the assistant's, it is the {roles[-1]}'s")
    if "user" not in roles[: roles.index("assistant")]:
        raise DataError(f"{where}: a message of the user must stand before the assistant's first")
    if "system" in roles[1:]:
        raise DataError(f"{where}: a system message must be the first, message {roles.index('system', 1) + 1} is one")
    if roles == ["user", "assistant"]:
        return Row(turns[0][1], turns[1][1], where)
    told = "\n".join(f"{role}: {text}" for role, text in turns[:-1])
    return Row(told, turns[-1][1], where, tuple(turns))


def _preference(record: dict[str, Any], where: str) -> Row:
    """Read a pair of answers: two texts under a prompt, or two conversations that differ in their last message."""
    for name in ("chosen", "rejected"):
        if name not in record:
            _missing(name, record, where, f"data.columns.{name} tells which column of the file it is")
    if isinstance(record["chosen"], str):
        if "prompt" not in record:
            _missing("prompt", record, where, "data.columns.prompt tells which column of the file it is")
        made = Row(_text(record, "prompt", where), _text(record, "chosen", where), where)
        worse = _text(record, "rejected", where)
    else:
        better, others = _turns(record, "chosen", where), _turns(record, "rejected", where)
        if better[:-1] != others[:-1]:
            raise DataError(f"{where}: chosen and rejected must be equal up to their last message")
        made, worse = _conversation(better, where), others[-1][1]
    if not worse.strip() or worse == made.completion:
        raise DataError(f"{where}: rejected must have text other than chosen, got {worse!r:.60}")
    return replace(made, rejected=worse)
