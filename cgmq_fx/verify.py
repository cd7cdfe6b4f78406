"""`verify`: what an exported file costs, recomputed from the file alone.

The sums, the MACs and the memory here are this module's own; what is taken from the library are
pricing rules, the data of cost tables, and the printing of reports.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, product
from typing import Any, Literal

from rich.console import RenderableType

from cgmq_fx.container import FileFault
from cgmq_fx.cost.operation import OPERAND_NAMES
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import BudgetError, CgmqError, UsageError
from cgmq_fx.manifest import FLOAT_BITS, StoredOperation, StoredResource
from cgmq_fx.open_stored import open_stored
from cgmq_fx.report_contents import ReportContents, ReportRow, ResourceSummary, Status, TensorRow
from cgmq_fx.report_files import to_json
from cgmq_fx.report_text import brief, renderable, to_text
from cgmq_fx.stored_file import StoredFile, refuse
from cgmq_fx.unit_bits import UnitBits
from cgmq_fx.verify_bounds import (
    BYTE,
    PEAK_MEMORY,
    WEIGHT_MEMORY,
    bounded,
    check_size,
    given_tables,
    limit_of,
    own_table,
    resources_of,
)
from cgmq_fx.verify_work import counted, work_faults

_MAX_LISTED = 10


@dataclass(frozen=True, repr=False)
class Verification(ReportContents):
    """What a file costs, as `cgmq_fx.report` says it; ``str(verification)`` is the same table.

    Attributes:
        notes: what had to be taken from the file as it stands, and how it computes.
    """

    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return to_text(self)

    def __rich__(self) -> RenderableType:
        return renderable(self)

    def __repr__(self) -> str:
        return f"Verification({brief(self)})"

    def to_json(self) -> str:
        """Return the same JSON as `Report.to_json`."""
        return to_json(self)


def verify(
    path: str | os.PathLike[str],
    budget: object = None,
    cost_table: Any = None,
) -> Verification:
    """Recompute what an exported file costs, from the file alone; nothing in it is run.

    ``.satisfied`` tells whether every budget holds.

    Args:
        path: a file that `cgmq_fx.export` wrote.
        budget: bounds to hold it to, as `prepare` takes them, in place of its own on the same
            resources.
        cost_table: a table, or a sequence of tables, as `prepare` takes them, to price it by
            besides its own; one with the name of an own table stands in its place.

    Raises:
        FileFormatError: the file is damaged or contradicts itself; the message says where.
        BudgetError: `budget` is malformed, or names what the file has no figures of.
        CostTableError: `cost_table` is malformed, or cannot price the operations.
    """
    stored = open_stored(path)
    fault = FileFault(stored.path)
    _check(stored, fault)
    check_size(stored.manifest, fault)
    own = [own_table(table, fault) for table in stored.manifest.tables]
    given = given_tables(cost_table)
    tables = {table.name: table for table in (*own, *given)}
    resources = resources_of(stored.manifest, given, fault)
    if budget is not None:
        resources = bounded(budget, resources, tables, given)
    return _Verifier(stored, fault, tables, resources).verification(
        trusted=not given and budget is None
    )


def _check(stored: StoredFile, fault: FileFault) -> None:
    refuse(fault, [*work_faults(stored.manifest), *_memory_faults(stored)])


def _memory_faults(stored: StoredFile) -> Iterator[str]:
    manifest = stored.manifest
    count = len(manifest.sites)
    for index in manifest.stored_sites:
        if index >= count:
            yield f"the stored weights name the site {index} of {count}"
    for item in manifest.live or ():
        if item.site is not None and item.site >= count:
            yield f"the activation {item.name!r} has the site {item.site} of {count}"
        if item.first > item.last:
            yield f"the activation {item.name!r} lives from {item.first} to {item.last}"
    if manifest.float_parameters is None:
        return
    missing = {weight.site for weight in manifest.weights} - set(manifest.stored_sites)
    for index in sorted(missing):
        yield f"the weights of site {index} are stored and not counted"
    # Those at 32 bits stay parameters.
    floats = [
        manifest.sites[index].elements
        for index in manifest.stored_sites
        if index < count and manifest.bits[index] == FLOAT_BITS
    ]
    if stored.float_elements > manifest.float_parameters + sum(floats):
        yield (
            f"the file holds {stored.float_elements:,} float parameters and counts "
            f"{manifest.float_parameters + sum(floats):,}"
        )


# -- sums ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sum:
    """One resource at the bit-widths of the file."""

    unit: str
    total: Fraction
    reference: Fraction


class _Verifier:
    """Adds up the costs of a file whose parts fit each other."""

    def __init__(
        self,
        stored: StoredFile,
        fault: FileFault,
        tables: Mapping[str, CostTable],
        resources: Sequence[StoredResource],
    ) -> None:
        self.fault, self.manifest = fault, stored.manifest
        self.float_elements, self.notes = stored.float_elements, stored.notes
        self.bits = _bits(stored, fault)
        self.resources = {item.name: item for item in resources}
        self.tables = {name: tables[name] for name in self.resources if name in tables}
        self.costs = {name: self._priced(table) for name, table in self.tables.items()}
        self.tensors: dict[str, list[TensorRow]] = {}
        self.sums = {name: self._sum(name) for name in self.resources}

    def verification(self, *, trusted: bool) -> Verification:
        """Return the report; `trusted`: all bounds are those of the file."""
        summaries = tuple(map(self._summary, self.resources.values()))
        bounds = {item.name: item.budget for item in summaries if item.budget is not None}
        if trusted:
            changed = [n for n, item in self.resources.items() if item.bound != bounds.get(n)]
            if changed:
                raise self.fault(f"has bounds on {changed} that its budget does not come to")
        rows = tuple(self._row(place, bounds) for place in range(len(self.manifest.operations)))
        tensors = tuple(
            replace(row, budget_share=_shares(row.cost, bounds))
            for name in self.resources
            for row in self.tensors.get(name, ())
        )
        return Verification(self.manifest.model, rows, tensors, summaries, self._notes())

    def _notes(self) -> tuple[str, ...]:
        found = [item.operation for item in self.manifest.operations if counted(item.operation)]
        if not found:
            return self.notes
        macs = sum(operation.macs for operation in found)
        names = ", ".join(operation.name for operation in found[:_MAX_LISTED])
        return (
            f"{macs:,} MACs of {len(found)} operations were counted by running the model and are "
            f"taken as the file has them: {names}",
            *self.notes,
        )

    def _summary(self, item: StoredResource) -> ResourceSummary:
        found, limit = self.sums[item.name], limit_of(item)
        try:
            bound = None if limit is None else limit.amount(found.reference, found.unit)
        except (BudgetError, UsageError) as error:
            if item.bound is not None:  # it is the file's own
                raise self.fault(f"has a malformed bound: {error}") from error
            raise
        text = "" if limit is None else str(limit)
        return ResourceSummary(
            item.name, found.unit, found.total, found.reference, bound, text, item.convention
        )

    def _sum(self, name: str) -> _Sum:
        if name == WEIGHT_MEMORY:
            return self._weight_memory()
        if name == PEAK_MEMORY:
            return self._peak_memory()
        table = self.tables[name]
        reference = sum(
            (table.reference_cost(item.operation) for item in self.manifest.operations), Fraction()
        )
        return _Sum(table.unit, sum(self.costs[name], Fraction()), reference)

    # -- operations ------------------------------------------------------------------------------

    def _widths(self, item: StoredOperation) -> tuple[int, ...]:
        return tuple(
            FLOAT_BITS if source.site is None else self.bits[source.site] for source in item.sources
        )

    def _priced(self, table: CostTable) -> list[Fraction]:
        operations = self.manifest.operations
        try:
            table.require_priced(item.operation for item in operations)
            return [self._cost(table, item) for item in operations]
        except CgmqError as error:
            if table.digest not in {stored.digest for stored in self.manifest.tables}:
                raise
            raise self.fault(
                f"has a cost table that cannot price it: {str(error)[:2000]}"
            ) from error

    def _cost(self, table: CostTable, item: StoredOperation) -> Fraction:
        """Return the price of an operation; of units that differ in bit-width, of each its part."""
        operation, widths = item.operation, self._widths(item)
        if not any(isinstance(bits, UnitBits) for bits in widths):
            return table.cost(operation, widths)
        row = table.row_for(operation)
        is_shared = row is None or row.per in ("mac", "weight")
        parts = [(many, table.cost(operation, pair)) for pair, many in _pairs(widths)]
        if not is_shared:
            return max(cost for _, cost in parts)
        units = sum(many for many, _ in parts)
        return sum((many * cost for many, cost in parts), Fraction()) / units

    def _row(self, place: int, bounds: Mapping[str, Fraction]) -> ReportRow:
        item = self.manifest.operations[place]
        operation = item.operation
        widths: dict[str, int | None] = {
            name: None for names in OPERAND_NAMES.values() for name in names
        }
        widths |= zip(OPERAND_NAMES[operation.operands], self._widths(item), strict=True)
        if operation.op == "embedding":
            widths["activation_bits"] = None  # it reads an index
        cost = {name: costs[place] for name, costs in self.costs.items()}
        return ReportRow(
            name=operation.name,
            op=operation.op,
            target=operation.target,
            macs=operation.macs,
            **widths,
            cost=cost,
            budget_share=_shares(cost, bounds),
            status=self._status(item),
            reason=item.reason,
            unpriced_in=tuple(
                name
                for name, table in self.tables.items()
                if operation.macs and table.row_for(operation) is None
            ),
        )

    def _status(self, item: StoredOperation) -> Status:
        learnable = item.sources[:1] if item.operation.op == "embedding" else item.sources
        if learnable and all(source.site is not None for source in learnable):
            return "quantized"
        rows = (table.row_for(item.operation) for table in self.tables.values())
        return "float" if item.operation.macs or any(rows) else "free"

    # -- memory ----------------------------------------------------------------------------------

    def _weight_memory(self) -> _Sum:
        """Add up the packed codes, by site, and the parameters that stay float."""
        packed: dict[int, int] = dict.fromkeys(self.manifest.stored_sites, 0)
        for weight in self.manifest.weights:
            packed[weight.site] = packed.get(weight.site, 0) + weight.elements
        rows, maps = [], self._maps()
        for site, found in packed.items():
            stored = self.manifest.sites[site]
            # Without codes they stand among the float parameters, or are computed from activations.
            elements = found or stored.elements
            row = _tensor(stored.name, elements, self.bits[site], WEIGHT_MEMORY, "weight")
            rows.append(replace(row, cost={WEIGHT_MEMORY: row.cost[WEIGHT_MEMORY] + maps[site]}))
        floats = self.manifest.float_parameters
        if floats is None:
            floats = self.float_elements
        rows.append(_tensor("other parameters", floats, FLOAT_BITS, WEIGHT_MEMORY, "weight"))
        self.tensors[WEIGHT_MEMORY] = [row for row in rows if row.cost[WEIGHT_MEMORY]]
        total = sum((row.cost[WEIGHT_MEMORY] for row in rows), Fraction())
        return _Sum(BYTE, total, Fraction(FLOAT_BITS * sum(row.elements for row in rows), 8))

    def _maps(self) -> dict[int, Fraction]:
        """Return the bytes, by site, of saying which unit has which bit-width."""
        maps = dict.fromkeys(range(len(self.bits)), Fraction())
        for weight in self.manifest.weights:
            if weight.unit_widths:
                choices = (len(weight.unit_widths) - 1).bit_length()
                maps[weight.site] = Fraction(math.prod(weight.unit_shape) * choices, 8)
        return maps

    def _peak_memory(self) -> _Sum:
        """Walk over the steps at which activations appear and go."""
        live = self.manifest.live
        if live is None:
            raise BudgetError(
                f"the file has no figures of {PEAK_MEMORY}, which was not bounded when the model "
                f"was prepared; prepare it with a budget on it, or leave it out here"
            )
        bits = [item.bits if item.site is None else self.bits[item.site] for item in live]
        steps = sorted({item.first for item in live})
        spans = [(item.first, item.last) for item in live]
        profile = _profile(steps, spans, [i.elements * b for i, b in zip(live, bits, strict=True)])
        peak = max(profile, default=0)
        at = steps[profile.index(peak)] if profile else 0
        self.tensors[PEAK_MEMORY] = [
            _tensor(item.name, item.elements, width, PEAK_MEMORY, "activation")
            for item, width in zip(live, bits, strict=True)
            if item.first <= at <= item.last and item.elements * width
        ]
        floats = [
            0 if item.is_copy else item.elements * (item.bits if item.site is None else FLOAT_BITS)
            for item in live
        ]
        reference = max(_profile(steps, spans, floats), default=0)
        return _Sum(BYTE, Fraction(peak, 8), Fraction(reference, 8))


def _bits(stored: StoredFile, fault: FileFault) -> tuple[int, ...]:
    """Return the bit-width of every site; `UnitBits` where the units of its weight differ."""
    bits = list(stored.manifest.bits)
    of_site: dict[int, set[UnitBits | None]] = {}
    for weight in stored.manifest.weights:
        of_site.setdefault(weight.site, set()).add(stored.units.get(weight.name))
    for site, found in of_site.items():
        if len(found) > 1:
            name = stored.manifest.sites[site].name
            raise fault(f"contradicts itself: the weights of {name!r} differ in their bit-widths")
        (units,) = found
        if units is not None:
            bits[site] = units
    return tuple(bits)


def _pairs(widths: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield the bit-widths at which single units meet, and how many do."""
    spread = [
        list(bits.counts.items()) if isinstance(bits, UnitBits) else [(bits, 1)] for bits in widths
    ]
    for met in product(*spread):
        yield tuple(bits for bits, _ in met), math.prod(many for _, many in met)


def _profile(
    steps: Sequence[int], spans: Sequence[tuple[int, int]], sizes: Iterable[int]
) -> list[int]:
    """Return what is live at each of the steps at which something appears."""
    changes: dict[int, int] = dict.fromkeys(steps, 0)
    for (first, last), size in zip(spans, sizes, strict=True):
        changes[first] += size
        changes[last + 1] = changes.get(last + 1, 0) - size
    ordered = sorted(changes)
    live = dict(zip(ordered, accumulate(changes[step] for step in ordered), strict=True))
    return [live[step] for step in steps]


def _tensor(
    name: str, elements: int, bits: int, resource: str, role: Literal["weight", "activation"]
) -> TensorRow:
    mean = bits.mean if isinstance(bits, UnitBits) else bits
    return TensorRow(name, elements, bits, {resource: elements * Fraction(mean) / 8}, {}, role)


def _shares(cost: Mapping[str, Fraction], bounds: Mapping[str, Fraction]) -> dict[str, Fraction]:
    return {
        name: cost[name] / bound if bound else Fraction(0)
        for name, bound in bounds.items()
        if name in cost
    }
