"""Recording what a layer does into the graph that calls it."""

from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from cgmq_fx.passes.proxies import TracedValue


class Recorder(GraphAppendingTracer):
    """Records calls at the insertion point of a graph; in-place operations stay in place."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap `node` in a proxy that keeps in-place semantics."""
        return TracedValue(node, self)


def erase_between(before: fx.Node, after: fx.Node) -> None:
    """Erase the nodes that were recorded between two nodes of a graph, last first."""
    while after.prev is not before:
        after.graph.erase_node(after.prev)
