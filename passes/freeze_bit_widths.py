"""Turns quantizers into fixed grids, and weights into integer codes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cgmq_fx.attention import AttentionQuantizer
from cgmq_fx.frozen import FrozenAttention, FrozenModule, FrozenQuantizer, FrozenWeight
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.constants import constant_value
from cgmq_fx.passes.deployed import written_nodes
from cgmq_fx.passes.meta import (
    MODULE_PATH,
    OPERATION_KEYS,
    VALUE,
    MetaKey,
    TensorInfo,
)
from cgmq_fx.passes.share_quantizers import is_quantizer
from cgmq_fx.passes.unused import delete_unread, erase_unused
from cgmq_fx.quantizers import Quantizer

T = TypeVar("T")

#: Name of the submodule that holds the frozen modules of a lowered graph.
FROZEN = "frozen"


@final
@dataclass(frozen=True)
class FreezeBitWidths(GraphPass):
    """Replace every quantizer by what it does at its current width, as calls of ``frozen.<site>``.

    A weight below 32 bits becomes a `FrozenWeight` that holds its codes, also where it is computed
    from parameters alone; the float parameter is deleted when nothing else reads it. Other tensors
    below 32 bits pass a `FrozenQuantizer`, attention weights a `FrozenAttention`. At 32 bits
    nothing is left.

    Numerics: exact in evaluation mode under ``torch.no_grad()``; torch's matrix product sums in
    another order when gradients of the weight are wanted.

    Raises:
        TrainingError: a quantizer below 32 bits never saw a tensor.
    """

    name: ClassVar[str] = "freeze-bit-widths"
    invalidates: ClassVar[frozenset[MetaKey[Any]]] = OPERATION_KEYS

    def run(self, gm: fx.GraphModule) -> bool:
        """Freeze all quantizers of `gm`; see `GraphPass.run`."""
        nodes = [node for node in gm.graph.nodes if is_quantizer(gm, node)]
        settle_ranges(gm)
        freezer = _Freezer(gm)
        spent = [target for node in nodes for target in freezer.freeze(node)]
        if nodes:  # a tied weight has a node for each of its names, and one was read
            for node in gm.graph.find_nodes(op="get_attr"):
                spent.extend(erase_unused(node))
        delete_unread(gm, spent)
        return bool(nodes)


def settle_ranges(gm: fx.GraphModule) -> None:
    """Let quantizers fit their ranges where that is due, as the next evaluation would.

    Those of weights see the weight; the others take the sample that they kept, if they have one.
    """
    written = written_nodes(gm.graph)
    for node in gm.graph.nodes:
        if not is_quantizer(gm, node):
            continue
        quantizer, value = _quantizer(gm, node), None
        if quantizer.spec.role == "weight":
            value = constant_value(gm, node.args[0], written)
        if value is not None:
            with torch.no_grad():
                quantizer(value)
        elif quantizer.refit_pending and quantizer.has_sample:
            quantizer.refit()


def reads_floats(node: fx.Node) -> bool:
    """Tell whether a quantizer's tensor may hold floating-point numbers, as far as is known."""
    value = VALUE.find(node)
    return not isinstance(value, TensorInfo) or value.dtype.is_floating_point


def _quantizer(gm: fx.GraphModule, node: fx.Node) -> Quantizer:
    quantizer = gm.get_submodule(str(node.target))
    assert isinstance(quantizer, Quantizer)
    return quantizer


class _Freezer:
    """Replaces quantizer nodes one by one, with one frozen module for equal content."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._path_of: dict[object, str] = {}
        self._written = written_nodes(gm.graph)

    def freeze(self, node: fx.Node) -> list[str]:
        """Replace `node`; return the targets that it and its arguments read."""
        quantizer = _quantizer(self.gm, node)
        with self.gm.graph.inserting_before(node):
            if isinstance(quantizer, AttentionQuantizer):
                new = self._attention(node, quantizer)
            elif quantizer.bit_width == FLOAT_WIDTH or not reads_floats(node):
                new = node.all_input_nodes[0]
            elif quantizer.spec.role == "weight":
                new = self._weight(node, quantizer)
            else:
                new = self._activation(node, quantizer)
        if new not in node.all_input_nodes:
            _copy_annotation(MODULE_PATH, node, new)
            _copy_annotation(VALUE, node, new)
        node.replace_all_uses_with(new)
        return erase_unused(node)

    def _weight(self, node: fx.Node, quantizer: Quantizer) -> fx.Node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value = constant_value(self.gm, source, self._written)
        if value is None or int(quantizer.qparams().zero_point.count_nonzero()):
            return self._activation(node, quantizer)
        held = value
        path = self._path(
            (node.target, id(held) if source.op == "get_attr" else source),
            quantizer.name,
            lambda: _frozen_weight(quantizer, held),
        )
        return self.gm.graph.call_module(path)

    def _activation(self, node: fx.Node, quantizer: Quantizer) -> fx.Node:
        path = self._path(
            node.target,
            quantizer.name,
            lambda: FrozenQuantizer(
                quantizer.name,
                quantizer.spec.role,
                quantizer.qparams(),
                quantizer.spec.channel_axis,
            ),
        )
        return self.gm.graph.call_module(path, node.args, node.kwargs)

    def _attention(self, node: fx.Node, quantizer: Quantizer) -> fx.Node:
        if quantizer.bit_width == FLOAT_WIDTH:
            return self.gm.graph.call_function(
                F.scaled_dot_product_attention, node.args, node.kwargs
            )
        path = self._path(
            node.target,
            quantizer.name,
            lambda: FrozenAttention(quantizer.name, quantizer.spec.role, quantizer.qparams(), None),
        )
        return self.gm.graph.call_module(path, node.args, node.kwargs)

    def _path(self, content: object, site: str, make: Callable[[], FrozenModule]) -> str:
        """Return the path of the frozen module for `content`, made where it does not exist."""
        if content not in self._path_of:
            name, count = site, 1
            while f"{FROZEN}.{name}" in self._path_of.values():
                count += 1
                name = f"{site}_{count}"
            path = f"{FROZEN}.{name}"
            self.gm.add_submodule(path, make().train(self.gm.training))
            self._path_of[content] = path
        return self._path_of[content]


def _copy_annotation(key: MetaKey[T], node: fx.Node, new: fx.Node) -> None:
    if key.has(node):
        key.set(new, key.get(node))


def _frozen_weight(quantizer: Quantizer, value: Tensor) -> FrozenWeight:
    return FrozenWeight(
        quantizer.name,
        quantizer.qparams(),
        quantizer.quantize(value),
        quantizer.spec.channel_axis,
        value.dtype,
    )
