"""An explanation as a drawing: operations in boxes, edges coloured by bit-width."""

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import networkx as nx

from cgmq_fx.errors import UsageError
from cgmq_fx.explain_contents import ExplanationContents
from cgmq_fx.gates import FLOAT_WIDTH

# A colour from this bit-width on, up to the next: red is narrow, blue is wide, grey is float.
_COLOURS = {
    0: "#000000",
    1: "#67001f",
    2: "#b2182b",
    3: "#d6604d",
    4: "#e08214",
    5: "#b08d00",
    8: "#1b7837",
    9: "#008080",
    16: "#2166ac",
    FLOAT_WIDTH: "#8c8c8c",
}
_SHAPES = {"operation": "box", "parameter": "note", "input": "ellipse", "output": "ellipse"}
#: Seconds that the drawing program may take.
_PATIENCE = 120


def colour_of(bits: int) -> str:
    """Return the colour in which a bit-width is drawn, as ``#rrggbb``."""
    return _COLOURS[max(width for width in _COLOURS if width <= bits)]


def as_networkx(contents: ExplanationContents) -> "nx.MultiDiGraph[str]":
    """Return the explanation as a directed graph; see `Explanation.to_networkx`."""
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph(model=contents.model)
    for edge in contents.edges:
        kind = "operation" if edge.op else "output"
        producer = _add(graph, edge.producer, edge.source, "")
        consumer = _add(graph, edge.consumer, kind, edge.op)
        graph.add_edge(
            *(producer, consumer),
            **{key: getattr(edge, key) for key in ("site", "bits", "operand", "why")},
        )
    return graph


def _add(graph: "nx.MultiDiGraph[str]", name: str, kind: str, op: str) -> str:
    key = name if kind == "operation" else f"{kind} {name}"
    if key not in graph:
        graph.add_node(key, kind=kind, name=name, op=op)
    elif op:  # first seen as a producer, which does not know its class
        graph.nodes[key]["op"] = op
    return key


def to_dot(contents: ExplanationContents) -> str:
    """Return the explanation in the language of Graphviz."""
    graph = as_networkx(contents)
    lines = [*_lines(graph)]
    return "\n".join([f"digraph {_quoted(contents.model)} {{", *lines, "}"]) + "\n"


def _lines(graph: "nx.MultiDiGraph[str]") -> Iterator[str]:
    yield '  rankdir=TB; fontname="Helvetica"; fontsize=11; labelloc=t;'
    yield f"  label={_quoted(_legend(graph))};"
    yield '  node [fontname="Helvetica", fontsize=10, style=filled, fillcolor="#f7f7f7"];'
    yield '  edge [fontname="Helvetica", fontsize=9];'
    for key, data in graph.nodes(data=True):
        label = data["name"] if not data["op"] else f"{data['name']}\n{data['op']}"
        read = [item["bits"] for _, _, item in graph.in_edges(key, data=True) if item["site"]]
        border = f', color="{colour_of(min(read))}", penwidth=2' if read else ""
        yield f"  {_quoted(key)} [label={_quoted(label)}, shape={_SHAPES[data['kind']]}{border}];"
    for producer, consumer, data in graph.edges(data=True):
        yield f"  {_quoted(producer)} -> {_quoted(consumer)} [{_edge_style(data)}];"


def _edge_style(data: dict[str, Any]) -> str:
    colour, tooltip = colour_of(data["bits"]), _quoted(data["why"])
    if data["site"] is None:
        return f'color="{colour}", style=dashed, tooltip={tooltip}'
    label = _quoted(f"{data['site']}\n{data['bits']} bits")
    return (
        f'color="{colour}", fontcolor="{colour}", penwidth=2, label={label}, '
        f"tooltip={tooltip}, labeltooltip={tooltip}"
    )


def _legend(graph: "nx.MultiDiGraph[str]") -> str:
    widths = sorted({data["bits"] for _, _, data in graph.edges(data=True) if data["site"]})
    found = ", ".join(f"{width} bits" for width in widths) or "none"
    return f"{graph.graph['model']}: quantized edges are solid ({found}), float ones dashed"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def to_svg(contents: ExplanationContents) -> str:
    """Return the drawing as SVG; see `Explanation.to_svg`."""
    program = shutil.which("dot")
    if program is None:
        raise UsageError(
            "to_svg needs the program 'dot' of Graphviz, which is not on the PATH; install the "
            "package graphviz of your system, or write to_dot() to a file and draw it elsewhere"
        )
    command = [program, "-Tsvg"]
    try:
        result = subprocess.run(
            command, input=to_dot(contents), capture_output=True, text=True, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"'{program} -Tsvg' took more than {_PATIENCE} seconds for {len(contents.edges)} "
            f"edges; write to_dot() to a file and draw it with another layout, such as sfdp"
        ) from None
    if result.returncode:
        raise UsageError(f"'{program} -Tsvg' failed: {result.stderr.strip()}; see to_dot()")
    return result.stdout
