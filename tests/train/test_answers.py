"""What reward models and DPO share: pairs from rows, the mean over pairs of a step, dropout off and on again."""

import pytest
import torch

from ftexp import data, experiment, model
from ftexp.data import prompts
from ftexp.data.shapes import Row
from ftexp.errors import DataError, Preempted
from ftexp.files import read_json
from ftexp.runs import find
from ftexp.train import TRAINERS, answers, checkpoints
from ftexp.train.control import Control

KINDS = ("reward", "dpo")
SGD = ("trainer.steps=2", "trainer.optimizer=sgd", "trainer.lr=0.5", "trainer.max_grad_norm=0", "trainer.warmup=0")


def trained(run, folder, reports=None):
    """Train without scoring and return what was trained."""
    told = [] if reports is None else reports
    task = experiment.TASKS[run.trainer.kind](run, data.load(run.data))
    base = model.load(run.model, run.quant, task.outputs)
    task.ready(base)
    with model.adapted(base, run.lora, run.seed) as tuned:
        TRAINERS[run.trainer.kind](run, base, tuned, task.train, task.valid, checkpoints.store(folder / "t", {}),
                                   lambda v, s: told.append((s, v)), Control())  # fmt: skip
        return {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_changes_nothing(kind, tiny, tmp_path):
    """One step over 7 pairs in passes of 3, 3 and 1, or at once: a mean of means would be another step."""
    given = ("data=preference", f"trainer={kind}", "data.rows=19", "data.valid=12", *SGD)
    whole = trained(tiny(*given, "trainer.batch=7", "trainer.lr=0.5"), tmp_path)
    pieces = trained(tiny(*given, "trainer.batch=3", "trainer.accumulation=3", "trainer.lr=0.5"), tmp_path)
    start = trained(tiny(*given, "trainer.batch=7", "trainer.lr=1e-12"), tmp_path)
    assert max((whole[k] - start[k]).abs().max() for k in whole) > 1e-3  # something was learned
    assert max((whole[k] - pieces[k]).abs().max() for k in whole) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_sabotage_mean_over_each_pass_is_another_step(kind, tiny, tmp_path, monkeypatch):
    given = ("data=preference", f"trainer={kind}", "data.rows=19", "data.valid=12", *SGD, "trainer.lr=0.5")
    whole = trained(tiny(*given, "trainer.batch=7"), tmp_path)
    usual = answers.trainer

    def of_means(base, tuned, settings, rows, tensors, nats, watching):
        return usual(
            base, tuned, settings, rows, tensors, lambda m, i: nats(m, i).mean() * 7 / 3 + 0 * nats(m, i), watching
        )

    monkeypatch.setattr(answers, "trainer", of_means)
    pieces = trained(tiny(*given, "trainer.batch=3", "trainer.accumulation=3"), tmp_path)
    assert max((whole[k] - pieces[k]).abs().max() for k in whole) > 1e-5


def test_sabotage_count_of_a_language_model_misses_a_pair(tiny, tmp_path, monkeypatch):
    """transformers leaves the first label of a pass out of the count, since nothing predicts a text's first token."""
    usual = answers.trainer

    def shifting(*given):
        made = usual(*given)
        made._loss_shifts_labels = True
        return made

    told = []
    monkeypatch.setattr(answers, "trainer", shifting)
    trained(tiny("data=preference", "trainer=dpo", "trainer.steps=1", "trainer.batch=4"), tmp_path, told)
    assert told[0][1]["train/loss"] == pytest.approx(4 / 3 * 0.693147, abs=1e-3)


class After:
    """Asks to leave at the third step."""

    asked = 0

    def is_set(self):
        self.asked += 1
        return self.asked > 2


@pytest.mark.parametrize(
    ("kind", "lora"), [("reward", "lora.dropout=0.1"), ("dpo", "lora=none"), ("dpo", "lora=pissa")]
)
def test_killed_training_ends_with_the_bits_of_one_that_was_not(kind, lora, tiny, tmp_path):
    run = tiny(
        "data=preference", f"trainer={kind}", "trainer.steps=4", "eval.generate=false", "trainer.neftune=5", lora
    )
    experiment.execute(run, tmp_path / "calm", "x")
    with pytest.raises(Preempted):
        experiment.execute(run, tmp_path / "left", "x", control=Control(leave=After()))
    experiment.execute(run, tmp_path / "left", "x")
    assert read_json(tmp_path / "left" / "trial.json")["resumed_at"] == [3]
    calm, left = (find(str(tmp_path / end)).weights() for end in ("calm", "left"))
    assert calm is not None
    assert calm == left


def rows(*lengths):
    return tuple(
        Row(f"ask {n}", "y" * better, f"x:{n}", rejected="n" * worse) for n, (better, worse) in enumerate(lengths)
    )


def test_both_answers_follow_one_prompt(tiny):
    run = tiny("data=preference")
    text = model.tokenizer(run.model)
    (pair,) = answers.render(rows((3, 5)), text, run.data)
    assert pair.chosen.prompt == pair.rejected.prompt
    assert [text.decode(e.completion).split("<")[0] for e in (pair.chosen, pair.rejected)] == ["yyy", "nnnnn"]
    assert {e.completion[-1] for e in (pair.chosen, pair.rejected)} == {prompts.end(text)}


def test_of_a_conversation_the_last_answers_alone_count(tiny):
    run = tiny("data=preference")
    text = model.tokenizer(run.model)
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "yes"))
    (pair,) = answers.render((Row("c", "yes", "x:1", turns, rejected="no"),), text, run.data)
    assert [sum(t != -100 for t in e.labels) for e in (pair.chosen, pair.rejected)] == [4, 3]
    assert pair.chosen.prompt == pair.rejected.prompt


def test_a_pair_with_one_long_answer_is_refused_or_dropped(tiny):
    given = rows((3, 3), (3, 90), (90, 3), *[(4, 4)] * 60)
    text = model.tokenizer(tiny().model)
    with pytest.raises(DataError, match=r"x:1: a row must be at most data\.max_length=80"):
        answers.render(given[:2], text, tiny("data.max_length=80").data)
    with pytest.raises(DataError, match=r"x:2: a row must be"):
        answers.render(given[2:], text, tiny("data.max_length=80").data)
    kept = answers.render(given, text, tiny("data.max_length=80", "data.long=drop").data)
    assert [p.row.where for p in kept] == ["x:0", *(f"x:{n}" for n in range(3, 63))]


def test_the_bases_own_dropout_is_off_and_back_again():
    from torch import nn

    made = nn.ModuleDict({"resid": nn.Dropout(0.1), "lora_dropout": nn.Dropout(0.2)})
    with pytest.raises(KeyError), answers.undisturbed(made):
        assert [m.p for m in made.values()] == [0.0, 0.2]
        raise KeyError
    assert [m.p for m in made.values()] == [0.1, 0.2]


def test_scores_of_four_pairs_by_hand(tiny):
    """Ahead, behind, a tie, ahead: accuracy 5 / 8."""
    run = tiny("data=preference")
    made = answers.render(rows(*[(3, 4)] * 4), model.tokenizer(run.model), run.data)
    told = answers.rewarded(made, [2.0, 0.0, 1.0, 5.0], [1.0, 3.0, 1.0, 0.0])
    assert told.scores["accuracy"] == 0.625
    assert told.scores["margin"] == (1 - 3 + 0 + 5) / 4
    expected = torch.nn.functional.softplus(-torch.tensor([1.0, -3, 0, 5], dtype=torch.float64)).mean()
    assert told.scores["loss"] == pytest.approx(expected.item(), rel=1e-12)
    from sklearn.metrics import roc_auc_score

    assert told.scores["roc_auc"] == pytest.approx(roc_auc_score([1] * 4 + [0] * 4, [2, 0, 1, 5, 1, 3, 1, 0]))


def test_dropout_of_a_function_is_off_too():
    """OPT hands the share to `functional.dropout`; TRL's own way misses it."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    made = OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                                    max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.3))  # fmt: skip
    made.train()
    ids = torch.arange(12)[None]
    first, second = made(ids).logits, made(ids).logits
    assert not torch.equal(first, second)
    with answers.undisturbed(made):
        first, second = made(ids).logits, made(ids).logits
        assert torch.equal(first, second)
    assert made.model.decoder.layers[0].dropout == 0.3
