import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import graph_zoo
from cgmq_fx.identity import identity, text_of
from cgmq_fx.input_shapes import describe, rebuild
from cgmq_fx.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_other_processes_find_the_same_identities():
    """The order of sets is another in each of them, and so is every address."""
    found = []
    for seed in ("1", "2"):
        paths = os.pathsep.join(str(ROOT / place) for place in ("tests/support", "examples"))
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        command = [sys.executable, str(ROOT / "tests/support/print_identities.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    assert len(found[0]) == len(graph_zoo.ZOO)
    assert found[0] == found[1]
    assert not any(parts["addresses"] for parts in found[0].values())


def test_the_same_process_finds_the_same_identity_again():
    for case in graph_zoo.ZOO[:6]:
        found = []
        for _ in range(2):
            model, inputs = case.build()
            found.append(identity(prepare(model, "100%", example_inputs=inputs)))
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b", "a"}, "set('a', 'b')"),
        (slice(1, None), "slice(1, None, None)"),
        ([torch.float32, (1, ...)], "list(torch.float32, tuple(1, Ellipsis))"),
        ({"k": torch.relu}, "{'k': torch._VariableFunctionsClass.relu}"),
        (nn.ReLU(), "ReLU()"),
    ],
)
def test_texts(value, text):
    assert text_of(value) == text


def test_an_address_gets_into_no_text():
    assert "0x" not in text_of(object())
    assert "0x" not in text_of(lambda: 0)


def test_inputs_are_described_and_rebuilt():
    inputs = (torch.ones(2, 3), [None, (1, "a")], {"k": torch.ones(1, dtype=torch.int64)})
    again = rebuild(describe(inputs), torch.device("cpu"))
    assert describe(again) == describe(inputs)
    assert type(again[1]) is list
    assert not again[0].any()
    assert describe((object(),)) is None
