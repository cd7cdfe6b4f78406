"""Writes on every node the work that it does for one sample: MACs, elements, attributes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, final

import torch
from torch import fx

from cgmq_fx.cost.operation import Attribute, Operation
from cgmq_fx.passes.annotate_operations import operand_of
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.einsum import einsum_extents
from cgmq_fx.passes.meta import (
    COUNTED_MACS,
    OP_INFO,
    VALUE,
    WORK,
    MetaKey,
    OpInfo,
    TensorInfo,
)
from cgmq_fx.passes.names import first_tensor, operation_names
from cgmq_fx.passes.products import product_extents
from cgmq_fx.passes.recurrent import is_recurrent, recurrent_work


@final
@dataclass(frozen=True)
class AnnotateWork(GraphPass):
    """Write `WORK` on every node: its `Operation` records, none for what only rearranges.

    MACs are computed from shapes. A convolution does ``in_channels / groups * kernel`` MACs for
    each output element, its transpose ``out_channels / groups * kernel`` for each *input* element.
    Attention is two operations: ``qk`` (query times key) and ``pv`` (attention weights times
    value). A recurrent layer is two for each layer and direction, and a third where it projects.
    """

    name: ClassVar[str] = "annotate-work"
    requires: ClassVar[frozenset[MetaKey[Any]]] = frozenset({OP_INFO, VALUE, COUNTED_MACS})
    provides: ClassVar[frozenset[MetaKey[Any]]] = frozenset({WORK})

    def run(self, gm: fx.GraphModule) -> bool:
        """Annotate `gm`; see `GraphPass.run`."""
        names = operation_names(gm)
        for node in gm.graph.nodes:
            WORK.set(node, _work(node, names[node]) if node in names else ())
        return False


def _work(node: fx.Node, name: str) -> tuple[Operation, ...]:
    info, output = OP_INFO.get(node), first_tensor(VALUE.get(node))
    assert output is not None
    if info.op == "attention" and info.operands == "pair":
        return _attention(node, info, name, output)
    if is_recurrent(node) and info.operands == "weight":
        return recurrent_work(node, info, name)
    shapes = [first_tensor(VALUE.get(arg)) for arg in _operand_nodes(node, info)]
    macs, attributes = _macs(node, info, shapes, output)
    weights = shapes[0].numel if info.operands == "weight" and shapes[0] is not None else 0
    inputs = sum(shape.numel for shape in _activations(node, info) if shape is not None)
    op = "opaque" if macs and info.operands == "none" and info.op == "other" else info.op
    return (
        Operation(
            name, op, info.target, info.operands, macs, output.numel, inputs, weights, attributes
        ),
    )


def _operand_nodes(node: fx.Node, info: OpInfo) -> list[fx.Node]:
    return [operand_of(node, ref) for ref in info.refs]


def _activations(node: fx.Node, info: OpInfo) -> list[TensorInfo | None]:
    if info.operands == "weight":
        return [first_tensor(VALUE.get(operand_of(node, ref))) for ref in info.refs[1:]]
    return [first_tensor(VALUE.get(arg)) for arg in node.all_input_nodes if arg.op != "get_attr"]


def _macs(
    node: fx.Node, info: OpInfo, shapes: list[TensorInfo | None], output: TensorInfo
) -> tuple[int, Mapping[str, Attribute]]:
    if info.operands in ("none", "activation") or None in shapes:
        return COUNTED_MACS.get(node), MappingProxyType({})
    operands = [shape for shape in shapes if shape is not None]
    if info.op.startswith("conv"):
        return _conv(node, info, operands, output)
    if info.op == "linear":
        inner = operands[0].shape[-1]
        attributes = {
            "in_features": inner,
            "out_features": output.numel * inner // operands[1].numel,
        }
        return output.numel * inner, MappingProxyType({**attributes, "bias": _has(node, 2, "bias")})
    if info.op == "matmul":
        return _matmul(node, operands, output)
    return 0, MappingProxyType({})


def _has(node: fx.Node, index: int, keyword: str) -> bool:
    value = node.kwargs.get(keyword, node.args[index] if index < len(node.args) else None)
    return value is not None


def _conv(
    node: fx.Node, info: OpInfo, operands: list[TensorInfo], output: TensorInfo
) -> tuple[int, Mapping[str, Attribute]]:
    weight, data = operands
    transposed = info.op.startswith("conv_transpose")
    names = ("stride", "padding", "output_padding", "groups", "dilation") if transposed else (
        "stride", "padding", "dilation", "groups")  # fmt: skip
    given: dict[str, Any] = {
        name: node.args[3 + i] for i, name in enumerate(names) if 3 + i < len(node.args)
    }
    given.update({name: node.kwargs[name] for name in names if name in node.kwargs})
    kernel, (first, second) = weight.shape[2:], weight.shape[:2]
    # From shapes: the model may compute the argument.
    channels = -1 - len(kernel)
    groups = (output if transposed else data).shape[channels] // second
    in_channels, out_channels = (first, second * groups) if transposed else (second * groups, first)
    per_element = weight.shape[1] * math.prod(kernel)
    macs = (data.numel if transposed else output.numel) * per_element
    attributes: dict[str, Attribute] = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "groups": groups,
        "kernel_size": math.prod(kernel),
        "spatial_dims": len(kernel),
        "bias": _has(node, 2, "bias"),
    }
    for axis, extent in enumerate(kernel):
        attributes[f"kernel_{axis}"] = extent
        for name in ("stride", "dilation"):
            attributes[f"{name}_{axis}"] = _extent(given.get(name, 1), axis)
    return macs, MappingProxyType(attributes)


def _extent(value: Any, axis: int) -> int:
    """Return the extent along `axis`; 0 where the model computes it."""
    if isinstance(value, fx.Node):
        return 0
    if isinstance(value, tuple | list):
        return int(value[axis] if len(value) > 1 else value[0])
    return int(value)


def _matmul(
    node: fx.Node, operands: list[TensorInfo], output: TensorInfo
) -> tuple[int, Mapping[str, Attribute]]:
    lhs, rhs = operands
    if node.target is torch.einsum:
        return _einsum(node, operands)
    extents = product_extents(node, lhs.shape, rhs.shape)
    if extents is not None:
        return math.prod(extents.values()), MappingProxyType({**extents})
    k = lhs.shape[-1]
    m = lhs.shape[-2] if len(lhs.shape) > 1 else 1
    n = rhs.shape[-1] if len(rhs.shape) > 1 else 1
    batch = output.numel // max(1, m * n)
    return output.numel * k, MappingProxyType({"batch": batch, "m": m, "n": n, "k": k})


def _einsum(node: fx.Node, operands: list[TensorInfo]) -> tuple[int, Mapping[str, Attribute]]:
    equation = node.args[0]
    assert isinstance(equation, str)
    extents = einsum_extents(equation, [operand.shape for operand in operands])
    attributes: dict[str, Attribute] = {**extents}
    return math.prod(extents.values()), MappingProxyType(attributes)


def _attention(node: fx.Node, info: OpInfo, name: str, output: TensorInfo) -> tuple[Operation, ...]:
    query, key, value = (first_tensor(VALUE.get(operand_of(node, ref))) for ref in info.refs)
    assert query is not None
    assert key is not None
    assert value is not None
    batch, m, k = math.prod(query.shape[:-2]), query.shape[-2], query.shape[-1]
    source, width = key.shape[-2], value.shape[-1]
    scores = batch * m * source

    def part(label: str, macs: int, elements: int, inputs: int, n: int, inner: int) -> Operation:
        attributes: dict[str, Attribute] = {
            "part": label,
            "batch": batch,
            "heads": batch,
            "m": m,
            "n": n,
            "k": inner,
        }
        return Operation(
            f"{name}.{label}", "attention", info.target, "pair", macs, elements, inputs, 0,
            MappingProxyType(attributes),
        )  # fmt: skip

    return (
        part("qk", scores * k, scores, query.numel + key.numel, source, k),
        part("pv", scores * width, output.numel, scores + value.numel, width, source),
    )
