"""Guided training on real images loses next to nothing at a tight budget."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cgmq_fx.fit import accuracy, fit
from cgmq_fx.prepare import prepare
from cgmq_fx.testing.recompute import relative_bops


def data():
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


@pytest.mark.slow
def test_two_points_of_float_at_one_percent():
    x, y = data()
    train = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=32, shuffle=True)
    test = x[1400:], y[1400:]
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(8):
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    before = float(accuracy(model.eval()(test[0]), test[1]).mean())
    prepared = prepare(model, "1%", example_inputs=(x[:2],))
    result = fit(prepared, train, F.cross_entropy, epochs=12, progress=False)
    after = float(accuracy(result.fixed(test[0]), test[1]).mean())
    assert before > 0.96
    assert relative_bops(result.fixed, (x[:1],)) <= 0.01
    assert after > before - 0.02
