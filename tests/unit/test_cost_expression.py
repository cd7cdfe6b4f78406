from fractions import Fraction

import pytest

from cgmq_fx.cost.expression import Expression
from cgmq_fx.errors import CostTableError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("2 - 3 - 4", -5),
        ("7 / 2 / 2", Fraction(7, 4)),
        ("-2 ** 2", -4),
        ("2 ** -2", Fraction(1, 4)),
        ("2 ** 3 ** 2", 512),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("7 // 2 + -7 // 2", -1),
        ("-7 % 3", 2),
        ("+x * -x", -9),
        ("min(x, 5, 7) + max(1)", 4),
        ("ceil(7 / 2) + floor(-1 / 2) + abs(-1/2)", Fraction(7, 2)),
        ("1e3 * .5", 500),
        ("x == 3", True),
        ("x != 3", False),
        ("1 < x <= 3", True),
        ("1 < x < 3", False),
        ("not x > 3 and flag", True),
        ("x > 5 or x < 4 and not false", True),
        ("x in (1, 3)", True),
        ("x not in [1, 3]", False),
        ("word in ('qk', \"pv\")", True),
        ("word == 'pv'", False),
        ("(x == 3) == flag", True),
        ("x == 3 or 1 / 0 > 1", True),
        ("x != 3 and 1 / 0 > 1", False),
    ],
)
def test_values(text, value):
    assert Expression.parse(text).evaluate({"x": 3, "flag": True, "word": "qk"}) == value


def test_variables_and_conditions():
    expression = Expression.parse("a > 1 and (b == c or max(a, d) < 2) and e")
    assert expression.variables == {"a", "b", "c", "d", "e"}
    assert len(expression.conditions) == 3


def test_equal_up_to_spacing_and_brackets():
    assert Expression.parse("a*b +1") == Expression.parse("((a  *  b) + 1)")
    assert Expression.parse("a + 1") != Expression.parse("1 + a")
    assert Expression.parse("a*b +1").canonical == "a * b + 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 +", r"column 4 of '1 \+': expected a number, a variable.*found the end"),
        ("a b", r"column 3 of 'a b': expected an operator or the end, found 'b'"),
        ("(1", r"column 3 .*: expected '\)', found the end"),
        ("a = 1", r"column 3 .*: character '=' means nothing here"),
        ("x.y", r"column 2 .*: character '\.' means nothing"),
        ("__import__('os')", r"column 1 .*: unknown function '__import__'; functions: min, max"),
        ("min()", r"column 5 .*: expected a number"),
        ("ceil(1, 2)", r"ceil\(\) takes 1 arguments, 2 were given"),
        ("x in 3", r"column 6 .*: expected a list such as \(1, 3\), found '3'"),
        ("x not 3", r"column 7 .*: expected 'in', found '3'"),
        ("and", r"found 'and'"),
        ("'open", r"column 1 .*means nothing"),
        ("1e99", r"number 1e99 cannot be used"),
        ("", r"found the end"),
        ("(" * 30 + "1" + ")" * 30, r"nested deeper than 20"),
        ("-" * 30 + "1", r"nested deeper than 20"),
        ("not " * 30 + "true", r"nested deeper than 20"),
        ("1" + "+1" * 200, r"over 100 operators in a chain"),
        ("1" * 2000, r"it has 2000 characters; at most 1000"),
    ],
)
def test_syntax_errors_have_a_column(text, message):
    with pytest.raises(CostTableError, match=message):
        Expression.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / (x - 3)", r"column 3 .*'/' divides 1 by zero"),
        ("1 // (x - 3)", r"'//' divides 1 by zero"),
        ("1 % (x - 3)", r"'%' divides 1 by zero"),
        ("(x - 3) ** -1", r"'\*\*' divides by zero"),
        ("2 ** 65", r"whole exponents from -64 to 64, found 65"),
        ("2 ** (1/2)", r"found 1/2"),
        ("((2 ** 64) ** 64) ** 64", r"over 2048 bits"),
        ("(2 ** 64) ** 33", r"over 2048 bits"),
    ],
)
def test_arithmetic_errors(text, message):
    with pytest.raises(CostTableError, match=message):
        Expression.parse(text).evaluate({"x": 3})


@pytest.mark.parametrize(
    ("text", "wanted", "message"),
    [
        ("x + flag", "number", r"column 5 .*'\+' needs a number here, found a condition"),
        ("x and flag", "bool", r"column 1 .*'and' needs a condition here, found a number"),
        ("word < 3", "bool", r"'<' needs a number here, found a text"),
        ("word == 3", "bool", r"'==' needs a text here, found a number"),
        ("flag == 1", "bool", r"'==' needs a condition here, found a number"),
        ("x in (1, 'a')", "bool", r"'in' needs a number here, found a text"),
        ("max(x, word)", "number", r"'max' needs a number here, found a text"),
        ("x > 1", "number", r"the whole must be a number, it is a condition"),
        ("x", "bool", r"the whole must be a condition, it is a number"),
    ],
)
def test_kinds_are_checked_before_use(text, wanted, message):
    kinds = {"x": "number", "flag": "bool", "word": "text"}
    with pytest.raises(CostTableError, match=message):
        Expression.parse(text).check(kinds, wanted)


def test_number_refuses_a_condition():
    with pytest.raises(CostTableError, match="gives True, not a number"):
        Expression.parse("x > 1").number({"x": 3})
