"""The quantizers of a program: what its graph and its tensors say, held against the manifest."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cgmq_fx.container import FileFault, StoredTensor
from cgmq_fx.errors import UsageError
from cgmq_fx.manifest import Manifest, StoredGrid, StoredWeight
from cgmq_fx.packed_file import CODES, packed_codes
from cgmq_fx.packing import MAX_WIDTH, MIN_WIDTH
from cgmq_fx.pools import NUMPY_TYPES, Array, array_of, fill_pools
from cgmq_fx.program_json import ProgramGraph, ProgramNode, quantizer_index
from cgmq_fx.stored_file import refuse

_OPERATORS = "torch.ops.quantized_decomposed."
_QUANTIZE = {f"{_OPERATORS}quantize_per_{kind}.default" for kind in ("tensor", "channel")}
_DEQUANTIZE = {f"{_OPERATORS}dequantize_per_{kind}.default" for kind in ("tensor", "channel")}
_CLAMPS = {"torch.ops.aten.clamp_min.default": "min", "torch.ops.aten.clamp_max.default": "max"}
# What both operators of a pair are given.
_GRID = ("scale", "zero_point", "scales", "zero_points", "axis", "quant_min", "quant_max", "dtype")
#: Types of codes: number in the graph, smallest and largest code; the narrowest first.
_CODE_TYPES = (
    ("U8", 1, 0, 255),
    ("I8", 2, -128, 127),
    ("I16", 3, -32768, 32767),
    ("I32", 4, -(1 << 31), (1 << 31) - 1),
)


def packed_tensors(
    manifest: Manifest, state: Mapping[str, StoredTensor], graph: ProgramGraph, fault: FileFault
) -> dict[str, StoredTensor]:
    """Return the tensors of a program as a packed file has them.

    Args:
        manifest: what the file says.
        state: the tensors of the program.
        graph: its graph.
        fault: makes the errors.

    Raises:
        FileFormatError: the graph quantizes otherwise than the manifest says.
    """
    reader = _Reader(manifest, state, graph)
    refuse(fault, reader.faults())
    return reader.tensors


@dataclass(frozen=True)
class _Numbers:
    """Scale and zero_point of a grid as they stand in the program."""

    scale: Array
    zero_point: Array


class _Reader:
    def __init__(
        self, manifest: Manifest, state: Mapping[str, StoredTensor], graph: ProgramGraph
    ) -> None:
        self.manifest, self.state, self.graph = manifest, state, graph
        self.tensors: dict[str, StoredTensor] = {}
        self._numbers: dict[str, _Numbers] = {}
        self._made_by = {node.name: node for node in graph.nodes}
        self._users: dict[str, list[tuple[ProgramNode, str]]] = {}
        for node in graph.nodes:
            for argument, tensor in node.tensors():
                self._users.setdefault(tensor, []).append((node, argument))
        self._inputs: dict[str, list[str]] = {}
        for name, held in graph.states.items():
            self._inputs.setdefault(held, []).append(name)

    def faults(self) -> Iterator[str]:
        """Yield what is wrong; where nothing is, `tensors` is complete."""
        steps = (self._operator_faults, self._quantizer_faults, self._weight_faults)
        for step in (*steps, self._pool_faults, self._state_faults):
            found = list(step())
            yield from found
            if found:
                return

    # -- the graph -------------------------------------------------------------------------------

    def _operator_faults(self) -> Iterator[str]:
        """Yield quantization operators that no quantizer or weight of the manifest accounts for."""
        codes = {
            name for weight in self.manifest.weights for name in self._names(weight.name + CODES)
        }
        for node in self.graph.nodes:
            if not node.target.startswith(_OPERATORS):
                continue
            if node.target in _QUANTIZE:
                index = quantizer_index(node.name)
                if index is None or index >= len(self.manifest.quantizers):
                    yield f"the graph quantizes {node.name!r}, which the manifest does not know"
            elif node.target in _DEQUANTIZE:
                source = node.tensor("input")
                maker = self._made_by.get(source or "")
                while maker is not None and maker.target in _CLAMPS:
                    maker = self._made_by.get(maker.tensor("self") or "")
                if source not in codes and (maker is None or maker.target not in _QUANTIZE):
                    yield f"{node.name!r} dequantizes {source!r}, which are no codes"
            else:
                yield f"the graph calls {node.target}, which no exported file does"

    def _names(self, state: str) -> Sequence[str]:
        return self._inputs.get(state, ())

    def _quantizer_faults(self) -> Iterator[str]:
        calls: dict[int, list[ProgramNode]] = {}
        for node in self.graph.nodes:
            index = quantizer_index(node.name)
            if node.target in _QUANTIZE and index is not None:
                calls.setdefault(index, []).append(node)
        for index, grid in enumerate(self.manifest.quantizers):
            if index not in calls:
                yield f"the graph does not call the quantizer {grid.name!r}"
            for node in calls.get(index, ()):
                yield from self._call_faults(grid, node)

    def _call_faults(self, grid: StoredGrid, node: ProgramNode) -> Iterator[str]:
        """Yield where one quantize operator and those behind it are not the grid."""
        yield from _ends_faults(grid, node)
        users = self._users.get(node.name, [])
        if not users:
            yield f"nothing reads the codes {node.name!r}"
        for user, argument in self._behind_clamps(grid, users):
            if user.target not in _DEQUANTIZE or argument != "input":
                yield f"{user.name!r} reads the codes {node.name!r} as they are"
            elif _grid_of(user) != _grid_of(node):
                yield f"{user.name!r} dequantizes {node.name!r} on another grid"
        found = self._numbers_of(grid, node)
        before = self._numbers.setdefault(grid.name, found)
        same = np.array_equal(before.scale, found.scale)
        if not same or not np.array_equal(before.zero_point, found.zero_point):
            yield f"the quantizer {grid.name!r} has several grids"

    def _behind_clamps(
        self, grid: StoredGrid, users: Sequence[tuple[ProgramNode, str]]
    ) -> Iterator[tuple[ProgramNode, str]]:
        """Yield who reads codes; one that clamps them to their grid changes none."""
        waiting = list(users)
        while waiting:
            user, argument = waiting.pop()
            end = _CLAMPS.get(user.target, "")
            own = {"min": grid.quant_min, "max": grid.quant_max}.get(end)
            if end and argument == "self" and user.value(end) == own:
                waiting.extend(self._users.get(user.name, ()))
            else:
                yield user, argument

    def _numbers_of(self, grid: StoredGrid, node: ProgramNode) -> _Numbers:
        if node.tensor("scales") is not None:
            return _Numbers(self._held(node, "scales"), self._held(node, "zero_points"))
        scale, zero_point = node.value("scale"), node.value("zero_point")
        is_number = isinstance(scale, int | float) and type(zero_point) is int
        if not is_number or not -(1 << 31) <= int(str(zero_point)) < 1 << 31:
            return _Numbers(np.array([]), np.array([]))
        return _Numbers(np.array(scale, np.float64), np.array(zero_point, np.int64))

    def _held(self, node: ProgramNode, argument: str) -> Array:
        """Return the tensor of the state that an argument is; empty where it is none."""
        name = self.graph.states.get(node.tensor(argument) or "")
        held = self.state.get(name or "")
        return np.array([]) if held is None or held.dtype not in NUMPY_TYPES else array_of(held)

    # -- weights ---------------------------------------------------------------------------------

    def _weight_faults(self) -> Iterator[str]:
        for weight in self.manifest.weights:
            held = self.state.get(weight.name + CODES)
            kind = _code_type(weight)
            if held is None or kind is None or held.dtype != kind[0] or held.shape != weight.shape:
                found = "no codes" if held is None else f"codes {held.dtype} {list(held.shape)}"
                yield (
                    f"{weight.name!r} of shape {list(weight.shape)} and {weight.bits} bits has "
                    f"{found} in the program"
                )
                continue
            if not MIN_WIDTH <= weight.bits <= MAX_WIDTH:
                yield f"{weight.name!r} has {weight.bits} bits"
                continue
            yield from self._reading_faults(weight)
            try:
                packed = packed_codes(weight, array_of(held))
            except UsageError as error:
                yield f"{weight.name!r}: {error}"
                continue
            name = weight.name + CODES
            self.tensors[name] = StoredTensor(name, "U8", packed.shape, packed)

    def _reading_faults(self, weight: StoredWeight) -> Iterator[str]:
        """Yield where the codes of a weight are read otherwise than on its grid."""
        users = [
            user for name in self._names(weight.name + CODES) for user in self._users.get(name, [])
        ]
        if not users:
            yield f"the graph does not read the weight {weight.name!r}"
        scale, zero_point = (
            self.state.get(f"{weight.name}.{part}") for part in ("scale", "zero_point")
        )
        known = set(NUMPY_TYPES)
        if scale is None or zero_point is None or {scale.dtype, zero_point.dtype} - known:
            yield f"{weight.name!r} has no scale or no zero_point in the program"
            return
        self._numbers[weight.name] = _Numbers(array_of(scale), array_of(zero_point))
        for node, argument in users:
            if node.target not in _DEQUANTIZE or argument != "input":
                yield f"{node.name!r} reads the codes of {weight.name!r} as they are"
                continue
            yield from _ends_faults(weight, node)
            if node.tensor("scales") is None:
                if (node.value("scale"), node.value("zero_point")) != (1.0, 0):
                    yield f"{node.name!r} reads {weight.name!r} on another grid"
                continue
            parts = [self.graph.states.get(node.tensor(p) or "") for p in ("scales", "zero_points")]
            axis, own = node.value("axis"), weight.channel_axis
            is_own = own is None or axis == own % max(1, len(weight.shape))
            if parts != [f"{weight.name}.scale", f"{weight.name}.zero_point"] or not is_own:
                yield f"{node.name!r} reads {weight.name!r} on another grid"

    # -- what the manifest names -----------------------------------------------------------------

    def _pool_faults(self) -> Iterator[str]:
        """Fill the pools of scales and zero_points from the numbers in the program."""
        held = ((grid, self._numbers[grid.name]) for grid in self.manifest.grids)
        found = ((grid, numbers.scale, numbers.zero_point) for grid, numbers in held)
        yield from fill_pools(found, self.tensors)

    def _state_faults(self) -> Iterator[str]:
        """Take the other tensors; those that are left must be other names of tensors taken."""
        manifest = self.manifest
        own = {
            f"{weight.name}.{part}"
            for weight in manifest.weights
            for part in ("codes", "scale", "zero_point")
        }
        own |= {f"{g.name}.{part}" for g in manifest.quantizers for part in ("scale", "zero_point")}
        for name in (*manifest.parameters, *manifest.buffers):
            if name in self.state:
                self.tensors[name] = self.state[name]
        places = {_place(self.state[n]) for n in (*self.tensors, *own) if n in self.state}
        for name in sorted(set(self.state) - set(self.tensors) - own):
            if _place(self.state[name]) not in places:
                yield f"the manifest does not know the tensor {name!r}"


def _place(tensor: StoredTensor) -> tuple[int, int]:
    """Return where the bytes of a tensor are, which tensors of several names share."""
    return tensor.data.__array_interface__["data"][0], tensor.data.size


def _code_type(grid: StoredGrid) -> tuple[str, int] | None:
    """Return name and number of the type that holds the codes of a grid."""
    for name, number, low, high in _CODE_TYPES:
        if low <= grid.quant_min and grid.quant_max <= high:
            return name, number
    return None


def _grid_of(node: ProgramNode) -> list[object]:
    return [node.tensor(name) or node.value(name) for name in _GRID]


def _ends_faults(grid: StoredGrid, node: ProgramNode) -> Iterator[str]:
    kind = _code_type(grid)
    wanted = (grid.quant_min, grid.quant_max, None if kind is None else kind[1])
    found = tuple(node.value(name) for name in ("quant_min", "quant_max", "dtype"))
    if found != wanted:
        yield (
            f"the manifest gives {grid.name!r} {grid.bits} bits, and {node.name!r} has the codes "
            f"{found[0]} to {found[1]} of the type {found[2]}, not {wanted[0]} to {wanted[1]} of "
            f"the type {wanted[2]}"
        )
