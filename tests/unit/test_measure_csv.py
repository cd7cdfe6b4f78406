"""CSV files of measurements: what they become, and every way to be refused."""

from fractions import Fraction

import pytest

from cgmq_fx.cost.load import load_table
from cgmq_fx.cost.operation import Operation
from cgmq_fx.errors import CostTableError
from cgmq_fx.measure.import_csv import import_csv

HEAD = "op,per,in_features,weight,activation,cost,error,source\n"


@pytest.fixture
def read(tmp_path):
    def read(text, **options):
        (tmp_path / "board.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return import_csv(tmp_path / "board.csv", **{"unit": "ms", **options})

    return read


def linear(inside):
    attributes = {"in_features": inside, "out_features": 8, "bias": True}
    return Operation("fc", "linear", "f", "weight", inside * 8, 8, inside, inside * 8, attributes)


def test_lines_become_rows_with_grids(read):
    table = read(
        HEAD + 'linear,,64,8,8,0.25,5 %,"run 1, idle"\nlinear,call,64,4,8,0.1,0.02,\n\n'
        "linear,mac,,8,8,1e-5,,\n"
    )
    assert (table.name, table.unit, table.source) == ("board", "ms", "imported from board.csv")
    assert table.cost(linear(64), (8, 8)) == Fraction("0.25")
    assert table.cost(linear(64), (3, 8)) == Fraction("0.1")
    assert table.cost(linear(32), (8, 8)) == 256 * Fraction("1e-5")
    entries = {entry.first: entry for entry in table.row_for(linear(64)).grid.entries}
    assert entries[8].error == Fraction("0.05")
    assert entries[8].source == "run 1, idle"
    assert entries[4].error == Fraction("0.02")
    assert load_table(table.to_json()).digest == table.digest


def test_of_two_activations_the_weight_is_the_right_hand_one(read):
    table = read("op,weight,activation,cost\nadd,4,8,2\nadd,8,8,3\n")
    found = {(entry.first, entry.second): entry.cost for entry in table.rows[0].grid.entries}
    assert table.rows[0].grid.axes == ("lhs", "rhs")
    assert found == {(8, 4): 2, (8, 8): 3}


def test_an_operation_without_bit_widths_has_one_cost(read):
    table = read("op,output_elements,weight,activation,cost,error\nmax_pool,100,,,0.5,10%\n")
    row = table.rows[0]
    assert (row.cost, row.error, row.grid) == (Fraction("0.5"), Fraction("0.1"), None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"board.csv:1: no measurements; write a line of column names \(op, per"),
        ("op,cost\n", r"board.csv:1: no measurements"),
        ("op\nlinear\n", r"board.csv:1: column 'cost' is missing; add it"),
        ("op,cost,cost\n", r"board.csv:1: column 3, 'cost': given twice; keep one"),
        ("op,cost,in_feature\n", r"column 3, 'in_feature': no such column \(did you mean 'in_fe"),
        ("op,cost\nlinear\n", r"board.csv:2: 1 cells, 2 columns; give one cell for each"),
        ("op,cost\nlinea,1\n", r"board.csv:2: column 'op', value 'linea': not known \(did you me"),
        ("op,cost\nlinear,-1\n", r"board.csv:2: column 'cost', value '-1': must be a number of"),
        ("op,cost\nlinear,nan\n", r"column 'cost', value 'nan': must be a number of at least 0"),
        ("op,cost\nlinear,1e999999\n", r"column 'cost', value '1e999999': must be a number"),
        ("op,cost,error\nlinear,1,x\n", r"column 'error', value 'x': must be a number"),
        ("op,cost,per\nlinear,1,macs\n", r"column 'per', value 'macs': not known \(did you mean"),
        ("op,cost,weight\nlinear,1,8\n", r"column 'activation', value '': must be a number of bit"),
        (
            "op,cost,weight,activation\nlinear,1,65,8\n",
            r"column 'weight', value '65': must be a number of bits from 0 to 64; or leave both",
        ),
        ("op,cost,groups\nconv2d,1,one\n", r"column 'groups', value 'one': must be a whole number"),
        ("op,cost,bias\nlinear,1,yes\n", r"column 'bias', value 'yes': must be true or false"),
        ("op,cost,name\nlinear,1,a'b\n", r"column 'name', value \"a'b\": must be a text without"),
        ("op,cost,groups\nadd,1,1\n", r"column 'groups', value '1': add has no such attribute"),
        ('op,cost\n"linear,1\n', r"board.csv:2: not CSV: unexpected end of data; correct the quot"),
        (
            "op,cost\nlinear,1\nlinear,2\n",
            r"board.csv:3: columns 'weight', 'activation', value None: the same operation at the "
            r"same bit-widths as line 2; keep one",
        ),
        (
            "op,cost,weight,activation\nlinear,1,8,8\nlinear,2,,\n",
            r"board.csv:3: columns .* value None: line 2 prices the same operation with \(8, 8\)",
        ),
        (b"op,cost\nlin\xffear,1\n", r"board.csv is not UTF-8 at byte 11; save it as UTF-8"),
    ],
)
def test_a_malformed_file_is_refused(read, text, said):
    with pytest.raises(CostTableError, match=said):
        read(text)


def test_every_fault_is_told_and_many_are_counted(read):
    with pytest.raises(CostTableError, match=r"(?s)refused for 30 faults.*:21: .*and 10 more"):
        read("op,cost\n" + "linear,x\n" * 30)


def test_a_file_that_is_not_there_or_too_large_is_refused(read, tmp_path):
    with pytest.raises(CostTableError, match=r"none.csv cannot be read: .*No such file"):
        import_csv(tmp_path / "none.csv", unit="ms")
    with pytest.raises(CostTableError, match=r"has 1048594 bytes; at most 1048576 are read"):
        read("op,cost\nlinear,1\n" + "\n" * (1 << 20) + "\n")


def test_an_unknown_unit_is_refused(read):
    with pytest.raises(CostTableError, match="unknown unit 'msec'"):
        read("op,cost\nlinear,1\n", unit="msec")
