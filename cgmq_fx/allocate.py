"""Chooses bit-widths within every budget at the least predicted loss.

Greedy by marginal return: from the widest bit-widths down, each move takes the narrower width that
saves most of the exceeded budgets for the loss it is predicted to cost; what slack is left is given
back where it helps most. Every comparison with a budget is exact.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from cgmq_fx.accounting import Accounting
from cgmq_fx.errors import BudgetError
from cgmq_fx.tally import Tally

#: Predicted rise of the loss by bit-width, one mapping for each site.
PredictedLoss = Sequence[Mapping[int, float]]

_TINY = 1e-30


def allocate(
    accounting: Accounting,
    predicted: PredictedLoss,
    *,
    start: Sequence[int] | None = None,
    limits: Mapping[str, Fraction] | None = None,
) -> tuple[int, ...]:
    """Return a bit-width for each site, within every limit.

    Args:
        accounting: sites and exact costs.
        predicted: how much the loss rises at each allowed bit-width of each site; where that is
            infinite, only if nothing else is within the limits.
        start: bit-widths that no site exceeds; by default the widest allowed ones. Where costs fall
            as bits rise and nothing below `start` is within the limits, it is passed over.
        limits: bounds by resource; by default the budgets.

    Raises:
        BudgetError: no bit-widths within every limit were found.
    """
    limits = accounting.limits if limits is None else limits
    ceiling = [site.allowed[-1] for site in accounting.sites] if start is None else start
    search = _Search(accounting, predicted, limits, ceiling)
    search.descend()
    if search.tally.exceeded:
        found = accounting.reachable_bits(limits, ceiling)
        if found is None and start is not None:
            return allocate(accounting, predicted, limits=limits)
        if found is None:
            raise _out_of_reach(search.tally)
        search.tally = Tally(accounting, found, limits)
    search.fill()
    return search.tally.bits


def _out_of_reach(tally: Tally) -> BudgetError:
    over = ", ".join(bound.resource.name for bound in tally.exceeded)
    return BudgetError(
        f"no choice of bit-widths was found within all budgets at once, the nearest exceeds "
        f"{over}; raise these budgets, or allow narrower bit-widths with prepare(widths=...)"
    )


class _Search:
    """Moves the sites of a tally, the best move by the prices of a heap first.

    A move of one site changes the prices of those it shares operations with, mostly for the worse.
    So prices in a heap are out of date, and one that comes to the top is computed anew first.
    """

    def __init__(
        self,
        accounting: Accounting,
        predicted: PredictedLoss,
        limits: Mapping[str, Fraction],
        ceiling: Sequence[int],
    ) -> None:
        self.tally = Tally(accounting, ceiling, limits)
        self._predicted = predicted
        self._widths = accounting.widths
        place = {width: position for position, width in enumerate(accounting.widths)}
        self._choices = [
            [place[width] for width in site.allowed if width <= top and loss[width] < math.inf]
            for site, top, loss in zip(accounting.sites, ceiling, predicted, strict=True)
        ]

    def _loss(self, site: int, index: int) -> float:
        return self._predicted[site][self._widths[index]]

    def descend(self) -> None:
        """Narrow until no bound is exceeded, or no move saves anything."""
        before = None
        while self.tally.exceeded and self.tally.index != before:
            before = list(self.tally.index)
            self._descend_while({bound.resource.name for bound in self.tally.exceeded})

    def _descend_while(self, exceeded: set[str]) -> None:
        """Narrow while just these bounds are exceeded; which ones are makes the price of a move."""
        heap = [move for site in range(len(self._choices)) if (move := self._best_narrower(site))]
        heapq.heapify(heap)
        while heap and {bound.resource.name for bound in self.tally.exceeded} == exceeded:
            site = heapq.heappop(heap)[2]
            move = self._best_narrower(site)
            if move is None:
                continue
            if heap and move > heap[0]:
                heapq.heappush(heap, move)
                continue
            self.tally.move(site, move[3], self.tally.deltas(site, move[3]))
            again = self._best_narrower(site)
            if again is not None:
                heapq.heappush(heap, again)

    def _best_narrower(self, site: int) -> tuple[float, float, int, int] | None:
        """Return (loss per saving, minus the saving, site, width index) of its best move down."""
        here = self.tally.index[site]
        best: tuple[float, float, int, int] | None = None
        for to in self._choices[site]:
            if to >= here:
                continue
            saving = self.tally.relief(site, to)
            if saving <= 0:
                continue
            price = max(0.0, self._loss(site, to) - self._loss(site, here)) / saving
            move = price, -saving, site, to
            best = move if best is None else min(best, move)
        return best

    def fill(self) -> None:
        """Widen, best return first, while every bound holds."""
        heap = [move for site in range(len(self._choices)) for move in self._wider(site)]
        heapq.heapify(heap)
        while heap:
            _, site, to, origin = heapq.heappop(heap)
            if self.tally.index[site] != origin:
                continue
            deltas = self.tally.deltas(site, to)
            if not self.tally.has_room(deltas):
                continue
            move = self._priced(site, to, deltas)
            if heap and move > heap[0]:
                heapq.heappush(heap, move)
                continue
            self.tally.move(site, to, deltas)
            for again in self._wider(site):
                heapq.heappush(heap, again)

    def _wider(self, site: int) -> list[tuple[float, int, int, int]]:
        here = self.tally.index[site]
        return [
            self._priced(site, to, self.tally.deltas(site, to))
            for to in self._choices[site]
            if to > here and self._loss(site, to) < self._loss(site, here)
        ]

    def _priced(self, site: int, to: int, deltas: Sequence[int]) -> tuple[float, int, int, int]:
        """Return (minus the gain per cost, site, width index, present width index) of a move up."""
        here = self.tally.index[site]
        price = sum(
            max(0, delta) / max(1, bound.limit)
            for bound, delta in zip(self.tally.bounds, deltas, strict=True)
        )
        gain = self._loss(site, here) - self._loss(site, to)
        return -gain / (price + _TINY), site, to, here
