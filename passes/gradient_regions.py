"""Where in a graph gradients are switched."""

from torch import fx

from cgmq_fx.passes.guards import set_autocast, set_gradients


def gradient_regions(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Return for each node the switches of gradients or autocast that it stands under, by node.

    What is computed under ``torch.no_grad()`` has no gradient, also where it is read outside.
    """
    open_switches: list[fx.Node] = []
    regions = {}
    for node in graph.nodes:
        regions[node] = tuple(open_switches)
        if node.target not in (set_gradients, set_autocast):
            continue
        if open_switches and open_switches[-1] in node.all_input_nodes:
            open_switches.pop()
        else:
            open_switches.append(node)
    return regions
