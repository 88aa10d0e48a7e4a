"""Known answers about held-out loss and what is ranked by it."""

import json
import math

import pytest
import torch

from ftexp import evaluate, experiment, metrics, model
from ftexp.config import Data, Dtype, Eval, Kind, Model, Quant
from ftexp.data import load, prompts
from ftexp.errors import DataError
from ftexp.metrics import METRICS, Direction, Metric


@pytest.fixture(scope="module")
def base():
    return model.load(Model(kind=Kind.tiny, dtype=Dtype.float32), Quant())


@pytest.fixture(scope="module")
def examples(base):
    return prompts.render(load(Data(rows=60, valid=9)).valid, base.tokenizer, Data(max_length=256))


def of_row(logits, example, start):
    """Nats of a row whose first token stands at `start`: log-softmax in float64, token by token."""
    first = start + len(example.prompt)
    picked = logits[first - 1 : first - 1 + len(example.completion)].double().log_softmax(-1)
    return -picked.gather(1, torch.tensor(example.completion)[:, None]).sum().item()


@torch.no_grad()
def left_padded(base, examples, mask=True):
    width = max(len(e.ids) for e in examples)
    ids, real = torch.zeros(len(examples), width).long(), torch.zeros(len(examples), width).long()
    for n, e in enumerate(examples):
        ids[n, width - len(e.ids) :], real[n, width - len(e.ids) :] = torch.tensor(e.ids), 1
    places = (real.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": real, "position_ids": places} if mask else {}
    logits = base.model(ids, use_cache=False, **given).logits
    return [of_row(logits[n], e, width - len(e.ids)) for n, e in enumerate(examples)]


@torch.no_grad()
def packed(base, examples, restart=True):
    """All rows behind each other in one; positions that start again tell the model where rows end."""
    ids = torch.tensor([[i for e in examples for i in e.ids]])
    places = torch.tensor([[n for e in examples for n in range(len(e.ids))]])
    logits = base.model(ids, use_cache=False, **({"position_ids": places} if restart else {})).logits[0]
    starts = [sum(len(e.ids) for e in examples[:n]) for n in range(len(examples))]
    return [of_row(logits, e, start) for e, start in zip(examples, starts, strict=True)]


def nats(base, examples, batch=4):
    return [e["nats"] for e in evaluate.held_out(base.model, base.tokenizer, examples, Eval(batch=batch), "t")]


@pytest.mark.parametrize("batch", [1, 4, 37])
@pytest.mark.parametrize("layout", [left_padded, packed])
def test_left_padded_and_packed_rows_have_the_same_loss(base, examples, layout, batch):
    few = examples[:5]  # five rows fit in the positions of the tiny model
    assert nats(base, few, batch) == pytest.approx(layout(base, few), rel=1e-6)


@pytest.mark.parametrize("layout", [left_padded, packed])
def test_sabotage_padding_or_neighbours_in_sight_change_the_loss(base, examples, layout):
    few = examples[:5]
    assert nats(base, few) != pytest.approx(layout(base, few, False), rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_of_the_tokenizer_changes_nothing(base, examples, monkeypatch, side):
    before = nats(base, examples)
    written = evaluate.generate(base.model, base.tokenizer, examples[:4], Eval(max_new_tokens=8), "t")
    monkeypatch.setattr(base.tokenizer, "padding_side", side)
    assert nats(base, examples) == before
    assert evaluate.generate(base.model, base.tokenizer, examples[:4], Eval(max_new_tokens=8), "t") == written


def bits_of_two_tokenizers():
    """A fair coin for each of 8 bytes, told as 8 tokens of probability 1/2 or as 4 pairs of probability 1/4."""
    return [metrics.bits_per_byte([count * math.log(1 / p)], [8]) for count, p in ((8, 1 / 2), (4, 1 / 4))]


def test_bits_per_byte_does_not_depend_on_the_tokenizer():
    assert bits_of_two_tokenizers() == pytest.approx([1, 1])


def test_sabotage_perplexity_depends_on_the_tokenizer():
    told = [metrics.perplexity([count * math.log(1 / p)], [count]) for count, p in ((8, 1 / 2), (4, 1 / 4))]
    assert told == pytest.approx([2, 4])  # the same knowledge of the same text


def best_of_falling_perplexities():
    assert metrics.best([9.0, 5.0, 7.0], METRICS["valid/perplexity"].direction) == 1


def test_best_perplexity_is_the_lowest():
    best_of_falling_perplexities()


def test_sabotage_perplexity_taken_for_a_score_picks_the_worst(monkeypatch):
    """What transformers does with `metric_for_best_model="perplexity"`: any name without "loss" is maximized."""
    monkeypatch.setitem(METRICS, "valid/perplexity", Metric(Direction.maximize, ""))
    with pytest.raises(AssertionError):
        best_of_falling_perplexities()


def no_loss_without_tokens():
    try:
        told = metrics.loss([0.0], [0])
    except ValueError:
        return
    raise AssertionError(f"a loss of {told} was made of nothing")


def test_nothing_to_learn_is_refused(tiny, tmp_path):
    no_loss_without_tokens()
    rows = [json.dumps({"prompt": f"p{n}", "completion": " " if n else "one"}) for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: "):
        experiment.check(tiny("data=jsonl", f"data.path={tmp_path}/rows.jsonl", "data.valid=2"), None)


def test_sabotage_a_guarded_division_makes_the_best_loss_of_all(monkeypatch):
    """What Trainers report for rows without supervised tokens."""
    monkeypatch.setattr(metrics, "loss", lambda nats, tokens: sum(nats) / max(1, sum(tokens)))
    with pytest.raises(AssertionError, match=r"a loss of 0\.0"):
        no_loss_without_tokens()
