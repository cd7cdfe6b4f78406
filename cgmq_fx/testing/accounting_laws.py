"""Laws 4 to 6 of a prepared model, by code that shares nothing with the library's own sums.

Each check yields the faults it finds, none where the law holds.
"""

import random
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from torch import fx

from cgmq_fx.accounting import Accounting
from cgmq_fx.cost.attributes import ALL_BITS
from cgmq_fx.cost.computed_cost import ComputedCost
from cgmq_fx.cost.expression import Expression
from cgmq_fx.cost.monotone import row_falls
from cgmq_fx.cost.operation import BoundOperation
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.passes.meta import OP_INFO, SKIPPED, VALUE, WORK, TensorInfo
from cgmq_fx.passes.recurrent import INSIDE, is_recurrent
from cgmq_fx.passes.values import find_attribute
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.testing.compare import Inputs
from cgmq_fx.testing.counting import (
    FloatCount,
    NodeCount,
    count_nodes,
    is_quantizer,
)
from cgmq_fx.testing.stored_weights import memory_bits, needed, site_of, stored_weights

_FLOAT_BITS = 32
_MAX_SITES = 64


# -- 4: every operation that computes is in the ledger, priced or with a reason --------------------


def check_coverage(prepared: PreparedModule, one: Inputs) -> Iterator[str]:
    """What ATen computes, call by call, stands in the ledger with as many MACs.

    Args:
        prepared: a priced model.
        one: the inputs that it was priced for.
    """
    accounting = prepared.plan.accounting
    prepared.eval()
    counts = count_nodes(prepared, one)
    names = [entry.name for entry in accounting.ledger]
    if len(set(names)) != len(names):
        yield f"operations of the ledger have one name: {sorted(names)}"
    used = needed(prepared.graph)
    for node, count in counts.items():
        if node in used and (count.macs or not is_quantizer(prepared, node)):
            yield from _node_faults(prepared, node, count)
    for entry, bound in zip(accounting.ledger, accounting.operations, strict=True):
        sites = [source.site for source in _operands(bound)]
        if entry.status == "quantized" and None in sites:
            yield f"'{entry.name}' is called quantized and reads an operand in float"
        if entry.status != "quantized" and not entry.reason:
            yield f"'{entry.name}' is {entry.status} without a reason"
        if entry.macs and not entry.prices:
            yield f"'{entry.name}' has {entry.macs} MACs and no price"


def _node_faults(prepared: PreparedModule, node: fx.Node, count: NodeCount) -> Iterator[str]:
    accounting = prepared.plan.accounting
    ledger = {entry.name: entry for entry in accounting.ledger}
    entries = [ledger[work.name] for work in WORK.find(node) or () if work.name in ledger]
    place = node.format_node() or node.name
    if count.computing and not entries:
        yield f"'{place}' computes {sorted(set(count.computing))}, without entry"
    if sum(entry.macs for entry in entries) != count.macs:
        found = [entry.macs for entry in entries]
        yield f"'{place}' does {count.macs} MACs, in the ledger it has {found}"
    bounded = [table for name, table in prepared.plan.settings.tables.items() if name in
               prepared.plan.settings.limits]  # fmt: skip
    priced = {op for table in bounded for row in table.rows for op in row.op}
    bound_of = {bound.operation.name: bound for bound in accounting.operations}
    for entry in entries:
        bound = bound_of[entry.name]
        if not {bound.operation.op, bound.operation.target} & priced:
            continue
        skipped = SKIPPED.find(node) or () if prepared.plan.settings.choices.skip else ()
        in_float = [source for source in _operands(bound) if source.site is None]
        if len(in_float) > len(skipped) and _reads_floats(node):
            yield f"'{place}' is priced by its bit-widths and reads an operand in float"


def _operands(bound: BoundOperation) -> tuple[Any, ...]:
    return bound.sources[:1] if bound.operation.op == "embedding" else bound.sources


def _reads_floats(node: fx.Node) -> bool:
    values = [VALUE.find(read) for read in node.all_input_nodes]
    tensors = [value for value in values if isinstance(value, TensorInfo)]
    return all(value.dtype.is_floating_point for value in tensors)


# -- 5: totals are the sums of their rows, and rise with every bit-width ---------------------------


def check_totals(prepared: PreparedModule, counted: FloatCount, seed: int = 0) -> Iterator[str]:
    """Recompute totals from MACs and bits; raise one site after the other.

    Args:
        prepared: a priced model.
        counted: what the float model does for the inputs that it was priced for.
        seed: of the bit-widths that are tried beside the lowest and the highest.
    """
    accounting = prepared.plan.accounting
    draw = random.Random(seed)
    choices = [site.allowed for site in accounting.sites]
    assignments = [[pick(allowed) for allowed in choices] for pick in (min, max, draw.choice)]
    for bits in assignments:
        totals = accounting.totals(bits)
        for name, resource in accounting.resources.items():
            rows = sum(resource.costs(accounting.index(bits)), Fraction(0))
            if totals[name] != rows:
                yield f"the total of {name} is {totals[name]}, its rows sum up to {rows}"
        for name, expected in _expected(prepared, counted, bits).items():
            if name in totals and totals[name] != expected:
                yield f"the total of {name} is {totals[name]}, recomputed it is {expected}"
    rising = _rising_resources(prepared)
    for bits in (assignments[0], assignments[2]):
        yield from _fall_faults(accounting, bits, draw, rising)


def _widths(bound: BoundOperation, bits: list[int]) -> tuple[int, ...]:
    return tuple(bits[s.site] if s.site is not None else s.bits or 0 for s in bound.sources)


def _expected(
    prepared: PreparedModule, counted: FloatCount, bits: list[int]
) -> dict[str, Fraction]:
    operations = prepared.plan.accounting.operations
    width_of = dict(zip(prepared.quantizers, bits, strict=True))
    found = {
        "bops": Fraction(sum(_bops(bound, bits) for bound in operations)),
        "weight_memory": Fraction(memory_bits(prepared, counted, width_of), 8),
    }
    for name, table in prepared.plan.settings.tables.items():
        if name not in found and name in prepared.plan.settings.limits:
            rows = (table.cost(bound.operation, _widths(bound, bits)) for bound in operations)
            found[name] = sum(rows, Fraction(0))
    return found


def _bops(bound: BoundOperation, bits: list[int]) -> int:
    left, right = _widths(bound, bits) or (_FLOAT_BITS, _FLOAT_BITS)
    return bound.operation.macs * left * right


def _rising_resources(prepared: PreparedModule) -> set[str]:
    tables = prepared.plan.settings.tables
    return {
        name
        for name in prepared.plan.accounting.resources
        if name not in tables or rises(tables[name])
    }


def rises(table: CostTable) -> bool:
    """Tell whether no row of a table falls when bits rise, as far as the rows alone say it."""
    return all(_row_rises(row) for row in table.rows)


def _row_rises(row: Row) -> bool:
    cost = row.cost
    knows = not isinstance(cost, ComputedCost) and not (
        isinstance(cost, Expression) and not cost.variables <= ALL_BITS
    )
    return knows and row_falls(row) is None


def _fall_faults(
    accounting: Accounting, bits: list[int], draw: random.Random, rising: set[str]
) -> Iterator[str]:
    sites = range(len(bits))
    for site in sites if len(bits) <= _MAX_SITES else draw.sample(sites, _MAX_SITES):
        before: Mapping[str, Fraction] = {}
        for width in accounting.sites[site].allowed:
            now = accounting.totals([*bits[:site], width, *bits[site + 1 :]])
            fallen = [name for name, total in before.items() if now[name] < total]
            fallen = [name for name in fallen if name in rising]
            if fallen:
                yield f"{fallen} fall when '{accounting.sites[site].name}' rises to {width} bits"
            before = now


# -- 6: one quantizer for one tensor ---------------------------------------------------------------


def check_ties(prepared: PreparedModule) -> Iterator[str]:
    """No parameter is read by two quantizers, and no quantizer serves two sites."""
    readers: dict[int, set[str]] = {}
    for weight in stored_weights(prepared):
        if weight.is_whole:
            key = weight.sources[0].untyped_storage().data_ptr()
            readers.setdefault(key, set()).add(weight.site)
    for sites in readers.values():
        if len(sites) > 1:
            yield f"the quantizers {sorted(sites)} read one parameter"
    quantizers = prepared.quantizers.values()
    if len({id(quantizer) for quantizer in quantizers}) != len(quantizers):
        yield "one quantizer stands at two sites"
    called = {site_of(node) for node in prepared.graph.nodes}
    idle = [site for site in prepared.quantizers if site not in called]
    if idle:
        yield f"no operation reads the quantizers {idle[:5]}"


def check_sharing(prepared: PreparedModule) -> Iterator[str]:
    """No quantizer has one range for two tensors, apart from those that a rule makes share it."""
    sharing = _sharing_classes(prepared)
    tensors: dict[str, dict[object, fx.Node]] = {}
    together: list[list[object]] = []
    for node in prepared.graph.nodes:
        for inner in node.kwargs.get(INSIDE, {}).values() if is_recurrent(node) else ():
            tensors.setdefault(site_of(inner), {})[node, inner] = node
        if is_quantizer(prepared, node) and len(node.all_input_nodes) == 1:
            source = node.all_input_nodes[0]
            tensors.setdefault(site_of(node), {})[_tensor_key(prepared, source)] = source
        if OP_INFO.has(node) and OP_INFO.get(node).op in sharing:
            together.append(list(_quantized_operands(prepared, node)))
    for site, sources in tensors.items():
        if not _are_joined({*sources}, together):
            listed = ", ".join(f"'{node.format_node()}'" for node in sources.values())
            yield f"the quantizer '{site}' has one range for the tensors {listed}"


def _sharing_classes(prepared: PreparedModule) -> set[str]:
    """Return the classes of operations whose operands have one quantizer."""
    settings = prepared.plan.settings
    if settings.choices.share is not None:
        return {*settings.choices.share}
    bounding = [table for name, table in settings.tables.items() if name in settings.limits]
    return {op for table in bounding for op in table.share}


def _tensor_key(prepared: PreparedModule, source: fx.Node) -> object:
    return id(find_attribute(prepared, str(source.target))) if source.op == "get_attr" else source


def _quantized_operands(prepared: PreparedModule, node: fx.Node) -> Iterator[object]:
    """Yield the tensors that an operation reads through quantizers of activations."""
    for read in node.all_input_nodes:
        if not is_quantizer(prepared, read) or len(read.all_input_nodes) != 1:
            continue
        if prepared.quantizers[site_of(read)].spec.role != "weight":
            yield _tensor_key(prepared, read.all_input_nodes[0])


def _are_joined(tensors: set[object], together: list[list[object]]) -> bool:
    """Tell whether steps from one to another of `together` lead from each tensor to all."""
    reached = {next(iter(tensors))}
    waiting = [*reached]
    while waiting:
        tensor = waiting.pop()
        fresh = {item for group in together if tensor in group for item in group} - reached
        reached |= fresh
        waiting += fresh
    return tensors <= reached
