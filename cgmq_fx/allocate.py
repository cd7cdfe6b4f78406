"""Chooses bit-widths within every budget at the least predicted loss.

Greedy by marginal return: from the widest bit-widths down, each move takes the narrower width that saves
most of the exceeded budgets for the loss it is predicted to cost; what slack is left is given back where
it helps most. Every comparison with a budget is exact.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from cgmq_fx.accounting import Accounting
from cgmq_fx.cost.totals import SumResource
from cgmq_fx.errors import BudgetError
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.sensitivity import predicted_loss

#: Predicted rise of the loss by bit-width, one mapping for each site.
PredictedLoss = Sequence[Mapping[int, float]]


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
        predicted: how much the loss rises at each allowed bit-width of each site.
        start: bit-widths that no site exceeds; by default the widest allowed ones.
        limits: bounds by resource; by default the budgets.

    Raises:
        BudgetError: no choice that was found is within every limit.
    """
    ceiling = [site.allowed[-1] for site in accounting.sites] if start is None else list(start)
    search = _Search(accounting, predicted, limits or accounting.limits, ceiling)
    search.descend()
    if search.exceeded():
        search.jump(_reachable(accounting, search))
    search.fill()
    return tuple(accounting.widths[index] for index in search.index)


@dataclass
class _Bound:
    resource: SumResource
    limit: int
    total: int

    @property
    def is_exceeded(self) -> bool:
        return self.total > self.limit


class _Search:
    def __init__(
        self,
        accounting: Accounting,
        predicted: PredictedLoss,
        limits: Mapping[str, Fraction],
        ceiling: Sequence[int],
    ) -> None:
        self.accounting = accounting
        self.predicted = predicted
        self.index = accounting.index(ceiling)
        place = {width: position for position, width in enumerate(accounting.widths)}
        self.choices = [
            [place[width] for width in site.allowed if width <= top]
            for site, top in zip(accounting.sites, ceiling, strict=True)
        ]
        self.bounds = [
            _Bound(resource, resource.bound_scaled(limit), resource.total_scaled(self.index))
            for name, limit in limits.items()
            for resource in [accounting.resources[name]]
        ]
        self.neighbours: list[set[int]] = [{site} for site in range(len(self.index))]
        for bound in self.bounds:
            for term in bound.resource.terms:
                sites = {site for site in term.sites if site is not None}
                for site in sites:
                    self.neighbours[site] |= sites

    def exceeded(self) -> list[_Bound]:
        return [bound for bound in self.bounds if bound.is_exceeded]

    def loss(self, site: int, index: int) -> float:
        return self.predicted[site][self.accounting.widths[index]]

    def deltas(self, site: int, to: int) -> list[int]:
        return [bound.resource.delta_scaled(site, to, self.index) for bound in self.bounds]

    def move(self, site: int, to: int) -> None:
        for bound, delta in zip(self.bounds, self.deltas(site, to), strict=True):
            bound.total += delta
        self.index[site] = to

    def jump(self, index: Sequence[int]) -> None:
        self.index = list(index)
        for bound in self.bounds:
            bound.total = bound.resource.total_scaled(self.index)

    # -- down ------------------------------------------------------------------------------------

    def descend(self) -> None:
        """Move down until no bound is exceeded, or no move saves anything."""
        while exceeded := self.exceeded():
            before = list(self.index)
            self._descend(len(exceeded))
            if self.index == before:
                return

    def _descend(self, num_exceeded: int) -> None:
        heap: list[tuple[float, float, int, int, int]] = []
        version = [0] * len(self.index)

        def push(site: int) -> None:
            best = self._best_move(site)
            if best is not None:
                price, saving, to = best
                heapq.heappush(heap, (price, -saving, site, to, version[site]))

        for site in range(len(self.index)):
            push(site)
        while heap and len(self.exceeded()) == num_exceeded:
            _, _, site, to, stamp = heapq.heappop(heap)
            if stamp != version[site]:
                continue
            self.move(site, to)
            for neighbour in self.neighbours[site]:
                version[neighbour] += 1
                push(neighbour)

    def _best_move(self, site: int) -> tuple[float, float, int] | None:
        """Return (loss per saving, saving, width index) of the best narrower width."""
        here = self.index[site]
        best: tuple[float, float, int] | None = None
        for to in self.choices[site]:
            if to >= here:
                continue
            saving = sum(
                -delta / max(1, bound.limit)
                for bound, delta in zip(self.bounds, self.deltas(site, to), strict=True)
                if bound.is_exceeded
            )
            if saving <= 0:
                continue
            price = max(0.0, self.loss(site, to) - self.loss(site, here)) / saving
            if best is None or (price, -saving) < (best[0], -best[1]):
                best = price, saving, to
        return best

    # -- up --------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Widen, best return first, while every bound holds."""
        heap: list[tuple[float, int, int]] = []

        def push(site: int) -> None:
            here = self.index[site]
            for to in self.choices[site]:
                if to <= here:
                    continue
                gain = self.loss(site, here) - self.loss(site, to)
                price = sum(
                    max(0, delta) / max(1, bound.limit)
                    for bound, delta in zip(self.bounds, self.deltas(site, to), strict=True)
                )
                if gain > 0:
                    heapq.heappush(heap, (-gain / (price + 1e-30), site, to))

        for site in range(len(self.index)):
            push(site)
        while heap:
            _, site, to = heapq.heappop(heap)
            if to <= self.index[site]:
                continue
            deltas = self.deltas(site, to)
            fits = all(
                bound.total + delta <= bound.limit
                for bound, delta in zip(self.bounds, deltas, strict=True)
            )
            if fits:
                self.move(site, to)
                push(site)


def _reachable(accounting: Accounting, search: _Search) -> list[int]:
    """Return widths within every bound, for costs that do not rise with the bits."""
    candidates = [accounting.index(accounting.lowest_bits())]
    allowed = [site.allowed for site in accounting.sites]
    candidates += [list(bound.resource.lowest(allowed).width_index) for bound in search.bounds]
    for index in candidates:
        if all(bound.resource.total_scaled(index) <= bound.limit for bound in search.bounds):
            return index
    over = ", ".join(bound.resource.name for bound in search.exceeded())
    raise BudgetError(
        f"no choice of bit-widths was found within the budgets of {over} at once; raise one of them, or "
        f"allow narrower bit-widths with prepare(widths=...)"
    )


def lower_to_budget(prepared: PreparedModule) -> None:
    """Move the bit-widths that the loss needs least down until every budget is met.

    Ranges of activations are fitted anew from the samples that quantizers keep; those of weights fit
    themselves to the weights in the next forward.

    Raises:
        BudgetError: no bit-widths within every budget were found.
    """
    accounting = prepared.plan.accounting
    bits = list(prepared.bit_widths.values())
    if not accounting.is_satisfied(bits):
        prepared.set_bit_widths(allocate(accounting, predicted_loss(prepared), start=bits))
    for quantizer in prepared.quantizers.values():
        fits_itself = quantizer.spec.role == "weight"
        if quantizer.refit_pending and quantizer.has_sample and not fits_itself:
            quantizer.refit()
