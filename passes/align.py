"""Which nodes of two traces of one program are the same call."""

from typing import Any

from torch import fx

from cgmq_fx.passes.meta import MODULE_PATH

# Calls in a row that should agree before two traces count as together again.
_RUN = 3


def align(
    first: list[fx.Node], second: list[fx.Node]
) -> list[tuple[fx.Node | None, fx.Node | None]]:
    """Return the nodes of two traces side by side, in order; None where one trace has no match.

    Matching nodes call the same target, in the same module of the model, with arguments of the same
    structure; the arguments themselves may differ.
    """
    keys, others = [_key(node) for node in first], [_key(node) for node in second]
    aligned: list[tuple[fx.Node | None, fx.Node | None]] = []
    at, to = 0, 0
    while at < len(first) or to < len(second):
        skip, other_skip = _next_match(keys, others, at, to)
        aligned += [(node, None) for node in first[at : at + skip]]
        aligned += [(None, node) for node in second[to : to + other_skip]]
        at, to = at + skip, to + other_skip
        if at < len(first) and to < len(second):
            aligned.append((first[at], second[to]))
        at, to = at + 1, to + 1
    return aligned


def _next_match(keys: list[Any], others: list[Any], at: int, to: int) -> tuple[int, int]:
    """Return how many nodes of each trace to skip, together as few as possible."""
    left, right = len(keys) - at, len(others) - to
    if keys[at : at + 1] == others[to : to + 1]:
        return 0, 0
    for run in (_RUN, 1):
        for total in range(1, left + right):
            for skip in range(max(0, total - right + 1), min(total, left - 1) + 1):
                other = total - skip
                here, there = keys[at + skip :][:run], others[to + other :][:run]
                if here == there:
                    return skip, other
    return left, right


def _key(node: fx.Node) -> tuple[object, ...]:
    return node.op, node.target, MODULE_PATH.find(node), structure(node.args, node.kwargs)


def structure(*values: Any) -> Any:
    """Return what is left of arguments when nodes and constants are taken out."""
    return tuple(_shape_of(value) for value in values)


def _shape_of(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return len(value), *(_shape_of(item) for item in value)
    if isinstance(value, dict):
        return "dict", *((key, _shape_of(item)) for key, item in value.items())
    if isinstance(value, slice):
        return "slice", *(_shape_of(item) for item in (value.start, value.stop, value.step))
    return ()
