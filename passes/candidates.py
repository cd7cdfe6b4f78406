"""Which operands tables want quantized, and what the quantizers of their tensors are called."""

import keyword
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import fx

from cgmq_fx.cost.operation import AVERAGING_CLASSES
from cgmq_fx.passes.annotate_operations import operand_of
from cgmq_fx.passes.deployed import deployed_nodes
from cgmq_fx.passes.meta import OP_INFO, VALUE, OperandRef, TensorInfo
from cgmq_fx.passes.names import ATTENTION_SUFFIX
from cgmq_fx.passes.values import find_attribute
from cgmq_fx.quantizers import Quantizer, QuantizerSet

# Classes that, given one tensor, compute where it stands or pick among its elements.
_FOLLOWING = frozenset(
    {"max_pool", "activation", "elementwise", "batch_norm", "add", "sub", "mul", "div"}
)
# A container of modules has attributes of its own, such as `add`.
_ATTRIBUTES = frozenset(dir(QuantizerSet()))


@dataclass(frozen=True)
class Wanted:
    """Operations whose operands are wanted on grids.

    Attributes:
        ops: operation classes, or FX targets in full, all of whose operands are.
        weight_ops: those of which only weights are.
        averaged_ops: those of `AVERAGING_CLASSES`, which read one activation, of which that is.
        stored_ops: those of which only activations are, so that memory holds them as codes. An
            operation that computes in place or just picks elements, and alone reads its operand, is
            left as it is: the operand is stored as codes of the result's quantizer.
    """

    ops: frozenset[str]
    weight_ops: frozenset[str] = frozenset()
    averaged_ops: frozenset[str] = frozenset()
    stored_ops: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Read:
    """One operand of one operation.

    Attributes:
        node: the operation.
        ref: the operand; None for the weights between the two products of attention.
        tensor: what it reads; attention itself for the weights within it.
        site: name of the quantizer that the tensor has or would have.
        follows: no table wants it, but the look-up reads a weight that others want quantized.
    """

    node: fx.Node
    ref: OperandRef | None
    tensor: fx.Node
    site: str = ""
    follows: bool = False


def wanted_reads(gm: fx.GraphModule, wanted: Wanted) -> list[Read]:
    """Return the operands that are wanted on grids, with the names of their quantizers.

    A tensor has one name, and so have parameters that are one object under several names. Names do
    not depend on what is skipped or shared.
    """
    deployed = deployed_nodes(gm.graph)
    reads = [
        Read(node, ref, tensor)
        for node in gm.graph.nodes
        if node in deployed
        for ref, tensor in _float_operands(gm, node)
    ]
    chosen = [read for read in reads if _is_wanted(read, wanted, deployed)]
    stored = {storage_of(gm, read.tensor) for read in chosen}
    chosen += [
        Read(read.node, read.ref, read.tensor, follows=True)
        for read in reads
        if OP_INFO.get(read.node).op == "embedding"
        and storage_of(gm, read.tensor) in stored
        and not _is_wanted(read, wanted, deployed)
    ]
    if "attention" in wanted.ops:
        chosen += [Read(node, None, node) for node in _attentions(gm, deployed)]
    names = _site_names(gm, chosen)
    return [
        Read(read.node, read.ref, read.tensor, names[_owner(gm, read)], read.follows)
        for read in chosen
    ]


def storage_of(gm: fx.GraphModule, tensor: fx.Node) -> object:
    """Return what makes two tensors the same one: a parameter's identity, else the node."""
    if tensor.op == "get_attr":
        return "parameter", id(find_attribute(gm, str(tensor.target)))
    return "node", tensor.name


def is_quantizer(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether `node` calls a quantizer, or hands one to an operation that calls it inside."""
    return node.op in ("call_module", "get_attr") and isinstance(
        find_attribute(gm, str(node.target)), Quantizer
    )


def is_input(tensor: fx.Node) -> bool:
    """Tell whether `tensor` is an input of the model, or one that is only rearranged."""
    while tensor.op != "placeholder":
        inputs = tensor.all_input_nodes
        keeps = OP_INFO.get(tensor).op in ("reshape", "dropout") and tensor.target is not getattr
        if tensor.op == "get_attr" or not keeps or not inputs:
            return False
        tensor = inputs[0]
    return True


def _is_wanted(read: Read, wanted: Wanted, deployed: frozenset[fx.Node]) -> bool:
    info = OP_INFO.get(read.node)
    assert read.ref is not None
    names = {info.op, info.target}
    if info.operands != "none" and names & wanted.ops:
        return True
    if info.op in AVERAGING_CLASSES and names & wanted.averaged_ops:
        return not read.ref.is_weight
    if read.ref.is_weight:
        return info.operands != "none" and bool(names & wanted.weight_ops)
    return bool(names & wanted.stored_ops) and not _follows(read.node, read.ref, deployed)


def _follows(node: fx.Node, ref: OperandRef, deployed: frozenset[fx.Node]) -> bool:
    """Tell whether `node` alone reads an operand, and stores it as it stores its result."""
    info = OP_INFO.get(node)
    users = [user for user in operand_of(node, ref).users if user in deployed]
    return info.operands == "none" and info.op in _FOLLOWING and len(users) == 1


def _float_operands(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[OperandRef, fx.Node]]:
    for ref in OP_INFO.get(node).refs:
        tensor = operand_of(node, ref)
        if _may_hold_floats(tensor) and not is_quantizer(gm, tensor):
            yield ref, tensor


def _may_hold_floats(tensor: fx.Node) -> bool:
    """Tell whether a node computes a floating-point tensor, as far as is known."""
    if not VALUE.has(tensor):
        return True
    value = VALUE.get(tensor)
    return isinstance(value, TensorInfo) and value.dtype.is_floating_point


def _attentions(gm: fx.GraphModule, deployed: frozenset[fx.Node]) -> list[fx.Node]:
    return [
        node
        for node in gm.graph.nodes
        if node.target is F.scaled_dot_product_attention
        and node in deployed
        and OP_INFO.get(node).operands == "pair"
    ]


# -- names ---------------------------------------------------------------------------------------


def _owner(gm: fx.GraphModule, read: Read) -> object:
    """Return what has a quantizer of its own: a tensor, or the weights within attention."""
    return ("within", read.node.name) if read.ref is None else storage_of(gm, read.tensor)


def _site_names(gm: fx.GraphModule, reads: Sequence[Read]) -> dict[object, str]:
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    first: dict[object, Read] = {}
    for read in sorted(reads, key=lambda read: order[read.tensor]):
        first.setdefault(_owner(gm, read), read)
    names: dict[object, str] = {}
    taken = set(getattr(gm, "quantizers", ()))
    for owner, read in first.items():
        name, count = _base_name(read), 1
        unique = name
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        taken.add(unique)
        names[owner] = unique
    return names


def _base_name(read: Read) -> str:
    if read.ref is None:
        return f"{read.node.name}{ATTENTION_SUFFIX}"
    tensor = read.tensor
    return identifier(str(tensor.target) if tensor.op == "get_attr" else tensor.name)


def identifier(text: str) -> str:
    """Return `text` as the name of a site."""
    name = re.sub(r"\W", "_", text)
    taken = keyword.iskeyword(name) or name in _ATTRIBUTES or name[:1].isdigit()
    return f"{name}_" if taken else name
