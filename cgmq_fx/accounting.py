"""What a prepared network costs at any choice of bit-widths, exactly, and what bounds it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from cgmq_fx.cost.mixture import Mixture, WidthIndex
from cgmq_fx.cost.operation import BoundOperation
from cgmq_fx.cost.totals import Resource
from cgmq_fx.unit_bits import UnitBits

Coverage = Literal["quantized", "float", "free"]


@dataclass(frozen=True)
class Site:
    """One quantizer, as the accounting sees it.

    Attributes:
        name: its place in ``prepared.quantizers``.
        role: ``weight``, ``activation`` or ``input``.
        allowed: the bit-widths it may take, rising.
        learned: False where its bit-width is fixed.
        elements: elements of its tensor, for one sample.
        chosen_by: what messages call the selectors of an override that speaks here; "" for none.
        decisive: with its tensor at 0 bits an output is a constant.
    """

    name: str
    role: str
    allowed: tuple[int, ...]
    learned: bool
    elements: int
    chosen_by: str = ""
    decisive: bool = False


@dataclass(frozen=True)
class LedgerEntry:
    """Whether one operation is quantized and priced, and why not where it is not.

    Attributes:
        name: place of the operation.
        op: its class.
        macs: its multiply-accumulates for one sample.
        status: ``quantized``; ``float``: it has MACs and runs in float; ``free``: it costs nothing
            in any table of the call.
        reason: why it is not quantized, or not priced.
        prices: pairs of table and the row that prices it.
    """

    name: str
    op: str
    macs: int
    status: Coverage
    reason: str
    prices: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Accounting:
    """Operations, sites, resources and bounds of one network; a value that never changes.

    Bit-widths are given as one number of bits, or `UnitBits`, for each site, in the order of
    `sites`.

    Attributes:
        sites: the quantizers.
        operations: every operation and where its bit-widths come from.
        resources: costs by name.
        limits: the bound on each resource that has one, in the resource's unit.
        ledger: coverage, one entry for each operation.
        widths: all bit-widths that any site may have, rising.
    """

    sites: tuple[Site, ...]
    operations: tuple[BoundOperation, ...]
    resources: Mapping[str, Resource]
    limits: Mapping[str, Fraction]
    ledger: tuple[LedgerEntry, ...]
    widths: tuple[int, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Accounting":
        return self

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the sites, in order."""
        return tuple(site.name for site in self.sites)

    def index(self, bits: Sequence[int]) -> list[int]:
        """Return the positions of `bits` in `widths`; of `UnitBits` that of the widest."""
        place = self._place
        return [place[int(width)] for width in bits]

    def mixed_index(self, bits: Sequence[int]) -> list[WidthIndex]:
        """Return the positions of `bits` in `widths`; of `UnitBits` all of them, with counts."""
        place = self._place
        return [
            Mixture.of(width.counts, place) if isinstance(width, UnitBits) else place[width]
            for width in bits
        ]

    @property
    def _place(self) -> dict[int, int]:
        return {width: position for position, width in enumerate(self.widths)}

    def totals(self, bits: Sequence[int]) -> dict[str, Fraction]:
        """Return the exact total of every resource, in its unit."""
        index = self.mixed_index(bits)
        return {name: resource.total(index) for name, resource in self.resources.items()}

    def violations(self, bits: Sequence[int]) -> dict[str, Fraction]:
        """Return by how much each budget that is not met is exceeded."""
        index = self.mixed_index(bits)
        over = {
            name: self.resources[name].total(index) - limit for name, limit in self.limits.items()
        }
        return {name: excess for name, excess in over.items() if excess > 0}

    def is_satisfied(self, bits: Sequence[int]) -> bool:
        """Tell whether every budget is met."""
        return not self.violations(bits)

    def lowest_bits(self) -> tuple[int, ...]:
        """Return the lowest allowed bit-width of every site."""
        return tuple(site.allowed[0] for site in self.sites)

    def reachable_bits(
        self, limits: Mapping[str, Fraction], ceiling: Sequence[int]
    ) -> tuple[int, ...] | None:
        """Return bit-widths within every limit that no site exceeds, or None where none were found.

        With costs that rise with the bits, or with one limit, some are found if there are any. Else
        the lowest are tried, and those at which each limited resource alone costs least.

        Args:
            limits: bounds by resource.
            ceiling: the widest bit-width of each site.
        """
        for bits in self.candidate_bits(limits, ceiling):
            index = self.index(bits)
            if all(self.resources[name].total(index) <= limits[name] for name in limits):
                return bits
        return None

    def candidate_bits(
        self, names: Iterable[str], ceiling: Sequence[int]
    ) -> Iterator[tuple[int, ...]]:
        """Yield the lowest bit-widths, then those at which each resource of `names` costs least."""
        yield self.lowest_bits()
        allowed = [
            tuple(bits for bits in site.allowed if bits <= top)
            for site, top in zip(self.sites, ceiling, strict=True)
        ]
        for name in names:
            yield self.cheapest_bits(name, allowed)

    def cheapest_bits(self, name: str, allowed: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the bit-widths, among `allowed` of each site, at which a resource costs least."""
        return tuple(self.widths[i] for i in self.resources[name].lowest(allowed).width_index)
