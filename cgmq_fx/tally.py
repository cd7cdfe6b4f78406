"""Exact totals that follow the bit-widths as single sites move, and the bounds on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from cgmq_fx.accounting import Accounting
from cgmq_fx.cost.totals import Resource


@dataclass
class Bound:
    """One bounded resource; `limit` and `total` are whole numbers of its resolution."""

    resource: Resource
    limit: int
    total: int

    @property
    def is_exceeded(self) -> bool:
        """Whether the present total is above the limit."""
        return self.total > self.limit


class Tally:
    """The bit-widths of all sites and what they come to, kept exact move by move.

    A move costs time in proportion to the operations that its site takes part in, not to the
    network.

    Args:
        accounting: sites and exact costs.
        bits: the bit-width of each site.
        limits: bounds by resource; by default the budgets.

    Attributes:
        index: for each site the position of its bit-width in ``accounting.widths``.
        bounds: the bounded resources.
    """

    def __init__(
        self,
        accounting: Accounting,
        bits: Sequence[int],
        limits: Mapping[str, Fraction] | None = None,
    ) -> None:
        self.widths = accounting.widths
        self.index = accounting.index(bits)
        bounded = accounting.limits if limits is None else limits
        self.bounds = [
            Bound(resource, resource.bound_scaled(limit), resource.total_scaled(self.index))
            for name, limit in bounded.items()
            for resource in [accounting.resources[name]]
        ]

    @property
    def bits(self) -> tuple[int, ...]:
        """The bit-width of each site."""
        return tuple(self.widths[index] for index in self.index)

    @property
    def exceeded(self) -> list[Bound]:
        """The bounds that are not met."""
        return [bound for bound in self.bounds if bound.is_exceeded]

    def deltas(self, site: int, to: int) -> list[int]:
        """Return by how much each total changes when `site` takes the width of index `to`."""
        return [bound.resource.delta_scaled(site, to, self.index) for bound in self.bounds]

    def relief(self, site: int, to: int) -> float:
        """Return how much nearer a move brings the exceeded totals, in parts of their limits."""
        return sum(
            bound.resource.relief(site, to, self.index, bound.limit) / max(1, bound.limit)
            for bound in self.exceeded
        )

    def has_room(self, deltas: Sequence[int]) -> bool:
        """Tell whether every bound holds after a move that changes the totals by `deltas`."""
        pairs = zip(self.bounds, deltas, strict=True)
        return all(bound.total + delta <= bound.limit for bound, delta in pairs)

    def move(self, site: int, to: int, deltas: Sequence[int]) -> None:
        """Give `site` the width of index `to`, which changes the totals by `deltas`."""
        for bound, delta in zip(self.bounds, deltas, strict=True):
            bound.total += delta
        self.index[site] = to
