"""The manifest of a packed file as compressed JSON: written plainly, read with suspicion."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

from cgmq_fx.container import MAX_NAME, FileFault, are_counts, is_tensor_name, read_json
from cgmq_fx.cost.operation import OP_CLASSES, OPERAND_NAMES, BitSource, Operation
from cgmq_fx.errors import UsageError
from cgmq_fx.manifest import (
    FORMAT,
    VERSION,
    LiveTensor,
    Manifest,
    Place,
    StoredGrid,
    StoredOperation,
    StoredResource,
    StoredSite,
    StoredTable,
    StoredWeight,
)

#: Bytes of the manifest before it is compressed.
MAX_MANIFEST_BYTES = 1 << 22
MAX_ITEMS = 10_000
MAX_TEXT = 4000
MAX_TABLES = 16
#: Channels of one weight that differ in bit-width.
MAX_CHANNELS = 1 << 20
_MAX_INTEGER = 1 << 62
_MAX_DIGITS = 200
_MAX_TABLE_DEPTH = 20

T = TypeVar("T")
Reader = Callable[[Any], T]


class _MalformedError(Exception):
    """A value is not what the format says."""


# -- writing ---------------------------------------------------------------------------------------


def to_bytes(manifest: Manifest) -> bytes:
    """Return a manifest as the bytes of its tensor.

    Raises:
        UsageError: it is too large.
    """
    return zlib.compress(to_text(manifest), 9)


def to_text(manifest: Manifest) -> bytes:
    """Return a manifest as JSON.

    Raises:
        UsageError: it is too large.
    """
    content = {"format": FORMAT, "version": VERSION, **_plain(manifest)}
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_MANIFEST_BYTES or len(manifest.operations) > MAX_ITEMS:
        raise UsageError(
            f"the model {manifest.model} has {len(manifest.operations):,} operations, whose "
            f"manifest would take {len(text):,} bytes; at most {MAX_ITEMS:,} and "
            f"{MAX_MANIFEST_BYTES:,} are written: export parts of the model"
        )
    return text


def _plain(value: Any) -> Any:
    """Return a value of the manifest as JSON has it."""
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, Place):
        return [value.dtype, value.at, list(value.shape)]
    if isinstance(value, BitSource):
        return {"bits": value.bits} if value.site is None else {"site": value.site}
    if isinstance(value, StoredOperation):
        rest = {"sources": _plain(value.sources), "reason": value.reason}
        return {**_plain(value.operation), **rest}
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


# -- reading ---------------------------------------------------------------------------------------


def from_bytes(data: bytes, fault: FileFault) -> Manifest:
    """Return the manifest that a file holds.

    Raises:
        FileFormatError: it is malformed; the message says where.
    """
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(data, MAX_MANIFEST_BYTES + 1)
    except zlib.error as error:
        raise fault(f"has a manifest that is not compressed by zlib ({error})") from error
    if len(text) <= MAX_MANIFEST_BYTES and (not inflate.eof or inflate.unused_data):
        raise fault("has a manifest that ends too early or too late")
    return from_text(text, fault)


def from_text(text: bytes, fault: FileFault) -> Manifest:
    """Return the manifest that a JSON text holds.

    Raises:
        FileFormatError: it is malformed; the message says where.
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise fault(f"has a manifest of more than {MAX_MANIFEST_BYTES:,} bytes")
    raw = read_json(text, "manifest", fault)
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise fault(f"has a manifest that is not of the format {FORMAT!r}")
    version = raw.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise fault(
            f"is of version {str(version)[:MAX_NAME]} of the format, and this release reads "
            f"{VERSION}"
        )
    try:
        return Manifest(**_fields(raw, _MANIFEST))
    except _MalformedError as error:
        raise fault(f"has a malformed manifest: {error}") from None


def _fields(raw: Any, readers: Mapping[str, Reader[Any]]) -> dict[str, Any]:
    if not isinstance(raw, dict) or set(raw) != set(readers):
        keys = sorted(map(str, raw))[:20] if isinstance(raw, dict) else type(raw).__name__
        raise _MalformedError(f"{str(keys)[:MAX_NAME]} stands where {sorted(readers)} must")
    found = {}
    for key, reader in readers.items():
        try:
            found[key] = reader(raw[key])
        except _MalformedError as error:
            raise _MalformedError(f"{key}: {error}") from None
    return found


def _wrong(value: object, rule: str) -> _MalformedError:
    # Not the text of a container: it may be nested so deeply that there is none.
    shown = type(value).__name__ if isinstance(value, list | dict) else repr(value)[:80]
    return _MalformedError(f"{shown} is not {rule}")


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise _wrong(value, f"a text of at most {MAX_TEXT:,} printable characters")
    return value


def _name(value: Any) -> str:
    if not is_tensor_name(value):
        raise _wrong(value, "a name of a tensor")
    return str(value)


def _integer(value: Any) -> int:
    if type(value) is not int or abs(value) >= _MAX_INTEGER:
        raise _wrong(value, "a whole number")
    return value


def _count(value: Any) -> int:
    if _integer(value) < 0:
        raise _wrong(value, "a count")
    return int(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(value, "true or false")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not are_counts(value, 32):
        raise _wrong(value, "a shape")
    return tuple(value)


def _amount(value: Any) -> Fraction:
    if not isinstance(value, str) or len(value) > _MAX_DIGITS or set(value) - set("0123456789/"):
        raise _wrong(value, "an exact number such as '12' or '1/3'")
    try:
        return Fraction(value)
    except (ValueError, ZeroDivisionError):
        raise _wrong(value, "an exact number such as '12' or '1/3'") from None


def _attribute(value: Any) -> int | bool | str:
    if isinstance(value, bool | str):
        return value if isinstance(value, bool) else _text(value)
    return _integer(value)


def _one_of(*known: str) -> Reader[str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise _wrong(value, f"one of {', '.join(known)}")
        return value

    return read


def _optional(reader: Reader[T]) -> Reader[T | None]:
    return lambda value: None if value is None else reader(value)


def _list(reader: Reader[T], most: int = MAX_ITEMS) -> Reader[tuple[T, ...]]:
    def read(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list) or len(value) > most:
            raise _wrong(value, f"a list of at most {most:,} items")
        found = []
        for place, item in enumerate(value):
            try:
                found.append(reader(item))
            except _MalformedError as error:
                raise _MalformedError(f"item {place}: {error}") from None
        return tuple(found)

    return read


def _record(make: Callable[..., T], readers: Mapping[str, Reader[Any]]) -> Reader[T]:
    return lambda value: make(**_fields(value, readers))


def _place(value: Any) -> Place:
    if not isinstance(value, list) or len(value) != 3:
        raise _wrong(value, "a list of type, index and shape")
    return Place(_text(value[0]), _count(value[1]), _shape(value[2]))


def _source(value: Any) -> BitSource:
    if not isinstance(value, dict) or len(value) != 1 or set(value) - {"site", "bits"}:
        raise _wrong(value, "a site or a number of bits")
    return BitSource(**{key: _count(item) for key, item in value.items()})


def _attributes(value: Any) -> dict[str, int | bool | str]:
    if not isinstance(value, dict) or len(value) > 64:
        raise _wrong(value, "a mapping of attributes")
    return {_text(key): _attribute(item) for key, item in value.items()}


def _content(value: Any) -> Mapping[str, Any]:
    # The whole of it is checked when it is loaded as a table, but that would follow an include.
    if not isinstance(value, dict) or "include" in value:
        raise _wrong(value, "a cost table that includes no other")
    level: list[Any] = [value]
    for _ in range(_MAX_TABLE_DEPTH):
        level = [
            item
            for held in level
            for item in (held.values() if isinstance(held, dict) else held)
            if isinstance(item, dict | list)
        ]
        if not level:
            return value
    raise _wrong(value, f"nested at most {_MAX_TABLE_DEPTH} deep")


def _operation(value: Any) -> StoredOperation:
    fields = _fields(value, _OPERATION)
    sources, reason = fields.pop("sources"), fields.pop("reason")
    return StoredOperation(Operation(**fields), sources, reason)


_SITE = {"name": _text, "role": _one_of("weight", "activation", "input"), "elements": _count}
_GRID: Mapping[str, Reader[Any]] = {
    "name": _name,
    "site": _count,
    "bits": _count,
    "quant_min": _integer,
    "quant_max": _integer,
    "channel_axis": _optional(_integer),
    "scale": _place,
    "zero_point": _optional(_place),
}
_WEIGHT: Mapping[str, Reader[Any]] = {
    **_GRID, "shape": _shape, "signed": _flag, "storage": _one_of("I8", "I16", "I32"),
    "dtype": _one_of("F64", "F32", "F16", "BF16"),
    "unit_widths": _shape, "unit_shape": _shape, "unit_bits": _list(_count, MAX_CHANNELS),
}  # fmt: skip
_OPERATION: Mapping[str, Reader[Any]] = {
    "name": _text,
    "op": _one_of(*OP_CLASSES),
    "target": _text,
    "operands": _one_of(*OPERAND_NAMES),
    "macs": _count,
    "output_elements": _count,
    "input_elements": _count,
    "weights": _count,
    "attributes": _attributes,
    "sources": _list(_source, 2),
    "reason": _text,
}
_LIVE: Mapping[str, Reader[Any]] = {
    "name": _text,
    "elements": _count,
    "first": _count,
    "last": _count,
    "site": _optional(_count),
    "bits": _count,
    "is_copy": _flag,
}
_RESOURCE: Mapping[str, Reader[Any]] = {
    "name": _text,
    "share": _optional(_amount),
    "value": _optional(_amount),
    "unit": _optional(_text),
    "bound": _optional(_amount),
    "convention": _list(_text, 16),
}
_MANIFEST: Mapping[str, Reader[Any]] = {
    "generator": _text,
    "model": _text,
    "batch_axis": _optional(_integer),
    "input_bits": _optional(_count),
    "sha256": _text,
    "sites": _list(_record(StoredSite, _SITE)),
    "weights": _list(_record(StoredWeight, _WEIGHT)),
    "quantizers": _list(_record(StoredGrid, _GRID)),
    "parameters": _list(_name),
    "buffers": _list(_name),
    "operations": _list(_operation),
    "stored_sites": _list(_count),
    "float_parameters": _optional(_count),
    "live": _optional(_list(_record(LiveTensor, _LIVE))),
    "tables": _list(_record(StoredTable, {"digest": _text, "content": _content}), MAX_TABLES),
    "resources": _list(_record(StoredResource, _RESOURCE), MAX_TABLES + 2),
}
