"""Puts a quantizer on every tensor that needs one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import fx

from cgmq_fx.attention import AttentionQuantizer
from cgmq_fx.gates import DEFAULT_WIDTHS, FLOAT_WIDTH
from cgmq_fx.overrides import Chosen, Override
from cgmq_fx.passes.annotate_operations import operand_of
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.candidates import identifier, is_input
from cgmq_fx.passes.deployed import written_nodes
from cgmq_fx.passes.gradient_regions import gradient_regions
from cgmq_fx.passes.meta import (
    IS_CONSTANT,
    IS_NONNEGATIVE,
    MODULE_PATH,
    OP_INFO,
    OPERATION_KEYS,
    SITES,
    SKIPPED,
    VALUE,
    MetaKey,
    OperandRef,
    SiteRef,
)
from cgmq_fx.passes.recurrent import INSIDE, is_recurrent, products_of
from cgmq_fx.passes.values import find_attribute
from cgmq_fx.quantizer_spec import QuantizerSpec, Role, Scheme
from cgmq_fx.quantizers import Quantizer, QuantizerSet
from cgmq_fx.state_quantizer import StateQuantizer
from cgmq_fx.unit_bits import Granularity
from cgmq_fx.unit_quantizer import UnitQuantizer

#: Name of the submodule that holds the quantizers of a prepared graph.
QUANTIZERS = "quantizers"

# The axis of a weight that runs over output channels; others have one range for the whole tensor.
_CHANNEL_AXIS = {"conv1d": 0, "conv2d": 0, "conv3d": 0, "linear": 0}
_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})


@dataclass(frozen=True)
class _Use:
    """One operand that reads a quantizer."""

    node: fx.Node
    read: SiteRef

    @property
    def tensor(self) -> fx.Node:
        """The tensor that the operand is, before it is quantized."""
        assert self.read.ref is not None
        tensor = operand_of(self.node, self.read.ref)
        assert isinstance(tensor, fx.Node)
        return tensor


@final
@dataclass(frozen=True)
class InsertQuantizers(GraphPass):
    """Insert the quantizers that `SITES` names, as calls of ``quantizers.<site>``.

    A quantizer stands in front of the first operation that reads its tensor. Attention becomes one
    module that quantizes its weights between its two products. A recurrent layer is handed the
    quantizers of what its products read inside: its hidden states, and what its layers pass on.

    Numerics: exact while every quantizer is at 32 bits.

    Args:
        widths: allowed bit-widths of learned quantizers.
        input_bits: bit-width of what arrives from outside; None where it is learned too.
        per_channel: weights have a range for each output channel.
        granularity: what of a weight has a bit-width of its own.
    """

    name: ClassVar[str] = "insert-quantizers"
    requires: ClassVar[frozenset[MetaKey[Any]]] = frozenset(
        {SITES, OP_INFO, IS_CONSTANT, IS_NONNEGATIVE}
    )
    invalidates: ClassVar[frozenset[MetaKey[Any]]] = OPERATION_KEYS | {VALUE}

    widths: tuple[int, ...] = DEFAULT_WIDTHS
    input_bits: int | None = 8
    per_channel: bool = True
    granularity: Granularity = "layer"

    def run(self, gm: fx.GraphModule) -> bool:
        """Insert what is missing; see `GraphPass.run`."""
        uses: dict[str, list[_Use]] = {}
        for node in gm.graph.nodes:
            for read in SITES.get(node):
                uses.setdefault(read.site, []).append(_Use(node, read))
        if not uses:
            return False
        if not hasattr(gm, QUANTIZERS):
            gm.add_module(QUANTIZERS, QuantizerSet())
        quantizers = gm.get_submodule(QUANTIZERS)
        assert isinstance(quantizers, QuantizerSet)
        written = written_nodes(gm.graph)
        regions = gradient_regions(gm.graph)
        within = [site for site, found in uses.items() if found[0].read.ref is None]
        recurrents = self._recurrents(gm)
        for site, found in uses.items():
            if site not in within:
                groups = _calls(found, written, regions)
                spec = self._spec(gm, found, len(groups))
                kind = UnitQuantizer if spec.unit_shape else Quantizer
                _add(gm, quantizers, kind(spec, site))
                _insert(gm, site, groups)
        for site in within:  # last: by now quantizers stand before the operands
            (use,) = uses[site]
            spec = self._within(use.read.chosen, is_nonnegative=True)
            _add(gm, quantizers, AttentionQuantizer(spec, site))
            _replace_attention(gm, site, use.node)
        for node, chosen in recurrents.items():
            self._quantize_inside(gm, quantizers, node, chosen)
        return True

    def _recurrents(self, gm: fx.GraphModule) -> dict[fx.Node, Chosen | None]:
        """Return recurrent layers whose input is quantized, and what was chosen for the input.

        The tensors inside follow it.
        """
        return {
            node: read.chosen
            for node in gm.graph.nodes
            if is_recurrent(node) and INSIDE not in node.kwargs
            for read in SITES.get(node)
            if read.ref is not None and read.ref.index == 0
        }

    def _quantize_inside(
        self, gm: fx.GraphModule, quantizers: QuantizerSet, node: fx.Node, chosen: Chosen | None
    ) -> None:
        path = MODULE_PATH.find(node) or node.name
        held: dict[str, fx.Node] = {}
        for name in dict.fromkeys(product.operand for product in products_of(node)):
            if name is None:
                continue
            site = _free_site(quantizers, identifier(f"{path}_{name}"))
            _add(gm, quantizers, self._inner_quantizer(node, name, site, chosen))
            with gm.graph.inserting_before(node):
                held[name] = gm.graph.get_attr(f"{QUANTIZERS}.{site}")
            MODULE_PATH.set(held[name], path)
        node.kwargs = {**node.kwargs, INSIDE: held}

    def _inner_quantizer(
        self, node: fx.Node, name: str, site: str, chosen: Chosen | None
    ) -> Quantizer:
        between = name.startswith("input")
        # The first state comes from outside, and may have any sign, where it is given.
        positive = node.kwargs["mode"] == "RNN_RELU" and (between or node.args[1] is None)
        spec = self._within(chosen, is_nonnegative=positive)
        return Quantizer(spec, site) if between else StateQuantizer(spec, site)

    def _spec(self, gm: fx.GraphModule, uses: list[_Use], num_tensors: int) -> QuantizerSpec:
        chosen, role = uses[0].read.chosen, _role(uses)
        said = None if chosen is None else chosen.override
        is_nonnegative = all(IS_NONNEGATIVE.get(use.tensor) for use in uses)
        widths, learned = self._widths(said, role)
        axis, channels = None, 1
        scheme = _scheme(role, said, is_nonnegative=is_nonnegative)
        units: tuple[int, ...] = ()
        if role == "weight":
            axis, channels = self._channels(gm, uses, said)
            if learned and scheme == "symmetric" and num_tensors == 1:
                units = self._units(gm, uses, said, axis)
        by = "" if chosen is None else chosen.by
        return QuantizerSpec(role, scheme, axis, channels, widths, learned, num_tensors, by, units)

    def _units(
        self, gm: fx.GraphModule, uses: list[_Use], said: Override | None, axis: int | None
    ) -> tuple[int, ...]:
        """Return the shape of the gates of a weight; () for one."""
        granularity = self.granularity
        if said is not None and said.granularity is not None:
            granularity = said.granularity
        shape = _weight_shape(gm, uses[0].tensor)
        if granularity == "layer" or shape is None or 0 in shape:
            return ()
        if granularity == "element":
            return tuple(shape)
        if axis is None:
            return ()
        return tuple(size if dim == axis else 1 for dim, size in enumerate(shape))

    def _within(self, chosen: Chosen | None, *, is_nonnegative: bool) -> QuantizerSpec:
        """Return how a tensor inside an operation is quantized."""
        said = None if chosen is None else chosen.override
        widths, learned = self._widths(said, "activation")
        scheme = _scheme("activation", said, is_nonnegative=is_nonnegative)
        by = "" if chosen is None else chosen.by
        return QuantizerSpec("activation", scheme, widths=widths, learned=learned, chosen_by=by)

    def _widths(self, said: Override | None, role: Role) -> tuple[tuple[int, ...], bool]:
        """Return the allowed bit-widths, and whether one of them is learned.

        A fixed one comes with 32 bits, at which a quantizer lets its tensor pass.
        """
        if said is not None and said.widths is not None:
            return tuple(said.widths), True
        fixed = self.input_bits if role == "input" else None
        if said is not None and said.bit_width is not None:
            fixed = said.bit_width
        return (
            (self.widths, True) if fixed is None else (tuple(sorted({fixed, FLOAT_WIDTH})), False)
        )

    def _channels(
        self, gm: fx.GraphModule, uses: list[_Use], said: Override | None
    ) -> tuple[int | None, int]:
        axes = {_channel_axis(use.node) for use in uses}
        shape = _weight_shape(gm, uses[0].tensor)
        axis = axes.pop() if len(axes) == 1 else None
        per_channel = self.per_channel
        if said is not None and said.per_channel is not None:
            per_channel = said.per_channel
        if not per_channel or axis is None or shape is None or shape[axis] < 1:
            return None, 1
        return axis, shape[axis]


def _role(uses: list[_Use]) -> Role:
    """Return what the tensors of a quantizer are; an input among others has the others follow."""
    if uses[0].read.ref is not None and uses[0].read.ref.is_weight:
        return "weight"
    return "input" if any(is_input(use.tensor) for use in uses) else "activation"


def _scheme(role: Role, said: Override | None, *, is_nonnegative: bool) -> Scheme:
    """Return the kind of grid that holds the tensors, as `Override.affine` explains it."""
    affine = None if said is None else said.affine
    if affine:
        return "affine"
    if role == "weight":
        return "symmetric"
    if is_nonnegative:
        return "unsigned"
    return "affine" if affine is None else "symmetric"


def _free_site(quantizers: QuantizerSet, name: str) -> str:
    site, count = name, 1
    while hasattr(quantizers, site):
        count += 1
        site = f"{name}_{count}"
    return site


def _add(gm: fx.GraphModule, quantizers: QuantizerSet, quantizer: Quantizer) -> None:
    quantizer.train(gm.training)
    if not quantizer.spec.learned:
        quantizer.set_bit_width(quantizer.spec.widths[0])
    quantizers.add(quantizer.name, quantizer)


def _replace_attention(gm: fx.GraphModule, site: str, node: fx.Node) -> None:
    with gm.graph.inserting_before(node):
        quantized = gm.graph.call_module(f"{QUANTIZERS}.{site}", node.args, node.kwargs)
    _copy_annotations(node, quantized, MODULE_PATH, SKIPPED)
    node.replace_all_uses_with(quantized)
    gm.graph.erase_node(node)


def _copy_annotations(node: fx.Node, new: fx.Node, *keys: MetaKey[Any]) -> None:
    for key in keys:
        if key.has(node):
            key.set(new, key.get(node))


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


def _calls(
    uses: list[_Use], written: frozenset[fx.Node], regions: Mapping[fx.Node, object]
) -> list[list[_Use]]:
    """Return the uses that one call of the quantizer serves: one for each distinct tensor.

    Tied weights are one tensor. One that is written to may hold other values at each of its
    readers; and one that is read with and without gradients is quantized for each.
    """
    groups: dict[object, list[_Use]] = {}
    for use in uses:
        tensor = use.tensor
        key: object = "parameter" if tensor.op == "get_attr" else tensor
        key = use.node if tensor in written else key
        groups.setdefault((key, regions[use.node]), []).append(use)
    return list(groups.values())


def _insert(gm: fx.GraphModule, site: str, groups: list[list[_Use]]) -> None:
    """Insert one call for each group, in front of its first use."""
    for group in groups:
        first = group[0]
        with gm.graph.inserting_before(first.node):
            quantized = gm.graph.call_module(f"{QUANTIZERS}.{site}", (first.tensor,))
        _copy_annotations(first.node, quantized, MODULE_PATH)
        for use in group:
            assert use.read.ref is not None
            _replace_operand(use.node, use.read.ref, quantized)


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
