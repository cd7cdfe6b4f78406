"""Formulas and predicates of cost tables: checked when read, evaluated exactly, never executed."""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal as Choice

from cgmq_fx.cost.syntax import FUNCTIONS, Apply, Literal, Name, Tree, canonical, fault, parse
from cgmq_fx.errors import CostTableError

Value = Fraction | bool | str
Kind = Choice["number", "bool", "text"]
NUMBER: Kind = "number"

MAX_POWER = 64
#: Numerator and denominator of every intermediate result stay below 2 to this power.
MAX_BITS = 2048

_ARITHMETIC: Mapping[str, Callable[[Fraction, Fraction], Fraction | int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
}
_COMPARE: Mapping[str, Callable[[Fraction, Fraction], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_FUNCTIONS: Mapping[str, Callable[[list[Fraction]], Fraction | int]] = {
    "min": min,
    "max": max,
    "ceil": lambda values: math.ceil(values[0]),
    "floor": lambda values: math.floor(values[0]),
    "abs": lambda values: abs(values[0]),
}


@dataclass(frozen=True)
class Expression:
    """A parsed formula or predicate; white space and needless brackets make no difference.

    Attributes:
        text: as written.
        tree: its syntax tree.
        variables: names of the variables in it.
    """

    text: str = field(compare=False)
    tree: Tree
    variables: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> "Expression":
        """Return the expression that `text` spells.

        Raises:
            CostTableError: not in the grammar of `cgmq_fx.cost.syntax`.
        """
        tree = parse(text)
        return cls(text, tree, frozenset(_names(tree)))

    def check(self, kinds: Mapping[str, Kind], wanted: Kind) -> None:
        """Check that the expression is of kind `wanted`, given the kinds of its variables.

        Raises:
            CostTableError: an operator is given what it cannot take, or the result is of another
                kind. Every variable must be in `kinds`.
        """
        found = _kind(self.text, self.tree, kinds)
        if found != wanted:
            fault(self.text, 1, f"the whole must be a {_called(wanted)}, it is a {_called(found)}")

    def evaluate(self, variables: Mapping[str, Value | int]) -> Value:
        """Return the exact value; integers in `variables` count as fractions.

        Raises:
            CostTableError: division by zero, or a number of absurd size.
        """
        return _evaluate(self.text, self.tree, variables)

    def number(self, variables: Mapping[str, Value | int]) -> Fraction:
        """Return the value of a formula."""
        value = self.evaluate(variables)
        if isinstance(value, (bool, str)):
            raise CostTableError(f"formula {self.text!r} gives {value!r}, not a number")
        return value

    @property
    def canonical(self) -> str:
        """The text in one fixed spacing."""
        return canonical(self.text)

    @property
    def conditions(self) -> tuple[Tree, ...]:
        """The conditions that hold together: the parts joined by ``and`` outside of brackets."""
        return tuple(_conjuncts(self.tree))


def _names(tree: Tree) -> Iterator[str]:
    if isinstance(tree, Name):
        yield tree.name
    elif isinstance(tree, Apply):
        for operand in tree.operands:
            yield from _names(operand)


def _conjuncts(tree: Tree) -> Iterator[Tree]:
    if isinstance(tree, Apply) and tree.operator == "and":
        for operand in tree.operands:
            yield from _conjuncts(operand)
    else:
        yield tree


def _called(kind: Kind) -> str:
    return {"number": "number", "bool": "condition", "text": "text"}[kind]


def _kind(text: str, tree: Tree, kinds: Mapping[str, Kind]) -> Kind:
    """Return the kind of `tree`, or raise the error for operands of the wrong kind."""
    if isinstance(tree, Literal):
        return _kind_of(tree.value)
    if isinstance(tree, Name):
        return kinds[tree.name]
    found = [_kind(text, operand, kinds) for operand in tree.operands]
    if tree.operator in ("and", "or", "not"):
        wanted: Kind = "bool"
    elif tree.operator in ("==", "!=", "in"):
        wanted = found[0]
    else:
        wanted = "number"
    for operand, kind in zip(tree.operands, found, strict=True):
        if kind != wanted:
            fault(
                text,
                operand.column,
                f"{tree.operator!r} needs a {_called(wanted)} here, found a {_called(kind)}",
            )
    if wanted == "number" and (tree.operator in _ARITHMETIC or tree.operator in _NUMERIC):
        return "number"
    return "bool"


_NUMERIC = frozenset({"unary -", "unary +", "**", *FUNCTIONS})


def _kind_of(value: Value) -> Kind:
    if isinstance(value, bool):
        return "bool"
    return "text" if isinstance(value, str) else "number"


def _evaluate(text: str, tree: Tree, variables: Mapping[str, Value | int]) -> Value:
    if isinstance(tree, Literal):
        return tree.value
    if isinstance(tree, Name):
        value = variables[tree.name]
        return value if isinstance(value, (bool, str, Fraction)) else Fraction(value)
    if tree.operator == "and":
        return all(_evaluate(text, operand, variables) for operand in tree.operands)
    if tree.operator == "or":
        return any(_evaluate(text, operand, variables) for operand in tree.operands)
    values = [_evaluate(text, operand, variables) for operand in tree.operands]
    if tree.operator == "not":
        return not values[0]
    if tree.operator == "in":
        return values[0] in values[1:]
    if tree.operator in ("==", "!="):
        return (values[0] == values[1]) is (tree.operator == "==")
    numbers: list[Fraction] = values  # type: ignore[assignment]  # `check` has seen to the kinds
    if tree.operator in _COMPARE:
        return _COMPARE[tree.operator](numbers[0], numbers[1])
    return _compute(text, tree, numbers)


def _compute(text: str, tree: Apply, numbers: list[Fraction]) -> Fraction:
    name = tree.operator
    if name in ("/", "//", "%") and numbers[1] == 0:
        fault(text, tree.column, f"{name!r} divides {numbers[0]} by zero")
    if name in _ARITHMETIC:
        result = Fraction(_ARITHMETIC[name](numbers[0], numbers[1]))
    elif name == "**":
        result = _power(text, tree, numbers[0], numbers[1])
    elif name in ("unary -", "unary +"):
        result = -numbers[0] if name == "unary -" else numbers[0]
    else:
        result = Fraction(_FUNCTIONS[name](numbers))
    if max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
        fault(text, tree.column, f"{name!r} gives a number of over {MAX_BITS} bits")
    return result


def _power(text: str, tree: Apply, base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > MAX_POWER:
        fault(
            text,
            tree.column,
            f"'**' takes whole exponents from -{MAX_POWER} to {MAX_POWER}, found {exponent}",
        )
    if base == 0 and exponent < 0:
        fault(text, tree.column, f"'**' divides by zero: 0 ** {exponent}")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size * abs(int(exponent)) > 2 * MAX_BITS:
        fault(text, tree.column, f"'**' gives a number of over {MAX_BITS} bits")
    return Fraction(base ** int(exponent))
