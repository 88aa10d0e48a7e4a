"""Ids and masks as a model would be taught them."""

import pytest

from ftexp.config import Data, Source, Template
from ftexp.data import prompts
from ftexp.data.rows import Row
from ftexp.errors import ConfigError, DataError
from ftexp.model import tiny

ROW = Row("Hi", "yo", "t:1")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def one(tokenizer, row=ROW, **keys):
    return prompts.render((row,), tokenizer, Data(**keys))[0]


@pytest.mark.parametrize("template", [Template.model, Template.chatml])
def test_only_the_answer_and_its_end_are_supervised(tokenizer, template):
    example = one(tokenizer, template=template)
    assert tokenizer.decode(example.prompt) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(example.completion) == "yo<|im_end|>"


def test_plain_text_ends_with_end_of_sequence(tokenizer):
    example = one(tokenizer, template=Template.plain)
    assert tokenizer.decode(example.prompt) == "Hi"
    assert tokenizer.decode(example.completion) == "yo<|im_end|>"


def test_generation_prompt_is_a_prefix_of_the_training_row(tokenizer):
    example = one(tokenizer)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert tuple(tokenizer(asked, add_special_tokens=False)["input_ids"]) == example.prompt
    assert tuple(example.ids[: len(example.prompt)]) == example.prompt


def test_end_is_supervised_though_it_pads(tokenizer):
    """pad == eos hides the stop token from collators that mask by token; ours masks by length."""
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert one(tokenizer).completion[-1] == tokenizer.eos_token_id


def test_row_that_is_too_long_is_named(tokenizer):
    with pytest.raises(DataError, match=r"my\.jsonl:7: a row must be at most data\.max_length=8 tokens, this one has"):
        one(tokenizer, Row("x" * 50, "y", "my.jsonl:7"), max_length=8)


def test_two_bos_are_refused(tokenizer):
    row = Row("<|im_start|><|im_start|>twice", "b", "t:1")
    with pytest.raises(DataError, match=r"t:1: the row begins with two BOS"):
        one(tokenizer, row, template=Template.plain)
    one(tokenizer, Row("<|im_start|>once", "b", "t:1"), template=Template.plain)


def test_template_that_rewrites_the_prompt_is_refused(tokenizer):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ messages|length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="changes the prompt"):
        one(tokenizer)


def test_completion_that_goes_on_after_its_end_is_refused(tokenizer):
    row = Row("a", "hello <|im_end|> world", "my.jsonl:3")
    for template in (Template.plain, Template.model):
        with pytest.raises(DataError, match=r"my\.jsonl:3: the completion goes on after an end-of-sequence"):
            one(tokenizer, row, template=template)


def test_template_that_cannot_render_is_named(tokenizer):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages[7]['content'] }}"
    with pytest.raises(DataError, match=r"t:1: the chat template cannot render this row"):
        one(tokenizer)


def test_missing_template_is_refused(tokenizer):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"use data\.template=plain"):
        one(tokenizer)


def test_chatml_needs_its_markers():
    from transformers import PreTrainedTokenizerFast

    plain = tiny.tokenizer()
    other = PreTrainedTokenizerFast(tokenizer_object=plain._tokenizer, eos_token="!")
    other.get_vocab = lambda: {"a": 0}
    with pytest.raises(ConfigError, match=r"needs the token <\|im_end\|>"):
        prompts.template(other, Data(template=Template.chatml))


def test_template_digest_tells_templates_apart(tokenizer):
    digests = {prompts.template_digest(tokenizer, Data(template=t)) for t in (Template.plain, Template.chatml)}
    assert len(digests) == 2


def test_render_is_the_same_for_generated_rows():
    assert Data(kind=Source.yoda).prompt == "{prompt}"
