"""Packed codes unpacked by torch are those that numpy packed, at every width."""

import numpy as np
import pytest
import torch
from torch import nn

from cgmq_fx.errors import UsageError
from cgmq_fx.packed_codes import pack_codes, storage_type, unpack_codes
from cgmq_fx.packing import code_range, packed_bytes, unpack

WIDTHS = pytest.mark.parametrize("bit_width", range(17))
SIGNED = pytest.mark.parametrize("signed", [False, True])


def codes_of(bit_width, count, *, signed):
    low, high = code_range(bit_width, signed=signed)
    ends = torch.tensor([low, high])[: min(count, 2)]
    codes = torch.cat((ends, torch.randint(low, high + 1, (count - len(ends),))))
    return torch.where(codes < 0, -1, 1) if bit_width == 1 and signed else codes


@WIDTHS
@SIGNED
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 30])
def test_codes_come_back(bit_width, signed, count):
    codes = codes_of(bit_width, count, signed=signed)
    packed = pack_codes(codes, bit_width, signed=signed)
    assert (packed.dtype, packed.shape) == (torch.uint8, (packed_bytes(count, bit_width),))
    found = unpack_codes(packed, bit_width, codes.shape, signed=signed)
    assert found.dtype == storage_type(bit_width, signed=signed)
    assert torch.equal(found.long(), codes)
    other = unpack(packed.numpy(), bit_width, (count,), signed=signed)
    assert np.array_equal(found.numpy(), other)


@WIDTHS
def test_shapes_come_back(bit_width):
    codes = codes_of(bit_width, 30, signed=True).view(2, 3, 5)
    packed = pack_codes(codes, bit_width, signed=True)
    assert torch.equal(unpack_codes(packed, bit_width, (2, 3, 5), signed=True).long(), codes)
    assert unpack_codes(packed.to("meta"), bit_width, (2, 3, 5), signed=True).shape == (2, 3, 5)


@pytest.mark.parametrize(
    ("bit_width", "signed", "dtype"),
    [
        (8, True, torch.int8),
        (8, False, torch.int16),
        (16, True, torch.int16),
        (16, False, torch.int32),
    ],
)
def test_the_narrowest_type(bit_width, signed, dtype):
    assert storage_type(bit_width, signed=signed) == dtype


@pytest.mark.parametrize("bit_width", [0, 1, 2, 3, 16])
def test_an_exported_program_unpacks(bit_width):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            codes = codes_of(bit_width, 12, signed=True).view(3, 4)
            self.register_buffer("packed", pack_codes(codes, bit_width, signed=True))

        def forward(self, x):
            return x @ unpack_codes(self.packed, bit_width, (3, 4), signed=True).to(x.dtype)

    net, x = Net(), torch.randn(2, 3)
    assert torch.equal(torch.export.export(net, (x,)).module()(x), net(x))


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="codes from -9 to 3 do not fit 4 signed bits"):
        pack_codes(torch.tensor([-9, 3]), 4, signed=True)
