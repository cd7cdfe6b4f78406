"""Which nodes of a graph an inference needs."""

from torch import fx

from cgmq_fx.passes.guards import select_mode


def deployed_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the nodes that the output depends on in evaluation mode.

    A branch that only training takes (an auxiliary classifier) is not among them: it is neither
    quantized nor priced, and lowering removes it.
    """
    needed: set[fx.Node] = set()
    open_nodes = [node for node in graph.nodes if node.op == "output" or node.is_impure()]
    while open_nodes:
        node = open_nodes.pop()
        if node in needed:
            continue
        needed.add(node)
        if node.target is select_mode:
            open_nodes.extend(_nodes_in(node.args[2]))
        else:
            open_nodes.extend(node.all_input_nodes)
    return frozenset(needed)


def _nodes_in(value: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)  # type: ignore[arg-type]
    return found
