"""Sums of products of codes are the same integers in float kernels, and floats stay near them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark_scripts import script
from cgmq_fx.testing import models

integer_exact = script("integer_exact")


@settings(max_examples=30)
@given(models(), st.data())
def test_drawn_networks_at_drawn_widths(drawn, data):
    tally = integer_exact.Tally()
    integer_exact.check(drawn, data, tally)
    assert (tally.mismatches, tally.faults) == (0, [])


@pytest.mark.parametrize("name", ["LeNet-5", "ResNet-20"])
def test_networks(name):
    tally = integer_exact.network(name, 2, 0)
    assert (tally.mismatches, tally.faults) == (0, [])
    assert tally.cases == 2
    assert tally.kernels_used.keys() == {torch.float32, torch.float64}
    assert tally.largest_bound > 2**24


@pytest.mark.parametrize(
    ("product", "lhs", "rhs"),
    [
        (lambda a, b: F.conv1d(a, b, None, 2, 1), (2, 4, 9), (6, 4, 3)),
        (lambda a, b: F.conv2d(a, b, None, 1, 1, 2, 2), (2, 4, 9, 9), (6, 2, 3, 3)),
        (lambda a, b: F.conv3d(a, b, None, 1, 1), (2, 4, 5, 5, 5), (6, 4, 3, 3, 3)),
        (lambda a, b: F.conv_transpose2d(a, b, None, 2, 1, 1, 2), (2, 4, 5, 5), (4, 3, 3, 3)),
        (F.linear, (3, 40), (6, 40)),
        (torch.bmm, (2, 3, 40), (2, 40, 6)),
    ],
)
def test_int64_kernels_of_torch_are_integer_arithmetic(product, lhs, rhs):
    """They wrap around at 2**64, which no float does: multiplied factors multiply the product."""
    left, right = torch.randint(-9, 10, lhs), torch.randint(-9, 10, rhs)
    plain = product(left, right)
    found = product(left * (2**31 + 11), right * (2**29 + 7))
    assert torch.equal(found, plain * ((2**31 + 11) * (2**29 + 7)))
    assert int(found.abs().max()) > 2**53
    assert torch.equal(plain, product(left.double(), right.double()).long())
