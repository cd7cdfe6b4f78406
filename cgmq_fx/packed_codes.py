"""Packed codes as torch computes with them: on any device, and inside exported programs.

The layout is that of `cgmq_fx.packing`, which packs them.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cgmq_fx.packing import code_range, pack, pack_units

_BYTE, _WORD = 8, 16


def storage_type(bit_width: int, *, signed: bool) -> torch.dtype:
    """Return the narrowest signed integer type that holds codes of so many bits.

    Raises:
        UsageError: the width is not one that can be packed.
    """
    _, high = code_range(bit_width, signed=signed)
    fits = (dtype for dtype in (torch.int8, torch.int16) if high <= torch.iinfo(dtype).max)
    return next(fits, torch.int32)


def pack_codes(codes: Tensor, bit_width: int, *, signed: bool) -> Tensor:
    """Return integers of any shape as uint8, shape ``(packed_bytes(...),)``, on their device.

    Raises:
        UsageError: a code does not fit, or the width is not one that can be packed.
    """
    packed = pack(codes.detach().cpu().numpy(), bit_width, signed=signed)
    return torch.from_numpy(packed).to(codes.device)


def unpack_codes(packed: Tensor, bit_width: int, shape: Sequence[int], *, signed: bool) -> Tensor:
    """Return the codes that `pack_codes` packed, in `shape`, of `storage_type`.

    Args:
        packed: exactly the bytes that so many codes take.
        bit_width: of each code.
        shape: of the codes.
        signed: whether they are in two's complement, or, of 1 bit, -1 and 1.
    """
    if bit_width == 0:
        return packed.new_zeros(tuple(shape), dtype=torch.int8)
    if bit_width == 1 and signed:
        bits = unpack_codes(packed, bit_width, shape, signed=False)
        return 2 * bits - 1
    # The least number of codes that end where a byte ends; every such group is laid out alike.
    common = math.gcd(_BYTE, bit_width)
    codes_in_group, bytes_in_group = _BYTE // common, bit_width // common
    count = math.prod(shape)
    groups = -(-count // codes_in_group)
    missing = groups * bytes_in_group - packed.numel()
    words = F.pad(packed, (0, missing)).view(groups, bytes_in_group)
    if bytes_in_group > 1:
        words = words.to(torch.int32)
    elif signed:
        words = words.view(torch.int8)
    dtype = storage_type(bit_width, signed=signed)
    columns = [
        _column(words, place * bit_width, bit_width, signed).to(dtype)
        for place in range(codes_in_group)
    ]
    return torch.stack(columns, 1).view(-1)[:count].view(tuple(shape))


def pack_unit_codes(codes: Tensor, bit_widths: Tensor, *, signed: bool) -> Tensor:
    """Return codes of different widths as `cgmq_fx.packing.pack_units`, on their device.

    Args:
        codes: integers of any shape.
        bit_widths: uint8; broadcasts with the codes.
        signed: whether they are in two's complement, or, of 1 bit, -1 and 1.

    Raises:
        UsageError: a code does not fit its width.
    """
    widths = bit_widths.expand(codes.shape).cpu().numpy()
    packed = pack_units(codes.detach().cpu().numpy(), widths, signed=signed)
    return torch.from_numpy(packed).to(codes.device)


def unpack_unit_codes(
    packed: Tensor, bit_widths: Tensor, shape: Sequence[int], *, signed: bool
) -> Tensor:
    """Return the codes that `pack_unit_codes` packed, in `shape`, as int32."""
    widths = bit_widths.expand(tuple(shape)).reshape(-1).to(torch.int32)
    places = torch.arange(_WORD, dtype=torch.int32, device=packed.device)
    bits = (packed.unsqueeze(1) >> places[:_BYTE].to(torch.uint8)) & 1
    stream = bits.flatten().to(torch.int32)
    # A code begins where those before it end; bits behind its own are read as 0.
    starts = widths.cumsum(0) - widths
    codes = torch.zeros_like(widths)
    for place in range(_WORD):
        at = (starts + place).clamp_(max=max(0, len(stream) - 1))
        if len(stream):
            codes += torch.where(place < widths, stream[at], 0) << place
    if signed:
        half = torch.ones_like(widths) << (widths - 1).clamp_(min=0)
        wrapped = codes - torch.where((codes >= half) & (widths > 1), 2 * half, 0)
        codes = torch.where(widths == 1, 2 * codes - 1, wrapped)
    return codes.view(tuple(shape))


def _column(words: Tensor, start: int, bit_width: int, signed: bool) -> Tensor:
    """Return the code that begins at bit `start` of each row."""
    first, shift = divmod(start, _BYTE)
    last = (start + bit_width - 1) // _BYTE
    value = words[:, first]
    for place in range(first + 1, last + 1):
        value = value | (words[:, place] << _BYTE * (place - first))
    if not signed:
        return (value >> shift) & ((1 << bit_width) - 1)
    bits = torch.iinfo(words.dtype).bits
    return (value << (bits - shift - bit_width)) >> (bits - bit_width)
