"""Cost tables: what each operation costs at each pair of bit-widths, in one unit."""

import hashlib
import json
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from cgmq_fx.cost.computed_cost import ComputedCost
from cgmq_fx.cost.content import row_content
from cgmq_fx.cost.faults import Faults
from cgmq_fx.cost.monotone import CostTableWarning, row_falls
from cgmq_fx.cost.operation import OPERAND_NAMES, Operation, as_pair
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table_fields import (
    DEFAULT_REFERENCE,
    SCHEMA,
    TABLE_KEYS,
    UNPRICED,
    Reference,
    check_rows,
    normalise_table,
)
from cgmq_fx.cost.toml_text import toml_text
from cgmq_fx.errors import CostTableError


@dataclass(frozen=True)
class CostTable:
    """Prices of operations, in one unit.

    The order of rows never matters: of the rows that match an operation, the most specific one
    prices it (`Row.beats`), and two of equal rank are an error.

    Attributes:
        name: what budgets and reports call it.
        unit: of every cost in it, such as ``cycle`` or ``uJ``.
        rows: the prices.
        source: where the numbers come from.
        input_bits: bit-width of what arrives from outside, unless its quantizer is learned.
        reference: the bit-widths that "100 %" means; a mapping ``{"weight": 32, "activation": 32}``
            is accepted.
        unpriced: what becomes of an operation that has MACs and no row: "error", or "zero": it
            costs nothing and is reported as unpriced.
        share: operation classes, "add", "sub" or "cat", whose operands the hardware needs on one
            grid: where they are quantized, they have one quantizer.
        schema: version of the format.
        origin: the file it was read from, for messages; no part of the table's value.
        strict: whether a cost that falls when bits rise is an error, not a `CostTableWarning`.

    Raises:
        CostTableError: some field is malformed; the message lists every fault.
    """

    name: str
    unit: str
    rows: tuple[Row, ...]
    source: str = ""
    input_bits: int = 8
    reference: Reference = DEFAULT_REFERENCE
    unpriced: str = UNPRICED[0]
    schema: int = SCHEMA
    share: tuple[str, ...] = ()
    origin: str = field(default="", compare=False)
    strict: bool = field(default=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        place = self.origin or f"CostTable {self.name!r}"
        faults = Faults()
        raw = {key: getattr(self, key) for key in TABLE_KEYS}
        values = normalise_table(raw, faults)
        object.__setattr__(self, "rows", tuple(self.rows))
        check_rows(self.rows, faults)
        faults.raise_if_any(place)
        for key, value in values.items():
            object.__setattr__(self, key, value)
        self._check_monotone(place)

    def _check_monotone(self, place: str) -> None:
        falls = [f"{row}: {text}" for row in self.rows if (text := row_falls(row)) is not None]
        if falls and self.strict:
            raise CostTableError(
                f"cost table {place} refused, since it is read with strict=True: "
                f"{'; '.join(falls)}; correct the costs, or read it without strict"
            )
        for text in falls:
            warnings.warn(f"cost table {place}: {text}", CostTableWarning, stacklevel=4)

    def row_for(self, operation: Operation) -> Row | None:
        """Return the most specific row that matches `operation`, or None.

        Raises:
            CostTableError: several rows match and none beats all others.
        """
        matching = [row for row in self.rows if row.matches(operation)]
        best = [
            row
            for row in matching
            if not any(other.beats(row, operation) for other in matching if other is not row)
        ]
        if len(best) > 1:
            raise CostTableError(
                f"cost table {self.name!r}: {len(best)} rows are equally specific for operation "
                f"{operation.name!r} ({operation.op}): {' and '.join(map(str, best))}; "
                "add a condition to the 'where' of the one that is meant"
            )
        return best[0] if best else None

    def reference_bits(self, operation: Operation) -> tuple[int, int]:
        """Return the two bit-widths at which `operation` costs 100 %."""
        if operation.operands in ("pair", "activation"):
            return self.reference.activation, self.reference.activation
        return self.reference.weight, self.reference.activation

    def cost(self, operation: Operation, bits: tuple[int, ...] = ()) -> Fraction:
        """Return the cost of `operation` in the table's unit, for one sample.

        Args:
            operation: what is priced.
            bits: its bit-widths, in the order of ``OPERAND_NAMES``; none for an operation without
                quantizable operands, which runs at the reference.

        Raises:
            CostTableError: no row prices it though it has MACs, or the hardware does not have the
                bit-widths.
        """
        if len(bits) != len(OPERAND_NAMES[operation.operands]):
            raise CostTableError(
                f"operation {operation.name!r} has {len(OPERAND_NAMES[operation.operands])} "
                f"bit-widths, {len(bits)} were given: {bits}"
            )
        if not bits:
            return self.reference_cost(operation)
        row = self._required_row(operation)
        if row is None:
            return Fraction(0)
        cost = row.unit_cost(operation, as_pair(bits))
        if cost is None:
            raise CostTableError(unsupported(self, row, operation, as_pair(bits)))
        return cost * row.work(operation)

    def reference_cost(self, operation: Operation) -> Fraction:
        """Return the cost of `operation` at the reference bit-widths.

        A grid that does not reach up to the reference bears its widest pair instead: 100 % is then
        the widest that the hardware has.
        """
        return self.reference_cost_by(self._required_row(operation), operation)

    def reference_cost_by(self, row: Row | None, operation: Operation) -> Fraction:
        """Return the reference cost of an operation that `row` prices."""
        if row is None:
            return Fraction(0)
        return self.reference_unit_cost(row, operation) * row.work(operation)

    def reference_unit_cost(self, row: Row, operation: Operation) -> Fraction:
        """Return what one piece of work of `operation` costs at the reference bit-widths."""
        cost = row.unit_cost(operation, self.reference_bits(operation))
        if cost is not None:
            return cost
        assert row.grid is not None
        return row.grid.widest().cost

    def supported_bits(self, operation: Operation) -> tuple[frozenset[int] | None, ...]:
        """Return the bit-widths that the hardware has for each operand; None where it has any."""
        row = self._required_row(operation)
        return supported_bits(row, operation)

    def _required_row(self, operation: Operation) -> Row | None:
        row = self.row_for(operation)
        if row is None:
            self.require_priced([operation])
        return row

    def require_priced(self, operations: Iterable[Operation]) -> None:
        """Check that every operation that has MACs has a row, unless the table says "zero".

        Raises:
            CostTableError: some have none; the message lists all of them.
        """
        if self.unpriced == "zero":
            return
        missing = [op for op in operations if op.macs > 0 and self.row_for(op) is None]
        if missing:
            total = sum(operation.macs for operation in missing)
            listed = "; ".join(
                f"{operation.name!r} ({operation.op}, {operation.target}, {operation.macs:,} MACs)"
                for operation in missing
            )
            raise CostTableError(
                f"cost table {self.name!r} has no row for {len(missing)} operations with {total:,} "
                f"MACs: {listed}; {self._priced_where({op.op for op in missing})}add rows for "
                'them, or set unpriced = "zero" and see them in the report'
            )

    def _priced_where(self, ops: Collection[str]) -> str:
        """Return under which conditions the rows price some of `ops`; "" where they never do."""
        found = {
            (op, row.where.text) for row in self.rows if row.where for op in row.op if op in ops
        }
        return "".join(f"{op} is priced where {where}; " for op, where in sorted(found))

    def to_json(self) -> dict[str, Any]:
        """Return the table as the plain values of a table file, rows in a fixed order.

        Raises:
            CostTableError: some cost is computed by a function, which no file can hold.
        """
        computed = [row for row in self.rows if isinstance(row.cost, ComputedCost)]
        if computed:
            listed = "; ".join(map(str, computed))
            raise CostTableError(
                f"cost table {self.name!r} cannot be written to a file, since files hold no code: "
                f"{listed}; write these costs as formulas or grids, or keep the table in Python"
            )
        return self._content()

    def to_toml(self) -> str:
        """Return the text of a table file with the same meaning.

        Raises:
            CostTableError: some cost is computed by a function, which no file can hold.
        """
        return toml_text(self.to_json())

    def _content(self) -> dict[str, Any]:
        rows = [row_content(row) for row in self.rows]
        # Left out where it is empty: tables that do not share keep the digest they had.
        share = {"share": list(self.share)} if self.share else {}
        return {
            "schema": self.schema,
            "name": self.name,
            "unit": self.unit,
            "source": self.source,
            "input_bits": self.input_bits,
            "reference": {
                "weight": self.reference.weight,
                "activation": self.reference.activation,
            },
            "unpriced": self.unpriced,
            **share,
            "row": sorted(rows, key=lambda row: json.dumps(row, sort_keys=True)),
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the table's content; the same for the same rows in another order."""
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def supported_bits(row: Row | None, operation: Operation) -> tuple[frozenset[int] | None, ...]:
    """Return the bit-widths that `row` lists for each operand of `operation`; None means any."""
    names = OPERAND_NAMES[operation.operands]
    if row is None or row.grid is None:
        return (None,) * len(names)
    if operation.operands == "activation":
        listed = row.grid.widths(1 if "activation" in row.grid.axes else 0)
        return (frozenset(bits for bits in listed if row.grid.entry(bits, bits)),)
    by_axis = {axis: row.grid.widths(index) for index, axis in enumerate(row.grid.axes)}
    by_axis.setdefault("weight", by_axis.get("rhs", frozenset()))
    by_axis.setdefault("activation", by_axis.get("lhs", frozenset()))
    by_axis.setdefault("rhs", by_axis["weight"])
    by_axis.setdefault("lhs", by_axis["activation"])
    return tuple(by_axis[name.removesuffix("_bits")] for name in names)


def unsupported(table: CostTable, row: Row, operation: Operation, bits: tuple[int, int]) -> str:
    """Return the message for a pair of bit-widths that the grid of `row` does not contain."""
    assert row.grid is not None
    names = OPERAND_NAMES[operation.operands] or ("weight_bits", "activation_bits")
    asked = ", ".join(f"{name} = {width}" for name, width in zip(names, bits, strict=False))
    pairs = ", ".join(f"({entry.first}, {entry.second})" for entry in row.grid.entries)
    return (
        f"cost table {table.name!r}: operation {operation.name!r} ({operation.op}) at "
        f"{asked} fits into no pair of {row}, which lists "
        f"({', '.join(row.grid.axes)}) = {pairs}; add a wide enough pair, or quantize its operands"
    )
