"""The grammar of formulas and predicates: text in, syntax tree out. Nothing is ever executed.

or_test    : and_test ("or" and_test)*
and_test   : not_test ("and" not_test)*
not_test   : "not" not_test | comparison
comparison : sum (("==" | "!=" | "<" | "<=" | ">" | ">=") sum)* | sum ["not"] "in" list
list       : "(" sum ("," sum)* ")" | "[" sum ("," sum)* "]"
sum        : term (("+" | "-") term)*
term       : unary (("*" | "/" | "//" | "%") unary)*
unary      : ("-" | "+") unary | power
power      : primary ["**" unary]
primary    : number | text | "true" | "false" | "(" or_test ")"
           | name | name "(" sum ("," sum)* ")"
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import NoReturn

from cgmq_fx.errors import CostTableError, UsageError
from cgmq_fx.units import exact

MAX_LENGTH = 1000
MAX_NESTING = 20
MAX_HEIGHT = 100

#: Functions of numbers, with the smallest and largest number of arguments.
FUNCTIONS = {"min": (1, 16), "max": (1, 16), "ceil": (1, 1), "floor": (1, 1), "abs": (1, 1)}
_COMPARISONS = ("==", "!=", "<=", ">=", "<", ">")
_WORDS = ("and", "or", "not", "in", "true", "false", "True", "False")
_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<text>"[^"\n]*"|'[^'\n]*')
      | (?P<symbol>\*\*|//|==|!=|<=|>=|[-+*/%<>(),\[\]])""",
    re.VERBOSE | re.ASCII,
)


@dataclass(frozen=True)
class Literal:
    """A number, a text or a truth value."""

    value: Fraction | str | bool
    column: int = field(compare=False)


@dataclass(frozen=True)
class Name:
    """A variable."""

    name: str
    column: int = field(compare=False)


@dataclass(frozen=True)
class Apply:
    """An arithmetic operator, a comparison, ``in``, ``and``, ``or``, ``not`` or a function."""

    operator: str
    operands: tuple["Tree", ...]
    column: int = field(compare=False)
    height: int = field(compare=False, default=1)


Tree = Literal | Name | Apply


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    column: int


def parse(text: str) -> Tree:
    """Return the syntax tree of `text`.

    Raises:
        CostTableError: not in the grammar; the message has the column and what was expected.
    """
    if len(text) > MAX_LENGTH:
        raise CostTableError(f"it has {len(text)} characters; at most {MAX_LENGTH} are read")
    return _Parser(text).parse()


def _tokens(text: str) -> list[_Token]:
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            fault(text, position + 1, f"character {text[position]!r} means nothing here")
        if match.lastgroup != "space":
            tokens.append(_Token(match.lastgroup or "", match.group(), position + 1))
        position = match.end()
    return [*tokens, _Token("end", "", len(text) + 1)]


def canonical(text: str) -> str:
    """Return `text` with one space between its tokens."""
    return " ".join(token.text for token in _tokens(text)).strip()


def fault(text: str, column: int, what: str) -> NoReturn:
    """Raise the error for a fault of `text` at `column` (the first column is 1)."""
    raise CostTableError(f"column {column} of {text!r}: {what}")


class _Parser:
    """Recursive descent with one token of look-ahead."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _tokens(text)
        self.position = 0
        self.nesting = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.position]

    def accept(self, *texts: str) -> _Token | None:
        token = self.token
        if token.kind in ("symbol", "name") and token.text in texts:
            self.position += 1
            return token
        return None

    def expect(self, text: str) -> None:
        if self.accept(text) is None:
            self.unexpected(repr(text))

    def unexpected(self, wanted: str) -> NoReturn:
        found = repr(self.token.text) if self.token.text else "the end"
        fault(self.text, self.token.column, f"expected {wanted}, found {found}")

    def apply(self, operator: str, operands: tuple[Tree, ...], column: int) -> Apply:
        height = 1 + max(item.height if isinstance(item, Apply) else 0 for item in operands)
        if height > MAX_HEIGHT:
            fault(self.text, column, f"over {MAX_HEIGHT} operators in a chain; split it")
        return Apply(operator, operands, column, height)

    def nested(self, rule: Callable[[], Tree]) -> Tree:
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            fault(self.text, self.token.column, f"nested deeper than {MAX_NESTING}; split it")
        tree = rule()
        self.nesting -= 1
        return tree

    def parse(self) -> Tree:
        tree = self.or_test()
        if self.token.kind != "end":
            self.unexpected("an operator or the end")
        return tree

    def joined(self, word: str, rule: Callable[[], Tree]) -> Tree:
        column = self.token.column
        operands = [rule()]
        while self.accept(word):
            operands.append(rule())
        return operands[0] if len(operands) == 1 else self.apply(word, tuple(operands), column)

    def or_test(self) -> Tree:
        return self.joined("or", self.and_test)

    def and_test(self) -> Tree:
        return self.joined("and", self.not_test)

    def not_test(self) -> Tree:
        if token := self.accept("not"):
            return self.apply("not", (self.nested(self.not_test),), token.column)
        return self.comparison()

    def comparison(self) -> Tree:
        left = self.sum()
        if (token := self.accept("not")) is not None:
            self.expect("in")
            return self.apply("not", (self.membership(left, token.column),), token.column)
        if (token := self.accept("in")) is not None:
            return self.membership(left, token.column)
        links: list[Tree] = []
        while token := self.accept(*_COMPARISONS):
            right = self.sum()
            links.append(self.apply(token.text, (left, right), token.column))
            left = right
        if not links:
            return left
        return links[0] if len(links) == 1 else self.apply("and", tuple(links), self.token.column)

    def membership(self, item: Tree, column: int) -> Tree:
        opening = self.accept("(", "[")
        if opening is None:
            self.unexpected("a list such as (1, 3)")
        choices = self.listed()
        self.expect(")" if opening.text == "(" else "]")
        return self.apply("in", (item, *choices), column)

    def listed(self) -> list[Tree]:
        items = [self.nested(self.sum)]
        while self.accept(","):
            items.append(self.nested(self.sum))
        return items

    def chain(self, symbols: tuple[str, ...], rule: Callable[[], Tree]) -> Tree:
        left = rule()
        while token := self.accept(*symbols):
            left = self.apply(token.text, (left, rule()), token.column)
        return left

    def sum(self) -> Tree:
        return self.chain(("+", "-"), self.term)

    def term(self) -> Tree:
        return self.chain(("*", "/", "//", "%"), self.unary)

    def unary(self) -> Tree:
        if token := self.accept("-", "+"):
            return self.apply(f"unary {token.text}", (self.nested(self.unary),), token.column)
        return self.power()

    def power(self) -> Tree:
        base = self.primary()
        if token := self.accept("**"):
            return self.apply("**", (base, self.nested(self.unary)), token.column)
        return base

    def primary(self) -> Tree:
        token = self.token
        if token.kind == "number":
            self.position += 1
            return Literal(self.number(token), token.column)
        if token.kind == "text":
            self.position += 1
            return Literal(token.text[1:-1], token.column)
        if self.accept("("):
            inner = self.nested(self.or_test)
            self.expect(")")
            return inner
        if self.accept("true", "false", "True", "False"):
            return Literal(token.text in ("true", "True"), token.column)
        if token.kind == "name" and token.text not in _WORDS:
            self.position += 1
            return self.call(token) if self.accept("(") else Name(token.text, token.column)
        self.unexpected("a number, a variable, a text or '('")

    def number(self, token: _Token) -> Fraction:
        try:
            return exact(Decimal(token.text))
        except (UsageError, ArithmeticError) as error:
            fault(self.text, token.column, f"number {token.text} cannot be used: {error}")

    def call(self, token: _Token) -> Tree:
        if token.text not in FUNCTIONS:
            fault(
                self.text,
                token.column,
                f"unknown function {token.text!r}; functions: {', '.join(FUNCTIONS)}",
            )
        arguments = self.listed()
        self.expect(")")
        least, most = FUNCTIONS[token.text]
        if not least <= len(arguments) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            fault(
                self.text,
                token.column,
                f"{token.text}() takes {wanted} arguments, {len(arguments)} were given",
            )
        return self.apply(token.text, tuple(arguments), token.column)
