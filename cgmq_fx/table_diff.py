"""What differs between two cost tables: fields, rows, and prices pair by pair."""

from collections.abc import Iterator
from fractions import Fraction

from cgmq_fx.cost.attributes import ALL_BITS, bit_variables
from cgmq_fx.cost.expression import Expression
from cgmq_fx.cost.grid import Grid
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.cost.table_fields import Reference
from cgmq_fx.errors import CgmqError
from cgmq_fx.units import format_number

#: Widths at which formulas are compared.
_WIDTHS = (2, 4, 8)
_MAX_PAIRS = 16
_DIGITS = 6
_FIELDS = ("name", "unit", "source", "input_bits", "reference", "unpriced", "share", "schema")
Key = tuple[tuple[str, ...], str, str]


def difference(first: CostTable, second: CostTable) -> list[str]:
    """Return lines on what differs: ``-`` stands in `first` alone, ``+`` in `second` alone.

    Rows are the same row where operations, condition and piece of work are the same.
    """
    lines = []
    for name in _FIELDS:
        before, after = getattr(first, name), getattr(second, name)
        if before != after:
            lines.append(f"{name}: {_shown(before)} -> {_shown(after)}")
    old, new = _by_key(first), _by_key(second)
    lines += [f"- {_title(key)}: {_cost_text(old[key])}" for key in old if key not in new]
    lines += [f"+ {_title(key)}: {_cost_text(new[key])}" for key in new if key not in old]
    for key, row in old.items():
        if key in new:
            changes = list(_row_changes(row, new[key], (first.unit, second.unit)))
            if changes:
                lines += [f"~ {_title(key)}", *(f"    {change}" for change in changes)]
    return lines


def _by_key(table: CostTable) -> dict[Key, Row]:
    rows = {(row.op, row.where.canonical if row.where else "", row.per): row for row in table.rows}
    return dict(sorted(rows.items()))


def _title(key: Key) -> str:
    ops, where, per = key
    condition = f", where {where}" if where else ""
    return f"{', '.join(ops)}{condition}, per {per.replace('_', ' ')}"


def _shown(value: object) -> str:
    if isinstance(value, Reference):
        return f"weight {value.weight}, activation {value.activation}"
    return repr(value) if isinstance(value, str) else str(value)


def _row_changes(old: Row, new: Row, units: tuple[str, str]) -> Iterator[str]:
    if old.source != new.source:
        yield f"source: {_shown(old.source)} -> {_shown(new.source)}"
    if old.error != new.error:
        yield f"error: {_error(old.error)} -> {_error(new.error)}"
    if (old.cost, old.grid) == (new.cost, new.grid):
        return
    if old.grid is None or new.grid is None or old.grid.axes != new.grid.axes:
        yield f"cost: {_cost_text(old)} -> {_cost_text(new)}"
    pairs = list(_pair_changes(old, new, units))
    yield from pairs[:_MAX_PAIRS]
    if len(pairs) > _MAX_PAIRS:
        yield f"and {len(pairs) - _MAX_PAIRS} more pairs"


def _pair_changes(old: Row, new: Row, units: tuple[str, str]) -> Iterator[str]:
    """Yield the pairs of widths whose price differs, and pairs that are listed otherwise."""
    axes = next((row.grid.axes for row in (new, old) if row.grid is not None), _axes(new))
    for first in _listed_widths(old, new, 0):
        for second in _listed_widths(old, new, 1):
            before, after = (_price(row, axes, first, second) for row in (old, new))
            if before != after:
                pair = f"{axes[0]} {first} x {axes[1]} {second}"
                yield f"{pair}: {_change(before, after, units)}"
    if old.grid is not None and new.grid is not None:
        yield from _listing_changes(old.grid, new.grid)


def _listing_changes(old: Grid, new: Grid) -> Iterator[str]:
    """Yield the pairs that one grid alone lists, or of which they state other sources or errors."""
    before, after = (
        {(entry.first, entry.second): (entry.source, entry.error) for entry in grid.entries}
        for grid in (old, new)
    )
    for pair in sorted({*before, *after}):
        text = f"{new.axes[0]} {pair[0]} x {new.axes[1]} {pair[1]}"
        if pair not in after:
            yield f"{text}: no longer listed"
        elif pair not in before:
            yield f"{text}: newly listed"
        elif before[pair] != after[pair]:
            yield f"{text}: other source or error"


def _listed_widths(old: Row, new: Row, axis: int) -> list[int]:
    grids = [row.grid for row in (old, new) if row.grid is not None]
    return sorted({width for grid in grids for width in grid.widths(axis)} or set(_WIDTHS))


def _axes(row: Row) -> tuple[str, str]:
    formula = row.cost if isinstance(row.cost, Expression) else None
    pair = formula is not None and formula.variables & {"lhs_bits", "rhs_bits"}
    return ("lhs", "rhs") if pair else ("weight", "activation")


def _price(row: Row, axes: tuple[str, str], first: int, second: int) -> Fraction | None:
    """Return the price of a pair; None where it has none, or depends on more than its widths."""
    if row.grid is not None:
        entry = row.grid.entry(first, second)
        return None if entry is None else entry.cost
    if isinstance(row.cost, Fraction):
        return row.cost
    if not isinstance(row.cost, Expression) or not row.cost.variables <= ALL_BITS:
        return None
    try:
        operands = bit_variables("pair" if axes[0] == "lhs" else "weight", (first, second))
        return row.cost.number(operands)
    except CgmqError:
        return None


def _amount(cost: Fraction | None) -> str:
    return "no price" if cost is None else format_number(cost, _DIGITS)


def _change(before: Fraction | None, after: Fraction | None, units: tuple[str, str]) -> str:
    if units[0] != units[1]:
        return f"{_amount(before)} {units[0]} -> {_amount(after)} {units[1]}"
    text = f"{_amount(before)} -> {_amount(after)} {units[1]}"
    if not before or after is None:
        return text
    ratio = after / before
    return (
        f"{text} ({f'x {float(ratio):.3g}' if ratio > 2 else f'{float(100 * ratio - 100):+.3g} %'})"
    )


def _error(error: Fraction | None) -> str:
    return "not stated" if error is None else f"{float(100 * error):.3g} %"


def _cost_text(row: Row) -> str:
    if row.grid is not None:
        count = len(row.grid.entries)
        return f"a grid of {count} {'pair' if count == 1 else 'pairs'}"
    if isinstance(row.cost, Fraction):
        return format_number(row.cost, _DIGITS)
    return getattr(row.cost, "text", str(row.cost))
