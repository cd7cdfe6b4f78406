"""The value of a formula by Python's own parser: nothing of the library's parser is used."""

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "ceil": math.ceil,
    "floor": math.floor,
    "abs": abs,
}


def evaluate(text: str, variables: Mapping[str, Any]) -> Any:
    """Return the exact value of `text`, with whole numbers and fractions for numbers."""
    lowered = re.sub(r"\b(true|false)\b", lambda match: match.group().capitalize(), text)
    return _value(ast.parse(lowered, mode="eval").body, lowered, variables)


def _value(tree: ast.expr, text: str, variables: Mapping[str, Any]) -> Any:
    def value(part: ast.expr) -> Any:
        return _value(part, text, variables)

    match tree:
        case ast.Constant(value=constant):
            is_number = isinstance(constant, int | float) and not isinstance(constant, bool)
            # The digits as written: a float would have been rounded already.
            return Fraction(ast.get_source_segment(text, tree) or "") if is_number else constant
        case ast.Name(id=name):
            found = variables[name]
            return found if isinstance(found, bool | str) else Fraction(found)
        case ast.BinOp(left=left, op=op, right=right):
            return Fraction(_BINARY[type(op)](value(left), value(right)))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not value(operand)
        case ast.UnaryOp(op=op, operand=operand):
            return -value(operand) if isinstance(op, ast.USub) else value(operand)
        case ast.BoolOp(op=op, values=parts):
            combine = all if isinstance(op, ast.And) else any
            return combine(value(part) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            values = [value(part) for part in (left, *comparators)]
            pairs = zip(ops, values, values[1:], strict=False)
            return all(_COMPARE[type(op)](first, second) for op, first, second in pairs)
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return [value(part) for part in parts]
        case ast.Call(func=ast.Name(id=name), args=args):
            return Fraction(_FUNCTIONS[name](*map(value, args)))
    raise AssertionError(f"not known here: {ast.dump(tree)}")
