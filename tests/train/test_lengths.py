"""Packs, groups and padding: known answers about what rows see, what is learned, and going on after a kill."""

import math

import pytest
import torch
from test_checkpoints import HARD, curve, leave, weights

from ftexp import data, evaluate, experiment, model
from ftexp.config import Data, Long, Packing, Template
from ftexp.data import prompts
from ftexp.data.shapes import Row
from ftexp.errors import ConfigError, DataError
from ftexp.files import read_json
from ftexp.model import tiny as toy
from ftexp.train import lengths, sft

BFD = Data(packing=Packing.bfd, max_length=256)
PLAIN = ("model.dtype=float32", "trainer.optimizer=sgd", "trainer.lr=0.5", "trainer.max_grad_norm=0")


@pytest.fixture(scope="module")
def base():
    from ftexp.config import Dtype, Kind, Model, Quant

    return model.load(Model(kind=Kind.tiny, dtype=Dtype.float32), Quant())


@pytest.fixture(scope="module")
def examples(base):
    return prompts.render(data.load(Data(rows=60, valid=9)).train, base.tokenizer, Data(max_length=256))


@pytest.fixture(scope="module")
def packs(examples):
    return lengths.packed(lengths.dataset(examples), BFD)


def rows_of(packs):
    """Token ids and labels of every row in packs, in any order."""
    found = []
    for pack in packs:
        start = 0
        for length in pack["seq_lengths"]:
            found.append(tuple(tuple(pack[name][start : start + length]) for name in ("input_ids", "labels")))
            start += length
    return sorted(found)


def test_packs_hold_every_row_whole_and_once(examples, packs):
    assert rows_of(packs) == sorted((tuple(e.ids), tuple(e.labels)) for e in examples)
    assert len(packs) < len(examples) / 2
    assert max(map(len, packs["input_ids"])) <= 256
    assert lengths.units(examples, BFD) == len(packs)
    assert lengths.units(examples, Data()) == len(examples)


def test_best_fit_by_hand():
    """10, 7, 5, 3 and 3 tokens in packs of at most 10: 10 | 7 3 | 5 3."""
    from datasets import Dataset

    given = [{"input_ids": list(range(n)), "labels": [-100, *range(1, n)]} for n in (3, 10, 5, 7, 3)]
    made = lengths.packed(Dataset.from_list(given), Data(packing=Packing.bfd, max_length=10))
    assert made["seq_lengths"] == [[10], [7, 3], [5, 3]]


@torch.no_grad()
def logits_of(base, packs, **sabotage):
    """Run a batch of packs, and return each row's logits with its ids."""
    batch = lengths.collate(list(packs), 0)
    positions = sabotage.pop("position_ids", batch["position_ids"])
    told = base.model(input_ids=batch["input_ids"], position_ids=positions, **{"use_cache": False} | sabotage).logits
    found = []
    for n, pack in enumerate(packs):
        ends = torch.tensor(pack["seq_lengths"]).cumsum(0).tolist()
        for begin, end in zip([0, *ends], ends, strict=False):
            found.append((pack["input_ids"][begin:end], told[n, begin:end]))
    return found


@torch.no_grad()
def worst(base, packs, **sabotage):
    """Greatest difference of a logit in a pack from that of the row alone."""
    found = logits_of(base, packs, **sabotage)
    alone = [base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids, _ in found]
    return max((told - other).abs().max().item() for (_, told), other in zip(found, alone, strict=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_of_packed_rows_are_those_of_rows_alone(base, packs, attention):
    base.model.set_attn_implementation(attention)
    try:
        assert worst(base, packs.select(range(6))) < 1e-5  # packs of unequal length: there is padding too
    finally:
        base.model.set_attn_implementation(base.compute.attention)  # the loaded model serves later tests too


def test_sabotage_a_mask_of_ones_or_a_cache_lets_rows_see_each_other(base, packs):
    few = packs.select([0])
    width = len(few[0]["input_ids"])
    assert worst(base, few, attention_mask=torch.ones(1, width).long()) > 1e-2
    assert worst(base, few, use_cache=True) > 1e-2
    assert worst(base, few, position_ids=torch.arange(width)[None]) > 1e-2


def test_loss_of_packs_is_the_loss_of_the_rows(base, examples, packs):
    told = evaluate.held_out(base.model, base.tokenizer, examples, experiment.config.Eval(), "t")
    batch = lengths.collate(list(packs), 0)
    with torch.no_grad():
        loss = sft.token_mean(base.model, batch, None).item()
    assert loss == pytest.approx(sum(e["nats"] for e in told) / sum(e["tokens"] for e in told), rel=1e-6)


def stepped(run, tmp_path, reports=None):
    from test_sft import trained

    return trained(run, tmp_path, reports)


def test_a_step_on_packs_is_a_step_on_the_same_rows(tiny, tmp_path):
    """All rows in one step of SGD: packed or not, at once or accumulated, by our loss or TRL's."""
    rows = ("data.rows=40", "data.valid=8", "trainer.steps=1", "trainer.batch=64")
    one, other, pieces = [], [], []
    alone = stepped(tiny(*PLAIN, *rows), tmp_path, one)
    packed = stepped(tiny(*PLAIN, *rows, "data.packing=bfd"), tmp_path, other)
    run = tiny(*PLAIN, *rows[:-1], "data.packing=bfd", "trainer.batch=3", "trainer.accumulation=22")
    small = stepped(run, tmp_path, pieces)
    assert [o[0][1]["train/loss"] for o in (other, pieces)] == pytest.approx([one[0][1]["train/loss"]] * 2, rel=1e-6)
    assert max((alone[k] - packed[k]).abs().max() for k in alone) < 1e-6
    assert max((alone[k] - small[k]).abs().max() for k in alone) < 1e-6


def test_sabotage_positions_that_run_on_are_another_step(tiny, tmp_path, monkeypatch):
    rows = (*PLAIN, "data.rows=40", "data.valid=8", "trainer.steps=1", "trainer.batch=64")
    alone = stepped(tiny(*rows), tmp_path)
    honest = lengths.collate

    def running(packs, pad):
        made = honest(packs, pad)
        return made | {"position_ids": torch.arange(made["labels"].shape[1]).expand_as(made["labels"])}

    monkeypatch.setattr(lengths, "collate", running)
    leaking = stepped(tiny(*rows, "data.packing=bfd"), tmp_path)
    assert max((alone[k] - leaking[k]).abs().max() for k in alone) > 1e-4


@pytest.mark.parametrize("shape", [("4", "1"), ("2", "2"), ("1", "4")])
def test_loss_of_packs_is_that_of_trl(tiny, tmp_path, monkeypatch, shape):
    """The same packs through SFTTrainer's own loss, which is what a GPU runs."""
    from trl import SFTTrainer

    given = ("model.dtype=float32", "data.packing=bfd", "trainer.steps=2", f"trainer.batch={shape[0]}",
             f"trainer.accumulation={shape[1]}")  # fmt: skip
    ours, theirs = [], []
    mine = stepped(tiny(*given), tmp_path, ours)
    real = sft._trainer

    def plain(*args):
        trainer = real(*args)
        trainer.compute_loss = SFTTrainer.compute_loss.__get__(trainer)
        return trainer

    monkeypatch.setattr(sft, "_trainer", plain)
    other = stepped(tiny(*given), tmp_path, theirs)
    losses = [[v["train/loss"] for _, v in r if "train/loss" in v] for r in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert max((mine[k] - other[k]).abs().max() for k in mine) < 1e-4


def test_an_epoch_of_packs_takes_the_steps_that_are_told(tiny, tmp_path):
    run = tiny("data.packing=bfd", "trainer.steps=null", "trainer.batch=3", "trainer.report_steps=0")
    experiment.execute(run, tmp_path, "x")
    train, _ = experiment.tokenised(run, data.load(run.data))
    told = read_json(tmp_path / "trial.json")
    assert (
        told["steps"]
        == math.ceil(lengths.units(train, run.data) / 3)
        == max(point["step"] for point in curve(tmp_path))
    )
    assert told["facts"]["rows"]["train"] == len(train) == 108


@pytest.mark.parametrize(
    ("how", "step"),
    [(("data.packing=bfd",), 7), (("data.packing=wrapped",), 1), (("trainer.group_by_length=true",), 7)],
)
def test_left_training_goes_on_to_the_same_bits(tiny, tmp_path, how, step):
    """Nine steps cross the end of an epoch; left in the first epoch, and after it."""
    run = tiny(*HARD, *how, "trainer.steps=9", "data.rows=39", "trainer.batch=2")
    experiment.execute(run, tmp_path / "calm", "x")
    leave(run, tmp_path / "left", step)
    experiment.execute(run, tmp_path / "left", "x")
    assert read_json(tmp_path / "left" / "trial.json")["resumed_at"] == [step]
    assert weights(tmp_path / "left") == weights(tmp_path / "calm")
    assert curve(tmp_path / "left") == curve(tmp_path / "calm")


def test_sabotage_groups_of_transformers_are_drawn_anew_after_a_kill(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "sampler", lambda usual, seed: usual)
    run = tiny(*HARD, "trainer.group_by_length=true", "trainer.steps=9", "data.rows=39", "trainer.batch=2")
    experiment.execute(run, tmp_path / "calm", "x")
    leave(run, tmp_path / "left", 8)
    experiment.execute(run, tmp_path / "left", "x")
    assert weights(tmp_path / "left") != weights(tmp_path / "calm")


def order(seed, epoch, sizes):
    from transformers.trainer_pt_utils import LengthGroupedSampler

    made = lengths.sampler(LengthGroupedSampler(4, lengths=sizes), seed)
    made.set_epoch(epoch)
    return list(made)


def test_groups_hold_every_row_once_and_pad_less():
    sizes = [n * 37 % 101 + 1 for n in range(400)]
    found = order(0, 0, sizes)
    assert sorted(found) == list(range(400))

    def padded(numbers):
        return sum(4 * max(sizes[n] for n in numbers[i : i + 4]) for i in range(0, 400, 4))

    assert padded(found) < 1.15 * sum(sizes) < padded(range(400)) / 1.15
    assert order(0, 0, sizes) == found
    assert order(0, 1, sizes) != found != order(1, 0, sizes)


def test_groups_reach_the_trainer(tiny, tmp_path):
    run = tiny("trainer.group_by_length=true")
    assert sft.arguments(run.trainer, "cpu", 0, "x", 1).train_sampling_strategy == "group_by_length"
    plain, grouped = stepped(tiny(), tmp_path), stepped(run, tmp_path)
    assert not all(torch.equal(plain[k], grouped[k]) for k in plain)


def test_model_in_which_packed_rows_see_each_other_is_refused(base, packs, monkeypatch):
    apart, seeing = lengths.contamination(base.model, packs[0]["input_ids"], packs[0]["seq_lengths"])
    assert apart < 1e-5 < 1e-2 < seeing
    lengths.check_apart(base.model, packs)
    honest = evaluate.supervised_logits

    def deaf(model, ids, mask, labels, positions):  # a model that makes its own positions, as recurrent ones do
        return honest(model, ids, mask, labels, torch.arange(ids.shape[1])[None])

    monkeypatch.setattr(lengths.evaluate, "supervised_logits", deaf)
    with pytest.raises(ConfigError, match=r"data\.packing=bfd needs a model that keeps the rows of a pack apart"):
        lengths.check_apart(base.model, packs)


def test_wrapped_says_what_it_does_and_counts_what_it_loses(base, examples, capfd):
    how = Data(packing=Packing.wrapped, max_length=100)
    made = lengths.packed(lengths.dataset(examples), how)
    told = capfd.readouterr().err
    tokens = [i for e in examples for i in e.ids]
    assert [i for pack in made for i in pack["input_ids"]] == tokens
    assert len(made) == math.ceil(len(tokens) / 100)
    heads = [label for n, label in enumerate(x for e in examples for x in e.labels) if n % 100 == 0]
    lost = sum(label != -100 for label in heads)
    ends = {sum(len(e.ids) for e in examples[: n + 1]) for n in range(len(examples))}
    borders = [border for border in range(100, len(tokens), 100) if border not in ends]
    torn = len({min(end for end in ends if end > border) for border in borders})
    assert "Map" not in told
    assert f"tears {torn} of {len(examples)} rows" in told
    assert f"{lost} supervised tokens begin a pack and are not learned" in told
    assert all(pack["labels"][0] == -100 for pack in made)


def test_tokens_that_go_missing_are_refused(examples, monkeypatch):
    """TRL cuts what is longer than a pack without a word; here that is refused, though such rows never get so far."""
    with pytest.raises(DataError, match=r"data\.packing=bfd lost tokens: \(\d+, \d+\) \(all, supervised\) became"):
        lengths.packed(lengths.dataset(examples), Data(packing=Packing.bfd, max_length=40))


def test_gates_count_rows_before_they_are_packed():
    rows = tuple(Row("p", "x" * (60 if n == 3 else 5), f"my.jsonl:{n}") for n in range(30))
    how: dict = {"packing": Packing.bfd, "max_length": 56, "template": Template.plain}
    with pytest.raises(DataError, match=r"my\.jsonl:3: a row must be at most data\.max_length=56"):
        prompts.render(rows, toy.tokenizer(), Data(**how))
    kept = prompts.render(rows, toy.tokenizer(), Data(**how, long=Long.drop))
    packs = lengths.packed(lengths.dataset(kept), Data(**how))
    assert sum(map(len, packs["seq_lengths"])) == 29
    with pytest.raises(DataError, match=r"2 of 30 rows have more than .*; more than 5% may be lost"):
        long = (*rows[:-1], Row("p", "x" * 60, "my.jsonl:29"))
        prompts.render(long, toy.tokenizer(), Data(**how, long=Long.drop))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ("data.packing=bfd", "trainer.kind=classify"),
            r"data\.packing must be none with trainer\.kind=classify, got bfd",
        ),
        (
            ("data.packing=bfd", "trainer.group_by_length=true"),
            r"trainer\.group_by_length must be false with data\.packing=bfd",
        ),
    ],
)
def test_keys_at_odds_are_refused(tiny, given, message):
    with pytest.raises(ConfigError, match=message):
        experiment.check(tiny(*given), None)


def test_wrapped_packs_longer_than_the_model_are_refused(tiny):
    run = tiny("data.packing=wrapped", "data.max_length=1024")
    with pytest.raises(ConfigError, match=r"data\.max_length must be at most the 512 tokens the model takes"):
        experiment.prepare(run)
