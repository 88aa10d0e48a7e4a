"""Attention within the rows of one sequence, against that of each row alone."""

import pytest
import torch

from ftexp.model import attention, packed
from ftexp.model.packed import Adapter

PLAIN = Adapter({}, {}, 0.0, torch.Generator())


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("short", "shared"), [(4, [9, 9, 9, 3]), (64, [9, 9, 9, 9])])
def test_attention_equals_that_of_each_row_alone(monkeypatch, window, short, shared):
    """Rows of 9, 7, 8 and 3 tokens, of which three or all are filled up to one length; all tokens have gradients."""
    torch.manual_seed(0)
    monkeypatch.setattr(packed, "SHORT", short)
    lengths, module = [9, 7, 8, 3], torch.nn.Module()
    layout = packed.lay_out([(PLAIN, [[n] * n for n in lengths])], 0, "cpu", True)
    assert [(row.length, row.filled) for row in layout.rows] == list(zip(lengths, shared, strict=True))
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


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("small", [16**3, 0])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_to_a_prefix_that_rows_share_is_that_of_whole_rows(monkeypatch, window, small, softcap):
    """Two members, rows of 9, 7, 8 and of 12, 6 tokens, behind 5 and 4 that each member has once; all have gradients.

    A token that several rows see stands for its copies: its query is asked once, its key and value by all of them.
    """
    torch.manual_seed(0)
    monkeypatch.setattr(packed, "SMALL", small)  # one by one, or all of about a length
    texts = [[[1] * 5 + [n] * (n - 5) for n in (9, 7, 8)], [[2] * 4 + [n] * (n - 4) for n in (12, 6)]]
    layout = packed.lay_out([(PLAIN, mine) for mine in texts], 0, "cpu", True)
    assert layout.ids.shape[1] == 24 - 2 * 5 + 2 + 18 - 4 + 2  # twos fill a member up
    q, k, v = (torch.randn(1, h, layout.ids.shape[1], 16, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    out, _ = attention.attend(torch.nn.Module(), q, k, v, None, sliding_window=window, softcap=softcap, layout=layout)
    g = torch.randn_like(out)
    g[:, [14, 15, 30, 31]] = 0
    found = torch.autograd.grad(out, (q, k, v), g)
    alone, given = 0, {}
    for mine, places in zip(texts, layout.own, strict=True):
        for text, row in zip(mine, places, strict=True):
            where = [row.place(n) for n in range(len(text))]
            assert layout.ids[0, where].tolist() == text
            assert layout.positions[0, where].tolist() == list(range(len(text)))
            seen = torch.ones(len(text), len(text), dtype=torch.bool).tril()
            seen = seen if window is None else seen.triu(1 - window)
            asks, keys, values = (x[0, :, where] for x in (q, k, v))
            scores = torch.einsum("hqw,hkw->hqk", asks, keys.repeat_interleave(2, 0)) / 4
            scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
            shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            theirs = torch.einsum("hqk,hkw->qhw", shares, values.repeat_interleave(2, 0))
            for n, place in enumerate(where):
                torch.testing.assert_close(out[0, place], theirs[n], rtol=1e-12, atol=1e-12)
                if place not in given:  # a prefix that was seen already is not asked again
                    given[place] = g[0, place]
                    alone = alone + (theirs[n] * g[0, place]).sum()
    for mine, wanted in zip(found, torch.autograd.grad(alone, (q, k, v)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_the_prefix_of_rows_is_there_once_where_it_is_the_same_and_worth_it():
    def tokens(texts, training=True, **more):
        given = Adapter({}, {}, more.pop("dropout", 0.0), torch.Generator(), **more)
        return packed.lay_out([(given, texts)], 0, "cpu", training).ids.shape[1]

    shared = [[7] * 20 + [n] * n for n in (30, 25)]
    assert tokens(shared) == 75
    assert tokens(shared, noisy=True) == tokens(shared, dropout=0.1) == 95  # each row draws its own
    assert tokens(shared, training=False, noisy=True) == 75  # held-out rows draw nothing
    assert tokens([[7] * 20, [7] * 20 + [8] * 10]) == 31  # the one of a row's own asks for its next
    assert tokens([[7, 8] + [n] * 30 for n in (1, 2)]) == 64  # two of 64 are not worth the steps
    assert tokens([[7] * 90]) == 90


def test_bits_of_a_member_do_not_depend_on_the_order_of_others_lengths():
    """Rows of three lengths behind a prefix of 40 tokens, beside a member whose first rows are the shortest."""
    torch.manual_seed(0)
    one, other = (
        [[m] * 40 + [m + n] * n for n in lengths] for m, lengths in ((1, (20, 130, 90, 200)), (2, (20, 90, 200, 130)))
    )

    def run(texts, *given):
        layout = packed.lay_out([(PLAIN, mine) for mine in texts], 0, "cpu", True)
        groups = layout.attended(9, 64, False)
        assert sum(bool(group.prefixes) for group in groups) > 2
        out, kept = attention.attended(*given[:3], groups, 0.125, None, None)
        return [out, *attention.slopes(given[3], *given[:3], kept, groups, 0.125, None)]

    size = packed.lay_out([(PLAIN, one)], 0, "cpu", True).ids.shape[1]
    given = [torch.randn(2 * size, heads, 64) for heads in (9, 3, 3, 9)]
    both = run([other, one], *given)
    for mine, together in zip(run([one], *(x[size:].clone() for x in given)), both, strict=True):
        assert torch.equal(mine, together[size:])


def test_masks_of_ever_other_lengths_are_parts_of_one():
    attention._masks.clear()
    for whole in range(1, 400):
        length = 1 + whole // 2
        seen = ~attention.hidden(length, whole, 7, "cpu")
        places = torch.arange(whole)
        apart = places[whole - length :, None] - places
        assert torch.equal(seen, (apart >= 0) & (apart < 7))
    assert [len(mask) for mask in attention._masks.values()] == [512]
    assert torch.equal(attention.hidden(2, 3, None, "cpu"), torch.tensor([[False, False, True], [False, False, False]]))
