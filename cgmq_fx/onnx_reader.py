"""What an ``.onnx`` file holds, read without the package onnx and without running anything."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cgmq_fx.container import MAX_AXES, MAX_NAME, MAX_TENSORS, FileFault, StoredTensor
from cgmq_fx.packing import packed_bytes, unpack
from cgmq_fx.pools import NUMPY_TYPES, Array, array_of
from cgmq_fx.protobuf import Field, WireReader

_MAX_NODES = 100_000
_MAX_METADATA = 64
# Types of 4 bits, and whether they have a sign.
_NARROW = {"U4": False, "I4": True}
#: Types of tensors by their number in ``TensorProto.DataType``: name, and bits of an element.
TYPES: Mapping[int, tuple[str, int]] = {
    1: ("F32", 32), 2: ("U8", 8), 3: ("I8", 8), 4: ("U16", 16), 5: ("I16", 16), 6: ("I32", 32),
    7: ("I64", 64), 9: ("BOOL", 8), 10: ("F16", 16), 11: ("F64", 64), 16: ("BF16", 16),
    21: ("U4", 4), 22: ("I4", 4),
}  # fmt: skip


@dataclass(frozen=True)
class OnnxNode:
    """A node; attributes hold their whole numbers only."""

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: Mapping[str, int]


@dataclass(frozen=True)
class OnnxFile:
    """The graph of a file.

    Attributes:
        nodes: in their order.
        tensors: initializers by name; `StoredTensor.dtype` may be ``U4``, ``I4`` or ``U16`` too.
        metadata: texts by key.
        head: the bytes in front of the metadata, which end the file.
    """

    nodes: Sequence[OnnxNode]
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    head: memoryview


def read_onnx(data: npt.NDArray[np.uint8], fault: FileFault) -> OnnxFile:
    """Return what the bytes of a file hold.

    Raises:
        FileFormatError: they are no such file, or it holds what `export` never writes: tensors in
            other files, functions, sparse tensors.
    """
    return _Reader(fault).model(memoryview(data.data))


def numbers_of(tensor: StoredTensor) -> Array | None:
    """Return the numbers of a tensor; None where numpy has no such type."""
    if tensor.dtype in _NARROW:
        return unpack(tensor.data, 4, tensor.shape, signed=_NARROW[tensor.dtype])
    return array_of(tensor) if tensor.dtype in NUMPY_TYPES else None


class _Reader:
    def __init__(self, fault: FileFault) -> None:
        self.fault = fault
        self.wire = WireReader(fault)

    def model(self, data: memoryview) -> OnnxFile:
        graphs, metadata = [], dict[str, str]()
        end = len(data)
        for field in self.wire.fields(data):
            if field.number == 7:
                graphs.append(field.data())
            elif field.number == 14:
                key, value = self._entry(field.data())
                if key in metadata or len(metadata) >= _MAX_METADATA:
                    raise self.fault(f"has the metadata {key[:MAX_NAME]!r} twice, or too many")
                metadata[key] = value
                end = min(end, field.start)
            elif end < len(data):
                raise self.fault("has more behind its metadata")
            elif field.number not in {1, 2, 3, 4, 5, 6, 8}:
                raise self.fault(f"has a field {field.number}, which no exported file has")
        if len(graphs) != 1:
            raise self.fault(f"has {len(graphs)} graphs, not one")
        nodes, tensors = self._graph(graphs[0])
        return OnnxFile(nodes, tensors, metadata, data[:end])

    def _entry(self, data: memoryview) -> tuple[str, str]:
        found = {field.number: field.text() for field in self.wire.fields(data)}
        return found.get(1, ""), found.get(2, "")

    def _graph(self, data: memoryview) -> tuple[list[OnnxNode], dict[str, StoredTensor]]:
        nodes: list[OnnxNode] = []
        tensors: dict[str, StoredTensor] = {}
        for field in self.wire.fields(data):
            if field.number == 1:
                nodes.append(self._node(field.data()))
            elif field.number == 5:
                tensor = self._tensor(field.data())
                if tensor.name in tensors:
                    raise self.fault(f"has the tensor {tensor.name[:MAX_NAME]!r} twice")
                tensors[tensor.name] = tensor
            elif field.number not in {2, 10, 11, 12, 13, 16}:
                raise self.fault(f"has a graph with a field {field.number}, which no export has")
            if len(nodes) > _MAX_NODES or len(tensors) > MAX_TENSORS:
                raise self.fault(f"has more than {_MAX_NODES:,} nodes or {MAX_TENSORS:,} tensors")
        return nodes, tensors

    def _node(self, data: memoryview) -> OnnxNode:
        texts = {3: "", 4: "", 7: ""}
        lists: dict[int, list[str]] = {1: [], 2: []}
        integers: dict[str, int] = {}
        for field in self.wire.fields(data):
            if field.number in texts:
                texts[field.number] = field.text()
            elif field.number in lists:
                lists[field.number].append(field.text())
            elif field.number == 5:
                integers.update(self._attribute(field.data()))
        return OnnxNode(texts[3], texts[4], texts[7], tuple(lists[1]), tuple(lists[2]), integers)

    def _attribute(self, data: memoryview) -> Iterator[tuple[str, int]]:
        name, value = "", None
        for field in self.wire.fields(data):
            if field.number == 1:
                name = field.text()
            elif field.number == 3:
                value = field.signed()
            elif field.number in {5, 10}:
                self._tensor(field.data())
        if value is not None:
            yield name, value

    def _tensor(self, data: memoryview) -> StoredTensor:
        dims: list[int] = []
        found: dict[int, Field] = {}
        for field in self.wire.fields(data):
            if field.number == 1:
                dims.extend(self.wire.numbers(field))
            elif field.number in {13, 14}:
                raise self.fault("has a tensor whose numbers stand in another file")
            else:
                found[field.number] = field
            if len(dims) > MAX_AXES:
                raise self.fault(f"has a tensor of more than {MAX_AXES} axes")
        name = found[8].text() if 8 in found else ""
        if set(found) - {2, 8, 9, 12, 16} or any(size < 0 for size in dims):
            raise self.fault(f"describes the tensor {name[:MAX_NAME]!r} in another way")
        kind = TYPES.get(found[2].signed() if 2 in found else 0)
        if kind is None:
            raise self.fault(f"has a tensor {name[:MAX_NAME]!r} of a type that no export has")
        dtype, bits = kind
        content = found[9].data() if 9 in found else memoryview(b"")
        needed = packed_bytes(math.prod(dims), bits)
        if len(content) != needed:
            raise self.fault(
                f"has a tensor {name[:MAX_NAME]!r} of shape {str(dims)[:MAX_NAME]} with "
                f"{len(content):,} bytes, which takes {needed:,}"
            )
        return StoredTensor(name, dtype, tuple(dims), np.frombuffer(content, np.uint8))
