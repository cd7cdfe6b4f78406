"""Cost tables as a person reads them in a terminal."""

import textwrap
from fractions import Fraction

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cgmq_fx.cost.find import builtin_names, table_names
from cgmq_fx.cost.grid import Grid
from cgmq_fx.cost.load import get_table
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import CgmqError
from cgmq_fx.units import format_number

_DIGITS = 4
#: Characters of a source in the list; `print_table` prints all of it.
_MAX_SOURCE = 160
# Resources that a budget may name though no table prices them.
_WITHOUT_TABLE = (
    ("weight_memory", "byte", "counted, not priced: every parameter once, packed at its bit-width"),
    (
        "peak_activation_memory",
        "byte",
        "counted, not priced: the largest set of activations that are live at one time",
    ),
)


def print_list() -> None:
    """Print the tables and the resources that need none: name, unit, source."""
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for head in ("name", "unit"):
        grid.add_column(head, no_wrap=True)
    grid.add_column("source", overflow="fold")
    for name in table_names():
        grid.add_row(Text(name), *_list_cells(name))
    for name, unit, source in _WITHOUT_TABLE:
        grid.add_row(name, unit, source)
    _console().print(grid)


def _list_cells(name: str) -> tuple[Text, Text]:
    try:
        table = get_table(name)
    except CgmqError as error:  # a package's broken table hides no other
        return Text("?"), Text(str(error))
    source = table.source or "not named"
    short = textwrap.shorten(source, _MAX_SOURCE, placeholder=" ...")
    origin = "" if name in builtin_names() else "installed: "
    return Text(table.unit), Text(f"{origin}{short}")


def print_table(table: CostTable) -> None:
    """Print what a table says: its fields, then each row with its costs, source and error."""
    reference = table.reference
    facts = _facts(
        [
            ("name", table.name),
            ("unit", table.unit),
            ("source", table.source or "not named"),
            ("input bits", str(table.input_bits)),
            ("reference", f"weight {reference.weight}, activation {reference.activation} bits"),
            ("unpriced", table.unpriced),
            ("share", ", ".join(table.share) or "none"),
            ("sha256", table.digest),
        ]
    )
    console = _console()
    console.print(facts)
    for number, row in enumerate(table.rows, 1):
        console.print()
        console.print(_row(number, row, table))


def _facts(pairs: list[tuple[str, str]]) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for key, value in pairs:
        facts.add_row(Text(key, style="bold"), Text(value))
    return facts


def _row(number: int, row: Row, table: CostTable) -> RenderableType:
    title = Text(f"row {number}", style="bold").append(
        f"  {row.origin}" if row.origin else "", style="not bold dim"
    )
    pairs = [("operations", ", ".join(row.op))]
    if row.where is not None:
        pairs.append(("where", row.where.text))
    pairs += [
        ("cost", f"{_cost_text(row)} {table.unit} per {row.per.replace('_', ' ')}"),
        ("source", row.source or "as the table"),
        ("error", _error_text(row)),
    ]
    parts: list[RenderableType] = [title, Padding(_facts(pairs), (0, 0, 0, 2))]
    if row.grid is not None:
        parts.append(Padding(_matrix(row.grid), (0, 0, 0, 2)))
        parts += [Padding(Text(note), (0, 0, 0, 2)) for note in _notes(row.grid)]
    return Group(*parts)


def _matrix(grid: Grid) -> Table:
    """Return a grid as a table: the first operand's widths down, the second's across."""
    costs = {(entry.first, entry.second): entry for entry in grid.entries}
    columns = sorted(grid.widths(1))
    matrix = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    matrix.add_column(f"{grid.axes[0]} \\ {grid.axes[1]}", no_wrap=True)
    for width in columns:
        matrix.add_column(str(width), justify="right", no_wrap=True)
    for first in sorted(grid.widths(0)):
        cells = []
        for second in columns:
            entry = costs.get((first, second))
            error = f" ({_percent(entry.error)})" if entry and entry.error is not None else ""
            cells.append("-" if entry is None else f"{format_number(entry.cost, _DIGITS)}{error}")
        matrix.add_row(str(first), *cells)
    return matrix


def _notes(grid: Grid) -> list[str]:
    """Return the sources that single pairs have, each once, with their pairs."""
    pairs: dict[str, list[str]] = {}
    for entry in grid.entries:
        if entry.source:
            pairs.setdefault(entry.source, []).append(f"{entry.first} x {entry.second}")
    return [f"{', '.join(listed)}: {source}" for source, listed in pairs.items()]


def _cost_text(row: Row) -> str:
    if row.grid is not None:
        return "by bit-widths, in"
    if isinstance(row.cost, Fraction):
        return format_number(row.cost, _DIGITS)
    return getattr(row.cost, "text", str(row.cost))


def _error_text(row: Row) -> str:
    own = "not stated" if row.error is None else _percent(row.error)
    if row.grid is None or all(entry.error is None for entry in row.grid.entries):
        return own
    return f"{own}, or in brackets" if row.error is not None else "in brackets, where stated"


def _percent(part: Fraction) -> str:
    return f"{float(100 * part):.3g} %"


def _console() -> Console:
    return Console(highlight=False)
