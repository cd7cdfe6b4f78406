"""Keeps products that no integer kernel computes as the file has them.

ONNX Runtime (its WeightBiasQuantization) quantizes a float weight itself, to 8 bits with one scale,
and a float bias to a step of the accumulator, wherever the other operand is that of a
DequantizeLinear: also where it then multiplies floats. A maximum of one tensor, which is that
tensor, stands between; no optimizer of the runtime removes it.
"""

from collections.abc import Collection, Mapping
from typing import Any

from cgmq_fx.onnx_graph import OnnxGraph

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_PRODUCTS = _CONVOLUTIONS | {"Gemm", "MatMul"}
_OPERAND, _WEIGHT, _BIAS = range(3)


def keep_float_products(graph: OnnxGraph) -> None:
    """Rewrite every product of a dequantized operand that no integer kernel computes."""
    constants = {item.name: item for item in graph.graph.initializer}

    def keep(node: Any) -> list[Any]:
        if node.op_type not in _PRODUCTS or not _is_rounded(graph, node, constants):
            return [node]
        if not _comes_from_a_grid(graph, node.input[_OPERAND], constants):
            return [node]
        same = f"{node.output[0]}.operand"
        made = graph.node("Max", [node.input[_OPERAND]], same)
        node.input[_OPERAND] = same
        return [made, node]

    graph.rewrite(keep)


def _is_rounded(graph: OnnxGraph, node: Any, constants: Mapping[str, Any]) -> bool:
    """Tell whether the runtime would quantize the weight or the bias, and then multiply floats."""
    import onnx

    weight = graph.source_of(node.input[_WEIGHT])
    if weight in constants:
        return True
    maker = graph.makers.get(weight)
    if maker is None or maker.op_type != "DequantizeLinear" or len(node.input) <= _BIAS:
        return False
    codes = constants.get(maker.input[0])
    if codes is None:  # two activations
        return False
    has_kernel = codes.data_type in {onnx.TensorProto.INT8, onnx.TensorProto.UINT8} and (
        node.op_type not in _CONVOLUTIONS or graph.reaches(node.output[0], {"QuantizeLinear"})
    )
    return not has_kernel


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
