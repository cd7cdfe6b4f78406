"""`solve`: the bit-widths of a calibrated model within every budget, without training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from cgmq_fx.accounting import Accounting
from cgmq_fx.allocate import PredictedLoss
from cgmq_fx.allocate_exactly import TIME_LIMIT, Allocation, allocate_exactly
from cgmq_fx.calibration_data import model_inputs
from cgmq_fx.choose_bits import choose_bits
from cgmq_fx.errors import TrainingError
from cgmq_fx.guide import check_prepared
from cgmq_fx.measured_loss import measured_loss
from cgmq_fx.passes.freeze_bit_widths import settle_ranges
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.sensitivity import predicted_loss


def solve(
    prepared: PreparedModule,
    loader: Iterable[Any] | None = None,
    *,
    batches: int | None = None,
    time_limit: float = TIME_LIMIT,
) -> Allocation:
    """Give every tensor the bit-width that the outputs need least, within every budget.

    Each tensor is quantized alone, at each bit-width that it may have, and the change of the
    outputs is measured. An integer program then finds the bit-widths of the least sum of these
    changes, to the proven optimum: all budgets, and what operations of two tensors cost, are in it.

    Args:
        prepared: a model after `cgmq_fx.calibrate`.
        loader: batches as `calibrate` takes them. None: the change is predicted, after training
            under a guide from gradients, else from the rounding error of each tensor alone.
        batches: how many to take; None: all. A few are enough, and the model runs on each once for
            every bit-width of every tensor.
        time_limit: seconds for the integer program, after which the best found so far is taken.

    Returns:
        The bit-widths, what they are predicted to cost, and whether that is proven to be least.

    Raises:
        BudgetError: no bit-widths within every budget were found.
        TrainingError: the model was not calibrated.
        UsageError: an argument makes no sense, the loader has no batch, or scipy is missing.
    """
    prepared = check_prepared(prepared, "solve")
    _check_ranges(prepared)
    predicted = _predicted(prepared, loader, batches)
    found: list[Allocation] = []

    def exactly(
        accounting: Accounting,
        predicted: PredictedLoss,
        *,
        start: Sequence[int] | None = None,
        limits: Mapping[str, Fraction] | None = None,
    ) -> tuple[int, ...]:
        found.append(allocate_exactly(accounting, predicted, limits=limits, time_limit=time_limit))
        return found[-1].bits

    bits = choose_bits(prepared, predicted=predicted, allocator=exactly)
    prepared.set_bit_widths(bits)
    settle_ranges(prepared)
    return replace(found[-1], bits=bits)


def _predicted(
    prepared: PreparedModule, loader: Iterable[Any] | None, batches: int | None
) -> PredictedLoss:
    if loader is None:
        return predicted_loss(prepared)
    return measured_loss(prepared, list(model_inputs(prepared, loader, batches, "solve")))


def _check_ranges(prepared: PreparedModule) -> None:
    names = [site.name for site in prepared.plan.accounting.sites]
    blind = [name for name in names if not prepared.quantizers[name].is_calibrated]
    if blind:
        raise TrainingError(
            f"solve: the quantizers {blind[:5]} never saw a tensor, so that their errors are "
            f"unknown; call cgmq_fx.calibrate(prepared, loader) first"
        )
