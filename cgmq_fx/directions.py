"""How gates move: the rules that turn gradients into bit-widths.

A gate's own gradient is useless, since the cost is a step function of it. It is replaced by a
direction whose sign depends only on whether every budget is met, and whose size depends on how much
the loss cares about the tensor (Constraint Guided Model Quantization, arXiv 2409.20138).
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from cgmq_fx.choose_bits import choose_bits
from cgmq_fx.errors import UsageError
from cgmq_fx.gates import bit_width_of
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.sensitivity import mean_gradients, mean_size
from cgmq_fx.tally import Tally

# A gate falls at least this much, and at most its inverse, of what the median gate does at a check.
_SLOWEST = 0.25
# What the median gate moves at one check, in bands of one bit-width.
_STRIDE = 0.5
_TINY = 1e-30


class Direction(Protocol):
    """A rule that moves the gates of a prepared model at a check."""

    def update(self, prepared: PreparedModule, progress: float) -> None:
        """Move gates and take the bit-widths that they select.

        Args:
            prepared: a priced and calibrated model with statistics of its gradients.
            progress: how much of the descent is over, 0 to 1; 1 asks for the budgets themselves.
        """


@dataclass(frozen=True)
class GateDirection:
    """Gates fall while a budget is exceeded and grow back while all are met.

    A gate falls by at least `_STRIDE * _SLOWEST` at each check, so that after finitely many checks
    every budget is met. Where growing would exceed a budget the gate stays where it is, so that a
    model that has met its budgets once goes on meeting them.

    Attributes:
        falling: size of the direction while unsatisfied, from mean gradient and mean size of a
            tensor.
        growing: likewise while satisfied.
    """

    falling: Callable[[float, float], float]
    growing: Callable[[float, float], float]

    def update(self, prepared: PreparedModule, progress: float) -> None:
        """See `Direction.update`."""
        accounting = prepared.plan.accounting
        learned = [place for place, site in enumerate(accounting.sites) if site.learned]
        if not learned:
            return
        tally = Tally(accounting, list(prepared.bit_widths.values()))
        means = mean_gradients(prepared)
        rule = self.falling if tally.exceeded else self.growing
        sizes = {
            place: rule(means[place], mean_size(prepared.quantizers[accounting.sites[place].name]))
            for place in learned
        }
        if tally.exceeded:
            _fall(prepared, sizes)
        else:
            _grow(prepared, sizes, tally)


def _fall(prepared: PreparedModule, sizes: Mapping[int, float]) -> None:
    median = max(statistics.median(sizes.values()), _TINY)
    for place, size in sizes.items():
        pace = min(max(size / median, _SLOWEST), 1 / _SLOWEST)
        _set_gate(prepared, place, _moved_gate(prepared, place, -_STRIDE * pace))


def _grow(prepared: PreparedModule, sizes: Mapping[int, float], tally: Tally) -> None:
    largest = max(*sizes.values(), _TINY)
    for place, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        gate = _moved_gate(prepared, place, _STRIDE * size / largest)
        spec = prepared.quantizers[prepared.plan.accounting.sites[place].name].spec
        to = tally.widths.index(bit_width_of(gate, spec.widths))
        deltas = tally.deltas(place, to)
        if tally.has_room(deltas):
            tally.move(place, to, deltas)
            _set_gate(prepared, place, gate)


def _moved_gate(prepared: PreparedModule, place: int, by: float) -> float:
    """Return the gate of a site moved by `by` bands, and on to a band that the site may have."""
    site = prepared.plan.accounting.sites[place]
    quantizer = prepared.quantizers[site.name]
    bands = [quantizer.spec.widths.index(bits) for bits in site.allowed]
    gate = min(max(float(quantizer.gate) + by, bands[0] + 0.5), bands[-1] + 1.0)
    band = quantizer.spec.widths.index(bit_width_of(gate, quantizer.spec.widths))
    if band in bands:
        return gate
    below = max(other for other in bands if other < band)
    return below + 1.0 if by < 0 else min(other for other in bands if other > band) + _STRIDE


def _set_gate(prepared: PreparedModule, place: int, gate: float) -> None:
    quantizer = prepared.quantizers[prepared.plan.accounting.sites[place].name]
    quantizer.gate.fill_(gate)
    quantizer.update_from_gate()


@dataclass(frozen=True)
class FisherDirection:
    """Every check solves for the bit-widths of least predicted loss within a falling bound.

    The bound falls geometrically from the widest bit-widths' cost to the budget, so that widths go
    from 32 over 8 and 4 to 2 bits and the weights follow. The predicted loss is the Fisher
    information of each tensor, as its gradients show it, times its rounding error.
    """

    def update(self, prepared: PreparedModule, progress: float) -> None:
        """See `Direction.update`."""
        accounting = prepared.plan.accounting
        bits = list(prepared.bit_widths.values())
        start = None if progress >= 1 else bits
        widest = accounting.totals([site.allowed[-1] for site in accounting.sites])
        limits = {
            name: _between(widest[name], limit, progress)
            for name, limit in accounting.limits.items()
        }
        prepared.set_bit_widths(choose_bits(prepared, start=start, limits=limits))


def _between(widest: Fraction, limit: Fraction, progress: float) -> Fraction:
    if progress >= 1 or widest <= limit:
        return limit
    return max(limit, limit * Fraction(float(widest / limit) ** (1 - progress)))


def _inverse(value: float) -> float:
    return 1.0 / (value + _TINY)


_DIRECTIONS: dict[str, Direction] = {
    "fisher": FisherDirection(),
    "dir_1": GateDirection(lambda g, _: _inverse(g), lambda g, _: g),
    "dir_2": GateDirection(lambda g, a: _inverse(g + a), lambda g, a: g + a),
    "dir_3": GateDirection(lambda g, a: _inverse(g) + _inverse(a), lambda g, a: g + a),
}


#: Names of the rules that move the one gate of each tensor.
GATE_DIRECTIONS = frozenset(
    name for name, direction in _DIRECTIONS.items() if isinstance(direction, GateDirection)
)


def direction_named(name: str) -> Direction:
    """Return the direction of a name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in _DIRECTIONS:
        raise UsageError(
            f"direction={name!r} is unknown; the directions are {', '.join(map(repr, _DIRECTIONS))}"
        )
    return _DIRECTIONS[name]
