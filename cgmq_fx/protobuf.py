"""Reads the wire format of protocol buffers, without their package and with suspicion.

Only what a caller asks for is decoded, lengths are held to the bytes that are there, and the number
of fields is bounded, so that time and memory are in proportion to what a sound file needs.
https://protobuf.dev/programming-guides/encoding/ describes the format.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cgmq_fx.container import FileFault

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_SIZES = {FIXED64: 8, FIXED32: 4}
_MAX_SHIFT = 63
_MAX_FIELDS = 1_000_000


@dataclass(frozen=True)
class Field:
    """One field of a message.

    Attributes:
        number: of the field.
        value: an unsigned number, or the bytes of a text, a message or a fixed-size number.
        start: where it begins in its message.
    """

    number: int
    value: int | memoryview
    start: int = 0

    def data(self) -> memoryview:
        """Return the bytes; none where it is a number."""
        return self.value if isinstance(self.value, memoryview) else memoryview(b"")

    def signed(self) -> int:
        """Return the number as int64; 0 where it is bytes."""
        if isinstance(self.value, memoryview):
            return 0
        return self.value - (1 << 64) if self.value >= 1 << 63 else self.value

    def text(self) -> str:
        """Return the bytes as a text; what is no UTF-8 is replaced."""
        return bytes(self.data()).decode("utf-8", "replace")


class WireReader:
    """Reads messages of one file, counting their fields.

    Args:
        fault: makes the errors.
    """

    def __init__(self, fault: FileFault) -> None:
        self.fault = fault
        self._left = _MAX_FIELDS

    def fields(self, data: memoryview) -> Iterator[Field]:
        """Yield the fields of a message, in their order.

        Raises:
            FileFormatError: it is malformed, or the file has too many fields.
        """
        at = 0
        while at < len(data):
            self._left -= 1
            if self._left < 0:
                raise self.fault(f"has more than {_MAX_FIELDS:,} fields")
            start = at
            key, at = self._varint(data, at)
            number, kind = key >> 3, key & 7
            if kind == VARINT:
                value, at = self._varint(data, at)
                yield Field(number, value, start)
                continue
            if kind == BYTES:
                size, at = self._varint(data, at)
            elif kind in _SIZES:
                size = _SIZES[kind]
            else:
                raise self.fault(f"has a field {number} of the wire type {kind}, which none has")
            if size > len(data) - at:
                raise self.fault(f"announces {size:,} bytes where {len(data) - at:,} are left")
            yield Field(number, data[at : at + size], start)
            at += size

    def numbers(self, field: Field) -> Iterator[int]:
        """Yield the numbers of a repeated field, which may stand alone or packed."""
        if not isinstance(field.value, memoryview):
            yield field.signed()
            return
        at = 0
        while at < len(field.value):
            self._left -= 1
            if self._left < 0:
                raise self.fault(f"has more than {_MAX_FIELDS:,} fields")
            value, at = self._varint(field.value, at)
            yield Field(field.number, value).signed()

    def _varint(self, data: memoryview, at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if at >= len(data) or shift > _MAX_SHIFT:
                raise self.fault("has a number that does not end")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (1 << 64) - 1, at
            shift += 7
