"""Supervised fine-tuning: TRL's SFTTrainer does the steps, on rows that are already token ids and loss masks."""

from __future__ import annotations

import difflib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import fields
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftexp import evaluate, metrics, ranks
from ftexp.config import RETIRED, Loss, Method, Packing, Run, Trainer, require
from ftexp.data.prompts import Example
from ftexp.errors import ConfigError, Diverged, FtexpError, OutOfTime, Preempted, Pruned
from ftexp.model import Base, accept
from ftexp.progress import progress
from ftexp.train import lengths, losses, spread
from ftexp.train.checkpoints import Store
from ftexp.train.control import Control, Report, Rung, at_work, left

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerCallback
    from trl import SFTConfig

DEAD_STEPS = 3
"""Steps in a row without any gradient after which a training is over: a step too large has left nothing to learn."""


PREPARED = {
    "assistant_only_loss": "data.completion",
    "chat_template_kwargs": "data.template",
    "chat_template_path": "data.template",
    "completion_only_loss": "data.completion",
    "dataset_kwargs": "",
    "dataset_num_proc": "",
    "dataset_text_field": "data.completion",
    "eos_token": "data.template",
    "eval_packing": "data.packing",
    "model_init_kwargs": "model.kind",
    "packing_strategy": "data.packing",
    "pad_token": "",
    "shuffle_dataset": "",
    "truncation_mode": "data.long",
    "trust_remote_code": "",
}
"""Keywords of TRL for what ftexp does itself, from rows to ids and masks and from files to a model -> the key for it.

TRL gets ids and labels and a model, so these would change nothing, or the tokenizer behind our back."""
INSTEAD = {
    "*_full_eval": "held-out rows are scored in the number format of training, model.dtype",
    "auto_find_batch_size": "a batch that finds no memory is halved by itself, and the effective batch kept",
    "batch_eval_metrics": "held-out rows are scored by ftexp, and keys of eval say how",
    "dataloader_drop_last": "the last step of an epoch takes the rows that are left, and data.rows sets their number",
    "deepspeed": "sweep.gpus_per_trial spreads a trial over GPUs",
    "do_*": "a run trains, and scores its held-out rows before and after",
    "eval_*": "trainer.report_steps says when held-out rows are scored, and keys of eval how",
    "fsdp*": "sweep.gpus_per_trial spreads a trial over GPUs",
    "greater_is_better": "objectives name what trials are ranked by, and metrics know their direction",
    "hub_*": "ftexp export --push uploads a finished run",
    "ignore_data_skip": "a run that was killed goes on with the rows that it has not seen",
    "include_for_metrics": "held-out rows are scored by ftexp, and keys of eval say how",
    "label_names": "held-out rows are scored by ftexp, and keys of eval say how",
    "length_column_name": "trainer.group_by_length goes by the tokens of each row",
    "load_best_model_at_end": "the weights of the last step are kept, and trainer.steps says which that is",
    "num_generations_eval": "a held-out prompt is answered once, greedily",
    "prediction_loss_only": "held-out rows are scored by ftexp, and keys of eval say how",
    "push_to_hub": "ftexp export --push uploads a finished run",
    "ref_model_*": "the reference of trainer.kind=rloo is the model before training, and stays so",
    "remove_unused_columns": "the Trainer gets ids and labels alone, and data.columns says which columns are read",
    "resume_from_checkpoint": "the same command goes on from its checkpoint",
    "save_*": "trainer.checkpoint_minutes says when checkpoints are kept",
    "vllm_*": "completions are written by transformers alone, not by vLLM",
}
"""Keywords of transformers and TRL, as patterns, for what ftexp does around a Trainer -> what to use; those with a key
of their own are in `config.RETIRED`.

They would be taken and do nothing, or upload a model before it is trained."""

LOADER = {
    "dispatch_batches": ((None, False), "each process reads its own rows"),
    "even_batches": ((True,), "each process takes as many forward passes as the others"),
    "split_batches": ((False,), "trainer.batch and sweep.gpus_per_trial say how many rows a process takes at once"),
    "use_configured_state": ((False,), "each training sets up its device anew"),
    "use_seedable_sampler": ((True,), "the order of the rows is drawn from seed and epoch"),
}
"""Keys of `accelerator_config`, what they may be, and why they may be nothing else.

On one device they would change nothing, but for the sampler; on several the rows of a step."""

INF, TINIEST = math.inf, math.ulp(0.0)
LIMITS = {
    "adam_beta1": (0, 1, "at least 0 and below 1"),
    "adam_beta2": (0, 1, "at least 0 and below 1"),
    "adam_epsilon": (0, INF, "0 or more, and finite"),
    "data_seed": (0, 2**32, "between 0 and 4294967295"),
    "dataloader_num_workers": (0, INF, "0 or more"),
    "ddp_bucket_cap_mb": (1, INF, "at least 1"),
    "ddp_timeout": (1, INF, "at least 1"),
    "epsilon": (0, INF, "0 or more, and finite"),
    "epsilon_high": (0, INF, "0 or more, and finite"),
    "min_p": (0, math.nextafter(1, 2), "in [0, 1]"),
    "pad_to_multiple_of": (1, INF, "at least 1, or auto"),
    "repetition_penalty": (TINIEST, INF, "above 0, and finite"),
    "router_aux_loss_coef": (0, INF, "0 or more, and finite"),
    "temperature": (TINIEST, INF, "above 0, and finite"),
    "top_k": (0, INF, "0 or more"),
    "top_p": (TINIEST, math.nextafter(1, 2), "above 0 and at most 1"),
}
"""Keywords of TRL and transformers whose values neither looks at before a model is loaded, some never: the least
value, what it must be below, and both in words. An optimizer or a generation would refuse it, or compute nonsense."""


def train(
    run: Run,
    base: Base,
    tuned: PeftModel | PreTrainedModel,
    rows: Sequence[Example],
    valid: Sequence[Example],
    kept: Store,
    report: Report,
    control: Control,
) -> dict[str, float]:
    """Train the adapter, or the thawed weights of the base, in place, from the start or from a checkpoint.

    On a CPU a training that was killed and went on ends with the bits of one that was not.

    Args:
        run: the checked config.
        base: the model the adapter sits on, and its tokenizer.
        tuned: the model with the adapter; the base itself where it has none.
        rows: training rows.
        valid: held-out rows of the curve, scored every `trainer.report_steps` steps.
        kept: checkpoints of this training, and the one to go on from.
        report: called with `train/loss`, `train/lr`, `train/grad_norm` every step and `valid/loss` at the rungs.
        control: what may end the training early.

    Returns:
        `train/steps`, the optimizer steps taken, `train/loss` of the last one, and `train/flops`, operations by
        transformers' count.

    Raises:
        Diverged: loss, gradient or weights stopped being finite; names the step.
        Pruned: the judge said so; the adapter is as it was at that rung.
        OutOfTime: the deadline has passed.
        Preempted: the process was asked to leave; a checkpoint of the last step is kept.
    """
    packs = lengths.packed(lengths.dataset(rows), run.data)
    steps = planned_steps(run.trainer, len(packs))
    settings = arguments(run.trainer, base.compute.device, run.seed, str(kept.folder), steps)
    if run.data.packing is Packing.bfd:
        lengths.check_apart(tuned, packs)
        settings.padding_free = base.compute.attention == "flash_attention_2"

    def curve(model: Any, label: str) -> Rung:
        table = evaluate.held_out(model, base.tokenizer, valid, run.eval, label)
        nats, tokens = [e["nats"] for e in table], [e["tokens"] for e in table]
        return Rung(metrics.loss(nats, tokens), nats, tokens, [e["unit"] for e in table])

    def make(watching: TrainerCallback) -> Any:
        return _trainer(run, base, tuned, settings, packs, watching, kept)

    return optimise(run, tuned, steps, curve, make, kept, report, control)


def optimise(
    run: Run, tuned: PeftModel | PreTrainedModel, steps: int, curve: Callable[[Any, str], Rung],
    make: Callable[[TrainerCallback], Any], kept: Store, report: Report, control: Control,
) -> dict[str, float]:  # fmt: skip
    """Run a Trainer with what every method needs around it: checkpoints, rungs, an early end, a clean model after it.

    Args:
        run: the checked config.
        tuned: the model with the adapter.
        steps: optimizer steps.
        curve: takes the model and a label for the screen, and returns the held-out loss.
        make: takes a callback and returns the Trainer.
        kept: checkpoints of this training, and the one to go on from.
        report: takes metrics and their step.
        control: what may end the training early.
    """
    resume = ranks.agreed(kept.resume)
    with progress(f"training {steps} steps", steps) as advance:
        advance(resume.step if resume else 0)
        stopped: list[BaseException] = []
        with _from_extra(run.trainer.extra):
            trainer = make(watch(run, curve, steps, report, advance, kept, control, stopped))
            if run.lora.lr_ratio != 1:
                trainer.optimizer = two_rates(tuned, trainer, run.lora.lr_ratio)
        with cleaned_up(trainer), at_work():
            trainer.train(resume_from_checkpoint=str(resume.folder) if resume else None)
    if stopped:
        raise stopped[0]
    check_weights(tuned, steps)
    last = next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)
    return {"train/steps": steps, "train/loss": last, "train/flops": trainer.state.total_flos}


def two_rates(tuned: Any, trainer: Any, ratio: float) -> Any:
    """Make the optimizer of LoRA+: matrices B, and vectors such as those of DoRA, learn `ratio` times as fast as A."""
    from peft.optimizers import create_loraplus_optimizer

    kind, keywords = trainer.get_optimizer_cls_and_kwargs(trainer.args, tuned)
    rate, decay = keywords.pop("lr"), trainer.args.weight_decay
    return create_loraplus_optimizer(
        tuned, kind, lr=rate, loraplus_lr_ratio=ratio, loraplus_lr_embedding=rate, loraplus_weight_decay=decay,
        **keywords,
    )  # fmt: skip


def orders(count: int, trainer: Trainer, seed: int, first: int = 0) -> Iterator[list[int]]:
    """Yield the order of the rows in each epoch, from epoch `first` on, as the Trainer draws it without groups.

    Each epoch draws from `seed` + epoch (accelerate's SeedableRandomSampler).
    """
    import torch

    start = trainer.extra.get("data_seed")
    draw = torch.Generator()
    for epoch in itertools.count(first):
        yield torch.randperm(count, generator=draw.manual_seed((seed if start is None else start) + epoch)).tolist()


def planned_steps(trainer: Trainer, rows: int) -> int:
    """Count optimizer steps over rows or packs: the last step of an epoch may hold fewer than the others.

    With `kind=rloo` a step holds whole prompts, and those left over at the end of an epoch are not trained on in it.
    """
    if trainer.steps is not None:
        return trainer.steps
    if trainer.kind is Method.rloo:
        return max(1, math.ceil(rows * trainer.generations // (trainer.batch * trainer.accumulation) * trainer.epochs))
    return max(1, math.ceil(steps_of_epoch(trainer, rows) * trainer.epochs))


def steps_of_epoch(trainer: Trainer, rows: int) -> int:
    """Count the optimizer steps of one pass over rows or packs."""
    return math.ceil(math.ceil(rows / trainer.batch) / trainer.accumulation)


def arguments(trainer: Trainer, device: str, seed: int, folder: str, steps: int) -> SFTConfig:
    """Translate the config to TRL's: an SFTConfig, with `kind=rloo` an RLOOConfig.

    Raises:
        ConfigError: `trainer.extra` names a keyword TRL does not know or would not act on, or gives one that the schema
            has, or a value out of range.
    """
    from transformers.training_args import OptimizerNames
    from trl import RLOOConfig, SFTConfig

    _check_extra(trainer)
    known = [name.value for name in OptimizerNames]
    if trainer.optimizer not in known:
        near = [name for name in known if name.startswith(trainer.optimizer)]
        near = near[:2] or difflib.get_close_matches(trainer.optimizer, known, n=1)
        hint = f"; did you mean {' or '.join(near)}?" if near else f": {', '.join(known)}"
        raise ConfigError(f"trainer.optimizer must be an optimizer of transformers, got {trainer.optimizer!r}{hint}")
    batch, accumulation = spread.shape(trainer, ranks.count())
    own: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": trainer.lr,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": trainer.scheduler.value,
        "warmup_steps": math.ceil(steps * trainer.warmup),
        "weight_decay": trainer.weight_decay,
        "max_grad_norm": trainer.max_grad_norm,
        "neftune_noise_alpha": trainer.neftune or None,
        "optim": trainer.optimizer,
        "gradient_checkpointing": trainer.gradient_checkpointing,
        "seed": seed,
        "use_cpu": device == "cpu",
        "train_sampling_strategy": "group_by_length" if trainer.group_by_length else "random",
        "bf16": False,  # the weights are loaded in the format that was chosen; autocast on top would round twice
        "fp16": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # the filter shows a diverged loss as 0.0
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": device == "cuda",
    }
    if ranks.count() > 1 and "ddp_find_unused_parameters" not in trainer.extra:
        own["ddp_find_unused_parameters"] = False  # every weight that is trained has its part in every loss
    if trainer.kind is not Method.rloo:
        own |= {"max_length": None}  # rows were refused where too long, so nothing is cut here
        return _accepted(SFTConfig, own, trainer.extra)
    own |= {
        "num_generations": trainer.generations,
        "beta": 0.0,  # RLOOTrainer would load the reference from files; `rloo.train` gives it ours
        "num_iterations": 1,  # a checkpoint keeps no completions, so a step uses those that it has written
        "steps_per_generation": None,
        "generation_batch_size": None,
        "sync_ref_model": False,
        "disable_dropout": False,  # for good; `answers.undisturbed` does so for a while
        "use_vllm": False,
    }
    return _accepted(RLOOConfig, own, trainer.extra)


def _accepted(made: Any, own: dict[str, Any], extra: dict[str, Any]) -> SFTConfig:
    """Make the config of a Trainer whose values are in range, and whose optimizer and schedule take theirs."""
    import torch
    from transformers import Trainer as Stepper
    from transformers import get_scheduler

    settings = cast("SFTConfig", accept(made, own, deepcopy(extra), "trainer.extra"))  # the Trainer writes into it
    _check_loader(extra.get("accelerator_config"))
    for name in sorted(LIMITS.keys() & extra.keys()):
        (least, below, rule), value = LIMITS[name], extra[name]
        require(not isinstance(value, int | float) or least <= value < below, f"trainer.extra.{name}", value, rule)
    weights = [torch.nn.Parameter(torch.zeros(1))]
    with _from_extra(extra):
        if "optim_args" in extra and not settings.optim_target_modules:  # which are of a model
            kind, keywords = Stepper.get_optimizer_cls_and_kwargs(settings, cast(Any, torch.nn.Module()))
            kind(weights, **keywords)
        if "lr_scheduler_kwargs" in extra:
            keywords = cast(Any, settings.lr_scheduler_kwargs)
            get_scheduler(settings.lr_scheduler_type, torch.optim.SGD(weights), 0, 1, keywords)
    return settings


def _check_loader(given: dict[str, Any] | str | None) -> None:
    """Refuse keys of `accelerator_config`, or of the file it names, that would change nothing or which rows a step has.

    Raises:
        ConfigError: names the key.
    """
    from transformers.trainer_pt_utils import AcceleratorConfig

    if given is None:
        return
    told: Any = AcceleratorConfig(**given) if isinstance(given, dict) else AcceleratorConfig.from_json_file(given)
    wrong = {name: why for name, (allowed, why) in LOADER.items() if getattr(told, name) not in allowed}
    steps = {*(told.gradient_accumulation_kwargs or {})} - {"sync_each_batch"}
    wrong |= dict.fromkeys(sorted(steps), "trainer.accumulation says how many forward passes a step has")
    for name, why in wrong.items():
        value = "" if name in steps else f"={str(getattr(told, name)).lower()}"
        require(False, "trainer.extra.accelerator_config", given, f"without {name}{value}: {why}")


@contextmanager
def _from_extra(extra: dict[str, Any]):
    """Tell in one line that a library refuses what `trainer.extra` hands to it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not extra or isinstance(error, FtexpError):
            raise
        told = " ".join(str(error).split())
        raise ConfigError(
            f"trainer.extra is refused by the Trainer, with {', '.join(sorted(extra))}: {told}"
        ) from error


def _check_extra(trainer: Trainer) -> None:
    """Refuse keywords of TRL that would be taken and do nothing, so that trials with and without them are the same."""
    from transformers import TrainingArguments
    from trl import SFTConfig

    for name in sorted(trainer.extra):
        if name in PREPARED:
            key = f": {PREPARED[name]}" if PREPARED[name] else ""
            raise ConfigError(f"trainer.extra.{name} must not be set, ftexp prepares rows and model itself{key}")
        found = next((pattern for pattern in INSTEAD if fnmatchcase(name, pattern)), None)
        if found and name not in RETIRED:
            raise ConfigError(f"trainer.extra.{name} must not be set: {INSTEAD[found]}")
    if trainer.group_by_length and "data_seed" in trainer.extra:
        raise ConfigError(
            "trainer.extra.data_seed must not be set with trainer.group_by_length=true: seed alone draws the groups"
        )
    if trainer.kind not in (Method.sft, Method.rloo):
        of_trl = {f.name for f in fields(SFTConfig)} - {f.name for f in fields(TrainingArguments)} - set(RETIRED)
        for name in sorted(of_trl & set(trainer.extra)):
            raise ConfigError(
                f"trainer.extra.{name} must not be set with trainer.kind={trainer.kind.value}: TRL's SFTTrainer alone "
                "reads it, and transformers' Trainer takes the steps"
            )


def _trainer(
    run: Run, base: Base, tuned: Any, settings: SFTConfig, dataset: Dataset, watch: TrainerCallback, kept: Store
) -> Any:
    from transformers import PrinterCallback
    from trl import SFTTrainer

    own_head, terms = has_adapted_head(tuned), losses.chosen(run.trainer)
    pad, several = cast(int, base.tokenizer.pad_token_id), ranks.count()

    class SupervisedRows(SFTTrainer):
        """SFTTrainer with the loss of `ftexp/train/losses.py`, from the logits of supervised positions alone.

        TRL's own is left where Triton runs, for nll: it builds no logits there. Elsewhere it projects every prompt
        token, a fifth of a step of a small model. Where the head has an adapter it would miss it, since it multiplies
        with the head's frozen weights.
        """

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["labels"]
            ours = (
                own_head or run.trainer.loss is not Loss.nll or labels.device.type == "cpu" or spread.is_blank(labels)
            )
            balanced = self.aux_loss_enabled and not spread.is_blank(labels)
            if return_outputs or not (ours or balanced):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            passes = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            balance = self.router_aux_loss_coef / passes if balanced else 0.0
            if not ours:
                loss, told = super().compute_loss(model, inputs, True, num_items_in_batch)
                return loss - balance * told.aux_loss.detach()  # which is learned and not told
            # gradients are averaged over processes
            return token_mean(model, inputs, num_items_in_batch, terms, balance / several) * several

        def _get_train_sampler(self, train_dataset=None):
            grouped = settings.train_sampling_strategy == "group_by_length"
            if several > 1:
                return spread.sampler(count, settings.per_device_train_batch_size * several, order, begun)
            usual = super()._get_train_sampler(train_dataset)
            return lengths.sampler(usual, settings.seed) if grouped else usual

    count, sizes = len(dataset), [len(ids) for ids in dataset["input_ids"]] if several > 1 else []
    begun = kept.resume.step // steps_of_epoch(run.trainer, count) if kept.resume else 0

    def order(epoch: int) -> list[int]:
        if run.trainer.group_by_length:
            return lengths.grouped(sizes, run.trainer.batch * run.trainer.accumulation, run.seed, epoch)
        return next(orders(count, run.trainer, run.seed, epoch))

    dataset = spread.blank(dataset, pad) if several > 1 else dataset
    apart = "seq_lengths" in dataset.column_names and not settings.padding_free
    with _bare_head(tuned), as_they_are(tuned), routed_as_before(base.model):
        trainer = SupervisedRows(
            tuned, settings, train_dataset=dataset, processing_class=base.tokenizer, callbacks=[watch],
            data_collator=partial(lengths.collate, pad=pad) if apart else None,
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def has_adapted_head(model: Any) -> bool:
    """Tell whether the output layer of a model has an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(model.get_output_embeddings(), BaseTunerLayer)


@contextmanager
def _bare_head(model: Any):
    """Show TRL the output layer under its adapter: it refuses an adapted one, whose adapter its own loss would miss."""
    if has_adapted_head(model):
        layer = model.get_output_embeddings().base_layer
        model.get_output_embeddings = lambda: layer
    try:
        yield
    finally:
        model.__dict__.pop("get_output_embeddings", None)


@contextmanager
def as_they_are(model: Any):
    """Keep trained weights in the format they have: TRL rounds those on a quantized base to bfloat16.

    Steps of a small learning rate would be lost, and a training that goes on from a checkpoint, whose weights come back
    in float32, would end with other bits.
    """
    kept = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
    try:
        yield
    finally:
        for weight, value in kept:
            weight.data = value


ROUTED = ("output_router_logits", "router_aux_loss_coef")
"""Settings of a mixture of experts that TRL writes into the config of a model, where it has them."""


@contextmanager
def routed_as_before(model: PreTrainedModel):
    """Put back what TRL writes into the config of a mixture of experts; in training it asks each pass itself.

    Left there, every pass of the base would compute a loss of its routers, those of later trials and of scoring too.
    """
    text = model.config.get_text_config()
    before = {name: getattr(text, name) for name in ROUTED if hasattr(text, name)}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(text, name, value)


def token_mean(
    model: Any, inputs: dict[str, Any], tokens: Any, terms: Callable[[Any, Any], Any] = losses.nll, balance: float = 0.0
) -> Any:
    """Sum of a loss over the supervised tokens of a forward pass, divided by those of the whole optimizer step.

    Args:
        model: a causal language model, with or without an adapter.
        inputs: `input_ids`, `labels`, and `attention_mask` or, of packed rows, `position_ids`; each (row, position).
        tokens: supervised tokens over all forward passes of the step; None where this pass is the step. Dividing by
            it makes accumulation exact: 8 rows at once and 2 rows four times give the same gradient.
        terms: takes logits (supervised, vocabulary) and targets (supervised,), returns a term for each (supervised,).
        balance: of a mixture of experts: weight of the loss of its routers (Fedus et al. 2021, arXiv:2101.03961,
            equation 4), as TRL adds it. It has its gradient here and no share in the value, which stays a token mean.
    """
    told, targets = evaluate.supervised(
        model, inputs["input_ids"], inputs.get("attention_mask"), inputs["labels"], inputs.get("position_ids"),
        routed=balance > 0,
    )  # fmt: skip
    mean = terms(told.logits[0].float(), targets).sum() / (len(targets) if tokens is None else tokens)
    return mean + balance * (told.aux_loss - told.aux_loss.detach()) if balance else mean


@contextmanager
def cleaned_up(trainer: Any):
    """Take NEFTune's hook off however training ends; transformers leaves it on after an exception.

    An empty folder of checkpoints goes too, but of several processes: a slower one may still be listing it.
    """
    try:
        yield
    finally:
        if ranks.count() == 1:
            with suppress(OSError):  # keeps the folder where it holds a checkpoint
                Path(trainer.args.output_dir).rmdir()
        if getattr(trainer, "neftune_hook_handle", None) is not None:
            trainer.neftune_hook_handle.remove()


def watch(
    run: Run, curve: Callable[[Any, str], Rung], steps: int, report: Report, advance: Callable[..., None],
    kept: Store, control: Control, stopped: list[BaseException],
) -> TrainerCallback:  # fmt: skip
    """Make the callback that reports steps and held-out losses, writes checkpoints, and ends training early.

    `curve` takes the model and a label for the screen, and returns the held-out loss.
    """
    from transformers import TrainerCallback

    asked, minutes, saved = control, run.trainer.checkpoint_minutes, [time.monotonic()]
    dead: list[int] = []
    names = {
        "loss": "train/loss", "learning_rate": "train/lr", "grad_norm": "train/grad_norm",
        "reward": "train/reward", "kl": "train/kl", "completions/mean_length": "train/length",  # of RLOOTrainer
    }  # fmt: skip
    still = run.trainer.kind is Method.rloo  # completions that are worth the same teach nothing for a while

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            spread.own_draws(run.seed)

        def on_log(self, args, state, control, logs=None, **kwargs):
            told = {names[key]: float(value) for key, value in (logs or {}).items() if key in names}
            if not told:
                return
            for name, value in told.items():
                if not math.isfinite(value):
                    raise Diverged(f"diverged at step {state.global_step}: {name} is {value}")
            dead[:] = [*dead, state.global_step] if told.get("train/grad_norm") == 0.0 and not still else []
            if len(dead) == DEAD_STEPS:
                raise Diverged(f"diverged at step {state.global_step}: no gradient for {DEAD_STEPS} steps")
            report(told, state.global_step)
            advance(1, f"loss {told.get('train/loss', math.nan):.3f}")

        def on_step_end(self, args, state, control, model=None, **kwargs):
            every, step = run.trainer.report_steps, state.global_step
            if every and step % every == 0 and ranks.agreed(asked.due(step, every, steps)):
                held_out = curve(model, f"step {step}")
                if not math.isfinite(held_out.loss):
                    raise Diverged(f"diverged at step {step}: valid/loss is {held_out.loss}")
                report({"valid/loss": held_out.loss}, step)
                # Training ends by the flag: an exception from a callback would leave the Trainer half set up.
                if asked.judge is not None and (reason := asked.judge(held_out, step)) is not None:
                    stopped.append(Pruned(reason))
            if asked.deadline is not None and time.monotonic() > asked.deadline:
                stopped.append(OutOfTime(f"ran out of time at step {step} of {steps}"))
            if asked.leave.is_set() and step < steps and not stopped:
                stopped.append(left(f"asked to leave at step {step} of {steps}"))
            late = minutes is not None and time.monotonic() - saved[0] >= 60 * minutes
            stopped[:], late = ranks.agreed((stopped, late))
            control.should_training_stop = control.should_training_stop or bool(stopped)
            leaving = bool(stopped) and isinstance(stopped[0], Preempted)
            due = late and not stopped
            control.should_save = (leaving or due) and step < steps

        def on_save(self, args, state, control, **kwargs):
            ranks.meet()  # each process writes the state of its own generator
            if ranks.rank() == 0:
                kept.seal(state.global_step)
            ranks.meet()
            saved[0] = time.monotonic()

    return Watch()


def check_weights(tuned: PeftModel | PreTrainedModel, steps: int) -> None:
    """Refuse trained weights that are not finite."""
    for name, weight in tuned.named_parameters():
        if weight.requires_grad and not weight.isfinite().all():
            raise Diverged(f"diverged by step {steps}: {name} is not finite")
