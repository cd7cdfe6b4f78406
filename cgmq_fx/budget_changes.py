"""Single changes that might make budgets feasible, each tried by pricing the network again."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from cgmq_fx.accounting import Accounting
from cgmq_fx.choices import Choices
from cgmq_fx.cost.attributes import bit_variables
from cgmq_fx.cost.grid import Grid, GridEntry
from cgmq_fx.cost.operation import BoundOperation, as_pair
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.cost.totals import SumResource
from cgmq_fx.errors import CgmqError
from cgmq_fx.gates import DEFAULT_WIDTHS
from cgmq_fx.plan import Settings
from cgmq_fx.units import format_number

#: Returns the accounting that the network would have with other settings.
Reprice = Callable[[Settings], Accounting]

#: Rows that are tried, those that make most of the floor first.
_MAX_ROWS = 3
_DIGITS = 3


@dataclass(frozen=True)
class Change:
    """One change and what came of it.

    Attributes:
        text: what to do.
        arguments: the keyword arguments of `prepare` that do it.
        floors: the least that each bounded resource costs then.
        limits: the bound on each of them then; a share of a reference may move with the prices.
        unlocks: whether all budgets are feasible then.
    """

    text: str
    arguments: Mapping[str, object]
    floors: Mapping[str, Fraction]
    limits: Mapping[str, Fraction]
    unlocks: bool


def floors_of(accounting: Accounting) -> dict[str, Fraction]:
    """Return the least that each bounded resource costs alone."""
    allowed = [site.allowed for site in accounting.sites]
    return {name: accounting.resources[name].floor(allowed) for name in accounting.limits}


def is_feasible(accounting: Accounting, floors: Mapping[str, Fraction]) -> bool:
    """Tell whether bit-widths are found that meet all budgets at once."""
    if any(floors[name] > limit for name, limit in accounting.limits.items()):
        return False
    ceiling = [site.allowed[-1] for site in accounting.sites]
    return accounting.reachable_bits(accounting.limits, ceiling) is not None


def tried_changes(
    accounting: Accounting, settings: Settings, reprice: Reprice
) -> tuple[Change, ...]:
    """Return the changes that make a floor lower, those that unlock the budgets first.

    Args:
        accounting: one whose budgets are infeasible.
        settings: the arguments of `prepare`.
        reprice: prices the network again.
    """
    trial = _Trial(accounting, settings, reprice)
    found = [
        *trial.learned_inputs(),
        *trial.narrower_widths(),
        *trial.fewer_skips(),
        *trial.fewer_overrides(),
        *trial.rows(),
    ]
    return tuple(sorted(found, key=lambda change: not change.unlocks))


class _Trial:
    def __init__(self, accounting: Accounting, settings: Settings, reprice: Reprice) -> None:
        self.accounting = accounting
        self.settings = settings
        self.reprice = reprice
        self.floors = floors_of(accounting)

    def learned_inputs(self) -> Iterator[Change]:
        """Try to learn the bit-widths of the inputs."""
        inputs = [
            site.name
            for site in self.accounting.sites
            if site.role == "input" and not site.learned and not site.chosen_by
        ]
        if not inputs or self.settings.input_bits is None:
            return
        changed = self._changed(replace(self.settings, input_bits=None))
        names = "the input" if len(inputs) == 1 else "the inputs"
        text = f"learn the bit-width of {names} {_listed(inputs)}: prepare(learn_input_bits=True)"
        yield from self._helpful(text, {"learn_input_bits": True}, changed)

    def narrower_widths(self) -> Iterator[Change]:
        """Try each width that is narrower than those allowed; the widest that unlocks, or helps."""
        last: list[Change] = []
        for width in self._untried_widths():
            widths = tuple(sorted({width, *self.settings.widths}))
            changed = self._changed(replace(self.settings, widths=widths))
            narrowest = min(self.settings.widths)
            text = f"allow narrower bit-widths than {narrowest}: prepare(widths={widths})"
            last = list(self._helpful(text, {"widths": widths}, changed)) or last
            if last and last[0].unlocks:
                break
        yield from last

    def _untried_widths(self) -> list[int]:
        tables = [
            self.settings.tables[n] for n in self.settings.limits if n in self.settings.tables
        ]
        grids = [row.grid for table in tables for row in table.rows if row.grid is not None]
        listed = {width for grid in grids for axis in (0, 1) for width in grid.widths(axis)}
        lowest = [
            site.allowed[0] for site in self.accounting.sites if site.learned and not site.chosen_by
        ]
        known = {width for width in {*DEFAULT_WIDTHS, *listed} if 2 <= width <= 16}
        fresh = known - set(self.settings.widths)
        return sorted((width for width in fresh if width < max(lowest, default=0)), reverse=True)

    # -- the caller's choices --------------------------------------------------------------------

    def fewer_skips(self) -> Iterator[Change]:
        """Try not to skip: each selector, and all where no single one is enough."""
        choices, unlocks = self.settings.choices, False
        for selector in choices.skip:
            text = f"do not skip {selector.text}"
            found = list(self._choosing(text, choices.without_skip(selector), "skip"))
            unlocks |= any(change.unlocks for change in found)
            yield from found
        if len(choices.skip) > 1 and not unlocks:
            none = replace(choices, skip=())
            yield from self._choosing("do not skip anything", none, "skip", only_unlocking=True)

    def fewer_overrides(self) -> Iterator[Change]:
        """Try to drop each override, and all where no single one is enough."""
        choices, unlocks = self.settings.choices, False
        for selector, override in choices.overrides:
            text = f"drop overrides[{selector.text}] ({override})"
            found = list(self._choosing(text, choices.without_override(selector), "overrides"))
            unlocks |= any(change.unlocks for change in found)
            yield from found
        if len(choices.overrides) > 1 and not unlocks:
            none = replace(choices, overrides=())
            yield from self._choosing("drop all overrides", none, "overrides", only_unlocking=True)

    def _choosing(
        self, text: str, choices: Choices, argument: str, *, only_unlocking: bool = False
    ) -> Iterator[Change]:
        given = choices.arguments()[argument]
        changed = self._changed(replace(self.settings, choices=choices))
        yield from self._helpful(text, {argument: given}, changed, only_unlocking=only_unlocking)

    # -- rows ------------------------------------------------------------------------------------

    def rows(self) -> Iterator[Change]:
        """Try to give the rows that bind a lower price, or a price for a narrower pair."""
        for name, limit in self.accounting.limits.items():
            resource = self.accounting.resources[name]
            if self.floors[name] <= limit or name not in self.settings.tables:
                continue
            assert isinstance(resource, SumResource)
            for row in self._binding_rows(resource):
                yield from self._cheaper_row(self.settings.tables[name], row)

    def _binding_rows(self, resource: SumResource) -> list[Row]:
        allowed = [site.allowed for site in self.accounting.sites]
        bits = self.accounting.cheapest_bits(resource.name, allowed)
        shares: dict[int, Fraction] = {}
        rows: dict[int, Row] = {}
        costs = resource.costs(self.accounting.index(bits))
        for row, cost in zip(resource.rows, costs, strict=True):
            if row is not None:
                rows[id(row)] = row
                shares[id(row)] = shares.get(id(row), Fraction(0)) + cost
        return [rows[key] for key in sorted(shares, key=lambda key: -shares[key])[:_MAX_ROWS]]

    def _cheaper_row(self, table: CostTable, row: Row) -> Iterator[Change]:
        """Find the highest price of the row, or of a narrower pair in it, that is low enough."""
        free = _priced(row, Fraction(0), self.settings.widths)
        at_zero = None if free is None else self._changed_row(table, row, free)
        if free is None or at_zero is None:
            return
        price = _break_even(at_zero, table.name, free)
        ceiling = row.cost if isinstance(row.cost, Fraction) else _containing(free, row)
        if price is None or ceiling is None:
            return
        price = _rounded_down(min(price, ceiling))
        cheaper = _priced(row, price, self.settings.widths)
        if price <= 0 or cheaper is None:
            return
        changed = self._changed_row(table, row, cheaper)
        tables = [
            replace(item, rows=_swapped(item.rows, row, cheaper)) if item is table else item
            for item in self.settings.tables.values()
        ]
        text = _row_change_text(table, row, cheaper, price)
        yield from self._helpful(text, {"cost_table": tables}, changed, only_unlocking=True)

    def _changed_row(self, table: CostTable, row: Row, other: Row) -> Accounting | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed = replace(table, rows=_swapped(table.rows, row, other), strict=False)
        tables = {**self.settings.tables, table.name: changed}
        return self._changed(replace(self.settings, tables=tables))

    # -- trying ----------------------------------------------------------------------------------

    def _changed(self, settings: Settings) -> Accounting | None:
        """Return the accounting after a change, or None where it cannot be prepared or priced."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self.reprice(settings)
            except CgmqError:
                return None

    def _helpful(
        self,
        text: str,
        arguments: Mapping[str, object],
        changed: Accounting | None,
        *,
        only_unlocking: bool = False,
    ) -> Iterator[Change]:
        if changed is None:
            return
        floors = floors_of(changed)
        unlocks = is_feasible(changed, floors)
        lower = any(
            floors[name] < self.floors[name]
            for name, limit in self.accounting.limits.items()
            if self.floors[name] > limit
        )
        if unlocks or (lower and not only_unlocking):
            yield Change(text, arguments, floors, changed.limits, unlocks)


def _priced(row: Row, price: Fraction, widths: Sequence[int]) -> Row | None:
    """Return `row` at another price, or with a narrower pair; None where it has neither."""
    if isinstance(row.cost, Fraction):
        return replace(row, cost=price)
    if row.grid is None:
        return None
    narrowest = [min(row.grid.widths(axis)) for axis in (0, 1)]
    first, second = (
        max((width for width in widths if width < least), default=least) for least in narrowest
    )
    if [first, second] == narrowest:
        return None
    entry = GridEntry(first, second, price, "assumed", None)
    return replace(row, grid=Grid(row.grid.axes, tuple(sorted([*row.grid.entries, entry]))))


def _added(row: Row) -> GridEntry | None:
    """Return the pair that `_priced` added."""
    entries = row.grid.entries if row.grid is not None else ()
    return next((entry for entry in entries if entry.source == "assumed"), None)


def _containing(changed: Row, row: Row) -> Fraction | None:
    """Return what the added pair costs so far: a narrower pair that costs more makes no sense."""
    added = _added(changed)
    entry = row.grid.entry(added.first, added.second) if row.grid is not None and added else None
    return None if entry is None else entry.cost


def _break_even(at_zero: Accounting, name: str, changed: Row) -> Fraction | None:
    """Return the price at which the cheapest choice at price zero costs what the budget allows."""
    resource, limit = at_zero.resources[name], at_zero.limits[name]
    assert isinstance(resource, SumResource)
    allowed = [site.allowed for site in at_zero.sites]
    bits = at_zero.cheapest_bits(name, allowed)
    spare = limit - resource.total(at_zero.index(bits))
    work = sum(
        row.work(bound.operation)
        for bound, row in zip(at_zero.operations, resource.rows, strict=True)
        if row == changed and row is not None and _uses(row, bound, bits)
    )
    return spare / work if spare > 0 and work else None


def _uses(row: Row, bound: BoundOperation, bits: Sequence[int]) -> bool:
    if row.grid is None:
        return True
    entry = binding_entry(row, bound, bits)
    return entry is not None and entry == _added(row)


def binding_entry(row: Row, bound: BoundOperation, bits: Sequence[int]) -> GridEntry | None:
    """Return the pair of the row's grid that prices an operation where the sites have `bits`."""
    if row.grid is None or not bound.sources:
        return None
    own = [bits[s.site] if s.site is not None else s.bits or 0 for s in bound.sources]
    widths = bit_variables(bound.operation.operands, as_pair(own))
    return row.grid.entry(*(widths[f"{axis}_bits"] for axis in row.grid.axes))


def _swapped(rows: Sequence[Row], old: Row, new: Row) -> tuple[Row, ...]:
    return tuple(new if row is old else row for row in rows)


def _rounded_down(number: Fraction) -> Fraction:
    """Return `number` with `_DIGITS` digits, never more than it is."""
    if number <= 0:
        return Fraction(0)
    power = 0
    while number * 10**power < 10 ** (_DIGITS - 1):
        power += 1
    return Fraction(int(number * 10**power), 10**power)


def _row_change_text(table: CostTable, row: Row, cheaper: Row, price: Fraction) -> str:
    amount = f"at most {format_number(price, _DIGITS)} {table.unit} per {row.per.replace('_', ' ')}"
    added = _added(cheaper)
    if added is None:
        assert isinstance(row.cost, Fraction)
        return f"hardware on which {row} costs {amount}, not {format_number(row.cost, _DIGITS)}"
    axes = cheaper.grid.axes if cheaper.grid is not None else ("", "")
    pair = f"{axes[0]} {added.first} x {axes[1]} {added.second}"
    return f"hardware that runs {pair} for {amount}: a pair that {row} lacks"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
