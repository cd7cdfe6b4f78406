"""Runs a ReLU together with the quantizer that reads it."""

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import fx, nn

from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.deployed import is_allocated, is_write, written_nodes
from cgmq_fx.passes.gradient_regions import gradient_regions
from cgmq_fx.quantizers import Quantizer
from cgmq_fx.rectified import (
    NO_TOP,
    TOP_OF_RELU6,
    quantize_rectified,
    rectify_and_quantize,
)

_MODULES = {nn.ReLU: NO_TOP, nn.ReLU6: TOP_OF_RELU6}
_FUNCTIONS: dict[Callable[..., Any], float] = {
    F.relu: NO_TOP,
    torch.relu: NO_TOP,
    F.relu6: TOP_OF_RELU6,
}
_METHODS = ("relu", "relu_")


class _Pair(NamedTuple):
    """A ReLU that clamps to [0, top], and the call of the quantizer that reads it."""

    rectifier: fx.Node
    quantizer: fx.Node
    top: float


@final
@dataclass(frozen=True)
class FuseRectifiers(GraphPass):
    """Replace a ReLU and the quantizer that reads it by one call of `cgmq_fx.rectified`.

    A ReLU that others read too gives them its result from the same call. Left alone are quantizers
    of several tensors, and tensors that are written to afterwards.

    Numerics: exact.
    """

    name: ClassVar[str] = "fuse-rectifiers"

    def run(self, gm: fx.GraphModule) -> bool:
        """Fuse what can be; see `GraphPass.run`."""
        pairs = _pairs(gm, gm.graph)
        _fuse(gm.graph, pairs)
        return bool(pairs)

    def fused(self, gm: fx.GraphModule, graph: fx.Graph) -> fx.Graph:
        """Return `graph`, of `gm`, or a copy of it in which pairs are fused."""
        pairs = _pairs(gm, graph)
        if not pairs:
            return graph
        copied = copy.deepcopy(graph)
        nodes = dict(zip(graph.nodes, copied.nodes, strict=True))
        _fuse(copied, [_Pair(nodes[a], nodes[b], top) for a, b, top in pairs])
        return copied


def _pairs(gm: fx.GraphModule, graph: fx.Graph) -> list[_Pair]:
    found = [
        _Pair(node, quantizers[0], top)
        for node in graph.nodes
        if (top := _top(gm, node)) is not None
        and len(quantizers := [user for user in node.users if _quantizes(gm, user)]) == 1
    ]
    if not found:
        return []
    written, regions = written_nodes(graph), gradient_regions(graph)
    return [
        pair
        for pair in found
        if _is_unseen(pair, written) and regions[pair.rectifier] == regions[pair.quantizer]
    ]


def _top(gm: fx.GraphModule, node: fx.Node) -> float | None:
    """Return what `node` clamps to, or None where it is no ReLU of one tensor."""
    if len(node.args) != 1 or not isinstance(node.args[0], fx.Node) or {*node.kwargs} - {"inplace"}:
        return None
    if node.op == "call_module":
        return _MODULES.get(type(gm.get_submodule(str(node.target))))
    if node.op == "call_method":
        return NO_TOP if node.target in _METHODS else None
    return _FUNCTIONS.get(node.target) if callable(node.target) else None


def _quantizes(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    module = gm.get_submodule(str(node.target))
    return type(module) is Quantizer and module.spec.num_tensors == 1


def _is_unseen(pair: _Pair, written: frozenset[fx.Node]) -> bool:
    """Tell whether nobody sees that the ReLU writes to no other tensor, or runs later."""
    source = pair.rectifier.all_input_nodes[0]
    if pair.rectifier in written:
        return False
    if is_write(pair.rectifier):
        return len(source.users) == 1 and is_allocated(source)
    return source not in written


def _fuse(graph: fx.Graph, pairs: list[_Pair]) -> None:
    for pair in pairs:
        keeps = len(pair.rectifier.users) > 1
        with graph.inserting_before(pair.rectifier if keeps else pair.quantizer):
            _replace(graph, pair, keeps=keeps)
        graph.erase_node(pair.quantizer)
        graph.erase_node(pair.rectifier)


def _replace(graph: fx.Graph, pair: _Pair, *, keeps: bool) -> None:
    rectifier, quantizer, top = pair
    is_module = rectifier.op == "call_module"
    args = (
        graph.get_attr(str(quantizer.target)),
        graph.get_attr(str(rectifier.target)) if is_module else None,
        top,
        rectifier.args[0],
    )
    called = graph.call_function(rectify_and_quantize if keeps else quantize_rectified, args)
    called.meta = dict(quantizer.meta)
    if not keeps:
        quantizer.replace_all_uses_with(called)
        return
    rectified, quantized = (graph.call_function(operator.getitem, (called, i)) for i in (0, 1))
    rectified.meta, quantized.meta = dict(rectifier.meta), dict(quantizer.meta)
    quantizer.replace_all_uses_with(quantized)
    rectifier.replace_all_uses_with(rectified)
