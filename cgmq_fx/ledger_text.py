"""A ledger as a person reads it: fixed width, plain characters."""

from collections.abc import Mapping
from fractions import Fraction

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cgmq_fx.ledger_contents import LedgerContents, LedgerGroup, StoredTensors, TableLedger, Work
from cgmq_fx.report_text import listed, percent_text, plain_table, plain_text


def ledger_text(contents: LedgerContents) -> str:
    """Return the ledger as plain text, the same wherever it is printed."""
    return plain_text(ledger_renderable(contents))


def ledger_renderable(contents: LedgerContents) -> RenderableType:
    """Return the ledger as rich prints it."""
    parts: list[RenderableType] = [_model(contents)]
    parts += [_table(table) for table in contents.tables]
    if contents.stored:
        parts.append(_stored(contents.stored))
    title = Text(f"{contents.model}: what is priced", style="bold")
    return Group(title, *(Padding(part, (1, 0, 0, 0)) for part in parts))


def _model(contents: LedgerContents) -> RenderableType:
    table = plain_table("operations that")
    _add_work_columns(table)
    table.add_row("are quantized", *_work_cells(contents.quantized))
    for group in contents.floats:
        reason = f"stay float: {_kinds(group.kinds)}: {group.reason}"
        table.add_row(Text(reason), *_work_cells(group.work))
    table.add_section()
    work = contents.work
    cells = (f"{work.operations:,}", f"{work.macs:,}", f"{work.weights:,}", f"{work.activations:,}")
    table.add_row("the model does", *cells, style="bold")
    return table


def _table(table: TableLedger) -> RenderableType:
    bound = "" if table.bounded else ", no budget"
    head = (
        f"{table.name}, in {table.unit}{bound}: {percent_text(table.share('priced'))} of the MACs"
    )
    rows = plain_table("row", "operations")
    _add_work_columns(rows)
    rows.add_column("error", justify="right", no_wrap=True)
    for group in table.groups:
        row = f"{group.row}, per {group.per.replace('_', ' ')}" if group.row else group.pricing
        cells = (Text(row), Text(_kinds(group.kinds)), *_work_cells(group.work), error_text(group))
        rows.add_row(*cells)
    return Group(Text(f"{head} priced", style="bold"), rows, _notes(table))


def _notes(table: TableLedger) -> RenderableType:
    """Return the sources of the rows and the reasons of what has no price, each once."""
    notes: dict[str, list[str]] = {}
    for group in table.groups:
        text = f"source: {group.source}" if group.row else group.reason
        label = group.row.partition(", where")[0] if group.row else group.pricing
        notes.setdefault(text, []).append(label)
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=False, max_width=30)
    lines.add_column()
    for text, labels in notes.items():
        lines.add_row(Text(", ".join(dict.fromkeys(labels))), Text(text), style="dim")
    return lines


def _stored(stored: tuple[StoredTensors, ...]) -> RenderableType:
    table = plain_table("weight_memory")
    for head in ("tensors", "elements", "share"):
        table.add_column(head, justify="right", no_wrap=True)
    for item in stored:
        count = "" if item.tensors is None else f"{item.tensors:,}"
        cells = (f"{item.elements:,}", percent_text(item.share))
        table.add_row(Text(f"{item.kind}, {item.reason}"), count, *cells)
    return table


def error_text(group: LedgerGroup) -> str:
    """Return the uncertainty of a row's numbers."""
    if group.error is None:
        return "not stated" if group.row else ""
    low, high = group.error
    return _error(high) if low == high else f"{_error(low)} to {_error(high)}"


def _error(part: Fraction) -> str:
    return f"{float(100 * part):.3g} %"


def _add_work_columns(table: Table) -> None:
    for head in ("count", "MACs", "weights\nread", "activations\nread"):
        table.add_column(head, justify="right", no_wrap=True)


def _work_cells(work: Work) -> tuple[str, str, str, str]:
    shares = (work.macs_share, work.weights_share, work.activations_share)
    macs, weights, activations = (percent_text(share) for share in shares)
    return f"{work.operations:,}", macs, weights, activations


def _kinds(kinds: Mapping[str, int]) -> str:
    return listed([f"{kind} x {count}" for kind, count in kinds.items()])
