"""Short runs of `fit` on the small network."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cgmq_fx.fit import FitResult, fit
from cgmq_fx.lowered import LoweredModule
from small_training import batches, small_prepared

QUIET = {"progress": False}


def run(
    prepared: nn.Module | None = None, train: Any = None, *, epochs: int = 4, **options: Any
) -> FitResult:
    """Fit a prepared model, by default the small one on four batches."""
    prepared = small_prepared() if prepared is None else prepared
    train = batches() if train is None else train
    return fit(prepared, train, F.cross_entropy, epochs=epochs, **QUIET, **options)


def is_met(fixed: LoweredModule) -> bool:
    """Tell whether a lowered module is within its budgets."""
    names = fixed.plan.accounting.site_names
    return fixed.plan.accounting.is_satisfied([fixed.bit_widths[name] for name in names])


class Scripted:
    """A metric that says what it was told, epoch by epoch, as a plain float."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self, output: Tensor, target: Tensor) -> float:
        """Return the next value."""
        return self.values.pop(0)
