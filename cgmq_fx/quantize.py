"""`quantize`: post-training quantization in one call, by preset."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from torch import nn

from cgmq_fx.calibrate import calibrate
from cgmq_fx.calibration_data import taken
from cgmq_fx.correct_bias import correct_bias
from cgmq_fx.errors import UsageError
from cgmq_fx.lower import lower
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.observers import Observer
from cgmq_fx.overrides import Override
from cgmq_fx.prepare import prepare
from cgmq_fx.round_weights import round_weights
from cgmq_fx.selectors import Operand
from cgmq_fx.solve import solve

Preset = Literal["dynamic_range", "full_integer", "mixed"]
PRESETS: tuple[Preset, ...] = get_args(Preset)

#: Batches of the loader on which bit-widths are compared: the model runs on each many times.
_SOLVE_BATCHES = 4
_MIXED_WIDTHS = (2, 4, 8, 16)


def quantize(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    preset: Preset = "full_integer",
    budget: object = None,
    observer: Observer = "mse",
    batches: int | None = None,
    **options: Any,
) -> LoweredModule:
    """Return `model` quantized without training, on batches without labels, within the budget.

    Args:
        model: the trained float model, left untouched.
        loader: batches: tensors, sequences that begin with the inputs, or mappings with the names
            of inputs. Labels are left out.
        preset: ``dynamic_range``: weights of 8 bits, everything else float. ``full_integer``: all
            that a priced operation reads has 8 bits. ``mixed``: 2, 4, 8 or 16 bits, as `solve`
            finds them within the budget.
        budget: as in `cgmq_fx.prepare`; ``mixed`` needs one, for the others it is by default the
            cost of the float model.
        observer: as in `cgmq_fx.calibrate`.
        batches: how many to take; None: all.
        **options: of `cgmq_fx.prepare`, such as `example_inputs`, `cost_table`, `widths` for the
            bit-widths of ``mixed``, or `skip`.

    Raises:
        BudgetError: no bit-widths within the budget exist, or those of the preset are not.
        UsageError: an argument makes no sense, or the loader has no batch.
        CgmqError: as `cgmq_fx.prepare`, `calibrate` and `solve`.
    """
    if preset not in PRESETS:
        listed = ", ".join(map(repr, PRESETS))
        raise UsageError(f"quantize: preset={preset!r} is unknown, use one of {listed}")
    if preset == "mixed" and budget is None:
        raise UsageError(
            "quantize: preset='mixed' chooses bit-widths within a budget; give one, such as "
            "budget='3%'"
        )
    if preset == "mixed":
        options.setdefault("widths", _MIXED_WIDTHS)
    else:
        options["overrides"] = {**_FIXED[preset], **options.get("overrides", {})}
    given = taken(loader, batches, "quantize")
    prepared = prepare(model, "100%" if budget is None else budget, **options)
    kept = list(given)
    calibrate(prepared, kept, observer=observer)
    if preset == "mixed":
        solve(prepared, kept, batches=_SOLVE_BATCHES)
    round_weights(prepared, kept)
    correct_bias(prepared, kept)
    return lower(prepared)


def _is_weight(operand: Operand) -> bool:
    return operand.role == "weight"


def _is_no_weight(operand: Operand) -> bool:
    return not _is_weight(operand)


_FIXED: Mapping[Preset, Mapping[Any, Override]] = {
    "dynamic_range": {_is_weight: Override(bit_width=8), _is_no_weight: Override(bit_width=32)},
    "full_integer": {_is_weight: Override(bit_width=8), _is_no_weight: Override(bit_width=8)},
}
