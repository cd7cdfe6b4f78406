"""Peak activation memory: the largest set of activation tensors that inference holds at one time.

A network's activations are buffers, each with the steps of the schedule between which it is live.
The peak is the largest sum of sizes of buffers that are live at one step. It rises with every
bit-width, so that the lowest bit-widths give the floor. All sizes are whole numbers of bits.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cgmq_fx.cost.floor import Lowest
from cgmq_fx.cost.mixture import Mixture, WidthIndex, has_mixture
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.terms import Term
from cgmq_fx.cost.totals import MAX_INT64_SUM
from cgmq_fx.errors import UsageError

#: What budgets call the resource.
PEAK_ACTIVATION_MEMORY = "peak_activation_memory"
_BITS_PER_BYTE = 8
_FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory that holds one activation tensor, for one sample.

    Attributes:
        name: the operation that makes the tensor.
        elements: number of its elements.
        first: the step that makes it.
        last: the last step that reads it; not before `first`.
        site: the site whose bit-width an element has, None where `bits` says it.
        bits: bits of an element where no site has them: 32 for floating point.
        is_copy: it is a rounded copy of a tensor that is kept in float too; the float network that
            "100 %" means has no such copies.
    """

    name: str
    elements: int
    first: int
    last: int
    site: int | None = None
    bits: int = _FLOAT_BITS
    is_copy: bool = False


class PeakMemory:
    """The largest sum of sizes of buffers that are live at one step, in bytes.

    Attributes:
        name: what budgets call it.
        unit: unit of its amounts.
        widths: the bit-widths that a site may have, rising.
        num_sites: number of learned bit-widths.
        buffers: the tensors.
        terms: the size of each of `buffers`, by its bit-width.
        scale: amounts are whole numbers of 1 / `scale` of the unit.
        reference: the peak of the float network.
        supported: for each site the bit-widths that memory can hold: all.
        rows: none, since no table prices memory.
    """

    name = PEAK_ACTIVATION_MEMORY
    unit = "byte"
    scale = _BITS_PER_BYTE
    rows: tuple[Row | None, ...] = ()

    def __init__(self, buffers: Sequence[Buffer], num_sites: int, widths: tuple[int, ...]) -> None:
        self.widths = widths
        self.num_sites = num_sites
        self.buffers = tuple(buffers)
        self.terms = tuple(_term(buffer, widths) for buffer in self.buffers)
        self.supported = (widths,) * num_sites
        # The site of each buffer and its size by the width; without a site it is always the same.
        self._sizes = [
            (-1, [b.elements * b.bits])
            if b.site is None
            else (b.site, [b.elements * width for width in widths])
            for b in self.buffers
        ]
        # The peak is at a step that makes a buffer: at all others buffers only go.
        moments = sorted({buffer.first for buffer in self.buffers})
        place = {step: position for position, step in enumerate(moments)}
        self._spans = [
            (place[buffer.first], bisect_right(moments, buffer.last)) for buffer in self.buffers
        ]
        self._num_moments = len(moments)
        self._touching: list[list[int]] = [[] for _ in range(num_sites)]
        for number, buffer in enumerate(self.buffers):
            if buffer.site is not None:
                self._touching[buffer.site].append(number)
        self._kept: _Profile | None = None
        self._build_gather()
        sizes = [0 if b.is_copy else b.elements * _float_bits(b) for b in self.buffers]
        self.reference = Fraction(max(self._profile_of(sizes), default=0), self.scale)

    def _profile_of(self, sizes: Sequence[int]) -> list[int]:
        """Return the bits that are live at each moment, given the bits of each buffer."""
        changes = [0] * (self._num_moments + 1)
        for (start, stop), size in zip(self._spans, sizes, strict=True):
            changes[start] += size
            changes[stop] -= size
        return list(accumulate(changes[:-1]))

    def _profile(self, width_index: Sequence[int]) -> "_Profile":
        """Return the profile at these widths; that of the last call is kept."""
        if self._kept is not None and self._kept.width_index == width_index:
            return self._kept
        at = list(map(int, width_index))
        if len(at) != self.num_sites:
            raise UsageError(
                f"resource {self.name!r} has {self.num_sites} sites, widths were given for "
                f"{len(at)}"
            )
        if self._kept is None or self._kept.width_index != at:
            live = self._profile_of(
                [sizes[at[site] if site >= 0 else 0] for site, sizes in self._sizes]
            )
            self._kept = _Profile(at, live)
        return self._kept

    def _build_gather(self) -> None:
        """Lay the sizes of all buffers end to end; a buffer's stands at offset + index * stride."""
        cells = [sizes for _, sizes in self._sizes]
        self._fits_int64 = sum(map(max, cells)) < MAX_INT64_SUM
        if not self._fits_int64:
            return
        lengths = torch.tensor([len(sizes) for sizes in cells], dtype=torch.int64)
        self._flat = torch.tensor([size for sizes in cells for size in sizes], dtype=torch.int64)
        self._offset = lengths.cumsum(0) - lengths
        self._site = torch.tensor([max(site, 0) for site, _ in self._sizes], dtype=torch.int64)
        self._stride = (lengths > 1).to(torch.int64)
        self._start, self._stop = torch.tensor(self._spans, dtype=torch.int64).reshape(-1, 2).T

    def _peak_of(self, width_index: Tensor) -> int:
        """Return the peak in bits, for all buffers at once."""
        index = width_index.to("cpu", torch.int64)
        sizes = self._flat[self._offset + index[self._site] * self._stride]
        changes = torch.zeros(self._num_moments + 1, dtype=torch.int64)
        changes.index_add_(0, self._start, sizes).index_add_(0, self._stop, -sizes)
        return int(changes.cumsum(0).max())

    def total_scaled(self, width_index: Tensor | Sequence[int]) -> int:
        """Return the peak in bits."""
        whole = isinstance(width_index, Tensor) and len(width_index) == self.num_sites
        if whole and self._fits_int64 and self.num_sites:
            assert isinstance(width_index, Tensor)
            return self._peak_of(width_index)
        return self._profile(list(map(int, width_index))).peak

    def total(self, width_index: Tensor | Sequence[WidthIndex]) -> Fraction:
        """Return the peak, for one sample."""
        return Fraction(self.total_scaled(_without_mixtures(width_index)), self.scale)

    def costs(self, width_index: Sequence[WidthIndex]) -> list[Fraction]:
        """Return the size of each buffer that is live at the (first) peak, 0 for all others.

        They add up to `total`.
        """
        profile = self._profile(_without_mixtures(width_index))
        if not profile.live:
            return []
        peak = profile.live.index(profile.peak)
        return [
            Fraction(term.cost(profile.width_index) if start <= peak < stop else 0, self.scale)
            for term, (start, stop) in zip(self.terms, self._spans, strict=True)
        ]

    def bound_scaled(self, bound: Fraction) -> int:
        """Return the most bits that are within `bound`."""
        return bound.numerator * self.scale // bound.denominator

    def delta_scaled(self, site: int, to: int, width_index: Sequence[int]) -> int:
        """Return by how many bits the peak changes when `site` takes the width of index `to`."""
        profile = self._profile(width_index)
        start, after = self._changed(profile, site, to)
        if not after:
            return 0
        peak = max(max(after), profile.before[start], profile.after[start + len(after)])
        return peak - profile.peak

    def delta(self, site: int, to: int, width_index: Sequence[int]) -> Fraction:
        """Return by how much the peak changes when `site` takes the width of index `to`."""
        return Fraction(self.delta_scaled(site, to, width_index), self.scale)

    def relief(self, site: int, to: int, width_index: Sequence[int], limit: int) -> int:
        """Return how much of what exceeds `limit` a move takes away, summed over all moments.

        Where several moments exceed the limit, or several tensors must shrink, no single move may
        lower the peak. Each that brings it nearer to the limit has relief.
        """
        profile = self._profile(width_index)
        start, after = self._changed(profile, site, to)
        before = profile.live[start : start + len(after)]
        return sum(
            max(0, old - limit) - max(0, new - limit)
            for old, new in zip(before, after, strict=True)
        )

    def _changed(self, profile: "_Profile", site: int, to: int) -> tuple[int, list[int]]:
        """Return the first moment that a move of `site` concerns, and the bits live from there."""
        here = profile.width_index[site]
        touched = self._touching[site]
        if to == here or not touched:
            return 0, []
        start = min(self._spans[number][0] for number in touched)
        stop = max(self._spans[number][1] for number in touched)
        live = profile.live[start:stop]
        for number in touched:
            costs = self.terms[number].costs
            change = (costs[to][0] or 0) - (costs[here][0] or 0)
            for moment in range(self._spans[number][0] - start, self._spans[number][1] - start):
                live[moment] += change
        return start, live

    def lowest(self, allowed: Sequence[tuple[int, ...]]) -> Lowest:
        """Return the smallest peak, and the widths that reach it: the lowest.

        Args:
            allowed: the allowed bit-widths of each site (bits, not indices).

        Raises:
            UsageError: a site has none, or one that is not among `widths`.
        """
        empty = [site for site, choices in enumerate(allowed) if not choices]
        unknown = sorted({width for choices in allowed for width in choices} - set(self.widths))
        if empty or unknown:
            raise UsageError(
                f"sites {empty} have no allowed bit-width and {unknown} are not among "
                f"{list(self.widths)}; allow at least one of these for each site"
            )
        index = tuple(self.widths.index(min(choices)) for choices in allowed)
        return Lowest(self.total_scaled(index), index, exact=True)

    def floor(self, allowed: Sequence[tuple[int, ...]]) -> Fraction:
        """Return the smallest peak that the allowed bit-widths reach."""
        return Fraction(self.lowest(allowed).scaled, self.scale)


def _without_mixtures(width_index: Any) -> Any:
    """Return the indices of widths with those of weights that differ within as the widest.

    No buffer has the widths of such a weight.
    """
    if not has_mixture(width_index):
        return width_index
    return [item.widest if isinstance(item, Mixture) else item for item in width_index]


class _Profile:
    """What is live at each moment for one choice of widths, and the maxima on either side."""

    def __init__(self, width_index: list[int], live: list[int]) -> None:
        self.width_index = width_index
        self.live = live
        self.peak = max(live, default=0)
        self.before = [0, *accumulate(live, max)]
        self.after = [0, *accumulate(reversed(live), max)][::-1]


def _term(buffer: Buffer, widths: tuple[int, ...]) -> Term:
    if buffer.site is None:
        return Term(buffer.name, (None, None), ((buffer.elements * buffer.bits,),))
    costs = tuple((buffer.elements * width,) for width in widths)
    return Term(buffer.name, (buffer.site, None), costs)


def _float_bits(buffer: Buffer) -> int:
    return buffer.bits if buffer.site is None else _FLOAT_BITS
