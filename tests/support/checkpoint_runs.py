"""Small training runs that can be stopped, saved and compared bit for bit."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cgmq_fx.checkpoint import resume, save_checkpoint
from cgmq_fx.guide import attach
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule
from small_training import small_data

STEPS, SAMPLES, BATCH = 40, 48, 16

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, 2e-2, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, 1e-2),
}


def dropout_model(seed: int = 0) -> nn.Module:
    """Return three linear layers with batch norm and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(10, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(16, 12),
            nn.ReLU(),
            nn.Linear(12, 3),
        )


def example() -> Tensor:
    """Return inputs of the model."""
    return small_data(4)[0]


@dataclass
class Loop:
    """A loop of one's own with a guide, a scheduler and a loader that shuffles."""

    kind: str = "adamw"
    direction: str = "fisher"
    priced: bool = True
    budget: Any = "3%"
    seed: int = 0
    steps: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        inputs = {"example_inputs": (example(),)} if self.priced else {}
        self.prepared = prepare(dropout_model(), self.budget, **{**inputs, **self.options})
        self.optimizer = OPTIMIZERS[self.kind](self.prepared.parameters())
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 5], 0.5)
        self.guide = attach(
            self.prepared, self.optimizer, direction=self.direction, total_steps=2 * STEPS
        )
        self.shuffling = torch.Generator().manual_seed(self.seed)
        self.loader = DataLoader(
            TensorDataset(*small_data(SAMPLES)), BATCH, shuffle=True, generator=self.shuffling
        )

    def train(self, epochs: int) -> None:
        """Train for some epochs of three steps."""
        for _ in range(epochs):
            for x, y in self.loader:
                self.optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(self.prepared(x), y))
                self.optimizer.step()
                self.steps += 1
            self.scheduler.step()

    @property
    def parts(self) -> dict[str, Any]:
        """What goes with the model and the optimizer into a checkpoint."""
        return {"scheduler": self.scheduler, "generators": {"loader": self.shuffling}}

    def save(self, path: Any, **options: Any) -> None:
        """Save the run."""
        save_checkpoint(path, self.prepared, self.optimizer, **{**self.parts, **options})

    def resume(self, path: Any) -> Any:
        """Take up the run of a file."""
        return resume(path, self.prepared, self.optimizer, **self.parts)


def tensors_of(prepared: PreparedModule) -> dict[str, Tensor]:
    """Return copies of all tensors of a model, and of the samples that its quantizers keep."""
    samples = {
        f"{name}.sample": quantizer._kept_sample()
        for name, quantizer in prepared.quantizers.items()
        if quantizer.has_sample
    }
    return {name: x.clone() for name, x in {**prepared.state_dict(), **samples}.items()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Return the names at which two sets of tensors are not equal bit for bit."""
    names = dict.fromkeys((*first, *second))
    return [
        name
        for name in names
        if name not in first or name not in second or not torch.equal(first[name], second[name])
    ]
