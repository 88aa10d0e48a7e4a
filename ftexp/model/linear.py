"""A linear layer of the base, and every member's adapter on its stretch of the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional

from ftexp.errors import ConfigError

if TYPE_CHECKING:
    from ftexp.model.packed import Layout, Pack


class Linear(nn.Module):
    """A linear layer of the base, and every member's adapter on its stretch."""

    def __init__(self, base: nn.Module, name: str, pack: Pack) -> None:
        super().__init__()
        self.base, self.name, self._pack = base, name, (pack,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take inputs (1, position, in) to outputs (1, position, out)."""
        layout = cast("Layout", self._pack[0].layout)
        if x.shape[:-1] != layout.ids.shape:
            raise ConfigError(
                f"trainer.engine must be trl: {self.name} sees {tuple(x.shape[:-1])} tokens of "
                f"{tuple(layout.ids.shape)}"
            )
        parts, weights = [], []
        for adapter, begin, end in layout.members:
            if self.name in adapter.weights:
                dropout = adapter.dropout if layout.training else 0.0
                parts.append((begin, end, adapter.scales[self.name], dropout, adapter.draw))
                weights += adapter.weights[self.name]
        sizes = layout.sizes if self._pack[0].apart else [len(x[0])]
        return _Product.apply(x.squeeze(0), self.base, sizes, parts, *weights)[None]  # type: ignore


def dense(base: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights (out, in) of a linear layer, unpacked where they are quantized."""
    layer = cast(Any, base)
    if (state := getattr(layer.weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, state).to(dtype)
    if hasattr(layer.weight, "SCB"):
        kept = layer.state if layer.state.CB is not None else layer.weight
        return kept.CB.to(dtype, copy=True).mul_(kept.SCB.unsqueeze(1).mul(1 / 127))
    return layer.weight


def product(base: nn.Module, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Outputs of a frozen layer, (token, out), for x (token, in), taken `sizes` tokens at a time."""
    if x.is_cuda and hasattr(base.weight, "SCB"):
        return base(x)  # LLM.int8(): inputs are quantized too; on a CPU bitsandbytes trains with unpacked weights
    weight, bias = dense(base, x.dtype), cast(Any, base).bias
    if len(sizes) == 1:
        return functional.linear(x, weight, bias)
    y = x.new_empty(len(x), len(weight))
    for mine, out in zip(x.split(sizes), y.split(sizes), strict=True):
        if bias is None:
            torch.mm(mine, weight.t(), out=out)
        else:
            torch.addmm(bias, mine, weight.t(), out=out)
    return y


def returned(base: nn.Module, g: torch.Tensor, sizes: list[int], into: torch.Tensor | None = None) -> torch.Tensor:
    """Gradient at the inputs of a frozen layer, (token, in), of that at its outputs, (token, out); added to `into`."""
    weight = dense(base, g.dtype)
    if len(sizes) == 1 and into is None:
        return g @ weight
    gx = g.new_empty(len(g), weight.shape[1]) if into is None else into
    for mine, out in zip(g.split(sizes), gx.split(sizes), strict=True):
        if into is None:
            torch.mm(mine, weight, out=out)
        else:
            out.addmm_(mine, weight)
    return gx


class _Product(torch.autograd.Function):
    """y = x W^T + bias, and s (drop(x) A^T) B^T on each member's stretch. W is frozen and has no gradient."""

    @staticmethod
    def forward(ctx: Any, x, base, sizes, parts, *weights):
        y = product(base, x, sizes)
        inner, masks = [], []
        for n, (begin, end, scale, dropout, draw) in enumerate(parts):
            a, b = weights[2 * n], weights[2 * n + 1]
            mine = x[begin:end]
            if dropout:
                kept = torch.rand(mine.shape, generator=draw, device=x.device) >= dropout
                masks.append(kept.to(x.dtype).mul_(1 / (1 - dropout)))
                mine = mine * masks[-1]
            h = torch.mm(mine, a.t()).mul_(scale)
            y[begin:end].addmm_(h, b.t())
            inner.append(h)
        ctx.save_for_backward(x, *weights, *inner, *masks)
        ctx.base, ctx.sizes, ctx.parts = base, sizes, parts
        return y

    @staticmethod
    def backward(ctx: Any, g):  # type: ignore
        count = len(ctx.parts)
        x, *rest = ctx.saved_tensors
        weights, inner, masks = rest[: 2 * count], rest[2 * count : 3 * count], iter(rest[3 * count :])
        g = g.contiguous()
        gx = returned(ctx.base, g, ctx.sizes) if ctx.needs_input_grad[0] else None
        found = []
        for n, (begin, end, scale, dropout, _) in enumerate(ctx.parts):
            a, b, mine, mask = weights[2 * n], weights[2 * n + 1], x[begin:end], next(masks) if dropout else None
            gh = torch.mm(g[begin:end], b).mul_(scale)
            ga = torch.mm(gh.t(), mine if mask is None else mine * mask)
            found += [ga, torch.mm(g[begin:end].t(), inner[n])]
            if gx is not None and mask is None:
                gx[begin:end].addmm_(gh, a)
            elif gx is not None:
                gx[begin:end] += torch.mm(gh, a).mul_(cast(torch.Tensor, mask))
        return gx, None, None, None, *found
