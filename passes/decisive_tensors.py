"""Which quantized tensors every path from the inputs to an output passes.

Where such a tensor is 0, the output is a constant: no training can make anything of it.
"""

from collections.abc import Iterable

from torch import fx

from cgmq_fx.passes.annotate_operations import operand_of
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.passes.meta import OP_INFO
from cgmq_fx.passes.recurrent import is_recurrent

# Of these classes a result is 0 where one operand is.
_PRODUCTS = frozenset({"matmul", "mul"})


def decisive_tensors(gm: fx.GraphModule) -> frozenset[str]:
    """Return the sites of the quantizers whose tensor, where it is 0, leaves an output constant.

    What stands inside a recurrent layer is none of them: the other operand of its sums remains.

    Args:
        gm: a prepared graph after `AnnotateOperations`.
    """
    quantizers: dict[str, set[fx.Node]] = {}
    for node in gm.graph.nodes:
        if is_quantizer(gm, node):
            quantizers.setdefault(str(node.target).rpartition(".")[2], set()).add(node)
    outputs = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    alive = _depending(gm, ()).intersection(outputs.all_input_nodes)
    return frozenset(site for site, zero in quantizers.items() if not alive <= _depending(gm, zero))


def _depending(gm: fx.GraphModule, zero: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on an input where the tensors of `zero` are 0."""
    zero, found = set(zero), set[fx.Node]()
    for node in gm.graph.nodes:
        reads = any(arg in found for arg in node.all_input_nodes)
        if node.op == "placeholder" or (reads and node not in zero and not _is_0(node, zero)):
            found.add(node)
    return found


def _is_0(node: fx.Node, zero: set[fx.Node]) -> bool:
    """Tell whether an operation multiplies by a tensor of `zero`; a bias is a constant."""
    if zero.isdisjoint(node.all_input_nodes) or is_recurrent(node):
        return False
    info = OP_INFO.get(node)
    if info.operands == "none" or (info.operands == "pair" and info.op not in _PRODUCTS):
        return False
    return any(operand_of(node, ref) in zero for ref in info.refs)
