"""Drawn budgets, bit-widths and cost tables are valid, and what is said of them holds."""

import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import nn

from cgmq_fx.budget import Budget
from cgmq_fx.cost.load import load_table
from cgmq_fx.cost.monotone import CostTableWarning
from cgmq_fx.errors import BudgetError, UsageError
from cgmq_fx.prepare import prepare
from cgmq_fx.testing import bit_width_assignments, budgets, check_cost_table, cost_tables

FEW = settings(max_examples=25, deadline=None)
FOUND = settings(max_examples=300, deadline=None, database=None, phases=[Phase.generate])
INPUTS = (torch.randn(2, 2, 5, 5),)


def model():
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), depthwise, nn.Flatten(), nn.Linear(4, 3))


def network(budget="100%", **options):
    return prepare(model(), budget, example_inputs=INPUTS, **options)


@pytest.fixture(scope="module")
def prepared():
    return network({"bops": "100%", "weight_memory": "100%"})


def kinds(budget):
    """How a budget is written."""
    if isinstance(budget, Budget):
        return {"Budget"}
    if isinstance(budget, dict):
        return {"mapping"} | {kind for limit in budget.values() for kind in kinds(limit)}
    if isinstance(budget, str):
        return {"share" if "%" in budget else "amount" if " " in budget else "number as text"}
    return {type(budget).__name__}


def test_budgets_come_in_every_form():
    found = set()

    @settings(max_examples=200, database=None)
    @given(budgets())
    def collect(budget):
        Budget.parse(budget)
        found.update(kinds(budget))

    collect()
    expected = {"Budget", "mapping", "share", "amount", "number as text", "float", "Fraction"}
    assert found == expected


@FEW
@given(data=st.data())
def test_feasible_budgets_are_accepted(prepared, data):
    budget = data.draw(budgets(prepared, feasible=True))
    accounting = network(budget).plan.accounting
    for name, limit in accounting.limits.items():
        assert 0 < limit <= accounting.resources[name].reference * Fraction(100_001, 100_000)


@FEW
@given(data=st.data())
def test_infeasible_budgets_are_refused(prepared, data):
    budget = data.draw(budgets(prepared, feasible=False))
    with pytest.raises(BudgetError, match="floor"):
        network(budget)


def test_either_kind_is_drawn_where_none_is_asked_for(prepared):
    def is_accepted(budget):
        try:
            network(budget)
        except BudgetError:
            return False
        return True

    find(budgets(prepared), is_accepted, settings=FOUND)
    find(budgets(prepared), lambda budget: not is_accepted(budget), settings=FOUND)


@FEW
@given(data=st.data())
def test_assignments_are_allowed_and_in_order(prepared, data):
    bits = data.draw(bit_width_assignments(prepared))
    prepared.set_bit_widths(list(bits.values()))
    assert prepared.bit_widths == bits


def test_assignments_shrink_to_one_narrow_site(prepared):
    bits = find(
        bit_width_assignments(prepared),
        lambda bits: min(bits.values()) <= 4,
        settings=settings(database=None),
    )
    learned = {site.name for site in prepared.plan.accounting.sites if site.learned}
    assert sorted(bits[name] for name in learned)[:2] == [4, 32]


def test_what_cannot_be_drawn_is_refused():
    unpriced = prepare(model(), "100%")
    free = prepare(nn.ReLU(), "100%", example_inputs=INPUTS)
    with pytest.raises(UsageError, match="feasible=True needs the network"):
        budgets(feasible=True)
    for strategy in (budgets, bit_width_assignments):
        with pytest.raises(UsageError, match="not priced yet"):
            strategy(unpriced)
    with pytest.raises(UsageError, match="costs nothing"):
        budgets(free)


@FEW
@given(table=cost_tables(), data=st.data())
def test_monotone_tables_price_and_bound_a_network(table, data):
    check_cost_table(table)
    found = network(cost_table=table)
    budget = data.draw(budgets(found, feasible=True))
    network(budget, cost_table=table)


@FEW
@given(cost_tables(as_mapping=True))
def test_tables_are_drawn_as_mappings(mapping):
    assert load_table(mapping).to_json() == mapping


def falls(table):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_table(table.to_json())
    return any(issubclass(warning.category, CostTableWarning) for warning in caught)


def test_tables_that_fall_are_drawn_only_where_asked_for():
    find(cost_tables(monotone=False), falls, settings=FOUND)

    @settings(max_examples=100, database=None, deadline=None)
    @given(cost_tables())
    def never(table):
        assert not falls(table)

    never()


def test_tables_have_rows_of_every_kind():
    found = set()

    @settings(max_examples=100, database=None, deadline=None)
    @given(cost_tables())
    def collect(table):
        for row in table.rows:
            found.update({row.per, "grid" if row.grid else type(row.cost).__name__})
            found.add("where" if row.where else "always")

    collect()
    work = {"mac", "output_element", "input_element", "weight", "call"}
    assert found == work | {"grid", "Expression", "Fraction", "where", "always"}
