"""What the operands of a call are called."""

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import fx
from torch.fx.operator_schemas import get_signature_for_torch_op


def named_operands(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """Yield every node that `node` reads, by the name of the parameter that receives it.

    A node inside a list or a dict has its place added, as in ``tensors[1]``.
    """
    for index, value in enumerate(node.args):
        yield from _nodes_in(_parameter(node, index), value)
    for name, value in node.kwargs.items():
        yield from _nodes_in(name, value)


def _nodes_in(name: str, value: Any) -> Iterator[tuple[str, fx.Node]]:
    if isinstance(value, fx.Node):
        yield name, value
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _nodes_in(f"{name}[{place}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _nodes_in(f"{name}[{key!r}]", item)
    elif isinstance(value, slice):
        yield from _nodes_in(name, (value.start, value.stop, value.step))


def _parameter(node: fx.Node, index: int) -> str:
    names: tuple[str, ...] = ()
    if node.op == "call_function":
        assert callable(node.target)
        names = _function_parameters(node.target)
    elif node.op == "call_module":
        owner = node.graph.owning_module
        assert owner is not None
        names = _signature_names(owner.get_submodule(str(node.target)).forward)
    elif node.op == "call_method":
        names = ("input", "other")
    elif node.op == "output":
        names = ("result",)
    return names[index] if index < len(names) else f"args[{index}]"


@cache
def _function_parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    if getattr(function, "__module__", "") == "_operator":
        return ("input", "other")
    names = _signature_names(function)
    if names:
        return names
    # A builtin of torch has one signature for each overload; the longest names most operands.
    signatures = get_signature_for_torch_op(function) or ()
    found = max((tuple(item.parameters) for item in signatures), key=len, default=names)
    return tuple("input" if name == "self" else name for name in found)


def _signature_names(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(item.name for item in parameters if item.kind in kinds)
