"""Writes on every node which operation it is, and which operands of it can be quantized."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import fx

from cgmq_fx.cost.operation import AVERAGING_CLASSES, Operands
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.deployed import shared_writes
from cgmq_fx.passes.meta import IS_CONSTANT, KEPT_CLOSED, OP_INFO, MetaKey, OperandRef, OpInfo
from cgmq_fx.passes.op_classes import class_of_function, class_of_method, class_of_module
from cgmq_fx.passes.products import factors_of
from cgmq_fx.passes.random_data import is_user_function
from cgmq_fx.passes.recurrent import is_recurrent, recurrent_refs, why_closed
from cgmq_fx.quantizers import Quantizer

_WEIGHT_OPS = frozenset(
    {
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "linear",
    }
)
#: Operations without a product whose operand memory may hold as codes.
STORED_OPS = frozenset(
    {
        "cat", "max_pool", "avg_pool", "reduce", "interpolate", "softmax", "activation",
        "elementwise", "batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm",
    }
)  # fmt: skip
_ELEMENTWISE_PAIRS = frozenset({"add", "sub", "mul", "div"})


@final
@dataclass(frozen=True)
class AnnotateOperations(GraphPass):
    """Write `OP_INFO` and `IS_CONSTANT` on every node.

    A node is constant when it does not depend on the inputs of the model: a parameter, or something
    computed from parameters alone, such as a standardised weight.
    """

    name: ClassVar[str] = "annotate-operations"
    provides: ClassVar[frozenset[MetaKey[Any]]] = frozenset({OP_INFO, IS_CONSTANT})

    def run(self, gm: fx.GraphModule) -> bool:
        """Annotate `gm`; see `GraphPass.run`."""
        shared = shared_writes(gm.graph)
        for node in gm.graph.nodes:
            IS_CONSTANT.set(node, _is_constant(gm, node))
            info = _op_info(gm, node)
            if node in shared:  # writing to a quantized copy, it would not change the tensor
                reason = "it changes a tensor in place that is read again"
                info = replace(info, operands="none", refs=(), reason=reason)
            OP_INFO.set(node, info)
        return False


def _is_constant(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op in ("placeholder", "output") or not node.all_input_nodes:
        return False
    if node.op == "call_module" and not isinstance(gm.get_submodule(str(node.target)), Quantizer):
        return False
    return all(IS_CONSTANT.get(arg) for arg in node.all_input_nodes)


def operand_of(node: fx.Node, ref: OperandRef) -> Any:
    """Return what `node` is given for the operand `ref`, or None."""
    found: Any = node.args[ref.index] if ref.index < len(node.args) else None
    found = node.kwargs.get(ref.keyword, found)
    if ref.element is None:
        return found
    is_list = isinstance(found, list | tuple) and ref.element < len(found)
    return found[ref.element] if is_list else None


def _op_info(gm: fx.GraphModule, node: fx.Node) -> OpInfo:
    match node.op:
        case "call_function":
            assert callable(node.target)
            op = class_of_function(node.target)
            target = fx.node._get_qualified_name(node.target)
        case "call_method":
            op, target = class_of_method(str(node.target)), f"torch.Tensor.{node.target}"
        case "call_module":
            module = gm.get_submodule(str(node.target))
            kind = type(module)
            op, target = class_of_module(module), f"{kind.__module__}.{kind.__qualname__}"
        case _:
            op, target = "reshape", node.op
    operands, refs, reason = _operands(node, op)
    if op == "rnn":
        reason = why_closed(gm, node) or reason
    if op in AVERAGING_CLASSES and len(refs) == 1 and _is_rounded(gm, operand_of(node, refs[0])):
        operands = "activation"
    return OpInfo(op, target, operands, refs, reason)


def _is_rounded(gm: fx.GraphModule, tensor: Any) -> bool:
    """Tell whether a quantizer makes `tensor`."""
    return (
        isinstance(tensor, fx.Node)
        and tensor.op == "call_module"
        and isinstance(gm.get_submodule(str(tensor.target)), Quantizer)
    )


def _operands(node: fx.Node, op: str) -> tuple[Operands, tuple[OperandRef, ...], str]:
    if node.op == "call_module" and op != "attention":
        if KEPT_CLOSED.has(node):
            return "none", (), f"the layer '{node.target}' is kept closed by leaf_modules"
        return "none", _stored_refs(node, op), f"the layer '{node.target}' is not opened"
    if is_recurrent(node):
        return "weight", recurrent_refs(node), ""
    if op in _WEIGHT_OPS:
        return _refs(node, "weight", ((1, "weight"), (0, "input")))
    if op == "embedding":
        return _refs(node, "weight", ((1, "weight"),))
    if op == "attention":
        return _refs(node, "pair", ((0, "query"), (1, "key"), (2, "value")))
    if op == "matmul":
        if node.target is torch.einsum and len(node.args) != 3:
            return "none", (), "an einsum of other than two tensors"
        return _refs(node, "pair", factors_of(node.target))
    if op in _ELEMENTWISE_PAIRS:
        places = ((0, "input"), (1, "other"))
        operands, refs, reason = _refs(node, "pair", places)
        return operands, refs or _tensor_refs(node, places), reason
    reason = "no operand that a product reads"
    if op == "other" and is_user_function(node):
        name = fx.node._get_qualified_name(node.target)  # type: ignore[arg-type]
        reason = f"the function '{name}' is not opened; with example_inputs it may be"
    return "none", _stored_refs(node, op), reason


def _stored_refs(node: fx.Node, op: str) -> tuple[OperandRef, ...]:
    """Return the operands of an operation without a product that memory may hold as codes."""
    if op not in STORED_OPS or (op == "elementwise" and len(node.all_input_nodes) > 1):
        return ()
    if op != "cat":
        return _tensor_refs(node, ((0, "input"),))
    tensors = operand_of(node, OperandRef(0, "tensors", is_weight=False))
    return tuple(
        OperandRef(0, "tensors", IS_CONSTANT.get(item), element)
        for element, item in enumerate(tensors if isinstance(tensors, list | tuple) else ())
        if isinstance(item, fx.Node)
    )


def _tensor_refs(node: fx.Node, places: tuple[tuple[int, str], ...]) -> tuple[OperandRef, ...]:
    """Return those of the operands that the graph computes."""
    return tuple(
        OperandRef(index, keyword, IS_CONSTANT.get(value))
        for index, keyword in places
        for value in (operand_of(node, OperandRef(index, keyword, is_weight=False)),)
        if isinstance(value, fx.Node)
    )


def _refs(
    node: fx.Node, operands: Operands, places: tuple[tuple[int, str], ...]
) -> tuple[Operands, tuple[OperandRef, ...], str]:
    refs = []
    for index, keyword in places:
        value = operand_of(node, OperandRef(index, keyword, is_weight=False))
        if not isinstance(value, fx.Node):
            return "none", (), f"operand '{keyword}' is not a tensor of the graph"
        refs.append(OperandRef(index, keyword, IS_CONSTANT.get(value)))
    return operands, tuple(refs), ""
