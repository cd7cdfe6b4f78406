"""The main job from start to end, on a network and a data set of a few seconds."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from cgmq_fx.demo_data import Digits, load_digits
from cgmq_fx.errors import UsageError
from cgmq_fx.fit import Epoch, FitResult, accuracy, fit
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.report import Report, report

_FLOAT_LEARNING_RATE = 2e-3
_LOSS_DIGITS = 4


class DigitsNet(nn.Module):
    """Three convolutions with batch norm and a linear layer, for images ``(batch, 1, 8, 8)``.

    Its first layer, which reads the image at 8 bits whatever the budget, does 1.5 % of the MACs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(64)
        self.classifier = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(batch, 10)``."""
        features = F.relu(self.norm1(self.conv1(images)))
        features = F.max_pool2d(F.relu(self.norm2(self.conv2(features))), 2)
        features = F.max_pool2d(F.relu(self.norm3(self.conv3(features))), 2)
        logits: Tensor = self.classifier(features.flatten(1))
        return logits


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
    """Train a float network, quantize it to `budget`, print a report and write all results to `out`.

    Args:
        out: a folder, made if it is missing; files of an earlier run are replaced.
        budget: upper bound on the bit operations.
        seed: of the data split, the initial weights and the order of the batches.
        float_epochs: epochs of float training.
        epochs: epochs of guided training.
        console: where to print; by default the standard output.

    Raises:
        BudgetError: the budget is malformed or below what the network can reach.
        UsageError: scikit-learn is missing, or `out` cannot be written.
    """
    console = Console(highlight=False) if console is None else console
    started = time.perf_counter()
    digits = load_digits(seed)
    _make_folder(out)
    torch.manual_seed(seed)
    model = DigitsNet()
    # Before any training, so that a budget that cannot be met costs no time.
    prepare(model, budget, example_inputs=(_some_images(digits),))
    ...
