"""What an operation costs: integers in, number out; the prices are data."""

if __name__ != "cgmq_fx.cost":
    raise ImportError(f"import cgmq_fx.cost, not {__name__}")
from cgmq_fx.cost.computed import computed_cost as computed_cost
from cgmq_fx.cost.find import table_names as table_names
from cgmq_fx.cost.load import get_table as get_table
from cgmq_fx.cost.load import load_table as load_table
from cgmq_fx.cost.monotone import CostTableWarning as CostTableWarning
from cgmq_fx.cost.operation import BitSource as BitSource
from cgmq_fx.cost.operation import BoundOperation as BoundOperation
from cgmq_fx.cost.operation import Operation as Operation
from cgmq_fx.cost.row import Row as Row
from cgmq_fx.cost.schema import json_schema as json_schema
from cgmq_fx.cost.table import CostTable as CostTable
from cgmq_fx.cost.table_fields import Reference as Reference

__all__ = [
    "BitSource",
    "BoundOperation",
    "CostTable",
    "CostTableWarning",
    "Operation",
    "Reference",
    "Row",
    "computed_cost",
    "get_table",
    "json_schema",
    "load_table",
    "table_names",
]
