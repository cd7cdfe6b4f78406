"""A report as a person reads it: tables and lines, by rich."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from rich.box import Box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cgmq_fx.report_contents import (
    Coverage,
    ReasonGroup,
    ReportContents,
    ReportRow,
    ResourceSummary,
    Status,
    TensorRow,
)
from cgmq_fx.units import convert, format_amount

#: Width of the text, in characters, wherever it is printed.
TEXT_WIDTH = 110
#: Kinds of calls that a coverage line names before it says "and n more".
_MAX_KINDS = 8
_FLOAT_BITS = 32
#: Digits of a total in the tables.
_DIGITS = 5
# What the tables of tensors are about, by the role of these.
_TENSORS = {"weight": "stored tensor", "activation": "live at the peak"}
# Only characters that every log and every code page can hold.
_BOX = Box("    \n    \n -- \n    \n -- \n -- \n    \n    \n", ascii=True)


def to_text(contents: ReportContents) -> str:
    """Return the report as plain text, the same wherever it is printed."""
    return plain_text(renderable(contents))


def plain_text(content: RenderableType) -> str:
    """Return what rich prints, without colours and `TEXT_WIDTH` wide wherever it is printed."""
    console = Console(
        file=io.StringIO(),
        width=TEXT_WIDTH,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        highlight=False,
        _environ={},
    )
    with console.capture() as capture:
        console.print(content)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def brief(contents: ReportContents) -> str:
    """Return the report in one line."""
    totals = "; ".join(_verdict(item).plain for item in contents.resources)
    return f"{contents.model}: {totals}"


def renderable(contents: ReportContents) -> RenderableType:
    """Return the report as rich prints it, in colours where the terminal has them."""
    parts: list[RenderableType] = [_operations(contents)]
    counting = [item for item in contents.resources if _is_in(item, contents.tensors)]
    parts += [_tensors(item, contents.tensors) for item in counting]
    parts += [
        _totals(contents.resources),
        _coverage(contents.coverage),
        _footer(contents.resources),
    ]
    title = Text(contents.model, style="bold")
    return Group(title, *(Padding(part, (1, 0, 0, 0)) for part in parts))


# -- tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Amounts:
    """Writes the amounts of one resource, all in the unit that suits its total."""

    resource: ResourceSummary

    @property
    def unit(self) -> str:
        return format_amount(self.resource.total, self.resource.unit).rpartition(" ")[2]

    def amount(self, cost: Fraction) -> str:
        """Return `cost` with as many decimals as give the total `_DIGITS` digits."""
        total = convert(self.resource.total, self.resource.unit, self.unit)
        decimals = max(0, _DIGITS - len(str(int(total))))
        return _decimals(convert(cost, self.resource.unit, self.unit), decimals)

    def cells(self, cost: Fraction) -> list[str]:
        """Return the cells of one row: amount, part of the total, part of the budget if any."""
        cells = [self.amount(cost), _share(cost, self.resource.total)]
        budget = self.resource.budget
        return cells if budget is None else [*cells, _share(cost, budget)]

    def add_columns(self, table: Table) -> None:
        heads = [f"{self.resource.name}\n{self.unit}", "of the\ntotal", "of the\nbudget"]
        for head in heads if self.resource.budget is not None else heads[:2]:
            table.add_column(head, justify="right", no_wrap=True)


def _operations(contents: ReportContents) -> Table:
    rows = [row for row in contents.rows if row.status != "free"]
    columns = [_Amounts(item) for item in contents.resources if _is_in(item, contents.rows)]
    table = plain_table("operation", "class")
    table.add_column("MACs", justify="right", no_wrap=True)
    table.add_column("bits", no_wrap=True)
    for column in columns:
        column.add_columns(table)
    for row in rows:
        cells = [cell for item in columns for cell in item.cells(row.cost[item.resource.name])]
        table.add_row(Text(row.name), row.op, f"{row.macs:,}", bits_text(row), *cells)
    table.add_section()
    totals = [cell for item in columns for cell in item.cells(item.resource.total)]
    macs = sum(row.macs for row in rows)
    table.add_row("total", "", f"{macs:,}", "", *totals, style="bold")
    return table


def _tensors(resource: ResourceSummary, tensors: Sequence[TensorRow]) -> Table:
    rows = [row for row in tensors if resource.name in row.cost]
    column = _Amounts(resource)
    table = plain_table(_TENSORS[rows[0].role])
    table.add_column("elements", justify="right", no_wrap=True)
    table.add_column("bits", no_wrap=True)
    column.add_columns(table)
    for row in rows:
        bits = "float" if row.bits == _FLOAT_BITS else f"{row.role[0]}{row.bits}"
        cells = column.cells(row.cost[resource.name])
        table.add_row(Text(row.name), f"{row.elements:,}", bits, *cells)
    table.add_section()
    elements = f"{sum(row.elements for row in rows):,}"
    table.add_row("total", elements, "", *column.cells(resource.total), style="bold")
    return table


def _is_in(resource: ResourceSummary, rows: Sequence[ReportRow | TensorRow]) -> bool:
    return any(resource.name in row.cost for row in rows)


def plain_table(*names: str) -> Table:
    """Return an empty table of plain characters with these columns of text."""
    table = Table(box=_BOX, show_edge=False, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def bits_text(row: ReportRow) -> str:
    """Return the bit-widths of an operation, such as ``w4 a8`` or, for attention, ``q8 k8``."""
    letters = {"weight_bits": "w", "activation_bits": "a", "lhs_bits": "a", "rhs_bits": "a"}
    if row.op == "attention":
        first, second = ("q", "k") if row.name.endswith(".qk") else ("p", "v")
        letters |= {"lhs_bits": first, "rhs_bits": second}
    widths = {field: getattr(row, field) for field in letters}
    parts = [f"{letters[field]}{width}" for field, width in widths.items() if width is not None]
    is_float = row.status == "float" and all(width == _FLOAT_BITS for width in row.bits)
    return "float" if is_float else " ".join(parts)


# -- totals ----------------------------------------------------------------------------------------


def _totals(resources: Iterable[ResourceSummary]) -> RenderableType:
    lines = Table.grid(padding=(0, 2))
    for item in resources:
        lines.add_row(Text(item.name, style="bold"), _verdict(item))
        lines.add_row("", _relative(item))
    return lines


def _verdict(item: ResourceSummary) -> Text:
    total = format_amount(item.total, item.unit, 6)
    if item.budget is None:
        return Text(f"{total}, no budget")
    budget = format_amount(item.budget, item.unit, 6)
    asked = f" ({item.budget_text})" if item.budget_text not in ("", budget) else ""
    text = Text(f"{total} of {budget}{asked}: ")
    if item.is_satisfied:
        spare = _share(item.budget - item.total, item.budget)
        return text.append("within budget", style="bold green").append(f", {spare} of it unused")
    excess = item.total - item.budget
    over = f"OVER BUDGET by {format_amount(excess, item.unit, 4)}"
    return text.append(over, style="bold red").append(f", {_share(excess, item.budget)} of it")


def _relative(item: ResourceSummary) -> Text:
    if item.relative is None:
        return Text("nothing in the model has a price")
    share = f"{float(100 * item.relative):#.5g}".rstrip(".")
    return Text(f"{share} % of the reference, {format_amount(item.reference, item.unit, 6)}")


# -- coverage --------------------------------------------------------------------------------------


def _coverage(coverage: Coverage) -> RenderableType:
    lines = Table.grid(padding=(0, 2))
    lines.add_row(Text("coverage", style="bold"), f"of {coverage.macs:,} MACs")
    for label, text in _coverage_lines(coverage):
        lines.add_row(f"  {label}", Text(text))
    return lines


def _coverage_lines(coverage: Coverage) -> Iterable[tuple[str, str]]:
    wide = sum(row.status == "quantized" and _FLOAT_BITS in row.bits for row in coverage.entries)
    note = f"; {wide} of them with an operand at 32 bits, which is float" if wide else ""
    yield "quantized", f"{_work(coverage, 'quantized')}{note}"
    yield "float", _work(coverage, "float")
    for group in coverage.groups("float"):
        yield "", f"{_kinds(group)} ({group.macs:,} MACs): {group.reason}"
    for name, part in coverage.unpriced.items():
        rows = [row.name for row in coverage.entries if name in row.unpriced_in]
        yield (
            "unpriced",
            f"{percent_text(part)} of the MACs have no price in {name}: {listed(rows)}",
        )
    for group in coverage.groups("free"):
        yield "free", f"{_kinds(group)}: {group.reason}"


def _work(coverage: Coverage, status: Status) -> str:
    count = coverage.count(status)
    if not count:
        return "nothing"
    plural = "operation" if count == 1 else "operations"
    return f"{count} {plural}, {percent_text(coverage.share(status))} of the MACs"


def _kinds(group: ReasonGroup) -> str:
    ordered = sorted(group.counts.items(), key=lambda item: -item[1])
    return listed([f"{kind} x {count}" for kind, count in ordered])


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _MAX_KINDS} more" if len(names) > _MAX_KINDS else ""
    return f"{', '.join(names[:_MAX_KINDS])}{more}"


def _footer(resources: Sequence[ResourceSummary]) -> RenderableType:
    lines = Table.grid(padding=(0, 2))
    for item in resources:
        for position, note in enumerate(item.convention):
            lines.add_row(item.name if position == 0 else "", Text(note), style="dim")
    return lines


# -- numbers ---------------------------------------------------------------------------------------


def _share(part: Fraction, whole: Fraction) -> str:
    return percent_text(part / whole) if whole else "-"


def percent_text(part: Fraction) -> str:
    """Return a part as percent; what is more than nothing never reads 0."""
    return f"{_decimals(100 * part, 1 if part < 10 else 0)} %"


def _decimals(number: Fraction, digits: int) -> str:
    """Return `number` with `digits` decimals; a smaller one than these can show is no zero."""
    smallest = Fraction(1, 10**digits)
    if 0 < number < smallest:
        return f"<{float(smallest):.{digits}f}"
    if number == 0:
        return "0"
    return f"{float(number):,.{digits}f}"
