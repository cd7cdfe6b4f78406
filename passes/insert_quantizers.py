"""Puts a quantizer on every tensor that needs one."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import fx

from cgmq_fx.attention import AttentionQuantizer
from cgmq_fx.gates import DEFAULT_WIDTHS, FLOAT_WIDTH
from cgmq_fx.passes.annotate_operations import operand_of
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.deployed import deployed_nodes, written_nodes
from cgmq_fx.passes.meta import (
    IS_CONSTANT,
    IS_NONNEGATIVE,
    MODULE_PATH,
    OP_INFO,
    OPERATION_KEYS,
    SITES,
    VALUE,
    MetaKey,
    OperandRef,
)
from cgmq_fx.passes.values import find_attribute
from cgmq_fx.quantizer_spec import QuantizerSpec, Scheme
from cgmq_fx.quantizers import Quantizer, QuantizerSet

#: Name of the submodule that holds the quantizers of a prepared graph.
QUANTIZERS = "quantizers"

# The axis of a weight that runs over output channels; others have one range for the whole tensor.
_CHANNEL_AXIS = {"conv1d": 0, "conv2d": 0, "conv3d": 0, "linear": 0}
_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})


@final
@dataclass(frozen=True)
class InsertQuantizers(GraphPass):
    """Insert the quantizers that `SITES` names, as calls of ``quantizers.<site>``.

    A quantizer stands in front of the first operation that reads its tensor. Attention becomes one
    module that quantizes its weights between its two products.

    Numerics: exact while every quantizer is at 32 bits.

    Args:
        widths: allowed bit-widths of learned quantizers.
        input_bits: bit-width of what arrives from outside; None where it is learned too.
        per_channel: weights have a range for each output channel.
        quantize_attention: the class ``attention`` is among the quantized operations.
    """

    name: ClassVar[str] = "insert-quantizers"
    requires: ClassVar[frozenset[MetaKey[Any]]] = frozenset(
        {SITES, OP_INFO, IS_CONSTANT, IS_NONNEGATIVE}
    )
    invalidates: ClassVar[frozenset[MetaKey[Any]]] = OPERATION_KEYS | {VALUE}

    widths: tuple[int, ...] = DEFAULT_WIDTHS
    input_bits: int | None = 8
    per_channel: bool = True
    quantize_attention: bool = True

    def run(self, gm: fx.GraphModule) -> bool:
        """Insert what is missing; see `GraphPass.run`."""
        readers: dict[str, list[tuple[fx.Node, OperandRef]]] = {}
        for node in gm.graph.nodes:
            for read in SITES.get(node):
                readers.setdefault(read.site, []).append((node, read.ref))
        attentions = self._attentions(gm)
        if not readers and not attentions:
            return False
        if not hasattr(gm, QUANTIZERS):
            gm.add_module(QUANTIZERS, QuantizerSet())
        quantizers = gm.get_submodule(QUANTIZERS)
        assert isinstance(quantizers, QuantizerSet)
        written = written_nodes(gm.graph)
        for site, uses in readers.items():
            spec = self._spec(gm, uses)
            quantizer = Quantizer(spec, site)
            quantizer.train(gm.training)
            if not spec.learned:
                quantizer.set_bit_width(spec.widths[0])
            quantizers.add(site, quantizer)
            _insert(gm, site, uses, written)
        for node in attentions:
            self._replace_attention(gm, quantizers, node)
        return True

    def _attentions(self, gm: fx.GraphModule) -> list[fx.Node]:
        if not self.quantize_attention:
            return []
        deployed = deployed_nodes(gm.graph)
        return [
            node
            for node in gm.graph.nodes
            if node.target is F.scaled_dot_product_attention
            and node in deployed
            and OP_INFO.get(node).operands == "pair"
        ]

    def _spec(self, gm: fx.GraphModule, uses: list[tuple[fx.Node, OperandRef]]) -> QuantizerSpec:
        node, ref = uses[0]
        tensor = _tensor(node, ref)
        if ref.is_weight:
            axis, channels = self._channels(gm, uses)
            return QuantizerSpec("weight", "symmetric", axis, channels, self.widths)
        scheme: Scheme = "unsigned" if IS_NONNEGATIVE.get(tensor) else "affine"
        if not is_input(tensor):
            return QuantizerSpec("activation", scheme, widths=self.widths)
        if self.input_bits is None:
            return QuantizerSpec("input", "affine", widths=self.widths)
        widths = tuple(sorted({self.input_bits, FLOAT_WIDTH}))
        return QuantizerSpec("input", "affine", widths=widths, learned=False)

    def _channels(
        self, gm: fx.GraphModule, uses: list[tuple[fx.Node, OperandRef]]
    ) -> tuple[int | None, int]:
        axes = {_channel_axis(node) for node, _ in uses}
        shape = _weight_shape(gm, _tensor(*uses[0]))
        axis = axes.pop() if len(axes) == 1 else None
        if not self.per_channel or axis is None or shape is None or shape[axis] < 1:
            return None, 1
        return axis, shape[axis]

    def _replace_attention(
        self, gm: fx.GraphModule, quantizers: QuantizerSet, node: fx.Node
    ) -> None:
        site = f"{node.name}_weights"
        quantizer = AttentionQuantizer(
            QuantizerSpec("activation", "unsigned", widths=self.widths), site
        )
        quantizer.train(gm.training)
        quantizers.add(site, quantizer)
        with gm.graph.inserting_before(node):
            quantized = gm.graph.call_module(f"{QUANTIZERS}.{site}", node.args, node.kwargs)
        path = MODULE_PATH.find(node)
        if path is not None:
            MODULE_PATH.set(quantized, path)
        node.replace_all_uses_with(quantized)
        gm.graph.erase_node(node)


def _tensor(node: fx.Node, ref: OperandRef) -> fx.Node:
    tensor = operand_of(node, ref)
    assert isinstance(tensor, fx.Node)
    return tensor


def is_input(tensor: fx.Node) -> bool:
    """Tell whether `tensor` is an input of the model, or one that is only rearranged."""
    while tensor.op != "placeholder":
        inputs = tensor.all_input_nodes
        keeps = OP_INFO.get(tensor).op in ("reshape", "dropout") and tensor.target is not getattr
        if tensor.op == "get_attr" or not keeps or not inputs:
            return False
        tensor = inputs[0]
    return True


def _channel_axis(node: fx.Node) -> int | None:
    op = OP_INFO.get(node).op
    if op in _TRANSPOSED:
        groups = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
        return 1 if groups == 1 else None
    return _CHANNEL_AXIS.get(op)


def _weight_shape(gm: fx.GraphModule, tensor: fx.Node) -> torch.Size | None:
    if tensor.op != "get_attr":
        return None
    weight = find_attribute(gm, str(tensor.target))
    return weight.shape if isinstance(weight, torch.Tensor) else None


def _insert(
    gm: fx.GraphModule,
    site: str,
    uses: list[tuple[fx.Node, OperandRef]],
    written: frozenset[fx.Node],
) -> None:
    """Insert one call for each distinct tensor of the site; tied weights are quantized once."""
    quantized: dict[object, fx.Node] = {}
    for node, ref in uses:
        tensor = _tensor(node, ref)
        key: object = site if tensor.op == "get_attr" else tensor
        if tensor in written:
            key = node  # it may hold other values at each of its readers
        if key not in quantized:
            with gm.graph.inserting_before(node):
                quantized[key] = gm.graph.call_module(f"{QUANTIZERS}.{site}", (tensor,))
            path = MODULE_PATH.find(node)
            if path is not None:
                MODULE_PATH.set(quantized[key], path)
        _replace_operand(node, ref, quantized[key])


def _replace_operand(node: fx.Node, ref: OperandRef, value: fx.Node) -> None:
    def replaced(found: Any) -> Any:
        if ref.element is None:
            return value
        return [value if place == ref.element else item for place, item in enumerate(found)]

    if ref.keyword in node.kwargs:
        node.kwargs = {**node.kwargs, ref.keyword: replaced(node.kwargs[ref.keyword])}
    else:
        node.args = tuple(
            replaced(arg) if index == ref.index else arg for index, arg in enumerate(node.args)
        )
