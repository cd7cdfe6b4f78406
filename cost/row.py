"""Rows of a cost table: which operations a row prices, and what a piece of work costs."""

from dataclasses import dataclass, field
from fractions import Fraction

from cgmq_fx.cost.attributes import ALL_BITS, bit_variables, operation_variables, require
from cgmq_fx.cost.computed_cost import ComputedCost
from cgmq_fx.cost.expression import Expression
from cgmq_fx.cost.faults import Faults
from cgmq_fx.cost.grid import Grid, GridEntry
from cgmq_fx.cost.operation import PRUNED_BITS, Operation
from cgmq_fx.cost.row_fields import ROW_KEYS, formula_cost, normalise
from cgmq_fx.errors import CostTableError


@dataclass(frozen=True)
class Row:
    """One price.

    Exactly one of `cost` and `grid` is given. What a user writes is accepted in each field and
    turned into the type that is shown.

    Attributes:
        op: operation classes (`cgmq_fx.cost.operation.OP_CLASSES`) or FX targets; one, or a list.
        per: what one piece of work is, one of `cgmq_fx.cost.row_fields.PER`.
        cost: number, or ``{"formula": text}``: cost of one piece of work in the table's unit; or a
            function, by `cgmq_fx.cost.computed.computed_cost`.
        grid: list of ``{"weight": bits, "activation": bits, "cost": number}``, or with ``lhs`` and
            ``rhs`` for two activations; each may have ``source`` and ``error``.
        where: condition on the operation's attributes; without one the row fits every operation.
        source: where the numbers come from, if not from the table's source.
        error: relative uncertainty, 0.05 or "5 %", or None where it is not known.
        layer: how many tables deep the row was included; of two rows that are else equally
            specific, the one of the lower layer wins.
        origin: file and line that the row stands in, for messages; no part of the row's value.

    Raises:
        CostTableError: some field is malformed; the message lists every fault.

    >>> Row(op="conv2d", per="mac", cost={"formula": "weight_bits * activation_bits"}).op
    ('conv2d',)
    """

    op: tuple[str, ...]
    per: str
    cost: Fraction | Expression | ComputedCost | None = None
    grid: Grid | None = None
    where: Expression | None = None
    source: str = ""
    error: Fraction | None = None
    layer: int = 0
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        faults = Faults(("row",))
        values = normalise({name: getattr(self, name) for name in ROW_KEYS}, faults)
        faults.raise_if_any("Row")
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        """Return the keys that tell the row from others."""
        where = f", where {self.where.text!r}" if self.where else ""
        return f"{self.origin or 'row'} (op {', '.join(self.op)}{where})"

    def matches(self, operation: Operation) -> bool:
        """Tell whether the row prices `operation`, as far as this row knows."""
        if operation.op not in self.op and operation.target not in self.op:
            return False
        if self.where is None:
            return True
        variables = operation_variables(operation)
        require(variables, self.where.variables, operation)
        try:
            return self.where.evaluate(variables) is True
        except CostTableError as error:
            raise CostTableError(f"{self}, for operation {operation.name!r}: {error}") from error

    def beats(self, other: "Row", operation: Operation) -> bool:
        """Tell whether this row is more specific than `other`, both matching `operation`.

        In this order: an FX target beats an operation class; more conditions joined by ``and`` beat
        fewer; a list of operations beats one that holds all of it and more; a lower layer beats
        a higher one.
        """
        mine, others = self._rank(operation), other._rank(operation)
        if mine != others:
            return mine > others
        if set(self.op) < set(other.op):
            return True
        return self.layer < other.layer and not set(other.op) < set(self.op)

    def _rank(self, operation: Operation) -> tuple[bool, int]:
        return operation.target in self.op, len(set(self.where.conditions)) if self.where else 0

    def work(self, operation: Operation) -> int:
        """Return the pieces of work in `operation`."""
        if self.per == "call":
            return 1
        counts: dict[str, int] = {
            "mac": operation.macs,
            "output_element": operation.output_elements,
            "input_element": operation.input_elements,
            "weight": operation.weights,
        }
        return counts[self.per]

    def unit_cost(self, operation: Operation, bits: tuple[int, int]) -> Fraction | None:
        """Return the cost of one piece of work, or None where the grid has no pair for `bits`.

        With an operand of 0 bits nothing is computed, and that costs nothing in any table.

        Args:
            operation: one that the row matches.
            bits: the two bit-widths, in the order of ``OPERAND_NAMES``.

        Raises:
            CostTableError: the formula gives a negative number, or none.
        """
        if PRUNED_BITS in bits:
            return Fraction(0)
        if isinstance(self.cost, Fraction):
            return self.cost
        if self.grid is not None:
            entry = self.grid_entry(operation, bits)
            return None if entry is None else entry.cost
        assert self.cost is not None
        widths = bit_variables(operation.operands, bits)
        try:
            if isinstance(self.cost, ComputedCost):
                return self.cost.cost(operation, widths["weight_bits"], widths["activation_bits"])
            variables = {**operation_variables(operation), **widths}
            require(variables, self.cost.variables, operation)
            return formula_cost(self.cost, variables)
        except CostTableError as error:
            raise CostTableError(
                f"{self}, for operation {operation.name!r} at {bits[0]} and {bits[1]} bits: {error}"
            ) from error

    def grid_entry(self, operation: Operation, bits: tuple[int, int]) -> GridEntry | None:
        """Return the pair of the grid that prices `operation` at `bits`, if one does."""
        if self.grid is None or PRUNED_BITS in bits:
            return None
        widths = bit_variables(operation.operands, bits)
        first, second = (widths[f"{axis}_bits"] for axis in self.grid.axes)
        return self.grid.entry(first, second)

    def source_for(self, operation: Operation, bits: tuple[int, int]) -> str:
        """Return where the cost of `operation` at `bits` comes from; "" where only the table says.

        Args:
            operation: one that the row matches.
            bits: the two bit-widths, in the order of ``OPERAND_NAMES``.
        """
        entry = self.grid_entry(operation, bits)
        return entry.source if entry is not None and entry.source else self.source

    def error_for(self, operation: Operation, bits: tuple[int, int]) -> Fraction | None:
        """Return the relative error of the cost of `operation` at `bits`, None where not known."""
        entry = self.grid_entry(operation, bits)
        return entry.error if entry is not None and entry.error is not None else self.error

    @property
    def depends_on_bits(self) -> bool:
        """Tell whether what it costs may depend on the widths of operands."""
        if isinstance(self.cost, Expression):
            return bool(self.cost.variables & ALL_BITS)
        return not isinstance(self.cost, Fraction)

    @property
    def depends_on_bits_only(self) -> bool:
        """Tell whether one piece of work costs the same for every operation at the same widths."""
        if isinstance(self.cost, ComputedCost):
            return False
        return not isinstance(self.cost, Expression) or self.cost.variables <= ALL_BITS
