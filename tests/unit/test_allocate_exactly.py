import itertools
from fractions import Fraction

import pytest
import torch
from torch import nn

from cgmq_fx.allocate import allocate
from cgmq_fx.allocate_exactly import allocate_exactly
from cgmq_fx.errors import BudgetError
from cgmq_fx.prepare import prepare


def network(seed):
    """Return a small residual network with two products of one activation."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            x = torch.relu(self.first(x))
            x = x + self.second(x)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(seed)
    return Model()


def losses(accounting, seed):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for site in accounting.sites:
        size = float(torch.rand((), generator=generator)) ** 3
        found.append({bits: 0.0 if bits == 32 else size * 4.0**-bits for bits in site.allowed})
    return found


BUDGETS = (
    {"bops": "1.2%"},
    {"bops": "2%", "weight_memory": "13%"},
    {"bops": "3%", "weight_memory": "20%", "peak_activation_memory": "250 byte"},
)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", range(4))
def test_it_finds_what_trying_everything_finds(budget, seed):
    made = prepare(
        network(seed), budget, example_inputs=(torch.randn(1, 2, 6, 6),), widths=(2, 4, 8, 32)
    )
    accounting = made.plan.accounting
    predicted = losses(accounting, seed)
    best = min(
        sum(predicted[place][width] for place, width in enumerate(bits))
        for bits in itertools.product(*(site.allowed for site in accounting.sites))
        if accounting.is_satisfied(bits)
    )
    found = allocate_exactly(accounting, predicted)
    assert accounting.is_satisfied(found.bits)
    assert found.is_optimal
    assert found.loss == pytest.approx(best, rel=1e-9)
    spent = sum(predicted[place][width] for place, width in enumerate(found.bits))
    assert found.loss == pytest.approx(spent, rel=1e-9)


def test_it_is_better_than_greedy_somewhere():
    """Else trying everything would say nothing about the program."""
    gains = []
    for seed in range(8):
        inputs = (torch.randn(1, 2, 6, 6),)
        accounting = prepare(network(seed), "1.2%", example_inputs=inputs).plan.accounting
        predicted = losses(accounting, seed)
        greedy = allocate(accounting, predicted)
        exact = allocate_exactly(accounting, predicted).loss
        gains.append(sum(predicted[i][bits] for i, bits in enumerate(greedy)) - exact)
    assert min(gains) >= -1e-12
    assert max(gains) > 0


def test_costs_at_the_limit_itself_are_within_it():
    """The solver rounds; what it finds is compared exactly."""
    inputs = (torch.randn(1, 2, 6, 6),)
    accounting = prepare(network(0), "100%", example_inputs=inputs).plan.accounting
    predicted = losses(accounting, 0)
    for widest in (2, 4, 8):
        bits = [
            max(w for w in site.allowed if w <= widest or not site.learned)
            for site in accounting.sites
        ]
        limits = accounting.totals(bits)
        found = allocate_exactly(accounting, predicted, limits=limits)
        assert accounting.totals(found.bits)["bops"] <= limits["bops"]
        below = {name: limit - Fraction(1, 10**9) for name, limit in limits.items()}
        found = allocate_exactly(accounting, predicted, limits=below) if widest > 2 else None
        assert found is None or accounting.totals(found.bits)["bops"] < limits["bops"]


def test_what_no_bit_widths_meet_is_refused():
    inputs = (torch.randn(1, 2, 6, 6),)
    accounting = prepare(network(0), "100%", example_inputs=inputs).plan.accounting
    with pytest.raises(BudgetError, match="the nearest exceeds bops"):
        allocate_exactly(accounting, losses(accounting, 0), limits={"bops": Fraction(1)})


@pytest.mark.parametrize("budget", ["2%", "5%", "20%"])
def test_a_proof_holds_for_what_the_solver_cannot_tell_from_its_own(budget):
    """Losses of wide bit-widths differ by less than the solver's tolerance."""
    inputs = (torch.randn(1, 2, 6, 6),)
    accounting = prepare(network(0), budget, example_inputs=inputs).plan.accounting
    predicted = [
        {bits: 0.0 if bits == 32 else 4.0 ** (-2 * bits) / (1 + place) for bits in site.allowed}
        for place, site in enumerate(accounting.sites)
    ]
    assert allocate_exactly(accounting, predicted).is_optimal
