"""Which units of one weight are narrowed first: its bit-widths from the narrowest to the widest.

A rung gives every unit the width of least rounding error plus price times bits. Each is the best
that any assignment with so many bits can be, so that an allocation has to choose a rung of every
weight, not a width of every unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
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
        errors: squared rounding errors, summed over a unit, shape (widths, units).
        widths: their bit-widths, rising, none of them 32.
        elements: of the weight.
        has_float: whether the weight may stay float, as a whole.
    """

    def __init__(
        self, errors: Tensor, widths: Sequence[int], elements: int, *, has_float: bool
    ) -> None:
        self.errors, self.widths, self.elements = errors, tuple(widths), elements
        self._bits = torch.tensor(self.widths, dtype=errors.dtype, device=errors.device)
        self._has_float = has_float
        self._is_refined = False
        self.rungs = self._rungs(self._prices())

    def refine(self, place: int) -> bool:
        """Replace the rungs, once, by closer ones around that at `place`; tell whether it did."""
        near = self.rungs[max(0, place - 1) : place + 2]
        prices = [rung.price for rung in near if rung.price]
        if self._is_refined or len(prices) < 2:
            return False
        steps = np.geomspace(max(prices), min(prices), NUM_RUNGS)
        self.rungs, self._is_refined = self._rungs([float(price) for price in steps]), True
        return True

    def bits(self, place: int) -> int:
        """Return the bit-widths of the rung at `place`."""
        rung = self.rungs[place]
        if rung.price is None:
            (bits,) = rung.counts
            return bits
        index = self._choice(rung.price)
        table = torch.tensor(self.widths, dtype=torch.uint8)
        return bits_of(table[index.cpu()].numpy().tobytes())

    def loss_of_error(self, losses: Mapping[int, float]) -> float:
        """Return what loss a mean squared error of 1 is, by losses at widths of the whole weight.

        The factor that fits them best, in the sense of least squares.
        """
        errors = {width: self._uniform(place).error for place, width in enumerate(self.widths)}
        squares = sum(error**2 for error in errors.values())
        met = sum(losses[width] * error for width, error in errors.items())
        return met / squares if squares else 0.0

    def at_most(self, bits: int) -> int:
        """Return the place of the widest rung whose mean is not above that of `bits`; else 0."""
        limit = float(mean_bits(bits))
        fits = [place for place, rung in enumerate(self.rungs) if rung.mean_bits <= limit]
        return fits[-1] if fits else 0

    def _prices(self) -> list[float]:
        """Return prices at which units change their width, falling."""
        if len(self.widths) < 2:
            return []
        stride = -(-self.errors.shape[1] // _QUANTILE_UNITS)
        sample = self.errors[:, ::stride]
        slopes = (sample[:-1] - sample[1:]) / (self._bits[1:] - self._bits[:-1]).unsqueeze(1)
        slopes = slopes[slopes > 0].flatten().double()
        if not slopes.numel():
            return []
        at = torch.linspace(1, 0, NUM_RUNGS, dtype=torch.float64, device=slopes.device)
        ordered = slopes.sort().values
        return [*ordered[(at * (len(ordered) - 1)).long()].tolist(), 0.0]

    def _rungs(self, prices: Sequence[float]) -> list[Rung]:
        found = [self._uniform(0), *map(self._priced, prices), self._uniform(-1)]
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
        error = float(self.errors[place].sum(dtype=torch.float64)) / self.elements
        return Rung({self.widths[place]: 1}, error, None)

    def _priced(self, price: float) -> Rung:
        index = self._choice(price)
        error = self.errors.gather(0, index.unsqueeze(0)).sum(dtype=torch.float64)
        counts = torch.bincount(index, minlength=len(self.widths)).tolist()
        present = {bits: n for bits, n in zip(self.widths, counts, strict=True) if n}
        is_uniform = len(present) == 1
        return Rung(
            dict.fromkeys(present, 1) if is_uniform else present,
            float(error) / self.elements,
            None if is_uniform else price,
        )

    def _choice(self, price: float) -> Tensor:
        return (self.errors + price * self._bits.unsqueeze(1)).argmin(0)
