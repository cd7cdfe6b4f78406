"""A lowered graph whose grids are marks, so that an exporter of torch carries them through.

Every frozen weight and quantizer, and every float parameter, becomes a node of one type that
returns its argument. Whatever the exporter makes of the rest of the graph, the marks stay where
they are, and nothing is computed from a weight ahead of time; whoever reads the result puts what
its format has for a grid in the place of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from cgmq_fx.attention import attention_weights, weighted_values
from cgmq_fx.frozen import FrozenAttention, FrozenModule, FrozenQuantizer, FrozenWeight
from cgmq_fx.lowered import LoweredModule

#: Domain and type of a mark as ONNX has it, and the attribute that tells whose it is.
MARK_DOMAIN, MARK_TYPE, MARK_PLACE = "cgmq_fx", "Mark", "place"


@dataclass(frozen=True)
class MarkedGraph:
    """A graph with marks.

    Attributes:
        module: the graph; it computes on values that are not rounded.
        names: in the order of their marks, the paths of frozen modules and of float parameters.
        frozen: the frozen modules by path.
    """

    module: fx.GraphModule
    names: tuple[str, ...]
    frozen: Mapping[str, FrozenModule] = field(repr=False)


def marked(fixed: LoweredModule) -> MarkedGraph:
    """Return the graph of `fixed` with marks; `fixed` stays as it is."""
    frozen = {
        name: module for name, module in fixed.named_modules() if isinstance(module, FrozenModule)
    }
    graph = fx.Graph()
    graph.output(graph.graph_copy(fixed.graph, {}))
    graph._codegen = fixed.graph._codegen
    # The containers of a new graph module are its own, their leaves are shared.
    twin = fx.GraphModule(fixed, graph, class_name=type(fixed).__name__)
    for place, (name, module) in enumerate(frozen.items()):
        parent, _, last = name.rpartition(".")
        setattr(twin.get_submodule(parent), last, _mark_of(module, place))
    names = [*frozen]
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    for node in graph.find_nodes(op="get_attr"):
        if node.target in parameters:
            _mark_parameter(node, len(names))
            names.append(node.target)
    twin.recompile()
    return MarkedGraph(twin.eval(), tuple(names), frozen)


def mark(x: Tensor, place: int) -> Tensor:
    """Return what stands for x, marked."""
    return torch.onnx.ops.symbolic(
        f"{MARK_DOMAIN}::{MARK_TYPE}",
        (x,),
        {MARK_PLACE: place},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


def _mark_parameter(node: fx.Node, place: int) -> None:
    with node.graph.inserting_after(node):
        held = node.graph.call_function(mark, (node, place))
    node.replace_all_uses_with(held, delete_user_cb=lambda user: user is not held)


def _mark_of(module: FrozenModule, place: int) -> nn.Module:
    if isinstance(module, FrozenWeight):
        return _MarkedWeight(module, place)
    if isinstance(module, FrozenAttention):
        return _MarkedAttention(place)
    return _MarkedQuantizer(place)


class _MarkedWeight(nn.Module):
    held: Tensor

    def __init__(self, weight: FrozenWeight, place: int) -> None:
        super().__init__()
        self.place = place
        self.register_buffer("held", weight())

    def forward(self) -> Tensor:
        return mark(self.held, self.place)


class _MarkedQuantizer(nn.Module):
    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return mark(x, self.place) if FrozenQuantizer.rounds(x) else x


class _MarkedAttention(nn.Module):
    """Attention with a mark between its two products."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        weights = attention_weights(query, key, attn_mask, is_causal, scale, enable_gqa)
        return weighted_values(mark(weights, self.place), query, value, dropout_p, enable_gqa)
