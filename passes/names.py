"""What reports, budgets and selectors call the operations of a graph."""

from torch import fx

from cgmq_fx.passes.meta import MODULE_PATH, OP_INFO, VALUE, TensorInfo, Value


def operation_names(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """Return the unique name of every node that computes a tensor.

    That is the path of the layer whose product the node is, numbered when a layer runs more than
    once, and for other functions the name of the node. Where shapes are not known, every node that
    does not just rearrange is taken to compute a tensor.
    """
    names: dict[fx.Node, str] = {}
    used: set[str] = set()
    for node in gm.graph.nodes:
        if OP_INFO.get(node).op == "reshape" or not _may_be_tensor(node):
            continue
        base = _base_name(node)
        name, count = base, 1
        while name in used:
            count += 1
            name = f"{base}:{count}"
        used.add(name)
        names[node] = name
    return names


def first_tensor(value: Value) -> TensorInfo | None:
    """Return the first tensor in what a node produces, or None."""
    if isinstance(value, TensorInfo) or value is None:
        return value
    return next((found for item in value if (found := first_tensor(item)) is not None), None)


def _may_be_tensor(node: fx.Node) -> bool:
    return not VALUE.has(node) or first_tensor(VALUE.get(node)) is not None


def _base_name(node: fx.Node) -> str:
    path, info = MODULE_PATH.find(node), OP_INFO.get(node)
    if path is None and info.op == "attention" and node.op == "call_module":
        # Its quantizer stands in its place, named after it.
        return str(node.target).rpartition(".")[2].removesuffix(ATTENTION_SUFFIX)
    # The layer's path names best what is the layer's product.
    is_own = info.operands == "weight" or info.op == "attention"
    return node.name if path is None or (node.op == "call_function" and not is_own) else path


#: What follows the name of attention in the name of the quantizer between its two products.
ATTENTION_SUFFIX = "_weights"
