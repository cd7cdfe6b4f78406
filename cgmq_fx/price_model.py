"""Price a model at given bit-widths, without a budget and without training."""

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from cgmq_fx.accounting import Site
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import UsageError
from cgmq_fx.gates import DEFAULT_WIDTHS
from cgmq_fx.ledger import Ledger, ledger
from cgmq_fx.prepare import prepare
from cgmq_fx.report import Report, report


@dataclass(frozen=True)
class Priced:
    """What a model costs.

    Attributes:
        report: the costs.
        ledger: what is priced by which row.
        notes: where a bit-width is not the one that was asked for, and why.
    """

    report: Report
    ledger: Ledger
    notes: tuple[str, ...]


def load_model(place: str) -> nn.Module:
    """Return the model at ``module:attribute``: a module, or what a callable returns.

    The module is imported, also from the working directory: code at `place` is run.

    Raises:
        UsageError: there is none, it fails, or it is no `nn.Module`.
    """
    module_name, _, attribute = place.partition(":")
    if not module_name or not attribute:
        raise UsageError(
            f"model {place!r} is not module:callable, such as torchvision.models:resnet18"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: object = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
        if not isinstance(found, nn.Module) and callable(found):
            found = found()
    except Exception as error:  # whatever the user's code does
        raise UsageError(
            f"model {place!r} cannot be had: {type(error).__name__}: {error}; give module:callable "
            "where the callable needs no arguments and returns an nn.Module"
        ) from error
    if not isinstance(found, nn.Module):
        raise UsageError(
            f"model {place!r} is {type(found).__name__}, not an nn.Module; give module:callable "
            "where the callable returns one"
        )
    return found


def price_model(
    model: nn.Module,
    table: CostTable,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    *,
    weights: int = 8,
    activations: int = 8,
    bits: Mapping[str, int] | None = None,
) -> Priced:
    """Return what `model` costs by `table` at these bit-widths.

    Args:
        model: the float model, left untouched.
        table: the prices.
        shapes: dtype (``float32`` or ``int64``) and shape of each input, the batch first.
        weights: bit-width of all weights.
        activations: bit-width of all activations.
        bits: bit-widths by site, for those that differ.

    Raises:
        CgmqError: the model cannot be traced, the table cannot price it, or a site is unknown.
    """
    chosen = dict(bits or {})
    inputs = zero_inputs(shapes)
    widths = sorted({*DEFAULT_WIDTHS, weights, activations, *chosen.values()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # doubts about the table were told when it was read
        prepared = prepare(
            model,
            {table.name: "100%"},
            example_inputs=inputs,
            cost_table=table,
            widths=widths,
        )
    accounting = prepared.plan.accounting
    prepared.plan.accounting = replace(accounting, limits={})  # the bound was a formality
    unknown = sorted(set(chosen) - set(accounting.site_names))
    if unknown:
        raise UsageError(
            f"there is no quantizer named {unknown}; there are: {', '.join(accounting.site_names)}"
        )
    notes, found = [], []
    for site in accounting.sites:
        asked = chosen.get(site.name, weights if site.role == "weight" else activations)
        found.append(nearest(site, asked))
        if found[-1] != asked and (site.learned or site.name in chosen):
            allowed = ", ".join(map(str, site.allowed))
            notes.append(f"{site.name} has {found[-1]} bits, not {asked}: it may have {allowed}")
    prepared.set_bit_widths(found)
    return Priced(report(prepared), ledger(prepared), tuple(notes))


def zero_inputs(shapes: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[torch.Tensor, ...]:
    """Return inputs of these dtypes (``float32`` or ``int64``) and shapes."""
    return tuple(
        torch.zeros(shape, dtype=torch.int64 if kind == "int64" else torch.float32)
        for kind, shape in shapes
    )


def nearest(site: Site, asked: int) -> int:
    """Return the narrowest allowed bit-width that holds `asked`, or the widest there is."""
    return min((width for width in site.allowed if width >= asked), default=site.allowed[-1])
