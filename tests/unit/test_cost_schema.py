import copy
import json
import tomllib

import jsonschema
import pytest

from cgmq_fx.cost.find import builtin_names, builtin_text
from cgmq_fx.cost.load import get_table, load_table
from cgmq_fx.cost.operation import OP_CLASSES
from cgmq_fx.cost.row_fields import PER
from cgmq_fx.cost.schema import DIALECT, json_schema
from cgmq_fx.errors import CostTableError
from cgmq_fx.units import UNITS

VALIDATOR = jsonschema.Draft202012Validator(json_schema())
GRID = [
    {"weight": 8, "activation": 8, "cost": 1},
    {"weight": 4, "activation": 8, "cost": 0.62, "error": "5 %", "source": "page 12"},
]
GOOD = {
    "schema": 1,
    "name": "t",
    "unit": "cycle",
    "source": "s",
    "input_bits": 8,
    "reference": {"weight": 32},
    "unpriced": "zero",
    "row": [
        {"op": "conv2d", "per": "mac", "cost": {"formula": "weight_bits"}, "where": "groups == 1"},
        {"op": ["linear", "conv1d"], "per": "weight", "grid": GRID, "error": 0.05},
        {"op": "torch.ops.aten.bmm.default", "per": "call", "cost": "1/3"},
    ],
}


def changed(*path, value):
    table = copy.deepcopy(GOOD)
    here = table
    for key in path[:-1]:
        here = here[key]
    if value is ...:
        del here[path[-1]]
    else:
        here[path[-1]] = value
    return table


def test_the_schema_is_sound_and_plain_json():
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert json.loads(json.dumps(json_schema())) == json_schema()
    assert json_schema()["$schema"] == DIALECT
    assert json_schema()["$defs"]["op"]["anyOf"][0]["enum"] == list(OP_CLASSES)
    assert json_schema()["$defs"]["row"]["properties"]["per"]["enum"] == list(PER)
    assert set(UNITS) <= set(json_schema()["properties"]["unit"]["enum"])


@pytest.mark.parametrize("name", builtin_names())
def test_built_in_tables_fit(name):
    VALIDATOR.validate(tomllib.loads(builtin_text(name).content.decode()))
    VALIDATOR.validate(get_table(name).to_json())


@pytest.mark.parametrize(
    "table",
    [
        GOOD,
        {"name": "t", "include": "bops"},
        {"name": "t", "include": ["bops"], "$schema": "x.json"},
        changed("unit", value="cycles"),
        changed("unit", value="\N{MICRO SIGN}J"),
        changed("row", 0, "error", value="5%"),
        changed("row", 0, "error", value="1/20"),
        changed("row", 0, "layer", value=1),
    ],
)
def test_what_loads_fits(table):
    load_table(table)
    VALIDATOR.validate(table)


@pytest.mark.parametrize(
    "table",
    [
        changed("schema", value=2),
        changed("name", value=...),
        changed("name", value="a b"),
        changed("unit", value=...),
        changed("unit", value="parsec"),
        changed("row", value=...),
        changed("row", value=[]),
        changed("row", value={}),
        changed("extra", value=1),
        changed("input_bits", value=65),
        changed("input_bits", value="8"),
        changed("reference", "wieght", value=8),
        changed("unpriced", value="free"),
        changed("include", value=[]),
        changed("row", 0, "op", value="conv2"),
        changed("row", 0, "op", value=["conv2d", "conv2d"]),
        changed("row", 0, "op", value=...),
        changed("row", 0, "per", value="macs"),
        changed("row", 0, "cost", value=-1),
        changed("row", 0, "cost", value="1"),
        changed("row", 0, "cost", value="1/0"),
        changed("row", 0, "cost", value=...),
        changed("row", 0, "cost", value={"formula": 3}),
        changed("row", 0, "cost", value={"code": "1"}),
        changed("row", 0, "grid", value=GRID),
        changed("row", 0, "where", value=3),
        changed("row", 0, "costs", value=3),
        changed("row", 1, "grid", 0, "weight", value=...),
        changed("row", 1, "grid", 0, "lhs", value=8),
        changed("row", 1, "grid", 1, "cost", value=-0.5),
        changed("row", 1, "error", value="five"),
        changed("row", 1, "error", value=-1),
        changed("row", 1, "layer", value=65),
    ],
)
def test_what_does_not_fit_does_not_load(table):
    assert not VALIDATOR.is_valid(table)
    with pytest.raises(CostTableError):
        load_table(table)
