"""What a trial will take, from its config and the lengths of its rows: nothing is loaded, nothing computed.

`trial` plans one; `against` sets a plan beside what a real run took.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, repeat
from typing import Any

from ftexp import config
from ftexp import model as models
from ftexp.config import Attention, Engine, Method, Packing, Run, Trainer, Variant
from ftexp.model import activations, sizes
from ftexp.model.compute import Compute
from ftexp.model.sizes import Outline
from ftexp.train import answers, lengths, losses, rewarder, rloo, sft

GIB = 2**30
SMALL = 4096
"""Below so many weights a tensor has its optimizer state in 32 bits (`min_8bit_size` of bitsandbytes)."""
BLOCK = 256
"""Values of one scale in bitsandbytes' 8-bit optimizers."""
REORDERING = ("train_sampling_strategy", "packing", "padding_free", "pad_to_multiple_of")
"""Keys of `trainer.extra` that change which rows share a batch, or how they are padded."""


@dataclass(frozen=True)
class Rows:
    """Training rows as far as their cost goes."""

    lengths: tuple[int, ...]
    """Tokens of each."""
    supervised: tuple[int, ...]
    """Supervised tokens of each, of a pair in both answers; 0 for a classifier."""
    counted: str = "by the tokenizer"
    """How the tokens were counted."""
    worse: tuple[int, ...] = ()
    """Of pairs of answers: tokens of the worse one with its prompt; `lengths` are those of the better one."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max((*self.lengths, *self.worse), default=0)


@dataclass(frozen=True)
class Batch:
    """A forward pass."""

    rows: int
    """Rows; both answers of a pair are one each."""
    longest: int
    """Tokens of its longest row; the others are padded to it."""
    tokens: int
    """Tokens of its rows without padding."""
    supervised: int


@dataclass(frozen=True)
class Plan:
    """What a trial takes."""

    trainable: int
    """Weights the optimizer changes."""
    total: int
    """All weights, each once."""
    packed: int
    """All weights as `numel` counts them: a pair of 4-bit weights once."""
    footprint: int
    """Bytes of the base by transformers' `get_memory_footprint`."""
    footprint_adapted: int
    """The same with the adapter on."""
    weights: int
    """Bytes of the base, scales of quantized weights included."""
    adapter: int
    """Bytes of the adapter."""
    copy: int
    """Bytes of base weights that are kept to put the base back; on a GPU they lie in host memory and do not count, but
    where they are the reference of reinforcement learning."""
    gradients: int
    """Bytes of the gradients."""
    optimizer: int | None
    """Bytes of the optimizer's state; null for an optimizer that is not known here."""
    activations: int | None
    """Peak bytes of a forward and backward pass on the largest batch; null where the model cannot be traced."""
    judge: int
    """Bytes of the reward model that says what completions are worth; 0 without one."""
    memory: int
    """Bytes at the peak of training: the sum of the seven above. Tensors alone: a GPU's allocator and context come on
    top, and a process on a CPU grew by 1.4 to 1.6 times what is not weights (embedded model, 8 and 16 rows)."""
    adapter_file: int
    """Bytes of the adapter's file; of the model's where there is no adapter."""
    checkpoint: int
    """Bytes of weights and optimizer state in a checkpoint; the tokenizer's files and the logs come on top."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Tokens that pass through the model in training, without padding."""
    padded: int
    """The same with padding."""
    flops: int
    """Operations of training as transformers counts them (`total_flos`): 6 * padded tokens * weights outside of
    embedding tables. A frozen base takes about two thirds, attention comes on top."""
    written: int
    """Tokens that the model writes in training, at most; 0 where it writes none. Reading them, and asking reference and
    reward model, comes on top of `flops`."""
    counted: str
    """How tokens were counted."""
    notes: tuple[str, ...] = ()
    """What is not exact, and why."""

    @property
    def share(self) -> float:
        """Trainable share of all weights."""
        return self.trainable / self.total


def rows(examples: Sequence[Any], run: Run) -> Rows:
    """Take lengths from tokenised rows of any method, or from the packs that training makes of them."""
    if run.trainer.kind is Method.sft and run.data.packing is not Packing.none:
        packs = lengths.packed(lengths.dataset(examples), run.data, quiet=True)
        learned = tuple(sum(label != -100 for label in labels) for labels in packs["labels"])
        return Rows(tuple(map(len, packs["input_ids"])), learned, "by the tokenizer, in packs")
    if run.trainer.kind in answers.KINDS:
        learned = tuple(len(p.chosen.completion) + len(p.rejected.completion) for p in examples)
        tokens = [len(e.ids) for e in answers.sides(examples)]
        return Rows(tuple(tokens[: len(examples)]), learned, worse=tuple(tokens[len(examples) :]))
    if run.trainer.kind is Method.rloo:
        most = rloo.room(run, examples)
        told = "by the tokenizer; at most, each prompt as the longest and each completion as long as it may be"
        return Rows(tuple(len(e.prompt) + most for e in examples), (most,) * len(examples), told)
    return Rows(tuple(len(e.ids) for e in examples), tuple(getattr(e, "supervised", 0) for e in examples))


def trial(run: Run, given: Rows, compute: Compute, labels: int = 0) -> Plan:
    """Plan a trial.

    Args:
        run: the checked config.
        given: its training rows.
        compute: how it computes.
        labels: outputs of a classification head; 0 for a language model.

    Raises:
        ConfigError: the model cannot be put together, or peft refuses the adapter.
        MachineError: the config of the model cannot be read.
    """
    asked = _asked(run, compute, labels)
    outlined, passes = _outlined(asked), list(batches(given, run.trainer, run.seed))
    peak, notes = _peak(asked, passes)
    state = optimizer_bytes(run.trainer.optimizer, outlined.tensors)
    notes += () if state is not None else (f"state of trainer.optimizer={run.trainer.optimizer} is not known here",)
    notes += tuple(f"trainer.extra.{key} makes other batches" for key in REORDERING if key in run.trainer.extra)
    adapter = outlined.adapted - outlined.footprint
    held = compute.device == "cpu" or run.trainer.kind is Method.rloo  # whose reference is put in place of the weights
    copy = outlined.changed if held else 0
    judge, written = (0, 0) if run.trainer.kind is not Method.rloo else (_judge(run), sum(b.supervised for b in passes))
    notes += ("how long completions get is seen while they are written",) if written else ()
    parts = (outlined.weights, adapter, copy, outlined.trained_bytes, state or 0, peak or 0, judge)
    flat = run.data.packing is Packing.bfd and compute.attention == "flash_attention_2"  # packs behind each other
    flat = flat or run.trainer.engine is Engine.packed
    padded = sum(b.tokens if flat else b.rows * b.longest for b in passes)
    return Plan(
        trainable=outlined.trainable,
        total=outlined.total,
        packed=outlined.packed,
        footprint=outlined.footprint,
        footprint_adapted=outlined.adapted,
        weights=outlined.weights,
        adapter=adapter,
        copy=copy,
        gradients=outlined.trained_bytes,
        optimizer=state,
        activations=peak,
        judge=judge,
        memory=sum(parts),
        adapter_file=outlined.adapter_file,
        checkpoint=outlined.trained_file + (state or 0),
        steps=sft.planned_steps(run.trainer, len(given.lengths)),
        tokens=sum(b.tokens for b in passes),
        padded=padded,
        flops=6 * padded * outlined.flop_weights,
        written=written,
        counted=given.counted,
        notes=notes,
    )


def _judge(run: Run) -> int:
    """Bytes of the reward model of a run, in the format that it was trained in."""
    kept = rewarder.found(run)
    told, compute = kept.config(), kept.trial["facts"]["compute"]
    key = config.digest(told.model, told.quant, told.lora)
    if key not in _judges:
        attention = _attention(compute["attention"])
        made = sizes.outline(told.model, told.quant, told.lora, compute["dtype"], attention, 1)
        _judges[key] = made.weights + made.adapted - made.footprint
    return _judges[key]


_judges: dict[str, int] = {}
_outlines: dict[str, dict[int, Outline]] = {}
"""Outlines of the model and kind of adapter that were planned last, by rank; two are made, others lie between them."""
_traces: dict[str, tuple[Any, tuple[str, ...]]] = {}


@dataclass(frozen=True)
class _Asked:
    """What an outline is made for."""

    key: str
    """Names the model and the kind of adapter."""
    run: Run
    dtype: str
    attention: str
    labels: int

    @property
    def rank(self) -> int:
        """The rank; without an adapter any is the same, so 2 stands for all."""
        return 2 if self.run.lora.variant is Variant.none else self.run.lora.r

    @property
    def ends(self) -> tuple[int, int] | None:
        """Two other ranks on whose line this one lies; None where it is to be put together itself.

        A side of length 1 is laid out otherwise, so rank 1 is on no line.
        """
        low, high, *_ = (*sorted(rank for rank in _outlines[self.key] if rank > 1), 0, 0)
        return (low, high) if high and self.rank > 1 and self.rank not in _outlines[self.key] else None

    def own(self) -> Outline:
        """Put the model together with an adapter of this very rank, once."""
        made, run = _outlines[self.key], self.run
        if self.rank not in made:
            made[self.rank] = sizes.outline(run.model, run.quant, run.lora, self.dtype, self.attention, self.labels)
        return made[self.rank]


def _asked(run: Run, compute: Compute, labels: int) -> _Asked:
    attention = _attention(compute.attention)
    kind = config.digest(run.model, run.quant, replace(run.lora, r=2, alpha=1.0)) + models.version(run.model)
    key = f"{kind} {compute.dtype} {attention} {labels}"
    if key not in _outlines:
        _outlines.clear()
        _traces.clear()
        _outlines[key] = {}
    return _Asked(key, run, compute.dtype, attention, labels)


def _outlined(asked: _Asked) -> Outline:
    """Return the outline of a model: put together for the first two ranks, and from those for every other."""
    if asked.ends is None:
        return asked.own()
    low, high = asked.ends
    return sizes.between(_outlines[asked.key][low], _outlines[asked.key][high], (low, high), asked.run.lora)


def _attention(name: str) -> str:
    """Take any fused attention for PyTorch's: they keep the same, and flash-attn need not be installed to plan."""
    return name if name == Attention.eager.value else Attention.sdpa.value


def _peak(asked: _Asked, passes: list[Batch]) -> tuple[int | None, tuple[str, ...]]:
    """Trace the largest batch; of several the one with most supervised tokens, as if the largest had them all."""
    wide = max(passes, key=lambda b: (b.rows * b.longest, b.longest))
    shape = (wide.rows, wide.longest, min(max(b.supervised for b in passes), wide.rows * wide.longest))
    if asked.ends is not None:
        low, high = asked.ends
        (one, notes), (other, _) = (_trace(asked, rank, shape) for rank in (low, high))
        if notes:
            return None, notes
        if len(one) == len(other):
            return int(sizes.line(one, other, (low, high), asked.rank).max()), ()
    asked.own()  # other operations at other ranks: they lie on no line
    told, notes = _trace(asked, asked.rank, shape)
    return (None if notes else int(told.max())), notes


def _trace(asked: _Asked, rank: int, shape: tuple[int, int, int]) -> tuple[Any, tuple[str, ...]]:
    """Return live bytes over a step at a rank that was put together, or what keeps them from being known."""
    how = asked.run.trainer
    key = f"{asked.key} {rank} {shape} {how.gradient_checkpointing} {how.loss.value} {how.loss_sha256}"
    if key not in _traces:
        made, terms = _outlines[asked.key][rank], losses.chosen(how)
        checkpointing, head = how.gradient_checkpointing, asked.labels > 0
        try:
            told = activations.trace(made.model, *shape, asked.attention, checkpointing, head, terms)
            _traces[key] = told + made.unpacked, ()
        except RuntimeError as error:
            _traces[key] = None, (f"activations are left out, the model cannot be traced: {str(error)[:100]}",)
    return _traces[key]


def batches(given: Rows, trainer: Trainer, seed: int) -> Iterator[Batch]:
    """List the forward passes of a training as the Trainer makes them.

    Each epoch draws an order (`sft.orders`), or groups of like length (`lengths.sampler`); an optimizer step takes
    `accumulation` passes, and fewer at the end of an epoch. With `kind=rloo` completions are not written yet, so each
    pass is as large as one can be.
    """
    count, size, steps = len(given.lengths), trainer.batch, sft.planned_steps(trainer, len(given.lengths))
    if trainer.kind is Method.rloo:
        most, learned = max(given.lengths), max(given.supervised)
        yield from repeat(Batch(size, most, size * most, size * learned), steps * trainer.accumulation)
        return
    drawn, taken, epoch = sft.orders(count, trainer, seed), 0, 0
    while taken < steps:
        if trainer.group_by_length:
            order = lengths.grouped(given.lengths, size * trainer.accumulation, seed, epoch)
        else:
            order = next(drawn)
        made = [_batch(given, order[begin : begin + size]) for begin in range(0, count, size)]
        an_epoch = math.ceil(len(made) / trainer.accumulation)
        yield from islice(made, (steps - taken) * trainer.accumulation)
        taken, epoch = taken + an_epoch, epoch + 1


def _batch(given: Rows, numbers: list[int]) -> Batch:
    lengths = [given.lengths[n] for n in numbers] + [given.worse[n] for n in numbers if given.worse]
    return Batch(len(lengths), max(lengths), sum(lengths), sum(given.supervised[n] for n in numbers))


def optimizer_bytes(name: str, tensors: Sequence[int]) -> int | None:
    """Bytes of an optimizer's state; None for one that is not in the list.

    AdamW of PyTorch keeps two float32 a weight and a count a tensor. That of bitsandbytes keeps two bytes a weight and
    two float32 scales for each 256 (tensors below 4096 weights: two float32 a weight); `paged` says where.

    >>> optimizer_bytes("adamw_torch", [10, 6]), optimizer_bytes("paged_adamw_8bit", [4096]), optimizer_bytes("x", [1])
    (136, 8320, None)

    Args:
        name: its name in transformers.
        tensors: weights in each trained tensor.
    """
    if name in ("adamw_torch", "adamw_torch_fused"):
        return sum(8 * n + 4 for n in tensors)
    if name in ("paged_adamw_32bit", "paged_adamw"):
        return sum(8 * n for n in tensors)
    if name in ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"):
        return sum(8 * n if n < SMALL else 2 * n + 8 * math.ceil(n / BLOCK) for n in tensors)
    return 0 if name == "sgd" else None


def dollars(seconds: float, usd_per_hour: float) -> float:
    """Return the price of a machine by the second.

    >>> dollars(5 * 3600, 0.29)
    1.45
    """
    return round(seconds / 3600 * usd_per_hour, 6)


def against(
    plan: Plan, parameters: dict[str, int], trained: dict[str, float], peak: float, whole: bool
) -> dict[str, Any]:
    """Set a plan beside what a run took.

    Args:
        plan: the plan.
        parameters: `trainable` and `total` as counted on the trained model.
        trained: what training returned: `train/steps` and `train/flops`.
        peak: GiB at the peak of training; on a GPU all that is allocated, on a CPU the growth over the loaded base,
            to which its allocator, libraries loaded late, and held-out scoring between the steps add.
        whole: whether `peak` holds the base too.

    Returns:
        For each size `planned` and `real`, and the relative error of the planned memory; the whole plan below `plan`.
    """
    memory = (plan.memory - (0 if whole else plan.weights)) / GIB
    real = {**parameters, "steps": int(trained["train/steps"]), "flops": int(trained["train/flops"])}
    told: dict[str, Any] = {key: {"planned": getattr(plan, key), "real": value} for key, value in real.items()}
    told["memory_gib"] = {"planned": memory, "real": peak, "error": memory / peak - 1 if peak > 0 else None}
    return told | {"plan": asdict(plan)}


def missed(told: dict[str, Any]) -> list[str]:
    """Name what should be exact in `against` and is not."""
    exact = ("trainable", "total", "steps", *(() if told["plan"]["notes"] else ("flops",)))
    return [
        f"{k} {told[k]['planned']} planned, {told[k]['real']} real" for k in exact if len(set(told[k].values())) > 1
    ]
