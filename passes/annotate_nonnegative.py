"""Writes on every node whether its tensor cannot be negative, so that its grid needs no sign."""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import fx, nn

from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.deployed import written_nodes
from cgmq_fx.passes.meta import IS_NONNEGATIVE, OP_INFO, MetaKey

_PRODUCES = frozenset(
    {
        F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.sigmoid, torch.sigmoid, F.hardsigmoid,
        F.softmax, torch.softmax, F.softplus, torch.exp, torch.abs, torch.square, torch.sqrt,
        "relu", "relu_", "sigmoid", "softmax", "exp", "abs", "square", "sqrt",
    }
)  # fmt: skip
_PRODUCING_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Softmax,
    nn.Softmax2d,
    nn.Softplus,
)

# Classes whose output is not negative when no tensor that they read is.
_KEEPING = frozenset({"reshape", "max_pool", "avg_pool", "dropout", "cat", "add", "mul", "div"})
_NOT_KEEPING = frozenset({F.pad, F.fold, "new_full", torch.full, getattr, "size", "dim"})


@final
@dataclass(frozen=True)
class AnnotateNonnegative(GraphPass):
    """Write `IS_NONNEGATIVE` on every node.

    True only where the operations guarantee it for every input; a parameter may have any sign.
    """

    name: ClassVar[str] = "annotate-nonnegative"
    requires: ClassVar[frozenset[MetaKey[Any]]] = frozenset({OP_INFO})
    provides: ClassVar[frozenset[MetaKey[Any]]] = frozenset({IS_NONNEGATIVE})

    def run(self, gm: fx.GraphModule) -> bool:
        """Annotate `gm`; see `GraphPass.run`."""
        written = written_nodes(gm.graph)
        for node in gm.graph.nodes:
            IS_NONNEGATIVE.set(node, node not in written and _is_nonnegative(gm, node))
        return False


def _is_nonnegative(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, _PRODUCING_MODULES):
            return True
        if isinstance(module, nn.Hardtanh):
            return bool(module.min_val >= 0)
    elif node.target in _PRODUCES:
        return True
    if OP_INFO.get(node).op not in _KEEPING or node.target in _NOT_KEEPING:
        return _zero_padding(node)
    if any(isinstance(arg, int | float) and arg < 0 for arg in _scalars(node)):
        return False
    inputs = node.all_input_nodes
    if node.target is operator.getitem:
        inputs = inputs[:1]
    return bool(inputs) and all(IS_NONNEGATIVE.get(arg) for arg in inputs)


def _scalars(node: fx.Node) -> list[Any]:
    return list(node.args) if OP_INFO.get(node).op in ("add", "mul", "div") else []


def _zero_padding(node: fx.Node) -> bool:
    if node.target is not F.pad:
        return False
    value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, fx.Node)
    return IS_NONNEGATIVE.get(source) and (
        value is None or (isinstance(value, int | float) and value >= 0)
    )
