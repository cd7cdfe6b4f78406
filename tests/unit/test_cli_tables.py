"""``cgmq-fx tables ...``: what it prints, its exit codes, and errors without a traceback."""

import json
import sys

import pytest

from cgmq_fx.cli import main
from cgmq_fx.cost.load import load_table
from cgmq_fx.table_diff import difference

HEAD = 'schema = 1\nname = "{name}"\nunit = "cycle"\ninput_bits = {bits}\n'
GRID = """
[[row]]
op = "linear"
per = "mac"
source = "p. 3"
grid = [
    {{ weight = 4, activation = 8, cost = {low}, error = 0.05, source = "p. 4" }},
    {{ weight = 8, activation = 8, cost = 2 }},
]
"""
ADD = '\n[[row]]\nop = "add"\nper = "output_element"\ncost = 1\n'
MODULE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

ready = Net()
number = 3

def needs(argument):
    return Net()

def fails():
    raise RuntimeError("boom")
"""


def text(name="npu", bits=8, low=1, add=""):
    return HEAD.format(name=name, bits=bits) + GRID.format(low=low) + add


@pytest.fixture
def table(tmp_path):
    def write(content, name="table.toml"):
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    return write


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_model"
    sys.modules.pop("own_model", None)


def run(capsys, *arguments):
    code = main(["tables", *arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


# -- show, check, schema ---------------------------------------------------------------------------


def test_show_prints_rows_with_source_error_and_grid(capsys, table):
    code, out, _ = run(capsys, "show", table(text(add=ADD)))
    assert code == 0
    words = " ".join(out.split())
    assert "weight \\ activation 8 4 1 (5 %) 8 2" in words
    assert "4 x 8: p. 4" in out
    assert "source p. 3" in words
    assert "1 cycle per output element" in out


def test_check_is_strict_on_request(capsys, table):
    falling = table(text(low=3))
    code, out, err = run(capsys, "check", falling)
    assert (code, err.startswith("warning: ")) == (0, True)
    code, out, err = run(capsys, "check", falling, "--strict")
    assert (code, out) == (1, "")
    assert "strict" in err


def test_check_of_a_folder(capsys, tmp_path):
    code, out, err = run(capsys, "check", str(tmp_path))
    assert (code, out) == (1, "")
    assert "folder" in err


def test_schema_is_json(capsys):
    code, out, _ = run(capsys, "schema")
    assert code == 0
    assert json.loads(out)["properties"]["schema"]["const"] == 1


# -- diff ------------------------------------------------------------------------------------------


def test_diff_of_equal_tables_ignores_the_order_of_rows(capsys, table):
    head = HEAD.format(name="npu", bits=8)
    first = table(head + GRID.format(low=1) + ADD, "a.toml")
    second = table(head + ADD + GRID.format(low=1), "b.toml")
    code, out, _ = run(capsys, "diff", first, second)
    assert code == 0
    assert "say the same" in out


def test_diff_names_fields_rows_and_prices(capsys, table):
    first, second = table(text(), "a.toml"), table(text(bits=4, low=1.5, add=ADD), "b.toml")
    code, out, _ = run(capsys, "diff", first, second)
    assert code == 1
    assert out.splitlines() == [
        "input_bits: 8 -> 4",
        "+ add, per output element: 1",
        "~ linear, per mac",
        "    weight 4 x activation 8: 1 -> 1.5 cycle (+50 %)",
    ]
    code, out, _ = run(capsys, "diff", second, first)
    assert "- add, per output element: 1" in out


@pytest.mark.parametrize("missing", [0, 1])
def test_diff_of_a_table_that_cannot_be_read_ends_with_two(capsys, table, missing):
    names = [table(text()), table(text())]
    names[missing] = "no_such_table"
    code, out, err = run(capsys, "diff", *names)
    assert (code, out) == (2, "")
    assert err.startswith("cgmq-fx: ")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ({"cost": 1}, {"cost": 2}, "weight 2 x activation 2: 1 -> 2 cycle (+100 %)"),
        (
            {"cost": {"formula": "weight_bits"}},
            {"cost": {"formula": "weight_bits + 1"}},
            "weight 4 x activation 2: 4 -> 5 cycle (+25 %)",
        ),
        (
            {"grid": [{"weight": 8, "activation": 8, "cost": 1}]},
            {
                "grid": [
                    {"weight": 4, "activation": 8, "cost": 1},
                    {"weight": 8, "activation": 8, "cost": 1},
                ]
            },
            "weight 4 x activation 8: newly listed",
        ),
        ({"cost": 1, "error": 0.1}, {"cost": 1}, "error: 10 % -> not stated"),
        ({"cost": 1, "source": "a"}, {"cost": 1, "source": "b"}, "source: 'a' -> 'b'"),
    ],
    ids=["constant", "formula", "pair", "error", "source"],
)
def test_every_difference_of_content_is_named(old, new, line):
    def table(row):
        row = {"op": "linear", "per": "mac", **row}
        return load_table({"name": "t", "unit": "cycle", "row": [row]})

    assert f"    {line}" in difference(table(old), table(new))
    assert difference(table(old), table(old)) == []


# -- price -----------------------------------------------------------------------------------------


def test_price_by_hand(capsys, module):
    """12 MACs of 4 x 8 bits and 6 MACs of 2 x 8 bits."""
    arguments = ("price", f"{module}:Net", "--table", "bops", "--input-shape", "1,4")
    code, out, err = run(capsys, *arguments, "--weights", "4", "--bits", "2_weight_=2")
    assert (code, err) == (0, "")
    assert "480 BOP, no budget" in out
    code, out, _ = run(capsys, *arguments, "--weights", "4", "--bits", "2_weight_=2", "--json")
    resources = json.loads(out)["resources"]
    assert resources["bops"]["total"] == 12 * 4 * 8 + 6 * 2 * 8


def test_price_of_a_model_that_is_there_with_its_ledger(capsys, module, table):
    arguments = ("--table", table(text()), "--input-shape", "1,4", "--ledger")
    code, out, err = run(capsys, "price", f"{module}:ready", *arguments, "--weights", "3")
    assert code == 0
    assert "18 cycle, no budget" in out  # 18 MACs at one cycle: 3 bits run in 4-bit lanes
    assert "what is priced" in out
    assert "0_weight_ has 4 bits, not 3: it may have 4, 8" in err


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("own_model", "is not module:callable"),
        ("own_model:needs", "missing 1 required positional argument"),
        ("own_model:fails", "RuntimeError: boom"),
        ("own_model:number", "is int, not an nn.Module"),
        ("own_model:Nothing", "has no attribute 'Nothing'"),
        ("no_such_module:Net", "No module named 'no_such_module'"),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_model_that_cannot_be_had(capsys, model, complaint):
    code, out, err = run(capsys, "price", model, "--table", "bops", "--input-shape", "1,4")
    assert (code, out) == (1, "")
    assert complaint in err


def test_a_site_that_there_is_not(capsys, module):
    arguments = ("--table", "bops", "--input-shape", "1,4", "--bits", "fc=4")
    code, _, err = run(capsys, "price", f"{module}:Net", *arguments)
    assert code == 1
    assert "no quantizer named ['fc']; there are: 0_weight_" in err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--weights", "1"),
        ("--activations", "x"),
        ("--bits", "4"),
        ("--bits", "a=64"),
        ("--input-shape", "1,x"),
        ("--input-shape", "int8:1,2"),
    ],
)
def test_malformed_arguments_end_with_two(capsys, option, value):
    arguments = ["tables", "price", "a:b", "--table", "bops", "--input-shape", "1,4"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, option, value])
    assert stop.value.code == 2
    assert repr(value.rpartition("=")[2]) in capsys.readouterr().err
