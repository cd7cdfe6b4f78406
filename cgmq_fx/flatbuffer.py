"""Reads FlatBuffers, without their package and with suspicion.

Only what a caller asks for is decoded, offsets are held to the bytes that are there, and the number
of parts is bounded: tables may be shared, and a small file could else be read forever.
https://flatbuffers.dev/internals/ describes the format.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cgmq_fx.container import FileFault
from cgmq_fx.pools import Array

_MAX_PARTS = 400_000
_FORMATS = {name: struct.Struct(f"<{name}") for name in "bBhHiIqQfd?"}
_OFFSET, _SIGNED, _SHORT = _FORMATS["I"], _FORMATS["i"], _FORMATS["H"]


class Flatbuffer:
    """The bytes of one buffer.

    Args:
        data: from the offset of the root table on.
        fault: makes the errors.
    """

    def __init__(self, data: memoryview, fault: FileFault) -> None:
        self.data, self.fault = data, fault
        self._left = _MAX_PARTS

    def root(self) -> "Table":
        """Return the root table.

        Raises:
            FileFormatError: there is none.
        """
        return self.table_at(self.offset(0))

    def table_at(self, at: int) -> "Table":
        """Return the table that begins at a place.

        Raises:
            FileFormatError: there is none.
        """
        self.count(1)
        shape = at - self.unpack(_SIGNED, at)
        size = self.unpack(_SHORT, shape)
        if size < 4 or size % 2:
            raise self.fault(f"has a table of {size} bytes of offsets at {at:,}")
        if shape < 0 or shape + size > len(self.data):
            raise self.fault(f"has a table at {at:,} that ends outside of it")
        return Table(self, at, self.data[shape + 4 : shape + size])

    def count(self, parts: int) -> None:
        """Count parts that are read.

        Raises:
            FileFormatError: there are too many.
        """
        self._left -= parts
        if self._left < 0:
            raise self.fault(f"has more than {_MAX_PARTS:,} tables and numbers")

    def unpack(self, layout: struct.Struct, at: int) -> int:
        """Return the number at a place.

        Raises:
            FileFormatError: it lies outside of the buffer.
        """
        if not 0 <= at <= len(self.data) - layout.size:
            raise self.fault(f"has an offset to {at:,}, outside of its {len(self.data):,} bytes")
        (found,) = layout.unpack_from(self.data, at)
        return found  # type: ignore[no-any-return]

    def offset(self, at: int) -> int:
        """Return the place that the offset at a place leads to."""
        return at + self.unpack(_OFFSET, at)

    def vector(self, at: int, item_bytes: int) -> memoryview:
        """Return the bytes of the items of the vector that the offset at a place leads to."""
        begin = self.offset(at)
        size = self.unpack(_OFFSET, begin) * item_bytes
        found = self.data[begin + 4 : begin + 4 + size]
        if len(found) != size:
            raise self.fault(f"has a vector of {size:,} bytes at {begin:,} that ends outside of it")
        return found


@dataclass(frozen=True)
class Table:
    """A table; fields are named by their number in the schema, and unions take two.

    What a field is not there for has its default, as the schema says it.
    """

    buffer: Flatbuffer
    at: int
    shape: memoryview

    def _place(self, field: int) -> int | None:
        if 2 * field + 2 > len(self.shape):
            return None
        (offset,) = _SHORT.unpack_from(self.shape, 2 * field)
        return self.at + offset if offset else None

    def number(self, field: int, kind: str, default: float = 0) -> int:
        """Return an integer; `kind` is a character of `struct`."""
        place = self._place(field)
        return int(default) if place is None else self.buffer.unpack(_FORMATS[kind], place)

    def real(self, field: int, kind: str) -> float:
        """Return a floating-point number; `kind` is ``f`` or ``d``."""
        place = self._place(field)
        return 0.0 if place is None else float(self.buffer.unpack(_FORMATS[kind], place))

    def table(self, field: int) -> "Table | None":
        """Return a table, or the value of a union; None where it is not there."""
        place = self._place(field)
        return None if place is None else self.buffer.table_at(self.buffer.offset(place))

    def data(self, field: int) -> memoryview:
        """Return the bytes of a vector of bytes or of a text."""
        place = self._place(field)
        return memoryview(b"") if place is None else self.buffer.vector(place, 1)

    def text(self, field: int) -> str:
        """Return a text; what is no UTF-8 is replaced."""
        return bytes(self.data(field)).decode("utf-8", "replace")

    def numbers(self, field: int, kind: str) -> Array:
        """Return the numbers of a vector."""
        place = self._place(field)
        if place is None:
            return np.empty(0, f"<{kind}")
        found = self.buffer.vector(place, _FORMATS[kind].size)
        self.buffer.count(len(found) // _FORMATS[kind].size)
        return np.frombuffer(found, f"<{kind}")

    def tables(self, field: int) -> Iterator["Table"]:
        """Yield the tables of a vector."""
        place = self._place(field)
        if place is None:
            return
        offsets = self.buffer.vector(place, 4)
        begin = self.buffer.offset(place) + 4
        for at in range(begin, begin + len(offsets), 4):
            yield self.buffer.table_at(self.buffer.offset(at))
