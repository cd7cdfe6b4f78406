"""Quant nodes of a QONNX file, held against the manifest."""

from collections.abc import Iterator

import numpy as np

from cgmq_fx.manifest import StoredGrid, StoredWeight
from cgmq_fx.onnx_grids import SCALE, ZERO_POINT, GridReader, levels_of
from cgmq_fx.onnx_reader import OnnxNode

QUANT, DOMAIN, BIT_WIDTH = "Quant", "qonnx.custom_op.general", ".bit_width"


class QonnxReader(GridReader):
    """Reads files whose grids are Quant nodes."""

    def _node_faults(self) -> Iterator[str]:
        scales = {grid.name + SCALE for grid in self.manifest.grids}
        for node in self.file.nodes:
            if node.domain in ("", "ai.onnx"):
                continue
            if (node.domain, node.op_type, len(node.inputs)) != (DOMAIN, QUANT, 4):
                yield f"the graph has a node {node.op_type!r} of {node.domain!r}, as no export has"
            elif node.inputs[1] not in scales:
                yield f"the graph quantizes {node.name!r}, which the manifest does not know"

    def _quantizes(self, node: OnnxNode) -> bool:
        return (node.domain, node.op_type) == (DOMAIN, QUANT)

    def _weight_faults(self, weight: StoredWeight) -> Iterator[str]:
        held, scale = self._array(weight.name), self._array(weight.name + SCALE)
        has_zero = weight.zero_point is not None
        zero = self._array(weight.name + ZERO_POINT) if has_zero else np.zeros((), np.float32)
        if held is None or scale is None or zero is None or held.shape != weight.shape:
            yield f"{weight.name!r} of shape {list(weight.shape)} has no such values in the graph"
            return
        if held.dtype != np.float32 or scale.dtype != np.float32:
            yield f"{weight.name!r} has values that are not in float32"
            return
        yield from self._reading_faults(weight, weight.name, QUANT)
        for node in self.readers.get(weight.name, ()):
            yield from self._call_faults(weight, node)
        try:
            with np.errstate(all="ignore"):
                steps = np.rint(np.divide(held, scale))
                is_exact = np.array_equal(steps * scale, held)
        except ValueError:
            is_exact = False
        if not is_exact:
            yield f"{weight.name!r} has values that are not on the grid of its scale"
            return
        yield from self._keep_codes(weight, (steps + zero).astype(np.int64))

    def _call_faults(self, grid: StoredGrid, node: OnnxNode) -> Iterator[str]:
        bits = self._array(grid.name + BIT_WIDTH)
        names = tuple(grid.name + part for part in (SCALE, ZERO_POINT, BIT_WIDTH))
        self._own.add(grid.name + ZERO_POINT)
        if node.inputs[1:] != names or bits is None or bits.size != 1:
            yield f"{node.name!r} quantizes {grid.name!r} on another grid"
            return
        levels = grid.quant_max - grid.quant_min + 1
        wanted = (grid.bits, int(grid.quant_min < 0), int(levels < levels_of(grid.bits)))
        found = (bits.item(), node.integers.get("signed"), node.integers.get("narrow"))
        if found != wanted:
            yield (
                f"the manifest gives {grid.name!r} {grid.bits} bits, and {node.name!r} has "
                f"bit_width, signed and narrow {found}, not {wanted}"
            )
