"""Undoing the insertion of quantizers, to see what other choices would have made of a graph."""

import copy

import torch.nn.functional as F
from torch import fx

from cgmq_fx.attention import AttentionQuantizer
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.passes.insert_quantizers import QUANTIZERS
from cgmq_fx.passes.meta import MODULE_PATH
from cgmq_fx.passes.names import ATTENTION_SUFFIX
from cgmq_fx.passes.recurrent import INSIDE, is_recurrent
from cgmq_fx.passes.trace import adopt


def without_quantizers(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a graph module without the quantizers of `gm`, which stays as it is.

    Layers and parameters are shared with `gm`, not copied.
    """
    twin = fx.GraphModule(gm, copy.deepcopy(gm.graph), class_name=type(gm).__name__)
    adopt(twin, gm)
    for node in list(twin.graph.nodes):
        if is_recurrent(node):
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != INSIDE}
    for node in list(twin.graph.nodes):
        if node.op == "get_attr" and is_quantizer(twin, node):
            twin.graph.erase_node(node)
        elif is_quantizer(twin, node):
            node.replace_all_uses_with(_unquantized(twin, node))
            twin.graph.erase_node(node)
    twin._modules.pop(QUANTIZERS, None)
    twin.recompile()
    return twin


def _unquantized(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return what computes in float what the quantizer at `node` computes."""
    target = str(node.target)
    if not isinstance(gm.get_submodule(target), AttentionQuantizer):
        return node.all_input_nodes[0]
    name = target.rpartition(".")[2].removesuffix(ATTENTION_SUFFIX)
    with gm.graph.inserting_before(node):
        attention = gm.graph.create_node(
            "call_function", F.scaled_dot_product_attention, node.args, node.kwargs, name
        )
    path = MODULE_PATH.find(node)
    if path is not None:
        MODULE_PATH.set(attention, path)
    return attention
