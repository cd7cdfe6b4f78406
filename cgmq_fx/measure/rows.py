"""Rows of a cost table from measurements: one for each operation, fitted ones for the others."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from cgmq_fx.cost.operation import Attribute, Operation
from cgmq_fx.cost.row import Row
from cgmq_fx.measure.fit import Fitted, fit
from cgmq_fx.measure.operations import TOLD_BY_TARGET, telling_attributes

#: Bit-widths of two operands.
Pair = tuple[int, int]
#: Widths up to this one run as integers, wider ones in float.
INTEGER_BITS = 8
_DIGITS = 4


@dataclass(frozen=True)
class Measured:
    """One operation at one pair of bit-widths.

    Attributes:
        operation: what was timed.
        pair: bit-widths of weight and activation, or of the two activations.
        cost: in the unit of the table.
        error: relative uncertainty.
    """

    operation: Operation
    pair: Pair
    cost: float
    error: float


def rows_of(measured: Sequence[Measured], trust: float = 0.0) -> list[Row]:
    """Return the rows that price what was measured, and by formulas what is like it.

    Args:
        measured: what was timed; an operation once for each pair of bit-widths.
        trust: least relative error of every row: how far whole networks were off.
    """
    by_shape: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    for item in measured:
        by_shape[item.operation.op, where_this(item.operation)].append(item)
    rows = [_exact_row(where, found, trust) for (_, where), found in by_shape.items()]
    return rows + _fitted_rows(measured, trust)


def where_this(operation: Operation) -> str:
    """Return the condition that an operation and those of its shape meet."""
    conditions = [_equals(name, value) for name, value in telling_attributes(operation).items()]
    if operation.operands in TOLD_BY_TARGET:
        conditions.append(_equals("target", operation.target))
    sizes = ("macs", "output_elements", "input_elements")
    conditions += [_equals(name, getattr(operation, name)) for name in sizes]
    return " and ".join(conditions)


def _equals(name: str, value: Attribute) -> str:
    if isinstance(value, bool):
        return name if value else f"not {name}"
    return f"{name} == {value}" if isinstance(value, int) else f"{name} == '{value}'"


def _exact_row(where: str, found: Sequence[Measured], trust: float) -> Row:
    operation = found[0].operation
    content: dict[str, Any] = {"op": operation.op, "where": where, "per": "call"}
    if operation.operands == "none":
        dearest = max(found, key=lambda item: item.cost)
        error = _rounded(max(trust, dearest.error))
        return Row(**content, cost=_rounded(dearest.cost), error=error)
    first, second = _axes(operation)
    content["grid"] = [
        {
            first: item.pair[-1 if operation.operands == "activation" else 0],
            second: item.pair[1],
            "cost": _rounded(item.cost),
            "error": _rounded(max(trust, item.error)),
        }
        for item in _of_own_widths(operation, found)
    ]
    return Row(**content)


def _of_own_widths(operation: Operation, found: Sequence[Measured]) -> Sequence[Measured]:
    """Return what differs in the operation's own widths: of one activation, the dearest of each."""
    if operation.operands != "activation":
        return found
    rising = sorted(found, key=lambda item: item.cost)
    return list({item.pair[1]: item for item in rising}.values())


def _axes(operation: Operation) -> tuple[str, str]:
    return ("lhs", "rhs") if operation.operands == "pair" else ("weight", "activation")


def _rounded(number: float) -> Fraction:
    return Fraction(f"{number:.{_DIGITS}g}")


# -- operations that were not timed -------------------------------------------------------------


def _fitted_rows(measured: Sequence[Measured], trust: float) -> list[Row]:
    groups: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    for item in measured:
        groups[item.operation.op, kind_of(item.operation)].append(item)
    return [_fitted_row(op, where, found, trust) for (op, where), found in groups.items()]


def kind_of(operation: Operation) -> str:
    """Return the condition of the operations that one formula prices together."""
    if operation.operands in TOLD_BY_TARGET:
        return _equals("target", operation.target)
    if operation.op.startswith("conv"):
        if operation.attributes["groups"] != 1:
            return "groups > 1"
        return f"groups == 1 and kernel_size {'==' if _is_pointwise(operation) else '>'} 1"
    return ""


def _is_pointwise(operation: Operation) -> bool:
    return operation.attributes["kernel_size"] == 1


def _fitted_row(op: str, where: str, found: Sequence[Measured], trust: float) -> Row:
    pairs = sorted({item.pair for item in found})
    fits = {pair: _fit([item for item in found if item.pair == pair]) for pair in pairs}
    content: dict[str, Any] = {
        "op": op,
        "where": where or None,
        "per": "call",
        "cost": {"formula": _formula(found[0].operation, fits)},
        "error": _rounded(max(trust, *(fitted.error for fitted in fits.values()))),
        "source": f"fitted to {len(found) // len(pairs)} measured operations of this kind; the "
        "error is that of operations left out of the fit: sum of errors by sum of times",
    }
    return Row(**content)


def _fit(found: Sequence[Measured]) -> Fitted:
    return fit([item.operation for item in found], [item.cost for item in found])


def _formula(operation: Operation, fits: Mapping[Pair, Fitted]) -> str:
    """Return one formula of the fits, each in its regime of bit-widths.

    The widest pair of integers speaks for all of them.
    """
    integer = [fitted.formula for pair, fitted in fits.items() if max(pair) <= INTEGER_BITS]
    wide = [fitted.formula for pair, fitted in fits.items() if max(pair) > INTEGER_BITS]
    if operation.operands == "none":  # of no bit-width: the dearer one
        return f"max({', '.join(dict.fromkeys(integer + wide))})" if fits else "0"
    if not integer or not wide:
        return (integer or wide)[-1]
    axes = _axes(operation)[1:] if operation.operands == "activation" else _axes(operation)
    widest = ", ".join(f"{axis}_bits" for axis in axes)
    widest = f"max({widest})" if len(axes) > 1 else widest
    switch = f"min(1, {widest} // {INTEGER_BITS + 1})"  # 0 where integers hold both, else 1
    return f"({integer[-1]}) * (1 - {switch}) + ({wide[-1]}) * {switch}"
