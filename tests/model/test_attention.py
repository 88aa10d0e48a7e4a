"""Attention within the rows of one sequence, against that of each row alone."""

import pytest
import torch

from ftexp.model import attention, packed
from ftexp.model.packed import Adapter


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("short", "shared"), [(4, [9, 9, 9, 3]), (64, [9, 9, 9, 9])])
def test_attention_equals_that_of_each_row_alone(monkeypatch, window, short, shared):
    """Rows of 9, 7, 8 and 3 tokens, of which three or all are filled up to one length; all tokens have gradients."""
    torch.manual_seed(0)
    monkeypatch.setattr(packed, "SHORT", short)
    lengths, module = [9, 7, 8, 3], torch.nn.Module()
    layout = packed.lay_out([(Adapter({}, {}, 0.0, torch.Generator()), [[1] * n for n in lengths])], 0, "cpu", True)
    assert [(length, filled) for _, length, filled in layout.rows] == list(zip(lengths, shared, strict=True))
    q, k, v = (torch.randn(1, h, 27, 16, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    out, _ = attention.attend(module, q, k, v, None, sliding_window=window, layout=layout)
    g = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), g)
    assert [b.length for b in layout.attended(4, 16, False)] == sorted(set(shared), reverse=True)
    begin, parts = 0, []
    for n in lengths:
        mine = slice(begin, begin := begin + n)
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        seen = seen if window is None else seen.triu(1 - window)
        parts.append(torch.nn.functional.scaled_dot_product_attention(
            q[:, :, mine], k[:, :, mine], v[:, :, mine], attn_mask=seen, enable_gqa=True))  # fmt: skip
    whole = torch.cat(parts, 2).transpose(1, 2)
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    for mine, wanted in zip(found, torch.autograd.grad(whole, (q, k, v), g), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
