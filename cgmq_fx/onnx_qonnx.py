"""Puts Quant nodes of QONNX in the place of marks, of any bit-width."""

from typing import Any

import numpy as np

from cgmq_fx.frozen import FrozenModule, FrozenQuantizer, FrozenWeight
from cgmq_fx.onnx_grids import SCALE, ZERO_POINT, levels_of
from cgmq_fx.onnx_marks import MarkWriter
from cgmq_fx.qonnx_grids import BIT_WIDTH, DOMAIN, QUANT


class QonnxWriter(MarkWriter):
    """Replaces the marks of a model by Quant nodes; weights stay their real values."""

    domains = ((DOMAIN, 1),)

    def weight(self, output: str, name: str, module: FrozenWeight) -> list[Any]:
        """Return the node in front of a weight's real values."""
        self.graph.add_array(name, module().numpy())
        points = np.zeros((), np.float32)
        if module.zero_point is not None:
            points = module.zero_point.numpy().astype(np.float32)
        self.graph.add_array(name + SCALE, module.broadcast_scale().numpy())
        self.graph.add_array(name + ZERO_POINT, points)
        return [self._quant(name, name, output, module)]

    def activation(self, x: str, output: str, name: str, module: FrozenQuantizer) -> list[Any]:
        """Return the node that rounds."""
        shape = [] if module.channel_axis is None else [1] * self.graph.rank_of(x)
        if module.channel_axis is not None:
            shape[module.channel_axis] = -1
        scale = module.scale.reshape(shape)
        points = module.zero_point.expand(module.scale.shape).reshape(shape)
        self.graph.add_array(name + SCALE, scale.numpy())
        self.graph.add_array(name + ZERO_POINT, points.numpy().astype(np.float32))
        return [self._quant(x, name, output, module)]

    def _quant(self, x: str, name: str, output: str, module: FrozenModule) -> Any:
        bits = np.array(module.bit_width, np.float32)
        levels = module.quant_max - module.quant_min + 1
        inputs = [x, name + SCALE, name + ZERO_POINT, self.graph.add_array(name + BIT_WIDTH, bits)]
        attributes = {
            "signed": int(module.quant_min < 0),
            "narrow": int(levels < levels_of(module.bit_width)),
            "rounding_mode": "ROUND",
        }
        return self.graph.node(QUANT, inputs, output, attributes, DOMAIN)
