"""A recurrent network learns under a budget on all of its products, and lowers within it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cgmq_fx.fit import accuracy, fit
from cgmq_fx.prepare import prepare
from cgmq_fx.testing.recompute import memory_bytes, relative_bops

STEPS, BUDGET, MEMORY = 10, 0.02, 0.3


class Counter(nn.Module):
    """Reads a sequence of signs and says which of them is in the majority."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Cells(nn.Module):
    """The same with a cell, unrolled by its user."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(2, 12), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for step in range(STEPS):
            state = self.cell(x[:, step], state)
        return self.head(state[0])


MODELS = {
    "lstm": lambda: Counter(nn.LSTM(2, 12, 2, batch_first=True, dropout=0.1), 12),
    "gru": lambda: Counter(nn.GRU(2, 8, bidirectional=True, batch_first=True), 16),
    "cells": Cells,
}


def batches(count, seed):
    """Signs with a little noise; the last one counts double, so that no majority is a tie."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (count * 32, STEPS), generator=generator) * 2 - 1
    values = torch.stack((signs, torch.roll(signs, 1, 1)), -1)
    x = values + 0.1 * torch.randn(values.shape, generator=generator)
    y = (signs.sum(1) + signs[:, -1] > 0).long()
    return list(zip(x.split(32), y.split(32), strict=True))


def train_float(model, train):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(4):
        for x, y in train:
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x), y))
            optimizer.step()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_recurrent_network_learns_within_its_budget(name):
    torch.manual_seed(0)
    train, held_out = batches(25, 1), batches(8, 2)
    model = train_float(MODELS[name](), train)
    budget = {"bops": BUDGET, "weight_memory": MEMORY}
    prepared = prepare(model, budget, example_inputs=(train[0][0],), widths=(2, 4, 8))
    result = fit(
        prepared, train, F.cross_entropy, epochs=8, val_loader=held_out, metric=accuracy,
        progress=False,
    )  # fmt: skip
    fixed = result.fixed
    sample = train[0][0][:1]
    assert relative_bops(fixed, (sample,)) <= BUDGET
    floats = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert memory_bytes(fixed) <= MEMORY * floats
    with torch.no_grad():
        right = sum(int((fixed(x).argmax(1) == y).sum()) for x, y in held_out)
    assert right / (8 * 32) >= 0.85, "of the held-out sequences"
