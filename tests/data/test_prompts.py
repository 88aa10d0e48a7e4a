"""Ids and masks as a model would be taught them."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftexp.config import Data, Packing, Source, Template
from ftexp.data import prompts
from ftexp.data.shapes import Row
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


DATED = (
    "{% if not date is defined %}{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y, %A %-d %B, %H:%M') %}"
    "{% else %}{% set date = 'none' %}{% endif %}{% endif %}Today: {{ date }}\n"
    "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
)
"""As Llama 3.2 and SmolLM3 print the date."""


def test_template_that_prints_the_date_gives_a_row_the_same_tokens_on_any_day(monkeypatch):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = DATED
    row = Row("hello", "there", "t:1")
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert not plain.startswith("Today: 26 Jul 2024")  # what transformers would give, today
    text = tokenizer.decode(one(tokenizer, row, template=Template.model).prompt)
    assert text == "Today: 26 Jul 2024, Friday 26 July, 12:00\nhello\n"
    tokenizer.chat_template = DATED.replace("strftime_now", "other_name")
    assert tokenizer.decode(one(tokenizer, row, template=Template.model).prompt).startswith("Today: none")


def test_completion_that_goes_on_after_its_end_is_refused(tokenizer):
    row = Row("a", "hello <|im_end|> world", "my.jsonl:3")
    for template in (Template.plain, Template.model):
        with pytest.raises(DataError, match=r"my\.jsonl:3: the completion goes on after an end-of-sequence"):
            one(tokenizer, row, template=template)


def test_an_end_before_a_new_beginning_ends_a_turn_of_a_text(tokenizer):
    """As Llama 2 writes dialogues; a completion has no further turn."""
    text = "<|im_start|>a<|im_end|><|im_start|>b<|im_end|>"
    ids = one(tokenizer, Row("", text, "t:1"), template=Template.plain).ids
    assert tokenizer.decode(ids) == text
    with pytest.raises(DataError, match="t:1: the completion goes on after"):
        one(tokenizer, Row("p", text, "t:1"), template=Template.plain)
    with pytest.raises(DataError, match="t:1: the completion goes on after"):
        one(tokenizer, Row("", text.replace("<|im_end|><", "<|im_end|> <"), "t:1"), template=Template.plain)


def test_row_of_any_length_goes_into_torn_packs(tokenizer):
    long = Row("x" * 50, "y", "my.jsonl:7")
    assert len(one(tokenizer, long, max_length=8, packing=Packing.wrapped).ids) > 50
    with pytest.raises(DataError, match="a row must be at most"):
        one(tokenizer, long, max_length=8, packing=Packing.bfd)


@pytest.mark.parametrize(
    "wrong",
    ["messages[7]['content']", "raise_exception('no')", "messages(1)", "1 / 0", "{}.pop('a')", "'a'.index('b')",
     "strftime_now(day='%d')", "strftime_now('%d', 1)"],
)  # fmt: skip
def test_template_that_cannot_render_is_named(tokenizer, wrong):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = f"{{{{ {wrong} }}}}"
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


def test_tokenizer_digest_is_of_what_decides_ids_and_reads_a_vocabulary_once(monkeypatch):
    read, loads = [], json.loads
    monkeypatch.setattr(prompts, "_digests", {})
    monkeypatch.setattr(prompts.json, "loads", lambda text: read.append(text) or loads(text))
    one, other = tiny.tokenizer(), tiny.tokenizer()
    first = prompts.tokenizer_digest(one)
    assert prompts.tokenizer_digest(other) == first
    assert len(read) == 1
    other(["a", "b c"], padding=True, truncation=True, max_length=4)  # which a tokenizer keeps of a call
    assert prompts.tokenizer_digest(other) == first
    other.add_special_tokens({"additional_special_tokens": ["<x>"]})
    assert prompts.tokenizer_digest(other) != first
    ended = tiny.tokenizer()
    ended.eos_token = ended.bos_token if ended.bos_token != ended.eos_token else ended.convert_ids_to_tokens(0)
    assert ended.backend_tokenizer.to_str() == one.backend_tokenizer.to_str()
    assert prompts.tokenizer_digest(ended) != first
    told = loads(one.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    special = [one.bos_token_id, one.eos_token_id, sorted(one.all_special_ids)]
    whole = json.dumps([type(one).__name__, told, special])
    assert first == hashlib.sha256(whole.encode()).hexdigest()  # as it is in the records of earlier versions


def test_render_is_the_same_for_generated_rows():
    assert Data(kind=Source.yoda).prompt == "{prompt}"


TALK = (("system", "Be brief."), ("user", "Hi"), ("assistant", "yo"), ("user", "Bye"), ("assistant", "see ya"))
LONG = Row("told", "see ya", "t:1", TALK)


def supervised(tokenizer, example):
    return tokenizer.decode([i for i in example.labels if i != -100])


@pytest.mark.parametrize("template", [Template.model, Template.chatml])
def test_every_answer_of_a_conversation_is_supervised_and_nothing_else(tokenizer, template):
    example = one(tokenizer, LONG, template=template)
    assert supervised(tokenizer, example) == "yo<|im_end|>see ya<|im_end|>"
    assert tokenizer.decode(example.completion) == "see ya<|im_end|>"
    assert tokenizer.decode(example.ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nsee ya<|im_end|>"
    )
    assert example.supervised == sum(label != -100 for label in example.labels)
    assert 0 < example.supervised < len(example.ids)
    assert [i for i, label in zip(example.ids, example.labels, strict=True) if label not in (-100, i)] == []


def test_conversation_of_two_turns_is_the_row_it_says(tokenizer):
    turns = Row("Hi", "yo", "t:1", (("user", "Hi"), ("assistant", "yo")))
    plain, talk = one(tokenizer), one(tokenizer, turns)
    assert (plain.prompt, plain.completion, plain.labels) == (talk.prompt, talk.completion, talk.labels)


def test_sabotage_tags_of_a_template_would_mask_nothing(tokenizer):
    """What libraries rely on: without generation tags the mask of answers is empty."""
    turns = [{"role": role, "content": text} for role, text in TALK]
    made = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True, tokenize=True)
    assert not any(made["assistant_masks"])


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("<{{ m['role'] }}>{{ m['content'] }};", "yo;see ya;<|im_end|>"),  # ends turns by something else
        ("{{ m['content'] + eos_token }}", "yo<|im_end|>see ya<|im_end|>"),  # each answer, as Mistral does
    ],
)
def test_end_of_sequence_stays_where_the_template_has_it_in_a_conversation(answer, told):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{% if m['role'] == 'assistant' %}}{answer}"
        "{% else %}<{{ m['role'] }}>{{ m['content'] }};{% endif %}{% endfor %}"
    )
    if "<" in answer:
        tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    example = one(tokenizer, LONG)
    assert supervised(tokenizer, example) == told
    assert tokenizer.decode(example.ids).count("<|im_end|>") == told.count("<|im_end|>")


def test_template_that_rewrites_earlier_turns_is_refused():
    """Some templates drop the thoughts of all answers but the last."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}[thought]{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(DataError, match="t:1: the chat template changes the prompt"):
        one(tokenizer, LONG)


PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""Of microsoft/Phi-3-mini-4k-instruct."""


@pytest.mark.parametrize("row", [ROW, LONG, Row("p", "c", "t:1", (*TALK[1:], ("user", "No?"), ("assistant", "c")))])
def test_end_of_sequence_behind_all_turns_is_that_of_the_last_answer(row):
    """As Phi-3's template closes what it renders; ids are those of the whole conversation's render."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = PHI3
    example = one(tokenizer, row)
    told = row.turns or (("user", row.prompt), ("assistant", row.completion))
    turns = [{"role": role, "content": text} for role, text in told]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(example.ids) == whole
    assert example.ids == tokenizer(whole, add_special_tokens=False)["input_ids"]  # a token of this tokenizer is a byte
    answers = [text for role, text in told if role == "assistant"]
    assert supervised(tokenizer, example) == "".join(f"{text}<|end|>\n" for text in answers) + "<|im_end|>"
    asked = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(example.prompt) == asked


def test_conversation_needs_a_template(tokenizer):
    with pytest.raises(DataError, match=r"t:1: a conversation of several turns needs a template"):
        one(tokenizer, LONG, template=Template.plain)


def test_text_is_supervised_but_for_its_first_token(tokenizer):
    example = one(tokenizer, Row("", "abc", "t:1"))
    assert tokenizer.decode(example.prompt) == "a"
    assert supervised(tokenizer, example) == "bc<|im_end|>"
    assert example.bytes == 2


def test_text_behind_a_bos_is_supervised_whole(tokenizer):
    example = one(tokenizer, Row("", "<|im_start|>abc", "t:1"))
    assert tokenizer.decode(example.prompt) == "<|im_start|>"
    assert supervised(tokenizer, example) == "abc<|im_end|>"


def test_cut_conversation_keeps_the_answers_before_the_cut(tokenizer):
    from ftexp.config import Gate, Long

    whole = one(tokenizer, LONG)
    keys = {"long": Long.cut, "allow": [Gate.no_eos]}
    for most in range(60, len(whole.ids)):
        if not any(label != -100 for label in whole.labels[:most]):
            continue
        cut = one(tokenizer, LONG, max_length=most, **keys)
        assert cut.ids == whole.ids[:most]
        assert cut.labels == whole.labels[:most]
        assert cut.cut == whole.supervised - cut.supervised
        assert cut.supervised == sum(label != -100 for label in cut.labels)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text("ab \n", min_size=1), st.text("cd \n", min_size=1)), min_size=1, max_size=5))
def test_mask_of_any_conversation_is_its_answers(pairs):
    tokenizer = tiny.tokenizer()
    turns = tuple(turn for asked, answer in pairs for turn in (("user", asked), ("assistant", answer)))
    example = one(tokenizer, Row("p", pairs[-1][1], "t:1", turns), max_length=4096)
    assert supervised(tokenizer, example) == "".join(f"{answer}<|im_end|>" for _, answer in pairs)


def test_rows_that_go_together_have_the_ids_of_rows_alone(tokenizer):
    rows = tuple(
        (Row("Hi", f"yo {n}", f"t:{n}"), Row("", f"text {n}", f"t:{n}"),
         Row("all", "b", f"t:{n}", (("user", "u"), ("assistant", f"a{n}"), ("user", "v"), ("assistant", "b"))))[n % 3]
        for n in range(30)
    )  # fmt: skip
    alone = [prompts.render((row,), tokenizer, Data())[0] for row in rows]
    assert prompts.render(rows, tokenizer, Data()) == alone
    assert len({e.ids.__repr__() for e in alone}) == 30


def test_first_bad_row_is_named_though_a_later_one_fails_at_an_earlier_step(tokenizer):
    turns = Row("p", "a", "t:1", (("user", "p"), ("assistant", "a"), ("user", "q"), ("assistant", "b")))
    ending = Row("p", "a <|im_end|> b", "t:0")
    with pytest.raises(DataError, match="t:0: the completion goes on"):
        prompts.render((ending, turns), tokenizer, Data(template=Template.plain))
    with pytest.raises(DataError, match="t:1: a conversation of several turns"):
        prompts.render((turns, ending), tokenizer, Data(template=Template.plain))
