"""Totals as sums of terms, each of which depends on the bit-widths of at most two sites."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from cgmq_fx.cost.mixture import Mixture, WidthIndex, shares
from cgmq_fx.errors import CostTableError


@dataclass(frozen=True, slots=True)
class Term:
    """One addend of a total, in whole numbers of the total's resolution.

    Attributes:
        name: the operation or tensor that it prices.
        sites: site of each axis of `costs`, None where that operand's width is fixed.
        costs: cost by the index of the width of the first and of the second operand; an axis whose
            site is None has length 1. None where the hardware does not have the pair of widths.
        is_divisible: every element of an operand has the same part in the cost, so that one whose
            elements differ in width costs the mean over them. Else it costs what the dearest of
            these widths does.
        map_cost: what is added where the elements of the first operand differ in width, for saying
            which has which.
    """

    name: str
    sites: tuple[int | None, int | None]
    costs: tuple[tuple[int | None, ...], ...]
    is_divisible: bool = True
    map_cost: int = 0

    def cost_of(self, width_index: Sequence[WidthIndex]) -> Fraction:
        """Return the cost where site `i` has the width or the widths of ``width_index[i]``.

        Raises:
            CostTableError: the hardware does not have one of the pairs of widths.
        """
        first, second = (None if site is None else width_index[site] for site in self.sites)
        if not isinstance(first, Mixture) and not isinstance(second, Mixture):
            return Fraction(self.cost(width_index))  # type: ignore[arg-type]
        found = []
        for i, share in shares(first):
            for j, part in shares(second):
                cost = self.costs[i][j]
                if cost is None:
                    raise CostTableError(no_price([self.name]))
                found.append((share * part, cost))
        added = self.map_cost if isinstance(first, Mixture) else 0
        if self.is_divisible:
            return sum((share * cost for share, cost in found), Fraction(added))
        return Fraction(max(cost for _, cost in found) + added)

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
