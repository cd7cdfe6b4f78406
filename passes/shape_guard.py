"""Refuses inputs of other shapes than those for which an exported graph is right."""

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cgmq_fx.errors import UnsupportedModelError

_SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_BINARY: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


class InexpressibleGuardError(Exception):
    """A guard of an exported program asks for more than sizes of its inputs."""


class ShapeGuard(nn.Module):
    """Holds the sizes that an export fixed, and the conditions on those it left open.

    Args:
        names: what the tensors are called, for the error.
        shapes: for each tensor the extent of each axis, None where it is open.
        conditions: expressions of integers over ``size_<tensor>_<axis>``.
    """

    _is_impure = True  # a guard has no readers

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[tuple[int | None, ...]],
        conditions: Sequence[str],
    ) -> None:
        super().__init__()
        self.names, self.shapes = tuple(names), tuple(shapes)
        self.conditions = tuple(conditions)

    def forward(self, *tensors: Tensor) -> None:
        """Check the shapes of `tensors`.

        Raises:
            UnsupportedModelError: the exported graph does not compute what the model does for them.
        """
        found = [tuple(tensor.shape) for tensor in tensors]
        for name, shape, wanted in zip(self.names, found, self.shapes, strict=True):
            fits = len(shape) == len(wanted) and all(
                extent is None or extent == size for size, extent in zip(shape, wanted, strict=True)
            )
            if not fits:
                text = ", ".join("any" if extent is None else str(extent) for extent in wanted)
                raise UnsupportedModelError(
                    f"input '{name}' has the shape {shape}, and the model was exported for "
                    f"({text}); call prepare again with example_inputs of this shape"
                )
        sizes = {
            f"size_{index}_{axis}": extent
            for index, shape in enumerate(found)
            for axis, extent in enumerate(shape)
        }
        for condition in self.conditions:
            if not evaluate(condition, sizes):
                given = ", ".join(
                    f"'{name}' {shape}" for name, shape in zip(self.names, found, strict=True)
                )
                raise UnsupportedModelError(
                    f"the inputs {given} take another path through the model than the exported one "
                    f"(it holds where {condition}); call prepare again with example_inputs of "
                    f"these shapes"
                )


def conditions_of(guards: Sequence[str]) -> list[str]:
    """Return the guards of an exported program as conditions of `ShapeGuard`.

    Raises:
        InexpressibleGuardError: a guard reads something else than sizes of input tensors.
    """
    conditions = [_SIZE.sub(r"size_\1_\2", guard) for guard in guards]
    for condition in conditions:
        names = set(re.findall(r"size_\d+_\d+", condition))
        try:
            evaluate(condition, dict.fromkeys(names, 2))
        except (KeyError, TypeError, SyntaxError) as error:
            raise InexpressibleGuardError(condition) from error
    return conditions


def evaluate(condition: str, sizes: Mapping[str, int]) -> Any:
    """Return the value of an expression of integers, comparisons, ``and``, ``or`` and ``not``."""
    return _value(ast.parse(condition, mode="eval").body, sizes)


def _value(node: ast.AST, sizes: Mapping[str, int]) -> Any:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, sizes)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, sizes)
        case ast.BoolOp(op=kind, values=parts):
            answers = (_value(part, sizes) for part in parts)
            return all(answers) if isinstance(kind, ast.And) else any(answers)
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _BINARY:
            return _BINARY[type(kind)](_value(left, sizes), _value(right, sizes))
        case ast.Compare(left=left, ops=kinds, comparators=rights):
            values = [_value(part, sizes) for part in (left, *rights)]
            return all(
                _BINARY[type(kind)](a, b)
                for kind, a, b in zip(kinds, values, values[1:], strict=False)
            )
        case _:
            raise TypeError(ast.dump(node))


def static_shape(tensor: Any) -> tuple[int | None, ...]:
    """Return the extents of a tensor of an exported program, None where the program has any."""
    return tuple(
        extent if isinstance(extent, int) else extent.node.maybe_as_int() for extent in tensor.shape
    )


def takes_one_sample(guard: ShapeGuard, tensors: Sequence[Tensor], batch_axis: int) -> bool:
    """Tell whether `guard` lets `tensors` through when their batch axis is cut to one sample."""
    samples = [torch.empty(tensor.shape, device="meta") for tensor in tensors]
    batch = samples[0].shape[batch_axis] if samples[0].dim() > batch_axis else None
    try:
        guard(
            *(
                sample.narrow(batch_axis, 0, 1)
                if sample.dim() > batch_axis and sample.shape[batch_axis] == batch
                else sample
                for sample in samples
            )
        )
    except UnsupportedModelError:
        return False
    return True
