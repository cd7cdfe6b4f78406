"""The distinct operations of models: what has to be timed, each once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from cgmq_fx.cost.operation import Attribute, Operation
from cgmq_fx.measure.fixing import prepared_for_timing
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.passes.deployed import deployed_nodes
from cgmq_fx.passes.meta import VALUE, WORK
from cgmq_fx.passes.names import first_tensor
from cgmq_fx.prepared import PreparedModule

#: Classes that a runtime computes; the others are folded, or only rearrange what is there.
TIMED_CLASSES = frozenset(
    {f"conv{n}d" for n in (1, 2, 3)}
    | {f"conv_transpose{n}d" for n in (1, 2, 3)}
    | {"linear", "add", "mul", "cat", "max_pool", "avg_pool", "activation", "reduce"}
)
#: Kinds of operations of one class that only their function tells apart, such as a mean and a sum.
TOLD_BY_TARGET = ("activation", "none")
#: Attributes on which the time does not depend.
_IGNORED = ("bias", "spatial_dims", "kernel_size")


@dataclass(frozen=True)
class Template:
    """How an operation is called, apart from the tensors.

    Attributes:
        target: the function, or the module.
        args: positional arguments; an `Operand` stands for each tensor.
        kwargs: keyword arguments, likewise.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation reads.

    Attributes:
        shape: its shape, for one sample.
        is_parameter: whether the model holds it.
    """

    shape: tuple[int, ...]
    is_parameter: bool


@dataclass(frozen=True)
class DistinctOperation:
    """One operation to time.

    Attributes:
        operation: the first of its kind, as cost tables see it.
        template: how to call it.
        output_shape: shape of what it returns, for one sample.
        count: how many of its kind the models have.
    """

    operation: Operation
    template: Template
    output_shape: tuple[int, ...]
    count: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others."""
        return identity(self.operation)

    @property
    def activations(self) -> list[Operand]:
        """The tensors that other operations compute for it."""
        found: list[Operand] = []

        def note(item: Any) -> Any:
            if isinstance(item, Operand) and not item.is_parameter:
                found.append(item)
            return item

        map_values(note, (self.template.args, dict(self.template.kwargs)))
        return found


def identity(operation: Operation) -> tuple[Any, ...]:
    """Return what two operations of equal cost have in common: class, attributes and shapes."""
    return (
        operation.op,
        operation.target if operation.operands in TOLD_BY_TARGET else "",
        *sorted(telling_attributes(operation).items()),
        operation.macs,
        operation.output_elements,
        operation.input_elements,
    )


def telling_attributes(operation: Operation) -> dict[str, Attribute]:
    """Return the attributes on which the time of an operation depends."""
    return {name: value for name, value in operation.attributes.items() if name not in _IGNORED}


def distinct_operations(
    models: Sequence[tuple[nn.Module, tuple[torch.Tensor, ...]]],
) -> tuple[list[DistinctOperation], list[Operation]]:
    """Return the operations of models that can be timed, each once, and one of each other kind.

    Args:
        models: float models and inputs for them.

    Raises:
        CgmqError: a model cannot be prepared.
    """
    timed: dict[tuple[Any, ...], DistinctOperation] = {}
    others: dict[tuple[Any, ...], Operation] = {}
    for model, inputs in models:
        prepared = prepared_for_timing(model, inputs)
        for node in prepared.graph.nodes:
            if node not in deployed_nodes(prepared.graph):
                continue
            for operation in WORK.get(node):
                key = identity(operation)
                if key in timed:
                    found = timed[key]
                    timed[key] = DistinctOperation(
                        found.operation, found.template, found.output_shape, found.count + 1
                    )
                elif operation.op in TIMED_CLASSES and len(WORK.get(node)) == 1:
                    timed[key] = _distinct(prepared, node, operation)
                elif operation.macs:
                    others.setdefault(key, operation)
    return list(timed.values()), list(others.values())


def _distinct(prepared: PreparedModule, node: fx.Node, operation: Operation) -> DistinctOperation:
    target = prepared.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    args, kwargs = map_values(
        lambda item: _operand(prepared, item) if isinstance(item, fx.Node) else item,
        (node.args, dict(node.kwargs)),
    )
    output = first_tensor(VALUE.get(node))
    assert output is not None
    return DistinctOperation(operation, Template(target, args, kwargs), tuple(output.shape), 1)


def _operand(prepared: PreparedModule, node: fx.Node) -> Any:
    value = first_tensor(VALUE.get(node))
    source = node
    while is_quantizer(prepared, source) and source.args and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    return None if value is None else Operand(tuple(value.shape), source.op == "get_attr")


def map_values(function: Callable[[Any], Any], value: Any) -> Any:
    """Return nested arguments with `function` applied to what is in them."""
    if isinstance(value, tuple | list):
        return type(value)(map_values(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_values(function, item) for key, item in value.items()}
    return function(value)
