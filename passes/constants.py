"""The value of a node that depends on parameters alone."""

from typing import Any

import torch
from torch import Tensor, fx

from cgmq_fx.frozen import FrozenModule
from cgmq_fx.passes.deployed import is_write
from cgmq_fx.passes.values import find_attribute

# Not the device: a module may move after its graph was made.
_ASKED_ATTRIBUTES = frozenset({"dtype", "shape", "ndim"})
_ASKING_METHODS = frozenset({"size", "dim", "numel"})


def constant_value(gm: fx.GraphModule, node: fx.Node, written: frozenset[fx.Node]) -> Tensor | None:
    """Return what `node` computes on every call, or None where inputs, chance or state decide.

    The tensor of a `get_attr` node is the attribute itself.

    Args:
        gm: the graph module.
        node: one of its nodes.
        written: the nodes whose tensors change in place, `written_nodes` of the graph.
    """
    ancestors = _ancestors(node)
    if not all(_is_constant(gm, item) for item in ancestors):
        return None
    if not written.isdisjoint(ancestors):
        return None
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for item in ancestors:
            values[item] = _run(gm, item, values)
    value = values[node]
    return value if isinstance(value, Tensor) else None


def answer_questions(gm: fx.GraphModule, node: fx.Node) -> None:
    """Put answers in place of questions about the tensor at `node`, if nothing else reads it.

    A tensor that is only asked for its dtype or its shape, as by a guard, need not be stored.
    """
    questions = list(node.users)
    if not questions or not all(_is_question(question) for question in questions):
        return
    for question in questions:
        answer = _run(gm, question, {node: find_attribute(gm, str(node.target))})
        for reader in list(question.users):

            def replaced(item: fx.Node, question: fx.Node = question, answer: Any = answer) -> Any:
                return answer if item is question else item

            reader.args, reader.kwargs = fx.node.map_arg((reader.args, reader.kwargs), replaced)
        node.graph.erase_node(question)


def _is_question(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _ASKING_METHODS and len(node.all_input_nodes) == 1
    return node.target is getattr and node.args[1] in _ASKED_ATTRIBUTES


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """Return `node` and all that it depends on, inputs first."""
    found, open_nodes = {node}, [node]
    while open_nodes:
        for arg in open_nodes.pop().all_input_nodes:
            if arg not in found:
                found.add(arg)
                open_nodes.append(arg)
    return sorted(found)


def _is_constant(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), FrozenModule)
    if node.op in ("call_function", "call_method"):
        return not node.is_impure() and not is_write(node)
    return node.op == "get_attr"


def _run(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return find_attribute(gm, str(node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = node.target
    called = gm.get_submodule(target) if node.op == "call_module" else target
    return called(*args, **kwargs)
