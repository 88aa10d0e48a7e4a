"""Several LoRA adapters on one base in one forward and backward pass, each with the bits it has alone.

The rows of all members lie behind each other in one sequence without padding. Linear layers multiply all of it with
the frozen base once, so that weights are read, and 4-bit ones unpacked, once for all; then each member's stretch with
its own adapter. Attention takes rows of about equal length together, and never two rows as one.

On a CPU a member's numbers do not depend on who else is there. What would make them depend is done member by member:
products of adapters, elementwise functions whose kernels end in another formula than they begin with, and rows so
short that the matrix library takes another way for one than for many. Matrix products of PyTorch's libraries give a row
the same bits among 16 rows and among thousands, but not always among fewer (measured for MKL and oneDNN on AVX2 and
AVX-512 chips), so a member brings at least `FEWEST` tokens. On chips with AMX they do not: there `steady` sees it, and
each member's rows are multiplied by themselves. On a GPU kernels are chosen by size, and equality is up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional

from ftexp.errors import ConfigError
from ftexp.model.attention import Batch, Row, attend, batch
from ftexp.model.block import Block, fits
from ftexp.model.linear import Linear
from ftexp.model.prefix import common

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name of a linear layer of the base -> A (rank, in) and B (out, rank), as peft stores them."""

ATTENTION = "ftexp_rows"
"""Name in transformers of the attention below."""
FEWEST = 16
"""A member's tokens in a forward pass are filled up to so many."""
SMALL = 16**3
"""Multiplications up to which oneDNN leaves a product to another kernel (PyTorch's `mkldnn_gemm` rule)."""
SHORT = 64
"""Rows up to so many tokens are filled up to the longest of them in attention."""
ALIKE_LENGTH = 0.75
"""Rows of at least this share of another's length are filled up to it in attention: fewer and larger products."""
MANY, ROWS = 2048, (16, 17, 24, 33, 48, 65, 91, 128, 200, 231, 300, 453, 700, 912, 1386)
"""Rows of a product whose bits are compared with those of some of them, and how many."""
WORTH = 0.05
"""Share of a member's tokens that are saved from which on the prefix of its rows is computed once: attention behind a
prefix takes a few more steps."""
CHUNK = 512
"""Rows of logits that are in memory at once."""
ALIKE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest error against the model's own logits, as a share of the largest; of 16-bit and quantized weights `ROUGH`."""
ROUGH = 5e-2


@dataclass(eq=False)
class Adapter:
    """What one member adds to the base in a forward pass."""

    weights: Weights
    """In the format the base computes in."""
    scales: dict[str, float]
    """Name of a layer -> alpha / r, or alpha / sqrt(r)."""
    dropout: float
    """Share of inputs of the adapter that are zeroed in training."""
    draw: torch.Generator
    """Of the dropout, this member's alone."""
    noisy: bool = False
    """Whether each row has noise of its own on its embeddings in training."""


def taken(tuned: PeftModel | PreTrainedModel) -> tuple[Weights, dict[str, float]]:
    """Copy the weights and scales of the adapter that peft put on a base.

    Raises:
        ConfigError: an adapter sits on the output head, or on a layer that is not linear.
    """
    base: Any = cast(Any, tuned).base_model.model
    weights, scales = {}, {}
    for name, layer in base.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        what = type(cast(Any, layer).get_base_layer())
        if not issubclass(what, nn.Linear):
            raise ConfigError(
                f"lora.targets must name linear layers with trainer.engine=packed: {name} is {what.__name__}"
            )
        if layer is cast(Any, base).get_output_embeddings():
            raise ConfigError(f"lora.targets must leave the output head out with trainer.engine=packed, got {name}")
        a, b = cast(Any, layer).lora_A["default"].weight, cast(Any, layer).lora_B["default"].weight
        weights[name] = (a.detach().clone(), b.detach().clone())
        scales[name] = float(cast(Any, layer).scaling["default"])
    return weights, scales


def put(tuned: PeftModel | PreTrainedModel, weights: Weights) -> None:
    """Copy trained weights into the adapter that peft put on a base."""
    layers = dict(cast(Any, tuned.base_model.model).named_modules())
    with torch.no_grad():
        for name, (a, b) in weights.items():
            cast(Any, layers[name]).lora_A["default"].weight.copy_(a)
            cast(Any, layers[name]).lora_B["default"].weight.copy_(b)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the rows of each member lie in the one sequence of a forward pass."""

    ids: torch.Tensor
    """Token ids, (1, position)."""
    positions: torch.Tensor
    """Place of each token in its row, (1, position)."""
    members: tuple[tuple[Adapter, int, int], ...]
    """Adapter, begin and end of each member's stretch."""
    rows: tuple[Row, ...]
    """Where each row lies."""
    own: tuple[tuple[Row, ...], ...]
    """Those of each member, without what fills up."""
    training: bool
    batches: dict[bool, list[Batch]] = field(default_factory=dict)
    """Rows that attention takes together, made once: with others of a length, or one by one."""

    def attended(self, heads: int, width: int, alone: bool) -> list[Batch]:
        """Group rows for attention, of which each has so many heads of a width.

        Those of a member come in the same order alone and beside others.
        """
        if alone not in self.batches:
            grouped: dict[tuple[int, int], list[Row]] = {}
            single: list[tuple[tuple[int, int], list[Row]]] = []
            for row in self.rows:
                if alone or heads * row.filled * (row.prefixed + row.filled) * width <= SMALL:
                    single.append(((row.prefixed, row.length), [row]))
                else:
                    grouped.setdefault((row.prefixed, row.filled), []).append(row)
            order = [*sorted(grouped.items()), *single]
            self.batches[alone] = [batch(n, prefixed, rows, self.ids.device) for (prefixed, n), rows in order]
        return self.batches[alone]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each member."""
        return [end - begin for _, begin, end in self.members]


def lay_out(given: Sequence[tuple[Adapter, Sequence[list[int]]]], pad: int, device: Any, training: bool) -> Layout:
    """Lay the rows of members behind each other.

    The prefix that all rows of a member share, such as a template's system prompt, is there once: it has the same
    hidden states in each of them, and what they ask of it adds up in its gradient. Where rows draw dropout or noise of
    their own it differs.

    Args:
        given: each member's adapter and the token ids of its rows.
        pad: token that fills a stretch up to `FEWEST` tokens, in a row of its own that nothing sees.
        device: of the base.
        training: whether adapters drop inputs, and rows have noise.
    """
    ids: list[int] = []
    positions: list[int] = []
    members, rows, own = [], [], []
    for adapter, texts in given:
        begin, mine = len(ids), []
        differ = training and (adapter.noisy or adapter.dropout > 0)
        prefix = 0 if differ else _prefix(texts)
        said = [prefix if n else 0 for n in range(len(texts))]  # the first row has it for all
        missing = FEWEST - sum(map(len, texts)) + sum(said)
        whole, said = ([*texts, [pad] * missing], [*said, 0]) if missing > 0 else (texts, said)
        sizes = [len(text) - before for text, before in zip(whole, said, strict=True)]
        for text, before, size, most in zip(whole, said, sizes, _shared(sizes, said), strict=True):
            mine.append(Row(len(ids), size, most, begin if before else 0, before))
            ids += text[before:]
            positions += range(before, len(text))
        members.append((adapter, begin, len(ids)))
        rows += mine
        own.append(tuple(mine[: len(texts)]))
    text, places = (torch.tensor([numbers], device=device) for numbers in (ids, positions))
    return Layout(text, places, tuple(members), tuple(rows), tuple(own), training)


def _prefix(texts: Sequence[list[int]]) -> int:
    """Count the tokens of the prefix that rows share, or 0 where it is not worth it; each row keeps one of its own."""
    if len(texts) == 1:
        return 0
    same = common(texts, min(map(len, texts)) - 1)
    return same if same * (len(texts) - 1) >= WORTH * sum(map(len, texts)) else 0


def _shared(lengths: list[int], prefixes: list[int]) -> list[int]:
    """Length that each row of a member is filled up to in attention: that of one at most a third longer.

    Rows behind other prefixes have no say, nor have those of other members, or a member's bits would depend on them.
    """
    filled, longest = [0] * len(lengths), {}
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        most = longest.get(prefixes[n], 0)
        if not most or (most > SHORT and lengths[n] < ALIKE_LENGTH * most):
            most = longest[prefixes[n]] = lengths[n]
        filled[n] = most
    return filled


class Pack:
    """The base while it serves several adapters."""

    def __init__(self, model: PreTrainedModel, count: int) -> None:
        """Take a base for so many members at most."""
        self.model = model
        self.layout: Layout | None = None
        self.apart = count > 1 and not steady(model)
        """Whether each member's rows are multiplied with the base by themselves."""

    @contextmanager
    def on(self, names: set[str]) -> Iterator[None]:
        """Serve adapters on the named layers; the base is as it was afterwards.

        Raises:
            ConfigError: the base draws dropout of its own, or does not let its attention be chosen.
        """
        own = [n for n, m in self.model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
        if own or getattr(self.model.config, "attention_dropout", 0.0):
            raise ConfigError(
                f"trainer.engine must be trl: the model has dropout of its own, at {(*own, 'its attention')[0]}"
            )
        attention = cast(str, self.model.config._attn_implementation)
        was: dict[str, nn.Module] = {}
        try:
            _choose(self.model, ATTENTION)
            whole = ""
            for name, module in list(self.model.named_modules(remove_duplicate=False)):
                if whole and name.startswith(f"{whole}."):
                    continue  # within a layer that is computed as a whole
                if (made := self._instead(name, module, names)) is not None:
                    was[name] = module
                    self.model.set_submodule(name, made)
                    whole = name if isinstance(made, Block) else ""
            yield
        finally:
            for name, module in was.items():
                self.model.set_submodule(name, module)
            _choose(self.model, attention)

    def _instead(self, name: str, module: nn.Module, names: set[str]) -> nn.Module | None:
        """Return what stands in for a module: for a linear layer with adapters, and for what is done by member."""
        if fits(module):
            return Block(module, name, self)
        frozen = self.apart and isinstance(module, nn.Linear) and module is not self.model.get_output_embeddings()
        if name in names or frozen:
            return Linear(module, name, self)
        if type(module).__name__.endswith("RotaryEmbedding"):
            return Rotary(module, self)
        return Elementwise(module, self) if isinstance(module, _activations()) else None

    def hidden(self, layout: Layout, noise: dict[int, torch.Tensor]) -> torch.Tensor:
        """Run the base up to its output head.

        Args:
            layout: the rows.
            noise: begin of a row -> noise on its embeddings, (token, width); where there is any.

        Returns:
            Hidden states, (1, position, width).
        """
        embedded = self.model.get_input_embeddings()(layout.ids)
        if noise:
            embedded = embedded.clone()
            for begin, more in noise.items():
                embedded[0, begin : begin + len(more)] += more
        self.layout = layout
        try:
            return self.model.base_model(
                inputs_embeds=embedded, position_ids=layout.positions, use_cache=False, layout=layout
            ).last_hidden_state
        finally:
            self.layout = None


def steady(model: PreTrainedModel) -> bool:
    """Tell whether the layers of a base give a row the same bits among few rows and among many, by trying.

    Measured on an Intel chip with AMX: in bfloat16, and in float32 with two threads, the order in which a row's terms
    are added depends on how many rows there are, and one element in some thousands is rounded otherwise.
    """
    if model.device.type != "cpu":
        return True  # nothing is promised there
    shapes = {(m.in_features, m.out_features) for m in model.base_model.modules() if isinstance(m, nn.Linear)}
    kernel = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore
    return all(_steady(*shape, model.dtype, torch.get_num_threads(), kernel) for shape in sorted(shapes))


@cache
def _steady(inner: int, outer: int, dtype: torch.dtype, threads: int, kernel: str) -> bool:
    """Compare a product's bits, and those of its way back; threads and kernel, a part of the key, are in force."""
    draw = torch.Generator().manual_seed(0)
    weight, x, g = (
        torch.randn(*shape, generator=draw).to(dtype) for shape in ((outer, inner), (MANY, inner), (MANY, outer))
    )
    with torch.no_grad():
        y, gx = functional.linear(x, weight), g @ weight
        return all(
            torch.equal(functional.linear(x[:n], weight), y[:n]) and torch.equal(g[:n] @ weight, gx[:n]) for n in ROWS
        )


@cache
def _activations() -> tuple[type, ...]:
    """List the classes of elementwise functions that transformers builds models from."""
    from transformers.activations import ACT2CLS

    found = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()}
    return tuple(kind for kind in found if isinstance(kind, type) and issubclass(kind, nn.Module))


def _choose(model: PreTrainedModel, attention: str) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    model.set_attn_implementation(attention)
    if model.config._attn_implementation != attention:
        raise ConfigError(f"trainer.engine must be trl: {type(model).__name__} does not let its attention be chosen")


class Elementwise(nn.Module):
    """An activation function, taken of each member's stretch: its kernel treats the last few values otherwise."""

    def __init__(self, base: nn.Module, pack: Pack) -> None:
        super().__init__()
        self.base, self._pack = base, (pack,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take values (1, position, width) to as many."""
        sizes = cast(Layout, self._pack[0].layout).sizes
        return self.base(x) if len(sizes) == 1 else torch.cat([self.base(part) for part in x.split(sizes, 1)], 1)


class Rotary(nn.Module):
    """Cosines and sines of positions, taken of each member's stretch."""

    def __init__(self, base: nn.Module, pack: Pack) -> None:
        super().__init__()
        self.base, self._pack = base, (pack,)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *more: Any, **named: Any) -> Any:
        """Return the tables for positions (1, position)."""
        layout = cast(Layout, self._pack[0].layout)
        made = [self.base(x, part, *more, **named) for part in position_ids.split(layout.sizes, 1)]
        return tuple(torch.cat(parts, 1) for parts in zip(*made, strict=True))


def head(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Project hidden states (token, width) onto the vocabulary, in at least float32."""
    layer = cast(Any, model.get_output_embeddings())
    logits = functional.linear(hidden, layer.weight, layer.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cap = _cap(model)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _cap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def nats(model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of targets (token,) after hidden states (token, width), in nats, float64."""
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([_nats(head(model, h), t)[0] for h, t in parts])


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of targets (token,), float64; of logits (token, vocabulary) remain exp(logit - largest) and its sums."""
    logits.sub_(logits.amax(-1, keepdim=True))
    told = logits.gather(-1, targets[:, None])[:, 0].double()
    sums = logits.exp_().sum(-1)
    return sums.double().log() - told, sums


def learned(
    model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of targets (token,), and the gradient of their sum / `tokens` at the hidden states (token, width).

    The head is frozen, so its gradient ends here: softmax minus one-hot, times its weights. Logits are kept for
    `CHUNK` tokens at a time.
    """
    layer, cap = cast(Any, model.get_output_embeddings()), _cap(model)
    found, gradient = [], torch.empty_like(hidden)
    for begin in range(0, len(hidden), CHUNK):
        part, goal = hidden[begin : begin + CHUNK], targets[begin : begin + CHUNK]
        slope = head(model, part)
        bent = None if cap is None else 1 - (slope / cap).square()
        told, sums = _nats(slope, goal)
        found.append(told)
        slope.div_(sums[:, None])
        slope[torch.arange(len(goal), device=goal.device), goal] -= 1
        if bent is not None:
            slope *= bent
        gradient[begin : begin + CHUNK] = slope.div_(tokens).to(hidden.dtype) @ layer.weight
    return torch.cat(found), gradient


def check_alike(model: PreTrainedModel, texts: Sequence[list[int]], pad: int, count: int) -> None:
    """Refuse a model that the pass above would compute otherwise than it does itself, by its logits on a few rows.

    Raises:
        ConfigError: they differ by more than rounding, or a layer that `count` members must be taken through one by one
            sees other rows than theirs.
    """
    pack = Pack(model, count)
    draw = torch.Generator(model.device)
    with torch.no_grad():
        own = torch.cat([model(input_ids=torch.tensor([t], device=model.device)).logits[0] for t in texts])
        with pack.on(set()):
            layout = lay_out([(Adapter({}, {}, 0.0, draw), texts)], pad, model.device, False)
            where = [row.place(n) for row, text in zip(layout.own[0], texts, strict=True) for n in range(len(text))]
            mine = head(model, pack.hidden(layout, {})[0, where])
    error = ((mine - own).abs().max() / own.abs().max()).item()
    plain = getattr(model, "quantization_method", None) is None
    limit = ALIKE.get(model.dtype, ROUGH) if plain else ROUGH
    if not error <= limit:
        raise ConfigError(
            f"trainer.engine must be trl: {type(model).__name__} computes something that the packed engine does not, "
            f"its logits differ by {error:.1g} of the largest"
        )
