"""What a ``.pte`` file holds, read without ExecuTorch and without running anything.

Numbers of fields are those of ``schema/program.fbs`` of ExecuTorch.
"""

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cgmq_fx.container import ITEM_BYTES, MAX_AXES, MAX_NAME, MAX_TENSORS, FileFault, StoredTensor
from cgmq_fx.flatbuffer import Flatbuffer, Table

#: The file's identifier, behind the offset of the root table.
MAGIC = b"ET12"
METHOD = "forward"
BACKEND = "XnnpackBackend"
_HEADER = struct.Struct("<4sIQQQ")  # sign, size, of the program, where segments start, of those
_HEADER_AT = 8
_MAX_VALUES = 100_000
#: Types of tensors by their number in ``scalar_type.fbs``.
TYPES: Mapping[int, str] = {
    0: "U8", 1: "I8", 2: "I16", 3: "I32", 4: "I64", 5: "F16", 6: "F32", 7: "F64", 11: "BOOL",
    15: "BF16",
}  # fmt: skip
_OPERATOR = re.compile(r"(aten|dim_order_ops|quantized_decomposed|executorch_prim)::\w+")
_INT, _BOOL, _DOUBLE, _TENSOR = 2, 3, 4, 5
_KERNEL, _DELEGATE = 1, 2
_IN_SEGMENT = 1


@dataclass(frozen=True)
class PteTensor:
    """A tensor of the method; `constant` is the index of its bytes, 0 where it has none."""

    dtype: str
    shape: tuple[int, ...]
    constant: int


@dataclass(frozen=True)
class PteCall:
    """One call, whose arguments are indices of values.

    Attributes:
        operator: its name; empty where a part for XNNPACK is called.
        args: inputs, then outputs.
        delegate: which of the parts; -1 for an operator.
    """

    operator: str
    args: tuple[int, ...]
    delegate: int = -1


@dataclass(frozen=True)
class PteFile:
    """The method of a file.

    Attributes:
        values: tensors and numbers by index; None for what is neither.
        calls: in their order.
        delegates: what the file holds for XNNPACK.
        constants: tensors by their index.
        named: bytes by their keys.
        places: by key, where those bytes begin in the file.
    """

    values: Sequence[PteTensor | float | None]
    calls: Sequence[PteCall]
    delegates: Sequence[memoryview]
    constants: Mapping[int, StoredTensor]
    named: Mapping[str, memoryview]
    places: Mapping[str, int]


def read_pte(data: npt.NDArray[np.uint8], fault: FileFault) -> PteFile:
    """Return what the bytes of a file hold.

    Raises:
        FileFormatError: they are no such file, or it holds what `export` never writes: several
            methods, state that changes, backends but XNNPACK, control flow, tensors in other files.
    """
    return _Reader(memoryview(data.data), fault).file()


class _Reader:
    def __init__(self, data: memoryview, fault: FileFault) -> None:
        self.data, self.fault = data, fault
        start = bytes(data[: _HEADER_AT + _HEADER.size])
        if len(start) < _HEADER_AT + _HEADER.size or start[4:8] != MAGIC:
            raise fault("is no program of ExecuTorch")
        sign, size, program, base, _ = _HEADER.unpack_from(start, _HEADER_AT)
        if sign != b"eh00" or size < _HEADER.size or not program <= base <= len(data):
            raise fault("has no header that says where its segments are")
        self.base = base
        self.root = Flatbuffer(data[:program], fault).root()
        self.segments = [(item.number(0, "Q"), item.number(1, "Q")) for item in self.root.tables(4)]

    def file(self) -> PteFile:
        plans = list(self.root.tables(1))
        if len(plans) != 1 or plans[0].text(0) != METHOD:
            raise self.fault(f"has {len(plans)} methods, not {METHOD!r} alone")
        for field, what in ((2, "constants"), (3, "delegates"), (6, "state")):
            if any(True for _ in self.root.tables(field)):
                raise self.fault(f"has {what} in a form that no exported file has")
        (plan,) = plans
        values = [self._value(item) for item in plan.tables(2)]
        if len(values) > _MAX_VALUES:
            raise self.fault(f"has more than {_MAX_VALUES:,} values")
        named = {item.text(0): item.number(1, "I") for item in self.root.tables(7)}
        if len(named) > MAX_TENSORS:
            raise self.fault(f"has more than {MAX_TENSORS:,} tensors")
        return PteFile(
            values,
            self._calls(plan, len(values)),
            [self._delegate(item) for item in plan.tables(7)],
            self._constants(values),
            {key: self._segment(index) for key, index in named.items()},
            {key: self.base + self.segments[index][0] for key, index in named.items()},
        )

    def _segment(self, index: int) -> memoryview:
        if index >= len(self.segments):
            raise self.fault(f"names the segment {index} of {len(self.segments)}")
        offset, size = self.segments[index]
        found = self.data[self.base + offset :][:size]
        if len(found) != size:
            raise self.fault(f"has a segment of {size:,} bytes that ends outside of it")
        return found

    # -- values ----------------------------------------------------------------------------------

    def _value(self, item: Table) -> PteTensor | float | None:
        kind, held = item.number(0, "B"), item.table(1)
        if held is None:
            return None
        if kind == _TENSOR:
            return self._tensor(held)
        if kind == _INT:
            return held.number(0, "q")
        if kind == _BOOL:
            return held.number(0, "B")
        return held.real(0, "d") if kind == _DOUBLE else None

    def _tensor(self, held: Table) -> PteTensor:
        dtype = TYPES.get(held.number(0, "b"))
        shape = [int(size) for size in held.numbers(2, "i")]
        order = list(held.numbers(3, "B"))
        extra = held.table(9)
        if extra is not None and (extra.number(0, "Q") or extra.number(2, "b")):
            raise self.fault("has a tensor whose numbers change, or stand in another file")
        if (
            dtype is None
            or held.number(1, "i")
            or len(shape) > MAX_AXES
            or min(shape, default=0) < 0
        ):
            raise self.fault(f"has a tensor of shape {shape[:MAX_AXES]} that no export has")
        constant = 0 if held.table(6) is not None else held.number(5, "I")
        if constant and order != list(range(len(shape))):
            raise self.fault("has a constant whose axes are in another order")
        return PteTensor(dtype, tuple(shape), constant)

    def _constants(self, values: Sequence[object]) -> dict[int, StoredTensor]:
        held = self.root.table(5)
        wanted = [item for item in values if isinstance(item, PteTensor) and item.constant]
        if held is None:
            if wanted:
                raise self.fault("has no segment of constants")
            return {}
        data = self._segment(held.number(0, "I")) if self.segments else memoryview(b"")
        offsets = held.numbers(1, "Q").tolist()
        found: dict[int, StoredTensor] = {}
        for item in wanted:
            size = math.prod(item.shape) * ITEM_BYTES[item.dtype]
            at = offsets[item.constant] if item.constant < len(offsets) else len(data)
            content = data[at : at + size]
            if len(content) != size:
                raise self.fault(f"has a constant {item.constant} that ends outside of it")
            name = f"constants.{item.constant}"
            tensor = StoredTensor(name, item.dtype, item.shape, np.frombuffer(content, np.uint8))
            before = found.setdefault(item.constant, tensor)
            if before.data.size != size or before.dtype != item.dtype:
                raise self.fault(f"has a constant {item.constant} of two sizes or types")
        if set(found) != set(range(1, len(offsets))):
            raise self.fault("has constants that nothing reads")
        return found

    # -- calls -----------------------------------------------------------------------------------

    def _calls(self, plan: Table, count: int) -> list[PteCall]:
        operators = [item.text(0) for item in plan.tables(6)]
        for name in operators:
            if not _OPERATOR.fullmatch(name):
                raise self.fault(f"calls {name[:MAX_NAME]!r}, which is no known operator")
        delegates = sum(1 for _ in plan.tables(7))
        chains = list(plan.tables(5))
        if len(chains) != 1:
            raise self.fault(f"has {len(chains)} chains of instructions, not one")
        return [
            call
            for item in chains[0].tables(2)
            if (call := self._call(item, operators, delegates, count)) is not None
        ]

    def _call(
        self, item: Table, operators: Sequence[str], delegates: int, count: int
    ) -> PteCall | None:
        kind, held = item.number(0, "B"), item.table(1)
        if held is None or kind not in (_KERNEL, _DELEGATE):
            raise self.fault(f"has an instruction of the kind {kind}, which no exported file has")
        index = held.number(0, "i")
        args = tuple(int(value) for value in held.numbers(1, "i"))
        if not all(0 <= value < count for value in args):
            raise self.fault(f"has a call with arguments that are none of its {count:,} values")
        if not 0 <= index < (len(operators) if kind == _KERNEL else delegates):
            raise self.fault(f"calls the operator or backend {index}, which it has not")
        return PteCall(operators[index], args) if kind == _KERNEL else PteCall("", args, index)

    def _delegate(self, item: Table) -> memoryview:
        held: Any = item.table(1)
        if item.text(0) != BACKEND or held is None or held.number(0, "b") != _IN_SEGMENT:
            raise self.fault(f"has a part for {item.text(0)[:MAX_NAME]!r}, not for {BACKEND!r}")
        return self._segment(held.number(1, "I"))
