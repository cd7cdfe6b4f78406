"""Puts QuantizeLinear and DequantizeLinear in the place of marks, weights as integers."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.frozen import FrozenQuantizer, FrozenWeight
from cgmq_fx.onnx_carriers import ACTIVATION_BITS, BY_NAME, RAISED, Carrier, carrier_of
from cgmq_fx.onnx_clips import drop_clips
from cgmq_fx.onnx_float_products import keep_float_products
from cgmq_fx.onnx_grids import SCALE, ZERO_POINT
from cgmq_fx.onnx_marks import MarkWriter
from cgmq_fx.onnx_split_bias import split_bias
from cgmq_fx.packed_file import CODES
from cgmq_fx.qdq_grids import HIGH, LOW, ONE

#: What takes a DequantizeLinear of weights into itself. With a left operand in float ONNX Runtime
#: makes it a MatMulNBits, which by default rounds that operand to 8 bits of its own.
_PRODUCTS = frozenset({"MatMul"})


class QdqWriter(MarkWriter):
    """Replaces the marks of a model by QuantizeLinear and DequantizeLinear."""

    def run(self) -> None:
        """Replace all marks, and shape what ONNX Runtime fuses; see `MarkWriter.run`."""
        drop_clips(self.graph, self.marked_by)
        super().run()
        keep_float_products(self.graph)
        split_bias(self.graph)

    def weight(self, output: str, name: str, module: FrozenWeight) -> list[Any]:
        """Return the nodes that make the value of a weight of its codes."""
        products = (self.graph.reaches(value, _PRODUCTS) for value in self.outputs_of(name))
        least = 8 if any(products) else 4
        carrier = carrier_of(module.bit_width, signed=module.quant_min < 0, least=least)
        scale, zero_point = module.scale, module.zero_point
        axis = module.channel_axis
        if not self._multiplies_floats(name):
            if scale.numel() == 1 and (zero_point is None or zero_point.numel() == 1):
                return [self._dequantize(name, output, module, carrier, {})]
            if axis is not None and _runs_along(zero_point, module.shape, axis):
                return [self._dequantize(name, output, module, carrier, {"axis": axis})]
        self.graph.add_integers(name + CODES, module.codes.numpy(), carrier.name)
        return list(self._broadcast(name, output, module))

    def _multiplies_floats(self, name: str) -> bool:
        """Tell whether a product reads a weight whose other operand has no codes for its kernel."""
        return any(
            not self._has_whole_codes(other)
            for value in self.outputs_of(name)
            for other in self.graph.partners_of(value, _PRODUCTS)
        )

    def _has_whole_codes(self, value: str) -> bool:
        """Tell whether a value stands on a grid that fills a type with integer kernels."""
        module = self.module_of(self.graph.source_of(value))
        if not isinstance(module, FrozenQuantizer):
            return False
        signed = module.quant_min < 0
        carrier = carrier_of(module.bit_width, signed=signed, least=ACTIVATION_BITS)
        span = (module.quant_min, module.quant_max)
        return carrier.bits == ACTIVATION_BITS and span == carrier.span

    def _dequantize(
        self,
        name: str,
        output: str,
        module: FrozenWeight,
        carrier: Carrier,
        axis: Mapping[str, int],
    ) -> Any:
        codes, raised = module.codes.to(torch.int32), 0
        if carrier == BY_NAME["INT8"] and self._readers_of(name) > 1:
            carrier, raised = BY_NAME["UINT8"], RAISED
        scale = module.scale if axis else module.scale.reshape(())
        # ONNX Runtime has an integer Gemm for weights whose zero_point is written down, 0 or not.
        points = torch.zeros(()) if module.zero_point is None else module.zero_point
        points = points.reshape(-1).expand(scale.numel()).reshape(scale.shape)
        self.graph.add_integers(name + CODES, (codes + raised).numpy(), carrier.name)
        self.graph.add_integers(name + ZERO_POINT, (points + raised).numpy(), carrier.name)
        self.graph.add_array(name + SCALE, scale.numpy())
        names = [name + CODES, name + SCALE, name + ZERO_POINT]
        return self.graph.node("DequantizeLinear", names, output, axis)

    def _readers_of(self, name: str) -> int:
        """Return how many operations read a weight.

        ONNX Runtime gives each a DequantizeLinear of its own. Where it makes their codes UINT8, as
        `session.x64quantprecision` asks, it then fails to load the model: the second copy would
        have the name of the first. So codes that several read are written as UINT8.
        """
        return sum(self.graph.num_readers(value) for value in self.outputs_of(name))

    def _broadcast(self, name: str, output: str, module: FrozenWeight) -> Iterator[Any]:
        """Yield nodes that multiply with the scale apart from DequantizeLinear.

        For a scale that runs along several axes, which that has not, and where it must stay apart.
        """
        one = self.graph.add_array(name + ONE, np.ones((), np.float32))
        steps = name + ".steps"
        yield self.graph.node("DequantizeLinear", [name + CODES, one], steps)
        if module.zero_point is not None:
            points = module.zero_point.numpy().astype(np.float32)
            self.graph.add_array(name + ZERO_POINT, points)
            yield self.graph.node("Sub", [steps, name + ZERO_POINT], name + ".shifted")
            steps = name + ".shifted"
        self.graph.add_array(name + SCALE, module.broadcast_scale().numpy())
        yield self.graph.node("Mul", [steps, name + SCALE], output)

    # -- activations -----------------------------------------------------------------------------

    def activation(self, x: str, output: str, name: str, module: FrozenQuantizer) -> list[Any]:
        """Return the nodes that round: codes of fewer bits than their type has are clipped."""
        if module.is_binary:
            raise UnsupportedModelError(
                f"{name!r} has 1 bit, -1 or 1, of a tensor that is computed from the inputs, which "
                f"QuantizeLinear has no form for; export to .qonnx.onnx or .safetensors, or give "
                f"it 2 bits"
            )
        signed = module.quant_min < 0
        carrier = carrier_of(module.bit_width, signed=signed, least=ACTIVATION_BITS)
        axis = {} if module.channel_axis is None else {"axis": module.channel_axis}
        qparams = self._qparams(name, module, carrier)
        is_narrow = (module.quant_min, module.quant_max) != carrier.span
        codes, clipped, made = f"{output}.codes", f"{output}.clipped", []
        if is_narrow and carrier.bits > ACTIVATION_BITS:
            made.append(self._clip_values(x, clipped, name, module))
            x = clipped
        made.append(self.graph.node("QuantizeLinear", [x, *qparams], codes, axis))
        if is_narrow and carrier.bits <= ACTIVATION_BITS:
            made.append(self._clip_codes(codes, clipped, module, carrier))
            codes = clipped
        made.append(self.graph.node("DequantizeLinear", [codes, *qparams], output, axis))
        return made

    def _clip_codes(self, x: str, output: str, module: FrozenQuantizer, carrier: Carrier) -> Any:
        dtype = np.int8 if carrier.signed else np.uint8
        ends = [
            self.graph.add_array(f"{end}_{carrier.name}", np.array(end, dtype))
            for end in (module.quant_min, module.quant_max)
        ]
        return self.graph.node("Clip", [x, *ends], output)

    def _clip_values(self, x: str, output: str, name: str, module: FrozenQuantizer) -> Any:
        """Return the clip of values, for runtimes that cannot clip integers of 16 bits."""
        if module.channel_axis is not None:
            raise UnsupportedModelError(
                f"{name!r} has {module.bit_width} bits and a range for each channel, which ONNX "
                f"has no clip for; prepare it with one range, or at 8 or 16 bits"
            )
        ends = []
        for label, code in ((LOW, module.quant_min), (HIGH, module.quant_max)):
            value = np.float32((code - int(module.zero_point)) * float(module.scale))
            ends.append(self.graph.add_array(name + label, np.array(value)))
        return self.graph.node("Clip", [x, *ends], output)

    # -- numbers ---------------------------------------------------------------------------------

    def _qparams(self, name: str, module: FrozenQuantizer, carrier: Carrier) -> list[str]:
        """Return the names of scale and zero_point; the type of the latter is that of codes."""
        along = module.channel_axis is not None
        scale = module.scale if along else module.scale.reshape(())
        zero_point = module.zero_point if along else module.zero_point.reshape(())
        self.graph.add_array(name + SCALE, scale.numpy())
        points = zero_point.expand(scale.shape).numpy()
        self.graph.add_integers(name + ZERO_POINT, points, carrier.name)
        return [name + SCALE, name + ZERO_POINT]


def _runs_along(zero_point: Tensor | None, shape: tuple[int, ...], axis: int) -> bool:
    """Tell whether zero_points have one number for each index of the axis."""
    if zero_point is None:
        return True
    return zero_point.numel() == shape[axis] == zero_point.shape[axis - len(shape)]
