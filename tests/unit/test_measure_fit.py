"""Formulas fitted to measured operations, and the rows that they become."""

from fractions import Fraction

import pytest

from cgmq_fx.cost.load import load_table
from cgmq_fx.cost.operation import Operation
from cgmq_fx.cost.table import CostTable
from cgmq_fx.measure.fit import fit
from cgmq_fx.measure.rows import Measured, rows_of


def linear(inside, outside):
    attributes = {"in_features": inside, "out_features": outside, "bias": True}
    return Operation(
        f"fc{inside}x{outside}", "linear", "torch.nn.functional.linear", "weight",
        inside * outside, outside, inside, inside * outside, attributes,
    )  # fmt: skip


def conv(inside, outside, size, kernel=3, groups=1):
    attributes = {
        "in_channels": inside, "out_channels": outside, "groups": groups,
        "kernel_size": kernel * kernel, "spatial_dims": 2, "bias": False,
        "kernel_0": kernel, "kernel_1": kernel, "stride_0": 1, "stride_1": 1,
        "dilation_0": 1, "dilation_1": 1,
    }  # fmt: skip
    outputs, weights = outside * size * size, inside // groups * outside * kernel * kernel
    return Operation(
        f"conv{inside}x{outside}", "conv2d", "torch.nn.functional.conv2d", "weight",
        weights * size * size, outputs, inside * size * size, weights, attributes,
    )  # fmt: skip


SHAPES = ((16, 16), (16, 64), (64, 64), (64, 256), (256, 32), (512, 512))


def test_a_fit_finds_the_formula_that_made_the_times():
    operations = [linear(*shape) for shape in SHAPES]
    times = [0.002 + 3e-6 * item.macs + 1e-4 * item.output_elements for item in operations]
    found = fit(operations, times)
    assert found.error < 1e-6
    # A linear layer has as many weights as MACs: the fit needs one of them.
    assert found.coefficients.pop("1") == pytest.approx(0.002)
    assert found.coefficients.pop("output_elements") == pytest.approx(1e-4)
    assert list(found.coefficients.values()) == pytest.approx([3e-6])


def test_a_fit_has_no_negative_term_and_says_how_far_it_is_off():
    operations = [linear(*shape) for shape in SHAPES]
    times = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]  # faster where there is more to do
    found = fit(operations, times)
    assert all(value > 0 for value in found.coefficients.values())
    assert 0.1 < found.error < 1


def test_one_operation_does_not_tell_how_far_its_formula_carries():
    assert fit([linear(16, 16)], [2.0]).error == 1


def test_what_takes_no_time_has_the_formula_zero():
    assert fit([linear(16, 16), linear(16, 64)], [0.0, 0.0]).formula == "0"


def table_of(measured, trust=0.0):
    table = CostTable(name="board", unit="ms", rows=tuple(rows_of(measured, trust)))
    return load_table(table.to_json())


def test_an_operation_that_was_measured_costs_what_was_measured():
    shapes = ((16, 16, 8), (16, 32, 8), (32, 32, 8), (32, 64, 4))
    found = [
        Measured(conv(*shape), pair, cost * (index + 1), 0.01)
        for index, shape in enumerate(shapes)
        for pair, cost in (((8, 8), 0.25), ((32, 32), 0.75))
    ]
    table = table_of(found, trust=0.05)
    for item in found:
        assert table.cost(item.operation, item.pair) == Fraction(str(item.cost))
    # What does not fit the integer kernels runs as the wider pair.
    assert table.cost(conv(16, 16, 8), (8, 16)) == Fraction("0.75")
    assert table.row_for(conv(16, 16, 8)).grid.entries[0].error == Fraction("0.05")


def test_an_operation_that_was_not_measured_is_priced_by_its_kind():
    sizes = (4, 8, 16, 32)
    found = [
        Measured(conv(16, 32, size), pair, cost * conv(16, 32, size).macs, 0.01)
        for size in sizes
        for pair, cost in (((8, 8), 1e-7), ((32, 32), 4e-7))
    ] + [
        Measured(conv(32, 32, size, groups=32), pair, 1e-5 * size, 0.01)
        for size in sizes
        for pair in ((8, 8), (32, 32))
    ]
    table = table_of(found)
    other = conv(16, 32, 12)
    assert float(table.cost(other, (8, 8))) == pytest.approx(1e-7 * other.macs, rel=0.01)
    assert float(table.cost(other, (4, 8))) == pytest.approx(1e-7 * other.macs, rel=0.01)
    assert float(table.cost(other, (8, 9))) == pytest.approx(4e-7 * other.macs, rel=0.01)
    assert table.row_for(other).where.text == "groups == 1 and kernel_size > 1"
    assert table.row_for(conv(32, 32, 12, groups=32)).where.text == "groups > 1"
    assert table.row_for(conv(16, 32, 12, kernel=1)) is None  # nothing like it was measured
