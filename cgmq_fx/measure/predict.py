"""What a measured table says of a network: its latency, and how sure that is."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import nn

from cgmq_fx.accounting import Accounting
from cgmq_fx.cost.operation import BoundOperation, as_pair
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.measure.fixing import prepared_for_timing, uniform_bits


def predicted(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    table: CostTable,
    weights: int,
    activations: int,
) -> Fraction:
    """Return what `model` costs by `table` with all bit-widths like these, in the table's unit.

    Raises:
        CgmqError: it cannot be prepared or priced.
    """
    prepared = prepared_for_timing(model, inputs, sorted({weights, activations}), table)
    accounting = prepared.plan.accounting
    return accounting.totals(uniform_bits(accounting, weights, activations))[table.name]


def uncertainty(accounting: Accounting, table: CostTable, bits: Sequence[int]) -> Fraction:
    """Return the relative error of a total, from the errors that the rows of `table` state.

    Errors of rows are taken to point the same way, so that they add up: what networks are off by
    is mostly in common to their operations. A row without an error counts as exact.

    Args:
        accounting: of a prepared network.
        table: one of its cost tables.
        bits: bit-widths, in the order of the accounting's sites.
    """
    resource = accounting.resources[table.name]
    costs = resource.costs(accounting.index(bits))
    total = sum(costs, Fraction(0))
    doubt = Fraction(0)
    for bound, row, cost in zip(accounting.operations, resource.rows, costs, strict=True):
        if row is not None:
            doubt += cost * _error(bound, row, bits)
    return doubt / total if total else Fraction(0)


def _error(bound: BoundOperation, row: Row, bits: Sequence[int]) -> Fraction:
    if row.grid is not None and bound.sources:
        own = [bits[s.site] if s.site is not None else s.bits or 0 for s in bound.sources]
        entry = row.grid_entry(bound.operation, as_pair(own))
        if entry is not None and entry.error is not None:
            return entry.error
    return row.error or Fraction(0)
