"""QuantizeLinear and DequantizeLinear of an ONNX file, held against the manifest."""

from collections.abc import Iterator

import numpy as np

from cgmq_fx.manifest import StoredGrid, StoredWeight
from cgmq_fx.onnx_carriers import ACTIVATION_BITS, BY_NAME, RAISED
from cgmq_fx.onnx_grids import SCALE, ZERO_POINT, GridReader
from cgmq_fx.onnx_reader import OnnxNode, numbers_of
from cgmq_fx.packed_file import CODES
from cgmq_fx.pools import Array

QUANTIZE, DEQUANTIZE, CLIP = "QuantizeLinear", "DequantizeLinear", "Clip"
ONE, LOW, HIGH = ".one", ".low", ".high"
#: Nodes that would quantize in a way that nothing here checks.
_FOREIGN = ("QLinear", "ConvInteger", "MatMulInteger", "DynamicQuantize")
_CARRIERS = {f"{'I' if item.signed else 'U'}{item.bits}": item for item in BY_NAME.values()}
_DEFAULT_AXIS = 1


class QdqReader(GridReader):
    """Reads files whose grids are pairs of QuantizeLinear and DequantizeLinear."""

    def _node_faults(self) -> Iterator[str]:
        scales = {grid.name + SCALE for grid in self.manifest.quantizers}
        codes = {weight.name + CODES for weight in self.manifest.weights}
        for node in self.file.nodes:
            if node.domain not in ("", "ai.onnx") or node.op_type.startswith(_FOREIGN):
                yield f"the graph has a node {node.op_type!r} of {node.domain!r}, as no export has"
            elif node.op_type in (QUANTIZE, DEQUANTIZE) and not 2 <= len(node.inputs) <= 3:
                yield f"{node.name!r} has {len(node.inputs)} inputs"
            elif node.op_type == QUANTIZE and node.inputs[1] not in scales:
                yield f"the graph quantizes {node.name!r}, which the manifest does not know"
            elif node.op_type == DEQUANTIZE and not (
                node.inputs[0] in codes or self._source_of(node)
            ):
                yield f"{node.name!r} dequantizes {node.inputs[0]!r}, which are no codes"

    def _source_of(self, node: OnnxNode) -> OnnxNode | None:
        """Return the QuantizeLinear whose codes a node reads, clipped or not."""
        maker = self.made_by.get(node.inputs[0])
        if maker is not None and maker.op_type == CLIP and maker.inputs:
            maker = self.made_by.get(maker.inputs[0])
        return maker if maker is not None and maker.op_type == QUANTIZE else None

    def _quantizes(self, node: OnnxNode) -> bool:
        return node.op_type == QUANTIZE

    # -- weights ---------------------------------------------------------------------------------

    def _weight_faults(self, weight: StoredWeight) -> Iterator[str]:
        name = weight.name + CODES
        held = self.file.tensors.get(name)
        carrier = None if held is None else _CARRIERS.get(held.dtype)
        self._own.add(name)
        if held is None or carrier is None or held.shape != weight.shape:
            found = "no codes" if held is None else f"codes {held.dtype} {list(held.shape)}"
            yield f"{weight.name!r} of shape {list(weight.shape)} has {found} in the graph"
            return
        is_raised = weight.signed and carrier.name == "UINT8"
        if (carrier.signed != weight.signed and not is_raised) or carrier.bits < weight.bits:
            yield f"{weight.name!r} has {weight.bits} bits, and codes of the type {carrier.name}"
            return
        self.carriers[weight.name] = carrier.name
        codes = numbers_of(held)
        assert codes is not None
        yield from self._keep_codes(weight, lowered_by(RAISED, codes) if is_raised else codes)
        yield from self._reading_faults(weight, name, DEQUANTIZE)
        for node in self.readers.get(name, ()):
            yield from self._value_faults(weight, node)

    def _value_faults(self, weight: StoredWeight, node: OnnxNode) -> Iterator[str]:
        """Yield where the value of a weight is not made of its scale and its zero_point."""
        if node.op_type != DEQUANTIZE:
            return
        zero_point = weight.name + ZERO_POINT
        if node.inputs[1] == weight.name + ONE:
            one = self._array(weight.name + ONE)
            shift = [("Sub", zero_point)] if weight.zero_point is not None else []
            value = node.outputs[0]
            for op_type, operand in (*shift, ("Mul", weight.name + SCALE)):
                users = self.readers.get(value, [])
                if [(n.op_type, n.inputs) for n in users] != [(op_type, (value, operand))]:
                    yield f"{weight.name!r} is not multiplied by its scale"
                    return
                value = users[0].outputs[0]
            if one is None or one.size != 1 or one.item() != 1:
                yield f"{node.name!r} reads {weight.name!r} on another grid"
            return
        wanted = (weight.name + SCALE, zero_point)
        axis = weight.channel_axis
        rank = max(1, len(weight.shape))
        is_own = axis is None or node.integers.get("axis", _DEFAULT_AXIS) % rank == axis % rank
        if node.inputs[1:] != wanted or not is_own:
            yield f"{node.name!r} reads {weight.name!r} on another grid"

    def _zero_point_of(self, grid: StoredGrid) -> Array | None:
        """Return the zero_point of the codes as the manifest has them."""
        found = super()._zero_point_of(grid)
        is_raised = isinstance(grid, StoredWeight) and grid.signed
        if found is None or not is_raised or self.carriers.get(grid.name) != "UINT8":
            return found
        return lowered_by(RAISED, found)

    # -- activations -----------------------------------------------------------------------------

    def _call_faults(self, grid: StoredGrid, node: OnnxNode) -> Iterator[str]:
        held = self.file.tensors.get(grid.name + ZERO_POINT)
        carrier = None if held is None else _CARRIERS.get(held.dtype)
        if node.inputs[2:] != (grid.name + ZERO_POINT,) or carrier is None:
            yield f"{node.name!r} quantizes {grid.name!r} to a type that no export has"
            return
        if carrier.signed != (grid.quant_min < 0) or carrier.bits < grid.bits:
            yield f"{grid.name!r} has {grid.bits} bits, and codes of the type {carrier.name}"
            return
        self.carriers[grid.name] = carrier.name
        is_narrow = (grid.quant_min, grid.quant_max) != carrier.span
        if is_narrow and carrier.bits > ACTIVATION_BITS:
            yield from self._value_clip_faults(grid, node)
        clips_codes = is_narrow and carrier.bits <= ACTIVATION_BITS
        codes = node.outputs[0]
        if clips_codes:
            users = self.readers.get(codes, [])
            if [user.op_type for user in users] != [CLIP] or users[0].inputs[0] != codes:
                yield f"the codes {codes!r} of {grid.bits} bits are not clipped"
                return
            yield from self._ends_faults(grid, users[0], (grid.quant_min, grid.quant_max))
            codes = users[0].outputs[0]
        for user in self.readers.get(codes, ()):
            if user.op_type != DEQUANTIZE or user.inputs[0] != codes:
                yield f"{user.name!r} reads the codes {codes!r} as they are"
            elif (user.inputs[1:], user.integers) != (node.inputs[1:], node.integers):
                yield f"{user.name!r} dequantizes {codes!r} on another grid"

    def _value_clip_faults(self, grid: StoredGrid, node: OnnxNode) -> Iterator[str]:
        maker = self.made_by.get(node.inputs[0])
        scale, zero = self._array(grid.name + SCALE), self._array(grid.name + ZERO_POINT)
        if maker is None or maker.op_type != CLIP or scale is None or zero is None:
            yield f"the values of {grid.name!r}, of {grid.bits} bits, are not clipped"
            return
        if scale.size != 1 or zero.size != 1:
            yield f"{grid.name!r} is clipped and has several scales"
            return
        ends = (grid.quant_min, grid.quant_max)
        values = [np.float32((end - int(zero.item())) * float(scale.item())) for end in ends]
        yield from self._ends_faults(grid, maker, values)

    def _ends_faults(
        self, grid: StoredGrid, clip: OnnxNode, ends: "tuple[int, int] | list[np.float32]"
    ) -> Iterator[str]:
        found = [self._array(name) for name in clip.inputs[1:]]
        numbers = [None if item is None or item.size != 1 else item.item() for item in found]
        if numbers != [float(end) for end in ends]:
            yield (
                f"the manifest gives {grid.name!r} {grid.bits} bits, and {clip.name!r} clips to "
                f"{numbers}, not to {[float(end) for end in ends]}"
            )


def lowered_by(amount: int, numbers: Array) -> Array:
    """Return integers of up to 16 bits, as much smaller."""
    return numbers.astype(np.int32) - amount
