"""What a prepared network costs at any choice of bit-widths, exactly, and what bounds it."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from cgmq_fx.cost.operation import BoundOperation
from cgmq_fx.cost.totals import SumResource
from cgmq_fx.errors import BudgetError
from cgmq_fx.units import format_amount

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
    """

    name: str
    role: str
    allowed: tuple[int, ...]
    learned: bool
    elements: int


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

    Bit-widths are given as one number of bits for each site, in the order of `sites`.

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
    resources: Mapping[str, SumResource]
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
        """Return the positions of `bits` in `widths`."""
        place = {width: position for position, width in enumerate(self.widths)}
        return [place[width] for width in bits]

    def totals(self, bits: Sequence[int]) -> dict[str, Fraction]:
        """Return the exact total of every resource, in its unit."""
        index = self.index(bits)
        return {name: resource.total(index) for name, resource in self.resources.items()}

    def violations(self, bits: Sequence[int]) -> dict[str, Fraction]:
        """Return by how much each budget that is not met is exceeded."""
        index = self.index(bits)
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
        allowed = [
            tuple(bits for bits in site.allowed if bits <= top)
            for site, top in zip(self.sites, ceiling, strict=True)
        ]
        cheapest = (self._cheapest(name, allowed) for name in limits)
        for bits in itertools.chain([self.lowest_bits()], cheapest):
            index = self.index(bits)
            if all(self.resources[name].total(index) <= limits[name] for name in limits):
                return bits
        return None

    def _cheapest(self, name: str, allowed: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(self.widths[i] for i in self.resources[name].lowest(allowed).width_index)

    def check_feasible(self) -> None:
        """Refuse budgets that no allowed choice of bit-widths meets.

        Raises:
            BudgetError: with the floor of each such budget, the operations that make it, and the
                smallest feasible figure.
        """
        allowed = [site.allowed for site in self.sites]
        faults = [
            self._infeasible(name, limit, floor)
            for name, limit in self.limits.items()
            if (floor := self.resources[name].floor(allowed)) > limit
        ]
        ceiling = [choices[-1] for choices in allowed]
        if not faults and self.reachable_bits(self.limits, ceiling) is None:
            over = ", ".join(sorted(self.violations(self.lowest_bits())))
            faults.append(
                f"each budget can be met alone, but no bit-widths were found that meet all at "
                f"once: the lowest exceed {over}; raise one of these budgets"
            )
        if faults:
            raise BudgetError("\n".join(faults))

    def _infeasible(self, name: str, limit: Fraction, floor: Fraction) -> str:
        resource = self.resources[name]
        share = 100 * floor / resource.reference if resource.reference else Fraction(0)
        bits = self._cheapest(name, [site.allowed for site in self.sites])
        costs = resource.costs(self.index(bits))
        makers = sorted(zip(costs, resource.terms, strict=True), key=lambda pair: -pair[0])[:5]
        listed = "; ".join(
            f"{term.name} ({_percent(cost, floor)} of the floor{self._bits_text(term.sites, bits)})"
            for cost, term in makers
            if cost
        )
        return (
            f"budget {name} = {format_amount(limit, resource.unit, 6)} is below the floor "
            f"{format_amount(floor, resource.unit, 6)} ({float(share):.4f} % of the reference), "
            f"the least that the allowed bit-widths cost. The floor is made by: {listed}. "
            f"Ways out: a budget of at least {_ceil_percent(share)} %{self._unlocks()}."
        )

    def _bits_text(self, sites: Sequence[int | None], bits: Sequence[int]) -> str:
        parts = [
            f"{self.sites[site].name} at {bits[site]} bits"
            for site in dict.fromkeys(sites)
            if site is not None
        ]
        return f", {' x '.join(parts)}" if parts else ""

    def _unlocks(self) -> str:
        fixed = [site.name for site in self.sites if not site.learned]
        narrow = min((site.allowed[0] for site in self.sites), default=0)
        ways = []
        if fixed:
            ways.append(
                f"a learned bit-width for the inputs {fixed} (prepare(learn_input_bits=True))"
            )
        if narrow > 2:
            ways.append(
                f"narrower bit-widths than {narrow} (prepare(widths=...) or the cost table)"
            )
        left_float = [entry.name for entry in self.ledger if entry.status == "float"][:5]
        if left_float:
            ways.append(f"quantizing what stays float ({', '.join(left_float)})")
        return "".join(f"; {way}" for way in ways)


def _percent(part: Fraction, whole: Fraction) -> str:
    return f"{float(100 * part / whole):.1f} %" if whole else "0 %"


def _ceil_percent(share: Fraction) -> str:
    """Return `share` in percent rounded up to four digits, so that what is shown is feasible."""
    scaled = -(-share.numerator * 10_000 // share.denominator)
    return f"{scaled / 10_000:.4f}"
