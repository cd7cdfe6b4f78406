"""Flatbuffers are read within their bytes, and no longer than a sound file takes."""

import struct
from collections import deque

import pytest

from cgmq_fx.container import FileFault
from cgmq_fx.errors import FileFormatError
from cgmq_fx.flatbuffer import Flatbuffer

FAULT = FileFault("file")


def buffer(*words):
    return Flatbuffer(memoryview(b"".join(words)), FAULT)


def u32(*numbers):
    return struct.pack(f"<{len(numbers)}I", *numbers)


def shape(*offsets, size=8):
    return struct.pack(f"<{2 + len(offsets)}H", 4 + 2 * len(offsets), size, *offsets)


def test_fields_are_read_by_their_number():
    # 0: the root's place; 4: its shape, for fields 0 (a number) and 1 (a text); 12: the table.
    data = u32(12) + shape(4, 8, size=12) + struct.pack("<iiI", 8, -7, 4) + u32(2) + b"ab\0\0"
    root = buffer(data).root()
    assert (root.number(0, "i"), root.text(1), root.number(2, "q", 9)) == (-7, "ab", 9)
    assert root.table(5) is None
    assert list(root.tables(3)) == []


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (u32(400), "an offset to 400, outside of its 4 bytes"),
        (b"\1", "an offset to 0, outside of its 1 bytes"),
        (u32(4, 2**31 - 1), "outside of its"),
        (u32(8) + struct.pack("<HHi", 60, 4, 4), "a table at 8 that ends outside of it"),
        (u32(8) + struct.pack("<HHi", 3, 4, 4), "a table of 3 bytes of offsets at 8"),
    ],
)
def test_offsets_lead_nowhere_else(data, text):
    with pytest.raises(FileFormatError, match=text):
        buffer(data).root()


def test_a_vector_ends_in_its_buffer():
    data = u32(12) + shape(4, size=8) + b"\0\0" + struct.pack("<iI", 8, 4) + u32(1000)
    with pytest.raises(FileFormatError, match="a vector of 4,000 bytes at 20 that ends outside"):
        buffer(data).root().numbers(0, "i")


def test_shared_tables_are_not_read_forever():
    # The root has a vector that names the root a thousand times: a million tables at depth two.
    count = 1000
    head = u32(12) + shape(4, size=8) + b"\0\0" + struct.pack("<iI", 8, 4) + u32(count)
    places = b"".join(struct.pack("<I", (12 - at) % 2**32) for at in range(24, 24 + 4 * count, 4))
    back = buffer(head + places).root()
    with pytest.raises(FileFormatError, match="outside of its"):
        list(back.tables(0))  # offsets only lead forwards
    table = shape(4, size=8) + b"\0\0"
    leaf = len(head) + 4 * count
    forward = b"".join(u32(leaf + 8 - at) for at in range(24, 24 + 4 * count, 4))
    shared = buffer(head + forward + table + struct.pack("<iI", 8, 0)).root()
    with pytest.raises(FileFormatError, match="more than 400,000 tables and numbers"):
        deque(table for _ in range(count) for table in shared.tables(0))
