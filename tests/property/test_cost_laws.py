import string
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cgmq_fx.budget import Budget
from cgmq_fx.cost.expression import Expression
from cgmq_fx.cost.grid import WEIGHT_AXES, Grid, GridEntry
from cgmq_fx.cost.load import get_table, load_table
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.cost.totals import price
from cgmq_fx.errors import BudgetError, CostTableError
from cost_cases import WIDTHS, bind, conv, linear, matmul


def refusal(error_type, function, argument):
    """Return the message with which `function` refuses `argument`, None if it takes it."""
    try:
        function(argument)
    except error_type as error:
        return str(error)
    return None


BITS = st.integers(1, 32)
SITES = 4
INDEX = st.lists(st.integers(0, len(WIDTHS) - 1), min_size=SITES, max_size=SITES)
SOURCE = st.one_of(st.integers(0, SITES - 1).map("s{}".format), BITS.map(str))


@st.composite
def networks(draw):
    kinds = draw(st.lists(st.sampled_from([conv, linear, matmul]), min_size=1, max_size=8))
    return [
        bind(kind(f"op{i}", draw(st.integers(0, 10**9))), draw(SOURCE), draw(SOURCE))
        for i, kind in enumerate(kinds)
    ]


@st.composite
def grids(draw):
    pairs = draw(st.sets(st.tuples(BITS, BITS), min_size=1, max_size=8))
    pairs.add((max(first for first, _ in pairs), max(second for _, second in pairs)))
    costs = st.fractions(0, 100, max_denominator=100)
    return Grid(WEIGHT_AXES, tuple(sorted(GridEntry(*pair, draw(costs)) for pair in pairs)))


@st.composite
def tables(draw):
    shares = [draw(st.integers(1, 7)) for _ in range(3)]
    rows = [
        Row(
            op="conv2d", per="mac", cost={"formula": f"weight_bits * activation_bits / {shares[0]}"}
        ),
        Row(op="linear", per="mac", cost={"formula": f"ceil(weight_bits / {shares[1]})"}),
        Row(op="matmul", per="mac", cost={"formula": f"max(lhs_bits, rhs_bits) / {shares[2]}"}),
        Row(op="conv2d", per="mac", where="kernel_size == 1", cost=draw(st.integers(0, 9))),
    ]
    return CostTable("t", "cycle", tuple(draw(st.permutations(rows))))


@given(networks(), tables(), INDEX)
def test_total_equals_the_sum_of_single_costs(operations, table, index):
    resource = price(operations, table, SITES, WIDTHS)
    expected = []
    for bound in operations:
        bits = [
            source.bits if source.site is None else WIDTHS[index[source.site]]
            for source in bound.sources
        ]
        expected.append(table.cost(bound.operation, tuple(bits)))
    assert resource.costs(index) == expected
    assert resource.total(torch.tensor(index)) == sum(expected)


@given(networks(), tables(), INDEX, st.integers(0, SITES - 1), st.integers(0, len(WIDTHS) - 1))
def test_delta_and_monotony(operations, table, index, site, to):
    resource = price(operations, table, SITES, WIDTHS)
    moved = [*index[:site], to, *index[site + 1 :]]
    change = resource.total(moved) - resource.total(index)
    assert resource.delta(site, to, index) == change
    assert change == 0 or (change > 0) == (to > index[site])


@given(networks(), tables(), INDEX, st.data())
def test_floor_is_reached_and_lowest(operations, table, index, data):
    resource = price(operations, table, SITES, WIDTHS)
    widths = st.lists(st.sampled_from(WIDTHS), min_size=1, unique=True)
    allowed = [tuple(data.draw(widths)) for _ in range(SITES)]
    lowest = resource.lowest(allowed)
    assert resource.total_scaled(lowest.width_index) == lowest.scaled
    chosen = [
        WIDTHS.index(choices[i % len(choices)]) for i, choices in zip(index, allowed, strict=True)
    ]
    assert resource.total_scaled(chosen) >= lowest.scaled
    assert all(WIDTHS[i] in choices for i, choices in zip(lowest.width_index, allowed, strict=True))


@given(networks(), tables(), st.randoms(use_true_random=False))
def test_order_of_rows_never_matters(operations, table, rng):
    rows = list(table.rows)
    rng.shuffle(rows)
    shuffled = CostTable("t", "cycle", tuple(rows))
    assert shuffled.digest == table.digest
    for bound in operations:
        assert shuffled.row_for(bound.operation) == table.row_for(bound.operation)


@given(grids(), BITS, BITS)
def test_containment(grid, first, second):
    entry = grid.entry(first, second)
    containing = [one for one in grid.entries if one.first >= first and one.second >= second]
    assert (entry is None) == (not containing)
    if entry is None:
        return
    assert entry in containing
    smaller = [
        one
        for one in containing
        if one != entry and entry.first >= one.first and entry.second >= one.second
    ]
    assert not smaller, "no listed pair that contains it lies inside the one that is charged"
    if any((one.first, one.second) == (first, second) for one in grid.entries):
        assert (entry.first, entry.second) == (first, second), "a listed pair costs what is listed"


@given(grids())
def test_listed_widths_always_have_a_price(grid):
    assert grid.missing_corner() is None
    for first in grid.widths(0):
        for second in grid.widths(1):
            assert grid.entry(first, second) is not None
    assert all(grid.widest().contains(one.first, one.second) for one in grid.entries)


FRAGMENTS = st.lists(
    st.sampled_from(
        [
            "1",
            "2.5",
            "1e9",
            "x",
            "y",
            "(",
            ")",
            "+",
            "-",
            "*",
            "/",
            "//",
            "%",
            "**",
            "==",
            "!=",
            "<",
            "<=",
            "and",
            "or",
            "not",
            "in",
            "[",
            "]",
            ",",
            "min",
            "max",
            "ceil",
            "'a'",
            "true",
        ]
    ),
    max_size=25,
).map(" ".join)


@given(st.one_of(st.text(max_size=80), st.text(string.printable, max_size=80), FRAGMENTS))
def test_parser_raises_its_own_error_only(text):
    try:
        expression = Expression.parse(text)
        expression.check(dict.fromkeys(expression.variables, "number"), "number")
        value = expression.evaluate(
            {"x": 3, "y": Fraction(-1, 2)} | dict.fromkeys(expression.variables - {"x", "y"}, 0)
        )
    except CostTableError:
        return
    assert isinstance(value, Fraction)


ARITHMETIC = st.recursive(
    st.sampled_from(["x", "y", "Fraction_2", "Fraction_7"]),
    lambda inner: st.builds(
        "({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner
    ),
    max_leaves=8,
)


@given(ARITHMETIC)
def test_arithmetic_agrees_with_python(text):
    names = {
        "x": Fraction(3),
        "y": Fraction(-1, 2),
        "Fraction_2": Fraction(2),
        "Fraction_7": Fraction(7),
    }
    try:
        wanted = eval(text, {"__builtins__": {}}, names)
    except ZeroDivisionError:
        with pytest.raises(CostTableError, match="by zero"):
            Expression.parse(text).evaluate(names)
        return
    assert Expression.parse(text).evaluate(names) == wanted


MUTATED = get_table("bops").to_json()


@given(st.data())
def test_mutated_tables_load_or_are_refused(data):
    """Replace one value anywhere in a sound table by another value, or a key by another key."""
    table = load_table(MUTATED).to_json()
    place, keys = table, list(table)
    while True:
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and data.draw(st.booleans()):
            place, keys = inner, list(inner) if isinstance(inner, dict) else range(len(inner))
            continue
        break
    odd = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-1, 99),
        st.floats(),
        st.text(max_size=9),
        st.just([]),
        st.just({}),
        st.just([{}]),
        st.just({"formula": "weight_bits / lhs_bits"}),
    )
    if isinstance(place, dict) and data.draw(st.booleans()):
        place[data.draw(st.text(max_size=6))] = place.pop(key)
    else:
        place[key] = data.draw(odd)
    message = refusal(CostTableError, load_table, table)
    assert message is None or "cost table" in message


TOML = "\n".join(
    ['name = "t"', 'unit = "BOP"', "[[row]]", 'op = "linear"', 'per = "mac"', "cost = 1", ""]
)


@given(st.integers(0, len(TOML)), st.integers(0, 6), st.text(string.printable, max_size=6))
def test_mutated_toml_text_loads_or_is_refused(tmp_path_factory, start, length, inserted):
    path = tmp_path_factory.mktemp("tables") / "t.toml"
    text = TOML[:start] + inserted + TOML[start + length :]
    path.write_text(text, encoding="utf-8", newline="")
    message = refusal(CostTableError, load_table, path)
    assert message is None or str(path) in message


@given(st.one_of(st.text(max_size=20), st.floats(), st.integers(), st.fractions(), st.none()))
def test_budgets_are_read_or_refused(value):
    message = refusal(BudgetError, Budget, value)
    if message is not None:
        assert repr(value) in message
        return
    ((_, limit),) = Budget(value)
    amount = limit.share if limit.share is not None else limit.value
    assert amount > 0
    assert Budget.from_json(Budget(value).to_json()) == Budget(value)
