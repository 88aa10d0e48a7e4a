"""A product with adapters, against autograd."""

from types import SimpleNamespace

import torch
from torch.nn import functional

from ftexp.model import linear
from ftexp.model.packed import Adapter


def test_dropout_is_that_of_the_formula():
    """The product with dropout, and its gradients, against autograd on the same mask."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((9, 6), (2, 6), (5, 2)))
    member = Adapter({"l": (a, b)}, {"l": 1.5}, 0.4, torch.Generator().manual_seed(3))
    pack = SimpleNamespace(apart=False, layout=None)
    read = linear.Read([layer], ["l"], pack)

    def taken(training):
        layout = SimpleNamespace(members=[(member, 2, 7)], ids=torch.zeros(1, 9), sizes=[9], training=training)
        return linear._Product.apply(x, read, layout, a, b)

    assert torch.allclose(taken(False)[2:7], layer(x[2:7]) + 1.5 * x[2:7] @ a.T @ b.T, rtol=1e-12)
    y = taken(True)
    kept = torch.rand(5, 6, generator=torch.Generator().manual_seed(3)) >= 0.4
    assert 0 < kept.sum() < 30
    more = 1.5 * (x[2:7] * kept / 0.6) @ a.T @ b.T
    expected = layer(x) + functional.pad(more, (0, 0, 2, 2))
    assert torch.allclose(y, expected, rtol=1e-12)
    slope = torch.randn_like(y)
    for got, wanted in zip(torch.autograd.grad(y, (x, a, b), slope), torch.autograd.grad(expected, (x, a, b), slope),
                           strict=True):  # fmt: skip
        assert torch.allclose(got, wanted, rtol=1e-12)
