"""Which activation tensors inference holds, at what width and how long.

The schedule is the order of the graph in evaluation mode. Tensors that share memory are one buffer:

* Views and reshapes, dropout and containers are the tensor that they read.
* What changes a tensor in place shares its memory. Through a quantizer it makes a new tensor, since
  the codes that it reads are stored at another width than those it makes.
* A function of one tensor, element by element (an activation, a batch norm, a product with a
  number), is computed where its operand stands, if nothing else reads the operand and the operand
  is no input of the model.

A buffer that all readers read through one quantizer is stored as that quantizer's codes. A copying
rearrangement, a concatenation and a max pool read through the quantizer of their result: rounding
keeps the order, so that it may as well come first. Any other buffer is stored at 32 bits, and each
quantizer that reads it makes a copy of codes. Integer and boolean tensors have the bits of their
type. Inputs are held from the start, outputs to the end. Constants are no activations, and what an
operation needs within itself does not count.
"""

import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from cgmq_fx.cost.peak_memory import Buffer
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.passes.deployed import deployed_nodes, is_write
from cgmq_fx.passes.functionalize import make_tuple
from cgmq_fx.passes.guards import select_mode
from cgmq_fx.passes.meta import IS_CONSTANT, OP_INFO, VALUE, TensorInfo, Value
from cgmq_fx.passes.op_classes import REARRANGING

#: Classes whose calls compute element by element where they have one tensor.
POINTWISE = frozenset({"activation", "batch_norm", "elementwise", "add", "sub", "mul", "div"})
_CONTAINERS: frozenset[Any] = frozenset({make_tuple, tuple, list, dict, OrderedDict})
_VIEWS: frozenset[Any] = frozenset(
    {
        torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.chunk, torch.split,
        torch.unbind, torch.squeeze, torch.unsqueeze, torch.swapaxes, torch.movedim,
        torch.unflatten, torch.narrow, torch.broadcast_to, getattr,
    }
)  # fmt: skip
_VIEW_METHODS = frozenset(
    {
        "view", "reshape", "flatten", "permute", "transpose", "contiguous", "chunk", "split",
        "unbind", "squeeze", "unsqueeze", "expand", "expand_as", "to", "type_as", "float", "type",
        "detach", "unflatten", "view_as", "reshape_as", "narrow", "t", "movedim", "swapaxes",
        "unfold",
    }
)  # fmt: skip
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten)
# Of the class `reshape`, but their elements are not those of their operand alone.
_MIXING: frozenset[Any] = frozenset({F.fold})
_FLOAT_BITS = 32


@dataclass(eq=False)
class _Family:
    """Nodes that share memory.

    Attributes:
        members: the nodes, in order; the first one makes the tensor.
        elements: elements of that tensor.
        bits: bits of an element, where it is not floating point; else None.
        site: name of the quantizer whose codes are stored; None where there is none.
        source: the family that this one is a rounded copy of, if it is one.
        is_overwritten: a node changes it in place that is not its only reader.
    """

    members: list[fx.Node]
    elements: int
    bits: int | None
    site: str | None = None
    source: "_Family | None" = None
    is_overwritten: bool = False
    readers: list[fx.Node] = field(default_factory=list)


def live_buffers(gm: fx.GraphModule, site_index: Mapping[str, int]) -> tuple[Buffer, ...]:
    """Return the activations of a prepared graph with shapes, and when each is live.

    Args:
        gm: a graph annotated by `AnnotateOperations` and `AnnotateShapes`.
        site_index: the site of each quantizer by its name.
    """
    return _Liveness(gm).buffers(site_index)


class _Liveness:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        deployed = deployed_nodes(gm.graph)
        self.nodes = [node for node in gm.graph.nodes if node in deployed]
        self.time = {node: step for step, node in enumerate(self.nodes)}
        self.families: list[_Family] = []
        self.holds: dict[fx.Node, tuple[_Family, ...]] = {}
        for node in self.nodes:
            self.holds[node] = self._held(node)
        for node in self.nodes:
            self._note_reads(node)
        for family in reversed(self.families):
            self._store(family)
        self._copies: dict[_Family, list[_Family]] = {}
        for family in self.families:
            if family.source is not None:
                self._copies.setdefault(family.source, []).append(family)

    def buffers(self, site_index: Mapping[str, int]) -> tuple[Buffer, ...]:
        return tuple(
            self._buffer(family, site_index)
            for family in self.families
            if family.elements and not self._is_merged(family)
        )

    # -- what shares memory ----------------------------------------------------------------------

    def _held(self, node: fx.Node) -> tuple[_Family, ...]:
        """Return the families whose memory `node` hands on."""
        value = VALUE.get(node)
        if node.op == "output" or IS_CONSTANT.get(node):
            return ()
        if is_write(node) and not self._is_rounded(node.all_input_nodes[0]):
            return self._written(node)
        if first_leaf(value) is None:
            return ()
        if self._is_quantizer(node):
            return self._rounded(node)
        same = self._same_memory(node)
        if same is not None:
            return same
        if self._runs_in_place(node):
            return self._join(node, self._operand(node))
        return (self._new(node),)

    def _new(self, node: fx.Node) -> _Family:
        leaves = list(_leaves(VALUE.get(node)))
        dtype = leaves[0].dtype
        bits = None if dtype.is_floating_point else dtype.itemsize * 8
        family = _Family([node], sum(leaf.numel for leaf in leaves), bits)
        self.families.append(family)
        return family

    def _join(self, node: fx.Node, operand: fx.Node) -> tuple[_Family, ...]:
        for family in self.holds[operand]:
            family.members.append(node)
        return self.holds[operand]

    def _written(self, node: fx.Node) -> tuple[_Family, ...]:
        target = node.all_input_nodes[0]
        alone = self._operands(node) == [target] and self._is_only_reader(node, target)
        if not self.holds[target]:
            return () if first_leaf(VALUE.get(node)) is None else (self._new(node),)
        if not alone:
            for family in self.holds[target]:
                family.is_overwritten = True
        return self._join(node, target)

    def _rounded(self, node: fx.Node) -> tuple[_Family, ...]:
        held = self.holds[node.all_input_nodes[0]]
        value = VALUE.get(node)
        if not isinstance(value, TensorInfo) or not value.dtype.is_floating_point:
            return self._join(node, node.all_input_nodes[0])
        family = self._new(node)
        family.site = str(node.target).rpartition(".")[2]
        family.source = held[0] if len(held) == 1 else None
        return (family,)

    def _same_memory(self, node: fx.Node) -> tuple[_Family, ...] | None:
        """Return what a view or a container hands on, or None for anything else."""
        if node.target is select_mode:
            chosen = node.args[2]
            return self._join(node, chosen) if isinstance(chosen, fx.Node) else ()
        inputs = self._operands(node)
        if node.target in _CONTAINERS and inputs:
            joined = [family for item in inputs for family in self._join(node, item)]
            return tuple(dict.fromkeys(joined))
        if inputs and inputs[0] is node.all_input_nodes[0] and self._is_view(node):
            picked = _picked(node)
            if picked is not None and picked in self.holds:
                return self._join(node, picked)
            return self._join(node, inputs[0])
        return None

    def _is_view(self, node: fx.Node) -> bool:
        if OP_INFO.get(node).op == "dropout":
            return True
        source = VALUE.get(node.all_input_nodes[0])
        before, after = first_leaf(source), first_leaf(VALUE.get(node))
        if before is None or after is None or before.dtype != after.dtype:
            return False
        match node.op:
            case "call_function":
                if node.target is operator.getitem:
                    return isinstance(source, tuple) or len(self._operands(node)) == 1
                return node.target in _VIEWS
            case "call_method":
                return node.target in _VIEW_METHODS
            case "call_module":
                return isinstance(self.gm.get_submodule(str(node.target)), _VIEW_MODULES)
            case _:
                return False

    def _runs_in_place(self, node: fx.Node) -> bool:
        operands = self._operands(node)
        if OP_INFO.get(node).op not in POINTWISE or len(operands) != 1:
            return False
        before, after, held = VALUE.get(operands[0]), VALUE.get(node), self.holds[operands[0]]
        return (
            isinstance(before, TensorInfo)
            and isinstance(after, TensorInfo)
            and (before.numel, before.dtype) == (after.numel, after.dtype)
            and len(held) == 1
            and before.numel <= held[0].elements
            and held[0].members[0].op != "placeholder"
            and not self._is_rounded(operands[0])
            and self._is_only_reader(node, operands[0])
        )

    def _is_only_reader(self, node: fx.Node, operand: fx.Node) -> bool:
        members = {member for family in self.holds[operand] for member in family.members}
        return all(
            user is node or user in members or not self._touches(user)
            for member in members
            for user in member.users
        )

    def _operand(self, node: fx.Node) -> fx.Node:
        return self._operands(node)[0]

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the activations that `node` is given."""
        return [item for item in node.all_input_nodes if self.holds.get(item)]

    def _is_rounded(self, node: fx.Node) -> bool:
        return any(family.site is not None for family in self.holds.get(node, ()))

    def _is_quantizer(self, node: fx.Node) -> bool:
        return is_quantizer(self.gm, node) and OP_INFO.get(node).op != "attention"

    def _touches(self, node: fx.Node) -> bool:
        """Tell whether inference runs `node` and it reads more than shapes."""
        if node not in self.time:
            return False
        return node.op == "output" or is_write(node) or first_leaf(VALUE.get(node)) is not None

    # -- what is stored --------------------------------------------------------------------------

    def _note_reads(self, node: fx.Node) -> None:
        if not self._touches(node) or (node.target is select_mode):
            return
        for item in node.all_input_nodes:
            for family in self.holds.get(item, ()):
                if family not in self.holds[node] and node not in family.readers:
                    family.readers.append(node)

    def _store(self, family: _Family) -> None:
        """Find the quantizer whose codes a family is stored as; later families have theirs."""
        if family.site is not None or family.bits is not None or family.is_overwritten:
            return
        sites = {self._read_through(node) for node in family.readers}
        if len(sites) == 1:
            family.site = sites.pop()

    def _read_through(self, node: fx.Node) -> str | None:
        if self._is_quantizer(node):
            return self.holds[node][0].site
        held = self.holds[node]
        if len(held) != 1 or not self._selects(node):
            return None
        return held[0].site

    def _selects(self, node: fx.Node) -> bool:
        """Tell whether the result's elements are elements of the operands, or constants."""
        if not isinstance(VALUE.get(node), TensorInfo) or node.target in _MIXING:
            return False
        return OP_INFO.get(node).op in (REARRANGING, "cat", "max_pool")

    def _is_merged(self, family: _Family) -> bool:
        """Tell whether a quantizer's result is just how its operand is stored."""
        return family.source is not None and family.source.site == family.site

    def _buffer(self, family: _Family, site_index: Mapping[str, int]) -> Buffer:
        merged = [other for other in self._copies.get(family, ()) if other.site == family.site]
        steps = [
            self.time[node] for item in (family, *merged) for node in (*item.members, *item.readers)
        ]
        first = family.members[0]
        return Buffer(
            first.name,
            family.elements,
            0 if first.op == "placeholder" else self.time[first],
            max(steps),
            None if family.site is None else site_index[family.site],
            _FLOAT_BITS if family.bits is None else family.bits,
            is_copy=family.source is not None,
        )


def first_leaf(value: Value) -> TensorInfo | None:
    """Return the first tensor in what a node produces, or None."""
    return next(_leaves(value), None)


def _leaves(value: Value) -> Iterator[TensorInfo]:
    if isinstance(value, TensorInfo):
        yield value
    elif value is not None:
        for item in value:
            yield from _leaves(item)


def _picked(node: fx.Node) -> fx.Node | None:
    """Return the element that `node` takes out of a container that the graph makes."""
    source, index = (*node.args, None, None)[:2]
    if node.target is not operator.getitem or not isinstance(source, fx.Node):
        return None
    if source.target is not make_tuple or not isinstance(index, int):
        return None
    item = source.args[index]
    return item if isinstance(item, fx.Node) else None
