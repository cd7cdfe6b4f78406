"""What a ``.pte`` file holds for the XNNPACK backend: a graph of tensors and nodes.

Numbers of fields, nodes and types are those of
``backends/xnnpack/serialization/runtime_schema.fbs`` of ExecuTorch.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cgmq_fx.container import MAX_AXES, FileFault
from cgmq_fx.flatbuffer import Flatbuffer, Table

FLOAT, QINT8, QCINT8, QCINT32 = 1, 3, 6, 7
#: Types that `export` writes: float32; int8 of one scale; int8 and int32 with one per channel.
_TYPES = (FLOAT, QINT8, QCINT8, QCINT32)
_HEADER = struct.Struct("<4s4sHIIIQ")
_MAGIC = b"XH00"
_PER_CHANNEL, _PER_TENSOR = 1, 2
_QUANTIZED = 2
_EXTERNAL = 3
_NO_OFFSET = (1 << 64) - 1

_TWO_TO_ONE = ((0, 1), 2)
_ONE_TO_ONE = ((0,), 1)
_CONVOLUTION = ((15, 16, 17), 18)
_POOLING = ((10,), 11)
#: By type of a node, the fields of its inputs and of its output.
_NODES: Mapping[int, tuple[tuple[int, ...], int]] = {
    **dict.fromkeys((1, 8, 12, 15, 16, 26, 31, 37), _TWO_TO_ONE),
    **dict.fromkeys((3, 4, 6, 17, 18, 19, 22, 23, 24, 27, 28, 30), _ONE_TO_ONE),
    **dict.fromkeys(range(40, 48), _ONE_TO_ONE),
    **dict.fromkeys((7, 13, 39), _CONVOLUTION),
    **dict.fromkeys((11, 14), _POOLING),
    2: ((0, 1, 2), 3),  # a linear layer
    5: ((2,), 3),  # a permutation
    9: ((2,), 3),  # resizing
    10: ((3,), 4),  # padding
    20: ((2,), 3),  # a reshape
    25: ((1,), 2),  # leaky ReLU
    29: ((1,), 2),  # ELU
    32: ((1, 2), 5),  # concatenations, of two to five
    33: ((1, 2, 3), 5),
    34: ((1, 2, 3, 4), 5),
    35: ((3,), 4),  # a slice
    38: ((1, 2, 3, 4, 7), 5),
}
CONVERT = 18
#: Convolutions and linear layers.
LAYERS = (2, 7, 13, 39)
#: Nodes whose output has numbers of their first input and no other; padding adds one of its own.
MOVING = (5, 14, 20, 35, 46)


@dataclass(frozen=True)
class XnnValue:
    """A tensor.

    Attributes:
        kind: its type.
        shape: its shape.
        key: of its bytes, where it is a constant; else empty.
        scale: of one number, where it has one.
        zero_point: with `scale`.
        channel_axis: the axis along which it has scales.
        scale_key: of the bytes of those; else empty.
        argument: which argument of the part it is, inputs first; None where it is none.
    """

    kind: int
    shape: tuple[int, ...]
    key: str
    scale: float = 0.0
    zero_point: int = 0
    channel_axis: int = 0
    scale_key: str = ""
    argument: int | None = None


@dataclass(frozen=True)
class XnnNode:
    """An operation; `inputs` and `output` name values. `clamp` is None where it has no bounds."""

    kind: int
    inputs: tuple[int, ...]
    output: int
    clamp: tuple[float, float] | None


@dataclass(frozen=True)
class XnnGraph:
    """A graph: its values by their names, which are numbers, and its nodes in order."""

    values: Mapping[int, XnnValue]
    nodes: Sequence[XnnNode]


def read_xnnpack(data: memoryview, fault: FileFault) -> XnnGraph:
    """Return what the bytes for the backend hold.

    Raises:
        FileFormatError: they are malformed, or hold what `export` never writes: constants among
            them, tensors of 4 bits or with scales that are found when they run.
    """
    head = bytes(data[: _HEADER.size])
    if len(head) < _HEADER.size:
        raise fault("has a part for XNNPACK without a header")
    _, magic, _, at, size, _, constants = _HEADER.unpack(head)
    graph = data[at : at + size]
    if magic != _MAGIC or len(graph) != size or constants:
        raise fault("has a part for XNNPACK with a header that no exported file has")
    return _Reader(fault).graph(Flatbuffer(graph, fault).root())


class _Reader:
    def __init__(self, fault: FileFault) -> None:
        self.fault = fault

    def graph(self, root: Table) -> XnnGraph:
        if any(True for _ in root.tables(6)):
            raise self.fault("has a part for XNNPACK with constants that no exported file has")
        keys = [self._key(item) for item in root.tables(8)]
        values: dict[int, XnnValue] = {}
        for item in root.tables(2):
            name, value = self._value(item, keys)
            if name in values:
                raise self.fault(f"has two tensors {name} for XNNPACK")
            values[name] = value
        nodes = [self._node(item, values) for item in root.tables(1)]
        made = [node.output for node in nodes]
        if len(set(made)) < len(made):
            raise self.fault("has a tensor for XNNPACK that is computed twice")
        return XnnGraph(values, nodes)

    def _key(self, item: Table) -> str:
        key = item.text(2)
        if not key and item.number(0, "Q") not in (0, _NO_OFFSET):
            raise self.fault("has a constant for XNNPACK that has no name")
        return key

    def _value(self, item: Table, keys: Sequence[str]) -> tuple[int, XnnValue]:
        kind, held = item.number(0, "B"), item.table(1)
        quantized = held if kind == _QUANTIZED else None
        tensor = held.table(0) if held is not None and kind == _QUANTIZED else held
        if tensor is None or tensor.number(7, "h"):
            raise self.fault("has a tensor for XNNPACK in a form that no exported file has")
        shape = tuple(int(size) for size in tensor.numbers(2, "I"))
        name, dtype = tensor.number(6, "I"), tensor.number(0, "h")
        if len(shape) > MAX_AXES or dtype not in _TYPES or (quantized is None) != (dtype == FLOAT):
            raise self.fault(f"has a tensor {name} for XNNPACK of a type that no exported file has")
        key = self._keyed(keys, tensor.number(3, "I"))
        argument = tensor.number(4, "I") if tensor.number(5, "I") & _EXTERNAL else None
        params = None if quantized is None else quantized.table(2)
        if quantized is None or params is None:
            if dtype != FLOAT:
                raise self.fault(f"has a tensor {name} for XNNPACK without a scale")
            return name, XnnValue(dtype, shape, key, argument=argument)
        spread = quantized.number(1, "B")
        if spread == _PER_TENSOR and dtype == QINT8:
            numbers = (params.real(0, "f"), params.number(1, "i"))
            return name, XnnValue(dtype, shape, key, *numbers, argument=argument)
        if spread != _PER_CHANNEL or dtype == QINT8 or not key:
            raise self.fault(f"has a tensor {name} for XNNPACK with scales that no export has")
        scale_key = self._keyed(keys, params.number(2, "I"))
        return name, XnnValue(
            dtype, shape, key, channel_axis=params.number(1, "i"), scale_key=scale_key
        )

    def _keyed(self, keys: Sequence[str], index: int) -> str:
        if index >= len(keys) and index:
            raise self.fault(f"names the constant {index} of {len(keys)} for XNNPACK")
        return keys[index] if index else ""

    def _node(self, item: Table, values: Mapping[int, XnnValue]) -> XnnNode:
        kind, held, bounds = item.number(0, "B"), item.table(1), item.table(3)
        if held is None or kind not in _NODES:
            raise self.fault(f"has a node of the type {kind} for XNNPACK, which no export has")
        fields, output = _NODES[kind]
        inputs = tuple(self._inputs(held, kind, fields, values))
        made = held.number(output, "I")
        if made not in values:
            raise self.fault(f"has a node for XNNPACK that computes {made}, which is no tensor")
        clamp = None if bounds is None else (bounds.real(0, "f"), bounds.real(1, "f"))
        return XnnNode(kind, inputs, made, clamp)

    def _inputs(
        self, held: Table, kind: int, fields: Sequence[int], values: Mapping[int, XnnValue]
    ) -> Iterator[int]:
        for field in fields:
            name = held.number(field, "I")
            if name in values:
                yield name
            elif not (kind in LAYERS and field == fields[-1]):  # a layer may have no bias
                raise self.fault(f"has a node for XNNPACK that reads {name}, which is no tensor")
