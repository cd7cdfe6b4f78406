"""The quantizers of an ONNX file: what its graph and its tensors say, held against the manifest."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from cgmq_fx.container import StoredTensor
from cgmq_fx.errors import UsageError
from cgmq_fx.manifest import Manifest, StoredGrid, StoredWeight
from cgmq_fx.onnx_reader import OnnxFile, OnnxNode, numbers_of
from cgmq_fx.packed_file import CODES, packed_codes
from cgmq_fx.packing import MAX_WIDTH, MIN_WIDTH
from cgmq_fx.pools import Array, fill_pools

SCALE, ZERO_POINT = ".scale", ".zero_point"


class GridReader(ABC):
    """Brings the tensors of an ONNX file into the form of a packed file.

    Args:
        manifest: what the file says.
        file: what it holds.

    Attributes:
        tensors: by name, all of the grids where `grid_faults` yields nothing, and all of the file
            where `state_faults` yields nothing either.
        carriers: by grid, the type of ONNX that carries its codes, where there is one.
    """

    def __init__(self, manifest: Manifest, file: OnnxFile) -> None:
        self.manifest, self.file = manifest, file
        self.tensors: dict[str, StoredTensor] = {}
        self.made_by = {name: node for node in file.nodes for name in node.outputs}
        self.readers: dict[str, list[OnnxNode]] = {}
        for node in file.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)
        self.carriers: dict[str, str] = {}
        self._own: set[str] = set()

    @property
    def others(self) -> list[str]:
        """Names of the tensors that belong to no grid."""
        return sorted(set(self.file.tensors) - self._own)

    def grid_faults(self) -> Iterator[str]:
        """Yield what is wrong with the grids; each step relies on those before it."""
        steps = (self._width_faults, self._node_faults, self._call_and_weight_faults)
        for step in (*steps, self._pool_faults):
            found = list(step())
            yield from found
            if found:
                return

    @abstractmethod
    def _node_faults(self) -> Iterator[str]:
        """Yield nodes that quantize what the manifest does not know, or that no export has."""

    @abstractmethod
    def _weight_faults(self, weight: StoredWeight) -> Iterator[str]:
        """Yield what is wrong with one weight; add its packed codes to `tensors`."""

    @abstractmethod
    def _call_faults(self, grid: StoredGrid, node: OnnxNode) -> Iterator[str]:
        """Yield what is wrong with one node that quantizes to a grid."""

    @abstractmethod
    def _quantizes(self, node: OnnxNode) -> bool:
        """Tell whether a node rounds to a grid, which is that of its second input."""

    # -- steps -----------------------------------------------------------------------------------

    def _width_faults(self) -> Iterator[str]:
        names = [grid.name for grid in self.manifest.grids]
        if len(set(names)) < len(names):
            yield "the manifest names a quantizer twice"
        for grid in self.manifest.grids:
            if not MIN_WIDTH <= grid.bits <= MAX_WIDTH:
                yield f"{grid.name!r} has {grid.bits} bits, not {MIN_WIDTH} to {MAX_WIDTH}"

    def _call_and_weight_faults(self) -> Iterator[str]:
        calls: dict[str, list[OnnxNode]] = {}
        for node in self.file.nodes:
            if self._quantizes(node):
                calls.setdefault(node.inputs[1].removesuffix(SCALE), []).append(node)
        for weight in self.manifest.weights:
            yield from self._weight_faults(weight)
        for grid in self.manifest.quantizers:
            if grid.name not in calls:
                yield f"the graph does not call the quantizer {grid.name!r}"
            for node in calls.get(grid.name, ()):
                yield from self._call_faults(grid, node)

    def _pool_faults(self) -> Iterator[str]:
        numbers = []
        for grid in self.manifest.grids:
            scale = self._array(grid.name + SCALE)
            zero_point = self._zero_point_of(grid)
            if scale is None or zero_point is None or not _is_positive(scale):
                yield f"{grid.name!r} has no scale, no zero_point, or a scale that is not positive"
            else:
                numbers.append((grid, scale, zero_point))
        yield from fill_pools(numbers, self.tensors)

    def _zero_point_of(self, grid: StoredGrid) -> Array | None:
        """Return the zero_point of a grid, 0 where the file has none; None where it is no array."""
        if grid.name + ZERO_POINT not in self.file.tensors:
            return np.zeros((), np.int8)
        return self._array(grid.name + ZERO_POINT)

    def state_faults(self) -> Iterator[str]:
        """Take the other tensors; yield those that the manifest does not know."""
        known = {*self.manifest.parameters, *self.manifest.buffers}
        for name in self.others:
            if name in known:
                self.tensors[name] = self.file.tensors[name]
            else:
                yield f"the manifest does not know the tensor {name!r}"

    # -- numbers ---------------------------------------------------------------------------------

    def _array(self, name: str) -> Array | None:
        """Return the numbers of a tensor of a grid; None where there are none."""
        held = self.file.tensors.get(name)
        self._own.add(name)
        return None if held is None else numbers_of(held)

    def _keep_codes(self, weight: StoredWeight, codes: Array) -> Iterator[str]:
        """Add the codes of a weight at their true width, as a packed file has them."""
        try:
            packed = packed_codes(weight, codes)
        except UsageError as error:
            yield f"{weight.name!r}: {error}"
            return
        name = weight.name + CODES
        self.tensors[name] = StoredTensor(name, "U8", packed.shape, packed)

    def _reading_faults(self, weight: StoredWeight, name: str, op_type: str) -> Iterator[str]:
        """Yield readers of the tensor of a weight that are not the one that makes its value."""
        for node in self.readers.get(name, ()):
            if node.op_type != op_type or node.inputs[0] != name:
                yield f"{node.name!r} reads the codes of {weight.name!r} as they are"
        if not self.readers.get(name):
            yield f"nothing reads the weight {weight.name!r}"


def _is_positive(scale: Array) -> bool:
    return scale.dtype.kind == "f" and bool(np.greater(scale, 0).all())


def levels_of(bits: int) -> int:
    """Return how many codes so many bits have."""
    return int(math.ldexp(1, bits))
