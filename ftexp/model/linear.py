"""A linear layer of the base, and every member's adapter on its stretch of the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional

from ftexp.errors import ConfigError

if TYPE_CHECKING:
    from ftexp.model.packed import Layout, Pack


Kept = list[tuple[list[torch.Tensor], list[torch.Tensor]]]
"""Of each member: inner products (token, rank) of its adapters on some layers, and masks of their dropout."""


class Linear(nn.Module):
    """A linear layer of the base, and every member's adapter on its stretch."""

    def __init__(self, base: nn.Module, name: str, pack: Pack) -> None:
        super().__init__()
        self.base, self.name, self._pack = base, name, (pack,)
        self._read = Read([base], [name], pack)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take inputs (1, position, in) to outputs (1, position, out)."""
        layout = cast("Layout", self._pack[0].layout)
        if x.shape[:-1] != layout.ids.shape:
            raise ConfigError(
                f"trainer.engine must be trl: {self.name} sees {tuple(x.shape[:-1])} tokens of "
                f"{tuple(layout.ids.shape)}"
            )
        return _Product.apply(x.squeeze(0), self._read, layout, *self._read.weights(layout))[None]  # type: ignore


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


class Read:
    """Frozen linear layers that read the same input, W x + b, and on them s B A drop(x) of each member's adapters."""

    def __init__(self, layers: Sequence[nn.Module], names: Sequence[str], pack: Pack) -> None:
        self.layers, self.names, self._pack = layers, names, pack

    def weights(self, layout: Layout) -> list[torch.Tensor]:
        """List A and B of each adapter here, member by member."""
        found = (a.weights[n] for a, _, _ in layout.members for n in self.names if n in a.weights)
        return [w for pair in found for w in pair]

    def _sizes(self, layout: Layout) -> list[int]:
        return layout.sizes if self._pack.apart else [layout.ids.shape[1]]

    def forward(self, x: torch.Tensor, layout: Layout) -> tuple[list[torch.Tensor], Kept]:
        """Return the outputs of each layer for x (token, in), and what the gradient needs."""
        made = {n: product(layer, x, self._sizes(layout)) for n, layer in zip(self.names, self.layers, strict=True)}
        kept: Kept = []
        for adapter, begin, end in layout.members:
            mine, here = x[begin:end], [n for n in self.names if n in adapter.weights]
            masks, inner = [], []
            if layout.training and adapter.dropout:
                for n in here:
                    drawn = torch.rand(mine.shape, generator=adapter.draw, device=x.device) >= adapter.dropout
                    masks.append(drawn.to(x.dtype).mul_(1 / (1 - adapter.dropout)))
                    inner.append(torch.mm(mine * masks[-1], adapter.weights[n][0].t()))
            elif here:
                first = _joined([adapter.weights[n][0] for n in here])
                inner = [*torch.mm(mine, first.t()).split([len(adapter.weights[n][0]) for n in here], 1)]
            for n, h in zip(here, inner, strict=True):
                made[n][begin:end].addmm_(h.mul_(adapter.scales[n]), adapter.weights[n][1].t())
            kept.append((inner, masks))
        return list(made.values()), kept

    def backward(
        self, gs: Sequence[torch.Tensor], x: torch.Tensor, kept: Kept, layout: Layout, further: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Return the gradient at x, if it goes further, and those of `weights`, from those at each layer's outputs."""
        gx = None
        for layer, g in zip(self.layers, gs, strict=True):
            gx = returned(layer, g, self._sizes(layout), gx) if further else None
        given, found = dict(zip(self.names, gs, strict=True)), []
        for (adapter, begin, end), (inner, masks) in zip(layout.members, kept, strict=True):
            mine, here = x[begin:end], [n for n in self.names if n in adapter.weights]
            theirs = [given[n][begin:end] for n in here]
            back = [torch.mm(g, adapter.weights[n][1]).mul_(adapter.scales[n])
                    for n, g in zip(here, theirs, strict=True)]  # fmt: skip
            if masks:
                firsts = [torch.mm(b.t(), mine * mask) for b, mask in zip(back, masks, strict=True)]
            elif here:
                whole = torch.cat(back, 1) if len(back) > 1 else back[0]
                firsts = [*torch.mm(whole.t(), mine).split([b.shape[1] for b in back])]
            if gx is not None and masks:
                for n, b, mask in zip(here, back, masks, strict=True):
                    gx[begin:end] += torch.mm(b, adapter.weights[n][0]).mul_(mask)
            elif gx is not None and here:
                gx[begin:end].addmm_(whole, _joined([adapter.weights[n][0] for n in here]))
            for g, first, h in zip(theirs, firsts if here else [], inner, strict=True):
                found += [first, torch.mm(g.t(), h)]
        return gx, found


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Product(torch.autograd.Function):
    """One layer that reads an input alone."""

    @staticmethod
    def forward(ctx: Any, x, read, layout, *weights):
        (y,), kept = read.forward(x, layout)
        ctx.read, ctx.layout, ctx.kept = read, layout, (x, kept)
        return y

    @staticmethod
    def backward(ctx: Any, g):  # type: ignore
        (x, kept), ctx.kept = ctx.kept, None
        gx, found = ctx.read.backward([g.contiguous()], x, kept, ctx.layout, ctx.needs_input_grad[0])
        return gx, None, None, *found
