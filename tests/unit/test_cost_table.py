import random
import warnings
from fractions import Fraction

import pytest

from cgmq_fx.cost.load import get_table
from cgmq_fx.cost.monotone import CostTableWarning
from cgmq_fx.cost.operation import OP_CLASSES, Operation
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import CostTableError
from cost_cases import conv, linear, matmul, plain

GRID = [
    {"weight": 8, "activation": 8, "cost": 1},
    {"weight": 4, "activation": 8, "cost": 0.62, "error": "5 %", "source": "datasheet p. 12"},
    {"weight": 8, "activation": 4, "cost": 0.7},
    {"weight": 2, "activation": 8, "cost": 0.5},
]


def table(*rows, **fields):
    return CostTable(**{"name": "t", "unit": "cycle", "rows": rows, **fields})


def row(op="conv2d", cost=1, **fields):
    return Row(**{"op": op, "per": "mac", "cost": cost, **fields})


def test_formula_row():
    priced = table(row(cost={"formula": "weight_bits * activation_bits / 64"}))
    assert priced.cost(conv(macs=1000), (4, 8)) == 500
    assert priced.reference_cost(conv(macs=1000)) == 16000
    assert priced.supported_bits(conv()) == (None, None)


@pytest.mark.parametrize(
    ("per", "work"),
    [("mac", 1000), ("output_element", 100), ("input_element", 200), ("weight", 50), ("call", 1)],
)
def test_per(per, work):
    assert table(row(cost=Fraction(1, 3), per=per)).cost(conv(), (8, 8)) == Fraction(work, 3)


def test_grid_row():
    priced = table(row(cost=None, grid=GRID))
    assert priced.cost(conv(macs=100), (4, 8)) == 62
    assert priced.cost(conv(macs=100), (3, 8)) == 62, "3 bits run in a 4-bit lane"
    assert priced.cost(conv(macs=100), (2, 2)) == 50, "(2, 8) and (8, 4) contain it; the cheaper"
    assert priced.cost(conv(macs=100), (8, 3)) == 70
    assert priced.supported_bits(conv()) == ({2, 4, 8}, {4, 8})
    assert priced.reference_cost(conv(macs=100)) == 100, "the widest that the hardware has"


def test_pair_outside_the_grid():
    with pytest.raises(
        CostTableError, match=r"'conv' .conv2d. at weight_bits = 16, activation_b.* ="
    ) as e:
        table(row(cost=None, grid=GRID)).cost(conv(), (16, 8))
    assert "(2, 8), (4, 8), (8, 4), (8, 8)" in str(e.value)


def test_operand_names_follow_the_operation():
    """A convolution whose weight is computed is a pair; the weight is its right-hand operand."""
    computed = Operation("c", "conv2d", "x.y", "pair", 1, 1, 1, attributes=conv().attributes)
    priced = table(row(cost={"formula": "weight_bits * 100 + activation_bits"}))
    assert priced.cost(conv(macs=1), (4, 8)) == 408
    assert priced.cost(computed, (8, 4)) == 408
    grid = [
        {"lhs": 8, "rhs": 4, "cost": 3},
        {"lhs": 8, "rhs": 8, "cost": 5},
    ]
    pairs = table(row(op="matmul", cost=None, grid=grid))
    assert pairs.cost(matmul(macs=1), (8, 4)) == 3
    parameter = Operation("m", "matmul", "x.y", "weight", 1, 1, 1, attributes=matmul().attributes)
    assert pairs.cost(parameter, (4, 8)) == 3
    assert pairs.supported_bits(parameter) == ({4, 8}, {8})


def test_more_conditions_beat_fewer():
    priced = table(
        row(cost=1),
        row(cost=2, where="groups == 1"),
        row(cost=3, where="groups == 1 and kernel_size == 9"),
    )
    assert priced.cost(conv(macs=1), (8, 8)) == 3
    assert priced.cost(conv(macs=1, kernel_size=1), (8, 8)) == 2
    assert priced.cost(conv(macs=1, groups=8), (8, 8)) == 1


def test_target_beats_class():
    priced = table(
        row(cost=1, where="groups == 1 and bias"), row(op="torch.nn.functional.conv2d", cost=2)
    )
    assert priced.cost(conv(macs=1), (8, 8)) == 2


def test_narrower_list_beats_wider():
    priced = table(row(op=["conv2d", "linear"], cost=1), row(cost=2))
    assert priced.cost(conv(macs=1), (8, 8)) == 2
    assert priced.cost(linear(macs=1), (8, 8)) == 1


def test_tie_names_both_rows():
    priced = table(row(where="groups == 1"), row(cost=2, where="kernel_size == 9"))
    with pytest.raises(CostTableError, match=r"'conv' .*'groups == 1'.* and .*'kernel_size == 9'"):
        priced.cost(conv(), (8, 8))
    assert priced.cost(conv(macs=1, groups=2), (8, 8)) == 2


def test_linear_has_one_group():
    assert table(row(op=["conv2d", "linear"], where="groups == 1")).row_for(linear()) is not None


def test_unpriced_lists_all_operations():
    priced = table(row())
    operations = [conv(), linear("fc1", 5), matmul("m", 7), plain("relu", "activation")]
    message = r"no row for 2 operations with 12 MACs: 'fc1' .linear.* 5 MACs.*'m' .matmul"
    with pytest.raises(CostTableError, match=message):
        priced.require_priced(operations)
    assert priced.cost(plain("relu", "activation")) == 0
    zero = table(row(), unpriced="zero")
    zero.require_priced(operations)
    assert zero.cost(linear("fc1", 5), (8, 8)) == 0


def test_operation_without_operands_runs_at_the_reference():
    priced = table(
        row(op="opaque", cost={"formula": "weight_bits + activation_bits"}),
        reference={"weight": 16, "activation": 8},
    )
    assert priced.cost(plain("f", "opaque", macs=10)) == 240


def test_wrong_number_of_widths():
    with pytest.raises(CostTableError, match="'conv' has 2 bit-widths, 1 were given"):
        table(row()).cost(conv(), (8,))


def test_missing_attribute_is_named():
    bare = Operation("c", "conv2d", "x.y", "weight", 1, 1, 1)
    with pytest.raises(CostTableError, match=r"'c' .* has no attribute 'groups'; it has input_ele"):
        table(row(where="groups == 1")).row_for(bare)


def test_formula_faults_at_pricing_name_row_operation_and_widths():
    priced = table(row(cost={"formula": "weight_bits / (groups - 1)"}))
    with pytest.raises(CostTableError, match=r"row .op conv2d.*'conv' at 4 and 8 bits: .*by zero"):
        priced.cost(conv(), (4, 8))
    negative = table(row(cost={"formula": "weight_bits - in_channels"}))
    with pytest.raises(CostTableError, match="gives -4; a cost is never negative"):
        negative.cost(conv(), (4, 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"op": "conv2"}, r"op = 'conv2': unknown operation class .did you mean 'conv2d'"),
        ({"op": ["conv2d", "conv2d"]}, r"op 2 = 'conv2d': given twice"),
        ({"op": []}, r"op: has 0 items"),
        ({"op": 3}, r"op = 3: must be a list"),
        ({"op": ["conv2d", 3]}, r"op 2 = 3: must be a text"),
        ({"per": "macs"}, r"per = 'macs': must be one of mac, .*did you mean 'mac'"),
        ({"cost": -1}, r"cost = -1: must not be negative"),
        ({"cost": float("nan")}, r"cost = nan: must be a finite number"),
        ({"cost": True}, r"cost = true: must be a number"),
        ({"cost": "weight_bits"}, r"must be a number, or . formula ="),
        ({"cost": {"formla": "1"}}, r"cost, formla = '?1'?: unknown key .did you mean 'formula'"),
        (
            {"cost": {"formula": "wieght_bits"}},
            r"variable 'wieght_bits' .did you mean 'weight_bits'",
        ),
        ({"cost": {"formula": "lhs_bits"}}, r"unknown variable 'lhs_bits'"),
        ({"cost": {"formula": "weight_bits - 3"}}, r"at weight_bits = 1: .* gives -2"),
        (
            {"cost": {"formula": "1 / (weight_bits - activation_bits)"}},
            r"activation_bits = 1, .*zero",
        ),
        ({"cost": {"formula": "1 +"}}, r"column 4"),
        ({"cost": {"formula": ""}}, r"formula = '': must not be empty"),
        ({"cost": None}, r"has neither 'cost' nor 'grid'"),
        ({"grid": GRID}, r"has both 'cost' and 'grid'"),
        ({"where": "kernel_2 == 1"}, r"where = .*unknown variable 'kernel_2' .did you mean"),
        ({"where": "weight_bits == 8"}, r"unknown variable 'weight_bits'"),
        ({"where": "groups"}, r"must be a condition, it is a number"),
        ({"where": 3}, r"where = 3: must be a text"),
        ({"error": "5"}, r"error = '5': must be a share"),
        ({"error": "x %"}, r"error = 'x %': must be a share"),
        ({"error": -1}, r"error = -1: must not be negative"),
        ({"source": 3}, r"source = 3: must be a text"),
        ({"source": "x" * 3000}, r"is 3000 characters long"),
    ],
)
def test_malformed_row(fields, message):
    with pytest.raises(CostTableError, match=message):
        row(**fields)


@pytest.mark.parametrize(
    ("op", "grid", "message"),
    [
        ("conv2d", [{"lhs": 8, "rhs": 8, "cost": 1}], r"a grid lists 'weight' and 'activation'"),
        ("matmul", [{"weight": 8, "activation": 8, "cost": 1}], r"a grid lists 'lhs' and 'rhs'"),
        (["matmul", "conv2d"], [{"lhs": 8, "rhs": 8, "cost": 1}], r"price the classes apart"),
        ("conv2d", [{"weight": 8, "cost": 1}], r"grid 1, activation: this key is missing"),
        (
            "conv2d",
            [{"weight": 8, "activation": 65, "cost": 1}],
            r"activation = 65: must be a whole",
        ),
        ("conv2d", [*GRID, GRID[0]], r"grid 5: the pair weight = 8, activation = 8 stands twice"),
        ("conv2d", GRID[1:3], r"the widest pair weight = 8, activation = 8 must have a cost"),
        ("conv2d", [3], r"grid 1 = 3: must be a table"),
        ("conv2d", {}, r"grid = .*must be a list"),
        ("conv2d", [{**GRID[0], "cots": 1}], r"grid 1, cots = 1: unknown key .did you mean 'cost'"),
    ],
)
def test_malformed_grid(op, grid, message):
    with pytest.raises(CostTableError, match=message):
        Row(op=op, per="mac", grid=grid)


def test_row_lists_all_faults():
    with pytest.raises(CostTableError, match="3 faults") as caught:
        row(op="conv2", per="x", error=-1)
    assert str(caught.value).count("\n") == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "my table"}, r"name = 'my table': must be 1 to 80 letters"),
        ({"unit": "parsec"}, r"unit = 'parsec': unknown unit"),
        ({"input_bits": 8.0}, r"input_bits = 8.0: must be a whole number of bits"),
        (
            {"reference": {"wieght": 8}},
            r"reference, wieght = 8: unknown key .did you mean 'weight'",
        ),
        ({"reference": 32}, r"reference = 32: must be a table"),
        ({"unpriced": "free"}, r"unpriced = 'free': must be one of error, zero"),
        ({"schema": 2}, r"schema = 2: is a newer version .* reads \(1\)"),
        ({"schema": "1"}, r"schema = '1': must be the version"),
        ({"rows": ()}, r"row: there are 0 rows"),
        ({"rows": [3]}, r"row 1 = 3: must be a Row, is a int"),
        ({"rows": [row(), row(cost=2)]}, r"row 2: has the same condition as row 1 .* 'conv2d'"),
        (
            {"rows": [row(where="bias and groups==1"), row(where="groups == 1 and bias")]},
            r"row 2: has the same condition as row 1",
        ),
        (
            {"rows": [row(op=["conv2d", "linear"]), row(op=["conv2d", "conv1d"])]},
            r"also prices 'conv2d'",
        ),
    ],
)
def test_malformed_table(fields, message):
    with pytest.raises(CostTableError, match=message):
        table(*fields.pop("rows", [row()]), **fields)


def test_falling_grid_warns_and_names_the_pair():
    grid = [
        {"weight": 4, "activation": 8, "cost": 0.7},
        {"weight": 8, "activation": 8, "cost": 0.5},
    ]
    message = "weight 4, activation 8 costs 0.7, but weight 8, activation 8 costs 0.5"
    with pytest.warns(CostTableWarning, match=message):
        table(row(cost=None, grid=grid))
    with pytest.raises(CostTableError, match=f"{message}; correct the costs"):
        table(row(cost=None, grid=grid), strict=True)


def test_falling_formula_warns():
    with pytest.warns(CostTableWarning, match="lhs 1 costs 1, but rhs 1, lhs 2 costs 0.5"):
        table(row(op="matmul", cost={"formula": "rhs_bits / lhs_bits"}))


def test_rows_are_values():
    first = row(where="groups==1", cost={"formula": "weight_bits*2"})
    assert first == row(where="(groups == 1)", cost={"formula": "weight_bits * 2"})
    assert hash(first) == hash(first)
    assert row(cost=0.1).cost == Fraction(1, 10)


def test_digest_knows_content_not_order():
    rows = [row(cost=None, grid=GRID), row(op="linear", cost=0.1), row(op="matmul", where="k == 1")]
    digests = set()
    for _ in range(5):
        random.Random(0).shuffle(rows)
        digests.add(table(*rows).digest)
    assert len(digests) == 1
    assert table(*rows[:2]).digest not in digests
    assert table(*rows, input_bits=4).digest not in digests


def test_bops_by_hand():
    """LeNet-5's second layer, 3,276,800 MACs, 4-bit weights, 8-bit input: x 32 bit operations."""
    bops = get_table("bops")
    assert bops.unit == "BOP"
    assert bops.cost(conv(macs=3_276_800), (4, 8)) == 104_857_600
    assert bops.cost(matmul(macs=10), (4, 2)) == 80
    assert bops.cost(plain("f", "opaque", macs=10)) == 10_240
    assert bops.reference_cost(linear(macs=10)) == 10_240


@pytest.mark.parametrize("name", ["bops", "macs"])
def test_built_in_tables_price_every_class_with_macs(name):
    built_in = get_table(name)
    priced = {op for one in built_in.rows for op in one.op}
    assert priced == {
        op
        for op in OP_CLASSES
        if op.startswith("conv")
        or op in ("linear", "bilinear", "rnn", "matmul", "attention", "opaque")
    }
    assert built_in.source


def test_strict_says_nothing_about_a_sound_table():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table(row(cost={"formula": "ceil(weight_bits / 8)"}), strict=True)
