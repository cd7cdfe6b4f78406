"""Integers packed at their true width: 2-bit codes take 2 bits each, 3-bit codes take 3.

Codes follow each other without gaps in row-major order. Bit `j` of code `i`, counted from its least
significant one, is bit ``i * bit_width + j`` of the stream, and bit `k` of the stream is bit
``k % 8``, again from the least significant one, of byte ``k // 8``. Negative codes are in two's
complement; signed codes of 1 bit are -1 (a 0) and 1 (a 1). Codes of 0 bits are 0 and take nothing.
Bits left over in the last byte are 0.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cgmq_fx.errors import UsageError

MIN_WIDTH, MAX_WIDTH = 0, 16
# A whole number of bytes at every width; bounds the memory that the bits take one by one.
_BLOCK = 1 << 16
_PLACES = np.arange(16)
_NOTHING = np.empty(0, np.uint8)


def packed_bytes(count: int, bit_width: int) -> int:
    """Return how many bytes `count` packed codes take."""
    return -(-count * bit_width // 8)


def code_range(bit_width: int, *, signed: bool) -> tuple[int, int]:
    """Return the smallest and the largest code that `bit_width` bits can hold.

    Raises:
        UsageError: the width is not one from 0 to 16.

    >>> code_range(2, signed=True), code_range(1, signed=True), code_range(0, signed=True)
    ((-2, 1), (-1, 1), (0, 0))
    """
    if not MIN_WIDTH <= bit_width <= MAX_WIDTH:
        raise UsageError(
            f"bit_width {bit_width} cannot be packed; take one from {MIN_WIDTH} to {MAX_WIDTH}"
        )
    if not signed or bit_width == 0:
        return 0, 2**bit_width - 1
    return -(2 ** (bit_width - 1)), max(2 ** (bit_width - 1) - 1, 1)


def pack(codes: npt.ArrayLike, bit_width: int, *, signed: bool) -> npt.NDArray[np.uint8]:
    """Return integers of any shape as packed bytes, shape ``(packed_bytes(...),)``.

    Raises:
        UsageError: a code does not fit, or the width is not one from 0 to 16.

    >>> pack([1, 2, 3, 0, 1], 2, signed=False).tolist()
    [57, 1]
    >>> pack([1, -1, 1, 1], 1, signed=True).tolist()
    [13]
    """
    low, high = code_range(bit_width, signed=signed)
    flat = np.asarray(codes).reshape(-1)
    if flat.size and not (low <= int(flat.min()) and int(flat.max()) <= high):
        raise UsageError(
            f"codes from {int(flat.min())} to {int(flat.max())} do not fit {bit_width} "
            f"{'signed' if signed else 'unsigned'} bits, which hold {low} to {high}; "
            f"pack them at a wider bit_width"
        )
    if signed and bit_width == 1:
        if not flat.all():
            raise UsageError("signed codes of 1 bit are -1 and 1; 0 takes 2 bits")
        flat = flat > 0
    if bit_width == 0:
        return np.empty(0, np.uint8)
    blocks = [
        _pack_block(flat[start : start + _BLOCK], bit_width)
        for start in range(0, flat.size, _BLOCK)
    ]
    return np.concatenate(blocks) if blocks else np.empty(0, np.uint8)


def _pack_block(codes: npt.NDArray[np.generic], bit_width: int) -> npt.NDArray[np.uint8]:
    words = codes.astype(np.int32).astype("<u2")
    bits = np.unpackbits(words.view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")
    return np.packbits(bits[:, :bit_width].reshape(-1), bitorder="little")


def unpack(
    data: npt.NDArray[np.uint8], bit_width: int, shape: Sequence[int], *, signed: bool
) -> npt.NDArray[np.int32]:
    """Return the codes that `pack` packed, in `shape`.

    Raises:
        UsageError: there are more or fewer bytes than these codes take, or bits that no code uses
            are not 0.

    >>> unpack(np.array([57, 1], np.uint8), 2, (5,), signed=False).tolist()
    [1, 2, 3, 0, 1]
    """
    low, _ = code_range(bit_width, signed=signed)
    count = math.prod(shape)
    wanted = packed_bytes(count, bit_width)
    if data.size != wanted:
        raise UsageError(
            f"{data.size:,} bytes cannot hold {count:,} codes of {bit_width} bits, which take "
            f"{wanted:,}; give the bytes that pack returned, with the width and shape of then"
        )
    spare = wanted * 8 - count * bit_width
    if spare and int(data[-1]) >> (8 - spare):
        raise UsageError(f"the {spare} bits behind the last code are not 0; pack the codes anew")
    codes = np.zeros(count, np.int32)
    if bit_width == 0:
        return codes.reshape(tuple(shape))
    step = _BLOCK * bit_width // 8
    for block, start in enumerate(range(0, data.size, step)):
        part = codes[block * _BLOCK : (block + 1) * _BLOCK]
        part[:] = _unpack_block(data[start : start + step], bit_width, part.size)
    if bit_width == 1 and signed:
        codes += codes - 1
    elif low < 0:
        codes -= (codes >= -low) * np.int32(-2 * low)
    return codes.reshape(tuple(shape))


def _unpack_block(
    data: npt.NDArray[np.uint8], bit_width: int, count: int
) -> npt.NDArray[np.uint16]:
    bits = np.unpackbits(data, count=count * bit_width, bitorder="little")
    words = np.zeros((count, 16), np.uint8)
    words[:, :bit_width] = bits.reshape(count, bit_width)
    return np.packbits(words, axis=1, bitorder="little").view("<u2").reshape(-1)


def pack_units(
    codes: npt.ArrayLike, bit_widths: npt.NDArray[np.uint8], *, signed: bool
) -> npt.NDArray[np.uint8]:
    """Return codes of different widths as packed bytes: each takes its own width in the stream.

    Args:
        codes: integers, n of them in any shape.
        bit_widths: of each code, shape (n,), 0 to 16.
        signed: as in `pack`.

    Raises:
        UsageError: a code does not fit its width, or a width is none.

    >>> pack_units([1, 7, 3, -1], np.array([2, 4, 0, 2], np.uint8), signed=True)
    Traceback (most recent call last):
        ...
    cgmq_fx.errors.UsageError: the code 3 does not fit 0 signed bits; pack it at a wider bit_width
    >>> pack_units([1, 7, 0, -1], np.array([2, 4, 0, 2], np.uint8), signed=True).tolist()
    [221]
    """
    flat, widths = np.asarray(codes).reshape(-1), _checked_widths(bit_widths)
    lows, highs = _ends(signed=signed)
    outside = (flat < lows[widths]) | (flat > highs[widths])
    if signed:
        outside |= (widths == 1) & (flat == 0)
    if outside.any():
        first = int(outside.argmax())
        raise UsageError(
            f"the code {int(flat[first])} does not fit {int(widths[first])} "
            f"{'signed' if signed else 'unsigned'} bits; pack it at a wider bit_width"
        )
    if signed:
        flat = np.where(widths == 1, flat > 0, flat)
    streams = []
    for start in range(0, flat.size, _BLOCK):
        words = flat[start : start + _BLOCK].astype(np.int32).astype("<u2")
        bits = np.unpackbits(words.view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")
        streams.append(bits[widths[start : start + _BLOCK, None] > _PLACES])
    return np.packbits(np.concatenate(streams or [_NOTHING]), bitorder="little")


def unpack_units(
    data: npt.NDArray[np.uint8],
    bit_widths: npt.NDArray[np.uint8],
    shape: Sequence[int],
    *,
    signed: bool,
) -> npt.NDArray[np.int32]:
    """Return the codes that `pack_units` packed, in `shape`.

    Raises:
        UsageError: there are more or fewer bytes than these codes take, bits that no code uses are
            not 0, or a width is none.
    """
    widths = _checked_widths(bit_widths)
    ends = np.cumsum(widths, dtype=np.int64)
    total = int(ends[-1]) if widths.size else 0
    wanted = -(-total // 8)
    if data.size != wanted or math.prod(shape) != widths.size:
        raise UsageError(
            f"{data.size:,} bytes cannot hold {math.prod(shape):,} codes of "
            f"{widths.size:,} bit-widths, which take {wanted:,}; give the bytes that pack_units "
            f"returned, with the widths and shape of then"
        )
    spare = wanted * 8 - total
    if spare and int(data[-1]) >> (8 - spare):
        raise UsageError(f"the {spare} bits behind the last code are not 0; pack the codes anew")
    codes = np.zeros(widths.size, np.int32)
    for start in range(0, widths.size, _BLOCK):
        part = widths[start : start + _BLOCK]
        first = int(ends[start]) - int(part[0])
        last = int(ends[start + part.size - 1])
        bits = np.unpackbits(data[first // 8 : -(-last // 8)], bitorder="little")
        words = np.zeros((part.size, 16), np.uint8)
        words[part[:, None] > _PLACES] = bits[first % 8 : first % 8 + last - first]
        packed = np.packbits(words, axis=1, bitorder="little").view("<u2").reshape(-1)
        codes[start : start + part.size] = packed
    if signed:
        half = np.int32(1) << np.maximum(widths.astype(np.int32) - 1, 0)
        wrapped = codes - ((codes >= half) & (widths > 1)) * 2 * half
        codes = np.where(widths == 1, 2 * codes - 1, wrapped).astype(np.int32)
    return codes.reshape(tuple(shape))


def _checked_widths(bit_widths: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    widths = np.asarray(bit_widths, np.uint8).reshape(-1)
    if widths.size and int(widths.max()) > MAX_WIDTH:
        raise UsageError(
            f"bit_width {int(widths.max())} cannot be packed; take one from {MIN_WIDTH} to "
            f"{MAX_WIDTH}"
        )
    return widths


def _ends(*, signed: bool) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the smallest and the largest code of each width."""
    ranges = [code_range(bits, signed=signed) for bits in range(MAX_WIDTH + 1)]
    low, high = zip(*ranges, strict=True)
    return np.array(low, np.int32), np.array(high, np.int32)
