"""Writes on every node which row of which cost table prices it."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import fx

from cgmq_fx.cost.table import CostTable
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.deployed import deployed_nodes
from cgmq_fx.passes.meta import PRICES, WORK, MetaKey


@final
@dataclass(frozen=True)
class PriceOperations(GraphPass):
    """Write `PRICES` on every node: pairs of table name and the row that prices the node.

    Args:
        tables: the cost tables.

    Raises:
        CostTableError: a table has no row for an operation with MACs, or two equally specific ones.
    """

    name: ClassVar[str] = "price-operations"
    requires: ClassVar[frozenset[MetaKey[Any]]] = frozenset({WORK})
    provides: ClassVar[frozenset[MetaKey[Any]]] = frozenset({PRICES})

    tables: tuple[CostTable, ...]

    def run(self, gm: fx.GraphModule) -> bool:
        """Annotate `gm`; see `GraphPass.run`."""
        deployed = deployed_nodes(gm.graph)
        for table in self.tables:
            table.require_priced(
                [
                    operation
                    for node in gm.graph.nodes
                    if node in deployed
                    for operation in WORK.get(node)
                ]
            )
        for node in gm.graph.nodes:
            operations = WORK.get(node) if node in deployed else ()
            PRICES.set(
                node,
                tuple(
                    (table.name, str(row))
                    for table in self.tables
                    for operation in operations[:1]
                    if (row := table.row_for(operation)) is not None
                ),
            )
        return False
