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
