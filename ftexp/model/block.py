"""A decoder layer of the Llama family with every member's adapters, as one function with its gradient written out.

What autograd would record of a layer is some hundred small steps, each of which reads and writes all tokens; on a CPU,
and on a GPU with few tokens, those take longer than the products. Here a layer keeps what its gradient needs and no
more, and adapters of layers that read the same input are multiplied together. That LoRA gains by gradients written out
is known from Unsloth; the formulas are those of autograd, and the roundings forward are those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional

from ftexp.errors import ConfigError
from ftexp.model.attention import attended, slopes
from ftexp.model.linear import Read

if TYPE_CHECKING:
    from ftexp.model.packed import Layout, Pack

KINDS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
"""Layers of transformers that compute this, and nothing else."""
READS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
         ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip
"""Linear layers that read the same input, in the order of the forward pass."""


def fits(module: nn.Module) -> bool:
    """Tell whether a module is a layer that this computes."""
    kind = type(module)
    if kind.__name__ not in KINDS or not kind.__module__.startswith("transformers.models."):
        return False
    return type(cast(Any, module).mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")


class Block(nn.Module):
    """Stands in for a decoder layer."""

    def __init__(self, base: nn.Module, name: str, pack: Pack) -> None:
        super().__init__()
        self.base, self._pack = base, (pack,)
        attention = cast(Any, base).self_attn
        self.width, self.scale = int(attention.head_dim), float(attention.scaling)
        self.window = (
            attention.sliding_window if hasattr(attention, "sliding_window")
            else getattr(attention.config, "sliding_window", None)
        )  # fmt: skip
        self.reads = tuple(
            Read([base.get_submodule(n) for n in names], [f"{name}.{n}" for n in names], pack) for names in READS
        )

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any = None, layout: Layout | None = None, **_: Any
    ) -> torch.Tensor:
        """Take hidden states (1, position, width) to as many, as transformers calls it."""
        if layout is None or hidden_states.shape[:-1] != layout.ids.shape:
            raise ConfigError(f"trainer.engine must be trl: {type(self.base).__name__} does not see the tokens alone")
        cos, sin = (table[0] for table in position_embeddings)
        weights = [w for read in self.reads for w in read.weights(layout)]
        return cast(Any, _Layer.apply(hidden_states[0], cos, sin, self, layout, *weights))[None]


class _Layer(torch.autograd.Function):
    """x + attention(norm(x)), and on it what the feed-forward network makes of its norm. Bases are frozen."""

    @staticmethod
    def forward(ctx: Any, x, cos, sin, block, layout, *weights):
        base, (qkv, out, wide, down) = block.base, block.reads
        inverse, normed = rms_normed(base.input_layernorm, x)
        (q, k, v), in_qkv = qkv.forward(normed, layout)
        q, k, v = (part.view(len(x), -1, block.width) for part in (q, k, v))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        groups = layout.attended(q.shape[1], block.width, False)
        seen, shares = attended(q, k, v, groups, block.scale, None, block.window)
        seen = seen.view(len(x), -1)
        (y,), in_out = out.forward(seen, layout)
        middle = y.add_(x)
        inverse2, normed2 = rms_normed(base.post_attention_layernorm, middle)
        (gate, up), in_wide = wide.forward(normed2, layout)
        bent = _each(functional.silu, layout, gate)
        most = bent * up
        (z,), in_down = down.forward(most, layout)
        ctx.block, ctx.layout = block, layout
        ctx.kept = (x, cos, sin, inverse, normed, in_qkv, q, k, v, groups, shares, seen, in_out, middle, inverse2,
                    normed2, in_wide, gate, up, bent, most, in_down)  # fmt: skip
        return z.add_(middle)

    @staticmethod
    def backward(ctx: Any, g):  # type: ignore
        block, layout, (qkv, out, wide, down) = ctx.block, ctx.layout, ctx.block.reads
        (x, cos, sin, inverse, normed, in_qkv, q, k, v, groups, shares, seen, in_out, middle, inverse2, normed2,
         in_wide, gate, up, bent, most, in_down) = ctx.kept  # fmt: skip
        ctx.kept = None
        further = ctx.needs_input_grad[0]
        gmost, of_down = down.backward([g.contiguous()], most, in_down, layout, True)
        gup = bent.mul_(gmost)
        ggate = _each(torch.ops.aten.silu_backward, layout, gmost.mul_(up), gate)
        gnormed, of_wide = wide.backward([ggate, gup], normed2, in_wide, layout, True)
        gmiddle = _unnormed(block.base.post_attention_layernorm, gnormed, middle, inverse2).add_(g)
        gseen, of_out = out.backward([gmiddle], seen, in_out, layout, True)
        gq, gk, gv = slopes(gseen.view(len(x), -1, block.width), q, k, v, shares, groups, block.scale, None)
        gq, gk = rotated(gq, cos, sin, back=True), rotated(gk, cos, sin, back=True)
        each = [part.view(len(x), -1) for part in (gq, gk, gv)]
        gnormed, of_qkv = qkv.backward(each, normed, in_qkv, layout, further)
        gx = _unnormed(block.base.input_layernorm, gnormed, x, inverse).add_(gmiddle) if further else None
        return gx, None, None, None, None, *of_qkv, *of_out, *of_wide, *of_down


def rms_normed(norm: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale rows of x (token, width) by 1 / root of their mean square; returns that factor (token, 1) and the result.

    RMSNorm, arXiv:1910.07467, in at least float32, with the roundings of transformers.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = exact.square().mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
    return inverse, (exact * inverse).to(x.dtype).mul_(norm.weight)


def _unnormed(norm: Any, g: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return the gradient at x from that of its norm: f (w g - n mean(w g n)), where n = f x; all (token, width)."""
    precise = inverse.dtype
    slope, n = (g * norm.weight).to(precise), x.to(precise) * inverse
    share = slope * n
    return slope.sub_(torch.mul(n, share.mean(-1, keepdim=True), out=share)).mul_(inverse).to(x.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Turn (x1, x2), the halves of (token, head, width), to (x1 c1 - x2 s1, x2 c2 + x1 s2); `back` is the transpose.

    Rotary positions, arXiv:2104.09864, with the halves that transformers pairs, and its roundings; tables are
    (token, width).
    """
    made, half = torch.empty_like(x), x.shape[-1] // 2
    (x1, x2), (y1, y2) = x.split(half, -1), made.split(half, -1)
    (c1, c2), (s1, s2) = (table[:, None].split(half, -1) for table in (cos, sin))
    torch.mul(x1, c1, out=y1)
    torch.mul(x2, c2, out=y2)
    if back:
        y1.add_(x2 * s2)
        y2.sub_(x1 * s1)
    else:
        y1.sub_(x2 * s1)
        y2.add_(x1 * s2)
    return made


def _each(function: Callable[..., torch.Tensor], layout: Layout, *given: torch.Tensor) -> torch.Tensor:
    """Apply a function to each member's values (token, width): its kernel treats the last few of a tensor otherwise."""
    if len(layout.sizes) == 1:
        return function(*given)
    return torch.cat([function(*parts) for parts in zip(*(x.split(layout.sizes) for x in given), strict=True)])
