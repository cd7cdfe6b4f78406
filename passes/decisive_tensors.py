"""Which quantized tensors every path from the inputs to an output passes.

Where such a tensor is 0, the output is a constant: no training can make anything of it.
"""

from collections.abc import Iterable

import networkx as nx
from torch import fx

from cgmq_fx.passes.annotate_operations import operand_of
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.passes.meta import OP_INFO
from cgmq_fx.passes.recurrent import is_recurrent

# Of these classes a result is 0 where one operand is.
_PRODUCTS = frozenset({"matmul", "mul"})
_INPUTS = "inputs"


def decisive_tensors(gm: fx.GraphModule) -> frozenset[str]:
    """Return the sites of the quantizers whose tensor, where it is 0, leaves an output constant.

    What stands inside a recurrent layer is none of them: the other operand of its sums remains.

    A tensor that is 0 silences its own node and the products that read it. Where one of these is on
    every path to an output (it dominates it), one look at the graph tells so for all tensors;
    several nodes that only together are on every path take a walk of their own.

    Args:
        gm: a prepared graph after `AnnotateOperations`.
    """
    quantizers: dict[str, set[fx.Node]] = {}
    for node in gm.graph.nodes:
        if is_quantizer(gm, node):
            quantizers.setdefault(str(node.target).rpartition(".")[2], set()).add(node)
    nodes = list(gm.graph.nodes)
    alive = _depending(nodes, frozenset())
    outputs = alive.intersection(nodes[-1].all_input_nodes)
    on_every_path = _dominators(nodes, alive, outputs)
    found = set()
    for site, zero in quantizers.items():
        silenced = _silenced(zero, alive)
        if not silenced.isdisjoint(on_every_path) or (
            len(silenced) > 1 and not outputs <= _depending(nodes, silenced)
        ):
            found.add(site)
    return frozenset(found)


def _silenced(zero: set[fx.Node], alive: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes that no longer depend on an input, but for those that follow from others."""
    readers = {user for node in zero for user in node.users}
    products = {node for node in readers & alive if _is_0(node, zero)}
    return (zero & alive) | {
        node for node in products if not alive.intersection(node.all_input_nodes) <= zero
    }


def _dominators(
    nodes: list[fx.Node], alive: set[fx.Node], outputs: Iterable[fx.Node]
) -> set[fx.Node]:
    """Return the nodes that every path from the inputs to some output passes."""
    graph = nx.DiGraph()
    graph.add_node(_INPUTS)
    for node in nodes:
        if node not in alive:
            continue
        sources = alive.intersection(node.all_input_nodes)
        graph.add_edges_from((source, node) for source in sources or (_INPUTS,))
    above = nx.immediate_dominators(graph, _INPUTS)
    found: set[fx.Node] = set()
    for output in outputs:
        node = output
        while isinstance(node, fx.Node) and node not in found:
            found.add(node)
            node = above[node]
    return found


def _depending(nodes: Iterable[fx.Node], without: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on an input by a path that is `without` these."""
    without, found = set(without), set[fx.Node]()
    for node in nodes:
        reads = any(arg in found for arg in node.all_input_nodes)
        if (node.op == "placeholder" or reads) and node not in without:
            found.add(node)
    return found


def _is_0(node: fx.Node, zero: set[fx.Node]) -> bool:
    """Tell whether an operation multiplies by a tensor of `zero`; a bias is a constant."""
    if is_recurrent(node):
        return False
    info = OP_INFO.get(node)
    if info.operands == "none" or (info.operands == "pair" and info.op not in _PRODUCTS):
        return False
    return any(operand_of(node, ref) in zero for ref in info.refs)
