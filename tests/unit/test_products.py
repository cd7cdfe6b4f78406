"""Products that are no plain matmul: their work against torch's counter or by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cgmq_fx.passes.einsum import spelled_out
from exactness import assert_exact, at_32_bits
from graph_zoo import Calls

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def weights(*shapes):
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in zip("wv", shapes, strict=False)
    }


QUANTIZED = {
    "lists of indices": (lambda m, x: torch.einsum(x, [0, 1, 2], m.w, [2, 3]), [(4, 5)], 120),
    "dots in lists": (lambda m, x: torch.einsum(x, [..., 2], m.w, [2, 3], [..., 3]), [(4, 5)], 120),
    "one list": (lambda m, x: torch.einsum("bij,jk->bik", [x, m.w]), [(4, 5)], 120),
    "repeated": (lambda m, x: torch.einsum("bii,ik->bk", x[:, :, :3], m.w), [(3, 5)], 30),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, 2), [(3, 4, 5)], 120),
    "tensordot by axes": (lambda m, x: torch.tensordot(x, m.w, ([1], [0])), [(3, 5)], 120),
    "inner": (lambda m, x: torch.inner(x, m.w), [(5, 4)], 120),
    "dot": (lambda m, x: x[0, 0].dot(m.w), [(4,)], 4),
    "vecdot": (lambda m, x: torch.linalg.vecdot(x, m.w), [(4,)], 24),
    "addbmm": (lambda m, x: torch.addbmm(m.v, x, m.w), [(2, 4, 5), (3, 5)], 120),
    "addmv": (lambda m, x: m.v.addmv(x[0], m.w), [(4,), (3,)], 12),
    "linalg": (lambda m, x: torch.linalg.matmul(x, m.w), [(4, 5)], 120),
}
FLOAT = {
    "three": (lambda m, x: torch.einsum("bij,jk,kl->bil", x, m.w, m.v), [(4, 5), (5, 6)], 300),
    "chain": (lambda m, x: torch.linalg.multi_dot([x[0], m.w, m.v]), [(4, 5), (5, 6)], 150),
    "bilinear": (lambda m, x: F.bilinear(x, x, m.w), [(5, 4, 4)], 600),
    "distance": (lambda m, x: torch.cdist(x, m.w), [(30, 4)], 720),
}


def ledger_of(forward, shapes):
    model = Calls(forward, **weights(*shapes))
    prepared = at_32_bits(model, X, batch_axis=None)
    assert_exact(model, prepared, X)
    return [entry for entry in prepared.plan.accounting.ledger if entry.macs]


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_product_of_two_is_quantized_and_counted(name):
    forward, shapes, macs = QUANTIZED[name]
    (entry,) = ledger_of(forward, shapes)
    assert (entry.status, entry.macs) == ("quantized", macs)


@pytest.mark.parametrize("name", FLOAT)
def test_what_is_no_product_of_two_is_counted_in_float(name):
    forward, shapes, macs = FLOAT[name]
    (entry,) = ledger_of(forward, shapes)
    assert (entry.status, entry.macs) == ("float", macs)
    assert entry.reason


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("ij->ji", "A"), ("ij->ji", "A")),
        (("ij,jk", ["A", "B"]), ("ij,jk", "A", "B")),
        (("A", [0, 1], "B", [1, 2]), ("AB,BC", "A", "B")),
        (("A", [..., 51], [51, ...]), ("...z->z...", "A")),
    ],
)
def test_one_spelling(args, expected):
    assert spelled_out(args) == expected
