"""From models to a measured table, in a runtime whose true costs are known."""

import pytest
import torch
from torch import nn

from cgmq_fx.errors import UsageError
from cgmq_fx.measure.fixing import fixed_at, prepared_for_timing, uniform_bits
from cgmq_fx.measure.measure import measure_table
from cgmq_fx.measure.operations import distinct_operations
from cgmq_fx.measure.predict import predicted, uncertainty
from fake_runtime import OVERHEAD, FakeClock, FakeRuntime


class Residual(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.third = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.third(torch.relu(self.second(x))) + x)
        return self.head(x.mean((2, 3)))


INPUTS = (torch.randn(1, 3, 16, 16),)


def test_each_distinct_operation_is_found_once():
    found, others = distinct_operations([(Residual(), INPUTS)])
    counts = {(item.operation.name, item.operation.op): item.count for item in found}
    assert counts == {
        ("first", "conv2d"): 1,
        ("second", "conv2d"): 2,
        ("relu", "activation"): 3,
        ("add", "add"): 1,
        ("mean", "reduce"): 1,
        ("head", "linear"): 1,
    }
    assert [len(item.activations) for item in found if item.operation.op == "add"] == [2]
    assert others == []


@pytest.fixture(scope="module")
def measurement():
    clock = FakeClock()
    runtime = FakeRuntime(clock)
    return measure_table([(Residual(), INPUTS)], runtime, plan=clock.plan())


def test_a_table_costs_what_the_runtime_takes(measurement):
    model = Residual()
    truth = {}
    for pair in FakeRuntime.pairs:
        clock = FakeClock()
        FakeRuntime(clock).export(fixed_at(model, INPUTS, *pair), INPUTS).whole()()
        truth[pair] = 1000 * clock.now
        found = float(predicted(model, INPUTS, measurement.table, *pair))
        assert found == pytest.approx(truth[pair], rel=1e-3)
    assert truth[8, 8] < 0.6 * truth[32, 32]
    for check in measurement.networks:
        # Operations add up to the network without what every call takes once.
        assert check.summed() == pytest.approx(check.measured - 1000 * OVERHEAD, rel=1e-3)


def test_a_table_says_how_it_was_made(measurement):
    source = measurement.table.source
    assert "fake 1.0" in source
    assert "6 operations between neighbours" in source
    assert measurement.table.unit == "ms"
    assert measurement.unmeasured == ()
    assert measurement.outliers == (0, measurement.outliers[1])


def test_a_table_prices_a_mean_by_the_width_of_what_it_reads(measurement):
    exact, fitted = (row for row in measurement.table.rows if row.op == ("reduce",))
    if exact.grid is None:
        exact, fitted = fitted, exact
    assert [(entry.first, entry.second) for entry in exact.grid.entries] == [(8, 8), (32, 32)]
    assert "weight_bits" not in fitted.cost.variables
    prepared = prepared_for_timing(Residual(24), INPUTS, (8, 32), measurement.table)
    (mean,) = (b for b in prepared.plan.accounting.operations if b.operation.op == "reduce")
    site = prepared.plan.accounting.sites[mean.sources[0].site]
    assert (site.name, site.allowed) == ("relu_2", (8, 32))


def test_an_unseen_network_is_priced_with_the_error_of_what_priced_it(measurement):
    table = measurement.table
    own, other = (
        prepared_for_timing(Residual(width), INPUTS, (8,), table).plan.accounting
        for width in (16, 24)
    )
    bits = uniform_bits(other, 8, 8)
    errors = {row.error for row in other.resources["measured"].rows if row and not row.grid}
    assert max(errors) > 0
    assert 0 < uncertainty(other, table, bits) <= max(errors)
    assert uncertainty(own, table, bits) < uncertainty(other, table, bits)


def test_more_than_one_sample_is_refused():
    clock = FakeClock()
    with pytest.raises(UsageError, match=r"\(2, 3, 16, 16\).*one sample"):
        measure_table([(Residual(), (torch.randn(2, 3, 16, 16),))], FakeRuntime(clock))


def test_models_without_operations_are_refused():
    with pytest.raises(UsageError, match="no operation that can be timed"):
        measure_table([(nn.Flatten(), INPUTS)], FakeRuntime(FakeClock()))
