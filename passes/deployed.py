"""Which nodes of a graph an inference needs."""

import operator

from torch import fx

from cgmq_fx.passes.guards import select_mode

_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in (
        "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem",
    )
)  # fmt: skip


def deployed_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the nodes that the output depends on in evaluation mode.

    A branch that only training takes (an auxiliary classifier) is not among them: it is neither
    quantized nor priced, and lowering removes it. A node that changes a tensor in place is needed by
    every later reader of that tensor.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    needed: set[fx.Node] = set()
    open_nodes = [node for node in graph.nodes if _is_root(node)]
    while open_nodes:
        node = open_nodes.pop()
        if node in needed:
            continue
        needed.add(node)
        inputs = _nodes_in(node.args[2]) if node.target is select_mode else node.all_input_nodes
        for tensor in inputs:
            open_nodes.append(tensor)
            open_nodes.extend(m for m in mutators(tensor) if order[m] < order[node])
    return frozenset(needed)


def mutators(tensor: fx.Node) -> list[fx.Node]:
    """Return the nodes that change `tensor` in place."""
    return [user for user in tensor.users if _changes(user) is tensor]


def _is_root(node: fx.Node) -> bool:
    return node.op == "output" or node.is_impure() or (_changes(node) is not None and not node.users)


def _changes(node: fx.Node) -> fx.Node | None:
    """Return the tensor that `node` changes in place, or None."""
    tensor = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(tensor, fx.Node):
        return None
    if node.op == "call_method":
        name = str(node.target)
        changes = name.endswith("_") and not name.endswith("__")
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_place = node.target in _IN_PLACE_OPERATORS or name.endswith("_")
        changes = in_place or node.kwargs.get("inplace") is True
    elif node.op == "call_module":
        owner = node.graph.owning_module
        module_ = None if owner is None else owner.get_submodule(str(node.target))
        changes = getattr(module_, "inplace", False) is True
    else:
        changes = False
    return tensor if changes else None


def _nodes_in(value: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)  # type: ignore[arg-type]
    return found
