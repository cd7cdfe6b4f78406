"""`prepare`: a float model and a budget in, a trainable quantized graph out."""

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cgmq_fx.account import BUILT_IN, WEIGHT_MEMORY
from cgmq_fx.budget import Budget
from cgmq_fx.cost.find import builtin_names, table_names
from cgmq_fx.cost.load import get_table, load_table
from cgmq_fx.cost.operation import OP_CLASSES
from cgmq_fx.cost.peak_memory import PEAK_ACTIVATION_MEMORY
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import UnsupportedModelError, UsageError
from cgmq_fx.gates import DEFAULT_WIDTHS, FLOAT_WIDTH, is_width
from cgmq_fx.passes.annotate_nonnegative import AnnotateNonnegative
from cgmq_fx.passes.annotate_operations import AnnotateOperations
from cgmq_fx.passes.annotate_shapes import AnnotateShapes
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.freeze_bit_widths import FROZEN
from cgmq_fx.passes.functionalize import Functionalize
from cgmq_fx.passes.insert_quantizers import QUANTIZERS, InsertQuantizers
from cgmq_fx.passes.pipeline import Pipeline
from cgmq_fx.passes.share_quantizers import ShareQuantizers
from cgmq_fx.passes.trace import trace
from cgmq_fx.plan import Plan, Settings
from cgmq_fx.prepared import PLAN, PreparedModule, is_prepared, one_sample
from cgmq_fx.quantizers import QuantizerSet

Table = str | os.PathLike[str] | Mapping[str, Any] | CostTable

# Operations whose weights a bound on memory makes worth quantizing.
_WEIGHT_OPS = frozenset(op for op in OP_CLASSES if op.startswith("conv")) | {
    "linear",
    "embedding",
    "matmul",
}


def prepare(
    model: nn.Module,
    budget: object,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | torch.Tensor | None = None,
    cost_table: Table | Sequence[Table] | None = None,
    widths: Sequence[int] = DEFAULT_WIDTHS,
    learn_input_bits: bool = False,
    per_channel: bool = True,
    batch_axis: int | None = 0,
) -> PreparedModule:
    """Return a copy of `model` whose weights and activations have learnable bit-widths.

    The copy computes what the model does, bit for bit, while every bit-width is 32. It has every
    key of the model's state dict and loads its checkpoints. Train it as the model is trained, with
    `cgmq_fx.attach` or `cgmq_fx.fit`, and take the result with `cgmq_fx.lower`.

    Args:
        model: the float model, left untouched. Train it first: what it has learned is the start.
        budget: an upper bound: a share of the 32-bit reference cost (``"0.5%"`` or 0.005), an
            amount (``"12 MBOP"``), a mapping from resources to these, or a `Budget`.
        example_inputs: the inputs of one call, of which shapes and dtypes matter. Without them
            shapes come from the first batch, and branches on shapes cannot be traced.
        cost_table: the prices: the name of a built-in table, a path, a `CostTable`, or several of
            these; by default bit-operations.
        widths: the bit-widths that learned quantizers may take, 2 to 16 and 32.
        learn_input_bits: learn the bit-width of the inputs too. Otherwise they arrive with the cost
            table's ``input_bits`` and are quantized to that.
        per_channel: give weights a range for each output channel, not one for the whole tensor.
        batch_axis: the axis of the inputs that counts samples; costs are for one sample. None:
            costs are for the inputs as they are.

    Raises:
        BudgetError: the budget is malformed, or infeasible for the shapes of `example_inputs`.
        CostTableError: a cost table is malformed or has no price for an operation.
        UnsupportedModelError: the model cannot be traced, or the inputs do not fit it.
        UsageError: another argument makes no sense.
    """
    settings = _settings(budget, cost_table, widths, learn_input_bits, per_channel, batch_axis)
    twin = _copy(model)
    inputs = None if example_inputs is None else _bound_inputs(twin, example_inputs)
    gm = trace(twin, inputs, batch_axis, reserved=(QUANTIZERS, FROZEN, PLAN))
    Pipeline(_passes(settings, inputs)).run(gm)
    if not hasattr(gm, QUANTIZERS):
        gm.add_module(QUANTIZERS, QuantizerSet())
    num_sites = sum(1 for _ in gm.get_submodule(QUANTIZERS).children())
    gm.add_module(PLAN, Plan(settings, num_sites))
    prepared = PreparedModule(gm, gm.graph, class_name=type(model).__name__)
    if inputs is not None:
        prepared.price(inputs)
        prepared._first_batch.remove()
    return prepared


def _settings(
    budget: object,
    cost_table: Table | Sequence[Table] | None,
    widths: Sequence[int],
    learn_input_bits: bool,
    per_channel: bool,
    batch_axis: int | None,
) -> Settings:
    parsed = Budget.parse(budget)
    tables = _tables(cost_table)
    # A package's table is loaded only where it is named, so that a broken one harms nobody else.
    named = [name for name in table_names() if name in builtin_names() or name in dict(parsed)]
    units = {name: get_table(name).unit for name in named}
    units |= {**BUILT_IN} | {name: table.unit for name, table in tables.items()}
    limits = parsed.resolve(units, default=next(iter(tables)), given=tables)
    for name in limits:
        if name not in tables and name not in BUILT_IN:
            tables[name] = get_table(name)
    return Settings(
        parsed,
        tables,
        limits,
        _checked_widths(widths),
        None if learn_input_bits else next(iter(tables.values())).input_bits,
        per_channel,
        batch_axis,
    )


def _tables(cost_table: Table | Sequence[Table] | None) -> dict[str, CostTable]:
    given: Any = "bops" if cost_table is None else cost_table
    tables = [load_table(item) for item in (given if isinstance(given, list | tuple) else [given])]
    by_name = {table.name: table for table in tables}
    if not tables or len(by_name) < len(tables):
        raise UsageError(
            f"cost_table names {[table.name for table in tables]}; give at least one table, and "
            f"each name once"
        )
    return by_name


def _checked_widths(widths: Sequence[int]) -> tuple[int, ...]:
    wrong = [width for width in widths if not is_width(width)]
    if wrong or not widths:
        raise UsageError(
            f"widths={tuple(widths)!r} {f'has {wrong}' if wrong else 'is empty'}; give bit-widths "
            f"from 2 to 16, or 32, such as {DEFAULT_WIDTHS}"
        )
    # 32 bits is where training starts; where the hardware has no such width, pricing removes it.
    return tuple(sorted({*widths, FLOAT_WIDTH}))


def _copy(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is {type(model).__name__}, not an nn.Module; give the float model")
    if is_prepared(model):
        raise UsageError(
            f"{type(model).__name__} is prepared already; give prepare the float model that it was "
            f"made from, or train this one with cgmq_fx.attach"
        )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise UnsupportedModelError(
            f"{type(model).__name__} has uninitialised lazy parameters {lazy}; run it once on a "
            f"batch first"
        )
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and "
            f"prepare leaves your model untouched; make copy.deepcopy(model) work first"
        ) from error


def _bound_inputs(
    model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any] | torch.Tensor
) -> tuple[Any, ...]:
    """Return one value for each parameter of the model's forward, as the placeholders will have."""
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    is_text = isinstance(example_inputs, str | bytes)
    if is_text or not isinstance(example_inputs, Sequence | Mapping) or not example_inputs:
        raise UsageError(
            f"example_inputs is {type(example_inputs).__name__}; give a tuple of the model's "
            f"inputs, such as (x,), or a dict of keyword inputs"
        )
    args, kwargs = (
        ((), example_inputs) if isinstance(example_inputs, Mapping) else (example_inputs, {})
    )
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UnsupportedModelError(
            f"example_inputs do not fit {type(model).__name__}.forward"
            f"{inspect.signature(model.forward)}: {error}; give one value for each input"
        ) from error
    bound.apply_defaults()
    return tuple(bound.arguments.values())


def _passes(settings: Settings, inputs: tuple[Any, ...] | None) -> list[GraphPass]:
    bounding = [settings.tables[name] for name in settings.limits if name in settings.tables]
    ops = frozenset(op for table in bounding for row in table.rows for op in row.op)
    weight_ops = _WEIGHT_OPS if WEIGHT_MEMORY in settings.limits else frozenset()
    # Activations that memory holds as codes must be read through quantizers by every operation.
    stored_ops = OP_CLASSES if PEAK_ACTIVATION_MEMORY in settings.limits else frozenset()
    shapes = []
    if inputs is not None:
        # With shapes known, operands that are not floating-point tensors are left alone.
        shapes = [AnnotateShapes(one_sample(inputs, settings.batch_axis))]
    return [
        Functionalize(),
        AnnotateOperations(),
        AnnotateNonnegative(),
        *shapes,
        ShareQuantizers(ops, weight_ops, frozenset(stored_ops)),
        InsertQuantizers(
            settings.widths,
            settings.input_bits,
            settings.per_channel,
            quantize_attention="attention" in ops,
        ),
    ]
