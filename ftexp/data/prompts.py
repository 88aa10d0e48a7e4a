"""The one render: prompt and completion to token ids, for training, held-out loss and generation alike.

Prompt and completion are tokenised apart, so the ids the model is given when it generates are a prefix of the ids it
was trained on, whatever the tokenizer would merge across the border. Only the completion and its end-of-sequence are
supervised; no `{% generation %}` tags in the chat template are needed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ftexp.config import Data, Template
from ftexp.data.rows import Row
from ftexp.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Example:
    """A row as the model sees it."""

    row: Row
    """Where it comes from."""
    prompt: tuple[int, ...]
    """Token ids of the prompt; not supervised."""
    completion: tuple[int, ...]
    """Token ids of the completion, end-of-sequence included; all supervised."""

    @property
    def ids(self) -> list[int]:
        """Token ids of the whole row."""
        return [*self.prompt, *self.completion]


def template(tokenizer: PreTrainedTokenizerBase, data: Data) -> str | None:
    """Return the Jinja chat template in use, or None for plain text.

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
            return cast(str, tokenizer.chat_template)


def template_digest(tokenizer: PreTrainedTokenizerBase, data: Data) -> str:
    """Hash the template, to be stored with the run."""
    return hashlib.sha256((template(tokenizer, data) or "").encode()).hexdigest()


def render(rows: tuple[Row, ...], tokenizer: PreTrainedTokenizerBase, data: Data) -> list[Example]:
    """Tokenise rows.

    Raises:
        DataError: a row is longer than `data.max_length`, begins with two BOS tokens, or has a template that rewrites
            the prompt once the answer follows; the message starts with the row's place.
    """
    chat = template(tokenizer, data)
    return [_checked(_example(row, tokenizer, chat), tokenizer, data) for row in rows]


def _example(row: Row, tokenizer: PreTrainedTokenizerBase, chat: str | None) -> Example:
    if chat is None:
        prompt = _ids(tokenizer, row.prompt, special=True)
        while prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            prompt.pop()
        return Example(row, tuple(prompt), tuple(_closed(_ids(tokenizer, row.completion), tokenizer, row)))
    turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]
    asked = _templated(tokenizer, turns[:1], chat, row, add_generation_prompt=True)
    full = _templated(tokenizer, turns, chat, row)
    if not full.startswith(asked):
        raise DataError(
            f"{row.where}: the chat template changes the prompt once an answer follows; use another data.template"
        )
    return Example(
        row, tuple(_ids(tokenizer, asked)), tuple(_closed(_ids(tokenizer, full[len(asked) :]), tokenizer, row))
    )


def _templated(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], chat: str, row: Row, **more: Any
) -> str:
    from jinja2 import TemplateError

    try:
        return cast(str, tokenizer.apply_chat_template(turns, chat_template=chat, tokenize=False, **more))
    except TemplateError as error:
        raise DataError(f"{row.where}: the chat template cannot render this row: {error}") from error


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    return list(cast(list[int], tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]))


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """End a completion at its end-of-sequence token, or add one: a model never shown it never stops."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError("the tokenizer has no end-of-sequence token, so a model could never learn to stop")
    if eos not in ids:
        return [*ids, cast(int, eos)]
    first = ids.index(eos)
    if cast(str, tokenizer.decode(ids[first + 1 :])).strip():
        raise DataError(
            f"{row.where}: the completion goes on after an end-of-sequence token, which a model never would"
        )
    return ids[: first + 1]


def _checked(example: Example, tokenizer: PreTrainedTokenizerBase, data: Data) -> Example:
    where, length = example.row.where, len(example.ids)
    if length > data.max_length:
        raise DataError(
            f"{where}: a row must be at most data.max_length={data.max_length} tokens, this one has {length}"
        )
    bos = tokenizer.bos_token_id
    if bos is not None and example.ids[:2] == [bos, bos]:
        raise DataError(f"{where}: the row begins with two BOS tokens, one from the text and one from the tokenizer")
    if not example.prompt:
        raise DataError(f"{where}: the prompt has no tokens, so the first token of the completion cannot be predicted")
    return example
