"""Writes the shape and dtype of every tensor, from a run on tensors without data."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import fx, nn

from cgmq_fx.attention import AttentionQuantizer
from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.guards import check_concrete, check_mode, check_same
from cgmq_fx.passes.mac_counter import counted_macs, mac_counter
from cgmq_fx.passes.meta import (
    COUNTED_MACS,
    MODULE_PATH,
    OP_INFO,
    VALUE,
    MetaKey,
    OpInfo,
    TensorInfo,
    Value,
)
from cgmq_fx.passes.random_data import DATA_DEPENDENT, may_read_data, run_on_random_data
from cgmq_fx.passes.recurrent import INSIDE, is_recurrent
from cgmq_fx.passes.shape_guard import ShapeGuard
from cgmq_fx.passes.values import execute, fake_mode, to_fake, without_data
from cgmq_fx.quantizers import Quantizer
from cgmq_fx.rectified import quantize_rectified, rectify_and_quantize

# Classes whose calls may hold products that only running them shows, when they are not opened.
_MAY_MULTIPLY = frozenset({"other", "rnn", "bilinear", "matmul", "attention", "linear"})


@final
@dataclass(frozen=True)
class AnnotateShapes(GraphPass):
    """Write `VALUE` on every node, and `COUNTED_MACS` where only a run can tell the work.

    Args:
        inputs: one value for each placeholder, real or fake tensors; their data is never read.
        whole: the inputs that are taken where `inputs`, cut from them, do not fit the graph.

    Raises:
        UnsupportedModelError: the inputs do not fit the graph.
    """

    name: ClassVar[str] = "annotate-shapes"
    requires: ClassVar[frozenset[MetaKey[Any]]] = frozenset({OP_INFO})
    provides: ClassVar[frozenset[MetaKey[Any]]] = frozenset({VALUE, COUNTED_MACS})

    inputs: tuple[Any, ...] = field(repr=False)
    whole: tuple[Any, ...] | None = field(default=None, repr=False)

    def run(self, gm: fx.GraphModule) -> bool:
        """Annotate `gm`; see `GraphPass.run`."""
        modes = {module: module.training for module in gm.modules()}
        gm.eval()
        try:
            try:
                self._propagate(gm, self.inputs)
            except UnsupportedModelError:
                if self.whole is None:
                    raise
                self._propagate(gm, self.whole)
        finally:
            for module, training in modes.items():
                module.training = training
        return False

    def _propagate(self, gm: fx.GraphModule, given: tuple[Any, ...]) -> None:
        mode = fake_mode()
        values: dict[fx.Node, Any] = {}
        remaining = _remaining_uses(gm.graph)
        inputs = iter(given)
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
    if node.target in (check_same, check_mode, check_concrete):
        return None, 0
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, ShapeGuard):
        return None, 0
    if isinstance(module, AttentionQuantizer):
        with without_data(mode):
            return F.scaled_dot_product_attention(*args, **kwargs), 0
    if isinstance(module, Quantizer):
        return args[0], 0
    if node.target in (quantize_rectified, rectify_and_quantize):
        x = args[-1]  # quantizers see no tensor without data
        return (x if node.target is quantize_rectified else (x, x)), 0
    if is_recurrent(node):
        kwargs = {name: value for name, value in kwargs.items() if name != INSIDE}
    info = OP_INFO.get(node)
    try:
        with without_data(mode):
            if info.op in _MAY_MULTIPLY and info.operands == "none" and not _is_plain(module):
                with mac_counter() as counter:
                    result = execute(gm, node, args, kwargs, mode)
                return result, counted_macs(counter)
            return execute(gm, node, args, kwargs, mode), 0
    except Exception as error:
        if may_read_data(node):
            with suppress(Exception), mac_counter() as counter:
                return run_on_random_data(gm, node, args, kwargs, mode), counted_macs(counter)
        if isinstance(error, DATA_DEPENDENT):
            raise UnsupportedModelError(_data_fault(node, info)) from error
        given = ", ".join(str(_describe(value)) for value in args)
        raise UnsupportedModelError(
            f"the example inputs do not fit the model: operation '{node.name}' "
            f"({info.target}) got {given or 'nothing'} and failed: {error}\n"
            f"{_way_out(info)}"
        ) from error


def _data_fault(node: fx.Node, info: OpInfo) -> str:
    path = MODULE_PATH.find(node)
    place = f" of the layer '{path}'" if path else ""
    return (
        f"operation '{node.name}' ({info.target}){place} has a result whose shape only data tells, "
        f"so that what follows has no price; keep the layer around it closed: "
        f"prepare(..., leaf_modules=['{path or '...'}']), or write it with a mask"
    )


def _way_out(info: OpInfo) -> str:
    if info.op == "rnn" and info.reason:
        return f"For this operation, {info.reason}; give it padded tensors."
    return "Give inputs that the float model accepts."


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
