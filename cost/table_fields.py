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
    read_sequence,
    read_text,
    read_unit,
)
from cgmq_fx.cost.row import Row

#: The newest version of the format that this library reads.
SCHEMA = 1
UNPRICED = ("error", "zero")
MAX_ROWS = 2000
#: Combinations of listed bit-widths in all grids of a table together.
MAX_PAIRS = 20_000
#: Operation classes whose operands can be asked to have one quantizer.
SHAREABLE = ("add", "sub", "cat")
#: Keys of a table besides its rows.
TABLE_KEYS = ("schema", "name", "unit", "source", "input_bits", "reference", "unpriced", "share")
#: Keys that a file may have besides: its rows, the tables it builds on, and the address of a JSON
#: Schema, for editors.
FILE_KEYS = ("row", "include", "$schema")
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(NAME_PATTERN)


@dataclass(frozen=True)
class Reference:
    """The bit-widths at which a network costs 100 %."""

    weight: int = 32
    activation: int = 32


DEFAULT_REFERENCE = Reference()


def normalise_table(raw: Mapping[str, Any], faults: Faults) -> dict[str, Any]:
    """Return the fields of a table besides its rows from what a user wrote, noting every fault."""
    check_keys(raw, (*TABLE_KEYS, *FILE_KEYS), ("name", "unit"), faults)
    values: dict[str, Any] = {
        "schema": _schema(raw.get("schema", SCHEMA), faults.below("schema")),
        "source": read_text(raw.get("source", ""), faults.below("source")),
        "input_bits": read_bit_width(raw.get("input_bits", 8), faults.below("input_bits")),
        "reference": _reference(raw.get("reference", {}), faults.below("reference")),
        "unpriced": read_choice(
            raw.get("unpriced", UNPRICED[0]), UNPRICED, faults.below("unpriced")
        ),
        "share": _share(raw.get("share", ()), faults.below("share")),
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


def _share(value: object, faults: Faults) -> tuple[str, ...]:
    """Return the classes in a fixed order, each once; an empty list is none."""
    if isinstance(value, list | tuple) and not value:
        return ()
    items = read_sequence(value, faults, len(SHAREABLE))
    read = {read_choice(item, SHAREABLE, faults.below(i)) for i, item in enumerate(items)}
    return tuple(op for op in SHAREABLE if op in read)


def check_rows(rows: Iterable[object], faults: Faults) -> None:
    """Note rows that price the same operations under the same condition, and too many rows."""
    listed = list(rows)
    if not 1 <= len(listed) <= MAX_ROWS:
        faults.below("row").add(f"there are {len(listed)} rows; there must be 1 to {MAX_ROWS}")
        return
    grids = [row.grid for row in listed if isinstance(row, Row) and row.grid]
    pairs = sum(len(grid.widths(0)) * len(grid.widths(1)) for grid in grids)
    if pairs > MAX_PAIRS:
        faults.below("row").add(
            f"the grids span {pairs:,} pairs of bit-widths in all; at most {MAX_PAIRS:,} are read: "
            "list only the widths that the hardware has, or write a formula"
        )
    seen: dict[tuple[str, frozenset[object], int], list[tuple[int, frozenset[str]]]] = {}
    for index, row in enumerate(listed):
        here = faults.below("row", index)
        if not isinstance(row, Row):
            here.add(f"must be a Row, is a {type(row).__name__}", row)
        elif (clash := _clash(row, index, seen)) is not None:
            here.add(
                f"has the same condition as row {clash[0] + 1}{_place(listed[clash[0]])} and also "
                f"prices {clash[1]!r}; keep one of them, or tell them apart by 'where'"
            )


def _place(row: object) -> str:
    return f" ({row.origin})" if isinstance(row, Row) and row.origin else ""


def _clash(
    row: Row,
    index: int,
    seen: dict[tuple[str, frozenset[object], int], list[tuple[int, frozenset[str]]]],
) -> tuple[int, str] | None:
    """Return an earlier row that ties with `row`, and for which operation; else remember `row`.

    Rows that tie with none are nested in each other, so that the lists in `seen` stay short.
    """
    conditions = frozenset(row.where.conditions if row.where else ())
    ops = frozenset(row.op)
    places = [(op, seen.setdefault((op, conditions, row.layer), [])) for op in row.op]
    for op, others in places:
        for other_index, other in others:
            if not (ops < other or other < ops):
                return other_index, op
    for _, others in places:
        others.append((index, ops))
    return None
