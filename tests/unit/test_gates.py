"""Gates select widths as the bands say, one by one and by tensor."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cgmq_fx.errors import UsageError
from cgmq_fx.gates import bit_width_of, gate_for, is_width, width_index

WIDTHS = st.lists(st.sampled_from([*range(17), 32]), min_size=1, unique=True).map(
    lambda widths: tuple(sorted(widths))
)


@pytest.mark.parametrize(
    ("gate", "bit_width"),
    [
        *((gate, 2) for gate in (-math.inf, -7.0, 0.0, 0.001, 1.0)),
        *((gate, 4) for gate in (1.001, 2.0)),
        *((2.5, 8), (4.0, 16)),
        *((gate, 32) for gate in (4.001, 5.5, math.inf)),
    ],
)
def test_the_default_bands(gate, bit_width):
    assert bit_width_of(gate) == bit_width


@given(WIDTHS, st.floats(-3, 20) | st.integers(-3, 20).map(float))
def test_the_tensor_version_agrees_with_the_scalar_one(widths, gate):
    index = width_index(torch.tensor([gate], dtype=torch.float64), len(widths))
    assert index.dtype == torch.int64
    assert widths[int(index)] == bit_width_of(gate, widths)


def test_gates_with_different_numbers_of_widths_at_once():
    gates = torch.tensor([9.0, 9.0, 0.2])
    assert width_index(gates, torch.tensor([1, 3, 5])).tolist() == [0, 2, 0]


@given(WIDTHS)
def test_a_gate_for_a_width_selects_it_from_the_middle_of_its_band(widths):
    for width in widths:
        gate = gate_for(width, widths)
        assert {bit_width_of(gate + shift, widths) for shift in (-0.49, 0.0, 0.5)} == {width}


@pytest.mark.parametrize("value", [-1, 17, 31, 33, 8.0, True, "8", None])
def test_what_is_no_width(value):
    assert not is_width(value)


def test_messages_name_the_width_and_the_choices():
    with pytest.raises(UsageError, match=r"bit_width=3 .*choose one of 2, 4, 8, 16, 32"):
        gate_for(3)
    with pytest.raises(UsageError, match=r"gate is nan.*0\.5 selects 2 bits"):
        bit_width_of(math.nan)
