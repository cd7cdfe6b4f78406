"""Which nodes of a graph an inference needs."""

import inspect
import operator
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import fx
from torch._ops import OpOverload

from cgmq_fx.passes.guards import select_mode
from cgmq_fx.passes.op_classes import class_of_function, class_of_method, class_of_module

#: Operators that change their first operand.
IN_PLACE = frozenset(
    {
        operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
        operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.setitem,
    }
)  # fmt: skip
#: Classes whose results, unless they are made in place, share no memory with what they read.
ALLOCATING = frozenset(
    {
        "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        "linear", "bilinear", "matmul", "attention", "embedding", "add", "sub", "mul", "div", "cat",
        "max_pool", "avg_pool", "activation", "softmax", "batch_norm", "layer_norm", "group_norm",
        "rms_norm", "elementwise",
    }
)  # fmt: skip
_IN_PLACE_METHODS = frozenset(f"__{function.__name__}__" for function in IN_PLACE)
_QUESTION_METHODS = frozenset({"size", "dim", "numel", "shape"})


def deployed_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the nodes that an inference needs.

    These are what the output depends on in evaluation mode, what writes into a tensor among those,
    and guards that ask about nothing else. A branch that only training takes (an auxiliary
    classifier) is not among them: it is neither quantized nor priced, and lowering removes it.
    """
    needed: set[fx.Node] = set()
    _add(needed, (node for node in graph.nodes if node.op == "output"))
    waiting = {
        node: _storage(node) if is_write(node) else None
        for node in graph.nodes
        if node.op not in ("placeholder", "output") and (is_write(node) or node.is_impure())
    }
    found = True
    while found:
        found = False
        for node, storage in list(waiting.items()):
            if node in needed:
                del waiting[node]
            elif _can_answer(node, needed) if storage is None else _is_seen(storage, needed):
                del waiting[node]
                _add(needed, [node])
                found = True
    return frozenset(needed)


def written_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the nodes whose tensors may change after they were computed."""
    return frozenset(node for family in _older_names(graph).values() for node in family)


def shared_writes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the nodes that change a tensor in place which is read again under an older name."""
    return frozenset(
        write
        for write, family in _older_names(graph).items()
        if any(user > write for node in family for user in node.users)
    )


def _older_names(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return for each write the nodes before it that may share the memory it changes."""
    writes = [node for node in graph.nodes if is_write(node)]
    if not writes:
        return {}
    sources = {node: _memory_sources(node) for node in graph.nodes}
    shares = {node: set(found) for node, found in sources.items()}
    for node, found in sources.items():
        for source in found:
            shares[source].add(node)
    families = {node: _reachable(node.all_input_nodes[:1], shares.__getitem__) for node in writes}
    return {write: [n for n in family if n < write] for write, family in families.items()}


def is_write(node: fx.Node) -> bool:
    """Tell whether `node` changes its first operand in place."""
    match node.op:
        case "call_function" if isinstance(node.target, OpOverload):
            return node.target._schema.is_mutable
        case "call_function":
            return is_writing(node.op, node.target) or _is_asked_in_place(node)
        case "call_method":
            return is_writing(node.op, node.target)
        case "call_module":
            return bool(getattr(_module_of(node), "inplace", False))
        case _:
            return False


def is_allocated(node: fx.Node) -> bool:
    """Tell whether the tensor of `node` shares no memory with what it reads."""
    return not is_write(node) and _op_class(node) in ALLOCATING


def is_writing(kind: str, target: Any) -> bool:
    """Tell whether a call changes its first operand, whatever its other arguments are."""
    if kind == "call_method":
        return _ends_in_place(str(target)) or target in _IN_PLACE_METHODS
    named = kind == "call_function" and _ends_in_place(getattr(target, "__name__", ""))
    return named or target in IN_PLACE


def _add(needed: set[fx.Node], nodes: Iterable[fx.Node]) -> None:
    """Add `nodes` and all that they depend on in evaluation mode."""
    open_nodes = list(nodes)
    while open_nodes:
        node = open_nodes.pop()
        if node in needed:
            continue
        needed.add(node)
        if node.target is select_mode:
            open_nodes.extend(_nodes_in(node.args[2]))
        else:
            open_nodes.extend(node.all_input_nodes)


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found


def _is_seen(storage: Iterable[fx.Node], needed: set[fx.Node]) -> bool:
    """Tell whether a write to `storage` shows in what is needed, or outside of the graph."""
    return any(node in needed or node.op in ("placeholder", "get_attr") for node in storage)


def _can_answer(guard: fx.Node, needed: set[fx.Node]) -> bool:
    """Tell whether `guard` asks about nothing but inputs and tensors that are needed anyway."""
    open_nodes = list(guard.all_input_nodes)
    while open_nodes:
        node = open_nodes.pop()
        if node in needed or node.op in ("placeholder", "get_attr"):
            continue
        if not _is_question(node):
            return False
        open_nodes.extend(node.all_input_nodes)
    return True


def _is_question(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _QUESTION_METHODS
    module = getattr(node.target, "__module__", None)
    return node.op == "call_function" and module in ("builtins", "_operator", "math")


def _storage(write: fx.Node) -> frozenset[fx.Node]:
    """Return the nodes whose tensors may share memory with what `write` writes to."""
    return _reachable(write.all_input_nodes[:1], _memory_sources)


def _memory_sources(node: fx.Node) -> list[fx.Node]:
    """Return the operands whose memory the result of `node` may be."""
    if node.op == "output":
        return []  # else all outputs would share memory with one another
    if is_write(node):
        return node.all_input_nodes[:1]
    asks = node.target in (getattr, len) or node.target in _QUESTION_METHODS
    return [] if asks or _op_class(node) in ALLOCATING else node.all_input_nodes


def _reachable(
    start: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]
) -> frozenset[fx.Node]:
    found: set[fx.Node] = set()
    open_nodes = list(start)
    while open_nodes:
        node = open_nodes.pop()
        if node not in found:
            found.add(node)
            open_nodes.extend(neighbours(node))
    return frozenset(found)


def _op_class(node: fx.Node) -> str:
    match node.op:
        case "call_function":
            assert callable(node.target)
            return class_of_function(node.target)
        case "call_method":
            return class_of_method(str(node.target))
        case "call_module":
            return class_of_module(_module_of(node))
        case _:
            return "other"


def _module_of(node: fx.Node) -> Any:
    owner = node.graph.owning_module
    assert owner is not None
    return owner.get_submodule(str(node.target))


def _ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _is_asked_in_place(node: fx.Node) -> bool:
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    position = _inplace_position(node.target)
    return position is not None and position < len(node.args) and bool(node.args[position])


@cache
def _inplace_position(function: Any) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    return names.index("inplace") if "inplace" in names else None
