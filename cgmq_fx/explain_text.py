"""An explanation as a person reads it: fixed width, plain characters."""

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cgmq_fx.explain_contents import Edge, ExplanationContents, QuantizerRow
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.report_text import listed, plain_table, plain_text


def explanation_text(contents: ExplanationContents) -> str:
    """Return the explanation as plain text, the same wherever it is printed."""
    return plain_text(explanation_renderable(contents))


def explanation_renderable(contents: ExplanationContents) -> RenderableType:
    """Return the explanation as rich prints it."""
    read = [edge for edge in contents.edges if edge.site is not None]
    title = (
        f"{contents.model}: {len(contents.quantizers)} quantizers on {len(read)} of "
        f"{len(contents.edges)} edges"
    )
    parts = [_quantizers(contents.quantizers), _edges(contents.edges)]
    return Group(Text(title, style="bold"), *(Padding(part, (1, 0, 0, 0)) for part in parts))


def _quantizers(quantizers: tuple[QuantizerRow, ...]) -> Table:
    table = plain_table("quantizer")
    table.add_column("bits", no_wrap=True)
    for name in ("kind", "read by"):
        table.add_column(name, overflow="fold")
    for row in quantizers:
        ranges = f", {row.ranges} ranges" if row.ranges > 1 else ""
        fixed = "" if row.learned else ", fixed"
        kind = f"{row.role}, {row.scheme}{ranges}{fixed}"
        table.add_row(Text(row.site), _bits(row.bits), kind, Text(listed(row.readers)))
    return table


def _edges(edges: tuple[Edge, ...]) -> Table:
    table = plain_table("tensor", "read by")
    table.add_column("bits", no_wrap=True)
    table.add_column("why", overflow="fold")
    for edge in edges:
        quantizer = "" if edge.site is None else f"{edge.site}: "
        cells = (Text(edge.producer), Text(edge.place), _bits(edge.bits))
        table.add_row(*cells, Text(f"{quantizer}{edge.why}"))
    return table


def _bits(bits: int) -> str:
    return "float" if bits == FLOAT_WIDTH else str(bits)
