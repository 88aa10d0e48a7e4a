"""Which held-out rows share a pass: longest first, and fewer where memory runs out, with the same results."""

import pytest
import torch

from ftexp import passes


def test_batches_by_hand():
    lengths = [3, 10, 9, 4, 8, 1]
    assert list(passes.batches(lengths, 2, 0.75)) == [[1, 2], [4], [3, 0], [5]]
    assert list(passes.batches(lengths, 4, 0)) == [[1, 2, 4, 3], [0, 5]]
    assert list(passes.batches([], 4, 0)) == []


class Small:
    """Work whose memory holds so many rows, and that counts what it was asked."""

    def __init__(self, holds, error=None):
        self.holds, self.error = holds, error or torch.OutOfMemoryError("CUDA out of memory")
        self.asked, self.done = [], []

    def __call__(self, rows):
        self.asked.append(len(rows))
        if len(rows) > self.holds:
            raise self.error
        self.done += rows


@pytest.mark.parametrize(("holds", "asked"), [(9, [8, 8, 3]), (3, [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1])])
def test_half_the_rows_where_memory_runs_out_and_so_from_then_on(holds, asked, capfd):
    work = Small(holds)
    passes.take([list(range(8)), list(range(8, 16)), [16, 17, 18]], work)
    assert work.done == list(range(19))
    assert work.asked == asked
    assert ("at most 2 rows are scored at a time" in capfd.readouterr().err) == (holds == 3)


def test_a_row_that_does_not_fit_alone_is_an_error():
    work = Small(0)
    with pytest.raises(torch.OutOfMemoryError):
        passes.take([[0, 1, 2]], work)
    assert work.asked == [3, 1]


@pytest.mark.parametrize("error", [RuntimeError("a fault of ours"), KeyboardInterrupt()])
def test_other_errors_are_not_taken_for_memory(error):
    work = Small(1, error)
    with pytest.raises(type(error)):
        passes.take([[0, 1]], work)
    assert work.asked == [2]


def test_what_a_failed_attempt_held_is_free_when_the_next_begins():
    import weakref

    held = []

    def work(rows):
        assert all(kept() is None for kept in held)
        large = torch.zeros(3)
        held.append(weakref.ref(large))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("out of memory")

    passes.take([[0, 1]], work)
    assert len(held) == 3


@pytest.mark.parametrize("kind", ["classifier", "reward model"])
def test_models_with_a_head_are_scored_with_fewer_rows_where_memory_runs_out(kind, capfd):
    from ftexp import model
    from ftexp.config import Data, Eval, Kind, Model, Quant
    from ftexp.data import load, prompts
    from ftexp.train import classify, reward

    base = model.load(Model(kind=Kind.tiny), Quant(), 1)
    rows = prompts.render(load(Data(rows=60, valid=9)).valid, base.tokenizer, Data(max_length=256))
    score = classify.logits if kind == "classifier" else reward.rewards

    def asked():
        return torch.as_tensor(score(base.model, base.tokenizer, rows, Eval(batch=9), "t")).flatten()

    whole, seen = asked(), []

    def narrow(module, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
        if seen[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = base.model.register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        assert asked().tolist() == pytest.approx(whole.tolist(), rel=1e-4, abs=1e-6)
    finally:
        hook.remove()
    assert max(seen) > 3
    assert "rows are scored at a time" in capfd.readouterr().err
