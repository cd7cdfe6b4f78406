"""What export decides without a trace in the program is found by running it."""

import pytest
import torch
from torch import nn

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.prepare import prepare


class BranchesOnOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.first(x) if x.shape[0] == 1 else self.second(x)


def test_a_branch_on_a_batch_of_one_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"one sample .* batch of one"):
        prepare(BranchesOnOne(), "100%", example_inputs=(torch.randn(3, 4),), front_end="export")


class AsksForExport(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)

    def forward(self, x):
        return self.first(x) * (2 if torch.compiler.is_exporting() else 1)


def test_a_branch_on_being_exported_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"on the example inputs its output 0 differs"):
        prepare(AsksForExport(), "100%", example_inputs=(torch.randn(3, 4),), front_end="export")


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.first(x) + self.calls


def test_comparing_leaves_buffers_as_they_were():
    model, x = Counts(), torch.randn(3, 4)
    prepared = prepare(model, "100%", example_inputs=(x,), front_end="export")
    assert float(prepared.calls) == float(model.calls) == 0
