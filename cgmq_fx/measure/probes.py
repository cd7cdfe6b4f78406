"""Small networks around one operation: the difference between two of them is what it takes.

A runtime computes an operation together with its neighbours: it fuses a ReLU into a convolution,
keeps tensors as integers between quantized operations, and reorders memory once for several of
them. So an operation is timed where it stands in a network: behind something that computes its
inputs and before something that reads its output, in several copies with weights of their own.
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from cgmq_fx.measure.operations import DistinctOperation, Operand, map_values

#: Channels of the input that anchors compute tensors from, and of what readers compute.
_ANCHOR_CHANNELS = 4
_READER_CHANNELS = 16
_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Probes:
    """A network of many parts, each of which can be cut out by its outputs.

    Attributes:
        model: the network.
        inputs: what it is called with, one sample.
        outputs: positions of its outputs: by part, of each copy.
    """

    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    outputs: Mapping[Hashable, tuple[int, ...]]


def operation_probes(operations: Sequence[DistinctOperation], copies: Sequence[int]) -> Probes:
    """Return a network with each operation so many times, between its neighbours.

    An operation with weights reads an input of the network and is followed by a ReLU, as most are.
    Any other reads what an anchor computes for it; its further operands are common to all copies.
    Parts are ``(index, "with")`` and, for operations that have anchors, ``(index, "without")``: the
    same anchors and readers without the operation.
    """
    builder = _Builder()
    for index, (found, count) in enumerate(zip(operations, copies, strict=True)):
        op, has_weight = found.operation.op, found.operation.operands == "weight"
        for _ in range(count):
            result = builder.operation(found)
            if has_weight:
                result = builder.graph.call_function(nn.functional.relu, (result,))
            builder.reader((index, "with"), result, found.output_shape, op)
        for _ in range(0 if has_weight else count):
            operand = found.activations[0]
            builder.reader((index, "without"), builder.anchor(operand), operand.shape, op)
    return builder.probes()


def reader_probes(copies: int) -> Probes:
    """Return a network of pairs of operations so small that they show what any one takes."""
    builder = _Builder()
    given = builder.input((1, _ANCHOR_CHANNELS, 1, 1))
    for _ in range(copies):
        conv = nn.Conv2d(_ANCHOR_CHANNELS, _READER_CHANNELS, 1)
        result = builder.graph.call_function(nn.functional.relu, (builder.call(conv, given),))
        builder.reader("readers", result, (1, _READER_CHANNELS, 1, 1), "conv2d")
    return builder.probes()


class _Builder:
    def __init__(self) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.inputs: dict[tuple[int, ...], tuple[fx.Node, torch.Tensor]] = {}
        self.read: list[tuple[Hashable, fx.Node]] = []
        self.common: dict[Operand, fx.Node] = {}
        self.names = 0

    def probes(self) -> Probes:
        self.graph.output(tuple(node for _, node in self.read))
        model = fx.GraphModule(self.root, self.graph, "Probes").eval()
        outputs: dict[Hashable, tuple[int, ...]] = {}
        for place, (part, _) in enumerate(self.read):
            outputs[part] = (*outputs.get(part, ()), place)
        return Probes(model, tuple(tensor for _, tensor in self.inputs.values()), outputs)

    def input(self, shape: tuple[int, ...]) -> fx.Node:
        if shape not in self.inputs:
            # Placeholders come first in a graph, in the order of the inputs.
            placed = [node for node, _ in self.inputs.values()]
            first = next(iter(self.graph.nodes), None)
            place = (
                self.graph.inserting_after(placed[-1])
                if placed
                else (self.graph.inserting_before(first))
            )
            with place:
                node = self.graph.placeholder(f"x{len(self.inputs)}")
            self.inputs[shape] = node, torch.randn(shape)
        return self.inputs[shape][0]

    def call(self, module: nn.Module, *args: Any) -> fx.Node:
        name = self._name()
        self.root.add_module(name, module)
        return self.graph.call_module(name, args)

    def operation(self, found: DistinctOperation) -> fx.Node:
        """Return one copy of an operation."""
        place = itertools.count()

        def operand(item: Any) -> Any:
            if not isinstance(item, Operand):
                return item
            if item.is_parameter:
                return self._parameter(item.shape)
            if found.operation.operands == "weight":
                return self.input(item.shape)
            return self.anchor(item) if next(place) == 0 else self._common_anchor(item)

        template = found.template
        args, kwargs = map_values(operand, (template.args, dict(template.kwargs)))
        if isinstance(template.target, nn.Module):
            return self.call(template.target, *args)
        if isinstance(template.target, str):
            return self.graph.call_method(template.target, args, kwargs)
        return self.graph.call_function(template.target, args, kwargs)

    def _common_anchor(self, operand: Operand) -> fx.Node:
        if operand not in self.common:
            self.common[operand] = self.anchor(operand)
        return self.common[operand]

    def anchor(self, operand: Operand) -> fx.Node:
        """Return a tensor of the operand's shape that a small operation computes."""
        spatial = len(operand.shape) - 2
        if spatial in (2, 3):
            given = self.input((1, _ANCHOR_CHANNELS, *operand.shape[2:]))
            return self.call(_CONVOLUTIONS[spatial](_ANCHOR_CHANNELS, operand.shape[1], 1), given)
        given = self.input((*operand.shape[:-1], _ANCHOR_CHANNELS))
        return self.call(nn.Linear(_ANCHOR_CHANNELS, operand.shape[-1]), given)

    def reader(self, part: Hashable, result: fx.Node, shape: tuple[int, ...], op: str) -> None:
        """Let a small operation read `result`, so that it is quantized, as an output of a part."""
        spatial = len(shape) - 2
        if spatial in (2, 3) or op.startswith("conv"):
            module = _CONVOLUTIONS[spatial](shape[1], _READER_CHANNELS, 1, stride=shape[2:])
        else:
            module = nn.Linear(shape[-1], _READER_CHANNELS)
        self.read.append((part, self.call(module, result)))

    def _parameter(self, shape: tuple[int, ...]) -> fx.Node:
        name = self._name()
        fan_in = max(1, torch.Size(shape[1:]).numel())
        self.root.register_parameter(name, nn.Parameter(torch.randn(shape) / fan_in**0.5))
        return self.graph.get_attr(name)

    def _name(self) -> str:
        self.names += 1
        return f"part{self.names}"
