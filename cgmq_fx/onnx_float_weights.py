"""Keeps the float weights of products as they are where their other operand is quantized.

ONNX Runtime quantizes such weights itself, to 8 bits with one scale (its WeightBiasQuantization),
where the operand comes from a DequantizeLinear. A maximum of one tensor, which is that tensor,
stands between; no optimizer of the runtime removes it.
"""

from collections.abc import Collection
from typing import Any

from cgmq_fx.onnx_graph import OnnxGraph

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_OPERAND, _WEIGHT = 0, 1


def keep_float_weights(graph: OnnxGraph) -> None:
    """Rewrite every product of a float weight and an operand that comes from a grid."""
    import onnx

    constants = {item.name: item for item in graph.graph.initializer}

    def is_float(name: str) -> bool:
        found = constants.get(name)
        return found is not None and found.data_type == onnx.TensorProto.FLOAT

    def keep(node: Any) -> list[Any]:
        if node.op_type not in _PRODUCTS or not is_float(node.input[_WEIGHT]):
            return [node]
        if not _comes_from_a_grid(graph, node.input[_OPERAND], constants):
            return [node]
        same = f"{node.output[0]}.operand"
        made = graph.node("Max", [node.input[_OPERAND]], same)
        node.input[_OPERAND] = same
        return [made, node]

    graph.rewrite(keep)


def _comes_from_a_grid(graph: OnnxGraph, value: str, constants: Collection[str]) -> bool:
    """Tell whether a value is one of a DequantizeLinear, or one that it made alone."""
    while (maker := graph.makers.get(value)) is not None and maker.op_type not in _PRODUCTS:
        if maker.op_type == "DequantizeLinear":
            return True
        read = [name for name in maker.input if name not in constants]
        if len(read) != 1:
            return False
        (value,) = read
    return False
