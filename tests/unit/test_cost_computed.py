import warnings
from decimal import Decimal
from fractions import Fraction

import pytest

from cgmq_fx.cost.computed import computed_cost
from cgmq_fx.cost.load import load_table
from cgmq_fx.cost.monotone import CostTableWarning
from cgmq_fx.cost.table import CostTable
from cgmq_fx.cost.totals import price
from cgmq_fx.errors import CostTableError
from cost_cases import bind, conv, matmul

WIDTHS = (2, 4, 8)


def table(*rows, **fields):
    return CostTable(**{"name": "t", "unit": "cycle", "rows": rows, **fields})


def returning(value, **fields):
    arguments = {"op": "conv2d", "per": "mac", **fields}
    return computed_cost(**arguments)(lambda operation, weight_bits, activation_bits: value)


def test_a_row_like_any_other():
    @computed_cost(op=("conv2d",), per="mac", where="groups == 1", source="lanes", error="5 %")
    def lanes(operation, weight_bits, activation_bits):
        return Fraction(weight_bits * activation_bits, operation.attributes["in_channels"])

    priced = table(lanes, returning(7))
    assert priced.cost(conv(macs=64), (4, 8)) == 256, "4 * 8 / 8 channels"
    assert priced.cost(conv(macs=64, groups=2), (4, 8)) == 448
    assert priced.reference_cost(conv(macs=1)) == 128
    assert (lanes.source, lanes.error) == ("lanes", Fraction(1, 20))
    assert "lanes" in lanes.cost.text
    resource = price([bind(conv(macs=10), "s0", "s1")], priced, 2, WIDTHS)
    assert resource.total([0, 2]) == 20
    assert resource.total([2, 2]) == 80


def test_the_right_operand_is_the_weight():
    seen = []

    @computed_cost(op="matmul", per="mac")
    def note(operation, weight_bits, activation_bits):
        seen.append((weight_bits, activation_bits))
        return 1

    table(note).cost(matmul(), (2, 4))
    assert seen == [(4, 2)], "lhs has 2 bits, rhs 4"


def test_equal_questions_are_asked_once():
    seen = []

    @computed_cost(op="conv2d", per="mac")
    def note(operation, weight_bits, activation_bits):
        seen.append((operation.macs, weight_bits, activation_bits))
        return weight_bits

    priced = table(note)
    for _ in range(3):
        priced.cost(conv(macs=5), (2, 4))
    priced.cost(conv(macs=6), (2, 4))
    assert seen == [(5, 2, 4), (6, 2, 4)]


@pytest.mark.parametrize("value", [3, Fraction(1, 3), Decimal("0.3"), 0])
def test_exact_results(value):
    assert table(returning(value)).cost(conv(macs=1), (8, 8)) == Fraction(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.1, r"gives the float 0.1, .*return an int, a Fraction or a Decimal"),
        (True, r"gives True of type bool"),
        ("3", r"gives '3' of type str"),
        (None, r"gives None of type NoneType"),
        (-1, r"gives -1; a cost is never negative"),
        (Decimal("NaN"), r"gives no cost: NaN is not a finite number"),
        (Decimal("Infinity"), r"gives no cost: Infinity is not"),
        (10**70, r"gives no cost: the number is beyond 1e60"),
    ],
)
def test_results_that_are_no_cost(value, message):
    with pytest.raises(
        CostTableError,
        match=r"op conv2d.*'conv' at 4 and 8 bits: computed by .*<lambda> \(version 1\) " + message,
    ):
        table(returning(value)).cost(conv(), (4, 8))


def test_an_error_in_the_function_names_it():
    @computed_cost(op="conv2d", per="mac")
    def broken(operation, weight_bits, activation_bits):
        return Fraction(1, operation.attributes["groups"] - 1)

    with pytest.raises(CostTableError, match=r"'conv' at 4 and 8 .*broken .* raised ZeroDivision"):
        table(broken).cost(conv(), (4, 8))


def test_digest_is_made_of_name_and_version():
    first, second = (table(returning(value)).digest for value in (1, 2))
    assert first == second
    assert table(returning(1, version="2")).digest != first
    assert table(returning(1, where="groups == 1")).digest != first


@pytest.mark.parametrize("write", [CostTable.to_json, CostTable.to_toml])
def test_no_file_holds_a_function(write):
    with pytest.raises(CostTableError, match=r"'t' cannot be written .*op conv2d.*as formulas or"):
        write(table(returning(1)))
    with pytest.raises(CostTableError, match=r"cost, computed = 'os.getcwd': unknown key"):
        load_table({"name": "t", "unit": "BOP", "row": [
            {"op": "conv2d", "per": "mac", "cost": {"computed": "os.getcwd", "version": "1"}},
        ]})  # fmt: skip


def test_a_falling_cost_warns_when_priced():
    @computed_cost(op="conv2d", per="mac")
    def falling(operation, weight_bits, activation_bits):
        return 40 - weight_bits

    operations = [bind(conv(), "s0", "8")]
    with pytest.warns(CostTableWarning, match="weight 2, activation 8 costs 38, but weight 4"):
        price(operations, table(falling), 1, WIDTHS)
    with pytest.raises(CostTableError, match="falls when bits rise"):
        price(operations, table(falling, strict=True), 1, WIDTHS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        price(operations, table(returning(1)), 1, WIDTHS)


def test_malformed_arguments():
    with pytest.raises(CostTableError, match=r"(?s)3 faults.*op = 'conv'.*per = 'x'.*error = -1"):
        returning(1, op="conv", per="x", error=-1)


def test_source_and_error_of_a_grid_pair():
    row = {
        "op": "conv2d", "per": "mac", "source": "row", "error": 0.1,
        "grid": [
            {"weight": 8, "activation": 8, "cost": 2},
            {"weight": 4, "activation": 8, "cost": 1, "source": "pair", "error": "5 %"},
        ],
    }  # fmt: skip
    priced = load_table({"name": "t", "unit": "cycle", "row": [row]}).rows[0]
    assert priced.source_for(conv(), (4, 8)) == "pair"
    assert priced.error_for(conv(), (3, 3)) == Fraction(1, 20), "runs as (4, 8)"
    assert priced.source_for(conv(), (8, 8)) == "row"
    assert priced.error_for(conv(), (8, 8)) == Fraction(1, 10)
    assert priced.error_for(conv(), (16, 8)) == Fraction(1, 10), "no pair: the row's own"
