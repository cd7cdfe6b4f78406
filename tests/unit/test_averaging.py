"""Pools and means that a table prices by the bit-width of what they read."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from cgmq_fx.cost.load import load_table
from cgmq_fx.cost.monotone import CostTableWarning
from cgmq_fx.cost.operation import Operation
from cgmq_fx.errors import CostTableError
from cgmq_fx.explain import explain
from cgmq_fx.export import export
from cgmq_fx.ledger import ledger
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from cgmq_fx.report import report
from cgmq_fx.verify import verify

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
READ = 8 * 6 * 6  # elements that the mean or the pool reads of each sample


class Averaged(nn.Module):
    def __init__(self, average):
        super().__init__()
        self.conv, self.head, self.average = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), average

    def forward(self, x):
        return self.head(self.average(torch.relu(self.conv(x))).flatten(1))


AVERAGES = {
    "pool": nn.AdaptiveAvgPool2d(1),
    "function": lambda x: nn.functional.adaptive_avg_pool2d(x, 1),
    "method": lambda x: x.mean((2, 3)),
    "sum": lambda x: torch.sum(x, (2, 3)),
}


def table(**row):
    content = {"op": ["avg_pool", "reduce"], "per": "input_element"}
    row = row or {"cost": {"formula": "activation_bits"}}
    return {"name": "averages", "unit": "bit", "unpriced": "zero", "row": [{**content, **row}]}


def prepared(average="pool", budget=None, prices=None, **options):
    torch.manual_seed(0)
    return prepare(
        Averaged(AVERAGES[average]),
        budget or {"bops": "100%", "averages": "100%"},
        example_inputs=(X,),
        cost_table=["bops", table() if prices is None else prices],
        widths=(4, 8, 32),
        **options,
    ).eval()


def fixed_at(made, bits):
    with torch.no_grad():
        made(X)
        made.set_bit_widths([bits if site.learned else site.allowed[0]
                             for site in made.plan.accounting.sites])  # fmt: skip
        made(X)
    return lower(made, allow_untrained=True)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_what_is_averaged_has_a_quantizer_and_costs_its_bits(average, bits):
    fixed = fixed_at(prepared(average), bits)
    (row,) = (row for row in report(fixed).rows if row.cost["averages"])
    assert (row.weight_bits, row.activation_bits, row.status) == (None, bits, "quantized")
    assert row.cost["averages"] == bits * READ


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx", ".pt2"])
def test_files_say_the_same(suffix, tmp_path):
    fixed = fixed_at(prepared(), 8)
    path = export(fixed, tmp_path / f"model{suffix}", example_inputs=(X,))
    assert str(verify(path)) == str(report(fixed))


def test_a_budget_on_averages_is_met_by_their_bits_alone():
    made = prepared(budget={"bops": "100%", "averages": "13%"})
    site = next(iter(set(made.bit_widths) & {"relu"}))
    assert made.plan.accounting.limits["averages"] < 8 * READ
    with torch.no_grad():
        made(X)
    assert lower(made, allow_untrained=True).bit_widths[site] == 4


@pytest.mark.parametrize("prices", [table(cost=3), {"name": "averages", "unit": "bit", "row": [
    {"op": "conv2d", "per": "mac", "cost": {"formula": "weight_bits"}},
    {"op": "linear", "per": "mac", "cost": 1}]}], ids=["a number", "no row"])  # fmt: skip
def test_without_a_price_by_bits_there_is_no_quantizer(prices):
    made = prepared(prices=prices)
    assert "relu" not in made.bit_widths
    (row,) = (row for row in report(made).rows if row.op == "avg_pool")
    assert (row.activation_bits, row.cost["averages"]) == (
        None,
        3 * READ if "unpriced" in prices else 0,
    )


def test_the_default_table_is_as_it_was():
    plain = prepare(Averaged(AVERAGES["pool"]), "100%", example_inputs=(X,))
    assert set(plain.bit_widths) == {"conv_weight", "x", "head_weight", "flatten"}
    both = prepared()
    assert set(both.bit_widths) == {*plain.bit_widths, "relu"}
    name = "bops"
    assert both.plan.accounting.resources[name].reference == (
        plain.plan.accounting.resources[name].reference
    )


def test_skip_leaves_it_float_at_the_reference():
    made = prepared(skip=["average"])
    assert "relu" not in made.bit_widths
    (row,) = (row for row in report(made).rows if row.op == "avg_pool")
    assert row.cost["averages"] == 32 * READ
    assert "skip" in row.reason


def test_explain_and_the_ledger_name_the_price():
    made = prepared()
    assert "averages prices avg_pool by its activation_bits" in str(explain(made))
    assert "avg_pool" in str(ledger(made))


def averaging(operands="activation"):
    return Operation("mean", "reduce", "torch.mean", operands, 0, 8, READ)


def grid(*pairs):
    entries = [{"weight": w, "activation": a, "cost": cost} for w, a, cost in pairs]
    return load_table(table(grid=entries))


def test_in_a_grid_both_widths_are_those_of_the_operand():
    made = grid((8, 8, 1), (8, 16, 2), (16, 16, 3))
    costs = {bits: made.cost(averaging(), (bits,)) for bits in (4, 8, 12, 16)}
    assert costs == {4: READ, 8: READ, 12: 3 * READ, 16: 3 * READ}
    assert made.supported_bits(averaging()) == (frozenset({8, 16}),)
    assert made.reference_cost(averaging()) == 3 * READ
    assert grid((8, 8, 1), (8, 16, 2)).supported_bits(averaging()) == (frozenset({8}),)
    with pytest.raises(CostTableError, match=r"at activation_bits = 32 fits into no pair of"):
        made.cost(averaging(), (32,))


def test_the_reference_is_that_of_activations():
    made = load_table({**table(), "reference": {"weight": 32, "activation": 16}})
    assert made.reference_cost(averaging()) == made.cost(averaging(), (16,)) == 16 * READ
    assert made.cost(averaging("none")) == 16 * READ


def test_one_bit_width_is_needed():
    with pytest.raises(CostTableError, match="has 1 bit-widths, 2 were given"):
        load_table(table()).cost(averaging(), (8, 8))


def test_a_cost_that_falls_is_told():
    falling = table(cost={"formula": "input_elements / activation_bits"})
    with pytest.warns(CostTableWarning, match=r"activation 4 costs 72, but activation 8 costs 36"):
        prepared(prices=falling)


def test_a_range_of_its_own_is_priced_exactly():
    made = prepared()
    accounting = made.plan.accounting
    for bits in (4, 8, 32):
        totals = accounting.totals([bits if s.learned else 8 for s in accounting.sites])
        assert totals["averages"] == Fraction(bits * READ)
