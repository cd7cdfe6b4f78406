"""The fields of a row, from what a user wrote to checked values."""

import itertools
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from cgmq_fx.cost.attributes import ALL_BITS, bit_names, bit_variables, class_variables, is_target
from cgmq_fx.cost.computed_cost import ComputedCost
from cgmq_fx.cost.expression import NUMBER, Expression, Kind, Value
from cgmq_fx.cost.faults import Faults, nearest
from cgmq_fx.cost.fields import (
    check_keys,
    read_amount,
    read_bit_width,
    read_choice,
    read_mapping,
    read_sequence,
    read_text,
    read_uncertainty,
    read_whole,
)
from cgmq_fx.cost.grid import PAIR_AXES, WEIGHT_AXES, Grid, GridEntry
from cgmq_fx.cost.operation import OP_CLASSES
from cgmq_fx.errors import CostTableError

#: What one piece of work may be.
PER = ("mac", "output_element", "input_element", "weight", "call")
#: Keys of a row.
ROW_KEYS = ("op", "where", "per", "cost", "grid", "source", "error", "layer")
ENTRY_KEYS = ("cost", "source", "error")
MAX_OPS = 64
MAX_ENTRIES = 1024
MAX_LAYER = 64

#: Widths at which formulas are tried when a table is read; every width that is used is tried again
#: when a network is priced.
TRIED_WIDTHS = (1, 2, 3, 4, 5, 6, 8, 16, 32)


def formula_cost(formula: Expression, variables: Mapping[str, Value | int]) -> Fraction:
    """Return the value of a formula, which must not be negative.

    Raises:
        CostTableError: it is negative, or divides by zero.
    """
    cost = formula.number(variables)
    if cost < 0:
        raise CostTableError(f"formula {formula.text!r} gives {cost}; a cost is never negative")
    return cost


def normalise(raw: Mapping[str, Any], faults: Faults) -> dict[str, Any]:
    """Return the fields of a row from what a user wrote, noting every fault."""
    check_keys(raw, ROW_KEYS, ("op", "per"), faults)
    ops = _ops(raw["op"], faults.below("op")) if "op" in raw else ()
    values: dict[str, Any] = {
        "op": ops,
        "per": read_choice(raw.get("per", PER[0]), PER, faults.below("per")),
        "cost": None,
        "grid": None,
        "where": None,
        "source": read_text(raw.get("source", ""), faults.below("source")),
        "error": read_uncertainty(raw.get("error"), faults.below("error")),
        "layer": read_whole(raw.get("layer", 0), MAX_LAYER, faults.below("layer")),
    }
    cost, grid, where = raw.get("cost"), raw.get("grid"), raw.get("where")
    if (cost is None) == (grid is None):
        both = "has both 'cost' and 'grid'" if cost is not None else "has neither 'cost' nor 'grid'"
        faults.add(f"{both}; give exactly one of them")
    if cost is not None:
        values["cost"] = _cost(cost, ops, faults.below("cost"))
    if grid is not None:
        values["grid"] = grid if isinstance(grid, Grid) else _grid(grid, ops, faults.below("grid"))
    if where is not None and where != "":
        values["where"] = _where(where, ops, faults.below("where"))
    return values


def _ops(value: object, faults: Faults) -> tuple[str, ...]:
    items = read_sequence([value] if isinstance(value, str) else value, faults, MAX_OPS)
    ops: list[str] = []
    for index, item in enumerate(items):
        here = faults.below(index) if len(items) > 1 else faults
        name = read_text(item, here, empty=False)
        if not is_target(name) and name not in OP_CLASSES:
            if name.strip():
                hint = "" if here.are_many else nearest(name, OP_CLASSES)
                here.add(
                    f"unknown operation class{hint}; one of "
                    f"{', '.join(OP_CLASSES)}, "
                    "or an FX target such as 'torch.ops.aten.bmm.default'",
                    name,
                )
        elif name in ops:
            here.add("given twice; keep one", name)
        else:
            ops.append(name)
    return tuple(sorted(ops))


def _expression(value: object, faults: Faults) -> Expression | None:
    if isinstance(value, Expression):
        return value
    written = read_text(value, faults, empty=False)
    if not written.strip():
        return None
    try:
        return Expression.parse(written)
    except CostTableError as error:
        faults.add(str(error))
        return None


def _checked(
    value: object, ops: tuple[str, ...], bits: tuple[str, ...], faults: Faults, *, condition: bool
) -> Expression | None:
    """Return an expression whose variables exist for all of `ops` and whose kinds fit."""
    expression = _expression(value, faults)
    if expression is None or not ops:
        return None
    kinds: dict[str, Kind] = {**class_variables(ops), **dict.fromkeys(bits, NUMBER)}
    unknown = sorted(expression.variables - set(kinds))
    for name in unknown:
        faults.add(
            f"unknown variable {name!r}{nearest(name, kinds)}; "
            f"for {', '.join(ops)} there are {', '.join(kinds)}",
            expression.text,
        )
    if unknown:
        return None
    try:
        expression.check(kinds, "bool" if condition else NUMBER)
    except CostTableError as error:
        faults.add(str(error))
        return None
    return expression


def _where(value: object, ops: tuple[str, ...], faults: Faults) -> Expression | None:
    return _checked(value, ops, (), faults, condition=True)


def _cost(
    value: object, ops: tuple[str, ...], faults: Faults
) -> Fraction | Expression | ComputedCost | None:
    if isinstance(value, ComputedCost):
        return value
    if isinstance(value, Mapping):
        check_keys(value, ("formula",), ("formula",), faults)
        if "formula" not in value:
            return None
        faults, value = faults.below("formula"), value["formula"]
    elif not isinstance(value, Expression):
        if isinstance(value, (str, bool)) and not (isinstance(value, str) and "/" in value):
            faults.add('must be a number, or { formula = "..." }', value)
            return None
        return read_amount(value, faults)
    formula = _checked(value, ops, bit_names(ops), faults, condition=False)
    if formula is not None:
        try:
            if formula.variables <= ALL_BITS:  # others are tried when a network is priced
                tried_costs(formula)
        except CostTableError as error:
            faults.add(str(error))
    return formula


@lru_cache(maxsize=4096)
def tried_costs(formula: Expression) -> Mapping[tuple[int, int], Fraction]:
    """Return what a formula of bit-widths alone gives, by weight (rhs) and activation (lhs) width.

    Raises:
        CostTableError: it divides by zero or is negative at some of `TRIED_WIDTHS`.
    """
    costs: dict[tuple[int, int], Fraction] = {}
    for pair in itertools.product(TRIED_WIDTHS, TRIED_WIDTHS):
        widths = bit_variables("weight", pair)
        try:
            costs[pair] = formula_cost(formula, widths)
        except CostTableError as error:
            at = ", ".join(f"{name} = {widths[name]}" for name in sorted(formula.variables))
            raise CostTableError(f"at {at or 'every width'}: {error}") from error
    return costs


def _grid(value: object, ops: tuple[str, ...], faults: Faults) -> Grid | None:
    items = read_sequence(value, faults, MAX_ENTRIES)
    bits = bit_names(ops)
    allowed = [axes for axes in (WEIGHT_AXES, PAIR_AXES) if f"{axes[0]}_bits" in bits]
    before = len(faults.found)
    raws = [read_mapping(item, faults.below(index)) for index, item in enumerate(items)]
    if not raws or len(faults.found) > before:
        return None
    axes = next((axes for axes in (WEIGHT_AXES, PAIR_AXES) if set(axes) & set(raws[0])), None)
    if axes not in allowed:
        wanted = " or ".join(" and ".join(repr(axis) for axis in axes) for axes in allowed)
        faults.add(
            f"for {', '.join(ops)} a grid lists {wanted or 'nothing: price the classes apart'}"
        )
        return None
    assert axes is not None
    entries: dict[tuple[int, int], GridEntry] = {}
    for index, raw in enumerate(raws):
        here = faults.below(index)
        check_keys(raw, (*axes, *ENTRY_KEYS), (*axes, "cost"), here)
        entry = GridEntry(
            first=read_bit_width(raw.get(axes[0], 8), here.below(axes[0])),
            second=read_bit_width(raw.get(axes[1], 8), here.below(axes[1])),
            cost=read_amount(raw.get("cost", 0), here.below("cost")),
            source=read_text(raw.get("source", ""), here.below("source")),
            error=read_uncertainty(raw.get("error"), here.below("error")),
        )
        pair = entry.first, entry.second
        if pair in entries:
            here.add(
                f"the pair {axes[0]} = {pair[0]}, {axes[1]} = {pair[1]} stands twice; keep one"
            )
        entries[pair] = entry
    if len(faults.found) > before:
        return None
    grid = Grid(axes, tuple(sorted(entries.values())))
    if (corner := grid.missing_corner()) is not None:
        faults.add(
            f"widths are chosen one by one, so the widest pair {axes[0]} = {corner[0]}, "
            f"{axes[1]} = {corner[1]} must have a cost; add it"
        )
    return grid
