"""Adds the bias of a linear layer after its product where the result stays float.

ONNX Runtime multiplies integers in a Gemm without a quantized result only where it has no float
bias; where the result is quantized, it brings the bias to the precision of the accumulator itself.
"""

from typing import Any

from cgmq_fx.onnx_graph import OnnxGraph

_BIAS = 2


def split_bias(graph: OnnxGraph) -> None:
    """Rewrite every Gemm of two dequantized tensors whose result is not quantized."""
    made_by = {name: node for node in graph.graph.node for name in node.output}

    def split(node: Any) -> list[Any]:
        makers = [made_by.get(name) for name in node.input[:_BIAS]]
        is_integer = all(item is not None and item.op_type == "DequantizeLinear" for item in makers)
        if node.op_type != "Gemm" or len(node.input) <= _BIAS or not is_integer:
            return [node]
        if graph.reaches(node.output[0], {"QuantizeLinear"}):
            return [node]
        output, product = node.output[0], f"{node.output[0]}.product"
        bias = node.input[_BIAS]
        del node.input[_BIAS:]
        node.output[0] = product
        return [node, graph.node("Add", [product, bias], output)]

    graph.rewrite(split)
