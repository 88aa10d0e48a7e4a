"""Training: known answers about the loss, accumulation, NEFTune, divergence and repeatability."""

import fnmatch
import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from ftexp import config, data, experiment, model
from ftexp.config import Method
from ftexp.data import prompts
from ftexp.errors import ConfigError, Diverged
from ftexp.train import TRAINERS, checkpoints, sft
from ftexp.train.control import Control


def trained(run, tmp_path: Path, reports=None, rows=None):
    """Train and return the adapter's weights."""
    train, valid = experiment.tokenised(run, data.load(run.data))
    base = model.load(run.model, run.quant)
    told = reports if reports is not None else []
    with model.adapted(base, run.lora, run.seed) as tuned:
        facts = sft.train(
            run, base, tuned, rows or train, valid, checkpoints.store(tmp_path / "t", {}),
            lambda v, s: told.append((s, v)), Control(),
        )  # fmt: skip
        assert facts["train/steps"] >= 1
        return {k: v.clone() for k, v in tuned.state_dict().items() if "lora_" in k}


def test_every_method_has_a_trainer():
    assert set(TRAINERS) == set(Method)


def test_loss_falls_and_every_step_is_reported(tiny, tmp_path):
    reports = []
    trained(tiny("trainer.steps=12", "trainer.report_steps=4"), tmp_path, reports)
    losses = {s: v["train/loss"] for s, v in reports if "train/loss" in v}
    assert list(losses) == list(range(1, 13))
    assert losses[12] < losses[1] - 0.02
    assert [s for s, v in reports if "valid/loss" in v] == [4, 8]  # the end is scored by the experiment
    assert not (tmp_path / "t").exists()


def test_first_loss_is_the_token_mean_of_the_base(tiny, tmp_path):
    """B starts at zero, so the first step sees the base model: sum of nats over supervised tokens of the batch."""
    from ftexp import evaluate, metrics

    run = tiny("trainer.steps=1", "trainer.batch=104", "data.rows=120", "data.valid=16")
    train, _ = experiment.tokenised(run, data.load(run.data))
    base = model.load(run.model, run.quant)
    table = evaluate.held_out(base.model, base.tokenizer, train, run.eval, "t")
    reports = []
    trained(run, tmp_path, reports)
    expected = metrics.loss([e["nats"] for e in table], [e["tokens"] for e in table])
    assert len(train) == 104
    assert reports[0][1]["train/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [("4", "2"), ("2", "4"), ("1", "8")])
def test_accumulation_changes_nothing(tiny, tmp_path, shape):
    """One step of plain SGD on 8 rows: at once, or in pieces."""
    base = (
        "trainer.steps=2",
        "trainer.optimizer=sgd",
        "trainer.lr=0.5",
        "trainer.max_grad_norm=0",
        "model.dtype=float32",
    )
    whole = trained(tiny(*base, "trainer.batch=8"), tmp_path)
    pieces = trained(tiny(*base, f"trainer.batch={shape[0]}", f"trainer.accumulation={shape[1]}"), tmp_path)
    start = trained(tiny(*base[:2], "model.dtype=float32", "trainer.lr=1e-12", "trainer.batch=8"), tmp_path)
    assert max((whole[k] - start[k]).abs().max() for k in whole) > 1e-4  # something was learned
    assert max((whole[k] - pieces[k]).abs().max() for k in whole) < 1e-6


def test_sabotage_mean_over_each_piece_is_another_step(tiny, tmp_path, monkeypatch):
    base = (
        "trainer.steps=2",
        "trainer.optimizer=sgd",
        "trainer.lr=0.5",
        "trainer.max_grad_norm=0",
        "model.dtype=float32",
    )
    whole = trained(tiny(*base, "trainer.batch=8"), tmp_path)
    honest = sft.token_mean
    monkeypatch.setattr(sft, "token_mean", lambda model, inputs, tokens, *more: honest(model, inputs, None, *more))
    pieces = trained(tiny(*base, "trainer.batch=2", "trainer.accumulation=4"), tmp_path)
    assert max((whole[k] - pieces[k]).abs().max() for k in whole) > 1e-5


def test_supervised_rows_equal_the_loss_of_trl(tiny, tmp_path, monkeypatch):
    """The CPU's shortcut against SFTTrainer's own loss, to the end of three steps."""
    run = tiny("trainer.steps=3", "model.dtype=float32")
    ours = []
    mine = trained(run, tmp_path, ours)
    from trl import SFTTrainer

    monkeypatch.setattr(sft, "token_mean", None)
    theirs = []
    real = sft._trainer

    def plain(*args):
        trainer = real(*args)
        trainer.compute_loss = SFTTrainer.compute_loss.__get__(trainer)
        return trainer

    monkeypatch.setattr(sft, "_trainer", plain)
    other = trained(run, tmp_path, theirs)
    losses = [[v["train/loss"] for _, v in r if "train/loss" in v] for r in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert max((mine[k] - other[k]).abs().max() for k in mine) < 1e-4


HEAD = ("lora.targets=[lm_head]", "trainer.steps=1", "trainer.optimizer=sgd", "trainer.lr=0.5", "trainer.warmup=0",
        "trainer.scheduler=constant", "trainer.max_grad_norm=0", "trainer.batch=104", "data.valid=16")  # fmt: skip
"""One step of plain SGD, with all rows, on an adapter of the output head alone."""


def test_an_adapter_on_the_head_takes_the_step_of_the_plain_loss(tiny, tmp_path):
    """TRL refuses one, since its loss goes by the head's own weights; the reference is PyTorch's, over all logits."""
    run = tiny(*HEAD)
    found = trained(run, tmp_path)
    train, _ = experiment.tokenised(run, data.load(run.data))
    base = model.load(run.model, run.quant)
    with model.adapted(base, run.lora, run.seed) as tuned:
        nats = tokens = 0
        for e in train:
            logits = tuned(input_ids=torch.tensor([e.ids])).logits[0, :-1]
            wanted = torch.tensor(e.labels[1:])
            nats = nats + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100)
            tokens += int((wanted != -100).sum())
        (nats / tokens).backward()
        weights = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
        expected = {n.replace(".default", ""): (p - 0.5 * p.grad).detach() for n, p in weights.items()}
    moved = {n.replace(".default", ""): w for n, w in found.items()}
    assert expected.keys() == moved.keys()
    assert all(torch.allclose(moved[n], w, atol=1e-6) for n, w in expected.items())
    assert any(w.abs().max() > 1e-4 for n, w in moved.items() if "lora_B" in n)


def test_trls_own_loss_would_leave_an_adapter_on_the_head_as_it_was(tiny, tmp_path, monkeypatch):
    from trl import SFTTrainer

    real = sft._trainer

    def theirs(*args):
        trainer = real(*args)
        trainer.compute_loss = SFTTrainer.compute_loss.__get__(trainer)
        return trainer

    monkeypatch.setattr(sft, "_trainer", theirs)
    with pytest.raises((Diverged, RuntimeError), match="no gradient|does not require grad"):
        trained(tiny(*HEAD, "trainer.steps=4"), tmp_path)


def test_same_seed_gives_the_same_bits_and_another_does_not(tiny, tmp_path):
    given = ("trainer.neftune=5", "lora.dropout=0.1")
    one, same, other = (trained(tiny(*given, f"seed={s}"), tmp_path) for s in (0, 0, 1))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


def test_trial_alone_equals_the_same_trial_after_others(tiny, tmp_path, monkeypatch):
    run = tiny("trainer.neftune=5")
    alone = trained(run, tmp_path)
    trained(tiny("lora.variant=dora", "trainer.gradient_checkpointing=true"), tmp_path)
    with monkeypatch.context() as patched, pytest.raises(Diverged):
        poison(patched, step=2)
        trained(run, tmp_path)
    after = trained(run, tmp_path)
    assert all(torch.equal(alone[k], after[k]) for k in alone)


def test_neftune_is_off_after_an_error(tiny, tmp_path):
    run = tiny("trainer.neftune=5")
    train, valid = experiment.tokenised(run, data.load(run.data))
    base = model.load(run.model, run.quant)

    def fail(values, step):
        raise KeyboardInterrupt

    with model.adapted(base, run.lora, 0) as tuned, pytest.raises(KeyboardInterrupt):
        sft.train(run, base, tuned, train, valid, checkpoints.store(tmp_path / "t", {}), fail, Control())
    assert not base.model.get_input_embeddings()._forward_hooks


def test_neftune_changes_training_and_no_score(tiny, tmp_path):
    plain, noisy = [], []
    trained(tiny("trainer.neftune=0"), tmp_path, plain)
    trained(tiny("trainer.neftune=50"), tmp_path, noisy)
    assert plain[0][1]["train/loss"] != noisy[0][1]["train/loss"]
    train, valid = experiment.tokenised(tiny(), data.load(tiny().data))
    from ftexp import evaluate

    base = model.load(tiny().model, tiny().quant)
    with model.adapted(base, tiny().lora, 0) as tuned:
        seen = []
        run = tiny("trainer.neftune=50", "trainer.steps=2", "trainer.report_steps=1")
        sft.train(
            run,
            base,
            tuned,
            train,
            valid,
            checkpoints.store(tmp_path / "t", {}),
            lambda v, s: seen.append(v),
            Control(),
        )
        twice = [evaluate.held_out(tuned, base.tokenizer, valid, run.eval, "t") for _ in range(2)]
    assert twice[0] == twice[1]


def poison(monkeypatch, step):
    """Make the loss of one step NaN; gives the list of calls."""
    honest, calls = sft.token_mean, []

    def poisoned(*given):
        calls.append(1)
        return honest(*given) * (math.nan if len(calls) == step else 1)

    monkeypatch.setattr(sft, "token_mean", poisoned)
    return calls


def test_nan_stops_training_at_its_step(tiny, tmp_path, monkeypatch):
    calls = poison(monkeypatch, step=3)
    with pytest.raises(Diverged, match="diverged at step 3: train/(loss|grad_norm) is nan"):
        trained(tiny("trainer.steps=9"), tmp_path)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("rows", "given", "steps"),
    [
        (104, (), 4), (104, ("trainer.steps=null",), 13), (105, ("trainer.steps=null",), 14),
        (104, ("trainer.steps=null", "trainer.epochs=0.5"), 7), (104, ("trainer.steps=null", "trainer.accumulation=4"), 4),
        (3, ("trainer.steps=null", "trainer.epochs=0.01"), 1),
    ],
)  # fmt: skip
def test_planned_steps_by_hand(tiny, rows, given, steps):
    assert sft.planned_steps(tiny(*given).trainer, rows) == steps


def test_an_epoch_takes_the_steps_that_were_planned(tiny, tmp_path):
    run = tiny("trainer.steps=null", "trainer.batch=16", "trainer.accumulation=3", "trainer.report_steps=0")
    train, _ = experiment.tokenised(run, data.load(run.data))
    reports = []
    trained(run, tmp_path, reports)
    assert len(train) == 108
    assert reports[-1][0] == sft.planned_steps(run.trainer, 108) == 3


@pytest.mark.parametrize(
    ("extra", "message"),
    [({"overwrite_output_dir": True}, r"trainer\.extra is refused by SFTConfig: .*overwrite_output_dir"),
     ({"group_by_length": True}, r"trainer\.extra\.group_by_length must not be set, .*: trainer\.group_by_length"),
     ({"packing": True}, r"trainer\.extra\.packing must not be set, .*: data\.packing"),
     ({"loss_type": "dft"}, r"trainer\.extra\.loss_type must not be set, .*: trainer\.loss"),
     ({"learning_rate": 1.0}, r"trainer\.extra\.learning_rate must not be set, .*: trainer\.lr")],
)  # fmt: skip
def test_library_keyword_that_does_not_exist_is_refused(tiny, extra, message):
    run = tiny()
    run.trainer.extra = extra
    with pytest.raises(ConfigError, match=message):
        sft.arguments(run.trainer, "cpu", 0, "x", 1)


PREPARES = "ftexp prepares .* itself: "


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("completion_only_loss", False, f"{PREPARES}data.completion$"),
     ("assistant_only_loss", True, f"{PREPARES}data.completion$"),
     ("packing_strategy", "wrapped", f"{PREPARES}data.packing$"),
     ("truncation_mode", "keep_end", f"{PREPARES}data.long$"),
     ("chat_template_path", "x.jinja", f"{PREPARES}data.template$"),
     ("model_init_kwargs", {"dtype": "float16"}, f"{PREPARES}model.kind$"),
     ("auto_find_batch_size", True, "halved by itself"), ("save_only_model", True, "trainer.checkpoint_minutes"),
     ("save_steps", 5, "trainer.checkpoint_minutes"), ("eval_delay", 3, "trainer.report_steps"),
     ("eval_on_start", True, "trainer.report_steps"), ("load_best_model_at_end", True, "trainer.steps"),
     ("metric_for_best_model", "loss", "objectives"), ("greater_is_better", False, "objectives"),
     ("resume_from_checkpoint", "x", "the same command"), ("hub_model_id", "a/b", "ftexp export --push"),
     ("push_to_hub", True, "ftexp export --push"), ("deepspeed", "x.json", "sweep.gpus_per_trial"),
     ("dataloader_drop_last", True, "the rows that are left"), ("ignore_data_skip", True, "rows that it has not seen"),
     ("bf16_full_eval", True, r"model\.dtype$"), ("fp16_full_eval", False, r"model\.dtype$"),
     ("prediction_loss_only", True, "keys of eval"), ("batch_eval_metrics", True, "keys of eval"),
     ("include_for_metrics", ["inputs"], "keys of eval"), ("do_train", True, "a run trains"),
     ("do_eval", True, "a run trains"), ("do_predict", True, "a run trains"),
     ("num_generations_eval", 2, "once, greedily"), ("ref_model_mixup_alpha", 0.5, "the model before training"),
     ("ref_model_sync_steps", 5, "the model before training"), ("vllm_mode", "server", "not by vLLM"),
     ("label_names", ["labels"], "keys of eval"), ("length_column_name", "labels", "the tokens of each row"),
     ("remove_unused_columns", False, r"data\.columns says"),
     ("fsdp", True, "sweep.gpus_per_trial"), ("fsdp_config", {"a": 1}, "sweep.gpus_per_trial")],
)  # fmt: skip
def test_keyword_for_what_is_done_before_or_around_the_trainer_is_refused(tiny, name, value, told):
    run = tiny()
    run.trainer.extra = {name: value}
    with pytest.raises(ConfigError, match=rf"^trainer\.extra\.{name} must not be set.*{told}"):
        sft.arguments(run.trainer, "cpu", 0, "x", 1)


def test_keywords_that_are_refused_are_of_the_library():
    from trl import RLOOConfig

    known = [f.name for f in fields(RLOOConfig)]
    assert all(fnmatch.filter(known, pattern) for pattern in sft.INSTEAD)


def test_offloading_to_the_memory_of_a_cpu_is_refused_on_a_cpu(tiny, monkeypatch):
    monkeypatch.setattr(experiment.compute, "has_gpu", lambda: False)
    run = tiny("+trainer.extra.activation_offloading=true")
    with pytest.raises(ConfigError, match=r"^trainer\.extra\.activation_offloading must not be true on a CPU"):
        experiment.prepare(run)
    experiment.prepare(run, elsewhere=True)


def test_keys_that_stand_for_what_trl_would_prepare_are_there():
    assert {key for key in sft.PREPARED.values() if key} <= set(config.keys())


def test_keyword_that_only_trls_trainer_reads_is_refused_elsewhere(tiny):
    run = tiny("+trainer.extra.pad_to_multiple_of=8", "+trainer.extra.adam_beta2=0.5")
    assert sft.arguments(run.trainer, "cpu", 0, "x", 1).pad_to_multiple_of == 8
    for kind in (Method.classify, Method.reward, Method.dpo):
        run.trainer.kind = kind
        with pytest.raises(ConfigError, match=rf"pad_to_multiple_of must not be set with trainer\.kind={kind.value}:"):
            sft.arguments(run.trainer, "cpu", 0, "x", 1)


@pytest.mark.parametrize("kind", [Method.sft, Method.rloo])
def test_order_of_rows_is_ours(tiny, kind):
    """TRL would draw prompts by `shuffle_dataset`; `rloo.Order` does, whatever it says."""
    run = tiny("+trainer.extra.shuffle_dataset=false", "trainer.batch=4")
    run.trainer.kind = kind
    with pytest.raises(ConfigError, match=r"shuffle_dataset must not be set, ftexp prepares rows and model itself$"):
        sft.arguments(run.trainer, "cpu", 0, "x", 1)


@pytest.mark.parametrize("kind", list(Method))
def test_rows_drawn_otherwise_are_refused_for_every_method(tiny, tmp_path, kind):
    """`orders` says which rows come when, to DPO, to checkpoints and to the plan."""
    file = tmp_path / "loader.json"
    file.write_text('{"use_seedable_sampler": false}')
    run = tiny("trainer.batch=4")
    run.trainer.kind = kind
    for value in ({"use_seedable_sampler": False}, str(file)):
        run.trainer.extra = {"accelerator_config": value}
        with pytest.raises(
            ConfigError, match=r"^trainer\.extra\.accelerator_config must be without use_seedable_sampler"
        ):
            sft.arguments(run.trainer, "cpu", 0, "x", 1)
    usual = {"use_seedable_sampler": True, "even_batches": True, "dispatch_batches": False, "non_blocking": True,
             "gradient_accumulation_kwargs": {"sync_each_batch": True}}  # fmt: skip
    run.trainer.extra = {"accelerator_config": usual}
    assert sft.arguments(run.trainer, "cpu", 0, "x", 1).accelerator_config.even_batches  # type: ignore
    run.trainer.extra = {"accelerator_config": "nowhere.json"}
    with pytest.raises(ConfigError, match=r"^trainer\.extra is refused by \w+: .*No such file .*nowhere\.json"):
        sft.arguments(run.trainer, "cpu", 0, "x", 1)


@pytest.mark.parametrize("kind", list(Method))
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"split_batches": True}, "split_batches=true: trainer.batch and"),
        ({"dispatch_batches": True}, "dispatch_batches=true: each process"),
        ({"even_batches": False}, "even_batches=false: each process"),
        ({"use_configured_state": True}, "use_configured_state=true: each training"),
        ({"gradient_accumulation_kwargs": {"num_steps": 2}}, "num_steps: trainer.accumulation says"),
        ({"gradient_accumulation_kwargs": {"adjust_scheduler": True}}, "adjust_scheduler: trainer.accumulation says"),
    ],
)
def test_keys_of_the_loader_that_change_nothing_or_the_rows_of_a_step_are_refused(tiny, tmp_path, kind, given, told):
    """`num_steps=2` took twice the rows in each of the planned steps; the others nothing, on one device."""
    run = tiny("trainer.batch=4")
    run.trainer.kind = kind
    sft.arguments(run.trainer, "cpu", 0, "x", 1)  # which sets the device up: use_configured_state would take that
    (tmp_path / "loader.json").write_text(json.dumps(given))
    for value in (given, str(tmp_path / "loader.json")):
        run.trainer.extra = {"accelerator_config": value}
        with pytest.raises(ConfigError, match=rf"^trainer\.extra\.accelerator_config must be without {told}.*, got "):
            sft.arguments(run.trainer, "cpu", 0, "x", 1)


def test_what_the_trainer_writes_into_its_keywords_is_not_in_the_config(tiny, tmp_path):
    run = tiny("eval=loss", "+trainer.extra.accelerator_config={gradient_accumulation_kwargs:{sync_each_batch:true}}")
    experiment.execute(run, tmp_path / "run", "x")
    assert run.trainer.extra == {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}


def test_seed_of_the_rows_is_refused_where_groups_are_drawn_without_it(tiny):
    sft.arguments(tiny("+trainer.extra.data_seed=7").trainer, "cpu", 0, "x", 1)
    run = tiny("+trainer.extra.data_seed=7", "trainer.group_by_length=true")
    with pytest.raises(
        ConfigError, match=r"^trainer\.extra\.data_seed must not be set with trainer\.group_by_length=true"
    ):
        sft.arguments(run.trainer, "cpu", 0, "x", 1)


@pytest.mark.parametrize(
    ("extra", "told"),
    [({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs: .*unexpected keyword argument 'num_cycles'"),
     ({"optim_args": "x"}, "optim_args: not enough values to unpack")],
)  # fmt: skip
def test_keyword_that_the_schedule_or_the_optimizer_refuses_is_told_in_one_line(tiny, extra, told):
    run, drawn = tiny(), torch.get_rng_state()
    run.trainer.extra = extra
    with pytest.raises(ConfigError, match=rf"^trainer\.extra is refused by the Trainer, with {told}.*$"):
        sft.arguments(run.trainer, "cpu", 0, "x", 1)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_error_while_a_trainer_is_built_names_extra_where_there_is_some(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(sft, "_trainer", lambda *_: int("x"))
    for extra, kind in (({"adam_beta2": 0.5}, ConfigError), ({}, ValueError)):
        run = tiny("eval=loss")
        run.trainer.extra = extra
        with pytest.raises(kind, match="invalid literal") as caught:
            trained(run, tmp_path)
        assert str(caught.value).startswith("trainer.extra is refused by the Trainer, with adam_beta2: ") == bool(extra)


def only(trainer, name, bad, good):
    """Have some values of a keyword refused, and others taken."""
    for value in bad:
        trainer.extra = {name: value}
        with pytest.raises(ConfigError, match=rf"^trainer\.extra\.{name} must be .*, got {re.escape(repr(value))}$"):
            sft.arguments(trainer, "cpu", 0, "x", 1)
    for value in good:
        trainer.extra = {name: value}
        assert getattr(sft.arguments(trainer, "cpu", 0, "x", 1), name) == value


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [("adam_beta1", (5.0, 1.0, -0.1, float("nan")), (0.0, 0.95)),
     ("adam_beta2", (1.0, -1.0), (0, 0.999)),
     ("adam_epsilon", (-1.0, float("inf"), float("nan")), (0.0, 1e-6)),
     ("data_seed", (-1, 2**32), (0, 2**32 - 1, None)),
     ("dataloader_num_workers", (-1,), (0, 2)),
     ("router_aux_loss_coef", (-0.1, float("inf")), (0.0, None)),
     ("pad_to_multiple_of", (0, -8), (8,))],
)  # fmt: skip
def test_value_of_a_library_that_is_out_of_range_is_refused(tiny, name, bad, good):
    run = tiny()
    only(run.trainer, name, bad, good)


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [("temperature", (0.0, -1.0, float("nan")), (0.5, 5e-324)), ("top_p", (0.0, 1.5), (1.0, 0.1)),
     ("top_k", (-1,), (0, 50)), ("min_p", (-0.1, 1.1), (0.0, 1.0, None)), ("repetition_penalty", (0.0,), (1.2,)),
     ("epsilon", (-0.1,), (0.2,)), ("epsilon_high", (float("inf"),), (None, 0.3))],
)  # fmt: skip
def test_value_of_a_draw_that_is_out_of_range_is_refused(tiny, name, bad, good):
    run = tiny()
    run.trainer.kind, run.trainer.generations = Method.rloo, 2
    run.trainer.batch, run.trainer.accumulation = 2, 1
    only(run.trainer, name, bad, good)


def test_limits_are_of_keywords_of_the_library_and_hold_its_defaults():
    from trl import RLOOConfig, SFTConfig

    known = {f.name: f.default for made in (SFTConfig, RLOOConfig) for f in fields(made)}
    for name, (least, below, _) in sft.LIMITS.items():
        assert known[name] in (None, "auto") or least <= known[name] < below, name


def test_keywords_of_a_schedule_and_an_optimizer_are_taken(tiny):
    run = tiny("trainer.scheduler=cosine", "trainer.optimizer=rmsprop")
    run.trainer.extra = {"lr_scheduler_kwargs": {"num_cycles": 2}, "optim_args": "momentum=0.5"}
    assert sft.arguments(run.trainer, "cpu", 0, "x", 1).lr_scheduler_kwargs == {"num_cycles": 2}


def test_library_keyword_reaches_the_library(tiny):
    run = tiny("+trainer.extra.adam_beta2=0.5")
    assert sft.arguments(run.trainer, "cpu", 0, "x", 1).adam_beta2 == 0.5


def test_rows_are_handed_over_with_their_masks():
    rows = data.load(data.Data(rows=20, valid=2)).train
    from ftexp.model import tiny
    from ftexp.train import lengths

    example = prompts.render(rows[:1], tiny.tokenizer(), data.Data())[0]
    handed = lengths.dataset([example])[0]
    assert handed["input_ids"] == example.ids
    assert handed["labels"] == [-100] * len(example.prompt) + list(example.completion)


def test_training_without_gradients_is_over(tiny, tmp_path, monkeypatch):
    """A loss that no weight moves is finite and looks healthy; transformers trains on it to the end."""
    honest = sft.token_mean

    def stuck(*args):
        return honest(*args) * 0 + 5.0

    monkeypatch.setattr(sft, "token_mean", stuck)
    with pytest.raises(Diverged, match="diverged at step 3: no gradient for 3 steps"):
        trained(tiny("trainer.steps=6"), tmp_path)
    monkeypatch.setattr(sft, "DEAD_STEPS", 99)  # without the guard it ends well
    trained(tiny("trainer.steps=6"), tmp_path)


def rates(run, folder):
    """Learning rate of each trained weight, as the optimizer has it when training begins."""
    told = {}
    honest = sft.two_rates

    def spied(tuned, trainer, ratio):
        made = honest(tuned, trainer, ratio)
        names = {id(p): n for n, p in tuned.named_parameters()}
        told.update({names[id(p)]: (g["lr"], g["weight_decay"]) for g in made.param_groups for p in g["params"]})
        return made

    sft.two_rates = spied
    try:
        weights = trained(run, folder)
    finally:
        sft.two_rates = honest
    return told, weights


@pytest.mark.parametrize("lora", ["default", "dora"])
def test_b_learns_so_many_times_as_fast_as_a(tiny, tmp_path, lora):
    given = (f"lora={lora}", "trainer.lr=1e-3", "trainer.steps=1", "trainer.warmup=0", "trainer.weight_decay=0.1")
    told, fast = rates(tiny(*given, "lora.lr_ratio=8"), tmp_path)
    assert told.keys() == fast.keys()
    assert {rate for name, (rate, _) in told.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, (rate, _) in told.items() if "lora_A" not in name} == {8e-3}
    assert {decay for name, (_, decay) in told.items() if "lora_B" in name} == {0.1}
    nothing, slow = rates(tiny(*given), tmp_path)
    assert nothing == {}
    # Adam's first step is the learning rate for every weight whose gradient is not tiny
    steps = [max(w.abs().max().item() for n, w in part.items() if "lora_B" in n) for part in (fast, slow)]
    assert steps[0] / steps[1] == pytest.approx(8, rel=1e-3)


def test_killed_training_of_two_rates_or_of_the_whole_model_ends_with_the_same_bits(tiny, tmp_path):
    from test_answers import After

    from ftexp import experiment
    from ftexp.errors import Preempted
    from ftexp.runs import find

    for lora in ("loraplus", "none"):
        run = tiny(f"lora={lora}", "eval.generate=false", "trainer.neftune=5")
        here = tmp_path / lora
        experiment.execute(run, here / "calm", "x")
        with pytest.raises(Preempted):
            experiment.execute(run, here / "left", "x", control=Control(leave=After()))
        experiment.execute(run, here / "left", "x")
        assert find(str(here / "calm")).weights() == find(str(here / "left")).weights() is not None


@pytest.mark.parametrize(("processes", "stays"), [(1, False), (2, True)])
def test_empty_folder_of_checkpoints_goes_only_where_no_other_process_may_list_it(
    tmp_path, monkeypatch, processes, stays
):
    """The slower of two processes failed at the end of its training: the folder was gone while it was looking in."""
    from types import SimpleNamespace

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(sft.ranks, "count", lambda: processes)
    with sft.cleaned_up(SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path / "checkpoints")))):
        pass
    assert (tmp_path / "checkpoints").exists() is stays
