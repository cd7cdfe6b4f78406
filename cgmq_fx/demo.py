"""The main job from start to end, on a network and a data set of a few seconds."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from cgmq_fx.demo_data import Digits, load_digits
from cgmq_fx.demo_output import Phase, make_folder, print_comparison, print_task, write_results
from cgmq_fx.epoch import Epoch
from cgmq_fx.fit import FitResult, accuracy, fit
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.report import Report, report
from cgmq_fx.report_files import exact_number

_FLOAT_LEARNING_RATE = 2e-3


class DigitsNet(nn.Module):
    """Four convolutions with batch norm and a linear layer, for images ``(batch, 1, 8, 8)``.

    Its first layer, which reads the image at 8 bits whatever the budget, does 1.6 % of the MACs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 16)
        self.wide = ConvNorm(16, 24)
        self.middle = ConvNorm(24, 32)
        self.deep = ConvNorm(32, 48)
        self.classifier = nn.Linear(48 * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(batch, 10)``."""
        features = F.max_pool2d(self.wide(self.stem(images)), 2)
        features = F.max_pool2d(self.deep(self.middle(features)), 2)
        logits: Tensor = self.classifier(features.flatten(1))
        return logits


class ConvNorm(nn.Module):
    """A 3 x 3 convolution that keeps the image's size, batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Return features ``(batch, out_channels, height, width)``, not negative."""
        return F.relu(self.norm(self.conv(images)))


@dataclass(frozen=True)
class DemoResult:
    """What the demo came to.

    Attributes:
        float_accuracy: of the trained float network on the test images, in [0, 1].
        quantized_accuracy: of the lowered network on the same images.
        report: of the lowered network.
        files: what was written.
        seconds: how long it took.
    """

    float_accuracy: float
    quantized_accuracy: float
    report: Report
    files: tuple[Path, ...]
    seconds: float


def run_demo(
    out: Path,
    *,
    budget: str = "0.6%",
    seed: int = 0,
    float_epochs: int = 15,
    epochs: int = 20,
    console: Console | None = None,
) -> DemoResult:
    """Train a float network, quantize it to `budget`, print a report, write the results to `out`.

    Args:
        out: a folder, made if it is missing; files of an earlier run are replaced.
        budget: upper bound on the bit operations.
        seed: of the data split, the initial weights and the order of the batches.
        float_epochs: epochs of float training.
        epochs: epochs of guided training.
        console: where to print; by default the standard output.

    Raises:
        BudgetError: the budget is malformed or below what the network can reach.
        UsageError: scikit-learn is missing, or `out` cannot be a folder.
    """
    console = Console(highlight=False) if console is None else console
    started = time.perf_counter()
    digits = load_digits(seed)
    torch.manual_seed(seed)
    model = DigitsNet()
    # Before any training: a budget that cannot be met should cost no time.
    print_task(console, prepare(model, budget, example_inputs=_images(digits)))
    make_folder(out)
    float_history = train_float(model, digits, float_epochs, console)
    prepared = prepare(model, budget, example_inputs=_images(digits))
    result = _train_guided(prepared, digits, epochs, console)
    accuracies = evaluate(model, digits.test), evaluate(result.fixed, digits.test)
    found = report(result.fixed)
    if result.interrupted:
        console.print("interrupted; what follows is the best state so far")
    console.print()
    console.print(found)
    print_comparison(console, found, *accuracies, images=digits.num_test)
    history = {"seed": seed, "float": float_history, "guided": _records(result)}
    states = {"float": model.state_dict(), "lowered": result.fixed.state_dict()}
    files = write_results(out, found, history, states)
    seconds = time.perf_counter() - started
    names = ", ".join(file.name for file in files)
    console.print(f"\n{seconds:.0f} s; results in {out}/: {names}", markup=False)
    return DemoResult(*accuracies, found, files, seconds)


def _images(digits: Digits) -> Tensor:
    images: Tensor = next(iter(digits.validation))[0]
    return images


def train_float(
    model: nn.Module, digits: Digits, epochs: int, console: Console
) -> list[dict[str, Any]]:
    """Train `model` in place and return a record of each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), _FLOAT_LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    history = []
    with Phase("float training", epochs, console) as phase:
        for epoch in range(1, epochs + 1):
            loss = _float_epoch(model, digits.train, optimizer)
            scheduler.step()
            score = evaluate(model, digits.validation)
            phase.advance(loss, score)
            history.append({"epoch": epoch, "train_loss": loss, "val_accuracy": score})
    return history


def _float_epoch(
    model: nn.Module, batches: Iterable[Any], optimizer: torch.optim.Optimizer
) -> float:
    model.train()
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Any]) -> float:
    """Return the part of the samples whose class `model` finds, in evaluation mode."""
    model.eval()
    hits = torch.cat([accuracy(model(images), labels) for images, labels in batches])
    return float(hits.mean())


def _train_guided(
    prepared: PreparedModule, digits: Digits, epochs: int, console: Console
) -> FitResult:
    ((resource, limit),) = prepared.plan.accounting.limits.items()
    with Phase("guided training", epochs, console) as phase:

        def show(epoch: Epoch) -> None:
            used = float(epoch.totals[resource] / limit)
            phase.advance(epoch.train_loss, epoch.val_metric or 0.0, used)

        return fit(
            prepared,
            digits.train,
            F.cross_entropy,
            epochs=epochs,
            val_loader=digits.validation,
            metric=accuracy,
            progress=False,
            callback=show,
        )


def _records(result: FitResult) -> dict[str, Any]:
    return {
        "best_epoch": result.best_epoch,
        "epochs": [
            {
                "epoch": epoch.epoch,
                "train_loss": epoch.train_loss,
                "val_accuracy": epoch.val_metric,
                "satisfied": epoch.satisfied,
                "totals": {name: exact_number(total) for name, total in epoch.totals.items()},
                "bit_widths": epoch.bit_widths,
            }
            for epoch in result.history
        ],
    }
