"""`check_cost_table`: what holds for every cost table."""

import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from cgmq_fx.cost.attributes import bit_variables, operation_variables
from cgmq_fx.cost.computed_cost import ComputedCost
from cgmq_fx.cost.expression import Expression
from cgmq_fx.cost.load import load_table
from cgmq_fx.cost.monotone import CostTableWarning, falling_pair
from cgmq_fx.cost.operation import OPERAND_NAMES, Operation
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import CostTableError
from cgmq_fx.testing.accounting_laws import rises
from cgmq_fx.testing.formula_evaluator import evaluate
from cgmq_fx.testing.law_error import require
from cgmq_fx.testing.sample_operations import sample_operations

_WIDTHS = (2, 3, 4, 8, 16, 32)


def check_cost_table(
    table: str | os.PathLike[str] | Mapping[str, Any] | CostTable, *, seed: int = 0
) -> CostTable:
    """Hold a cost table to its laws, and return it.

    The laws: it is the same table when written as TOML and as JSON and read again; the order of its
    rows does not matter; on operations of every class that it names, each pair of bit-widths that
    it supports has a price, which is an exact fraction and not negative, and which an evaluation of
    its own gives too; what it costs never falls when bits rise, where no row was warned of; the
    reference is the price at the reference bit-widths.

    Args:
        table: as for `cgmq_fx.cost.load_table`.
        seed: of the order of rows that is tried.

    Raises:
        CostTableError: it is malformed.
        LawError: a law is broken.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CostTableWarning)
        loaded = load_table(table)
        subject = f"the cost table {loaded.name!r}"
        samples = _samples(loaded)
        checks: Mapping[str, Callable[[], Iterator[str]]] = {
            "round trip": lambda: _file_faults(loaded),
            "order of rows": lambda: _order_faults(loaded, samples, seed),
            "prices": lambda: _price_faults(samples),
            "rising": lambda: _fall_faults(loaded, samples),
            "reference": lambda: _reference_faults(loaded, samples),
        }
        for law, faults in checks.items():
            require(law, subject, faults())
    return loaded


@dataclass(frozen=True)
class _Sample:
    """An operation that a table prices, the row that does, and the pairs of widths it may have."""

    table: CostTable
    operation: Operation
    row: Row
    pairs: tuple[tuple[int, int], ...]

    def cost(self, pair: tuple[int, int]) -> Fraction:
        return self.table.cost(self.operation, pair)


def _samples(table: CostTable) -> list[_Sample]:
    found = []
    for operation in sample_operations(sorted({op for row in table.rows for op in row.op})):
        try:
            row = table.row_for(operation)
        except CostTableError:  # two rows tie, or a condition asks for what it does not have
            continue
        if row is None or not OPERAND_NAMES[operation.operands]:
            continue
        firsts, seconds = (
            sorted(_WIDTHS if widths is None else widths)
            for widths in table.supported_bits(operation)
        )
        pairs = tuple((first, second) for first in firsts for second in seconds)
        found.append(_Sample(table, operation, row, pairs))
    return found


def _file_faults(table: CostTable) -> Iterator[str]:
    if any(isinstance(row.cost, ComputedCost) for row in table.rows):
        return  # no file can hold a function
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.toml"
        path.write_text(table.to_toml(), encoding="utf-8")
        copies = {"TOML": load_table(path), "JSON": load_table(table.to_json())}
    for kind, copy in copies.items():
        if copy.digest != table.digest:
            yield f"written as {kind} and read again its digest is another one"
        for name in ("name", "unit", "source", "input_bits", "reference", "unpriced"):
            if getattr(copy, name) != getattr(table, name):
                yield f"as {kind}, {name} is {getattr(copy, name)!r}, not {getattr(table, name)!r}"
        if set(copy.rows) != set(table.rows):
            yield f"as {kind} its rows are others"


def _order_faults(table: CostTable, samples: list[_Sample], seed: int) -> Iterator[str]:
    rows = list(table.rows)
    random.Random(seed).shuffle(rows)
    given = {name: getattr(table, name) for name in ("source", "input_bits", "reference")}
    other = CostTable(table.name, table.unit, tuple(rows), unpriced=table.unpriced, **given)
    if other.digest != table.digest:
        yield "with its rows in another order its digest is another one"
    for sample in samples:
        found = other.row_for(sample.operation)
        if found != sample.row:
            yield f"in another order {found} prices {sample.operation.name}, not {sample.row}"


def _price_faults(samples: list[_Sample]) -> Iterator[str]:
    for sample in samples:
        for pair in sample.pairs:
            place = f"{sample.row}, {sample.operation.name} at {pair[0]} and {pair[1]} bits"
            try:
                cost = sample.cost(pair)
            except CostTableError as error:
                yield f"{place} has no price: {error}"
                continue
            if not isinstance(cost, Fraction) or cost < 0:
                yield f"{place} costs {cost!r}, not an exact amount from 0"
            wanted = _by_hand(sample, pair)
            if wanted is not None and wanted != cost:
                yield f"{place} costs {cost}, worked out from its text {wanted}"


def _by_hand(sample: _Sample, pair: tuple[int, int]) -> Fraction | None:
    """Return the cost from the text of the row, or None where a function computes it."""
    row, operation = sample.row, sample.operation
    work = {
        "mac": operation.macs,
        "output_element": operation.output_elements,
        "input_element": operation.input_elements,
        "weight": operation.weights,
        "call": 1,
    }[row.per]
    widths = bit_variables(operation.operands, pair)
    if isinstance(row.cost, Fraction):
        return row.cost * work
    if isinstance(row.cost, Expression):
        unit = evaluate(row.cost.text, {**operation_variables(operation), **widths})
        return Fraction(unit) * work
    if row.grid is None:
        return None
    first, second = (widths[f"{axis}_bits"] for axis in row.grid.axes)
    fitting = [e for e in row.grid.entries if e.first >= first and e.second >= second]
    smallest = [e for e in fitting if not any(_is_inside(other, e) for other in fitting)]
    return min(entry.cost for entry in smallest) * work


def _is_inside(other: Any, entry: Any) -> bool:
    return other is not entry and other.first <= entry.first and other.second <= entry.second


def _fall_faults(table: CostTable, samples: list[_Sample]) -> Iterator[str]:
    if not rises(table):
        return
    for sample in samples:
        costs = {pair: sample.cost(pair) for pair in sample.pairs}
        fall = falling_pair(costs)
        if fall is not None:
            low, high = fall
            yield (
                f"{sample.row}, {sample.operation.name}: {low} bits cost {costs[low]}, {high} bits "
                f"only {costs[high]}"
            )


def _reference_faults(table: CostTable, samples: list[_Sample]) -> Iterator[str]:
    for sample in samples:
        bits = table.reference_bits(sample.operation)
        found = table.reference_cost(sample.operation)
        if bits in sample.pairs and found != sample.cost(bits):
            yield f"the reference of {sample.operation.name} is {found}, not {sample.cost(bits)}"
        if sample.row.grid is not None and rises(table):
            most = max(sample.cost(pair) for pair in sample.pairs)
            if found < most:
                yield f"the reference of {sample.operation.name} is {found}, below its price {most}"
