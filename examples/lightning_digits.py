"""A small network on scikit-learn's digits, trained to a budget by Lightning.

pip install 'cgmq-fx[demo,lightning]'; python examples/lightning_digits.py --budget 1%
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cgmq_fx
from torchvision_shim import torchvision  # lightning imports it where it is installed

assert torchvision
import lightning  # noqa: E402

from cgmq_fx.integrations.lightning import QuantizationCallback  # noqa: E402


def network() -> nn.Module:
    """Return two convolutions and a linear layer, for images ``(samples, 1, 8, 8)``."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


class Classifier(lightning.LightningModule):
    """An ordinary module; nothing in it knows of quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> Any:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,500 images to train on, and the other 297."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    parts = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = parts[:1500], parts[1500:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, print the report and return the accuracy of the lowered module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", default="1%")
    parser.add_argument("--epochs", type=int, default=15)
    chosen = parser.parse_args(arguments)
    lightning.seed_everything(0, verbose=False)
    train, test = digits()
    quantization = QuantizationCallback(chosen.budget, example_inputs=(train[:2][0],))
    trainer = lightning.Trainer(
        max_epochs=chosen.epochs, callbacks=[quantization], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(train, 50, shuffle=True))
    fixed = quantization.fixed
    print(cgmq_fx.report(fixed))
    images, labels = test[:]
    accuracy = float((fixed(images).argmax(1) == labels).float().mean())
    print(f"accuracy on the other {len(labels)} images: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
