"""A small network measured in ONNX Runtime: the table prices it near to what it takes."""

import pytest
import torch
from torch import nn

from cgmq_fx.measure.measure import measure_table
from cgmq_fx.measure.runtimes import runtime
from cgmq_fx.measure.timing import TimingPlan
from cgmq_fx.prepare import prepare

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
# On processors without VNNI 8 bits take longer than float activations with weights of 8 bits.
@pytest.mark.filterwarnings("ignore::cgmq_fx.cost.monotone.CostTableWarning")
def test_a_network_costs_about_what_it_takes():
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1)).eval()
    inputs = (torch.randn(1, 8, 32, 32),)
    plan = TimingPlan(rounds=5, round_seconds=0.002)
    found = measure_table([(model, inputs)], runtime("onnxruntime"), plan=plan)
    assert "ONNX Runtime" in found.table.source
    for check in found.networks:
        assert check.measured / 3 < check.summed(found.factors) < 3 * check.measured
    exact = [row for row in found.table.rows if row.grid is not None and "conv2d" in row.op]
    assert len(exact) == 1
    assert all(entry.cost > 0 for row in exact for entry in row.grid.entries)
    prepared = prepare(model, "1000 ms", cost_table=found.table, example_inputs=inputs)
    assert prepared.plan.accounting.resources["measured"].unit == "ms"
