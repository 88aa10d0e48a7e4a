"""Causal attention within the rows of one sequence without padding, and its gradients.

Rows of about equal length are one product, the shorter ones filled up at their ends; never are two rows seen as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ftexp.errors import ConfigError

if TYPE_CHECKING:
    from ftexp.model.packed import Layout


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that attention takes as rows of one length, the shorter ones filled up at their ends."""

    length: int
    """Tokens of a row, filled up."""
    where: Any
    """Token at each place, (row * length): a slice of one row, else an index; filling repeats the row's last one."""
    inside: torch.Tensor | None
    """Places that are no filling, (token); None where all are."""
    outside: torch.Tensor | None
    """The others, (place); None where there are none."""
    tokens: Any
    """Tokens of the rows, as `inside` has them."""


def batch(length: int, rows: list[tuple[int, int]], device: Any) -> Batch:
    """Index rows, each of them begin and length, filled up to a length."""
    if len(rows) == 1:
        begin = rows[0][0]
        return Batch(length, slice(begin, begin + length), None, None, slice(begin, begin + length))
    begins, lengths = (torch.tensor(numbers, device=device)[:, None] for numbers in zip(*rows, strict=True))
    places = torch.arange(length, device=device)
    where = (begins + torch.minimum(places, lengths - 1)).view(-1)
    if all(size == length for _, size in rows):
        return Batch(length, where, None, None, where)
    full = (places < lengths).view(-1)
    inside = full.nonzero()[:, 0]
    return Batch(length, where, inside, (~full).nonzero()[:, 0], where[inside])


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    sliding_window: int | None = None, layout: Layout | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attend within rows, as transformers calls it.

    Takes query, key and value (1, head, position, width), and returns (1, position, head, width). Rows of about equal
    length are one product. Short rows, and soft caps, whose kernel ends otherwise, are taken one by one.
    """
    if layout is None:
        raise ConfigError(f"trainer.engine must be trl: {type(module).__name__} does not pass on where rows begin")
    heads, width = query.shape[1], query.shape[3]
    groups = layout.attended(heads, width, softcap is not None)
    scale = width**-0.5 if scaling is None else scaling
    out = _Attention.apply(
        *(x[0].transpose(0, 1) for x in (query, key, value)), groups, scale, softcap, sliding_window
    )  # fmt: skip
    return cast(torch.Tensor, out)[None], None


class _Attention(torch.autograd.Function):
    """Causal attention within rows, of and to (position, head, width)."""

    @staticmethod
    def forward(ctx: Any, query, key, value, groups, scale, softcap, window):
        out, kept = attended(query, key, value, groups, scale, softcap, window)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.groups, ctx.scale, ctx.softcap = groups, scale, softcap
        return out

    @staticmethod
    def backward(ctx: Any, g):  # type: ignore
        query, key, value, *kept = ctx.saved_tensors
        return *slopes(g, query, key, value, kept, ctx.groups, ctx.scale, ctx.softcap), None, None, None, None


def attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: list[Batch], scale: float,
    softcap: float | None, window: int | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """Attend within rows; heads that share keys are one product.

    Returns:
        What was seen, (position, head, width), and what the way back needs.
    """
    out = query.new_empty(*query.shape[:2], value.shape[2])
    kept = []
    for rows in groups:
        length = rows.length
        q, k, v = (_gathered(x, rows, key.shape[1]) for x in (query, key, value))
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        bent = None
        if softcap is not None:
            bent = scores.div_(softcap).tanh_()
            scores = bent * softcap
        hide = _hidden(length, window, query.device)
        scores = scores.view(len(k), -1, length, length).masked_fill_(hide, -torch.inf)
        precise = torch.promote_types(query.dtype, torch.float32)
        p = torch.softmax(scores, -1, dtype=precise).to(query.dtype).view(len(k), -1, length)
        _scatter(out, rows, torch.bmm(p, v))
        kept += [p] if bent is None else [p, bent]
    return out, kept


def slopes(
    g: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: list[torch.Tensor],
    groups: list[Batch], scale: float, softcap: float | None,
) -> list[torch.Tensor]:  # fmt: skip
    """Return the gradients of query, key and value, (position, head, width), from that of what was seen."""
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    given = iter(kept)
    precise = torch.promote_types(query.dtype, torch.float32)
    for rows in groups:
        q, k, v = (_gathered(x, rows, key.shape[1]) for x in (query, key, value))
        go = _gathered(g, rows, key.shape[1], bare=True)
        p = next(given)
        gv = torch.bmm(p.transpose(1, 2), go)
        weight = p.to(precise)
        gs = torch.bmm(go, v.transpose(1, 2)).to(precise).mul_(weight)
        gs = torch.addcmul(gs, weight, gs.sum(-1, keepdim=True), value=-1)
        if softcap is not None:
            gs = gs * (1 - next(given).to(precise).square())
        gs = gs.mul_(scale).to(query.dtype)
        _scatter(found[0], rows, torch.bmm(gs, k))
        _scatter(found[1], rows, torch.bmm(gs.transpose(1, 2), q))
        _scatter(found[2], rows, gv)
    return found


def _gathered(x: torch.Tensor, rows: Batch, shared: int, bare: bool = False) -> torch.Tensor:
    """Take rows out of (position, head, width), as (row * shared, heads that share * position, width).

    What fills up is the row's last token, which no query within the row sees, or zero where `bare`.
    """
    taken = x[rows.where]  # (row * position, head, width)
    if bare and rows.outside is not None:
        taken[rows.outside] = 0
    taken = taken.unflatten(0, (-1, rows.length)).transpose(1, 2)  # (row, head, position, width)
    return taken.reshape(len(taken) * shared, -1, x.shape[2])


def _scatter(out: torch.Tensor, rows: Batch, made: torch.Tensor) -> None:
    """Put rows back into (position, head, width), without what filled them up."""
    apart = made.view(-1, out.shape[1], rows.length, made.shape[-1]).transpose(1, 2)
    apart = apart.reshape(-1, out.shape[1], made.shape[-1])
    out[rows.tokens] = apart if rows.inside is None else apart[rows.inside]


@cache
def _hidden(length: int, window: int | None, device: Any) -> torch.Tensor:
    """Mark the keys a query does not see, (query, key): those after it, and those `window` or more before it."""
    hide = torch.ones(length, length, dtype=torch.bool, device=device).triu_(1)
    return hide if window is None else hide | torch.ones_like(hide).tril_(-window)
