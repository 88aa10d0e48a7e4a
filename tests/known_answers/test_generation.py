"""Known answers about completions."""

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from ftexp import evaluate, model
from ftexp.config import Data, Eval, Kind, Model, Quant
from ftexp.data import load, prompts


@pytest.fixture(scope="module")
def base():
    return model.load(Model(kind=Kind.tiny), Quant())


@pytest.fixture(scope="module")
def examples(base):
    return prompts.render(load(Data(rows=60, valid=10)).valid, base.tokenizer, Data(max_length=256))


@pytest.fixture
def noisy(base):
    """The base in training mode with NEFTune's hook on, as in the middle of training."""
    embeddings = base.model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    hook = embeddings.register_forward_hook(neftune_post_forward_hook)
    base.model.train()
    yield base
    hook.remove()
    del embeddings.neftune_noise_alpha
    torch.nn.Module.train(base.model, False)


def same_thrice(noisy, examples):
    how = Eval(max_new_tokens=16)
    written = [evaluate.generate(noisy.model, noisy.tokenizer, examples[:4], how, "t") for _ in range(3)]
    nats = [evaluate.held_out(noisy.model, noisy.tokenizer, examples[:4], how, "t") for _ in range(3)]
    assert written[0] == written[1] == written[2]
    assert nats[0] == nats[1] == nats[2]


def test_noise_of_training_never_reaches_completions(noisy, examples):
    same_thrice(noisy, examples)
    assert noisy.model.training  # and training goes on as it was


def test_sabotage_completions_in_training_mode_differ(noisy, examples, monkeypatch):
    monkeypatch.setattr(noisy.model, "eval", lambda: noisy.model)
    with pytest.raises(AssertionError):
        same_thrice(noisy, examples)


def three_empty_of_ten(base, examples):
    """Seven answers are right and three are empty: seven tenths, not seven sevenths."""
    scores = evaluate.score(base.model, base.tokenizer, examples, Eval(), "t").scores
    for name in ("exact_match", "jaccard", "f1", "chrf", "rouge_l"):
        assert scores[name] == pytest.approx(0.7)
    assert scores["unparsable"] == pytest.approx(0.3)
    assert scores["rows"] == 10


@pytest.fixture
def answers(examples, monkeypatch):
    written = [e.row.completion if n >= 3 else "" for n, e in enumerate(examples)]
    monkeypatch.setattr(evaluate, "generate", lambda *_: written)


def test_three_empty_answers_of_ten_count_as_wrong(base, examples, answers):
    three_empty_of_ten(base, examples)


def test_sabotage_leaving_empty_answers_out_flatters(base, examples, answers, monkeypatch):
    honest = evaluate.summary
    monkeypatch.setattr(evaluate, "summary", lambda table: honest([e for e in table if e["prediction"]]))
    with pytest.raises(AssertionError):
        three_empty_of_ten(base, examples)
