"""What the speed benchmarks count: turns, ratios round by round, and the time of `prepare`."""

import importlib
import time
from types import ModuleType

import pytest

from source_tree import ROOT


@pytest.fixture
def load(monkeypatch):
    """Return what imports a script of benchmarks/speed, whose folder is on the path meanwhile."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "speed"))

    def script(name: str) -> ModuleType:
        return importlib.import_module(name)

    return script


def test_steps_take_turns_and_ratios_are_those_of_a_round(load):
    training = load("training")
    turns: list[str] = []

    def step(name: str, seconds: float):
        def run() -> None:
            turns.append(name)
            time.sleep(seconds)

        return run

    timings = training.interleave({"a": step("a", 0.002), "b": step("b", 0.006)}, 3, seconds=0.001)
    assert turns == [
        *"aaabbb",
        *"aabb",
        *"bbaa",
        *"aabb",
    ]  # warm-up, then an untimed and a timed one
    found = training.ratio(timings["b"].wall, timings["a"].wall)
    assert 1.5 < found.low <= found.median <= found.high < 6
    assert training.ratio([2.0, 6.0, 3.0], [1.0, 2.0, 1.0]) == training.Ratio(2.5, 3.0, 3.0)


def test_prepare_is_timed_per_node(load):
    nodes, seconds = load("prepare_time").per_node(60)
    assert nodes == 62
    assert 0 < seconds < 1


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "mobilenet_v2", "vit_tiny"])
def test_the_networks_have_the_sizes_of_their_papers(load, name):
    model = load("networks").WORKLOADS[name].model()
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    sizes = {"lenet5": 0.43, "resnet20": 0.27, "mobilenet_v2": 2.24, "vit_tiny": 5.36}
    assert millions == pytest.approx(sizes[name], rel=0.03)
