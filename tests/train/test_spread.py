"""Rows over several processes: each optimizer step holds those it holds with one, and every row of an epoch is there once."""

import itertools
import math

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler

from ftexp import ranks
from ftexp.config import Trainer
from ftexp.errors import ConfigError
from ftexp.train import sft, spread


def steps_of(order, batch, accumulation, processes, sampler):
    """Rows of each optimizer step over an epoch, as accelerate and the Trainer take them."""
    shards = [
        list(BatchSamplerShard(BatchSampler(sampler, batch, drop_last=False), processes, rank))
        for rank in range(processes)
    ]
    assert len({len(shard) for shard in shards}) == 1  # each has a forward pass where the others have
    taken = [list(itertools.batched(shard, accumulation)) if hasattr(itertools, "batched") else
             [shard[n : n + accumulation] for n in range(0, len(shard), accumulation)] for shard in shards]  # fmt: skip
    return [sorted(row for shard in step for rows in shard for row in rows) for step in zip(*taken, strict=True)]


CASES = [(58, 3, 2, 2), (58, 4, 1, 2), (7, 4, 4, 2), (1, 2, 1, 2), (64, 4, 4, 4), (13, 6, 2, 4), (5, 8, 1, 8)]


@pytest.mark.parametrize(("rows", "batch", "accumulation", "processes"), CASES)
def test_each_step_holds_the_rows_it_holds_with_one_process(rows, batch, accumulation, processes):
    trainer = Trainer(batch=batch, accumulation=accumulation)
    order = next(sft.orders(rows, trainer, seed=3, first=1))
    size, passes = spread.shape(trainer, processes)
    made = spread.sampler(rows, size * processes, lambda epoch: next(sft.orders(rows, trainer, 3, epoch)))
    made.set_epoch(1)
    several = steps_of(order, size, passes, processes, made)
    whole = batch * accumulation
    alone = [sorted(order[n : n + whole]) for n in range(0, rows, whole)]
    assert [[row for row in step if row < rows] for step in several] == alone
    assert len(several) == math.ceil(math.ceil(rows / batch) / accumulation)  # `sft.planned_steps`


def test_accelerate_alone_would_train_rows_twice():
    trainer = Trainer(batch=4, accumulation=1)
    order = next(sft.orders(58, trainer, seed=3))
    several = steps_of(order, 2, 1, 2, order)
    assert several[-1] != sorted(order[56:])


def test_orders_from_an_epoch_on_are_those_from_the_start():
    trainer = Trainer()
    drawn = sft.orders(20, trainer, seed=5)
    assert [next(drawn) for _ in range(4)][3] == next(sft.orders(20, trainer, 5, first=3))


def test_rows_that_cannot_be_shared_out_are_refused():
    with pytest.raises(
        ConfigError, match=r"sweep.gpus_per_trial=2 must divide .* trainer.batch=3 times trainer.accumulation=1"
    ):
        spread.shape(Trainer(batch=3, accumulation=1), 2)


@pytest.mark.parametrize("packed", [False, True])
def test_the_blank_row_teaches_nothing(packed):
    rows = Dataset.from_dict(
        {"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]], **({"seq_lengths": [[3]]} if packed else {})}
    )
    made = spread.blank(rows, pad=9)
    assert len(made) == 2
    assert set(made[1]["labels"]) == {-100}
    assert made.features == rows.features


def test_a_blank_pass_has_a_gradient_of_zero(monkeypatch):
    from ftexp import model
    from ftexp.config import Kind, Lora, Model, Quant

    base = model.load(Model(kind=Kind.tiny), Quant())
    with model.adapted(base, Lora(r=2), 0) as tuned:
        blank = {
            "input_ids": torch.tensor([[1, 1]]),
            "labels": torch.tensor([[-100, -100]]),
            "attention_mask": torch.ones(1, 2),
        }
        loss = sft.token_mean(tuned, blank, torch.tensor(7))
        loss.backward()
        trained = [w for w in tuned.parameters() if w.requires_grad]
        assert loss.item() == 0
        assert all(w.grad is not None and not w.grad.any() for w in trained)  # DDP waits for each of them
    assert not spread.is_blank(blank["labels"])  # one process has no such pass
    monkeypatch.setattr(ranks, "count", lambda: 2)
    assert spread.is_blank(blank["labels"])


def test_in_an_epoch_gone_on_with_the_sampler_has_to_know_it_by_itself(monkeypatch):
    """The Trainer skips what was trained by another wrapper, through which accelerate's `set_epoch` does not pass."""
    from accelerate import skip_first_batches
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    def epoch_of(begun):
        asked = []
        made = spread.sampler(8, 4, lambda epoch: asked.append(epoch) or list(range(8)), begun)
        loader = prepare_data_loader(
            DataLoader(list(range(9)), batch_size=2, sampler=made), num_processes=2, process_index=0
        )
        skipped = skip_first_batches(loader, 1)
        skipped.set_epoch(3)
        assert [batch.tolist() for batch in skipped] == [[4, 5]]
        return asked

    assert epoch_of(3) == [3]
    assert epoch_of(0) == [0]
