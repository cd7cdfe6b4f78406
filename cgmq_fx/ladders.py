"""Which units of one weight are narrowed first: its bit-widths from the narrowest to the widest.

A rung gives every unit the width of least rounding error plus price times bits. Each is the best
that any assignment with so many bits can be, so that an allocation has to choose a rung of every
weight, not a width of every unit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.unit_bits import bits_of, mean_bits

#: Rungs between the narrowest and the widest.
NUM_RUNGS = 24
_QUANTILE_UNITS = 2**16


@dataclass(frozen=True)
class Rung:
    """One assignment of widths to the units of a weight.

    Attributes:
        counts: how many units have each bit-width.
        error: mean squared rounding error of an element.
        price: what a bit costs, in squared error; None where all units have one width.
    """

    counts: Mapping[int, int]
    error: float
    price: float | None

    @property
    def mean_bits(self) -> float:
        """The mean bit-width of a unit."""
        return sum(bits * count for bits, count in self.counts.items()) / sum(self.counts.values())


class Ladder:
    """The rungs of one weight, by rising mean bit-width.

    Args:
        errors: squared rounding errors, summed over a unit, float32 of shape (widths, units).
        widths: their bit-widths, rising, none of them 32.
        elements: of the weight.
        has_float: whether the weight may stay float, as a whole.
    """

    def __init__(
        self, errors: Tensor, widths: Sequence[int], elements: int, *, has_float: bool
    ) -> None:
        self.widths, self.elements = tuple(widths), elements
        self._has_float, self._is_refined = has_float, False
        self._num_units = errors.shape[1]
        self._totals = errors.sum(1, dtype=torch.float64).tolist()
        #: What each step from one width to the next takes off the error of each unit.
        self._gains = errors[:-1] - errors[1:]
        #: Below which price a unit takes at least the width of each place but the first.
        self._thresholds = _thresholds(errors, self.widths)
        self.rungs = self._rungs(self._prices())

    def refine(self, place: int) -> bool:
        """Replace the rungs, once, by closer ones around that at `place`; tell whether it did."""
        near = self.rungs[max(0, place - 1) : place + 2]
        prices = [rung.price for rung in near if rung.price]
        if self._is_refined or len(prices) < 2:
            return False
        logs = torch.tensor([min(prices), max(prices)], dtype=torch.float64).log()
        steps = torch.linspace(float(logs[0]), float(logs[1]), NUM_RUNGS, dtype=torch.float64)
        self.rungs, self._is_refined = self._rungs(steps.exp().float()), True
        return True

    def bits(self, place: int) -> int:
        """Return the bit-widths of the rung at `place`."""
        rung = self.rungs[place]
        if rung.price is None:
            (bits,) = rung.counts
            return bits
        index = (self._thresholds > rung.price).sum(0)
        table = torch.tensor(self.widths, dtype=torch.uint8)
        return bits_of(table[index.cpu()].numpy().tobytes())

    def loss_of_error(self, losses: Mapping[int, float]) -> float:
        """Return what loss a mean squared error of 1 is, by losses at widths of the whole weight.

        The factor that fits them best, in the sense of least squares; infinite ones are left out.
        """
        met = squares = 0.0
        for bits, total in zip(self.widths, self._totals, strict=True):
            error = total / self.elements
            if losses[bits] < math.inf:
                met += losses[bits] * error
                squares += error**2
        return met / squares if squares else 0.0

    def at_most(self, bits: int) -> int:
        """Return the place of the widest rung whose mean is not above that of `bits`; else 0."""
        limit = float(mean_bits(bits))
        fits = [place for place, rung in enumerate(self.rungs) if rung.mean_bits <= limit]
        return fits[-1] if fits else 0

    def _prices(self) -> Tensor:
        """Return prices at which units change their width, rising."""
        stride = -(-self._num_units // _QUANTILE_UNITS)
        met = self._thresholds[:, ::stride].flatten()
        ordered = met[(met > 0) & met.isfinite()].sort().values
        if not len(ordered):
            return ordered
        places = torch.linspace(0, len(ordered) - 1, NUM_RUNGS, dtype=torch.float64)
        chosen = ordered[places.long().to(ordered.device)]
        return torch.cat((ordered.new_zeros(1), chosen))

    def _rungs(self, prices: Tensor) -> list[Rung]:
        found = [self._uniform(0), *self._priced(prices), self._uniform(-1)]
        if self._has_float:
            found.append(Rung({FLOAT_WIDTH: 1}, 0.0, None))
        distinct: list[Rung] = []
        for rung in sorted(found, key=lambda item: (item.mean_bits, item.error)):
            is_new = not distinct or rung.counts != distinct[-1].counts
            # What costs more bits has to have less error.
            if is_new and (rung.price is None or rung.error < distinct[-1].error):
                distinct.append(rung)
        return distinct

    def _uniform(self, place: int) -> Rung:
        return Rung({self.widths[place]: 1}, self._totals[place] / self.elements, None)

    def _priced(self, prices: Tensor) -> list[Rung]:
        """Return a rung for each of the prices, which rise, in one pass over the units."""
        prices = prices.to(self._thresholds)
        reaching, gained = [], []
        for threshold, gain in zip(self._thresholds, self._gains, strict=True):
            above = torch.bucketize(threshold, prices)  # how many prices are below it
            reaching.append(_from_above(torch.bincount(above, minlength=len(prices) + 1)))
            weights = gain.to(torch.float64)
            gained.append(_from_above(torch.bincount(above, weights, len(prices) + 1)))
        rungs = []
        for place, price in enumerate(prices.tolist()):
            at_least = [self._num_units, *(int(many[place]) for many in reaching), 0]
            counts = {
                bits: more - fewer
                for bits, (more, fewer) in zip(self.widths, pairwise(at_least), strict=True)
                if more > fewer
            }
            error = self._totals[0] - sum(float(gain[place]) for gain in gained)
            if len(counts) > 1:
                rungs.append(Rung(counts, max(0.0, error) / self.elements, price))
        return rungs


def _thresholds(errors: Tensor, widths: Sequence[int]) -> Tensor:
    """Return below which price each unit takes at least the width of each place but the first.

    The wider width j beats the narrower i below the price (error i - error j) / (bits j - bits i).
    """
    slopes = {
        (i, j): (errors[i] - errors[j]) / (widths[j] - widths[i])
        for j in range(len(widths))
        for i in range(j)
    }
    found: list[Tensor] = []
    for place in range(1, len(widths)):
        best: Tensor | None = None
        for j in range(place, len(widths)):
            worst = slopes[0, j]
            for i in range(1, place):
                worst = torch.minimum(worst, slopes[i, j])
            best = worst if best is None else torch.maximum(best, worst)
        assert best is not None
        # What rounding makes of nested sets is made nested again.
        found.append(best if not found else torch.minimum(best, found[-1]))
    return torch.stack(found) if found else errors[:0]


def _from_above(counts: Tensor) -> Tensor:
    """Return for each price the sum over what is above it, from counts by how many are below."""
    return counts.flip(0).cumsum(0).flip(0)[1:]
