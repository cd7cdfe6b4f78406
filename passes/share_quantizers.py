"""Decides which tensors are quantized, and which of them must have one quantizer."""

import keyword
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import networkx as nx
from torch import fx

from cgmq_fx.passes.annotate_operations import operand_of
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.deployed import deployed_nodes
from cgmq_fx.passes.meta import (
    IS_CONSTANT,
    OP_INFO,
    SITES,
    VALUE,
    MetaKey,
    OperandRef,
    SiteRef,
    TensorInfo,
)
from cgmq_fx.passes.values import find_attribute
from cgmq_fx.quantizers import Quantizer, QuantizerSet

# Classes that, given one tensor, compute where it stands or pick among its elements.
_FOLLOWING = frozenset(
    {"max_pool", "activation", "elementwise", "batch_norm", "add", "sub", "mul", "div"}
)
# A container of modules has attributes of its own, such as `add`.
_ATTRIBUTES = frozenset(dir(QuantizerSet()))


@final
@dataclass(frozen=True)
class ShareQuantizers(GraphPass):
    """Write `SITES` on every node: which of its operands read which quantizer.

    A quantizer belongs to a tensor, so all operations that read the tensor share it. Parameters
    that are one object under several names (tied weights) are one tensor. An operation outside
    `ops` that looks up a shared weight, such as the embedding tied to an output layer, reads the
    quantized one too: the weight is stored once.

    Args:
        ops: operation classes, or FX targets in full, all of whose operands are quantized.
        weight_ops: those of which only weights are.
        stored_ops: those of which only activations are, so that memory holds them as codes. An
            operation that computes in place or just picks elements, and alone reads its operand, is
            left as it is: the operand is stored as codes of the result's quantizer.
    """

    name: ClassVar[str] = "share-quantizers"
    requires: ClassVar[frozenset[MetaKey[Any]]] = frozenset({OP_INFO, IS_CONSTANT})
    provides: ClassVar[frozenset[MetaKey[Any]]] = frozenset({SITES})

    ops: frozenset[str]
    weight_ops: frozenset[str] = frozenset()
    stored_ops: frozenset[str] = frozenset()

    def run(self, gm: fx.GraphModule) -> bool:
        """Annotate `gm`; see `GraphPass.run`."""
        deployed = deployed_nodes(gm.graph)
        operands = [
            (node, ref, tensor)
            for node in gm.graph.nodes
            if node in deployed
            for ref, tensor in _float_operands(gm, node)
        ]
        tensors = nx.Graph()
        chosen = [
            (n, ref, tensor) for n, ref, tensor in operands if self._is_chosen(n, ref, deployed)
        ]
        for _, _, tensor in chosen:
            tensors.add_edge(tensor, _storage(gm, tensor))
        for node, ref, tensor in operands:
            tied = OP_INFO.get(node).op == "embedding" and _storage(gm, tensor) in tensors
            if tied and not self._is_chosen(node, ref, deployed):
                tensors.add_edge(tensor, _storage(gm, tensor))
                chosen.append((node, ref, tensor))
        site_of = _name_sites(gm, tensors)
        read: dict[fx.Node, list[SiteRef]] = {node: [] for node in gm.graph.nodes}
        for node, ref, tensor in chosen:
            read[node].append(SiteRef(ref, site_of[tensor]))
        for node, sites in read.items():
            SITES.set(node, tuple(sites))
        return False

    def _is_chosen(self, node: fx.Node, ref: OperandRef, deployed: frozenset[fx.Node]) -> bool:
        info = OP_INFO.get(node)
        names = {info.op, info.target}
        if info.operands != "none" and names & self.ops:
            return True
        if ref.is_weight:
            return info.operands != "none" and bool(names & self.weight_ops)
        return bool(names & self.stored_ops) and not _follows(node, ref, deployed)


def _follows(node: fx.Node, ref: OperandRef, deployed: frozenset[fx.Node]) -> bool:
    """Tell whether `node` alone reads an operand, and stores it as it stores its result."""
    info = OP_INFO.get(node)
    users = [user for user in operand_of(node, ref).users if user in deployed]
    return info.operands == "none" and info.op in _FOLLOWING and len(users) == 1


def _float_operands(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[OperandRef, fx.Node]]:
    for ref in OP_INFO.get(node).refs:
        tensor = operand_of(node, ref)
        value = VALUE.find(tensor)
        if isinstance(value, TensorInfo) and not value.dtype.is_floating_point:
            continue
        if not is_quantizer(gm, tensor):
            yield ref, tensor


def is_quantizer(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether `node` calls a quantizer."""
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), Quantizer)


def _storage(gm: fx.GraphModule, tensor: fx.Node) -> object:
    """Return what makes two tensors the same one: a parameter's identity, else the node."""
    if tensor.op == "get_attr":
        return "parameter", id(find_attribute(gm, str(tensor.target)))
    return "node", tensor.name


def _name_sites(gm: fx.GraphModule, tensors: "nx.Graph[Any]") -> dict[fx.Node, str]:
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    groups = [
        sorted((member for member in group if isinstance(member, fx.Node)), key=order.__getitem__)
        for group in nx.connected_components(tensors)
    ]
    site_of: dict[fx.Node, str] = {}
    taken = set(getattr(gm, "quantizers", ()))
    for group in sorted(groups, key=lambda members: order[members[0]]):
        first = group[0]
        name = _identifier(str(first.target) if first.op == "get_attr" else first.name)
        count = 1
        unique = name
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        taken.add(unique)
        site_of.update(dict.fromkeys(group, unique))
    return site_of


def _identifier(text: str) -> str:
    name = re.sub(r"\W", "_", text)
    taken = keyword.iskeyword(name) or name in _ATTRIBUTES or name[:1].isdigit()
    return f"{name}_" if taken else name
