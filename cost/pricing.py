"""Price the operations of a network: from rows and formulas to whole numbers by bit-widths."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from cgmq_fx.cost.monotone import CostTableWarning, falling_text
from cgmq_fx.cost.operation import (
    OPERAND_NAMES,
    PRUNED_BITS,
    BitSource,
    BoundOperation,
    Operation,
    as_pair,
)
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable, supported_bits, unsupported
from cgmq_fx.cost.terms import Term
from cgmq_fx.errors import CostTableError

#: Cost of one piece of work by first and second width; None where the hardware lacks the pair.
_Units = tuple[tuple[Fraction | None, ...], ...]
_FREE: _Units = ((Fraction(0),),)
#: Work of which every element of a weight does the same part.
_DIVISIBLE = frozenset({"mac", "weight"})


@dataclass(frozen=True)
class Pricing:
    """What a cost table says of the operations of a network.

    Attributes:
        operations: as given.
        rows: the row that prices each operation, or None.
        terms: the costs of each operation, in 1 / `scale` of the table's unit.
        scale: the common denominator of all costs.
        reference: cost of the network at the reference bit-widths.
        supported: for each site, the indices of the widths that the hardware has for all its uses.
    """

    operations: tuple[Operation, ...]
    rows: tuple[Row | None, ...]
    terms: tuple[Term, ...]
    scale: int
    reference: Fraction
    supported: tuple[tuple[int, ...], ...]


def price_operations(
    bound_operations: Sequence[BoundOperation],
    table: CostTable,
    num_sites: int,
    widths: tuple[int, ...],
) -> Pricing:
    """Return the costs of all operations at all widths.

    Args:
        bound_operations: operations and where their bit-widths come from.
        table: the prices.
        num_sites: number of learned bit-widths.
        widths: the bit-widths that a site may have, rising.

    Raises:
        CostTableError: an operation that has MACs has no row, rows tie, a formula fails, or the
            hardware has no bit-width that serves all uses of a site; the message lists all of them.
    """
    operations = tuple(bound.operation for bound in bound_operations)
    rows = tuple(table.row_for(operation) for operation in operations)
    table.require_priced(
        operation for operation, row in zip(operations, rows, strict=True) if row is None
    )
    pricer = _Pricer(table, widths)
    priced = [pricer.units(bound, row) for bound, row in zip(bound_operations, rows, strict=True)]
    supported = _supported(bound_operations, rows, table, num_sites, widths)
    _refuse_unsupported(bound_operations, rows, priced, supported, table, widths)
    distinct = {id(units): units for units in priced}.values()
    scale = math.lcm(
        *(cost.denominator for units in distinct for line in units for cost in line if cost)
    )
    return Pricing(
        operations,
        rows,
        tuple(
            _term(bound, row, units, scale)
            for bound, row, units in zip(bound_operations, rows, priced, strict=True)
        ),
        scale,
        sum(map(table.reference_cost_by, rows, operations), Fraction(0)),
        supported,
    )


def _term(bound: BoundOperation, row: Row | None, units: _Units, scale: int) -> Term:
    """Return the costs of an operation in 1 / `scale` of the table's unit."""
    can_choose = row is not None and bound.sources
    sites = [source.site for source in bound.sources] if can_choose else []
    work = row.work(bound.operation) if row is not None else 0
    scaled = tuple(
        tuple(
            None if cost is None else cost.numerator * (scale // cost.denominator) * work
            for cost in line
        )
        for line in units
    )
    first, second = (*sites, None, None)[:2]
    is_divisible = row is None or row.per in _DIVISIBLE
    return Term(bound.operation.name, (first, second), scaled, is_divisible)


def _widths_of(source: BitSource, widths: tuple[int, ...]) -> tuple[int, ...]:
    if source.site is not None:
        return widths
    assert source.bits is not None
    return (source.bits,)


class _Pricer:
    """Unit costs of operations at all widths; remembers those that depend on the widths alone."""

    def __init__(self, table: CostTable, widths: tuple[int, ...]) -> None:
        self.table = table
        self.widths = widths
        self.known: dict[tuple[int, str, tuple[int, ...], tuple[int, ...]], _Units] = {}
        self.warned: set[int] = set()

    def units(self, bound: BoundOperation, row: Row | None) -> _Units:
        """Return the cost of a piece of work; one cell where nothing can be chosen."""
        operation = bound.operation
        if len(bound.sources) != len(OPERAND_NAMES[operation.operands]):
            raise CostTableError(
                f"operation {operation.name!r} has {len(OPERAND_NAMES[operation.operands])} "
                f"bit-widths, {len(bound.sources)} sources were given: {bound.sources}"
            )
        if row is None:
            return _FREE
        if not bound.sources:
            return ((self.table.reference_unit_cost(row, operation),),)
        first, *others = (_widths_of(source, self.widths) for source in bound.sources)
        if not others:
            return self._units_of_one(row, operation, first)
        firsts, seconds = first, others[0]
        key = (id(row), operation.operands, firsts, seconds)
        if row.depends_on_bits_only and key in self.known:
            return self.known[key]
        units = tuple(
            tuple(row.unit_cost(operation, (first, second)) for second in seconds)
            for first in firsts
        )
        if row.depends_on_bits_only:
            self.known[key] = units
        else:
            self._warn_if_falling(row, operation, firsts, seconds, units)
        return units

    def _units_of_one(self, row: Row, operation: Operation, widths: tuple[int, ...]) -> _Units:
        """Return the costs by the width of the one operand that an operation has."""
        units = tuple((row.unit_cost(operation, as_pair((width,))),) for width in widths)
        self._warn_if_falling(row, operation, widths, (0,), units)
        return units

    def _warn_if_falling(
        self,
        row: Row,
        operation: Operation,
        firsts: tuple[int, ...],
        seconds: tuple[int, ...],
        units: _Units,
    ) -> None:
        costs = {
            (first, second): cost
            for first, line in zip(firsts, units, strict=True)
            for second, cost in zip(seconds, line, strict=True)
            if cost is not None
        }
        names = OPERAND_NAMES[operation.operands]
        axes = tuple(name.removesuffix("_bits") for name in names)
        text = falling_text(axes, costs) if id(row) not in self.warned else None
        if text is None:
            return
        self.warned.add(id(row))
        message = f"cost table {self.table.name!r}: {row}, for operation {operation.name!r}: {text}"
        if self.table.strict:
            raise CostTableError(
                f"{message}; correct the formula, or read the table without strict"
            )
        warnings.warn(message, CostTableWarning, stacklevel=5)


def _supported(
    bound_operations: Sequence[BoundOperation],
    rows: Sequence[Row | None],
    table: CostTable,
    num_sites: int,
    widths: tuple[int, ...],
) -> tuple[tuple[int, ...], ...]:
    """Return for each site the indices of `widths` that every operation on it supports."""
    limits: list[list[tuple[str, frozenset[int]]]] = [[] for _ in range(num_sites)]
    for bound, row in zip(bound_operations, rows, strict=True):
        listed = supported_bits(row, bound.operation)
        for source, available in zip(bound.sources, listed, strict=True):
            if source.site is not None and available is not None:
                limits[source.site].append((bound.operation.name, available))
    supported: list[tuple[int, ...]] = []
    faults: list[str] = []
    for site, limit in enumerate(limits):
        common = frozenset(widths).intersection(*(available for _, available in limit))
        if not common:
            listed_text = ", ".join(f"{name!r}: {sorted(bits)}" for name, bits in limit)
            faults.append(f"site {site} serves {listed_text}")
        # On any hardware a tensor may be 0 everywhere.
        has = common | {PRUNED_BITS}
        supported.append(tuple(i for i, width in enumerate(widths) if width in has))
    if faults:
        raise CostTableError(
            f"cost table {table.name!r} has no bit-width among {list(widths)} that all operations "
            f"on one tensor support: {'; '.join(faults)}; allow one of these widths, or add one of "
            "those to the grids"
        )
    return tuple(supported)


def _refuse_unsupported(
    bound_operations: Sequence[BoundOperation],
    rows: Sequence[Row | None],
    costs: Sequence[_Units],
    supported: Sequence[tuple[int, ...]],
    table: CostTable,
    widths: tuple[int, ...],
) -> None:
    """Check that operands of fixed width fit: pairs of learned widths always do."""
    faults: list[str] = []
    for bound, row, cost in zip(bound_operations, rows, costs, strict=True):
        if row is None or row.grid is None or not bound.sources:
            continue
        first, second = (
            *(
                range(1) if source.site is None else supported[source.site]
                for source in bound.sources
            ),
            range(1),
        )[:2]
        missing = [(i, j) for i in first for j in second if cost[i][j] is None]
        if missing:
            i, j = missing[0]
            at = zip(bound.sources, (i, j), strict=False)
            bits = as_pair([_widths_of(source, widths)[place] for source, place in at])
            faults.append(unsupported(table, row, bound.operation, bits))
    if faults:
        raise CostTableError("; ".join(faults))
