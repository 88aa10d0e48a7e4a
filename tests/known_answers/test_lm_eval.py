"""Held-out loss is the log-likelihood of EleutherAI's lm-evaluation-harness, where that is installed."""

from dataclasses import replace

import pytest

from ftexp import evaluate, model
from ftexp.config import Data, Dtype, Eval, Kind, Model, Quant, Template
from ftexp.data import load, prompts

pytest.importorskip("lm_eval", reason="pip install lm-eval")


@pytest.fixture(scope="module")
def base():
    return model.load(Model(kind=Kind.tiny, dtype=Dtype.float32), Quant())


def rows(base, template):
    data = Data(max_length=256, template=template)
    return prompts.render(load(Data(rows=60, valid=12)).valid, base.tokenizer, data)


def ours(base, examples):
    return [e["nats"] for e in evaluate.held_out(base.model, base.tokenizer, examples, Eval(batch=5), "t")]


def theirs(base, examples, how):
    """From ids, or from text: prompt as context and completion as continuation, tokenised by the harness."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=base.model, tokenizer=base.tokenizer, backend="causal", batch_size=4, max_length=512)
    if how == "ids":
        told = harness._loglikelihood_tokens([(("", ""), list(e.prompt), list(e.completion)) for e in examples])
    else:
        texts = [(base.tokenizer.decode(e.prompt), base.tokenizer.decode(e.completion)) for e in examples]
        told = harness.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(texts)])
    return [-nats for nats, _ in told]


@pytest.mark.parametrize(
    ("template", "how"), [(Template.plain, "text"), (Template.plain, "ids"), (Template.model, "ids")]
)
def test_loss_is_the_log_likelihood_of_lm_evaluation_harness(base, template, how):
    examples = rows(base, template)
    assert ours(base, examples) == pytest.approx(theirs(base, examples, how), rel=1e-6)


def test_harness_scores_the_line_break_before_an_answer(base):
    """It moves white space from the end of a context into the continuation; we supervise the answer alone."""
    examples = rows(base, Template.model)
    told = theirs(base, examples, "text")
    assert ours(base, examples) != pytest.approx(told, rel=1e-3)
    assert base.tokenizer.decode(examples[0].prompt[-1:]) == "\n"
    moved = [replace(e, prompt=e.prompt[:-1], completion=e.prompt[-1:] + e.completion) for e in examples]
    assert ours(base, moved) == pytest.approx(told, rel=1e-6)
