"""The quantizers of activations in a ``.pte`` file, held to the manifest.

XNNPACK has them as int8 tensors with a scale and a zero_point; what it has no type for is computed
by operators of ExecuTorch, which name scale, zero_point and the ends of the codes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cgmq_fx.container import StoredTensor
from cgmq_fx.manifest import Manifest, StoredGrid
from cgmq_fx.pools import NUMPY_TYPES, Array, array_of
from cgmq_fx.pte_levels import Clamp, LevelReader
from cgmq_fx.pte_reader import PteCall, PteFile, PteTensor
from cgmq_fx.xnnpack_reader import QINT8, XnnGraph

_OPERATORS = "quantized_decomposed::"
_QUANTIZE = {f"{_OPERATORS}quantize_per_{kind}" for kind in ("tensor", "channel")}
_DEQUANTIZE = {f"{_OPERATORS}dequantize_per_{kind}" for kind in ("tensor", "channel")}
_CHANNEL = "_per_channel"
#: What is taken from codes that are never negative to make them int8.
_SHIFT = 128


@dataclass(frozen=True)
class _Found:
    """A grid as the program has it; the ends of its codes are those that it can have."""

    where: str
    scale: Array
    zero_point: Array
    ends: tuple[int, int]
    is_exact: bool


class ActivationReader:
    """Compares what rounds activations with the manifest.

    Args:
        manifest: what the file says.
        file: what it holds.
        graphs: its parts for XNNPACK.
        numbers: returns scale and zero_point of a grid.

    Attributes:
        constants: keys of constants that are scales and zero_points of operators.
    """

    def __init__(
        self,
        manifest: Manifest,
        file: PteFile,
        graphs: Sequence[XnnGraph],
        numbers: Callable[[StoredGrid], tuple[Array, Array]],
    ) -> None:
        self.manifest, self.file, self.graphs, self.numbers = manifest, file, graphs, numbers
        self.constants: set[str] = set()
        self._calls = [call for call in file.calls if call.operator.startswith(_OPERATORS)]
        for call in self._calls:
            for argument in call.args[1:3] if _CHANNEL in call.operator else ():
                held = self._constant(argument)
                if held is not None:
                    self.constants.add(held.name)

    def faults(self) -> Iterator[str]:
        """Yield grids that the manifest does not know, and those that the program lacks."""
        missing = {grid.name for grid in self.manifest.quantizers}
        grids = [(grid, *self.numbers(grid)) for grid in self.manifest.quantizers]
        for found in (*self._of_xnnpack(), *self._of_operators()):
            owners = {grid.name for grid, *own in grids if _is_on(found, grid, *own)}
            missing -= owners
            if not owners:
                yield (
                    f"{found.where} has codes {found.ends[0]} to {found.ends[1]} at scale "
                    f"{found.scale.reshape(-1)[:3].tolist()}, which no quantizer of the manifest "
                    f"has: its width or grid is another"
                )
        for name in sorted(missing):
            yield f"the program does not round to the grid and width of {name!r}"
        yield from self._code_faults()

    def _of_xnnpack(self) -> Iterator[_Found]:
        """Yield the int8 tensors; what one part clamps, another that reads it need not."""
        known: dict[int, Clamp] = {}
        for call in self.file.calls:
            if call.operator in _QUANTIZE:
                found = self._grid_of(call)
                if found is not None:
                    known[call.args[-1]] = found.ends
            if call.delegate < 0:
                continue
            graph = self.graphs[call.delegate]
            given = {place: known[value] for place, value in enumerate(call.args) if value in known}
            reader = LevelReader(graph, self.file.named, given)
            for name, value in graph.values.items():
                if value.kind == QINT8:
                    scale, zero_point = np.array(value.scale), np.array(value.zero_point)
                    where = f"the tensor {name} of part {call.delegate} for XNNPACK"
                    yield _Found(where, scale, zero_point, reader.levels(name), is_exact=False)
            known.update(_given_away(graph, reader, call))

    # -- operators -------------------------------------------------------------------------------

    def _of_operators(self) -> Iterator[_Found]:
        for call in self._calls:
            found = self._grid_of(call)
            if found is not None:
                yield found

    def _grid_of(self, call: PteCall) -> _Found | None:
        by_channel = _CHANNEL in call.operator
        if call.operator not in _QUANTIZE | _DEQUANTIZE or len(call.args) < 6 + by_channel:
            return None
        given = [self._number(argument) for argument in call.args]
        ends = given[3 + by_channel : 5 + by_channel]
        numbers = [self._constant(a) for a in call.args[1:3]] if by_channel else []
        scale = array_of(numbers[0]) if by_channel and numbers[0] is not None else given[1]
        zero = array_of(numbers[1]) if by_channel and numbers[1] is not None else given[2]
        is_whole = all(isinstance(end, int) for end in ends)
        if scale is None or zero is None or not is_whole:
            return None
        low, high = (int(end) for end in ends if end is not None)
        return _Found(repr(call.operator), np.array(scale), np.array(zero), (low, high), True)

    def _number(self, index: int) -> float | None:
        held = self.file.values[index]
        return held if isinstance(held, int | float) else None

    def _constant(self, index: int) -> StoredTensor | None:
        held = self.file.values[index]
        if not isinstance(held, PteTensor) or held.dtype not in NUMPY_TYPES:
            return None
        return self.file.constants.get(held.constant)

    def _code_faults(self) -> Iterator[str]:
        """Yield operators that quantize in other ways, and what reads codes as they are."""
        codes = set()
        for call in self._calls:
            if self._grid_of(call) is None:
                yield f"the program calls {call.operator!r} as no exported file does"
            elif call.operator in _QUANTIZE:
                codes.add(call.args[-1])
        for call in self.file.calls:
            is_own = not call.operator or call.operator in _QUANTIZE | _DEQUANTIZE
            if not is_own and codes.intersection(call.args):
                yield f"{call.operator!r} reads codes as they are"


def _given_away(graph: XnnGraph, reader: LevelReader, call: PteCall) -> Iterator[tuple[int, Clamp]]:
    """Yield the ends of what a part returns, by value."""
    for node in graph.nodes:
        place, ends = graph.values[node.output].argument, reader.ends(node.output)
        if place is not None and ends is not None and place < len(call.args):
            yield call.args[place], ends


def _is_on(found: _Found, grid: StoredGrid, scale: Array, zero_point: Array) -> bool:
    """Tell whether what was found is a grid of the manifest, or a part of it."""
    if not scale.size or not np.array_equal(found.scale.reshape(-1), scale.reshape(-1)):
        return False
    shifts = {_SHIFT if grid.quant_min >= 0 else 0} | ({0} if found.is_exact else set())
    return any(_has_codes(found, grid, zero_point - shift, shift) for shift in shifts)


def _has_codes(found: _Found, grid: StoredGrid, zero_point: Array, shift: int) -> bool:
    if zero_point.size not in (1, found.zero_point.size):
        return False
    if not (found.zero_point.reshape(-1) == zero_point.reshape(-1)).all():
        return False
    low, high = (end + shift for end in found.ends)
    if found.is_exact:
        return (low, high) == (grid.quant_min, grid.quant_max)
    return grid.quant_min <= low and high <= grid.quant_max
