"""The laws of `check_prepare` where choices, keyword inputs and made constants come in."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cgmq_fx.prepare import prepare
from cgmq_fx.testing import check_prepare
from cgmq_fx.testing.accounting_laws import check_sharing, check_totals
from cgmq_fx.testing.counting import count_float, count_nodes
from cgmq_fx.testing.stored_weights import stored_weights
from graph_zoo import Calls

ADDS = {
    "name": "adder",
    "unit": "cycle",
    "unpriced": "zero",
    "row": [
        {"op": ["linear"], "per": "mac", "cost": 1},
        {"op": ["add"], "per": "output_element", "cost": {"formula": "lhs_bits + rhs_bits"}},
    ],
}


def summed():
    return Calls(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(3, 3), b=nn.Linear(3, 3))


def shared(share):
    x = torch.randn(1, 3)
    return prepare(summed(), "100%", example_inputs=(x,), cost_table=ADDS, share=share)


def test_a_range_may_be_shared_by_a_rule_and_not_otherwise():
    prepared = shared(["add"])
    assert list(check_sharing(prepared)) == []
    settings = prepared.plan.settings
    for share in ((), ("cat",), None):
        choices = replace(settings.choices, share=share)
        prepared.plan.settings = replace(settings, choices=choices)
        (fault,) = check_sharing(prepared)
        assert "one range for the tensors" in fault


def test_all_laws_hold_under_choices():
    for options in ({"share": ["add"]}, {"skip": ["a"]}, {"overrides": {"b": {"bit_width": 8}}}):
        check_prepare(summed(), torch.randn(2, 3), "100%", cost_table=ADDS, **options)


class Keywords(nn.Module):
    """Takes one of its inputs by keyword, and makes a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor, factor: float = 2.0, shift: Tensor | None = None) -> Tensor:
        """Return a product with a constant, shifted."""
        scaled = self.linear(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]) * factor
        return scaled if shift is None else scaled + shift


def test_inputs_by_keyword():
    given = {"shift": torch.randn(2, 4), "x": torch.randn(2, 3)}
    prepared = check_prepare(Keywords(), given)
    one = {name: value[:1] for name, value in given.items()}
    counted = count_float(Keywords(), one)
    assert counted.macs == 12
    assert sum(count.macs for count in count_nodes(prepared, one).values()) == 12
    with pytest.raises(TypeError, match="missing a required argument"):
        count_nodes(prepared, {"shift": one["shift"]})


def test_a_constant_that_forward_makes_is_stored():
    x = torch.randn(1, 3)
    budget = {"bops": "100%", "weight_memory": "100%"}
    prepared = prepare(Keywords(), budget, example_inputs=(x,))
    counted = count_float(Keywords(), x)
    assert list(check_totals(prepared, counted)) == []
    # Were it the model's own, the run of the float model would have found it.
    made = {str(n.target) for n in prepared.graph.nodes if n.op == "get_attr"} - counted.named
    assert made
    assert list(check_totals(prepared, replace(counted, named=counted.named | made)))


def test_a_computed_weight_is_stored_once():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    budget = {"bops": "100%", "weight_memory": "100%"}
    model = nn.Sequential(layer)
    prepared = prepare(model, budget, example_inputs=(torch.randn(1, 3),))
    (weight,) = stored_weights(prepared)
    assert (weight.numel, weight.is_computed, len(weight.sources)) == (12, True, 2)
    assert list(check_totals(prepared, count_float(model, torch.randn(1, 3)))) == []


def test_a_state_has_its_range_for_itself():
    model = Calls(lambda m, x: m.b(m.a(x)[0])[0], a=nn.GRU(3, 3), b=nn.GRU(3, 3))
    prepared = prepare(model, "100%", example_inputs=(torch.randn(4, 1, 3),), batch_axis=1)
    assert list(check_sharing(prepared)) == []
    (node,) = (n for n in prepared.graph.nodes if str(n.target) == "quantizers.b_hidden_l0")
    node.target = "quantizers.a_hidden_l0"
    assert any("a_hidden_l0" in fault for fault in check_sharing(prepared))
