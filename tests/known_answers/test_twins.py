"""Twins of known answers that stand elsewhere: with the guard broken, the same answer fails."""

import importlib
import inspect
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from ftexp import fidelity, model
from ftexp.config import Dtype, Kind, Model, Quant
from ftexp.data import gates, prompts
from ftexp.train import sft

TESTS = Path(__file__).resolve().parent.parent
FAILS = (AssertionError, pytest.fail.Exception)


def answers(file):
    """Import a module of known answers from its folder."""
    path = TESTS / file
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)


@pytest.fixture
def tokenizer():
    from ftexp.model import tiny

    return tiny.tokenizer()


@pytest.fixture
def base():
    return model.load(Model(kind=Kind.tiny, dtype=Dtype.float32), Quant())


def any_share_may_be_lost(patch):
    patch.setattr(gates, "LOST", 1.0)


def nothing_is_looked_at(patch):
    patch.setattr(gates, "usable", lambda rows, lost, *_: [n for n, gone in enumerate(lost) if not gone])


def beginnings_are_not_looked_at(patch):
    patch.setattr(prompts, "_checked", lambda example, *_: example)


def templates_are_not_told_apart(patch):
    patch.setattr(prompts, "template_digest", lambda *_: "")


def no_seed(patch):
    patch.setattr(torch, "manual_seed", lambda *_: None)


def any_number_will_do(patch):
    patch.setattr(sft, "math", SimpleNamespace(**{**vars(math), "isfinite": lambda _: True}))


def dead_for_long(patch):
    patch.setattr(sft, "DEAD_STEPS", 99)


def exports_are_not_scored(patch):
    patch.setattr(fidelity, "LIMITS", dict.fromkeys(fidelity.LIMITS, fidelity.Limit(1e9, 0.0)))


BROKEN = {
    # trap: file, known answer, what is broken
    "2 cut": ("data/test_gates.py", "test_cut_rows_that_do_not_show_the_end_are_refused", any_share_may_be_lost),
    "3 lost": ("data/test_gates.py", "test_dropped_rows_are_counted_and_more_than_a_twentieth_is_refused", any_share_may_be_lost),
    "3 mute": ("data/test_gates.py", "test_row_without_supervised_tokens_is_refused", nothing_is_looked_at),
    "4": ("data/test_prompts.py", "test_two_bos_are_refused", beginnings_are_not_looked_at),
    "6": ("data/test_prompts.py", "test_template_digest_tells_templates_apart", templates_are_not_told_apart),
    "14": ("test_export.py", "test_update_of_both_ends_of_a_tied_matrix_is_refused", exports_are_not_scored),
    "17": ("model/test_model.py", "test_adapter_follows_the_seed_alone", no_seed),
    "22": ("train/test_sft.py", "test_nan_stops_training_at_its_step", any_number_will_do),
    "23": ("train/test_sft.py", "test_training_without_gradients_is_over", dead_for_long),
    "32": ("train/test_sft.py", "test_same_seed_gives_the_same_bits_and_another_does_not", no_seed),
}  # fmt: skip


@pytest.mark.parametrize("trap", BROKEN)
def test_sabotage_a_broken_guard_lets_the_trap_through(request, monkeypatch, trap):
    file, name, broken = BROKEN[trap]
    answer = getattr(answers(file), name)
    given = {key: request.getfixturevalue(key) for key in inspect.signature(answer).parameters}
    with monkeypatch.context() as patch:
        broken(patch)
        with pytest.raises(FAILS):
            answer(**given)


def test_sabotage_masking_by_token_hides_the_end(tokenizer):
    """What transformers' own collator does where the padding token is the end token."""
    tokenizer.pad_token = tokenizer.eos_token
    rows = [tokenizer(f"{text}{tokenizer.eos_token}") for text in ("one", "another")]
    labels = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)["labels"]
    assert not (labels == tokenizer.eos_token_id).any()


def test_sabotage_peft_takes_a_target_that_matches_nothing():
    """One of two names is wrong: half an adapter, and no word of it."""
    from peft import LoraConfig, get_peft_model

    from ftexp.model import tiny

    tuned = get_peft_model(tiny.model("eager"), LoraConfig(r=4, target_modules=["q_porj", "v_proj"]))
    assert {n.split(".")[-4] for n, p in tuned.named_parameters() if p.requires_grad} == {"v_proj"}


def test_sabotage_a_fixed_alpha_shrinks_the_update_as_the_rank_grows(composed):
    """A sweep of the rank alone would sweep the scaling too; the default policy keeps it."""
    scalings = {
        policy: [
            run.lora.alpha / run.lora.r for r in (8, 16, 64) for run in [composed(f"lora={policy}", f"lora.r={r}")]
        ]
        for policy in ("default", "fixed_alpha")
    }
    assert scalings["default"] == [2, 2, 2]
    assert scalings["fixed_alpha"] == [2, 1, 1 / 4]
