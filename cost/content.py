"""A cost table as plain values: what its digest is made of, and what a file of it holds."""

from fractions import Fraction
from typing import Any

from cgmq_fx.cost.computed_cost import ComputedCost
from cgmq_fx.cost.expression import Expression
from cgmq_fx.cost.grid import Grid
from cgmq_fx.cost.row import Row


def row_content(row: Row) -> dict[str, Any]:
    """Return a row as the keys and plain values of a table file.

    A computed cost, which no file can hold, stands by its name and version.
    """
    data: dict[str, Any] = {"op": list(row.op), "per": row.per}
    if row.where is not None:
        data["where"] = row.where.canonical
    if isinstance(row.cost, Expression):
        data["cost"] = {"formula": row.cost.canonical}
    elif isinstance(row.cost, ComputedCost):
        data["cost"] = {"computed": row.cost.name, "version": row.cost.version}
    elif row.cost is not None:
        data["cost"] = _plain(row.cost)
    if row.grid is not None:
        data["grid"] = _grid_json(row.grid)
    if row.source:
        data["source"] = row.source
    if row.error is not None:
        data["error"] = _plain(row.error)
    if row.layer:
        data["layer"] = row.layer
    return data


def _grid_json(grid: Grid) -> list[dict[str, Any]]:
    listed = []
    for entry in grid.entries:
        item: dict[str, Any] = {
            grid.axes[0]: entry.first,
            grid.axes[1]: entry.second,
            "cost": _plain(entry.cost),
        }
        if entry.source:
            item["source"] = entry.source
        if entry.error is not None:
            item["error"] = _plain(entry.error)
        listed.append(item)
    return listed


def _plain(number: Fraction) -> int | str:
    return int(number) if number.denominator == 1 else str(number)
