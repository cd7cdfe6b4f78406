"""Cost tables as a person reads them in a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cgmq_fx.cost.expression import Expression
from cgmq_fx.cost.load import get_table, table_names
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.units import format_number

_DIGITS = 6
# Resources that a budget may name though no table prices them.
_WITHOUT_TABLE = (
    ("weight_memory", "byte", "counted, not priced: every parameter once, packed at its bit-width"),
)


def print_list() -> None:
    """Print the built-in tables and the resources that need none: name, unit, source."""
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for head in ("name", "unit", "source"):
        grid.add_column(head, overflow="fold")
    for name in table_names():
        table = get_table(name)
        grid.add_row(Text(name), table.unit, Text(table.source))
    for name, unit, source in _WITHOUT_TABLE:
        grid.add_row(name, unit, source)
    _console().print(grid)


def print_table(table: CostTable) -> None:
    """Print what a table says, with one line for each row."""
    facts = Table.grid(padding=(0, 2))
    reference = table.reference
    for key, value in (
        ("name", table.name),
        ("unit", table.unit),
        ("source", table.source or "not named"),
        ("input bits", str(table.input_bits)),
        ("reference", f"weight {reference.weight}, activation {reference.activation} bits"),
        ("unpriced", table.unpriced),
        ("sha256", table.digest),
    ):
        facts.add_row(Text(key, style="bold"), Text(value))
    rows = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for head in ("operations", "where", "per", f"cost [{table.unit}]"):
        rows.add_column(Text(head), overflow="fold")
    for row in table.rows:
        where = row.where.text if row.where else ""
        cells = (", ".join(row.op), where, row.per, _cost_text(row))
        rows.add_row(*(Text(cell) for cell in cells))
    console = _console()
    console.print(facts)
    console.print()
    console.print(rows)


def _cost_text(row: Row) -> str:
    if isinstance(row.cost, Expression):
        return row.cost.text
    if row.cost is not None:
        return format_number(row.cost, _DIGITS)
    assert row.grid is not None
    first, second = row.grid.axes
    return "; ".join(
        f"{first} {entry.first} x {second} {entry.second}: {format_number(entry.cost, _DIGITS)}"
        for entry in row.grid.entries
    )


def _console() -> Console:
    return Console(highlight=False)
