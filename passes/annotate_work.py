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
    MODULE_PATH,
    OP_INFO,
    VALUE,
    WORK,
    MetaKey,
    OpInfo,
    TensorInfo,
    Value,
)


@final
@dataclass(frozen=True)
class AnnotateWork(GraphPass):
    """Write `WORK` on every node: its `Operation` records, none for what only rearranges.

    MACs are computed from shapes. A convolution does ``in_channels / groups * kernel`` MACs for
    each output element, its transpose ``out_channels / groups * kernel`` for each *input* element.
    Attention is two operations: ``qk`` (query times key) and ``pv`` (attention weights times
    value).
    """

    name: ClassVar[str] = "annotate-work"
    requires: ClassVar[frozenset[MetaKey[Any]]] = frozenset({OP_INFO, VALUE, COUNTED_MACS})
    provides: ClassVar[frozenset[MetaKey[Any]]] = frozenset({WORK})

    def run(self, gm: fx.GraphModule) -> bool:
        """Annotate `gm`; see `GraphPass.run`."""
        names = _Names()
        for node in gm.graph.nodes:
            WORK.set(node, _work(node, names))
        return False


class _Names:
    """Gives each operation the path of its layer, numbered when a layer runs more than once."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def unique(self, node: fx.Node) -> str:
        path = MODULE_PATH.find(node)
        base = (
            node.name
            if path is None or (node.op == "call_function" and not _is_own(node))
            else path
        )
        name, count = base, 1
        while name in self._used:
            count += 1
            name = f"{base}:{count}"
        self._used.add(name)
        return name


def _is_own(node: fx.Node) -> bool:
    """Tell whether the operation is its layer's product, so that the layer's path names it best."""
    return OP_INFO.get(node).operands == "weight"


def _work(node: fx.Node, names: _Names) -> tuple[Operation, ...]:
    info, output = OP_INFO.get(node), first_tensor(VALUE.get(node))
    if output is None or info.op == "reshape":
        return ()
    name = names.unique(node)
    if info.op == "attention" and info.operands == "pair":
        return _attention(node, info, name, output)
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


def first_tensor(value: Value) -> TensorInfo | None:
    """Return the first tensor in what a node produces, or None."""
    if isinstance(value, TensorInfo) or value is None:
        return value
    return next((found for item in value if (found := first_tensor(item)) is not None), None)


def _operand_nodes(node: fx.Node, info: OpInfo) -> list[fx.Node]:
    return [operand_of(node, ref) for ref in info.refs]


def _activations(node: fx.Node, info: OpInfo) -> list[TensorInfo | None]:
    if info.operands == "weight":
        return [first_tensor(VALUE.get(operand_of(node, ref))) for ref in info.refs[1:]]
    return [first_tensor(VALUE.get(arg)) for arg in node.all_input_nodes if arg.op != "get_attr"]


def _macs(
    node: fx.Node, info: OpInfo, shapes: list[TensorInfo | None], output: TensorInfo
) -> tuple[int, Mapping[str, Attribute]]:
    if info.operands == "none" or None in shapes:
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
    groups, kernel = int(given.get("groups", 1)), weight.shape[2:]
    first, second = weight.shape[:2]
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
    if isinstance(value, tuple | list):
        return int(value[axis] if len(value) > 1 else value[0])
    return int(value)


def _matmul(
    node: fx.Node, operands: list[TensorInfo], output: TensorInfo
) -> tuple[int, Mapping[str, Attribute]]:
    lhs, rhs = operands
    if node.target is torch.einsum:
        return _einsum(node, operands)
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
