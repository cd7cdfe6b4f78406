"""Turns the stand-ins of closed layers into calls of the layers."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import fx

from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.closed_layers import CLOSED_LAYER, ClosedCall
from cgmq_fx.passes.meta import EXPORTED, MODULE_PATH


@final
@dataclass(frozen=True)
class RestoreModules(GraphPass):
    """Replace each stand-in that export recorded by a call of its layer, under the layer's path.

    A layer's train/eval mode decides again what it does, and its state is its own.

    Numerics: exact.

    Args:
        calls: the closed calls of the export, by number.
    """

    name: ClassVar[str] = "restore-modules"

    calls: tuple[ClosedCall, ...] = field(default=(), repr=False)

    def run(self, gm: fx.GraphModule) -> bool:
        """Restore the layers of `gm`; see `GraphPass.run`."""
        standing = [node for node in gm.graph.nodes if node.target is CLOSED_LAYER]
        for node in standing:
            _restore(gm.graph, node, self.calls[_item_number(node, 0)])
        return bool(standing)


def _restore(graph: fx.Graph, node: fx.Node, call: ClosedCall) -> None:
    tensors = node.args[1]
    assert isinstance(tensors, Sequence)
    args, kwargs = call.arguments(tensors)
    with graph.inserting_before(node):
        layer = graph.call_module(call.path, args, kwargs)
        MODULE_PATH.set(layer, call.path)
        for user in list(node.users):  # each takes one tensor out of the stand-in's list
            part = layer
            for index in call.places[_item_number(user, 1)]:
                part = graph.call_function(operator.getitem, (part, index))
                MODULE_PATH.set(part, call.path)
            if EXPORTED.has(user):
                EXPORTED.set(part, EXPORTED.get(user))
            user.replace_all_uses_with(part)
            graph.erase_node(user)
    graph.erase_node(node)


def _item_number(node: fx.Node, place: int) -> int:
    number = node.args[place]
    assert isinstance(number, int)
    return number
