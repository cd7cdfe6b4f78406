"""A re-evaluation of a large network's cost is fast, exact, and needs no accelerator."""

import importlib.util
import sys

import pytest

from source_tree import ROOT


@pytest.fixture(scope="module")
def cost_speed():
    spec = importlib.util.spec_from_file_location("cost_speed", ROOT / "benchmarks/cost_speed.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cost_speed"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cost_speed"]


@pytest.mark.parametrize("table", ["bops", "mpic", "peak_activation_memory"])
def test_a_change_of_bit_widths(cost_speed, table):
    """The bound of the benchmark is 1 ms; here ten times that, since other tests run beside."""
    speed, resource = cost_speed.measure(table, 10_000, 50)
    assert len(resource.terms) == 10_000
    assert speed.change < 10
    assert speed.delta < 1
    assert cost_speed.device_uses(resource) == []
