"""A report as files that other programs read: JSON and CSV, exact."""

import csv
import io
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from cgmq_fx.report_contents import (
    Coverage,
    ReportContents,
    ReportRow,
    ResourceSummary,
    Status,
    TensorRow,
)
from cgmq_fx.unit_bits import UnitBits

#: Version of both formats.
SCHEMA = 1
_STATUSES: tuple[Status, ...] = ("quantized", "float", "free")
_BITS = ("weight_bits", "activation_bits", "lhs_bits", "rhs_bits")


def to_json(contents: ReportContents) -> str:
    """Return a report as JSON; amounts are integers or texts ``"n/d"``."""
    data = {
        "schema": SCHEMA,
        "model": contents.model,
        "satisfied": contents.satisfied,
        "resources": {item.name: _resource(item) for item in contents.resources},
        "coverage": _coverage(contents.coverage),
        "rows": [_row(row) for row in contents.rows],
        "tensors": [_tensor(row) for row in contents.tensors],
    }
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def exact_number(number: Fraction) -> int | str:
    """Return `number` as JSON holds it exactly: an integer, or the text ``"n/d"``."""
    return int(number) if number.denominator == 1 else str(number)


def _pair(key: str, number: Fraction | None) -> dict[str, Any]:
    if number is None:
        return {key: None, f"{key}_float": None}
    return {key: exact_number(number), f"{key}_float": float(number)}


def _amounts(key: str, amounts: Mapping[str, Fraction]) -> dict[str, Any]:
    return {
        key: {name: exact_number(amount) for name, amount in amounts.items()},
        f"{key}_float": {name: float(amount) for name, amount in amounts.items()},
    }


def _resource(item: ResourceSummary) -> dict[str, Any]:
    return {
        "unit": item.unit,
        **_pair("total", item.total),
        **_pair("reference", item.reference),
        **_pair("relative", item.relative),
        **_pair("budget", item.budget),
        "budget_text": item.budget_text or None,
        "satisfied": item.is_satisfied,
        "convention": list(item.convention),
    }


def _coverage(coverage: Coverage) -> dict[str, Any]:
    return {
        "operations": len(coverage.entries),
        "macs": coverage.macs,
        **{
            status: {"count": coverage.count(status), **_pair("macs_share", coverage.share(status))}
            for status in _STATUSES
        },
        **_amounts("unpriced_macs_share", coverage.unpriced),
    }


def _bits(bits: int | None) -> Any:
    """Return bit-widths as JSON: a number, or where those of units differ their mean and counts."""
    if not isinstance(bits, UnitBits):
        return bits
    counts = {str(width): count for width, count in bits.counts.items()}
    return {**_pair("mean", bits.mean), "units": counts}


def _row(row: ReportRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "op": row.op,
        "target": row.target,
        "macs": row.macs,
        **{name: _bits(getattr(row, name)) for name in _BITS},
        **_amounts("cost", row.cost),
        **_amounts("budget_share", row.budget_share),
        "status": row.status,
        "reason": row.reason,
        "unpriced_in": list(row.unpriced_in),
    }


def _tensor(row: TensorRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "role": row.role,
        "elements": row.elements,
        "bits": _bits(row.bits),
        **_amounts("cost", row.cost),
        **_amounts("budget_share", row.budget_share),
    }


def to_csv(contents: ReportContents) -> str:
    """Return the rows of a report as CSV: by ``kind``, operations and then tensors."""
    names = [item.name for item in contents.resources]
    bounded = list(contents.budgets)
    columns = [
        *("kind", "name", "op", "target", "macs", "elements"),
        *_BITS,
        *("status", "reason"),
        *(f"cost_{name}" for name in names),
        *(f"budget_share_{name}" for name in bounded),
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_operation_line(row) for row in contents.rows)
    writer.writerows(_tensor_line(row) for row in contents.tensors)
    return text.getvalue()


def _operation_line(row: ReportRow) -> dict[str, Any]:
    fields = ("name", "op", "target", "macs", *_BITS, "status", "reason")
    return {
        "kind": "operation",
        **{name: getattr(row, name) for name in fields},
        **_amount_cells(row),
    }


def _tensor_line(row: TensorRow) -> dict[str, Any]:
    cells = {"kind": "tensor", "name": row.name, "elements": row.elements}
    return {**cells, f"{row.role}_bits": row.bits, **_amount_cells(row)}


def _amount_cells(row: ReportRow | TensorRow) -> dict[str, Any]:
    costs = {f"cost_{name}": exact_number(cost) for name, cost in row.cost.items()}
    shares = {f"budget_share_{name}": float(part) for name, part in row.budget_share.items()}
    return {**costs, **shares}
