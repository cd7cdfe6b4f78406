"""Removing from a graph module what its graph reads no more."""

from collections.abc import Iterable

from torch import fx, nn

from cgmq_fx.passes.deployed import is_write
from cgmq_fx.passes.values import find_attribute


def erase_unused(node: fx.Node) -> list[str]:
    """Erase `node` and what it depends on, as far as nothing else reads it.

    Returns:
        Targets of the erased nodes that read a submodule, a parameter or a buffer.
    """
    targets: list[str] = []
    open_nodes = [node]
    while open_nodes:
        last = open_nodes.pop()
        kept = last.users or last.op == "placeholder" or last._erased
        if kept or is_write(last) or last.is_impure():
            continue
        open_nodes.extend(last.all_input_nodes)
        if last.op in ("get_attr", "call_module"):
            targets.append(str(last.target))
        last.graph.erase_node(last)
    return targets


def delete_unread(gm: fx.GraphModule, targets: Iterable[str]) -> None:
    """Delete the submodules, parameters and buffers at `targets` that no node reads any more.

    A tensor or module that is registered under several names goes under all of them.
    """
    read = _read_objects(gm)
    spent = {id(found): found for target in set(targets) for found in _find(gm, target)}
    spent = {key: value for key, value in spent.items() if key not in read}
    for module in list(gm.modules()):
        for registered in (module._parameters, module._buffers):
            for name, tensor in registered.items():
                if id(tensor) in spent:
                    registered[name] = None
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in spent and not _holds(child, read):
                del module._modules[name]


def _find(gm: fx.GraphModule, target: str) -> list[object]:
    try:
        return [find_attribute(gm, target)]
    except AttributeError:  # deleted with a shared one
        return []


def _read_objects(gm: fx.GraphModule) -> set[int]:
    """Return the identities of all tensors and modules that nodes of the graph read."""
    read: set[int] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            read.add(id(find_attribute(gm, str(node.target))))
        elif node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            read.update(id(part) for part in module.modules())
            read.update(id(tensor) for tensor in (*module.parameters(), *module.buffers()))
    return read


def _holds(module: nn.Module, read: set[int]) -> bool:
    parts = (*module.modules(), *module.parameters(), *module.buffers())
    return any(id(part) in read for part in parts)
