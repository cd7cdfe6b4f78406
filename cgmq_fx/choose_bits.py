"""The bit-widths of a prepared model of least predicted loss, within bounds.

Weights with several gates take part in an allocation as if they had one, whose widths are the rungs
of a ladder: see `cgmq_fx.ladders`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Protocol

from torch import Tensor

from cgmq_fx.accounting import Accounting
from cgmq_fx.allocate import PredictedLoss, allocate
from cgmq_fx.cost.peak_memory import PeakMemory
from cgmq_fx.cost.terms import Term
from cgmq_fx.cost.totals import Resource, SumResource
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.ladders import Ladder, Rung
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.passes.constants import constant_value
from cgmq_fx.passes.deployed import written_nodes
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.sensitivity import predicted_loss
from cgmq_fx.unit_quantizer import UnitQuantizer

# What stands for rungs beyond the number of widths; no width is as large.
_RUNG = 1000


class Allocator(Protocol):
    """What finds bit-widths, as `cgmq_fx.allocate.allocate` does."""

    def __call__(
        self,
        accounting: Accounting,
        predicted: PredictedLoss,
        *,
        start: Sequence[int] | None = None,
        limits: Mapping[str, Fraction] | None = None,
    ) -> tuple[int, ...]:
        """Return a bit-width for each site."""


def choose_bits(
    prepared: PreparedModule,
    *,
    start: Sequence[int] | None = None,
    limits: Mapping[str, Fraction] | None = None,
    predicted: PredictedLoss | None = None,
    allocator: Allocator = allocate,
) -> tuple[int, ...]:
    """Return a bit-width, or `UnitBits`, for each site, within every limit.

    Args:
        prepared: a priced and calibrated model.
        start: bit-widths that no site exceeds, as `cgmq_fx.allocate.allocate` has it; of units the
            mean counts.
        limits: bounds by resource; by default the budgets.
        predicted: how much the loss rises at each bit-width that a whole tensor may have; by
            default as the gradients say.
        allocator: what finds bit-widths of whole tensors.

    Raises:
        BudgetError: no bit-widths within every limit were found.
    """
    accounting = prepared.plan.accounting
    predicted = predicted_loss(prepared) if predicted is None else predicted
    ladders = ladders_of(prepared)
    if not ladders:
        return allocator(accounting, predicted, start=start, limits=limits)
    while True:
        view = LadderView(accounting, predicted, ladders)
        first = None if start is None else view.rungs_of(start)
        chosen = allocator(view.accounting, view.predicted, start=first, limits=limits)
        places = view.places(chosen)
        # Rungs are far apart at first; those around the chosen ones are looked at closely.
        refined = {site for site, ladder in ladders.items() if ladder.refine(places[site])}
        if not refined:
            return view.bits_of(chosen)


def lower_to_budget(prepared: PreparedModule) -> None:
    """Move the bit-widths that the loss needs least down until every budget is met.

    Ranges follow in the next forward, or with `cgmq_fx.passes.freeze_bit_widths.settle_ranges`.

    Raises:
        BudgetError: no bit-widths within every budget were found.
    """
    accounting = prepared.plan.accounting
    bits = list(prepared.bit_widths.values())
    if not accounting.is_satisfied(bits):
        prepared.set_bit_widths(choose_bits(prepared, start=bits))


def ladders_of(prepared: PreparedModule) -> dict[int, Ladder]:
    """Return the ladder of each weight with several gates, by the place of its site."""
    found: dict[int, Ladder] = {}
    place = {site.name: index for index, site in enumerate(prepared.plan.accounting.sites)}
    for name, weight in _weights(prepared).items():
        quantizer, site = prepared.quantizers[name], prepared.plan.accounting.sites[place[name]]
        assert isinstance(quantizer, UnitQuantizer)
        rows = [row for row, bits in enumerate(quantizer.grid_widths) if bits in site.allowed]
        if not site.learned or not rows:
            continue
        errors = quantizer.unit_errors(weight)[rows].flatten(1)
        widths = [quantizer.grid_widths[row] for row in rows]
        has_float = FLOAT_WIDTH in site.allowed
        found[place[name]] = Ladder(errors, widths, weight.numel(), has_float=has_float)
    return found


def _weights(prepared: PreparedModule) -> dict[str, Tensor]:
    """Return what quantizers with several gates quantize, by site; calibrated ones alone."""
    found: dict[str, Tensor] = {}
    written = None
    for node in prepared.graph.nodes:
        if not is_quantizer(prepared, node):
            continue
        quantizer = prepared.get_submodule(str(node.target))
        if not isinstance(quantizer, UnitQuantizer) or not quantizer.is_calibrated:
            continue
        written = written_nodes(prepared.graph) if written is None else written
        value = constant_value(prepared, node.args[0], written)
        if value is not None:
            found[str(node.target).rpartition(".")[2]] = value
    return found


class LadderView:
    """An accounting in which every weight with several gates has one, of which rungs are widths.

    Its costs of rungs are rounded up to whole numbers of the resolution, so that what is within a
    limit here is within it.

    Attributes:
        accounting: with numbers in the place of bit-widths for these weights.
        predicted: the loss by these numbers.
    """

    def __init__(
        self,
        accounting: Accounting,
        predicted: PredictedLoss,
        ladders: Mapping[int, Ladder],
    ) -> None:
        self._ladders, self._own = ladders, accounting
        most = max(len(ladder.rungs) for ladder in ladders.values())
        more = max(0, most - len(accounting.widths))
        widths = (*accounting.widths, *range(_RUNG, _RUNG + more))
        sites, losses = list(accounting.sites), list(predicted)
        for site, ladder in ladders.items():
            numbers = widths[: len(ladder.rungs)]
            sites[site] = replace(sites[site], allowed=numbers)
            factor = ladder.loss_of_error(predicted[site])
            pairs = zip(numbers, ladder.rungs, strict=True)
            losses[site] = {
                number: _rung_loss(rung, predicted[site], factor) for number, rung in pairs
            }
        resources = {
            name: self._resource(resource, widths)
            for name, resource in accounting.resources.items()
        }
        self.predicted: PredictedLoss = losses
        self.accounting = replace(
            accounting, sites=tuple(sites), resources=resources, widths=widths
        )

    def rungs_of(self, bits: Sequence[int]) -> list[int]:
        """Return bit-widths with the number of a rung for each weight with several gates."""
        found = list(bits)
        for site, ladder in self._ladders.items():
            found[site] = self.accounting.widths[ladder.at_most(bits[site])]
        return found

    def places(self, numbers: Sequence[int]) -> dict[int, int]:
        """Return the place of the rung that numbers say, by site."""
        return {site: self.accounting.widths.index(numbers[site]) for site in self._ladders}

    def bits_of(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """Return the bit-widths that numbers stand for."""
        found = list(numbers)
        for site, place in self.places(numbers).items():
            found[site] = self._ladders[site].bits(place)
        return tuple(found)

    def _resource(self, resource: Resource, widths: tuple[int, ...]) -> Resource:
        if isinstance(resource, PeakMemory):
            return PeakMemory(resource.buffers, resource.num_sites, widths)
        assert isinstance(resource, SumResource)
        return SumResource(
            resource.name,
            resource.unit,
            widths,
            resource.num_sites,
            [self._term(term) for term in resource.terms],
            resource.scale,
            resource.reference,
            operations=resource.operations,
            rows=resource.rows,
        )

    def _term(self, term: Term) -> Term:
        first, second = term.sites
        costs: Any = term.costs
        if first is not None and first in self._ladders:
            costs = self._spread(term, costs, self._ladders[first], term.map_cost)
        if second is not None and second in self._ladders:
            turned = tuple(zip(*costs, strict=True))
            costs = tuple(zip(*self._spread(term, turned, self._ladders[second], 0), strict=True))
        return term if costs is term.costs else replace(term, costs=costs, map_cost=0)

    def _spread(
        self, term: Term, costs: Sequence[Sequence[int | None]], ladder: Ladder, map_cost: int
    ) -> tuple[tuple[int | None, ...], ...]:
        """Return costs by rung, from costs by width."""
        place = {width: position for position, width in enumerate(self._own.widths)}
        lines = []
        for rung in ladder.rungs:
            parts = [(count, costs[place[bits]]) for bits, count in rung.counts.items()]
            total = sum(rung.counts.values())
            added = map_cost if len(parts) > 1 else 0
            lines.append(
                tuple(
                    _mixed([(count, line[j]) for count, line in parts], total, term, added)
                    for j in range(len(costs[0]))
                )
            )
        return tuple(lines)


def _rung_loss(rung: Rung, losses: Mapping[int, float], factor: float) -> float:
    """Return the loss of a rung; infinite where that of its one width is."""
    if len(rung.counts) == 1 and any(losses[bits] == math.inf for bits in rung.counts):
        return math.inf
    return factor * rung.error


def _mixed(
    parts: Sequence[tuple[int, int | None]], total: int, term: Term, added: int
) -> int | None:
    known = [(count, cost) for count, cost in parts if cost is not None]
    if len(known) < len(parts):
        return None
    if not term.is_divisible:
        return max(cost for _, cost in known) + added
    return math.ceil(Fraction(sum(count * cost for count, cost in known), total)) + added
