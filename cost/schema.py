"""A JSON Schema of the table format, for editors: made of the constants that tables are checked by.

It says what a schema can say. That variables exist, formulas can be computed, rows do not tie and
grids have their widest pair is checked by `cgmq_fx.cost.load.load_table` alone.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from cgmq_fx.cost.fields import FRACTION_PATTERN, MAX_BIT_WIDTH, MAX_TEXT
from cgmq_fx.cost.grid import PAIR_AXES, WEIGHT_AXES, Axes
from cgmq_fx.cost.include import MAX_INCLUDES
from cgmq_fx.cost.operation import OP_CLASSES
from cgmq_fx.cost.row_fields import MAX_ENTRIES, MAX_LAYER, MAX_OPS, PER, ROW_KEYS
from cgmq_fx.cost.syntax import MAX_LENGTH
from cgmq_fx.cost.table_fields import (
    FILE_KEYS,
    MAX_ROWS,
    NAME_PATTERN,
    SCHEMA,
    SHAREABLE,
    TABLE_KEYS,
    UNPRICED,
)
from cgmq_fx.units import UNITS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TEXT = {"type": "string", "maxLength": MAX_TEXT}
_PLURALS = ("BOP", "MAC", "cycle", "byte", "bit")


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a table file.

    >>> json_schema()["properties"]["schema"]["const"]
    1
    """
    properties = {**_table_properties(), **_file_properties()}
    assert properties.keys() == {*TABLE_KEYS, *FILE_KEYS}
    return {
        "$schema": DIALECT,
        "title": "cost table of cgmq_fx",
        "description": "What each operation costs at each pair of bit-widths, in one unit.",
        **_closed(properties, ("name",)),
        "anyOf": [{"required": ["unit", "row"]}, {"required": ["include"]}],
        "$defs": {
            "bits": {"type": "integer", "minimum": 0, "maximum": MAX_BIT_WIDTH},
            "amount": {
                "anyOf": [
                    {"type": "number", "minimum": 0},
                    {"type": "string", "pattern": f"^{FRACTION_PATTERN}$"},
                ]
            },
            "error": {
                "description": "relative error: 0.05 or '5 %'",
                "anyOf": [
                    {"$ref": "#/$defs/amount"},
                    {"type": "string", "pattern": r"^\s*\+?[0-9._eE+-]+\s*%\s*$"},
                ],
            },
            "op": {
                "anyOf": [
                    {"enum": list(OP_CLASSES)},
                    {"type": "string", "pattern": r"\.", "maxLength": MAX_TEXT},
                ]
            },
            "row": _row(),
        },
    }


def _closed(properties: Mapping[str, Any], needed: Iterable[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(needed),
        "additionalProperties": False,
    }


def _described(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": text, **schema}


def _table_properties() -> dict[str, Any]:
    bits = {"$ref": "#/$defs/bits"}
    return {
        "schema": _described("version of the format", {"const": SCHEMA}),
        "name": _described(
            "what budgets call the table", {"type": "string", "pattern": f"^{NAME_PATTERN}$"}
        ),
        "unit": _described("of every cost in the table", {"enum": _units()}),
        "source": _described("where the numbers come from", _TEXT),
        "input_bits": _described("bit-width of what arrives from outside", bits),
        "reference": _described(
            "the bit-widths that 100 % means", _closed({"weight": bits, "activation": bits}, ())
        ),
        "unpriced": _described(
            "what becomes of an operation that has MACs and no row", {"enum": list(UNPRICED)}
        ),
        "share": _described(
            "operation classes whose operands have one quantizer",
            {"type": "array", "items": {"enum": list(SHAREABLE)}, "maxItems": len(SHAREABLE)},
        ),
    }


def _file_properties() -> dict[str, Any]:
    path = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT}
    return {
        "$schema": _described("address of this schema, for editors", {"type": "string"}),
        "include": _described(
            "names or paths of the tables that this one builds on",
            {"anyOf": [path, _list(path, MAX_INCLUDES)]},
        ),
        "row": _described("the prices", _list({"$ref": "#/$defs/row"}, MAX_ROWS)),
    }


def _list(items: Mapping[str, Any], most: int) -> dict[str, Any]:
    return {"type": "array", "items": dict(items), "minItems": 1, "maxItems": most}


def _units() -> list[str]:
    symbols = list(UNITS)
    symbols += [f"{symbol}s" for symbol in UNITS if symbol.endswith(_PLURALS)]
    micro = [symbol for symbol in UNITS if symbol.startswith("u")]
    return symbols + [f"{sign}{symbol[1:]}" for sign in "\u00b5\u03bc" for symbol in micro]


def _row() -> dict[str, Any]:
    op = {"$ref": "#/$defs/op"}
    formula = {"type": "string", "minLength": 1, "maxLength": MAX_LENGTH}
    properties = {
        "op": _described(
            "operation classes or FX targets",
            {"anyOf": [op, {**_list(op, MAX_OPS), "uniqueItems": True}]},
        ),
        "where": _described(
            "condition on the operation's attributes", {"type": "string", "maxLength": MAX_LENGTH}
        ),
        "per": _described("what one piece of work is", {"enum": list(PER)}),
        "cost": _described(
            "of one piece of work",
            {"anyOf": [{"$ref": "#/$defs/amount"}, _closed({"formula": formula}, ("formula",))]},
        ),
        "grid": _described(
            "costs by pairs of bit-widths", {"anyOf": [_grid(WEIGHT_AXES), _grid(PAIR_AXES)]}
        ),
        "source": _described("where this row's numbers come from", _TEXT),
        "error": {"$ref": "#/$defs/error"},
        "layer": _described(
            "how many includes deep the row stood; of two equally specific rows the lower wins",
            {"type": "integer", "minimum": 0, "maximum": MAX_LAYER},
        ),
    }
    assert properties.keys() == set(ROW_KEYS)
    return {
        "description": "one price",
        **_closed(properties, ("op", "per")),
        "oneOf": [{"required": ["cost"]}, {"required": ["grid"]}],
    }


def _grid(axes: Axes) -> dict[str, Any]:
    entry = {
        **{axis: {"$ref": "#/$defs/bits"} for axis in axes},
        "cost": {"$ref": "#/$defs/amount"},
        "source": _TEXT,
        "error": {"$ref": "#/$defs/error"},
    }
    return _list(_closed(entry, (*axes, "cost")), MAX_ENTRIES)
