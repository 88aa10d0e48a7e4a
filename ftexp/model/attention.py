"""Causal attention within the rows of one sequence without padding, and its gradients.

Rows of about equal length are one product, the shorter ones filled up at their ends; never are two rows seen as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ftexp.errors import ConfigError

if TYPE_CHECKING:
    from ftexp.model.packed import Layout

SMALLEST = 128
"""Tokens of the first mask that is made."""


@dataclass(frozen=True)
class Row:
    """Where a row lies in the sequence: its own tokens, behind a prefix that an earlier row has too."""

    begin: int
    """Of its own tokens."""
    length: int
    """Of them."""
    filled: int
    """To which attention fills them up."""
    prefix: int = 0
    """Begin of the tokens before them, within that row."""
    prefixed: int = 0
    """How many those are."""

    def place(self, token: int) -> int:
        """Return where in the sequence a token of the row lies."""
        return self.prefix + token if token < self.prefixed else self.begin + token - self.prefixed


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that attention takes as rows of one length, the shorter ones filled up at their ends."""

    length: int
    """Tokens of a row that ask, filled up."""
    prefixed: int
    """Tokens of its prefix, which are asked too."""
    where: Any
    """Token at each place that asks, (row * length): a slice of one row, else an index; filling repeats the last."""
    asked: Any
    """Token at each place that is asked, (row * (prefixed + length)), in the same way."""
    inside: torch.Tensor | None
    """Places that are no filling, (token); None where all are."""
    outside: torch.Tensor | None
    """The others, (place); None where there are none."""
    tokens: Any
    """Tokens of the rows, as `inside` has them."""
    prefixes: tuple[tuple[int, int, int], ...]
    """Begin of each prefix, and the rows that have it, from one and up to another."""


def batch(length: int, prefixed: int, rows: list[Row], device: Any) -> Batch:
    """Index rows, filled up to a length, behind prefixes of so many tokens."""
    if len(rows) == 1 and not prefixed:
        here = slice(rows[0].begin, rows[0].begin + length)
        return Batch(length, 0, here, here, None, None, here, ())
    begins, lengths, before = (
        torch.tensor(numbers, device=device)[:, None]
        for numbers in zip(*((r.begin, r.length, r.prefix) for r in rows), strict=True)
    )
    places = torch.arange(length, device=device)
    own = begins + torch.minimum(places, lengths - 1)
    before = before + torch.arange(prefixed, device=device)
    where, asked = own.view(-1), torch.cat([before, own], 1).view(-1)
    prefixes = _spans([row.prefix for row in rows]) if prefixed else ()
    if all(row.length == length for row in rows):
        return Batch(length, prefixed, where, asked, None, None, where, prefixes)
    full = (places < lengths).view(-1)
    inside = full.nonzero()[:, 0]
    return Batch(length, prefixed, where, asked, inside, (~full).nonzero()[:, 0], where[inside], prefixes)


def _spans(numbers: list[int]) -> tuple[tuple[int, int, int], ...]:
    """Tell each number that follows itself, and where it begins and ends.

    >>> _spans([7, 7, 0, 9])
    ((7, 0, 2), (0, 2, 3), (9, 3, 4))
    """
    begins = [n for n, number in enumerate(numbers) if n == 0 or number != numbers[n - 1]]
    return tuple((numbers[b], b, e) for b, e in zip(begins, [*begins[1:], len(numbers)], strict=True))


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
        length, whole = rows.length, rows.prefixed + rows.length
        q = _gathered(query, rows.where, length, key.shape[1])
        k, v = (_gathered(x, rows.asked, whole, key.shape[1]) for x in (key, value))
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        bent = None
        if softcap is not None:
            bent = scores.div_(softcap).tanh_()
            scores = bent * softcap
        hide = hidden(length, whole, window, query.device)
        scores = scores.view(len(k), -1, length, whole).masked_fill_(hide, -torch.inf)
        precise = torch.promote_types(query.dtype, torch.float32)
        p = torch.softmax(scores, -1, dtype=precise).to(query.dtype).view(len(k), -1, whole)
        _scatter(out, rows, _apart(torch.bmm(p, v), length, out.shape[1]))
        kept += [p] if bent is None else [p, bent]
    return out, kept


def slopes(
    g: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: list[torch.Tensor],
    groups: list[Batch], scale: float, softcap: float | None,
) -> list[torch.Tensor]:  # fmt: skip
    """Return the gradients of query, key and value, (position, head, width), from that of what was seen.

    A prefix is asked by several rows. Their gradients at it are added up batch by batch, in one order, so that a
    member's do not depend on others, and no run on chance.
    """
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    precise = torch.promote_types(query.dtype, torch.float32)
    more: list[tuple[int, int, torch.Tensor]] = []
    given = iter(kept)
    for rows in groups:
        length, whole = rows.length, rows.prefixed + rows.length
        q = _gathered(query, rows.where, length, key.shape[1])
        k, v = (_gathered(x, rows.asked, whole, key.shape[1]) for x in (key, value))
        go = _gathered(g, rows.where, length, key.shape[1], rows.outside)
        p = next(given)
        gv = torch.bmm(p.transpose(1, 2), go)
        weight = p.to(precise)
        gs = torch.bmm(go, v.transpose(1, 2)).to(precise).mul_(weight)
        gs = torch.addcmul(gs, weight, gs.sum(-1, keepdim=True), value=-1)
        if softcap is not None:
            gs = gs * (1 - next(given).to(precise).square())
        gs = gs.mul_(scale).to(query.dtype)
        _scatter(found[0], rows, _apart(torch.bmm(gs, k), length, query.shape[1]))
        for n, made in enumerate((torch.bmm(gs.transpose(1, 2), q), gv)):
            apart = _apart(made, whole, key.shape[1])
            for begin, first, end in rows.prefixes:
                more.append((1 + n, begin, apart[first:end, : rows.prefixed].sum(0)))  # in float32 within
            _scatter(found[1 + n], rows, apart[:, rows.prefixed :])
    for n, begin, summed in more:
        found[n][begin : begin + len(summed)] += summed
    return found


def _gathered(
    x: torch.Tensor, where: Any, length: int, shared: int, outside: torch.Tensor | None = None
) -> torch.Tensor:
    """Take rows out of (position, head, width), as (row * shared, heads that share * position, width).

    What fills up is the row's last token, which no query within the row sees, or zero at places `outside`.
    """
    taken = x[where]  # (row * position, head, width)
    if outside is not None:
        taken[outside] = 0
    taken = taken.unflatten(0, (-1, length)).transpose(1, 2)  # (row, head, position, width)
    return taken.reshape(len(taken) * shared, -1, x.shape[2])


def _apart(made: torch.Tensor, length: int, heads: int) -> torch.Tensor:
    """View what `_gathered` took as (row, position, head, width)."""
    return made.view(-1, heads, length, made.shape[-1]).transpose(1, 2)


def _scatter(out: torch.Tensor, rows: Batch, apart: torch.Tensor) -> None:
    """Put rows (row, position, head, width) back into (position, head, width), without what filled them up."""
    apart = apart.reshape(-1, *out.shape[1:2], apart.shape[-1])
    out[rows.tokens] = apart if rows.inside is None else apart[rows.inside]


_masks: dict[tuple[int | None, Any], torch.Tensor] = {}
"""Window and device -> the mask of the longest rows so far."""


def hidden(length: int, whole: int, window: int | None, device: Any) -> torch.Tensor:
    """Mark the keys that queries do not see, (query, key), of the last so many tokens of the whole.

    Those are the keys after it, and those `window` or more before it. What is returned is a part of one mask, so that
    rows of ever other lengths fill no memory.
    """
    mask = _masks.get((window, device))
    if mask is None or len(mask) < whole:
        size = max(whole, 2 * len(mask) if mask is not None else SMALLEST)
        mask = torch.ones(size, size, dtype=torch.bool, device=device).triu_(1)
        mask = mask if window is None else mask | torch.ones_like(mask).tril_(-window)
        _masks[window, device] = mask
    return mask[whole - length : whole, :whole]
