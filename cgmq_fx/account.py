"""Builds the accounting of a prepared graph: analysis, operations bound to quantizers, prices."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from cgmq_fx.accounting import Accounting, Coverage, LedgerEntry, Site
from cgmq_fx.budget import Limit
from cgmq_fx.cost.operation import BitSource, BoundOperation, Operation
from cgmq_fx.cost.peak_memory import PEAK_ACTIVATION_MEMORY, PeakMemory
from cgmq_fx.cost.table import CostTable
from cgmq_fx.cost.totals import FLOAT_BITS, Resource, SumResource, price, weight_memory
from cgmq_fx.errors import CostTableError
from cgmq_fx.gates import PRUNED_WIDTH
from cgmq_fx.passes.annotate_operations import AnnotateOperations, operand_of
from cgmq_fx.passes.annotate_shapes import AnnotateShapes
from cgmq_fx.passes.annotate_work import AnnotateWork
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.passes.decisive_tensors import decisive_tensors
from cgmq_fx.passes.deployed import deployed_nodes
from cgmq_fx.passes.insert_quantizers import QUANTIZERS
from cgmq_fx.passes.liveness import live_buffers
from cgmq_fx.passes.meta import (
    IS_CONSTANT,
    OP_INFO,
    PRICES,
    SKIPPED,
    VALUE,
    WORK,
    Skipped,
)
from cgmq_fx.passes.names import first_tensor
from cgmq_fx.passes.pipeline import Pipeline
from cgmq_fx.passes.price_operations import PriceOperations
from cgmq_fx.passes.recurrent import elements_inside, is_recurrent, product_operands
from cgmq_fx.passes.values import find_attribute
from cgmq_fx.quantizers import QuantizerSet
from cgmq_fx.unit_bits import map_bits

#: Name of the built-in resource that counts every parameter once, packed.
WEIGHT_MEMORY = "weight_memory"
#: Unit of each resource that no table prices, by its name.
BUILT_IN: Mapping[str, str] = MappingProxyType(
    {WEIGHT_MEMORY: "byte", PEAK_ACTIVATION_MEMORY: "byte"}
)


def account(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    tables: Mapping[str, CostTable],
    limits: Mapping[str, Limit],
) -> Accounting:
    """Return the accounting of `gm` for the shapes of `inputs`.

    Args:
        gm: a prepared graph.
        inputs: one value for each placeholder; one sample.
        tables: cost tables by name.
        limits: bounds by resource name.

    Raises:
        CostTableError: a table cannot price the graph.
        BudgetError: a bound has a unit that its resource does not.
        UnsupportedModelError: the inputs do not fit.
    """
    passes = (
        AnnotateOperations(),
        AnnotateShapes(tuple(inputs)),
        AnnotateWork(),
        PriceOperations(tuple(tables.values())),
    )
    Pipeline(passes).run(gm)
    return _Accountant(gm).account(tables, limits)


def account_again(
    gm: fx.GraphModule,
    tables: Mapping[str, CostTable],
    limits: Mapping[str, Limit],
) -> Accounting:
    """Return what the accounting would be with other prices.

    Nothing in `gm` changes.

    Args:
        gm: a graph that `account` has seen.
        tables: cost tables by name, the same names as before.
        limits: bounds by resource name.

    Raises:
        CgmqError: as `account` does.
    """
    return _Accountant(gm).account(tables, limits)


class _Accountant:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.deployed = deployed_nodes(gm.graph)
        quantizers = getattr(gm, QUANTIZERS, None)
        self.quantizers = quantizers if isinstance(quantizers, QuantizerSet) else QuantizerSet()
        self.site_index = {name: index for index, name in enumerate(self.quantizers)}
        self.specs = {name: quantizer.spec for name, quantizer in self.quantizers.items()}
        self.widths = tuple(
            sorted({width for spec in self.specs.values() for width in spec.widths} | {FLOAT_BITS})
        )

    def account(self, tables: Mapping[str, CostTable], limits: Mapping[str, Limit]) -> Accounting:
        bound = [pair for node in self.gm.graph.nodes for pair in self._bind(node)]
        operations = tuple(operation for _, operation in bound)
        count = len(self.site_index)
        resources: dict[str, Resource] = {
            name: price(operations, table, count, self.widths) for name, table in tables.items()
        }
        if WEIGHT_MEMORY in limits:
            resources[WEIGHT_MEMORY] = self._weight_memory()
        if PEAK_ACTIVATION_MEMORY in limits:
            buffers = live_buffers(self.gm, self.site_index)
            resources[PEAK_ACTIVATION_MEMORY] = PeakMemory(buffers, count, self.widths)
        return Accounting(
            self._sites(resources, tables, limits),
            operations,
            resources,
            {name: self._amount(resources[name], limit) for name, limit in limits.items()},
            tuple(self._entry(node, operation, resources) for node, operation in bound),
            self.widths,
        )

    def _amount(self, resource: Resource, limit: Limit) -> Fraction:
        return limit.amount(resource.reference, resource.unit)

    # -- operations ------------------------------------------------------------------------------

    def _bind(self, node: fx.Node) -> list[tuple[fx.Node, BoundOperation]]:
        if node not in self.deployed:
            return []
        return [
            (node, BoundOperation(operation, self._sources(node, operation, place)))
            for place, operation in enumerate(WORK.get(node))
        ]

    def _sources(self, node: fx.Node, operation: Operation, place: int) -> tuple[BitSource, ...]:
        if operation.operands == "none":
            return ()
        if is_recurrent(node):
            return tuple(map(self._source, product_operands(node)[place]))
        read = [self._source(operand_of(node, ref)) for ref in OP_INFO.get(node).refs]
        if operation.op == "attention":
            query, key, value = read
            if operation.attributes["part"] == "qk":
                return query, key
            return self._source(node), value
        if operation.operands == "activation":
            return (read[0],)
        if len(read) == 1:  # a look-up reads a weight and an index
            return read[0], BitSource(bits=FLOAT_BITS)
        return tuple(read)

    def _source(self, tensor: fx.Node | None) -> BitSource:
        if tensor is not None and is_quantizer(self.gm, tensor):
            return BitSource(site=self.site_index[str(tensor.target).rpartition(".")[2]])
        return BitSource(bits=FLOAT_BITS)

    # -- sites and parameters --------------------------------------------------------------------

    def _sites(
        self,
        resources: Mapping[str, Resource],
        tables: Mapping[str, CostTable],
        limits: Mapping[str, Limit],
    ) -> tuple[Site, ...]:
        elements = self._elements()
        bounding = [resource for name, resource in resources.items() if name in limits]
        decisive = decisive_tensors(self.gm) if PRUNED_WIDTH in self.widths else frozenset()
        sites, faults = [], []
        for name, index in self.site_index.items():
            spec = self.specs[name]
            choices = set(spec.widths) if spec.learned else {spec.widths[0]}
            allowed = choices.intersection(*(resource.supported[index] for resource in bounding))
            if not allowed:
                faults.append(self._no_width(name, choices, tables, limits))
            bits = tuple(sorted(allowed))
            count = elements.get(name, 0)
            is_decisive = name in decisive
            sites.append(
                Site(name, spec.role, bits, spec.learned, count, spec.chosen_by, is_decisive)
            )
        if faults:
            names = ", ".join(sorted(limits))
            raise CostTableError(
                f"no bit-width is allowed for all of the resources {names}: {'; '.join(faults)}; "
                f"allow what the tables have, with prepare(widths=...) or in overrides, or add "
                f"these bit-widths to the tables"
            )
        return tuple(sites)

    def _no_width(
        self,
        name: str,
        choices: set[int],
        tables: Mapping[str, CostTable],
        limits: Mapping[str, Limit],
    ) -> str:
        """Return the fault of a quantizer, with what each table allows for it."""
        index, by = self.site_index[name], self.specs[name].chosen_by
        listed = []
        for table in (tables[resource] for resource in limits if resource in tables):
            widths = [
                allowed
                for node in self.gm.graph.nodes
                for _, bound in self._bind(node)
                for source, allowed in zip(
                    bound.sources, table.supported_bits(bound.operation), strict=True
                )
                if source.site == index and allowed is not None
            ]
            if widths:
                common = sorted(frozenset.intersection(*widths))
                listed.append(f"table {table.name!r} has {common or 'none in common'}")
        why = f" by {by}" if by else ""
        return f"'{name}' may have {sorted(choices)}{why}, {' and '.join(listed)}"

    def _elements(self) -> dict[str, int]:
        elements: dict[str, int] = {}
        for node in self.gm.graph.nodes:
            if is_quantizer(self.gm, node) and OP_INFO.get(node).op != "attention":
                value = first_tensor(VALUE.get(node))
                name = str(node.target).rpartition(".")[2]
                elements[name] = max(elements.get(name, 0), 0 if value is None else value.numel)
            elif is_recurrent(node):
                elements |= elements_inside(node)
        return elements

    def _weight_memory(self) -> SumResource:
        quantized: dict[int, int] = {}
        for node in self.gm.graph.nodes:
            if node in self.deployed and is_quantizer(self.gm, node) and node.args:
                name = str(node.target).rpartition(".")[2]
                value = VALUE.get(node)
                if self.quantizers[name].spec.role == "weight" and value is not None:
                    tensor = first_tensor(value)
                    assert tensor is not None
                    quantized[self.site_index[name]] = tensor.numel
        fixed = FLOAT_BITS * sum(self._float_parameters().values())
        names = [list(self.site_index)[site] for site in quantized]
        maps = [map_bits(self.specs[name].num_units, self.specs[name].widths) for name in names]
        return weight_memory(
            list(quantized),
            list(quantized.values()),
            fixed,
            len(self.site_index),
            self.widths,
            names,
            maps,
        )

    def _float_parameters(self) -> dict[int, int]:
        """Return the elements of each parameter that inference reads in float, by identity."""
        found: dict[int, int] = {}
        for node in self.gm.graph.nodes:
            if node not in self.deployed or is_quantizer(self.gm, node):
                continue
            if node.op == "get_attr" and self._is_read_in_float(node):
                parameter = find_attribute(self.gm, str(node.target))
                if parameter.requires_grad or parameter.is_floating_point():
                    found[id(parameter)] = parameter.numel()
            elif node.op == "call_module":
                module = self.gm.get_submodule(str(node.target))
                for parameter in module.parameters():
                    found[id(parameter)] = parameter.numel()
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.affine:
                    # Its statistics come to a factor and a shift, as with parameters of its own.
                    found[id(module)] = 2 * module.num_features
        return found

    def _is_read_in_float(self, node: fx.Node) -> bool:
        """Tell whether more than quantizers, and what is computed for them alone, read `node`."""
        readers = [user for user in node.users if user in self.deployed]
        return any(
            not IS_CONSTANT.get(user) or self._is_read_in_float(user)
            for user in readers
            if not self._stores(user) and VALUE.get(user) is not None
        )

    def _stores(self, node: fx.Node) -> bool:
        """Tell whether `node` keeps what it reads as codes; attention reads its mask in float."""
        return is_quantizer(self.gm, node) and OP_INFO.get(node).op != "attention"

    # -- coverage --------------------------------------------------------------------------------

    def _entry(
        self, node: fx.Node, bound: BoundOperation, resources: Mapping[str, Resource]
    ) -> LedgerEntry:
        operation = bound.operation
        quantized = bool(bound.sources) and all(
            source.site is not None for source in _learnable(bound)
        )
        if quantized:
            return LedgerEntry(
                operation.name, operation.op, operation.macs, "quantized", "", PRICES.get(node)
            )
        reason = _reason(node, bound, priced=bool(PRICES.get(node)))
        status: Coverage = "float" if operation.macs or PRICES.get(node) else "free"
        return LedgerEntry(
            operation.name, operation.op, operation.macs, status, reason, PRICES.get(node)
        )


def _learnable(bound: BoundOperation) -> tuple[BitSource, ...]:
    return bound.sources[:1] if bound.operation.op == "embedding" else bound.sources


def _reason(node: fx.Node, bound: BoundOperation, *, priced: bool) -> str:
    operation, info = bound.operation, OP_INFO.get(node)
    if not (operation.macs or priced):
        return "no multiply-accumulates, and no table of the call prices it"
    price = f"priced at {FLOAT_BITS} bits" if priced else "no table of the call prices it"
    skipped = SKIPPED.find(node)
    if skipped:
        return f"{_skipped_text(skipped, bound)}{price}"
    why = info.reason or f"no bounded table prices '{info.op}' by its bit-widths"
    return f"{why}; {price}"


def _skipped_text(skipped: Sequence[Skipped], bound: BoundOperation) -> str:
    selectors = dict.fromkeys(by for item in skipped for by in item.by)
    text = "skipped by " + " and ".join(f"skip={by}" for by in selectors) + "; "
    if all(source.site is None for source in bound.sources):
        return text
    names = " and ".join(dict.fromkeys(item.name for item in skipped))
    return f"{text}of its operands {names} alone, "
