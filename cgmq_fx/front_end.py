"""Which front end records the graph of a model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from cgmq_fx.errors import UnsupportedModelError, UsageError
from cgmq_fx.passes.export_program import trace_exported
from cgmq_fx.passes.trace import trace
from cgmq_fx.passes.trace_options import TraceOptions
from cgmq_fx.plan import Settings

FRONT_ENDS = ("auto", "fx", "export")


def record(
    model: nn.Module,
    inputs: Sequence[Any] | None,
    settings: Settings,
    front_end: str,
    reserved: Sequence[str],
    options: TraceOptions,
) -> tuple[fx.GraphModule, Settings]:
    """Return the graph of `model`, and `settings` with the front end that recorded it.

    Args:
        model: the module, shared with the result.
        inputs: one value for each argument of the model's forward, None where not known.
        settings: the arguments of `prepare`. The axis of the batch is taken out where the graph is
            right for one batch alone: costs are of the whole input then.
        front_end: one of `FRONT_ENDS`.
        reserved: names that later passes will give to submodules.
        options: what stays closed, and which arguments are fixed.

    Raises:
        UnsupportedModelError: no front end that may be used can record the model.
        UsageError: `front_end` is no front end, or needs inputs and has none.
    """
    if front_end not in FRONT_ENDS:
        raise UsageError(f"front_end={front_end!r} is none of {FRONT_ENDS}; choose one of them")
    if front_end == "export" and inputs is None:
        raise UsageError(
            "front_end='export' runs the model on its inputs, and there are none; give prepare "
            "example_inputs=(...)"
        )
    if front_end == "export":
        return _exported(model, inputs or (), settings, reserved, options)
    try:
        return trace(model, inputs, settings.batch_axis, reserved, options), settings
    except UnsupportedModelError as error:
        if front_end == "fx":
            raise
        traced = error
    if inputs is None:
        raise UnsupportedModelError(
            f"{traced}\nThe other front end, torch.export, needs inputs: give prepare "
            f"example_inputs=(...)."
        ) from traced
    try:
        return _exported(model, inputs, settings, reserved, options)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"neither front end can record the model.\nfront_end='fx': {traced}\n"
            f"front_end='export': {error}"
        ) from error


def _exported(
    model: nn.Module,
    inputs: Sequence[Any],
    settings: Settings,
    reserved: Sequence[str],
    options: TraceOptions,
) -> tuple[fx.GraphModule, Settings]:
    exported = trace_exported(model, inputs, settings.batch_axis, reserved, options.leaves)
    batch_axis = settings.batch_axis if exported.is_dynamic else None
    return exported.graph_module, replace(settings, front_end="export", batch_axis=batch_axis)
