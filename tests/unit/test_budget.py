import copy
import json
import pickle
from decimal import Decimal
from fractions import Fraction

import pytest

from cgmq_fx.budget import Budget, Limit, resolve_resource
from cgmq_fx.errors import BudgetError

UNITS = {"bops": "BOP", "board": "ms", "chip": "us", "weight_memory": "byte", "npu": "cycle"}


def share_of(spec):
    ((name, limit),) = Budget(spec)
    assert name is None
    return limit.share


@pytest.mark.parametrize(
    "spec", ["0.5%", "0.5 %", " .5% ", 0.005, Decimal("0.005"), Fraction(1, 200), "0.005"]
)
def test_shares_are_exact(spec):
    assert share_of(spec) == Fraction(1, 200)


def test_half_is_fifty_percent():
    assert share_of(0.5) == Fraction(1, 2)
    assert str(Budget(0.5).limits[0][1]) == "50 %"


@pytest.mark.parametrize("spec", [1, 1.0, "100%"])
def test_everything_is_a_share(spec):
    assert share_of(spec) == 1


def test_amounts():
    ((_, limit),) = Budget("64 KiB")
    assert limit == Limit(value=Fraction(64), unit="KiB")
    assert limit.amount(Fraction(1), "byte") == 65536
    assert Budget("3 ms").limits[0][1].amount(Fraction(1), "us") == 3000
    assert Budget("0.5%").limits[0][1].amount(Fraction(400), "us") == 2


def test_amount_in_another_dimension_is_refused():
    with pytest.raises(BudgetError, match="budget '3 ms' cannot bound a cost counted in 'BOP'"):
        Budget("3 ms").limits[0][1].amount(Fraction(1), "BOP")


def test_several_resources():
    budget = Budget({"bops": "0.5%", "weight_memory": "64 KiB"}, latency="3 ms")
    assert [name for name, _ in budget] == ["bops", "weight_memory", "latency"]
    assert repr(Budget(latency="3 ms")) == "Budget({'latency': '3 ms'})"
    assert eval(repr(Budget("0.5%"))) == Budget(0.005)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (50, r"budget 50 is a bare number above 1: write '50%'.* or '50 MBOP'"),
        (1.5, r"budget 1.5 is a bare number above 1: write '1.5%'"),
        ("50", r"budget '50' is a bare number above 1: write '50%'"),
        ("0.5 %%", r"budget '0.5 %%' cannot be read"),
        ("%", r"budget '%' cannot be read.*write a share"),
        ("150%", r"budget '150%' is above 100% of the reference"),
        (-0.1, r"budget -0.1 must be above zero.*'0.5%' or 0.005"),
        ("-3 ms", r"budget '-3 ms' must be above zero"),
        (0, r"budget 0 must be above zero"),
        ("0%", r"budget '0%' must be above zero"),
        (float("nan"), r"budget nan is not a finite number"),
        (float("inf"), r"budget inf is not a finite number"),
        ("nan", r"budget 'nan' cannot be read"),
        (True, r"budget True is of type bool"),
        (None, r"budget None is of type NoneType"),
        ([0.5], r"budget \[0.5\] is of type list"),
        ("", r"budget '' cannot be read"),
        ("5 parsec", r"unknown unit 'parsec'"),
        ("12 mbop", r"did you mean 'MBOP'"),
        ({}, r"the budget is empty; write a share"),
        ({"": "1%"}, r"resource '': a resource name is a text"),
        ({3: "1%"}, r"resource 3: a resource name is a text"),
    ],
)
def test_malformed(spec, message):
    with pytest.raises(BudgetError, match=message):
        Budget(spec)


def test_no_budget_at_all():
    with pytest.raises(BudgetError, match="the budget is empty"):
        Budget()


def test_all_faults_at_once():
    with pytest.raises(BudgetError, match=r"'bops': budget 7 .*resource 'x': budget '1 z'"):
        Budget({"bops": 7, "x": "1 z"})


def test_given_twice():
    with pytest.raises(BudgetError, match="resource 'bops': given twice"):
        Budget({"bops": 0.1}, bops=0.2)


def test_parse_and_values():
    budget = Budget("0.5%")
    assert Budget.parse(budget) is budget
    assert Budget.parse(0.005) == budget == Budget(budget)
    assert len({budget, Budget(0.005)}) == 1
    assert copy.deepcopy(budget) == budget == pickle.loads(pickle.dumps(budget))
    with pytest.raises(AttributeError):
        budget.limits = ()


@pytest.mark.parametrize("spec", ["0.5%", {"a": Fraction(1, 3), "b": "64 KiB", "c": "0.1 uJ"}])
def test_json_round_trip(spec):
    budget = Budget(spec)
    assert Budget.from_json(json.loads(json.dumps(budget.to_json()))) == budget


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"limits": [{"resource": None}]},
        {"limits": [{"resource": None, "share": "1/0"}]},
        {"limits": [{"resource": None, "value": "1", "unit": "parsec"}]},
    ],
)
def test_malformed_json(data):
    with pytest.raises(BudgetError, match=r"stored budget .* is malformed"):
        Budget.from_json(data)


@pytest.mark.parametrize(
    ("name", "default", "table"),
    [
        ("bops", None, "bops"),
        ("cycles", None, "npu"),
        ("memory", None, "weight_memory"),
        ("latency", "chip", "chip"),
        (None, "board", "board"),
    ],
)
def test_resolve(name, default, table):
    assert resolve_resource(name, UNITS, default) == table


def test_resolve_single_table_without_name():
    assert resolve_resource(None, {"npu": "cycle"}) == "npu"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bosp", r"unknown resource 'bosp' \(did you mean 'bops'\?\); known: 'board' \(ms\)"),
        ("latency", r"'latency' means a table that counts time, and 'board' and 'chip' do;"),
        ("energy", r"'energy' means a table that counts energy, and no table does"),
        (None, r"without a resource name needs one cost table; known: 'board'"),
    ],
)
def test_resolve_refuses(name, message):
    with pytest.raises(BudgetError, match=message):
        resolve_resource(name, UNITS)


def test_resolve_budget():
    budget = Budget({"weight_memory": "64 KiB"}, energy="20 uJ")
    limits = budget.resolve({"horowitz": "pJ", "weight_memory": "byte"})
    assert limits["horowitz"].amount(Fraction(1), "pJ") == 20_000_000
    assert list(limits) == ["weight_memory", "horowitz"]


def test_two_names_for_one_table():
    with pytest.raises(BudgetError, match=r"'bops' and .no name. both mean .* table 'bops'"):
        Budget({"bops": 0.1, None: 0.2}).resolve(UNITS, "bops")
