"""`explain`: every edge of a prepared graph, the quantizer on it, and why it is there."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from torch import fx, nn

from cgmq_fx.account import WEIGHT_MEMORY
from cgmq_fx.accounting import LedgerEntry
from cgmq_fx.attention import AttentionQuantizer
from cgmq_fx.cost.operation import OPERAND_NAMES
from cgmq_fx.cost.peak_memory import PEAK_ACTIVATION_MEMORY
from cgmq_fx.cost.totals import FLOAT_BITS
from cgmq_fx.errors import UsageError
from cgmq_fx.explain_contents import Edge, ExplanationContents, QuantizerRow, Source
from cgmq_fx.explain_drawing import as_networkx, to_dot, to_svg
from cgmq_fx.explain_text import explanation_renderable, explanation_text
from cgmq_fx.passes.annotate_operations import AnnotateOperations, operand_of
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.passes.deployed import deployed_nodes
from cgmq_fx.passes.meta import OP_INFO, PRICES, SKIPPED, VALUE, WORK, OpInfo, TensorInfo, Value
from cgmq_fx.passes.names import operation_names
from cgmq_fx.passes.operand_names import named_operands
from cgmq_fx.passes.recurrent import INSIDE, is_recurrent
from cgmq_fx.prepared import PreparedModule

if TYPE_CHECKING:
    import networkx as nx

_SOURCES: dict[str, Source] = {"placeholder": "input", "get_attr": "parameter"}


@dataclass(frozen=True, repr=False)
class Explanation(ExplanationContents):
    """Which quantizer stands on which edge, why, and what shares it.

    ``str(explanation)`` is the table that a person reads.
    """

    def __str__(self) -> str:
        return explanation_text(self)

    def __rich__(self) -> RenderableType:
        return explanation_renderable(self)

    def __repr__(self) -> str:
        read = sum(edge.site is not None for edge in self.edges)
        return (
            f"Explanation({self.model}: {len(self.quantizers)} quantizers on {read} of "
            f"{len(self.edges)} edges)"
        )

    def to_json(self) -> str:
        """Return edges and quantizers as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def to_networkx(self) -> "nx.MultiDiGraph[str]":
        """Return the graph: a node for each operation, input and parameter, an edge for each edge.

        An operation is known by its name, others with their kind before it, as in ``input x``.
        Nodes have the attributes ``kind`` (``operation``, ``parameter``, ``input`` or ``output``),
        ``name`` and ``op``; edges ``site``, ``bits``, ``operand`` and ``why``.
        """
        return as_networkx(self)

    def to_dot(self) -> str:
        """Return the graph in the language of Graphviz, edges coloured by bit-width."""
        return to_dot(self)

    def to_svg(self) -> str:
        """Return the graph as an SVG drawing, made by the program ``dot`` of Graphviz.

        Raises:
            UsageError: ``dot`` is not installed, or fails.
        """
        return to_svg(self)


def explain(prepared: nn.Module) -> Explanation:
    """Return every edge of a prepared model: which quantizer, why there, what it shares.

    An edge is one tensor that one operation reads. Bit-widths are the present ones, so that the
    explanation of a trained model shows what it learned.

    Args:
        prepared: what `prepare` returned; shapes and prices need not be known yet.

    Raises:
        UsageError: the module is not prepared.
    """
    if not isinstance(prepared, PreparedModule):
        raise UsageError(
            f"{type(prepared).__name__} is not prepared and has no quantizers with a reason; give "
            f"explain what cgmq_fx.prepare returned"
        )
    return _Reader(prepared).explanation()


class _Reader:
    def __init__(self, prepared: PreparedModule) -> None:
        self.prepared = prepared
        nodes = prepared.graph.nodes
        if not all(OP_INFO.has(node) for node in nodes):  # not priced yet, or pickled since
            AnnotateOperations().run(prepared)
        self.names = operation_names(prepared)
        self.deployed = deployed_nodes(prepared.graph)
        self.settings = prepared.plan.settings
        self.ledger: dict[str, LedgerEntry] = {}
        if prepared.plan.is_priced:
            self.ledger = {entry.name: entry for entry in prepared.plan.accounting.ledger}
        self.bits = prepared.bit_widths

    def explanation(self) -> Explanation:
        """Return the whole view."""
        edges = [edge for node in self.prepared.graph.nodes for edge in self._edges(node)]
        readers: dict[str, list[str]] = {}
        for edge in edges:
            if edge.site is not None:
                readers.setdefault(edge.site, []).append(edge.place)
        return Explanation(
            type(self.prepared).__name__,
            tuple(self._with_shares(edge, readers) for edge in edges),
            tuple(self._quantizer(site, readers.get(site, [])) for site in self.bits),
        )

    def _with_shares(self, edge: Edge, readers: dict[str, list[str]]) -> Edge:
        if edge.site is None:
            return edge
        others = dict.fromkeys(place for place in readers[edge.site] if place != edge.place)
        return replace(edge, shares=tuple(others))

    def _quantizer(self, site: str, readers: list[str]) -> QuantizerRow:
        spec = self.prepared.quantizers[site].spec
        allowed = spec.widths
        if self.prepared.plan.is_priced:
            found = self.prepared.plan.accounting.sites
            allowed = next(item.allowed for item in found if item.name == site)
        return QuantizerRow(
            *(site, spec.role, spec.scheme, spec.num_channels, self.bits[site], allowed),
            *(spec.learned, tuple(dict.fromkeys(readers))),
        )

    # -- edges -----------------------------------------------------------------------------------

    def _edges(self, node: fx.Node) -> Iterator[Edge]:
        if self._is_plain_quantizer(node):
            return
        for operand, read in named_operands(node):
            if read.op == "get_attr" and is_quantizer(self.prepared, read):
                inside = operand.removeprefix(f"{INSIDE}['").removesuffix("']")
                yield self._inner_edge(node, inside, _site(read))
                continue
            tensor, site = self._through_quantizer(read)
            value = VALUE.find(tensor)
            if VALUE.has(tensor) and value is None:
                continue  # a size or a flag, no tensor
            shape = value.shape if isinstance(value, TensorInfo) else None
            bits = FLOAT_BITS if site is None else self.bits[site]
            if site is None:
                why = self._why_float(node, operand, value)
            else:
                why = self._why(node, read, site)
            op = "" if node.op == "output" else OP_INFO.get(node).op
            name = self._name(node)
            source = _SOURCES.get(tensor.op, "operation")
            yield Edge(self._name(tensor), source, name, operand, op, shape, site, bits, why)
        if node.op == "call_module" and is_quantizer(self.prepared, node):
            yield self._inner_edge(node, "weights", _site(node))

    def _inner_edge(self, node: fx.Node, operand: str, site: str) -> Edge:
        """Return an edge inside an operation: from one of its products to another."""
        name, op = self._name(node), OP_INFO.get(node).op
        why = f"inside the operation, between its products; {self._priced_by(node, 0)}"
        return Edge(name, "operation", name, operand, op, None, site, self.bits[site], why)

    def _is_plain_quantizer(self, node: fx.Node) -> bool:
        if node.op != "call_module" or not is_quantizer(self.prepared, node):
            return False
        quantizer = self.prepared.get_submodule(str(node.target))
        return not isinstance(quantizer, AttentionQuantizer)

    def _through_quantizer(self, read: fx.Node) -> tuple[fx.Node, str | None]:
        if not self._is_plain_quantizer(read):
            return read, None
        return read.all_input_nodes[0], _site(read)

    def _name(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "get_attr", "output"):
            return str(node.target)
        return self.names.get(node, node.name)

    # -- reasons ---------------------------------------------------------------------------------

    def _why(self, node: fx.Node, read: fx.Node, site: str) -> str:
        spec, info = self.prepared.quantizers[site].spec, OP_INFO.get(node)
        said = f"; overrides[{spec.chosen_by}]" if spec.chosen_by else ""
        if spec.role == "input" and not spec.learned:
            return f"an input of the model, which arrives with {spec.widths[0]} bits{said}"
        if spec.num_tensors > 1 and spec.role != "weight":
            said = f"; one range for {spec.num_tensors} tensors, as share asks{said}"
        places = [place for place, ref in enumerate(info.refs) if operand_of(node, ref) is read]
        return f"{self._priced_by(node, places[0] if places else 0)}{said}"

    def _priced_by(self, node: fx.Node, place: int) -> str:
        info, limits = OP_INFO.get(node), self.settings.limits
        tables = [name for name, _ in PRICES.find(node) or () if name in limits]
        names = OPERAND_NAMES[info.operands]
        if tables and names:
            width = names[min(place, len(names) - 1)]
            if is_recurrent(node):  # the input stands before the weights
                width = "weight_bits" if info.refs[place].is_weight else "activation_bits"
            return f"{_listed(tables)} prices {info.op} by its {width}"
        if info.refs and info.refs[min(place, len(info.refs) - 1)].is_weight:
            if WEIGHT_MEMORY in limits:
                return f"{WEIGHT_MEMORY} counts it at its own bit-width"
            if info.op == "embedding":
                return "it is stored once, as the quantized weight of another operation"
        elif PEAK_ACTIVATION_MEMORY in limits:
            return f"{PEAK_ACTIVATION_MEMORY} counts it at its own bit-width"
        return f"the bounded tables {_listed(list(limits))} have rows for {info.op}"

    def _why_float(self, node: fx.Node, operand: str, value: Value) -> str:
        if isinstance(value, TensorInfo) and not value.dtype.is_floating_point:
            return f"it holds {str(value.dtype).removeprefix('torch.')}, no real numbers"
        if node.op == "output":
            return "an output of the model stays float"
        if node not in self.deployed:
            return "no inference needs it"
        skipped = [item for item in SKIPPED.find(node) or () if item.name == operand]
        if skipped:
            return "skipped by " + " and ".join(f"skip={by}" for by in skipped[0].by)
        info: OpInfo = OP_INFO.get(node)
        if info.op == "reshape":
            return "it is only rearranged, or asked for its shape"
        entries = [
            self.ledger[item.name] for item in WORK.find(node) or () if item.name in self.ledger
        ]
        if any(entry.status == "quantized" for entry in entries):
            return f"no price of {info.op} depends on its bit-width"
        return next((entry.reason for entry in entries if entry.reason), "") or info.reason


def _site(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[2]


def _listed(names: list[Any]) -> str:
    return ", ".join(str(name) for name in names)
