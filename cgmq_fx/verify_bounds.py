"""Cost tables and bounds of an exported file, and those that a caller holds it to."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cgmq_fx.budget import Budget, Limit
from cgmq_fx.container import FileFault
from cgmq_fx.cost.load import load_table
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import CgmqError
from cgmq_fx.manifest import Manifest, StoredResource, StoredTable

WEIGHT_MEMORY, PEAK_MEMORY = "weight_memory", "peak_activation_memory"
BYTE = "byte"
_BUILT_IN = (WEIGHT_MEMORY, PEAK_MEMORY)
#: Bounds the time that pricing takes, about a second.
_MAX_PRICING = 15_000_000


def check_size(manifest: Manifest, fault: FileFault) -> None:
    """Refuse what would take long to price."""
    effort = sum(_pricing_effort(table.content) for table in manifest.tables)
    if effort * len(manifest.operations) > _MAX_PRICING:
        raise fault(
            f"has {len(manifest.tables)} cost tables for {len(manifest.operations):,} operations, "
            f"whose rows take too long to price; export it with fewer or shorter tables"
        )


def _pricing_effort(table: Mapping[str, Any]) -> int:
    """Return a measure of how long one operation takes: rows, their conditions, one formula."""
    rows = table.get("row")
    listed = rows if isinstance(rows, list) else []
    conditions = sum(
        20 + len(str(row.get("where", ""))) for row in listed if isinstance(row, Mapping)
    )
    costs = [len(str(row.get("cost", ""))) for row in listed if isinstance(row, Mapping)]
    return 1000 + conditions + max(costs, default=0)


def own_table(stored: StoredTable, fault: FileFault) -> CostTable:
    """Return a table of the file, whose digest is the stored one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubts about prices were told when it was made
            table = load_table(stored.content)
    except CgmqError as error:
        raise fault(f"has a malformed cost table: {str(error)[:2000]}") from error
    if table.digest != stored.digest:
        raise fault(
            f"has a cost table {table.name!r} whose digest is {table.digest}, not "
            f"{stored.digest[:64]!r}: a price was changed"
        )
    return table


def given_tables(given: Any) -> list[CostTable]:
    """Return the tables of the call, one or several."""
    if given is None:
        return []
    several = given if isinstance(given, list | tuple) else [given]
    return [load_table(item) for item in several]


def resources_of(
    manifest: Manifest, given: Sequence[CostTable], fault: FileFault
) -> list[StoredResource]:
    """Return the resources of a file and those that the tables of the call add."""
    names = [item.name for item in manifest.resources]
    known = {str(table.content.get("name")) for table in manifest.tables}
    if len(set(names)) < len(names) or len(known) < len(manifest.tables):
        raise fault("names a resource or a table twice")
    strange = [name for name in names if name not in {*known, *_BUILT_IN}]
    missing = [name for name in known if name not in names]
    if strange or missing:
        raise fault(f"has the resources {strange} without a table, and not those of {missing}")
    if WEIGHT_MEMORY in names and manifest.float_parameters is None:
        raise fault("has a weight memory, and no count of float parameters")
    if PEAK_MEMORY in names and manifest.live is None:
        raise fault("has a peak of activation memory, and no activations")
    new = [table for table in given if table.name not in names]
    added = [
        StoredResource(table.name, None, None, None, None, (table.source or table.name,))
        for table in new
    ]
    return [*manifest.resources, *added]


def bounded(
    budget: object,
    resources: Sequence[StoredResource],
    tables: Mapping[str, CostTable],
    given: Sequence[CostTable],
) -> list[StoredResource]:
    """Return the resources with the bounds of the call in place of their own."""
    units = {name: table.unit for name, table in tables.items()} | dict.fromkeys(_BUILT_IN, BYTE)
    default = given[0].name if given else next(iter(tables), None)
    limits = Budget.parse(budget).resolve(units, default, [table.name for table in given])
    known = {item.name: item for item in resources}
    for name, limit in limits.items():
        before = known.get(name, StoredResource(name, None, None, None, None, ()))
        known[name] = replace(
            before, share=limit.share, value=limit.value, unit=limit.unit, bound=None
        )
    bounded = [item for item in known.values() if limit_of(item) is not None]
    return [*bounded, *(item for item in known.values() if item not in bounded)]


def limit_of(item: StoredResource) -> Limit | None:
    """Return the bound of a resource as a budget has it; None where there is none."""
    if item.share is None and item.value is None:
        return None
    return Limit(share=item.share, value=item.value, unit=item.unit)
