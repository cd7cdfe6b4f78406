"""Writes the shape and dtype of every tensor, from a run on tensors without data."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import fx, nn

from cgmq_fx.attention import AttentionQuantizer
from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.guards import check_same
from cgmq_fx.passes.mac_counter import counted_macs, mac_counter
from cgmq_fx.passes.meta import COUNTED_MACS, OP_INFO, VALUE, MetaKey, TensorInfo, Value
from cgmq_fx.passes.values import execute, fake_mode, to_fake, without_data
from cgmq_fx.quantizers import Quantizer

# Classes whose calls may hold products that only running them shows, when they are not opened.
_MAY_MULTIPLY = frozenset({"other", "rnn", "bilinear", "matmul", "attention", "linear"})


@final
@dataclass(frozen=True)
class AnnotateShapes(GraphPass):
    """Write `VALUE` on every node, and `COUNTED_MACS` where only a run can tell the work.

    Args:
        inputs: one value for each placeholder, real or fake tensors; their data is never read.

    Raises:
        UnsupportedModelError: the inputs do not fit the graph.
    """

    name: ClassVar[str] = "annotate-shapes"
    requires: ClassVar[frozenset[MetaKey[Any]]] = frozenset({OP_INFO})
    provides: ClassVar[frozenset[MetaKey[Any]]] = frozenset({VALUE, COUNTED_MACS})

    inputs: tuple[Any, ...] = field(repr=False)

    def run(self, gm: fx.GraphModule) -> bool:
        """Annotate `gm`; see `GraphPass.run`."""
        modes = {module: module.training for module in gm.modules()}
        gm.eval()
        try:
            self._propagate(gm)
        finally:
            for module, training in modes.items():
                module.training = training
        return False

    def _propagate(self, gm: fx.GraphModule) -> None:
        mode = fake_mode()
        values: dict[fx.Node, Any] = {}
        remaining = _remaining_uses(gm.graph)
        inputs = iter(self.inputs)
        for node in gm.graph.nodes:
            macs = 0
            if node.op == "placeholder":
                values[node] = _placeholder(node, inputs, mode)
            elif node.op == "output":
                values[node] = fx.node.map_arg(node.args[0], values.__getitem__)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node], macs = _run_node(gm, node, args, kwargs, mode)
            VALUE.set(node, _describe(values[node]))
            COUNTED_MACS.set(node, macs)
            for spent in remaining.get(node, ()):
                del values[spent]


def _remaining_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for arg in node.all_input_nodes:
            if arg not in seen:
                seen.add(arg)
                last.setdefault(node, []).append(arg)
    return last


def _placeholder(node: fx.Node, inputs: Any, mode: Any) -> Any:
    default = node.args[0] if node.args else None
    return to_fake(mode, next(inputs, default))


def _run_node(
    gm: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any, mode: Any
) -> tuple[Any, int]:
    if node.target is check_same:
        return None, 0
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, AttentionQuantizer):
        with without_data(mode):
            return F.scaled_dot_product_attention(*args, **kwargs), 0
    if isinstance(module, Quantizer):
        return args[0], 0
    info = OP_INFO.get(node)
    try:
        with without_data(mode):
            if info.op in _MAY_MULTIPLY and info.operands == "none" and not _is_plain(module):
                with mac_counter() as counter:
                    result = execute(gm, node, args, kwargs, mode)
                return result, counted_macs(counter)
            return execute(gm, node, args, kwargs, mode), 0
    except Exception as error:
        given = ", ".join(str(_describe(value)) for value in args)
        raise UnsupportedModelError(
            f"the example inputs do not fit the model: operation '{node.name}' "
            f"({info.target}) got {given or 'nothing'} and failed: {error}\n"
            f"Give inputs that the float model accepts."
        ) from error


def _is_plain(module: nn.Module | None) -> bool:
    return module is not None and next(module.parameters(), None) is None


def _describe(value: Any) -> Value:
    if isinstance(value, torch.Tensor):
        return TensorInfo(tuple(int(extent) for extent in value.shape), value.dtype)
    if isinstance(value, torch.Size):
        return None
    if isinstance(value, tuple | list):
        return tuple(_describe(item) for item in value)
    if isinstance(value, dict):
        return tuple(_describe(item) for item in value.values())
    return None
