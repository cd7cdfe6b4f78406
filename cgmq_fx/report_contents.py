"""What a report says, as frozen values: integers, names and exact fractions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Status = Literal["quantized", "float", "free"]


@dataclass(frozen=True)
class ReportRow:
    """One operation, for one sample.

    Attributes:
        name: its place in the model.
        op: its operation class.
        target: what is called, in full.
        macs: its multiply-accumulates.
        weight_bits: bit-width of its weight; None where it has none. 32 is floating point.
        activation_bits: bit-width of its input activation; None where it has none.
        lhs_bits: bit-width of the first of two activations; None where it has no two.
        rhs_bits: bit-width of the second.
        cost: its exact cost by resource, in the resource's unit.
        budget_share: the part of each budget that its cost takes, by resource.
        status: ``quantized``; ``float``: it computes in floating point; ``free``: it has neither
            multiply-accumulates nor a price.
        reason: why it is not quantized; empty where it is.
        unpriced_in: resources in which it has no price, though it has multiply-accumulates.
    """

    name: str
    op: str
    target: str
    macs: int
    weight_bits: int | None
    activation_bits: int | None
    lhs_bits: int | None
    rhs_bits: int | None
    cost: Mapping[str, Fraction]
    budget_share: Mapping[str, Fraction]
    status: Status
    reason: str
    unpriced_in: tuple[str, ...]

    @property
    def bits(self) -> tuple[int, ...]:
        """Its bit-widths, in the order of the fields."""
        fields = (self.weight_bits, self.activation_bits, self.lhs_bits, self.rhs_bits)
        return tuple(width for width in fields if width is not None)


@dataclass(frozen=True)
class TensorRow:
    """One tensor that a resource counts: a stored weight, or an activation live at the peak.

    Attributes:
        name: of a weight the site of its quantizer, or ``other parameters`` for all that stay
            float; of an activation the operation that makes it.
        elements: number of its elements.
        bits: bit-width of an element.
        cost: its exact cost by resource, in the resource's unit.
        budget_share: the part of each budget that its cost takes, by resource.
        role: what it is.
    """

    name: str
    elements: int
    bits: int
    cost: Mapping[str, Fraction]
    budget_share: Mapping[str, Fraction]
    role: Literal["weight", "activation"] = "weight"


@dataclass(frozen=True)
class ResourceSummary:
    """The total of one resource, and what bounds it.

    Attributes:
        name: what budgets call it.
        unit: unit of all its amounts.
        total: the exact sum of its rows.
        reference: the total at the bit-widths that "100 %" means.
        budget: the upper bound; None where it has none.
        budget_text: the bound as it was asked for, such as ``0.6 %``; empty where there is none.
        convention: what counts and what does not, and where the prices come from.
    """

    name: str
    unit: str
    total: Fraction
    reference: Fraction
    budget: Fraction | None
    budget_text: str
    convention: tuple[str, ...]

    @property
    def is_satisfied(self) -> bool:
        """Whether the total is within the budget, if there is one."""
        return self.budget is None or self.total <= self.budget

    @property
    def relative(self) -> Fraction | None:
        """The total as a part of the reference; None where the reference is nothing."""
        return self.total / self.reference if self.reference else None


@dataclass(frozen=True)
class ReasonGroup:
    """Operations that have their status for the same reason.

    Attributes:
        status: of all of them.
        reason: the reason; empty for quantized ones.
        counts: how many there are of each kind of call, such as ``{"relu": 17}``.
        macs: their multiply-accumulates together.
        names: their places in the model.
    """

    status: Status
    reason: str
    counts: Mapping[str, int]
    macs: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Coverage:
    """Which operations are quantized, which stay float, which are free, and why.

    Attributes:
        entries: every operation.
    """

    entries: tuple[ReportRow, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole model."""
        return sum(entry.macs for entry in self.entries)

    def count(self, status: Status) -> int:
        """Return how many operations have `status`."""
        return sum(entry.status == status for entry in self.entries)

    def share(self, status: Status) -> Fraction:
        """Return the part of all multiply-accumulates that operations of `status` do."""
        return self._part(entry.macs for entry in self.entries if entry.status == status)

    @property
    def unpriced(self) -> dict[str, Fraction]:
        """The part of all multiply-accumulates without a price, by resource where there are any."""
        names = dict.fromkeys(name for entry in self.entries for name in entry.unpriced_in)
        return {
            name: self._part(entry.macs for entry in self.entries if name in entry.unpriced_in)
            for name in names
        }

    def groups(self, status: Status) -> tuple[ReasonGroup, ...]:
        """Return the operations of `status` by reason, those with most work first."""
        by_reason: dict[str, list[ReportRow]] = {}
        for entry in self.entries:
            if entry.status == status:
                by_reason.setdefault(entry.reason, []).append(entry)
        groups = [_group(status, reason, rows) for reason, rows in by_reason.items()]
        return tuple(sorted(groups, key=lambda group: -group.macs))

    def _part(self, macs: Iterable[int]) -> Fraction:
        total = self.macs
        return Fraction(sum(macs), total) if total else Fraction(0)


def _group(status: Status, reason: str, rows: list[ReportRow]) -> ReasonGroup:
    counts: dict[str, int] = {}
    for row in rows:
        kind = row.target.rpartition(".")[2]
        counts[kind] = counts.get(kind, 0) + 1
    macs = sum(row.macs for row in rows)
    return ReasonGroup(status, reason, counts, macs, tuple(row.name for row in rows))


@dataclass(frozen=True, repr=False)
class ReportContents:
    """All that a report says.

    Attributes:
        model: name of the model's class.
        rows: one for each operation, in the order in which they run.
        tensors: one for each stored weight, and one for each activation that is live at the
            peak, where a resource counts these.
        resources: a summary for each resource, those with a budget first.
    """

    model: str
    rows: tuple[ReportRow, ...]
    tensors: tuple[TensorRow, ...]
    resources: tuple[ResourceSummary, ...]

    @property
    def totals(self) -> dict[str, Fraction]:
        """The exact total of each resource, in its unit."""
        return {resource.name: resource.total for resource in self.resources}

    @property
    def budgets(self) -> dict[str, Fraction]:
        """The upper bound on each resource that has one, in its unit."""
        return {item.name: item.budget for item in self.resources if item.budget is not None}

    @property
    def references(self) -> dict[str, Fraction]:
        """What "100 %" means for each resource, in its unit."""
        return {resource.name: resource.reference for resource in self.resources}

    @property
    def satisfied(self) -> bool:
        """Whether every budget is met."""
        return all(resource.is_satisfied for resource in self.resources)

    @property
    def coverage(self) -> Coverage:
        """Which operations are quantized, which are not, and why."""
        return Coverage(self.rows)
