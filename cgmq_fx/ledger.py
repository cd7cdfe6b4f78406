"""`ledger`: before training, what is priced, by which row, source and error, and what is not."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from rich.console import RenderableType
from torch import nn

from cgmq_fx.accounting import Accounting
from cgmq_fx.cost.operation import BoundOperation
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.cost.totals import FLOAT_BITS, SumResource
from cgmq_fx.errors import UsageError
from cgmq_fx.ledger_contents import (
    FloatGroup,
    LedgerContents,
    LedgerGroup,
    StoredTensors,
    TableLedger,
    Work,
)
from cgmq_fx.ledger_text import ledger_renderable, ledger_text
from cgmq_fx.plan import Plan

_NO_SOURCE = "not named"


@dataclass(frozen=True, repr=False)
class Ledger(LedgerContents):
    """What is priced, by which row, at which source and error; what is free or float, and why.

    ``str(ledger)`` is the table that a person reads.
    """

    def __str__(self) -> str:
        return ledger_text(self)

    def __rich__(self) -> RenderableType:
        return ledger_renderable(self)

    def __repr__(self) -> str:
        priced = ", ".join(f"{t.name} {float(100 * t.share('priced')):.4g} %" for t in self.tables)
        return f"Ledger({self.model}: priced {priced or 'nothing'} of the MACs)"

    def to_json(self) -> str:
        """Return the ledger as JSON; shares and errors are exact, an integer or ``"n/d"``."""
        return json.dumps(asdict(self), indent=2, default=_plain)


def ledger(module: nn.Module) -> Ledger:
    """Return what the cost tables of a prepared or lowered module price, and what they do not.

    Args:
        module: what `prepare` or `lower` returned; it need not be trained.

    Raises:
        TrainingError: no shapes are known yet, so that no work is.
        UsageError: the module is neither prepared nor lowered.
    """
    plan = getattr(module, "plan", None)
    if not isinstance(plan, Plan):
        raise UsageError(
            f"{type(module).__name__} is neither prepared nor lowered and has no ledger; "
            "give ledger what cgmq_fx.prepare or cgmq_fx.lower returned"
        )
    return _Reader(plan).ledger(type(module).__name__)


class _Reader:
    def __init__(self, plan: Plan) -> None:
        self.accounting: Accounting = plan.accounting
        self.tables = plan.settings.tables
        self.all: Sequence[BoundOperation] = self.accounting.operations
        self.places = range(len(self.all))

    def ledger(self, model: str) -> Ledger:
        """Return the whole view."""
        entries = self.accounting.ledger
        floats = [place for place in self.places if entries[place].status == "float"]
        quantized = [place for place in self.places if entries[place].status == "quantized"]
        names = dict.fromkeys([*self.accounting.limits, *self.tables])
        return Ledger(
            model,
            self._work(self.places),
            self._work(quantized),
            tuple(
                FloatGroup(reason, self._kinds(places), self._work(places), self._names(places))
                for reason, places in self._grouped(floats, lambda place: entries[place].reason)
            ),
            tuple(self._table(self.tables[name]) for name in names if name in self.tables),
            self._stored(),
        )

    def _table(self, table: CostTable) -> TableLedger:
        resource = self.accounting.resources[table.name]
        rows = resource.rows if isinstance(resource, SumResource) else ()
        groups = [
            self._group(table, rows[places[0]], places)
            for _, places in self._grouped(self.places, lambda place: self._key(rows, place))
        ]
        return TableLedger(
            table.name, table.unit, table.name in self.accounting.limits, tuple(groups)
        )

    def _key(self, rows: Sequence[Row | None], place: int) -> tuple[int, bool]:
        return id(rows[place]), rows[place] is None and self.all[place].operation.macs > 0

    def _group(self, table: CostTable, row: Row | None, places: Sequence[int]) -> LedgerGroup:
        kinds, work, names = self._kinds(places), self._work(places), self._names(places)
        if row is not None:
            entries = row.grid.entries if row.grid is not None else ()
            stated = [row.source or table.source, *(entry.source for entry in entries)]
            source = "; ".join(dict.fromkeys(filter(None, stated))) or _NO_SOURCE
            text = row.origin or f"row {1 + table.rows.index(row)}"
            where = f", where {row.where.text}" if row.where else ""
            return LedgerGroup(
                *("priced", f"{text}{where}", row.per, source, errors_of(row), ""),
                *(kinds, work, names),
            )
        if work.macs:
            reason = f"table {table.name!r} has no row for them, and unpriced = {table.unpriced!r}"
            return LedgerGroup("unpriced", "", "", "", None, reason, kinds, work, names)
        reason = "no multiply-accumulates, and no row of the table prices them"
        return LedgerGroup("free", "", "", "", None, reason, kinds, work, names)

    def _stored(self) -> tuple[StoredTensors, ...]:
        memory = self.accounting.resources.get("weight_memory")
        if not isinstance(memory, SumResource):
            return ()
        total = memory.reference * 8 / FLOAT_BITS
        moving = [term for term in memory.terms if term.sites[0] is not None]
        widest = memory.widths[-1]
        quantized = sum(term.costs[-1][0] or 0 for term in moving) // widest
        rest = int(total) - quantized
        found = [
            ("quantized weights", "each once, packed at its own bit-width", len(moving), quantized),
            ("other parameters", f"not quantized, at {FLOAT_BITS} bits", None, rest),
        ]
        return tuple(
            StoredTensors(*item, Fraction(item[3]) / total if total else Fraction(0))
            for item in found
            if item[3]
        )

    # -- sums ------------------------------------------------------------------------------------

    def _grouped(
        self, places: Iterable[int], key: Callable[[int], object]
    ) -> list[tuple[str, list[int]]]:
        """Return places by key, those with most multiply-accumulates first."""
        groups: dict[object, list[int]] = {}
        for place in places:
            groups.setdefault(key(place), []).append(place)
        ordered = sorted(groups.items(), key=lambda item: -self._sum(item[1], "macs"))
        return [(str(name), found) for name, found in ordered]

    def _sum(self, places: Iterable[int], attribute: str) -> int:
        return sum(int(getattr(self.all[place].operation, attribute)) for place in places)

    def _work(self, places: Sequence[int]) -> Work:
        keys = ("macs", "weights", "input_elements")
        amounts = [self._sum(places, key) for key in keys]
        totals = [self._sum(self.places, key) for key in keys]
        shares = [
            Fraction(amount, total) if total else Fraction(0)
            for amount, total in zip(amounts, totals, strict=True)
        ]
        macs, weights, activations = amounts
        return Work(len(places), macs, weights, activations, *shares)

    def _kinds(self, places: Iterable[int]) -> dict[str, int]:
        kinds: dict[str, int] = {}
        for place in places:
            op = self.all[place].operation.op
            kinds[op] = kinds.get(op, 0) + 1
        return dict(sorted(kinds.items(), key=lambda item: -item[1]))

    def _names(self, places: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.all[place].operation.name for place in places)


def errors_of(row: Row) -> tuple[Fraction, Fraction] | None:
    """Return the lowest and the highest relative uncertainty that a row states, or None."""
    entries = row.grid.entries if row.grid is not None else ()
    stated = [entry.error for entry in entries if entry.error is not None]
    if row.error is not None:
        stated.append(row.error)
    return (min(stated), max(stated)) if stated else None


def _plain(value: Any) -> Any:
    if isinstance(value, Fraction):
        return int(value) if value.denominator == 1 else str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
