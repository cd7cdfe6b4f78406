"""The fields of a cost table besides its rows, and what its rows must be together."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cgmq_fx.cost.faults import Faults
from cgmq_fx.cost.fields import (
    check_keys,
    read_bit_width,
    read_choice,
    read_mapping,
    read_text,
    read_unit,
)
from cgmq_fx.cost.row import Row

#: The newest version of the format that this library reads.
SCHEMA = 1
UNPRICED = ("error", "zero")
MAX_ROWS = 2000
#: Keys of a table besides its rows.
TABLE_KEYS = ("schema", "name", "unit", "source", "input_bits", "reference", "unpriced")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,79}", re.ASCII)


@dataclass(frozen=True)
class Reference:
    """The bit-widths at which a network costs 100 %."""

    weight: int = 32
    activation: int = 32


DEFAULT_REFERENCE = Reference()


def normalise_table(raw: Mapping[str, Any], faults: Faults) -> dict[str, Any]:
    """Return the fields of a table besides its rows from what a user wrote, noting every fault."""
    check_keys(raw, (*TABLE_KEYS, "row"), ("name", "unit"), faults)
    values: dict[str, Any] = {
        "schema": _schema(raw.get("schema", SCHEMA), faults.below("schema")),
        "source": read_text(raw.get("source", ""), faults.below("source")),
        "input_bits": read_bit_width(raw.get("input_bits", 8), faults.below("input_bits")),
        "reference": _reference(raw.get("reference", {}), faults.below("reference")),
        "unpriced": read_choice(
            raw.get("unpriced", UNPRICED[0]), UNPRICED, faults.below("unpriced")
        ),
    }
    if "name" in raw:
        values["name"] = _name(raw["name"], faults.below("name"))
    if "unit" in raw:
        values["unit"] = read_unit(raw["unit"], faults.below("unit"))
    return values


def _schema(value: object, faults: Faults) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        faults.add(f"must be the version of the format, {SCHEMA}", value)
    elif value > SCHEMA:
        faults.add(
            f"is a newer version of the format than this library reads ({SCHEMA}); upgrade "
            f"cgmq_fx, or write the table in version {SCHEMA}",
            value,
        )
    return SCHEMA


def _name(value: object, faults: Faults) -> str:
    name = read_text(value, faults)
    if isinstance(value, str) and not _NAME.fullmatch(name):
        faults.add(
            "must be 1 to 80 letters, digits, '_', '-' or '.', a letter or digit first", value
        )
    return name


def _reference(value: object, faults: Faults) -> Reference:
    if isinstance(value, Reference):
        value = {"weight": value.weight, "activation": value.activation}
    raw = read_mapping(value, faults)
    check_keys(raw, ("weight", "activation"), (), faults)
    widths = {
        key: read_bit_width(raw.get(key, 32), faults.below(key)) for key in ("weight", "activation")
    }
    return Reference(**widths)


def check_rows(rows: Iterable[object], faults: Faults) -> None:
    """Note rows that price the same operations under the same condition."""
    seen: dict[tuple[str, frozenset[object]], list[tuple[int, Row]]] = {}
    reported: set[tuple[int, int]] = set()
    count = 0
    for index, row in enumerate(rows):
        count += 1
        if not isinstance(row, Row):
            faults.below("row", index).add(f"must be a Row, is a {type(row).__name__}", row)
            continue
        conditions = frozenset(row.where.conditions if row.where else ())
        for op in row.op:
            for other_index, other in seen.setdefault((op, conditions), []):
                nested = set(row.op) < set(other.op) or set(other.op) < set(row.op)
                if not nested and (other_index, index) not in reported:
                    reported.add((other_index, index))
                    faults.below("row", index).add(
                        f"has the same condition as row {other_index + 1} and also prices {op!r}; "
                        "keep one of them, or tell them apart by 'where'"
                    )
            seen[op, conditions].append((index, row))
    if not 1 <= count <= MAX_ROWS:
        faults.below("row").add(f"there are {count} rows; there must be 1 to {MAX_ROWS}")
