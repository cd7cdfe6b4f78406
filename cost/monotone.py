"""Find costs that fall when bits rise: most often a typing error, so the table's author is told."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from cgmq_fx.cost.attributes import ALL_BITS, WEIGHT_BITS
from cgmq_fx.cost.expression import Expression
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.row_fields import tried_costs

Costs = Mapping[tuple[int, int], Fraction]


class CostTableWarning(UserWarning):
    """A cost table is usable but looks wrong."""


def falling_pair(costs: Costs) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return two neighbouring pairs of widths of which the wider one costs less, or None."""
    firsts = sorted({first for first, _ in costs})
    seconds = sorted({second for _, second in costs})
    for narrow, wide in _neighbours(firsts, seconds):
        if narrow in costs and wide in costs and costs[wide] < costs[narrow]:
            return narrow, wide
    return None


def _neighbours(
    firsts: Sequence[int], seconds: Sequence[int]
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for first in firsts:
        for lower, upper in itertools.pairwise(seconds):
            yield (first, lower), (first, upper)
    for second in seconds:
        for lower, upper in itertools.pairwise(firsts):
            yield (lower, second), (upper, second)


def falling_text(axes: Sequence[str], costs: Costs) -> str | None:
    """Return a sentence on the first pair where the cost falls, or None.

    Args:
        axes: what the widths are of; one where the second is of nothing.
        costs: by two widths.
    """
    pair = falling_pair(costs)
    if pair is None:
        return None
    narrow, wide = (
        ", ".join(f"{axis} {bits}" for axis, bits in zip(axes, widths, strict=False))
        for widths in pair
    )
    return (
        f"the cost falls when bits rise: {narrow} costs {float(costs[pair[0]]):g}, "
        f"but {wide} costs {float(costs[pair[1]]):g}"
    )


def row_falls(row: Row) -> str | None:
    """Return where the cost of a row falls when bits rise, or None; without an operation at hand.

    A formula with attributes of the operation in it is not looked at here but when it is priced.
    """
    if row.grid is not None:
        listed = {
            (first, second): entry.cost
            for first in row.grid.widths(0)
            for second in row.grid.widths(1)
            if (entry := row.grid.entry(first, second)) is not None
        }
        return falling_text(row.grid.axes, listed)
    if not isinstance(row.cost, Expression) or not row.cost.variables <= ALL_BITS:
        return None
    pair_row = not row.cost.variables <= set(WEIGHT_BITS)
    axes = ("rhs", "lhs") if pair_row else ("weight", "activation")
    return falling_text(axes, tried_costs(row.cost))
