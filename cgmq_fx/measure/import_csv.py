"""Measurements made elsewhere, as a CSV file, into a cost table."""

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any

from cgmq_fx.cost.attributes import bit_names, class_variables
from cgmq_fx.cost.faults import nearest
from cgmq_fx.cost.fields import MAX_BIT_WIDTH
from cgmq_fx.cost.grid import PAIR_AXES, WEIGHT_AXES
from cgmq_fx.cost.load import load_table
from cgmq_fx.cost.operation import OP_CLASSES
from cgmq_fx.cost.row_fields import PER
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import CostTableError

#: Columns with a meaning of their own; any other is an attribute of operations.
COLUMNS = ("op", "per", "weight", "activation", "cost", "error", "source")
_NEEDED = ("op", "cost")
_MAX_BYTES = 1 << 20
_MAX_FAULTS = 20


@dataclass(frozen=True)
class _Line:
    """One measurement, as read.

    Attributes:
        number: of the line in the file, for messages.
        row: what tells the row of the table that it belongs to: op, where, per.
        bits: its two bit-widths; None where the operation has none.
        values: cost, and error and source where they are given.
    """

    number: int
    row: tuple[str, str, str]
    bits: tuple[int, int] | None
    values: Mapping[str, Any]


def import_csv(
    path: str | os.PathLike[str], *, unit: str, name: str = "", source: str = ""
) -> CostTable:
    """Return the cost table that a CSV file of measurements makes.

    The first line names the columns. `COLUMNS` have meanings of their own: ``op`` (an operation
    class), ``per`` (what one piece of work is, by default ``call``), ``weight`` and ``activation``
    (bit-widths; the right-hand and the left-hand operand of a product of two activations; both
    empty for an operation without), ``cost``, ``error`` and ``source``. Any other column is an
    attribute such as ``in_channels`` or ``output_elements``: the measurement is of operations that
    have the value in it, and an empty cell asks for nothing.

    Args:
        path: the file, UTF-8, at most 1 MiB.
        unit: of every cost.
        name: of the table, by default that of the file.
        source: where the numbers come from.

    Raises:
        CostTableError: the file is malformed; the message lists every fault with its line, column,
            value, rule and the way out.
    """
    place = Path(path)
    faults: list[str] = []
    lines = list(_lines(place, faults))
    _check_repeated(lines, faults, place)
    _raise_if_any(place, faults)
    rows: dict[tuple[str, str, str], list[_Line]] = {}
    for line in lines:
        rows.setdefault(line.row, []).append(line)
    return load_table(
        {
            "name": name or place.stem,
            "unit": unit,
            "source": source or f"imported from {place.name}",
            "row": [_row(*row, found) for row, found in rows.items()],
        }
    )


def _raise_if_any(place: Path, faults: list[str]) -> None:
    if faults:
        more = len(faults) - _MAX_FAULTS
        shown = faults[:_MAX_FAULTS] + ([f"and {more} more"] if more > 0 else [])
        raise CostTableError(
            f"{place} refused for {len(faults)} fault{'s' * (len(faults) > 1)}:\n  "
            + "\n  ".join(shown)
        )


def _lines(place: Path, faults: list[str]) -> Iterator[_Line]:
    reader = csv.reader(_text(place).splitlines(), strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                faults += _header_faults(f"{place}:{reader.line_num}", header)
                _raise_if_any(place, faults)
                continue
            line = _Reader(f"{place}:{reader.line_num}", faults).line(
                header, cells, reader.line_num
            )
            if line is not None:
                yield line
    except csv.Error as error:
        faults.append(f"{place}:{reader.line_num}: not CSV: {error}; correct the quotes")
    if header is None or (not faults and reader.line_num < 2):
        faults.append(
            f"{place}:1: no measurements; write a line of column names ({', '.join(COLUMNS)}, and "
            "attributes), then one line for each measurement"
        )


def _text(place: Path) -> str:
    try:
        size = place.stat().st_size
        if size > _MAX_BYTES:
            raise CostTableError(
                f"{place} has {size} bytes; at most {_MAX_BYTES} are read: split it"
            )
        return place.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CostTableError(f"{place} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise CostTableError(
            f"{place} is not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from error


def _header_faults(at: str, header: list[str]) -> list[str]:
    attributes = {name for op in OP_CLASSES for name in class_variables([op])} - {"op"}
    known = (*COLUMNS, *sorted(attributes))
    faults = []
    for index, column in enumerate(header):
        if column not in known:
            hint = nearest(column, known)
            faults.append(
                f"{at}: column {index + 1}, {column!r}: no such column{hint}; there are "
                f"{', '.join(known)}"
            )
        elif column in header[:index]:
            faults.append(f"{at}: column {index + 1}, {column!r}: given twice; keep one")
    faults += [
        f"{at}: column {column!r} is missing; add it" for column in _NEEDED if column not in header
    ]
    return faults


class _Reader:
    """Reads the cells of one line; notes each fault and goes on."""

    def __init__(self, at: str, faults: list[str]) -> None:
        self.at = at
        self.faults = faults

    def fault(self, column: str, value: str, rule: str) -> None:
        self.faults.append(f"{self.at}: column {column!r}, value {value!r}: {rule}")

    def line(self, header: list[str], cells: list[str], number: int) -> _Line | None:
        if len(cells) != len(header):
            self.faults.append(
                f"{self.at}: {len(cells)} cells, {len(header)} columns; give one cell for each, "
                "empty where it does not apply"
            )
            return None
        before = len(self.faults)
        given = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        op = self._choice("op", given["op"], OP_CLASSES)
        per = self._choice("per", given.get("per") or "call", PER)
        if op is None or per is None:
            return None
        where = self._where(op, {key: v for key, v in given.items() if key not in COLUMNS and v})
        bits = self._bits(op, given.get("weight", ""), given.get("activation", ""))
        values: dict[str, Any] = {"cost": self._amount("cost", given["cost"])}
        if given.get("error"):
            values["error"] = self._error(given["error"])
        if given.get("source"):
            values["source"] = given["source"]
        return None if len(self.faults) > before else _Line(number, (op, where, per), bits, values)

    def _choice(self, column: str, value: str, options: tuple[str, ...]) -> str | None:
        if value in options:
            return value
        self.fault(
            column, value, f"not known{nearest(value, options)}; one of {', '.join(options)}"
        )
        return None

    def _where(self, op: str, given: Mapping[str, str]) -> str:
        kinds = class_variables([op])
        conditions = []
        for column, value in given.items():
            if column not in kinds:
                rule = f"{op} has no such attribute; leave it empty, {op} has {', '.join(kinds)}"
                self.fault(column, value, rule)
            elif kinds[column] == "number":
                if not (value.isascii() and value.isdecimal()):
                    self.fault(column, value, "must be a whole number; write digits only")
                conditions.append(f"{column} == {value}")
            elif kinds[column] == "bool":
                if value not in ("true", "false"):
                    self.fault(column, value, "must be true or false")
                conditions.append(column if value == "true" else f"not {column}")
            else:
                if "'" in value or "\n" in value:
                    self.fault(column, value, "must be a text without quotes, in one line")
                conditions.append(f"{column} == '{value}'")
        return " and ".join(sorted(conditions))

    def _bits(self, op: str, weight: str, activation: str) -> tuple[int, int] | None:
        if not weight and not activation:
            return None
        for column, value in (("weight", weight), ("activation", activation)):
            if not (value.isascii() and value.isdecimal()) or int(value) > MAX_BIT_WIDTH:
                rule = f"must be a number of bits from 0 to {MAX_BIT_WIDTH}; or leave both empty"
                self.fault(column, value, rule)
                return None
        return int(weight), int(activation)

    def _amount(self, column: str, value: str) -> Fraction:
        try:
            number = Decimal(value)
        except InvalidOperation:
            number = Decimal("nan")
        if not number.is_finite() or number < 0 or abs(number.adjusted()) > 100:
            self.fault(column, value, "must be a number of at least 0, such as 0.25")
            return Fraction(0)
        return Fraction(number)

    def _error(self, value: str) -> Fraction:
        share = self._amount("error", value.removesuffix("%").strip())
        return share / 100 if value.endswith("%") else share


def _check_repeated(lines: list[_Line], faults: list[str], place: Path) -> None:
    """Note what is measured twice, and rows of which only some lines have bit-widths."""
    seen: dict[object, int] = {}
    kinds: dict[object, _Line] = {}
    for line in lines:
        key = (line.row, line.bits)
        if key in seen:
            faults.append(
                f"{place}:{line.number}: columns 'weight', 'activation', value {line.bits}: the "
                f"same operation at the same bit-widths as line {seen[key]}; keep one, or their "
                "median"
            )
        first = kinds.setdefault(line.row, line)
        if (first.bits is None) != (line.bits is None):
            faults.append(
                f"{place}:{line.number}: columns 'weight', 'activation', value {line.bits}: line "
                f"{first.number} prices the same operation with {first.bits}; give bit-widths in "
                "all lines of an operation, or in none"
            )
        seen.setdefault(key, line.number)


def _row(op: str, where: str, per: str, found: list[_Line]) -> dict[str, Any]:
    row: dict[str, Any] = {"op": op, "per": per}
    if where:
        row["where"] = where
    if found[0].bits is None:
        return row | dict(found[0].values)
    is_pair = bit_names([op])[0] == "lhs_bits"
    axes = PAIR_AXES if is_pair else WEIGHT_AXES
    grid = []
    for line in found:
        assert line.bits is not None
        weight, activation = line.bits
        pair = (activation, weight) if is_pair else line.bits
        grid.append({**dict(zip(axes, pair, strict=True)), **line.values})
    return {**row, "grid": grid}
