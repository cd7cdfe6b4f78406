"""How gates move: the rules that turn gradients into bit-widths.

A gate's own gradient is useless, since the cost is a step function of it. It is replaced by a direction
whose sign depends only on whether every budget is met, and whose size depends on how much the loss cares
about the tensor (Constraint Guided Model Quantization, arXiv 2409.20138).
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from cgmq_fx.allocate import allocate
from cgmq_fx.errors import TrainingError, UsageError
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.sensitivity import MEAN, predicted_loss

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

    Where growing would exceed a budget the gate stays in its band, so that a model that has met its
    budgets once goes on meeting them.

    Attributes:
        falling: size of the direction while unsatisfied, from mean gradient and mean size of a tensor.
        growing: likewise while satisfied.
    """

    falling: Callable[[float, float], float]
    growing: Callable[[float, float], float]

    def update(self, prepared: PreparedModule, progress: float) -> None:
        """See `Direction.update`."""
        accounting = prepared.plan.accounting
        learned = [index for index, site in enumerate(accounting.sites) if site.learned]
        bits = list(prepared.bit_widths.values())
        if not learned:
            return
        rule = self.growing if accounting.is_satisfied(bits) else self.falling
        sizes = [self._size(prepared, index, rule) for index in learned]
        if rule is self.falling:
            self._fall(prepared, learned, sizes)
        else:
            self._grow(prepared, learned, sizes, bits)

    def _size(
        self, prepared: PreparedModule, index: int, rule: Callable[[float, float], float]
    ) -> float:
        quantizer = prepared.quantizers[prepared.plan.accounting.sites[index].name]
        gradient = abs(float(prepared.plan.statistics[index, MEAN]))
        try:
            size = quantizer.mean_abs
        except TrainingError:  # no sample of the tensor is kept
            size = float(quantizer.base.detach().abs().mean())
        return rule(gradient, size)

    def _fall(self, prepared: PreparedModule, learned: Sequence[int], sizes: list[float]) -> None:
        median = max(statistics.median(sizes), _TINY)
        for index, size in zip(learned, sizes, strict=True):
            pace = min(max(size / median, _SLOWEST), 1 / _SLOWEST)
            _move_gate(prepared, index, -_STRIDE * pace)

    def _grow(
        self,
        prepared: PreparedModule,
        learned: Sequence[int],
        sizes: list[float],
        bits: list[int],
    ) -> None:
        accounting = prepared.plan.accounting
        largest = max(*sizes, _TINY)
        for size, index in sorted(zip(sizes, learned, strict=True), reverse=True):
            quantizer = prepared.quantizers[accounting.sites[index].name]
            before = quantizer.gate.clone()
            _move_gate(prepared, index, _STRIDE * size / largest)
            wider = [*bits]
            wider[index] = quantizer.bit_width
            if wider[index] in accounting.sites[index].allowed and accounting.is_satisfied(wider):
                bits[index] = wider[index]
            else:
                quantizer.gate.copy_(before)
                quantizer.update_from_gate()


def _move_gate(prepared: PreparedModule, index: int, by: float) -> None:
    site = prepared.plan.accounting.sites[index]
    quantizer = prepared.quantizers[site.name]
    bands = [quantizer.spec.widths.index(bits) for bits in site.allowed]
    gate = float(quantizer.gate) + by
    quantizer.gate.fill_(min(max(gate, bands[0] + 0.5), bands[-1] + 1.0))
    quantizer.update_from_gate()


@dataclass(frozen=True)
class FisherDirection:
    """Every check solves for the bit-widths of least predicted loss within a falling bound.

    The bound falls geometrically from the widest bit-widths' cost to the budget, so that widths go from 32 over 8
    and 4 to 2 bits and the weights follow. The predicted loss is the Fisher information of each tensor,
    as its gradients show it, times its rounding error.
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
        chosen = allocate(accounting, predicted_loss(prepared), start=start, limits=limits)
        prepared.set_bit_widths(chosen)


def _between(widest: Fraction, limit: Fraction, progress: float) -> Fraction:
    if progress >= 1 or widest <= limit:
        return limit
    return max(limit, Fraction(float(limit) * (float(widest) / float(limit)) ** (1 - progress)))


def _inverse(value: float) -> float:
    return 1.0 / (value + _TINY)


_DIRECTIONS: dict[str, Direction] = {
    "fisher": FisherDirection(),
    "dir_1": GateDirection(lambda g, _: _inverse(g), lambda g, _: g),
    "dir_2": GateDirection(lambda g, a: _inverse(g + a), lambda g, a: g + a),
    "dir_3": GateDirection(lambda g, a: _inverse(g) + _inverse(a), lambda g, a: g + a),
}


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
