"""A small network with data that it can learn, prepared for guided training."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule


def small_model(seed: int = 0) -> nn.Module:
    """Return three linear layers with a batch norm, ten inputs and three classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(10, 16, bias=False),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Linear(16, 12),
            nn.ReLU(),
            nn.Linear(12, 3),
        )


def small_data(samples: int = 32, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return inputs ``(samples, 10)`` and classes that follow from them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 10, generator=generator)
    return x, x[:, :3].argmax(1)


def batches(number: int = 4, size: int = 16, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Return batches ``(x, y)`` as a loader would."""
    x, y = small_data(number * size, seed)
    return list(zip(x.split(size), y.split(size), strict=True))


def small_prepared(budget: Any = "3%", *, priced: bool = True, **options: Any) -> PreparedModule:
    """Return the small model prepared; priced at once, or by its first batch."""
    if priced:
        options["example_inputs"] = (small_data()[0],)
    return prepare(small_model(), budget, **options)


def train_step(prepared: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Take one step on the whole data and return the loss."""
    x, y = small_data()
    optimizer.zero_grad()
    loss = F.cross_entropy(prepared(x), y)
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()
