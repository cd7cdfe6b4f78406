"""Packed codes come back bit for bit, and take the bits that they have."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgmq_fx.errors import UsageError
from cgmq_fx.packing import code_range, pack, packed_bytes, unpack

WIDTHS = st.integers(0, 16)
SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


def drawn_codes(width, shape, seed, *, signed):
    low, high = code_range(width, signed=signed)
    codes = np.random.default_rng(seed).integers(low, high, size=shape, endpoint=True)
    return np.where(codes < 0, -1, 1) if width == 1 and signed else codes


@given(WIDTHS, SHAPES, st.booleans(), st.integers(0, 999), st.booleans())
def test_codes_come_back(width, shape, signed, seed, transposed):
    codes = drawn_codes(width, shape, seed, signed=signed)
    codes = codes.T[..., ::-1] if transposed and codes.ndim else codes  # not contiguous
    packed = pack(codes, width, signed=signed)
    assert packed.shape == (-(-codes.size * width // 8),)
    np.testing.assert_array_equal(unpack(packed, width, codes.shape, signed=signed), codes)


@given(WIDTHS, SHAPES, st.booleans(), st.integers(0, 999))
def test_bits_are_where_the_format_says(width, shape, signed, seed):
    codes = drawn_codes(width, shape, seed, signed=signed)
    if signed and width == 1:
        bits = [int(code) > 0 for code in codes.flat]
    else:
        bits = [int(code) % 2**width for code in codes.flat]
    stream = sum(code << (i * width) for i, code in enumerate(bits))
    packed = pack(codes, width, signed=signed)
    assert packed.tobytes() == stream.to_bytes(packed_bytes(math.prod(shape), width), "little")


@pytest.mark.parametrize("width", [0, 1, 3, 8, 11, 16])
def test_many_codes_pass_the_edges_of_blocks(width):
    codes = drawn_codes(width, (3, 65_537), 5, signed=True)
    packed = pack(codes, width, signed=True)
    np.testing.assert_array_equal(unpack(packed, width, codes.shape, signed=True), codes)


@pytest.mark.parametrize(
    ("codes", "width", "signed", "text"),
    [
        ([0, 4], 2, False, "codes from 0 to 4 do not fit 2 unsigned bits, which hold 0 to 3"),
        ([-3, 0], 2, True, "codes from -3 to 0 do not fit 2 signed bits, which hold -2 to 1"),
        ([0], 17, False, "bit_width 17"),
        ([0], -1, False, "bit_width -1"),
        ([1], 0, False, "codes from 1 to 1 do not fit 0 unsigned bits, which hold 0 to 0"),
        ([1, 0], 1, True, "signed codes of 1 bit are -1 and 1; 0 takes 2 bits"),
    ],
)
def test_what_does_not_fit_is_refused(codes, width, signed, text):
    with pytest.raises(UsageError, match=text):
        pack(codes, width, signed=signed)


def test_bytes_of_another_size_or_with_stray_bits_are_refused():
    data = pack([1, 2, 3], 3, signed=False)
    with pytest.raises(UsageError, match="2 bytes cannot hold 6 codes of 3 bits, which take 3"):
        unpack(data, 3, (6,), signed=False)
    data[-1] |= 128
    with pytest.raises(UsageError, match="7 bits behind the last code"):
        unpack(data, 3, (3,), signed=False)
