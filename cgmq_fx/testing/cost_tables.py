"""Hypothesis strategies for cost tables that price every network."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hypothesis import strategies as st

from cgmq_fx.cost.attributes import PAIR_BITS, WEIGHT_BITS
from cgmq_fx.cost.grid import PAIR_AXES, WEIGHT_AXES, Axes
from cgmq_fx.cost.monotone import CostTableWarning
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.row_fields import PER
from cgmq_fx.cost.table import CostTable

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_WEIGHTED = (*_CONVOLUTIONS, *_TRANSPOSED, "linear", "bilinear", "rnn")
_PAIRS = ("matmul", "attention")
_FREE = ("max_pool", "avg_pool", "softmax", "activation", "elementwise", "reduce")
_UNITS = ("BOP", "cycle", "uJ", "ms", "ns")
# A row for part of the operations; each stands once, since two equally specific rows are an error.
_CONDITIONS: Sequence[tuple[tuple[str, ...], str, tuple[str, ...]]] = (
    (
        _CONVOLUTIONS,
        "weight",
        ("groups == 1", "groups == in_channels", "kernel_size == 1", "stride_0 > 1 and bias"),
    ),
    (
        ("linear",),
        "weight",
        ("in_features >= 5", "bias", "out_features % 2 == 0 and macs > 8"),
    ),
    (("matmul",), "pair", ("m == n", "batch > 1", "k >= 4 and macs < 1000")),
)
_LANES = (4, 8, 16)
_FACTORS = st.fractions(Fraction(1, 64), 100, max_denominator=64)


def cost_tables(*, monotone: bool = True, as_mapping: bool = False) -> st.SearchStrategy[Any]:
    """Draw cost tables: formulas, grids and numbers, conditions, and work of every kind.

    Each prices every operation that has MACs, at any pair of bit-widths up to 32.

    >>> from hypothesis import find
    >>> table = find(cost_tables(), lambda table: True)
    >>> table.to_toml().splitlines()[1]
    'name = "drawn"'

    Args:
        monotone: no cost falls when bits rise; without it some costs may, and reading the table
            gives a `CostTableWarning`, as does `prepare`.
        as_mapping: draw what `CostTable.to_json` returns, as it would stand in a file.
    """
    tables = _cost_tables(monotone)
    return tables.map(CostTable.to_json) if as_mapping else tables


@st.composite
def _cost_tables(draw: st.DrawFn, monotone: bool) -> CostTable:
    bits = draw(st.sampled_from((8, 16, 4)))
    kind = _Kind(monotone, bits)
    rows = [*_rows(draw, _WEIGHTED, "weight", kind), *_rows(draw, _PAIRS, "pair", kind)]
    rows.append(Row(op=("opaque",), per="mac", cost=draw(_FACTORS)))
    for ops, operands, conditions in _CONDITIONS:
        if draw(st.booleans()):
            where = draw(st.sampled_from(conditions))
            rows.append(_row(draw, ops, operands, kind, where))
    if draw(st.booleans()):
        rows.append(
            Row(op=(draw(st.sampled_from(_FREE)),), per="output_element", cost=draw(_FACTORS))
        )
    with warnings.catch_warnings():
        if not monotone:
            warnings.simplefilter("ignore", CostTableWarning)
        return CostTable(
            "drawn",
            draw(st.sampled_from(_UNITS)),
            tuple(draw(st.permutations(rows))),
            source="drawn",
            input_bits=bits,
            unpriced=draw(st.sampled_from(("error", "zero"))),
        )


@dataclass(frozen=True)
class _Kind:
    """What is asked of every row.

    Attributes:
        monotone: no cost falls when bits rise.
        bits: a width that every grid lists, as that of what arrives from outside has to be.
    """

    monotone: bool
    bits: int


def _rows(draw: st.DrawFn, ops: tuple[str, ...], operands: str, kind: _Kind) -> list[Row]:
    """Draw one row for all of some operations, or two for two parts of them."""
    cut = draw(st.integers(0, len(ops) - 1))
    return [_row(draw, part, operands, kind) for part in (ops[:cut], ops[cut:]) if part]


def _row(
    draw: st.DrawFn, ops: tuple[str, ...], operands: str, kind: _Kind, where: str | None = None
) -> Row:
    per = draw(st.sampled_from(PER))
    price = draw(st.sampled_from(("formula", "number", "grid")))
    if price == "grid":
        axes = PAIR_AXES if operands == "pair" else WEIGHT_AXES
        return Row(op=ops, per=per, where=where, grid=_grid(draw, axes, kind))  # type: ignore[arg-type]
    cost: Any = draw(_FACTORS)
    if price == "formula":
        cost = {"formula": _formula(draw, operands, kind)}
    return Row(op=ops, per=per, where=where, cost=cost)  # type: ignore[arg-type]


def _formula(draw: st.DrawFn, operands: str, kind: _Kind) -> str:
    first, second = PAIR_BITS if operands == "pair" else WEIGHT_BITS
    number = draw(st.integers(1, 9))
    rising = (
        f"{first} * {second}",
        f"({first} + {second}) / {number}",
        f"max({first}, {second}, {number}) / 8",
        f"ceil({first} / 4) * ceil({second} / 4) * {number}",
        f"{first} + macs / {number}",
        f"min({first}, 8) * {second} + {number}",
    )
    falling = (f"64 / {first} + {second}", f"({first} - 8) ** 2 + {second}", f"{second} % 5 + 1")
    found: tuple[str, ...] = rising if kind.monotone else rising + falling
    return draw(st.sampled_from(found))


def _grid(draw: st.DrawFn, axes: Axes, kind: _Kind) -> list[dict[str, Any]]:
    """Draw the costs of some lanes by others; the widest pair is 32 by 32."""
    lanes = [
        sorted({kind.bits, 32, *draw(st.sets(st.sampled_from(_LANES), max_size=2))}) for _ in axes
    ]
    # A product of rising factors rises; without that each pair has a factor of its own.
    rows, columns = (sorted(draw(_FACTORS) for _ in widths) for widths in lanes)
    return [
        {
            axes[0]: first,
            axes[1]: second,
            "cost": row * column * (1 if kind.monotone else draw(_FACTORS)),
        }
        for first, row in zip(lanes[0], rows, strict=True)
        for second, column in zip(lanes[1], columns, strict=True)
    ]
