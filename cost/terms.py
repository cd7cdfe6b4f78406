"""Totals as sums of terms, each of which depends on the bit-widths of at most two sites."""

from collections.abc import Sequence
from dataclasses import dataclass

from cgmq_fx.errors import CostTableError


@dataclass(frozen=True, slots=True)
class Term:
    """One addend of a total, in whole numbers of the total's resolution.

    Attributes:
        name: the operation or tensor that it prices.
        sites: site of each axis of `costs`, None where that operand's width is fixed.
        costs: cost by the index of the width of the first and of the second operand; an axis whose
            site is None has length 1. None where the hardware does not have the pair of widths.
    """

    name: str
    sites: tuple[int | None, int | None]
    costs: tuple[tuple[int | None, ...], ...]

    def cost(self, width_index: Sequence[int]) -> int:
        """Return the cost where site `i` has the width of index ``width_index[i]``.

        Raises:
            CostTableError: the hardware does not have this pair of widths.
        """
        first, second = self.sites
        row = self.costs[0 if first is None else width_index[first]]
        cost = row[0 if second is None else width_index[second]]
        if cost is None:
            raise CostTableError(no_price([self.name]))
        return cost

    @property
    def most(self) -> int:
        """The highest cost in the term."""
        return max((cost for row in self.costs for cost in row if cost is not None), default=0)


def no_price(names: Sequence[str]) -> str:
    """Return the message for terms asked at widths that the hardware does not have."""
    return (
        f"the cost table has no price at these bit-widths for {', '.join(map(repr, names))}; "
        "choose among the supported widths of their sites"
    )
