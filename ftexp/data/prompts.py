"""The one render: prompt and completion to token ids, for training, held-out loss and generation alike.

Prompt and completion are tokenised apart, so the ids the model is given when it generates are a prefix of the ids it
was trained on, whatever the tokenizer would merge across the border. Only answers and their end-of-sequence are
supervised, of a conversation every answer; they are found by rendering the conversation up to each, so no
`{% generation %}` tags in the chat template are needed. A text without a prompt is taken as it is, without template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from ftexp.config import Data, Gate, Long, Packing, Template
from ftexp.data import chat, gates
from ftexp.data.shapes import Row
from ftexp.errors import ConfigError, DataError
from ftexp.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


TOGETHER = 1_000
"""Rows whose texts go to the tokenizer in one call."""


@dataclass(frozen=True)
class Example:
    """A row as the model sees it."""

    row: Row
    """Where it comes from."""
    prompt: tuple[int, ...]
    """Token ids up to the last answer: what the model is given when it writes."""
    completion: tuple[int, ...]
    """Token ids of the last answer, end-of-sequence included; all supervised."""
    earlier: tuple[tuple[int, int], ...] = ()
    """Begin and end of the answers of earlier turns within `prompt`; supervised too."""
    unseen: int = 0
    """Bytes of the row's text that are not supervised: nothing comes before them, or they were cut off."""
    cut: int = 0
    """Supervised tokens that were cut off."""

    @property
    def ids(self) -> list[int]:
        """Token ids of the whole row."""
        return [*self.prompt, *self.completion]

    @property
    def labels(self) -> list[int]:
        """Token ids of the whole row, -100 where they are not supervised."""
        labels = [-100] * len(self.prompt)
        for begin, end in self.earlier:
            labels[begin:end] = self.prompt[begin:end]
        return [*labels, *self.completion]

    @property
    def supervised(self) -> int:
        """Count the supervised tokens."""
        return len(self.completion) + sum(end - begin for begin, end in self.earlier)

    @property
    def bytes(self) -> int:
        """Count the bytes of the text that is supervised."""
        return len(self.row.supervised().encode()) - self.unseen


Steps = Generator[tuple[str, bool], Any, Example]
"""A row on its way: yields a text and whether special tokens go around it, is sent its ids, returns the example."""


def template(tokenizer: PreTrainedTokenizerBase, data: Data) -> str | None:
    """Return the Jinja chat template in use, or None for plain text; one that prints the date prints one day always.

    Raises:
        ConfigError: the tokenizer lacks the template, or the markers of the one that was asked for.
    """
    match data.template:
        case Template.plain:
            return None
        case Template.chatml:
            missing = {"<|im_start|>", "<|im_end|>"} - set(tokenizer.get_vocab())
            if missing:
                raise ConfigError(f"data.template=chatml needs the token {min(missing)}, which the tokenizer has not")
            return CHATML
        case Template.model:
            if not tokenizer.chat_template:
                raise ConfigError(
                    "data.template=model needs a chat template, which the tokenizer has not; use data.template=plain"
                )
            chat.check(cast(str, tokenizer.chat_template))
            return chat.dated(cast(str, tokenizer.chat_template))


def template_digest(tokenizer: PreTrainedTokenizerBase, data: Data) -> str:
    """Hash the template, to be stored with the run."""
    return hashlib.sha256((template(tokenizer, data) or "").encode()).hexdigest()


_digests: dict[str, str] = {}
"""Hash of what a tokenizer is written as -> its digest: a large vocabulary takes a second to be read and written."""


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides the ids of a text: vocabulary, merges, how text is cut, and the special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    name = type(tokenizer).__name__
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.all_special_ids)]
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    key = hashlib.sha256(f"{name} {special} {text}".encode()).hexdigest()
    if key not in _digests:
        told = json.loads(text)
        if isinstance(told, dict):
            told |= {"padding": None, "truncation": None}  # of the last call
        _digests[key] = hashlib.sha256(json.dumps([name, told, special]).encode()).hexdigest()
    return _digests[key]


def render(rows: tuple[Row, ...], tokenizer: PreTrainedTokenizerBase, data: Data) -> list[Example]:
    """Tokenise rows; what `data.long` and `data.allow` leave out is told.

    Raises:
        DataError: a row is longer than `data.max_length`, begins with two BOS tokens, or has a template that rewrites
            the prompt once the answer follows; the message starts with the row's place.
    """
    with progress("tokenising", len(rows)) as advance:
        made = examples(rows, tokenizer, data, advance)
    return gates.tokens(rows, made, end(tokenizer), data)


def examples(
    rows: tuple[Row, ...], tokenizer: PreTrainedTokenizerBase, data: Data, advance: Callable[[], None] = lambda: None
) -> list[Example | None]:
    """Tokenise rows, each for itself: None stands for one that was dropped for its length."""
    form = template(tokenizer, data)
    made = []
    for start in range(0, len(rows), TOGETHER):
        for found in _together([_example(row, tokenizer, form) for row in rows[start : start + TOGETHER]], tokenizer):
            if isinstance(found, DataError):
                raise found
            made.append(_fitted(_checked(found, tokenizer, data), tokenizer, data))
            advance()
    return made


def _together(steps: list[Steps], tokenizer: PreTrainedTokenizerBase) -> list[Example | DataError]:
    """Let rows go on step by step, and tokenise what all ask for at one step in one call.

    Ids are those of a call for each text; a call costs as much as the tokens of a short text.
    """
    done: dict[int, Example | DataError] = {}
    answers: dict[int, list[int] | None] = dict.fromkeys(range(len(steps)))
    while answers:
        asked: dict[bool, dict[int, str]] = {False: {}, True: {}}
        for n, ids in answers.items():
            try:
                text, special = steps[n].send(ids)
                asked[special][n] = text
            except StopIteration as end:
                done[n] = end.value
            except DataError as error:
                done[n] = error
        answers = {}
        for special, texts in asked.items():
            if texts:
                ids = tokenizer(list(texts.values()), add_special_tokens=special, verbose=False)["input_ids"]
                answers |= zip(texts, map(list, cast(Any, ids)), strict=True)
    return [done[n] for n in range(len(steps))]


def _example(row: Row, tokenizer: PreTrainedTokenizerBase, form: str | None) -> Steps:
    """Yield texts and whether special tokens go around them, get their ids, and return the example."""
    if not row.prompt:
        return (yield from _text(row, tokenizer))
    if form is None:
        if row.turns:
            raise DataError(f"{row.where}: a conversation of several turns needs a template, use data.template=chatml")
        prompt = yield row.prompt, True
        while prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            prompt.pop()
        return Example(row, tuple(prompt), tuple(_closed((yield row.completion, False), tokenizer, row)))
    return (yield from _conversation(row, tokenizer, form))


def _text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Steps:
    """Supervise a whole text but its first token, which nothing comes before where the tokenizer puts no BOS there."""
    ids = yield row.completion, True
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    first = ids[:1]
    unseen = 0 if first == [tokenizer.bos_token_id] else len(cast(str, tokenizer.decode(first)).encode())
    return Example(row, tuple(first), tuple(_closed(ids[1:], tokenizer, row, turns=True)), unseen=unseen)


def _conversation(row: Row, tokenizer: PreTrainedTokenizerBase, form: str) -> Steps:
    """Find every answer by rendering the conversation up to it, without and with the answer.

    Some templates, as Phi-3's, close whatever they render with an end-of-sequence, which is not there once the
    conversation goes on: it stays on the last answer alone.
    """
    told = row.turns or (("user", row.prompt), ("assistant", row.completion))
    turns = [{"role": role, "content": text} for role, text in told]
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    done, prompt, earlier, answer = "", [], [], []
    asked = _templated(tokenizer, turns[: answers[0]], form, row, add_generation_prompt=True)
    for n, later in zip(answers, [*answers[1:], None], strict=True):
        full = _templated(tokenizer, turns[: n + 1], form, row)
        then = "" if later is None else _templated(tokenizer, turns[:later], form, row, add_generation_prompt=True)
        if later is not None and not then.startswith(full):
            full = full.removesuffix(cast(str, tokenizer.eos_token or ""))
        for longer, shorter in ((asked, done), (full, asked)):
            if not longer.startswith(shorter):
                raise DataError(
                    f"{row.where}: the chat template changes the prompt once an answer follows; use another "
                    "data.template"
                )
        prompt += [*answer, *(yield asked[len(done) :], False)]
        answer = yield full[len(asked) :], False
        if later is not None:
            length = answer.index(end(tokenizer)) + 1 if end(tokenizer) in answer else len(answer)
            earlier.append((len(prompt), len(prompt) + length))
        done, asked = full, then
    return Example(row, tuple(prompt), tuple(_closed(answer, tokenizer, row)), tuple(earlier))


def _templated(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], form: str, row: Row, **more: Any
) -> str:
    from jinja2 import TemplateError

    try:
        return cast(str, tokenizer.apply_chat_template(turns, chat_template=form, tokenize=False, **more))
    except (TemplateError, *chat.FAULTS) as error:
        raise DataError(f"{row.where}: the chat template cannot render this row: {error}") from error


def end(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token, so a model could never learn to stop")
    return cast(int, tokenizer.eos_token_id)


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase, row: Row, turns: bool = False) -> list[int]:
    """End a completion at its end-of-sequence token, or add one: a model never shown it never stops.

    With `turns` one that a begin-of-sequence token follows ends a turn: Llama 2 writes dialogues so.
    """
    eos, bos = end(tokenizer), tokenizer.bos_token_id
    ends = [n for n, token in enumerate(ids) if token == eos and not (turns and ids[n + 1 : n + 2] == [bos])]
    if not ends:
        return [*ids, eos]
    first = ends[0]
    if cast(str, tokenizer.decode(ids[first + 1 :])).strip():
        raise DataError(
            f"{row.where}: the completion goes on after an end-of-sequence token, which a model never would"
        )
    return ids[: first + 1]


def _checked(example: Example, tokenizer: PreTrainedTokenizerBase, data: Data) -> Example:
    where, bos = example.row.where, tokenizer.bos_token_id
    if bos is not None and example.ids[:2] == [bos, bos] and Gate.double_bos not in data.allow:
        raise DataError(f"{where}: the row begins with two BOS tokens, one from the text and one from the tokenizer")
    if not example.prompt:
        raise DataError(f"{where}: the prompt has no tokens, so the first token of the completion cannot be predicted")
    return example


def _fitted(example: Example, tokenizer: PreTrainedTokenizerBase, data: Data) -> Example | None:
    length, most = len(example.prompt) + len(example.completion), data.max_length
    if length <= most or data.packing is Packing.wrapped:  # which tears rows of any length
        return example
    match data.long:
        case Long.drop:
            return None
        case Long.cut:
            return _cut(example, tokenizer, most)
        case Long.refuse:
            ways = "drop" if example.row.rejected else "drop or cut"  # a pair that is cut may differ no more
            raise DataError(
                f"{example.row.where}: a row must be at most data.max_length={most} tokens, this one has {length}; "
                f"data.max_length={length} takes it, data.long={ways} leaves out what is too long"
            )


def _cut(example: Example, tokenizer: PreTrainedTokenizerBase, most: int) -> Example:
    """Keep the first tokens of a row, and count the bytes of what is still supervised."""
    completion = example.completion[: max(0, most - len(example.prompt))]
    earlier = tuple((begin, min(end, most)) for begin, end in example.earlier if begin < most)
    learned = [*(example.prompt[begin:end] for begin, end in earlier), completion]
    text = "".join(cast(str, tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in learned)
    unseen = len(example.row.supervised().encode()) - len(text.encode())
    left = replace(example, prompt=example.prompt[:most], completion=completion, earlier=earlier, unseen=max(0, unseen))
    return replace(left, cut=example.supervised - left.supervised)
