"""Refuse budgets that cannot be met: the floor, what makes it, what would unlock it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from cgmq_fx.accounting import Accounting
from cgmq_fx.budget_changes import (
    Change,
    Reprice,
    binding_entry,
    floors_of,
    is_feasible,
    tried_changes,
)
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.terms import Term
from cgmq_fx.cost.totals import Resource
from cgmq_fx.errors import BudgetError
from cgmq_fx.plan import Settings
from cgmq_fx.units import amount_at_least, format_amount, number_at_least

_MAX_MAKERS = 5
_DIGITS = 6
#: Decimals of a percentage that is proposed as a budget.
_DECIMALS = 4


def check_feasible(
    accounting: Accounting, settings: Settings | None = None, reprice: Reprice | None = None
) -> None:
    """Refuse budgets that no allowed choice of bit-widths meets.

    Args:
        accounting: what is bounded.
        settings: the arguments of `prepare`.
        reprice: prices the network again; with it and `settings`, changes other than larger budgets
            are tried and named. Only what was tried and found feasible is claimed to be enough.

    Raises:
        BudgetError: with the floor of each such budget, the operations that make it, the smallest
            feasible figures, and the changes that would do.
    """
    floors = floors_of(accounting)
    if is_feasible(accounting, floors):
        return
    changes: tuple[Change, ...] = ()
    if settings is not None and reprice is not None:
        changes = tried_changes(accounting, settings, reprice)
    raise _Explainer(accounting, settings, floors, changes).error()


@dataclass(frozen=True)
class _Explainer:
    accounting: Accounting
    settings: Settings | None
    floors: dict[str, Fraction]
    changes: tuple[Change, ...]

    def error(self) -> BudgetError:
        """Return the refusal."""
        accounting = self.accounting
        below = [name for name, limit in accounting.limits.items() if self.floors[name] > limit]
        feasible, alone = self._feasible()
        parts = [self._below(name) for name in below] or [self._together(alone)]
        raised = [name for name, limit in accounting.limits.items() if feasible[name] > limit]
        lines = [
            *parts,
            "Ways out, each by itself:",
            *(f"  - {way}" for way in self._raises(raised, feasible, alone)),
            *(f"  - {change.text}" for change in self.changes if change.unlocks),
        ]
        partial = [self._partial_text(change) for change in self.changes if not change.unlocks]
        if partial:
            lines += ["These help, and are not enough alone:", *(f"  - {text}" for text in partial)]
        return BudgetError(
            "\n".join(lines),
            floors=self.floors,
            feasible=feasible,
            suggestion={self._written(name): self._figure(name, feasible[name]) for name in raised},
            unlocks=[change.arguments for change in self.changes if change.unlocks],
        )

    # -- the smallest feasible figures -----------------------------------------------------------

    def _feasible(self) -> tuple[dict[str, Fraction], dict[str, Fraction]]:
        """Return figures that are feasible together, and for each the least with the others as is.

        Those together raise the budgets by the smallest factor of all choices that were looked at.
        """
        limits = self.accounting.limits
        ceiling = [site.allowed[-1] for site in self.accounting.sites]
        totals = [
            {name: self.accounting.resources[name].total(index) for name in limits}
            for bits in self.accounting.candidate_bits(limits, ceiling)
            for index in [self.accounting.index(bits)]
        ]
        best = min(totals, key=lambda total: _raise_factor(total, limits.items()))
        alone: dict[str, Fraction] = {}
        for name in limits:
            others = [(other, limit) for other, limit in limits.items() if other != name]
            fitting = [total for total in totals if all(total[o] <= limit for o, limit in others)]
            if fitting:
                alone[name] = min(total[name] for total in fitting)
        return {name: max(limit, best[name]) for name, limit in limits.items()}, alone

    def _written(self, name: str) -> str:
        """Return what the caller named the resource: ``energy`` for the one table of its kind."""
        if self.settings is None:
            return name
        given = (written for written, _ in self.settings.budget)
        return dict(zip(self.settings.limits, given, strict=True)).get(name) or name

    def _figure(self, name: str, amount: Fraction) -> str:
        """Return `amount` rounded up, as a budget is written: a share where a share was given."""
        limit = self.settings.limits.get(name) if self.settings is not None else None
        share = self._share(name, amount)
        if share is not None and share <= 100 and (limit is None or limit.share is not None):
            return f"{_percent_at_least(share)} %"
        return amount_at_least(amount, self.accounting.resources[name].unit, _DIGITS)

    def _share(self, name: str, amount: Fraction) -> Fraction | None:
        """Return `amount` in percent of the reference."""
        reference = self.accounting.resources[name].reference
        return 100 * amount / reference if reference else None

    # -- text ------------------------------------------------------------------------------------

    def _below(self, name: str) -> str:
        resource, floor = self.accounting.resources[name], self.floors[name]
        share = self._share(name, floor)
        part = "" if share is None else f" ({float(share):.{_DECIMALS}f} % of the reference)"
        limit = format_amount(self.accounting.limits[name], resource.unit, _DIGITS)
        lines = [
            f"budget {name} = {limit} is below the floor "
            f"{format_amount(floor, resource.unit, _DIGITS)}{part}, "
            f"the least that the allowed bit-widths cost."
        ]
        makers = self._makers(name)
        if makers:
            lines += ["  The floor is made by:", *(f"    {maker}" for maker in makers)]
        return "\n".join(lines)

    def _makers(self, name: str) -> list[str]:
        """Return a line for each of the dearest addends of a floor."""
        resource, floor = self.accounting.resources[name], self.floors[name]
        bits = self.accounting.cheapest_bits(name, [s.allowed for s in self.accounting.sites])
        costs = resource.costs(self.accounting.index(bits))
        order = sorted((place for place, cost in enumerate(costs) if cost), key=lambda p: -costs[p])
        lines = []
        for place in order[:_MAX_MAKERS]:
            parts = [f"{_percent(costs[place], floor)} of the floor"]
            parts += [self._bits_text(resource.terms[place], bits)]
            parts += self._row_text(resource, place, bits)
            lines.append(f"{resource.terms[place].name} ({', '.join(parts)})")
        rest = order[_MAX_MAKERS:]
        if rest:
            left = sum((costs[place] for place in rest), Fraction(0))
            lines.append(f"and {len(rest)} more ({_percent(left, floor)} of the floor)")
        return lines

    def _bits_text(self, term: Term, bits: Sequence[int]) -> str:
        sites = {site: self.accounting.sites[site].name for site in term.sites if site is not None}
        named = [
            f"{'' if name == term.name else f'{name} '}at {bits[site]} bits"
            for site, name in sites.items()
        ]
        return " x ".join(named) or "whatever the bit-widths"

    def _row_text(self, resource: Resource, place: int, bits: Sequence[int]) -> list[str]:
        row: Row | None = resource.rows[place] if resource.rows else None
        if row is None:
            return []
        entry = binding_entry(row, self.accounting.operations[place], bits)
        where = row.origin or f"row for {row.op[0]}" + (f", {row.where.text}" if row.where else "")
        if entry is None or row.grid is None:
            return [f"by {where}"]
        return [f"by {where}: {row.grid.axes[0]} {entry.first} x {row.grid.axes[1]} {entry.second}"]

    def _together(self, alone: dict[str, Fraction]) -> str:
        over = ", ".join(sorted(self.accounting.violations(self.accounting.lowest_bits())))
        return (
            f"each budget can be met alone, but no bit-widths were found that meet all at once: "
            f"the lowest exceed {over}; "
            f"raise {'one of these budgets' if alone else 'several of these budgets'}."
        )

    def _raises(
        self, raised: Sequence[str], feasible: dict[str, Fraction], alone: dict[str, Fraction]
    ) -> Iterable[str]:
        """Yield the larger budgets that would do: one where one is enough, else all together."""
        single = {name: amount for name, amount in alone.items() if name in self.accounting.limits}
        for name, amount in single.items():
            others = ", the others as they are" if len(self.accounting.limits) > 1 else ""
            yield f"a budget of at least {self._both(name, amount)}{others}"
        if not single:
            figures = " and ".join(self._both(name, feasible[name]) for name in raised)
            yield f"budgets of at least {figures}, together"

    def _both(self, name: str, amount: Fraction) -> str:
        """Return a figure in percent and in the unit, both rounded up so that they are feasible."""
        unit, share = self.accounting.resources[name].unit, self._share(name, amount)
        absolute = amount_at_least(amount, unit, _DIGITS)
        if share is None or share > 100:
            return f"{absolute} for {name}"
        return f"{_percent_at_least(share)} % of the reference, or {absolute}, for {name}"

    def _partial_text(self, change: Change) -> str:
        lowered = [
            f"{name} {self._both_floors(name, change.floors[name])}"
            for name, limit in self.accounting.limits.items()
            if change.floors[name] < self.floors[name] and self.floors[name] > limit
        ]
        return f"{change.text}; the floor falls to {', '.join(lowered)}"

    def _both_floors(self, name: str, floor: Fraction) -> str:
        share = self._share(name, floor)
        amount = format_amount(floor, self.accounting.resources[name].unit, _DIGITS)
        return amount if share is None else f"{amount} ({float(share):.{_DECIMALS}f} %)"


def _raise_factor(
    total: dict[str, Fraction], limits: Iterable[tuple[str, Fraction]]
) -> tuple[Fraction, int]:
    """Return by what factor budgets must grow to hold `total`; then how many of them must."""
    limits = list(limits)
    factors = [total[name] / limit for name, limit in limits if limit]
    return max(factors, default=Fraction(0)), sum(total[name] > limit for name, limit in limits)


def _percent(part: Fraction, whole: Fraction) -> str:
    return f"{float(100 * part / whole):.1f} %" if whole else "0 %"


def _percent_at_least(share: Fraction) -> str:
    """Return a percentage rounded up, with four decimals, or six digits where it is smaller."""
    scaled = -(-share.numerator * 10**_DECIMALS // share.denominator)
    if share and scaled < 10:  # so small that four decimals would give away too much
        return number_at_least(share, _DIGITS)
    return f"{scaled / 10**_DECIMALS:.{_DECIMALS}f}".rstrip("0").rstrip(".")
