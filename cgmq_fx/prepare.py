"""`prepare`: a float model and a budget in, a trainable quantized graph out."""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cgmq_fx.account import BUILT_IN
from cgmq_fx.budget import Budget
from cgmq_fx.choices import Overrides, Skip, read_choices
from cgmq_fx.collector import without_collector
from cgmq_fx.cost.find import builtin_names, plugin_names
from cgmq_fx.cost.load import get_table, load_table
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import UnsupportedModelError, UsageError
from cgmq_fx.front_end import record
from cgmq_fx.gates import DEFAULT_WIDTHS, FLOAT_WIDTH, is_width
from cgmq_fx.passes.concrete_args import bind_with, checked_concrete
from cgmq_fx.passes.freeze_bit_widths import FROZEN
from cgmq_fx.passes.insert_quantizers import QUANTIZERS
from cgmq_fx.passes.lazy_layers import copy_model, initialize_lazy
from cgmq_fx.passes.leaf_modules import ModuleSelector, match
from cgmq_fx.passes.pipeline import Pipeline
from cgmq_fx.passes.trace_options import TraceOptions
from cgmq_fx.plan import Plan, Settings
from cgmq_fx.prepared import PLAN, PreparedModule, is_prepared, one_sample
from cgmq_fx.quantize_graph import quantizing_passes
from cgmq_fx.quantizers import QuantizerSet
from cgmq_fx.unit_bits import Granularity

Table = str | os.PathLike[str] | Mapping[str, Any] | CostTable


@without_collector
def prepare(
    model: nn.Module,
    budget: object,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | torch.Tensor | None = None,
    cost_table: Table | Sequence[Table] | None = None,
    widths: Sequence[int] = DEFAULT_WIDTHS,
    learn_input_bits: bool = False,
    per_channel: bool = True,
    granularity: Granularity = "layer",
    batch_axis: int | None = 0,
    skip: Skip = (),
    overrides: Overrides | None = None,
    share: Sequence[str] | None = None,
    front_end: str = "auto",
    leaf_modules: ModuleSelector | Sequence[ModuleSelector] = (),
    concrete_args: Mapping[str, Any] | None = None,
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
        widths: the bit-widths that learned quantizers may take, 1 to 16, 32 (float), and 0
            (pruned: the tensor is 0, and what reads it costs nothing).
        learn_input_bits: learn the bit-width of the inputs too. Otherwise they arrive with the cost
            table's ``input_bits`` and are quantized to that.
        per_channel: give weights a range for each output channel, not one for the whole tensor.
        granularity: what of a weight has a bit-width of its own: ``"layer"``, the whole weight;
            ``"channel"``, each output channel; ``"element"``, each element. Weights without
            output channels, and those whose bit-width is not learned, have one.
        batch_axis: the axis of the inputs that counts samples; costs are for one sample. None:
            costs are for the inputs as they are.
        skip: what stays float: a selector or several. A selector is the name of an operation, a
            layer, a quantizer or a weight, or a glob of these (a layer stands for all below it); a
            type of layer; or a function of a `cgmq_fx.selectors.Operand` to True or False.
        overrides: by selector how its quantizers differ: an `Override`, or a mapping with its keys.
        share: operation classes, "add", "sub" or "cat", whose quantized operands have one
            quantizer. None: those that the cost tables name.
        front_end: what records the graph: ``"fx"`` (symbolic tracing), ``"export"``
            (`torch.export`, needs `example_inputs`), or ``"auto"``: export where tracing fails.
            ``prepared.plan.settings.front_end`` says which one did.
        leaf_modules: submodules that are not traced into: each runs as it is, in float, and its
            work is priced at 32 bits. Paths or globs, classes, or functions of a module.
        concrete_args: arguments of the model's forward that are no tensors, by name, and the values
            that they will always have; the model is traced for these, and refuses others.

    Raises:
        BudgetError: the budget is malformed, or infeasible for the shapes of `example_inputs`.
        CostTableError: a cost table is malformed or has no price for an operation.
        UnsupportedModelError: the model cannot be traced, or the inputs do not fit it.
        UsageError: another argument makes no sense.
    """
    settings = _settings(budget, cost_table, widths, learn_input_bits, per_channel, batch_axis)
    choices = read_choices(skip, overrides, share)
    settings = replace(settings, choices=choices, granularity=_checked_granularity(granularity))
    fixed = checked_concrete(model, concrete_args)
    twin = _copy(model, is_lazy_allowed=example_inputs is not None)
    inputs = None if example_inputs is None else _bound_inputs(twin, example_inputs, fixed)
    if inputs is not None:
        initialize_lazy(twin, inputs)
    options = TraceOptions(match(twin, leaf_modules, "leaf_modules"), fixed)
    reserved = (QUANTIZERS, FROZEN, PLAN)
    gm, settings = record(twin, inputs, settings, front_end, reserved, options)
    sample = None if inputs is None else one_sample(inputs, settings.batch_axis)
    Pipeline(quantizing_passes(settings, sample, inputs)).run(gm)
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
    # Packages are searched for a table only where it is named: that takes longer than tracing a
    # small model, and a broken one harms nobody else.
    known = {*builtin_names(), *BUILT_IN, *tables}
    unknown = [name for name in dict(parsed) if name is not None and name not in known]
    named = set(unknown).intersection(plugin_names()) if unknown else set()
    units = {name: get_table(name).unit for name in (*builtin_names(), *named)}
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
            f"from 0 to 16, or 32, such as {DEFAULT_WIDTHS}"
        )
    # 32 bits is where training starts; where the hardware has no such width, pricing removes it.
    return tuple(sorted({*widths, FLOAT_WIDTH}))


def _checked_granularity(granularity: object) -> Granularity:
    if granularity not in get_args(Granularity):
        options = ", ".join(map(repr, get_args(Granularity)))
        raise UsageError(f"granularity={granularity!r} is unknown; give one of {options}")
    return cast(Granularity, granularity)


def _copy(model: nn.Module, *, is_lazy_allowed: bool) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is {type(model).__name__}, not an nn.Module; give the float model")
    if is_prepared(model):
        raise UsageError(
            f"{type(model).__name__} is prepared already; give prepare the float model that it was "
            f"made from, or train this one with cgmq_fx.attach"
        )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy and not is_lazy_allowed:
        raise UnsupportedModelError(
            f"{type(model).__name__} has uninitialised lazy parameters {lazy}; run it once on a "
            f"batch first, or give example_inputs=(...)"
        )
    try:
        return copy_model(model)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and "
            f"prepare leaves your model untouched; make copy.deepcopy(model) work first (use "
            f"torch.nn.utils.parametrizations.weight_norm where weight norm is the reason)"
        ) from error


def _bound_inputs(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | torch.Tensor,
    fixed: Mapping[str, Any],
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
        bound = bind_with(inspect.signature(model.forward), args, kwargs, fixed)
    except TypeError as error:
        raise UnsupportedModelError(
            f"example_inputs do not fit {type(model).__name__}.forward"
            f"{inspect.signature(model.forward)}: {error}; give one value for each input"
        ) from error
    bound.apply_defaults()
    return tuple(bound.arguments.values())
