"""How an export is compared with its run: counts by hand, choices that rounding may turn, and each limit."""

import pytest
import torch

from ftexp import data, evaluate, experiment, fidelity, model
from ftexp.config import Dtype, Kind, Model, Quant
from ftexp.data import prompts
from ftexp.fidelity import Answers, Limit

LIMIT = Limit(0.02, 0.75)


def answers(loss=2.0, choices=((1, 2), (3, 4)), completions=("a", "b"), margin=1.0):
    rows = [list(row) for row in choices]
    return Answers(loss, rows, [[margin] * len(row) for row in rows], list(completions))


@pytest.mark.parametrize(
    ("after", "moved", "share", "equal", "kept"),
    [
        (answers(), 0.0, 1.0, 2, True),
        (answers(2.019), 0.019, 1.0, 2, True),
        (answers(1.981), 0.019, 1.0, 2, True),
        (answers(2.03), 0.03, 1.0, 2, False),  # worse
        (answers(1.97), 0.03, 1.0, 2, False),  # better is another model too
        (answers(choices=((1, 2), (3, 9))), 0.0, 0.75, 2, True),
        (answers(choices=((1, 9), (3, 9))), 0.0, 0.5, 2, False),
        (answers(completions=("a", "c")), 0.0, 1.0, 1, True),  # one early choice changes a whole completion: told alone
        (answers(float("nan")), None, 1.0, 2, False),
    ],
)
def test_each_limit_counts(after, moved, share, equal, kept):
    told = fidelity.compare(answers(), after, LIMIT)
    assert moved is None or told.moved == pytest.approx(moved)
    assert (told.choices, told.completions, told.compared, told.rows) == (share, equal, 2, 2)
    assert told.kept == kept


def test_choice_that_hangs_on_rounding_is_not_counted():
    near = Answers(2.0, [[1, 2, 3]], [[1.0, fidelity.NEAR / 2, 1.0]], [])
    assert fidelity.compare(near, answers(choices=((1, 9, 3),), completions=()), LIMIT).choices == 1
    sure = Answers(2.0, [[1, 2, 3]], [[1.0, fidelity.NEAR * 2, 1.0]], [])
    assert fidelity.compare(sure, answers(choices=((1, 9, 3),), completions=()), LIMIT).choices == pytest.approx(2 / 3)
    none = Answers(2.0, [[1]], [[0.0]], [])
    assert fidelity.compare(none, answers(choices=((2,),), completions=()), LIMIT).choices == 1


def test_choices_and_loss_of_a_model_are_those_of_a_plain_forward_pass(tiny):
    run = tiny()
    base = model.load(Model(kind=Kind.tiny, dtype=Dtype.float32), Quant())
    rows = prompts.render(data.load(run.data).valid[:4], base.tokenizer, run.data)
    told = fidelity.texts(base.model, base.tokenizer, rows, run.eval, "t")
    nats = tokens = 0
    for e, chosen, margins in zip(rows, told.choices, told.margins, strict=True):
        logits = base.model(torch.tensor([e.ids])).logits[0]
        places = [n - 1 for n, label in enumerate(e.labels) if label != -100]
        best = logits[places].topk(2)
        assert chosen == best.indices[:, 0].tolist()
        assert margins == pytest.approx((best.values[:, 0] - best.values[:, 1]).tolist(), abs=1e-5)
        nats -= logits.log_softmax(-1)[places, [e.ids[n + 1] for n in places]].sum().item()
        tokens += len(places)
    assert told.loss == pytest.approx(nats / tokens, rel=1e-5)
    longest = sorted(rows, key=lambda e: -len(e.prompt))
    assert told.completions == evaluate.generate(base.model, base.tokenizer, longest, run.eval, "t")


def test_classifier_decisions_are_those_of_its_thresholds(tiny):
    from ftexp.train import classify

    for many in (True, False):
        run = tiny("data=genres", "trainer=classify", *([] if many else ["trainer.multi_label=false", "data.prompt='{text}'",
                   "data.completion='{labels}'"]))  # fmt: skip
        if not many:
            rows = [classify.Example(e.row, e.ids, frozenset(sorted(e.labels)[:1])) for e in
                    experiment.classified(tiny("data=genres", "trainer=classify"), data.load(tiny("data=genres", "trainer=classify").data))[1]]  # fmt: skip
            known = classify.names(rows)
        else:
            _, rows, known = experiment.classified(run, data.load(run.data))
        base = model.load(Model(kind=Kind.tiny, dtype=Dtype.float32), Quant(), len(known))
        torch.manual_seed(0)
        head = base.model.get_submodule("score")
        torch.nn.init.normal_(head.weight)
        limits = dict.fromkeys(known, 0.3) if many else {}
        told = fidelity.decisions(base.model, base.tokenizer, rows, run.eval, "t", known, limits, many)
        model.forget()
        raw = classify.logits(base.model, base.tokenizer, rows, run.eval, "t")
        if many:
            assert told.choices == (raw.sigmoid() >= 0.3).int().tolist()
            assert told.margins == (raw.sigmoid() - 0.3).abs().tolist()
        else:
            assert told.choices == raw.argmax(-1)[:, None].tolist()
        assert told.loss == classify.loss(raw, rows, known, many)
