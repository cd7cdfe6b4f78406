"""One graph for a model that branches on its training mode.

The model is traced twice, once for each branch. Where both traces compute the same, one node
serves; where they differ, both compute, and the output picks by the mode. Only differences that
neither draw random numbers nor change state are merged: computing the other branch must not be
observable.
"""

from collections.abc import Sequence
from typing import Any

from torch import fx

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.guards import select_mode


def merge_modes(
    evaluation: fx.Graph, training: fx.Graph, mode_target: str, places: Sequence[str]
) -> fx.Graph:
    """Return `training` extended by what only `evaluation` computes, with outputs picked by mode.

    Args:
        evaluation: the graph of the evaluation mode.
        training: the graph of the training mode; it is extended in place.
        mode_target: the module that returns the mode.
        places: where the model branches, for the error.

    Raises:
        UnsupportedModelError: the evaluation branch alone holds layers with state or randomness.
    """
    merged: dict[fx.Node, fx.Node] = {}
    known = {_key(node, {}): node for node in training.nodes}
    output = next(node for node in reversed(training.nodes) if node.op == "output")
    own_outputs = _output_value(training)
    for node in evaluation.nodes:
        if node.op == "output":
            break
        twin = known.get(_key(node, merged))
        if twin is None:
            _check_pure(node, places)
            with training.inserting_before(output):
                twin = training.node_copy(node, merged.__getitem__)
            known[_key(twin, {})] = twin
        merged[node] = twin
    other_outputs = fx.node.map_arg(_output_value(evaluation), merged.__getitem__)
    if repr(own_outputs) == repr(other_outputs):
        return training
    with training.inserting_before(output):
        mode = training.call_module(mode_target)
        picked = training.call_function(select_mode, (mode, own_outputs, other_outputs))
    output.args = (picked,)
    return training


def _output_value(graph: fx.Graph) -> Any:
    return next(node for node in reversed(graph.nodes) if node.op == "output").args[0]


def _key(node: fx.Node, merged: dict[fx.Node, fx.Node]) -> tuple[object, ...]:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: merged.get(arg, arg))
    occurrence = node.name if node.op == "placeholder" else ""
    return node.op, node.target, repr(args), repr(kwargs), occurrence


def _check_pure(node: fx.Node, places: Sequence[str]) -> None:
    if node.op == "call_module" or node.is_impure():
        raise UnsupportedModelError(
            f"the model computes '{node.format_node()}' only in evaluation mode (it branches on "
            f"self.training at {', '.join(dict.fromkeys(places))}), and that layer may hold state; "
            f"move the branch into a parameterless module, or prepare the model without it"
        )
