"""Raises ATen operators of an exported program to the functions that other passes know."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import fx
from torch._ops import OpOverload

from cgmq_fx.passes.aten_calls import CALLS, Call, arguments_of
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.meta import EXPORTED, MODULE_PATH
from cgmq_fx.passes.op_classes import class_of_function, class_of_method

# They hand on the very tensor that they are given.
_IDENTITIES = frozenset({torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default})
_END = 2**63 - 1
# Where a new tensor is made, when its program runs on the device on which it was exported.
_FACTORIES = frozenset(
    {
        "arange", "full", "zeros", "ones", "empty", "eye", "linspace", "logspace", "rand", "randn",
        "randint", "randperm", "scalar_tensor", "tril_indices", "triu_indices", "bartlett_window",
        "blackman_window", "hamming_window", "hann_window", "kaiser_window",
    }
)  # fmt: skip
# Keywords with which export spells out what is so anyway.
_IMPLIED: Mapping[str, Any] = {"pin_memory": False, "layout": torch.strided}


@final
@dataclass(frozen=True)
class RaiseAten(GraphPass):
    """Replace calls of ATen operators by the calls of torch that lead to them.

    An operator becomes the function, the Python operator or the tensor method that passes know
    under its class. One that none of them knows stays an operator. New tensors are made on the
    device of the first input, so that the graph can move.

    Numerics: exact.
    """

    name: ClassVar[str] = "raise-aten"

    def run(self, gm: fx.GraphModule) -> bool:
        """Raise what can be raised; see `GraphPass.run`."""
        changed = False
        device = _Device(gm.graph)
        for node in list(gm.graph.nodes):
            if isinstance(node.target, OpOverload) and node.target.namespace == "aten":
                changed |= _raise(gm.graph, node, device)
        return changed


class _Device:
    """The device of the first tensor that comes in, asked for when the graph runs."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._source = next((node for node in graph.nodes if EXPORTED.has(node)), None)
        self._node: fx.Node | None = None

    def of(self, device: Any) -> Any:
        """Return a node for `device`, or `device` where it is another one than the input's."""
        if self._source is None or device != EXPORTED.get(self._source).device:
            return device
        if self._node is None:
            with self._graph.inserting_after(self._source):
                self._node = self._graph.call_function(getattr, (self._source, "device"))
        return self._node


def _raise(graph: fx.Graph, node: fx.Node, device: _Device) -> bool:
    assert isinstance(node.target, OpOverload)
    if node.target in _IDENTITIES or _is_whole_slice(node):
        same: Any = node.args[0]
        node.replace_all_uses_with(same)
        graph.erase_node(node)
        return True
    changed = _make_movable(node, node.target, device)
    call = _call(node, node.target)
    if call is None:
        return changed
    function, args, kwargs = call
    with graph.inserting_before(node):
        if isinstance(function, str):
            raised = graph.call_method(function, args, kwargs)
        else:
            raised = graph.call_function(function, args, kwargs)
    if MODULE_PATH.has(node):
        MODULE_PATH.set(raised, MODULE_PATH.get(node))
    if EXPORTED.has(node):
        EXPORTED.set(raised, EXPORTED.get(node))
    node.replace_all_uses_with(raised)
    graph.erase_node(node)
    return True


def _make_movable(node: fx.Node, target: OpOverload, device: _Device) -> bool:
    """Make a new tensor where the inputs are, not where they were when the model was exported."""
    if target._opname not in _FACTORIES or not isinstance(node.kwargs.get("device"), torch.device):
        return False
    found = device.of(node.kwargs["device"])
    if not isinstance(found, fx.Node):
        return False
    node.kwargs = {**node.kwargs, "device": found}
    return True


def _is_whole_slice(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    given = arguments_of(node, node.target)
    return given["start"] in (None, 0) and given["end"] in (None, _END) and given["step"] == 1


def _call(node: fx.Node, target: OpOverload) -> Call | None:
    name = target._opname
    make = CALLS.get(f"{name}.{target._overloadname}", CALLS.get(name))
    if make is not None:
        return make(arguments_of(node, target))
    function, first = getattr(torch, name, None), next(iter(target._schema.arguments), None)
    kwargs = _without_implied(node.kwargs)
    if function is not None and class_of_function(function) != "other":
        return function, node.args, kwargs
    if first is not None and first.name == "self" and class_of_method(name) != "other":
        return name, node.args, kwargs
    return None


def _without_implied(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in kwargs.items() if key not in _IMPLIED or value != _IMPLIED[key]
    }
