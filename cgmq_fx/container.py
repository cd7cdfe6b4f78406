"""The container of packed files: safetensors, whose headers are read with suspicion.

A file is 8 bytes with the length of the header (little-endian), the header as JSON, and the bytes
of all tensors. The header is read here and not by the safetensors package, which takes duplicate
names and headers of 100 MB, and which `verify` should not need; the package writes the files.
"""

import json
import math
import mmap
import os
import stat
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from cgmq_fx.errors import FileFormatError

MAX_HEADER_BYTES = 1 << 22
MAX_TENSORS = 20_000
MAX_AXES = 32
#: Lists and mappings of a header or a manifest; each takes more memory and time than its text.
MAX_JSON_PARTS = 300_000
MAX_NAME = 500
#: Bytes of an element of each type that files may hold.
ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
        "BOOL": 1,
    }
)  # fmt: skip
_KEYS = {"dtype", "shape", "data_offsets"}
_LENGTH = struct.Struct("<Q")
_MAX_ELEMENTS = 1 << 48


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a file.

    Attributes:
        name: its name.
        dtype: type of its elements, a key of `ITEM_BYTES`.
        shape: its shape.
        data: its bytes, in row-major order, little-endian; read-only.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Container:
    """A file that was opened and whose header is sound.

    Attributes:
        path: where it is, for messages.
        num_bytes: size of the file.
        metadata: texts by name.
        tensors: by name, in the order of their bytes.
    """

    path: str
    num_bytes: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def open_container(path: str | os.PathLike[str]) -> Container:
    """Open a safetensors file without reading its tensors into memory.

    Raises:
        FileFormatError: it cannot be read, or is not such a file.
    """
    label = os.fsdecode(path)
    data = mapped_file(path, label)
    fault = FileFault(label)
    if len(data) < _LENGTH.size:
        raise fault(f"has {len(data)} bytes, and no header")
    (length,) = _LENGTH.unpack(data[: _LENGTH.size].tobytes())
    if length > min(MAX_HEADER_BYTES, len(data) - _LENGTH.size):
        raise fault(
            f"announces a header of {length:,} bytes; it has {len(data):,} in all, and headers "
            f"have at most {MAX_HEADER_BYTES:,}"
        )
    body = data[_LENGTH.size + length :]
    header = _mapping(read_json(data[_LENGTH.size :][:length].tobytes(), "header", fault), fault)
    metadata = _metadata(header.pop("__metadata__", {}), fault)
    return Container(label, len(data), metadata, _tensors(header, body, fault))


@dataclass(frozen=True)
class FileFault:
    """Makes errors about one file.

    Attributes:
        label: what messages call it.
    """

    label: str

    def __call__(self, text: str) -> FileFormatError:
        """Return the error that says `text` of the file."""
        shown = self.label if len(self.label) <= MAX_NAME else f"...{self.label[-MAX_NAME:]}"
        return FileFormatError(
            f"{shown!r} {text}; it is damaged, was changed, or is no file of cgmq_fx.export: "
            f"export the model again"
        )


def mapped_file(path: str | os.PathLike[str], label: str) -> npt.NDArray[np.uint8]:
    """Return the bytes of a plain file without reading them; messages call it `label`.

    Raises:
        FileFormatError: it cannot be read, or is empty.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileFault(label)("is not a plain file")
            if not status.st_size:
                raise FileFault(label)("is empty")
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(
            f"{label[-MAX_NAME:]!r} cannot be read: {str(error)[:MAX_NAME]}; give the path of a "
            f"file that cgmq_fx.export wrote"
        ) from error
    return np.frombuffer(held, np.uint8)


def read_json(text: bytes, what: str, fault: FileFault, most: int = MAX_JSON_PARTS) -> Any:
    """Return the value of a JSON text in which no key stands twice.

    Args:
        text: the text, in UTF-8.
        what: what messages call it.
        fault: makes the errors.
        most: lists and mappings that it may have.

    Raises:
        FileFormatError: it is not such a text.
    """
    parts = text.count(b"[") + text.count(b"{")
    if parts > most:
        raise fault(f"has a {what} of {parts:,} lists and mappings; at most {most:,}")
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant
        )
    except RecursionError:
        raise fault(f"has a {what} nested too deeply") from None
    except (ValueError, MemoryError) as error:
        raise fault(f"has a {what} that is no sound JSON ({str(error)[:MAX_NAME]})") from error


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:MAX_NAME]!r} stands there twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _mapping(value: object, fault: FileFault) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > MAX_TENSORS:
        raise fault(f"has a header that is no mapping of at most {MAX_TENSORS:,} tensors")
    return value


def _metadata(value: object, fault: FileFault) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise fault("has metadata that are no texts by name")
    return MappingProxyType(value)


def _tensors(
    header: Mapping[str, Any], body: npt.NDArray[np.uint8], fault: FileFault
) -> Mapping[str, StoredTensor]:
    placed = sorted(
        ((*_entry(name, raw, len(body), fault), name) for name, raw in header.items()),
    )
    at = 0
    for start, stop, _, _, name in placed:
        if start != at:
            raise fault(f"has bytes at {min(start, at):,} that no tensor, or two, have: {name!r}")
        at = stop
    if at != len(body):
        raise fault(f"has {len(body) - at:,} bytes behind its last tensor")
    return MappingProxyType(
        {
            name: StoredTensor(name, dtype, shape, body[start:stop])
            for start, stop, dtype, shape, name in placed
        }
    )


def _entry(
    name: str, raw: object, size: int, fault: FileFault
) -> tuple[int, int, str, tuple[int, ...]]:
    """Return where a tensor starts and ends, its type and its shape."""
    if not is_tensor_name(name):
        raise fault(f"has a tensor called {name[:MAX_NAME]!r}, which is no name of a tensor")
    if not isinstance(raw, dict) or set(raw) != _KEYS or raw["dtype"] not in list(ITEM_BYTES):
        raise fault(f"describes the tensor {name!r} otherwise than by {sorted(_KEYS)}")
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not are_counts(shape, MAX_AXES) or not are_counts(offsets, 2) or len(offsets) != 2:
        raise fault(f"has no sound shape or offsets for the tensor {name!r}")
    start, stop = offsets
    needed = math.prod(shape) * ITEM_BYTES[raw["dtype"]]
    if not start <= stop <= size or stop - start != needed:
        raise fault(
            f"gives the tensor {name!r} the bytes {start:,} to {stop:,} of {size:,}, while "
            f"{raw['dtype']} of shape {shape} takes {needed:,}"
        )
    return start, stop, raw["dtype"], tuple(shape)


def is_tensor_name(name: object) -> bool:
    """Tell whether a text is a name that a tensor of a module may have in a file.

    It is a path of modules and nothing that a file system could take for a path of its own.
    """
    return (
        isinstance(name, str)
        and 0 < len(name) <= MAX_NAME
        and name.isprintable()
        and not set(name) & set('/\\:"')
        and all(name.split("."))
    )


def are_counts(value: object, most: int) -> bool:
    """Tell whether `value` is a list of at most `most` whole numbers of a sensible size."""
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(item) is int and 0 <= item < _MAX_ELEMENTS for item in value)
        and math.prod(value) < _MAX_ELEMENTS**2
    )
