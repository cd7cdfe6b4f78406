"""The records of a ZIP archive that stores them as they are, read with suspicion.

The directory is read here and not by the standard library's module, which reads directories of any
size, takes records that overlap, and decompresses.
"""

import struct
import zlib
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from cgmq_fx.container import MAX_NAME, FileFault

MAX_RECORDS = 50_000
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL_32 = (1 << 32) - 1
_ENCRYPTED = 1
_EXTRA_64 = 1

Bytes = npt.NDArray[np.uint8]


def zip_records(data: Bytes, fault: FileFault) -> Mapping[str, Bytes]:
    """Return the records of an archive by name, without reading them into memory.

    Raises:
        FileFormatError: it is no sound archive of uncompressed records that do not overlap.
    """
    count, start, size = _directory(data, fault)
    if count > MAX_RECORDS or start + size > len(data) or size < count * _ENTRY.size:
        raise fault(f"has an archive of {count:,} records in {size:,} bytes at {start:,}")
    found: dict[str, Bytes] = {}
    spans = []
    at, stop = start, start + size
    for _ in range(count):
        name, offset, length, checksum, at = _entry(data, at, stop, fault)
        if name in found:
            raise fault(f"has two records called {name!r}")
        begin = _content(data, offset, start, fault)
        if begin + length > start:
            raise fault(f"has a record {name!r} that ends outside of its archive")
        found[name] = data[begin : begin + length]
        if zlib.crc32(found[name].data) != checksum:
            raise fault(f"has a record {name!r} whose checksum is not that of its bytes")
        spans.append((offset, begin + length, name))
    spans.sort()
    for (_, end, name), (offset, _, other) in pairwise(spans):
        if end > offset:
            raise fault(f"has records {name!r} and {other!r} that overlap")
    return MappingProxyType(found)


def _unpack(
    layout: struct.Struct, data: Bytes, at: int, sign: bytes, fault: FileFault
) -> list[int]:
    """Return the numbers behind the signature of a part of an archive."""
    part = data[at : at + layout.size].tobytes() if at >= 0 else b""
    if len(part) < layout.size or not part.startswith(sign):
        raise fault(f"has no part {sign!r} of an archive at {at:,}")
    return list(layout.unpack(part)[1:])


def _directory(data: Bytes, fault: FileFault) -> tuple[int, int, int]:
    """Return the number of entries of the directory, where it starts, and its size."""
    at = len(data) - _END.size
    disk, first, here, count, size, start, comment = _unpack(_END, data, at, b"PK\5\6", fault)
    place = at - _LOCATOR.size
    if place >= 0 and data[place : place + 4].tobytes() == b"PK\6\7":
        _, offset, _ = _unpack(_LOCATOR, data, place, b"PK\6\7", fault)
        _, _, _, disk, first, here, count, size, start = _unpack(
            _END_64, data, min(offset, len(data)), b"PK\6\6", fault
        )
    if comment or disk or first or here != count:
        raise fault("is an archive with a comment, or in several parts")
    return count, start, size


def _entry(data: Bytes, at: int, stop: int, fault: FileFault) -> tuple[str, int, int, int, int]:
    """Return name, place, length and CRC-32 of a record, and where the next entry starts."""
    numbers = _unpack(_ENTRY, data, at, b"PK\1\2", fault)
    flags, method = numbers[2:4]
    checksum, packed, length, name_size, extra_size, comment_size = numbers[6:12]
    offset = numbers[15]
    begin = at + _ENTRY.size
    end = begin + name_size + extra_size + comment_size
    if end > stop:
        raise fault(f"has an entry at {at:,} that ends outside of its directory")
    name = _name(data[begin : begin + name_size].tobytes(), fault)
    extra = data[begin + name_size : begin + name_size + extra_size].tobytes()
    wide = iter(_wide_numbers(extra))
    length, packed, offset = (
        next(wide, number) if number == _FULL_32 else number for number in (length, packed, offset)
    )
    if method or flags & _ENCRYPTED or packed != length:
        raise fault(f"has a record {name!r} that is compressed or encrypted")
    return name, offset, length, checksum, end


def _wide_numbers(extra: bytes) -> list[int]:
    """Return the 64-bit numbers of an entry, in their order."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        part = extra[at + 4 : at + 4 + size]
        if kind == _EXTRA_64:
            return list(struct.unpack(f"<{len(part) // 8}Q", part[: len(part) // 8 * 8]))
        at += 4 + size
    return []


def _name(raw: bytes, fault: FileFault) -> str:
    try:
        name = raw.decode("ascii")
    except UnicodeDecodeError:
        raise fault(f"has a record whose name is not ASCII: {raw[:MAX_NAME]!r}") from None
    is_plain = name.isprintable() and "\\" not in name and len(name) <= MAX_NAME
    if not is_plain or not all(part.strip(".") for part in name.split("/")):
        raise fault(f"has a record called {name[:MAX_NAME]!r}, which is no plain name")
    return name


def _content(data: Bytes, offset: int, stop: int, fault: FileFault) -> int:
    """Return where the bytes of a record start."""
    numbers = _unpack(_LOCAL, data, min(offset, stop), b"PK\3\4", fault)
    return offset + _LOCAL.size + numbers[-2] + numbers[-1]
