"""`calibrate`: the ranges of a prepared model from data, without labels and without training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cgmq_fx.calibration import condensed
from cgmq_fx.calibration_data import at_batch, model_inputs, run
from cgmq_fx.errors import TrainingError, UsageError
from cgmq_fx.guide import check_prepared
from cgmq_fx.observers import OBSERVERS, Observer
from cgmq_fx.passes.freeze_bit_widths import settle_ranges
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.quantizers import Quantizer

#: Values of a tensor that are kept of each batch, and of all of them; its extremes are always.
_VALUES_OF_A_BATCH, _VALUES = 2**14, 2**17


def calibrate(
    prepared: PreparedModule,
    loader: Iterable[Any],
    *,
    observer: Observer = "mse",
    batches: int | None = None,
) -> None:
    """Find the range of every activation and input from data, at its present bit-width.

    The batches run through the float model, in evaluation mode. The ranges of weights are those of
    the least squared error, whatever the observer. A later change of a bit-width fits ranges by the
    same observer on values that are kept. Nothing changes where an error is raised.

    Args:
        prepared: what `cgmq_fx.prepare` returned.
        loader: batches: tensors, sequences that begin with the inputs, or mappings with the names
            of inputs. Labels are left out.
        observer: ``mse``: least squared error. ``minmax``: all that was seen. ``percentile``:
            99.99 % of the values. ``entropy``: least Kullback-Leibler divergence.
        batches: how many to take; None: all.

    Raises:
        BudgetError: the budget is infeasible for the shapes of the first batch.
        TrainingError: a tensor has NaN or infinite values; the message names quantizer and batch.
        UsageError: an argument makes no sense, or the loader has no batch.
    """
    prepared = check_prepared(prepared, "calibrate")
    if observer not in OBSERVERS:
        listed = ", ".join(map(repr, OBSERVERS))
        raise UsageError(f"calibrate: observer={observer!r} is unknown, use one of {listed}")
    seen: dict[str, list[Tensor]] = {}
    number = 0
    with evaluating(prepared):
        with _watching(prepared, seen):
            for number, inputs in enumerate(
                model_inputs(prepared, loader, batches, "calibrate"), start=1
            ):
                try:
                    run(prepared, inputs)
                except TrainingError as error:
                    raise at_batch(error, "calibrate", number) from error
        for name, rows in seen.items():
            prepared.quantizers[name].calibrate_on(torch.cat(rows, dim=1), observer)
        settle_ranges(prepared)
        prepared.plan.calibrated_on = number


@contextmanager
def evaluating(prepared: PreparedModule) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients, and back."""
    modes = {module: module.training for module in prepared.modules()}
    prepared.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def passing(quantizers: Iterable[Quantizer]) -> Iterator[None]:
    """Let quantizers pass their tensors unchanged, whatever their bit-width."""
    held = [quantizer for quantizer in quantizers if quantizer.tap is None]
    for quantizer in held:
        quantizer.tap = unseen
    try:
        yield
    finally:
        for quantizer in held:
            quantizer.tap = None


def unseen(x: Tensor) -> None:
    """Let a tensor pass its quantizer; a tap that looks at nothing."""


@contextmanager
def _watching(prepared: PreparedModule, seen: dict[str, list[Tensor]]) -> Iterator[None]:
    """Let all quantizers pass their tensors, and those of activations note their values."""
    for name, quantizer in prepared.quantizers.items():
        if quantizer.spec.role != "weight":
            quantizer.tap = _noting(quantizer, seen.setdefault(name, []))
    try:
        with passing(prepared.quantizers.values()):
            yield
    finally:
        for quantizer in prepared.quantizers.values():
            quantizer.tap = None
        for name in [name for name, rows in seen.items() if not rows]:
            del seen[name]


def _noting(quantizer: Quantizer, seen: list[Tensor]) -> Any:
    def note(x: Tensor) -> None:
        if x.numel() == 0:
            return
        seen.append(condensed(quantizer.rows(x), _VALUES_OF_A_BATCH))
        if sum(rows.numel() for rows in seen) > _VALUES:
            seen[:] = [condensed(torch.cat(seen, dim=1), _VALUES // 2)]

    return note
