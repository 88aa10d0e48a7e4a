"""The prefix that rows share is read once, and changes neither their losses nor what is written after them."""

import pytest
import torch
from members import made
from torch.nn import functional

from ftexp import evaluate
from ftexp.config import Eval
from ftexp.data.prompts import Example
from ftexp.data.shapes import Row
from ftexp.model import prefix

FIRST = tuple(range(40, 60))
"""Twenty tokens in front of all rows."""


def example(prompt, completion, earlier=()):
    return Example(Row("", "", "test:0"), prompt, completion, earlier)


def rows(count: int = 9) -> list[Example]:
    """Draw rows of unequal length behind the same tokens."""
    draw = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, 97, (2 + n % 4,), generator=draw).tolist() for n in range(2 * count)]
    return [example((*FIRST, *a), tuple(b)) for a, b in zip(drawn[::2], drawn[1::2], strict=True)]


class Tokenizer:
    pad_token_id, eos_token_id = 0, 2


def losses(model, examples):
    return [e["nats"] for e in evaluate.held_out(model, Tokenizer(), examples, Eval(), "t")]  # type: ignore


def by_hand(model, one):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([one.ids])).logits[0, :-1].double()
    return functional.cross_entropy(logits, torch.tensor(one.labels[1:]), reduction="sum", ignore_index=-100).item()


@pytest.fixture
def read():
    """Return a function that counts the tokens which a model reads from then on."""

    def counted(model):
        told = []
        model.get_input_embeddings().register_forward_hook(lambda m, given, out: told.append(given[0].numel()))
        return told

    return counted


KINDS = {"Llama": True, "Qwen2": True, "Qwen3": True, "Mistral": False, "Gemma2": False}
"""Whether a model's keys of all tokens are kept: windows are counted in places, of which padding would take some."""


@pytest.mark.parametrize("name", KINDS)
def test_losses_are_those_of_whole_rows(name, read):
    model, examples = made(name, torch.float32), rows()
    expected, told = [by_hand(model, e) for e in examples], read(model)
    assert losses(model, examples) == pytest.approx(expected, rel=1e-5)
    padded = max(len(e.ids) for e in examples) * len(examples)
    assert (sum(told) < padded / 2) is KINDS[name]  # a quarter of a row is its own


@pytest.mark.parametrize("name", KINDS)
def test_completions_are_those_of_whole_rows(name, read):
    """Prompts of unequal length, whose padding stands behind what they begin with; half of the rows end early."""
    from transformers import GenerationConfig

    model, asked = made(name, torch.float32, initializer_range=1.0), [e.prompt for e in rows()]
    settings = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=list(range(1, 97, 5)))
    alone = [evaluate.continued(model, Tokenizer(), [a], settings, 1, "t")[0] for a in asked]  # type: ignore
    assert len({len(told) for told in alone}) > 1
    told = read(model)
    assert evaluate.continued(model, Tokenizer(), asked, settings, 9, "t") == alone  # type: ignore
    assert (told[0] == len(FIRST)) is KINDS[name]


def test_sabotage_places_that_begin_anew_behind_what_was_read(monkeypatch):
    model, examples = made("Llama", torch.float32, initializer_range=1.0), rows()
    real = evaluate.supervised_logits

    def shifted(scored, ids, mask, labels, positions=None, past=None):
        positions = None if past is None else torch.arange(ids.shape[1]).expand(*ids.shape)
        return real(scored, ids, mask, labels, positions, past)

    expected = [by_hand(model, e) for e in examples]
    monkeypatch.setattr(evaluate, "supervised_logits", shifted)
    assert losses(model, examples) != pytest.approx(expected, rel=1e-3)


def test_what_is_supervised_is_read_in_each_row():
    """Answers of earlier turns that rows share are predicted in each of them."""
    model = made("Llama", torch.float32)
    examples = [example(e.prompt, e.completion, ((6, 9),)) for e in rows()]
    assert losses(model, examples) == pytest.approx([by_hand(model, e) for e in examples], rel=1e-5)
    assert all(e.labels[6:9] == list(FIRST[6:9]) for e in examples)


def test_where_it_is_not_worth_it_or_depends_on_what_follows_rows_are_read_whole():
    llama, texts = made("Llama", torch.float32), [e.ids for e in rows()]
    width = max(map(len, texts))
    assert prefix.shared(llama, texts, 99, width) == 20
    assert prefix.shared(llama, texts, 12, width) == 12
    assert prefix.shared(llama, texts, 3, width) == 0  # a tenth of what is read
    assert prefix.shared(llama, texts[:1], 99, width) == 0
    assert prefix.shared(llama, [*texts, [1, 2, 3]], 99, width) == 0
    turning = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert prefix.shared(made("Llama", torch.float32, rope_parameters=turning), texts, 99, width) == 0


def test_a_model_that_keeps_what_it_read_elsewhere_reads_whole_rows(monkeypatch):
    from transformers import DynamicCache

    model, examples = made("Llama", torch.float32), rows()
    expected, real = [by_hand(model, e) for e in examples], model.model.forward

    def elsewhere(*args, past_key_values=None, **more):
        return real(*args, past_key_values=None if past_key_values is None else DynamicCache(), **more)

    monkeypatch.setattr(model.model, "forward", elsewhere)
    assert prefix.read(model, torch.tensor(FIRST)) is None
    assert losses(model, examples) == pytest.approx(expected, rel=1e-5)
