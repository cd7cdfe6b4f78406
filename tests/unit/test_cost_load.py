import json
import tomllib
from fractions import Fraction

import pytest

from cgmq_fx.cost.find import table_names
from cgmq_fx.cost.lines import json_lines, line_of, toml_lines
from cgmq_fx.cost.load import get_table, load_table
from cgmq_fx.cost.monotone import CostTableWarning
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import CostTableError
from cost_cases import conv, matmul

NPU = """\
schema = 1
name = "example-npu"
unit = "cycle"                       # BOP, byte, cycle, ms, uJ ...
source = "measured 2026-05 on rev B silicon, 3 runs, spread 4 %"
input_bits = 8
reference = { weight = 32, activation = 32 }
unpriced = "error"

[[row]]
op = ["conv1d", "conv2d", "linear"]
where = "groups == 1"
per = "mac"
cost = { formula = "weight_bits * activation_bits / 64" }

[[row]]
op = "conv2d"
where = "groups == in_channels"
per = "mac"
grid = [
  { weight = 8, activation = 8, cost = 1.0 },
  { weight = 4, activation = 8, cost = 0.62, error = 0.05, source = "datasheet p. 12" },
]

[[row]]
op = ["matmul", "attention"]
per = "mac"
cost = { formula = "lhs_bits * rhs_bits" }
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="npu.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_file


def as_json(**changes):
    return json.dumps({**content(), **changes}, indent=1)


def content():
    return tomllib.loads(NPU)


def test_toml(write):
    table = load_table(write(NPU))
    assert (table.name, table.unit, table.input_bits, table.unpriced) == (
        "example-npu",
        "cycle",
        8,
        "error",
    )
    assert table.cost(conv(macs=64), (4, 8)) == 32
    assert table.cost(conv(macs=100, groups=8), (4, 8)) == 62, "0.62 is read exactly"
    assert table.cost(conv(macs=100, groups=1, in_channels=1), (4, 8)) == 62, "conv2d alone wins"
    assert table.cost(matmul(macs=3), (4, 8)) == 96
    assert table.rows[1].grid.entries[0].error == Fraction(1, 20)
    assert str(table.rows[1]).startswith(f"{table.origin}:15 (op conv2d")


def test_json_means_the_same(write):
    assert load_table(write(as_json(), "npu.json")).digest == load_table(write(NPU)).digest


def test_mapping_means_the_same(write):
    assert load_table(content()).digest == load_table(write(NPU)).digest


def test_content_reads_back(write):
    table = load_table(write(NPU))
    assert load_table(table.to_json()).digest == table.digest
    third = {**content(), "row": [{"op": "linear", "per": "call", "cost": "1/3"}]}
    assert load_table(load_table(third).to_json()).rows[0].cost == Fraction(1, 3)


def test_table_and_name():
    table = load_table("bops")
    assert table is get_table("bops") is load_table(table)
    assert {"bops", "macs", "energy_45nm"} <= set(table_names())


FAULTY = (
    NPU.replace("input_bits", "inptu_bits")
    .replace('unit = "cycle"', 'unit = "cycl"')
    .replace('"linear"]', '"liner"]')
    .replace("groups == 1", "groups == 1 and")
    .replace("cost = 1.0", "cost = -1.0, foo = 3")
    .replace('["matmul", "attention"]', '"matmul"')
    .replace("lhs_bits *", "weight_bits *")
)
FAULTS = [
    ":5: inptu_bits = 8: unknown key (did you mean 'input_bits'?)",
    ":3: unit = 'cycl': unknown unit 'cycl' (did you mean 'cycle'",
    ":10: row 1, op 3 = 'liner': unknown operation class (did you mean 'linear'?)",
    ":11: row 1, where: column 16 of 'groups == 1 and': expected a number",
    ":21: row 2, grid 1, foo = 3: unknown key; keys here: weight, activation, cost, source, error",
    ":21: row 2, grid 1, cost = -1.0: must not be negative",
    ":28: row 3, cost, formula = 'weight_bits * rhs_bits': unknown variable 'weight_bits'",
]


def test_every_fault_with_its_line(write):
    path = write(FAULTY.replace("grid = [\n", "grid = [\n\n"))
    with pytest.raises(CostTableError, match="refused for 7 faults") as caught:
        load_table(path)
    for fault in FAULTS:
        assert f"{path}{fault}" in str(caught.value)


def test_json_faults_have_lines(write):
    path = write(as_json(unit="cycl"), "npu.json")
    with pytest.raises(CostTableError, match=rf"{path}:4: unit = 'cycl'"):
        load_table(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", r"not sound TOML: Invalid value \(at"),
        ("a = 1\na = 2\n", r"not sound TOML: Cannot overwrite a value \(at line 2"),
        ("", r"npu.toml: name: this key is missing"),
        ('name = "x"\nunit = "BOP"\n', r"npu.toml: row: this key is missing; add at least one"),
        ('name = "x"\nunit = "BOP"\nrow = []\n', r"npu.toml:3: row: has 0 items"),
        ('name = "x"\nunit = "BOP"\nrow = 3\n', r"npu.toml:3: row = 3: must be a list"),
        ('name = "x"\nunit = "BOP"\nrow = [3]\n', r"npu.toml:3: row 1 = 3: must be a table"),
        (NPU.replace("schema = 1", "schema = 2"), r"npu.toml:1: schema = 2: is a newer version"),
        (NPU.replace("cost = 1.0", "cost = nan"), r"npu.toml:20: row 2, grid 1, cost = NaN"),
        (NPU.replace("cost = 1.0", "cost = 1e999999"), r"npu.toml:20: .*must be a finite number"),
        (NPU.replace('per = "mac"\ngrid', "grid"), r"npu.toml:15: row 2, per: this key is missing"),
        (
            NPU + NPU[NPU.index('[[row]]\nop = ["matmul') :],
            r"npu.toml:28: row 4: has the same cond",
        ),
        (b"\xff\xfe", r"cannot be read: 'utf-8' codec"),
        ("a = " + "[" * 3000 + "]" * 3000, r"npu.toml is n"),
        ("a" + ".a" * 50 + " = 1", r"is nested 51 deep"),
        ("a = 1" + "0" * 5000, r"not sound TOML"),
    ],
)
def test_malformed_files(write, text, message):
    with pytest.raises(CostTableError, match=message):
        load_table(write(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"not sound JSON: .*line 1 column 2"),
        ('{"a": 1, "a": 2}', r"key 'a' stands twice"),
        ("[]", r"npu.json: the table = \[\]: must be a table"),
        ("[" * 10_000, r"not sound JSON"),
        ('{"name": NaN}', r"npu.json:1: name = NaN: must be a text"),
    ],
)
def test_malformed_json_files(write, text, message):
    with pytest.raises(CostTableError, match=message):
        load_table(write(text, "npu.json"))


def test_file_that_is_too_large(write):
    path = write(b"#" * (50 << 20))
    with pytest.raises(CostTableError, match="has 52,428,800 bytes; at most 262,144"):
        load_table(path)


def test_folder(tmp_path):
    with pytest.raises(CostTableError, match=f"{tmp_path} is a folder; give the path"):
        load_table(tmp_path)


def test_no_such_file(tmp_path):
    with pytest.raises(CostTableError, match=r"npu.toml cannot be read: .*No such file"):
        load_table(tmp_path / "npu.toml")


@pytest.mark.parametrize("read", [load_table, get_table])
def test_no_such_name(read):
    with pytest.raises(CostTableError, match=r"no cost table 'bobs' .did you mean 'bops'.*macs"):
        read("bobs")


@pytest.mark.parametrize("source", [3, None, ["bops"]])
def test_wrong_type(source):
    with pytest.raises(CostTableError, match=f"not a {type(source).__name__}"):
        load_table(source)


def test_null_byte_in_path():
    with pytest.raises(CostTableError, match=r"no cost table|cannot be read"):
        load_table("a\0b.toml")


FALLING = NPU.replace("cost = 0.62", "cost = 1.5")


def test_falling_cost_warns_or_is_refused(write):
    path = write(FALLING)
    with pytest.warns(
        CostTableWarning, match=r"npu.toml:15 .*weight 4, .* costs 1.5, but weight 8"
    ):
        table = load_table(path)
    for source in (path, table):
        with pytest.raises(CostTableError, match=r"strict=True: .*npu.toml:15"):
            load_table(source, strict=True)


def test_strict_table_stays(write):
    table = load_table(write(NPU), strict=True)
    assert isinstance(table, CostTable)
    assert load_table(table, strict=True) is table


def test_toml_lines_of_every_spelling():
    text = '''# a comment with [brackets] and "quotes
"a" = """
[not.a.header]
""" # after
b.c = [ 1.5, [2, 3],
  { d = 1,
    e = 'x' }, ]

[[r]]
k = 1
[r.sub]
m = 1979-05-27T07:32:00Z
[[r]]
k = 2
  [[r.g]]
  w = true
  [[r.g]]
  w = 1e3
[t."q"]
z = {}
'''
    lines = toml_lines(text)
    expected = {
        ("a",): 2,
        ("b", "c"): 5,
        ("b", "c", 0): 5,
        ("b", "c", 1, 1): 5,
        ("b", "c", 2): 6,
        ("b", "c", 2, "d"): 6,
        ("b", "c", 2, "e"): 7,
        ("r", 0): 9,
        ("r", 0, "k"): 10,
        ("r", 0, "sub", "m"): 12,
        ("r", 1): 13,
        ("r", 1, "k"): 14,
        ("r", 1, "g", 0, "w"): 16,
        ("r", 1, "g", 1): 17,
        ("r", 1, "g", 1, "w"): 18,
        ("t", "q", "z"): 20,
    }
    assert {path: lines.get(path) for path in expected} == expected
    assert line_of(lines, ("r", 1, "k", "deeper")) == 14
    assert line_of(lines, ("nowhere",)) is None


def test_json_lines():
    text = '{"a": [1,\n {"b": "x,]\\""}],\n "c":\n 3, "d": {}}'
    assert json_lines(text) == {
        ("a",): 1,
        ("a", 0): 1,
        ("a", 1): 2,
        ("a", 1, "b"): 2,
        ("c",): 3,
        ("d",): 4,
    }


ROW = '[[row]]\nop = "conv2d"\nper = "mac"\nwhere = "kernel_0 == {i}"\n'
MANY = [
    ('cost = {{ formula = "weight_bits * {i}" }}', 300, r":3: row: the formulas have 4,990 char"),
    ('cost = {i} # "', 2000, None),
    ("cost = 1", 2001, r":3: row: has 2001 items; it must have 1 to 2000"),
]


@pytest.mark.parametrize(("cost", "count", "message"), MANY)
def test_tables_that_would_take_long(write, cost, count, message):
    rows = "".join(f"{ROW}{cost}\n".format(i=i) for i in range(count))
    path = write('name = "x"\nunit = "BOP"\n' + rows)
    if message is None:
        assert len(load_table(path).rows) == count
        return
    with pytest.raises(CostTableError, match=message):
        load_table(path)


def test_conditions_that_would_take_long(write):
    rows = "".join(
        ROW.format(i=f"{i} and {'bias and ' * 60} bias") + "cost = 1\n" for i in range(99)
    )
    with pytest.raises(CostTableError, match=r":3: row: the conditions have 5\d,\d+ char.*fewer"):
        load_table(write('name = "x"\nunit = "BOP"\n' + rows))


def test_grids_that_would_take_long(write):
    pairs = [(i, 64 - i) for i in range(64)] + [(64, 64)]
    grid = [{"weight": w, "activation": a, "cost": 1} for w, a in pairs]
    rows = [
        {"op": "conv2d", "per": "mac", "where": f"kernel_0 == {i}", "grid": grid} for i in range(5)
    ]
    with pytest.raises(CostTableError, match=r"the grids span 20,800 pairs .* at most 20,000"):
        load_table({"name": "x", "unit": "BOP", "row": rows})


def test_values_that_cannot_be_shown(write):
    path = write('name = "x"\nunit = "BOP"\nrow = []\ninput_bits = 0x' + "f" * 9000)
    with pytest.raises(CostTableError, match=r":4: input_bits = .a int too large to show.: must"):
        load_table(path)
    with pytest.raises(CostTableError, match=r"npu.json:1: '.x1f' = 1: unknown key"):
        load_table(write('{"\\u001f": 1}', "npu.json"))
    with pytest.raises(CostTableError, match=r"npu.json:1: name = .*half of a surrogate pair"):
        load_table(write('{"name": "\\ud800"}', "npu.json"))
