"""Takes away ReLUs in front of quantizers that clamp at 0 themselves."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import fx, nn

from cgmq_fx.frozen import FrozenAttention, FrozenQuantizer
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.deployed import is_write

_FUNCTIONS: tuple[Any, ...] = (F.relu, torch.relu)
_METHODS = ("relu", "relu_")


@final
@dataclass(frozen=True)
class DropRectifiers(GraphPass):
    """Take away a ReLU that only frozen quantizers read whose smallest value is 0.

    Compilers match a convolution and the quantize operator behind it, with one activation between
    them at most.

    Numerics: exact.
    """

    name: ClassVar[str] = "drop-rectifiers"

    def run(self, gm: fx.GraphModule) -> bool:
        """Take away what changes nothing; see `GraphPass.run`."""
        found = [node for node in gm.graph.nodes if _is_redundant(gm, node)]
        for node in found:
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)
        return bool(found)


def _is_redundant(gm: fx.GraphModule, node: fx.Node) -> bool:
    if not _is_rectifier(gm, node) or not node.users:
        return False
    if is_write(node) and len(node.all_input_nodes[0].users) > 1:
        return False
    return all(_clamps_at_zero(gm, user) for user in node.users)


def _is_rectifier(gm: fx.GraphModule, node: fx.Node) -> bool:
    if len(node.args) != 1 or not isinstance(node.args[0], fx.Node) or {*node.kwargs} - {"inplace"}:
        return False
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return type(module) is nn.ReLU and not (module._forward_hooks or module._forward_pre_hooks)
    if node.op == "call_method":
        return node.target in _METHODS
    return node.target in _FUNCTIONS


def _clamps_at_zero(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = gm.get_submodule(str(node.target))
    return (
        isinstance(module, FrozenQuantizer)
        and not isinstance(module, FrozenAttention)
        and not module.is_binary
        and bool((module.zero_point == module.quant_min).all())
    )
