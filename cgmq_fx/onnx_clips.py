"""Takes away a Clip, as ReLU6 is one, in front of grids that end where it does.

ONNX Runtime multiplies integers in a convolution where a QuantizeLinear reads its result. Of what
may stand between, it takes away a Clip only where the grid ends within it to the last bit of a
float, which the end of a grid that was fitted to what the Clip lets through often misses.
"""

from collections.abc import Callable
from typing import Any

import torch

from cgmq_fx.frozen import FrozenModule, FrozenQuantizer
from cgmq_fx.onnx_graph import OnnxGraph

_CLIP = "Clip"


def drop_clips(graph: OnnxGraph, module_of: Callable[[Any], FrozenModule | None]) -> None:
    """Take away every Clip that changes no code of any quantizer that reads it.

    Rounding keeps the order, so that it is enough that the ends of the Clip have the codes at the
    ends of the grid. A Clip that anything else reads stays.

    Args:
        graph: with marks.
        module_of: returns what a node marks; None where it is no mark.
    """
    import onnx

    constants = {item.name: item for item in graph.graph.initializer}
    outputs = {item.name for item in graph.graph.output}

    def end(node: Any, place: int) -> float | None:
        """Return an end of a Clip; None where it has none, NaN where it is computed."""
        if len(node.input) <= place or not node.input[place]:
            return None
        held = constants.get(node.input[place])
        return float("nan") if held is None else float(onnx.numpy_helper.to_array(held))

    def keep(node: Any) -> list[Any]:
        if node.op_type != _CLIP or node.output[0] in outputs:
            return [node]
        modules = [module_of(reader) for reader in graph.readers.get(node.output[0], ())]
        low, high = end(node, 1), end(node, 2)
        if not modules or not all(_ends_within(module, low, high) for module in modules):
            return [node]
        graph.rename(node.output[0], node.input[0])
        return []

    graph.rewrite(keep)


def _ends_within(module: FrozenModule | None, low: float | None, high: float | None) -> bool:
    """Tell whether values at and beyond both ends have the smallest and the largest code."""
    if not isinstance(module, FrozenQuantizer) or module.is_binary or module.scale.numel() != 1:
        return False
    zero_point = int(module.zero_point)
    return all(
        end is None or float(module.steps(torch.tensor(end))) == code - zero_point
        for end, code in ((low, module.quant_min), (high, module.quant_max))
    )
