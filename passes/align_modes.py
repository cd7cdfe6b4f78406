"""One graph from two exports of a model, one in each mode.

The calls of both exports are matched in order. A matched call becomes one node; an argument that
differs between the modes is picked by the mode where it is read. A call of one mode alone stays
where it stood: what it computes in the other mode, nothing reads; what it changes, it changes in
its own mode alone.
"""

from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.aten_calls import arguments_of
from cgmq_fx.passes.guards import change_in_mode_, select_mode
from cgmq_fx.passes.meta import EXPORTED, MODULE_PATH

_CALLS = ("call_function", "call_method", "call_module")


def align_modes(
    training: fx.Graph, evaluation: fx.Graph, mode_target: str, *, same_output: bool = True
) -> None:
    """Extend `training` so that it computes what `evaluation` does in evaluation mode.

    The argument of each output node is the list of the tensors of its mode. They become one list
    of tensors picked by the mode, or a pair of lists where the outputs are not alike.

    Args:
        training: the graph of the training mode; it is extended in place.
        evaluation: the graph of the evaluation mode, with the same placeholders.
        mode_target: the module that returns the mode.
        same_output: tensors at one place of both lists are one output of the model.

    Raises:
        UnsupportedModelError: evaluation alone draws random numbers or calls a layer with state.
    """
    _Alignment(training, evaluation, mode_target).run(same_output=same_output)


def mode_node(graph: fx.Graph, mode_target: str) -> fx.Node:
    """Return the node that reads the mode, added in front of all calls where there is none."""
    for node in graph.nodes:
        if node.op == "call_module" and node.target == mode_target:
            found: fx.Node = node
            return found
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        return graph.call_module(mode_target)


class _Alignment:
    def __init__(self, training: fx.Graph, evaluation: fx.Graph, mode_target: str) -> None:
        self.graph, self.evaluation = training, evaluation
        self.mode_target = mode_target
        self.twins: dict[fx.Node, Any] = {}
        self._picked: dict[tuple[str, str], Any] = {}
        self._in_training: set[fx.Node] = set()
        self._in_evaluation: set[fx.Node] = set()
        #: What the next node of evaluation alone is put in front of.
        self._next = next(iter([*_calls(training), training.output_node()]))

    def run(self, *, same_output: bool) -> None:
        self._pair_sources()
        for ours, theirs in _matched(_calls(self.graph), _calls(self.evaluation)):
            if theirs is None:
                assert ours is not None
                self._next = ours.next
                self._keep_to_training(ours)
            elif ours is None:
                self._copy(theirs)
            else:
                self._next = ours
                self._merge(ours, theirs)
                self._next = ours.next
        ours, theirs = self.graph.output_node(), self.evaluation.output_node()
        self._next = ours
        if same_output:
            ours.args = (self._merged(ours.args[0], theirs.args[0]),)
        else:
            ours.args = ((ours.args[0], self._translated(theirs.args[0])),)

    def _pair_sources(self) -> None:
        """Pair placeholders and parameters by name; the training graph gets those it lacks."""
        ours = {
            (n.op, n.target): n for n in self.graph.nodes if n.op in ("placeholder", "get_attr")
        }
        last = next(n for n in self.graph.nodes if n.op != "placeholder").prev
        for node in self.evaluation.nodes:
            if node.op not in ("placeholder", "get_attr"):
                continue
            twin = ours.get((node.op, node.target))
            if twin is None:
                with self.graph.inserting_after(last):
                    twin = self.graph.node_copy(node)
            self.twins[node] = twin

    def _merge(self, ours: fx.Node, theirs: fx.Node) -> None:
        self.twins[theirs] = ours
        if isinstance(ours.target, OpOverload):
            given = (arguments_of(ours, ours.target), arguments_of(theirs, ours.target))
            merged = self._merged(*given)
            if repr(merged) != repr(given[0]):
                by_place = [a.name for a in ours.target._schema.arguments if not a.kwarg_only]
                ours.args = tuple(merged.pop(name) for name in by_place)
                ours.kwargs = {key: value for key, value in merged.items() if value is not None}
            return
        args = self._merged(ours.args, theirs.args)
        kwargs = self._merged(ours.kwargs, theirs.kwargs)
        if repr((args, kwargs)) != repr((ours.args, ours.kwargs)):
            ours.args, ours.kwargs = args, kwargs

    def _merged(self, ours: Any, theirs: Any) -> Any:
        """Return what both modes read: the same value, or one picked by the mode."""
        if isinstance(ours, tuple | list) and isinstance(theirs, tuple | list):
            if len(ours) == len(theirs):
                pairs = zip(ours, theirs, strict=True)
                return type(ours)(self._merged(a, b) for a, b in pairs)
        elif isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
            return {key: self._merged(ours[key], theirs[key]) for key in ours}
        other = self._translated(theirs)
        if ours is other or (type(ours) is type(other) and repr(ours) == repr(other)):
            return ours
        key = (repr(ours), repr(other))
        if key not in self._picked:
            mode = self.mode
            if ours is True and other is False:
                return mode
            with self.graph.inserting_before(self._next):
                picked = self.graph.call_function(select_mode, (mode, ours, other))
            for source in (other, ours):
                if isinstance(source, fx.Node) and EXPORTED.has(source):
                    EXPORTED.set(picked, EXPORTED.get(source))
            self._picked[key] = picked
        return self._picked[key]

    def _translated(self, value: Any) -> Any:
        return fx.node.map_arg(value, self.twins.__getitem__)

    @property
    def mode(self) -> fx.Node:
        return mode_node(self.graph, self.mode_target)

    # -- calls of one mode -----------------------------------------------------------------------

    def _keep_to_training(self, node: fx.Node) -> None:
        self._in_training.add(node)
        if _changes_others(node, self._in_training):
            self._guard(node, wanted=True)

    def _copy(self, node: fx.Node) -> None:
        if node.op == "call_module" or _draws(node):
            raise UnsupportedModelError(
                f"the model computes '{node.format_node()}' only in evaluation mode, and that call "
                f"holds state or draws random numbers; move the branch into a module without "
                f"parameters, or prepare the model without it"
            )
        with self.graph.inserting_before(self._next):
            twin = self.graph.node_copy(node, self.twins.__getitem__)
        self.twins[node] = twin
        self._in_evaluation.add(twin)
        if _changes_others(twin, self._in_evaluation):
            self._guard(twin, wanted=False)

    def _guard(self, node: fx.Node, *, wanted: bool) -> None:
        assert isinstance(node.target, OpOverload)
        node.args = (node.args[0], self.mode, wanted, node.target, *node.args[1:])
        node.target = change_in_mode_


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op in _CALLS]


def _matched(
    training: list[fx.Node], evaluation: list[fx.Node]
) -> Iterator[tuple[fx.Node | None, fx.Node | None]]:
    """Yield pairs in an order that both sides keep; None stands for what one side lacks."""
    ours_keys, theirs_keys = ([_key(node) for node in side] for side in (training, evaluation))
    matcher = SequenceMatcher(None, ours_keys, theirs_keys, autojunk=False)
    for _, i, to_i, j, to_j in matcher.get_opcodes():
        if ours_keys[i:to_i] == theirs_keys[j:to_j]:
            yield from zip(training[i:to_i], evaluation[j:to_j], strict=True)
            continue
        for ours in training[i:to_i]:
            yield ours, None
        for theirs in evaluation[j:to_j]:
            yield None, theirs


def _key(node: fx.Node) -> tuple[object, ...]:
    where = node.op, str(node.target), MODULE_PATH.find(node)
    if isinstance(node.target, OpOverload):
        return where
    kinds = tuple(isinstance(arg, fx.Node) for arg in node.args)
    return *where, kinds, tuple(node.kwargs)


def _changes_others(node: fx.Node, own: set[fx.Node]) -> bool:
    """Tell whether `node` changes a tensor that was made by a node outside of `own`."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    source: Any = node.args[0]
    while source in own and _may_alias(source):
        source = source.args[0]
    return source not in own


def _may_alias(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return bool(node.args)  # an item of a container, or a call of a layer
    return any(argument.alias_info is not None for argument in schema.arguments)


def _draws(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
