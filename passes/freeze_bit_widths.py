"""Turns quantizers into fixed grids, and weights into integer codes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cgmq_fx.attention import AttentionQuantizer
from cgmq_fx.frozen import FrozenAttention, FrozenModule, FrozenQuantizer, FrozenWeight
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.passes.constants import answer_questions, constant_value
from cgmq_fx.passes.deployed import written_nodes
from cgmq_fx.passes.meta import (
    MODULE_PATH,
    OPERATION_KEYS,
    VALUE,
    MetaKey,
    TensorInfo,
)
from cgmq_fx.passes.recurrent import INSIDE
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
    below 32 bits pass a `FrozenQuantizer`, attention weights a `FrozenAttention`; a recurrent layer
    is handed those of the tensors inside. At 32 bits nothing is left, and a weight that is computed
    from parameters becomes a parameter itself.

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
                answer_questions(gm, node)
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
        if node.op == "get_attr":
            return self._handed(node, quantizer)
        with self.gm.graph.inserting_before(node):
            if isinstance(quantizer, AttentionQuantizer):
                new = self._attention(node, quantizer)
            elif quantizer.bit_width == FLOAT_WIDTH or not reads_floats(node):
                new = self._float(node, quantizer)
            elif quantizer.spec.role == "weight":
                new = self._weight(node, quantizer)
            else:
                new = self._activation(node, quantizer)
        if new not in node.all_input_nodes:
            _copy_annotation(MODULE_PATH, node, new)
            _copy_annotation(VALUE, node, new)
        node.replace_all_uses_with(new)
        return erase_unused(node)

    def _float(self, node: fx.Node, quantizer: Quantizer) -> fx.Node:
        """Return the tensor itself; one computed from parameters is stored in their place."""
        source = node.all_input_nodes[0]
        if quantizer.spec.role != "weight" or source.op == "get_attr":
            return source
        value = constant_value(self.gm, source, self._written)
        if value is None:
            return source
        path, is_new = self._path((node.target, source), quantizer.name)
        if is_new:
            if not hasattr(self.gm, FROZEN):
                self.gm.add_module(FROZEN, nn.Module())
            held = nn.Parameter(value.clone(), requires_grad=False)
            self.gm.get_submodule(FROZEN).register_parameter(path.rpartition(".")[2], held)
        return self.gm.graph.get_attr(path)

    def _weight(self, node: fx.Node, quantizer: Quantizer) -> fx.Node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value = constant_value(self.gm, source, self._written)
        if value is None:
            return self._activation(node, quantizer)
        held = value
        path = self._module(
            (node.target, id(held) if source.op == "get_attr" else source),
            quantizer.name,
            lambda: _frozen_weight(quantizer, held),
        )
        return self.gm.graph.call_module(path)

    def _activation(self, node: fx.Node, quantizer: Quantizer) -> fx.Node:
        path = self._module(
            node.target,
            quantizer.name,
            lambda: _frozen_quantizer(quantizer),
        )
        return self.gm.graph.call_module(path, node.args, node.kwargs)

    def _handed(self, node: fx.Node, quantizer: Quantizer) -> list[str]:
        """Hand the operation that reads `node` a frozen quantizer; at 32 bits none."""
        (user,) = node.users
        inside: Any = dict(user.kwargs[INSIDE])  # type: ignore[arg-type]
        (name,) = (name for name, held in inside.items() if held is node)
        del inside[name]
        if quantizer.bit_width != FLOAT_WIDTH:
            path = self._module(node.target, quantizer.name, lambda: _frozen_quantizer(quantizer))
            with self.gm.graph.inserting_before(node):
                inside[name] = self.gm.graph.get_attr(path)
            _copy_annotation(MODULE_PATH, node, inside[name])
        user.kwargs = {**user.kwargs, INSIDE: inside}
        return erase_unused(node)

    def _attention(self, node: fx.Node, quantizer: Quantizer) -> fx.Node:
        if quantizer.bit_width == FLOAT_WIDTH:
            return self.gm.graph.call_function(
                F.scaled_dot_product_attention, node.args, node.kwargs
            )
        path = self._module(
            node.target,
            quantizer.name,
            lambda: FrozenAttention(quantizer.name, quantizer.spec.role, quantizer.qparams(), None),
        )
        return self.gm.graph.call_module(path, node.args, node.kwargs)

    def _module(self, content: object, site: str, make: Callable[[], FrozenModule]) -> str:
        """Return the path of the frozen module for `content`, made where it does not exist."""
        path, is_new = self._path(content, site)
        if is_new:
            self.gm.add_submodule(path, make().train(self.gm.training))
        return path

    def _path(self, content: object, site: str) -> tuple[str, bool]:
        """Return where the frozen `content` is or belongs, and whether it has to be put there."""
        is_new = content not in self._path_of
        if is_new:
            name, count = site, 1
            while f"{FROZEN}.{name}" in self._path_of.values():
                count += 1
                name = f"{site}_{count}"
            self._path_of[content] = f"{FROZEN}.{name}"
        return self._path_of[content], is_new


def _copy_annotation(key: MetaKey[T], node: fx.Node, new: fx.Node) -> None:
    if key.has(node):
        key.set(new, key.get(node))


def _frozen_quantizer(quantizer: Quantizer) -> FrozenQuantizer:
    spec = quantizer.spec
    return FrozenQuantizer(quantizer.name, spec.role, quantizer.qparams(), spec.channel_axis)


def _frozen_weight(quantizer: Quantizer, value: Tensor) -> FrozenWeight:
    qparams, spec = quantizer.qparams(), quantizer.spec
    return FrozenWeight(
        quantizer.name,
        qparams,
        quantizer.quantize(value),
        spec.channel_axis if qparams.scale.ndim < 2 else None,
        value.dtype,
        spec.unit_shape,
        [bits for bits in spec.widths if bits != FLOAT_WIDTH],
    )
