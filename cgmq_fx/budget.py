"""Budgets: hard upper bounds on costs, relative to the reference cost or absolute."""

import difflib
import numbers
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from cgmq_fx.errors import BudgetError, UsageError
from cgmq_fx.units import (
    DIMENSIONS,
    convert,
    exact,
    format_amount,
    format_number,
    is_number,
    parse_amount,
    parse_number,
    parse_unit,
)

_WAYS = "write a share of the reference cost ('0.5%' or 0.005) or an amount with a unit ('12 MBOP')"
_PERCENT = re.compile(r"\s*(?P<number>[^%\s]+)\s*%\s*")

#: Words that stand for the one table of a dimension: ``latency`` for a table in seconds, and so on.
ALIASES: Mapping[str, str] = {
    "latency": "s",
    "time": "s",
    "runtime": "s",
    "energy": "J",
    "cycles": "cycle",
    "bops": "BOP",
    "macs": "MAC",
    "memory": "byte",
}


@dataclass(frozen=True)
class Limit:
    """The bound on one resource: either a share of the reference cost, or an amount with a unit.

    Attributes:
        share: part of the reference cost, in (0, 1]; None for an amount.
        value: number of `unit`; None for a share.
        unit: unit of `value`.
    """

    share: Fraction | None = None
    value: Fraction | None = None
    unit: str | None = None

    def amount(self, reference: Fraction, unit: str) -> Fraction:
        """Return the bound in `unit`, where `reference` is the reference cost in that unit.

        Raises:
            BudgetError: the limit is an amount of something that `unit` does not measure.
        """
        if self.share is not None:
            return self.share * reference
        assert self.value is not None
        assert self.unit is not None
        try:
            return convert(self.value, self.unit, unit)
        except UsageError as error:
            raise BudgetError(
                f"budget '{self}' cannot bound a cost counted in {unit!r}: {error}; "
                f"give an amount in {unit!r} or a share such as '0.5%'"
            ) from error

    def __str__(self) -> str:
        """Return the limit as a person would write it, such as ``0.5 %`` or ``64 KiB``."""
        if self.share is not None:
            return f"{format_number(self.share * 100, 6)} %"
        assert self.value is not None
        assert self.unit is not None
        return format_amount(self.value, self.unit, 6)


@dataclass(frozen=True, init=False)
class Budget:
    """Hard upper bounds, one per resource.

    A limit without a resource name belongs to the cost table of the call; its name is None.

    >>> Budget("0.5%")
    Budget('0.5 %')
    >>> Budget({"bops": 0.005, "weight_memory": "64 KiB"})
    Budget({'bops': '0.5 %', 'weight_memory': '64 KiB'})
    >>> Budget(latency="3 ms")
    Budget({'latency': '3 ms'})
    """

    limits: tuple[tuple[str | None, Limit], ...]

    def __init__(self, spec: object = ..., /, **resources: object) -> None:
        """Read a budget.

        Args:
            spec: a share (``"0.5%"``, ``0.005``), an amount (``"12 MBOP"``), a mapping from
                resource names to these, or another budget.
            resources: the same as a mapping, as keywords.

        Raises:
            BudgetError: malformed; the message lists every fault and what to write instead.
        """
        entries: list[tuple[str | None, object]] = []
        if isinstance(spec, Budget):
            entries += spec.limits
        elif isinstance(spec, Mapping):
            entries += spec.items()
        elif spec is not ...:
            entries.append((None, spec))
        entries += resources.items()
        object.__setattr__(self, "limits", _read_entries(entries))

    @classmethod
    def parse(cls, spec: object) -> "Budget":
        """Return `spec` as a budget; a `Budget` is returned as it is."""
        return spec if isinstance(spec, Budget) else cls(spec)

    def __iter__(self) -> Iterator[tuple[str | None, Limit]]:
        """Iterate over the pairs of resource name and limit."""
        return iter(self.limits)

    def __repr__(self) -> str:
        """Return a call that makes an equal budget, up to the digits shown."""
        if len(self.limits) == 1 and self.limits[0][0] is None:
            return f"Budget({str(self.limits[0][1])!r})"
        return f"Budget({ {name: str(limit) for name, limit in self.limits} })"

    def resolve(
        self,
        units: Mapping[str, str],
        default: str | None = None,
        given: Collection[str] = (),
    ) -> dict[str, Limit]:
        """Return the limits by table name.

        Args:
            units: unit of each table (or other resource) by its name.
            default: table of the call: bears a limit without a name, and wins where an alias such
                as ``latency`` fits several tables.
            given: all tables of the call: an alias means one of them before any other.

        Raises:
            BudgetError: a name fits none or several of the tables, or two names fit the same one.
        """
        resolved: dict[str, Limit] = {}
        written: dict[str, str | None] = {}
        for name, limit in self.limits:
            table = resolve_resource(name, units, default, given)
            if table in resolved:
                raise BudgetError(
                    f"budget names {_shown(written[table])} and {_shown(name)} both mean the cost "
                    f"table {table!r}; keep one of the limits '{resolved[table]}' and '{limit}'"
                )
            resolved[table], written[table] = limit, name
        return resolved

    def to_json(self) -> dict[str, Any]:
        """Return the budget as plain JSON values; `from_json` reads them back, exactly."""
        return {"limits": [{"resource": name, **_limit_json(limit)} for name, limit in self.limits]}

    @classmethod
    def from_json(cls, data: object) -> "Budget":
        """Return the budget that `to_json` wrote.

        Raises:
            BudgetError: not such a value.
        """
        try:
            limits = [(item["resource"], _limit_from(item)) for item in data["limits"]]  # type: ignore[index]
        except (TypeError, KeyError, ValueError, ZeroDivisionError) as error:
            raise BudgetError(
                f"stored budget {data!r} is malformed ({error!r}); "
                "it must be what Budget.to_json() returned"
            ) from error
        return cls(dict(limits))


def resolve_resource(
    name: str | None,
    units: Mapping[str, str],
    default: str | None = None,
    given: Collection[str] = (),
) -> str:
    """Return the one table that a resource name of a budget means.

    An exact table name comes first, then the aliases (``latency``, ``energy``, ``memory`` ...): of
    the tables that measure such a thing the `default`, else the one among those `given`, else the
    only one.

    Raises:
        BudgetError: it means none or several; the message lists the known tables.
    """
    known = ", ".join(f"{table!r} ({unit})" for table, unit in sorted(units.items())) or "none"
    if name is None:
        if default is not None:
            return default
        if len(units) == 1:
            return next(iter(units))
        raise BudgetError(f"a budget without a resource name needs one cost table; known: {known}")
    if name in units:
        return name
    dimension = ALIASES.get(name)
    if dimension is None:
        close = difflib.get_close_matches(name, [*units, *ALIASES], n=1, cutoff=0.6)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise BudgetError(
            f"budget names the unknown resource {name!r}{hint}; known: {known}; "
            f"or by what it measures: {', '.join(ALIASES)}"
        )
    fitting = sorted(table for table, unit in units.items() if _measures(unit, dimension))
    if default in fitting:
        assert default is not None
        return default
    fitting = [table for table in fitting if table in given] or fitting
    if len(fitting) != 1:
        found = " and ".join(map(repr, fitting)) + " do" if fitting else "no table does"
        raise BudgetError(
            f"budget resource {name!r} means a table that counts {DIMENSIONS[dimension]}, and "
            f"{found}; name one table itself, or give it first in cost_table; known: {known}"
        )
    return fitting[0]


def _measures(unit: str, dimension: str) -> bool:
    return parse_unit(unit).dimension == dimension


def _shown(name: str | None) -> str:
    return "(no name)" if name is None else repr(name)


def _read_entries(entries: list[tuple[str | None, object]]) -> tuple[tuple[str | None, Limit], ...]:
    """Return the limits, or raise one error with every fault."""
    if not entries:
        raise BudgetError(f"the budget is empty; {_WAYS}")
    limits: dict[str | None, Limit] = {}
    faults: list[str] = []
    for name, value in entries:
        place = "" if name is None else f"resource {name!r}: "
        if name is not None and (not isinstance(name, str) or not name.strip()):
            faults.append(f"{place}a resource name is a text such as 'bops'")
            continue
        if name in limits:
            faults.append(f"{place}given twice; keep one")
            continue
        try:
            limits[name] = value if isinstance(value, Limit) else read_limit(value)
        except BudgetError as error:
            faults.append(f"{place}{error}")
    if faults:
        raise BudgetError("; ".join(faults))
    return tuple(limits.items())


def read_limit(value: object) -> Limit:
    """Return one limit from what a user wrote.

    Raises:
        BudgetError: malformed; the message says what to write instead.
    """
    if isinstance(value, str):
        return _limit_from_text(value)
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Decimal)):
        raise BudgetError(f"budget {value!r} is of type {type(value).__name__}; {_WAYS}")
    plain = value if isinstance(value, (int, Fraction, Decimal)) else float(value)
    try:
        number = exact(plain)
    except UsageError as error:
        raise BudgetError(
            f"budget {value!r} is not a finite number of sensible size; {_WAYS}"
        ) from error
    return _share(number, repr(value), bare=True)


def _limit_from_text(text: str) -> Limit:
    shown = repr(text)
    percent = _PERCENT.fullmatch(text)
    try:
        if percent is not None:
            return _share(parse_number(percent["number"]) / 100, shown, bare=False)
        if is_number(text):
            return _share(parse_number(text), shown, bare=True)
        return _absolute(*parse_amount(text), shown)
    except UsageError as error:
        raise BudgetError(f"budget {shown} cannot be read: {error}; {_WAYS}") from error


def _share(share: Fraction, shown: str, *, bare: bool) -> Limit:
    if share <= 0:
        raise BudgetError(f"budget {shown} must be above zero; {_WAYS}")
    if share <= 1:
        return Limit(share=share)
    if bare:
        plain = shown.strip("'\"")
        raise BudgetError(
            f"budget {shown} is a bare number above 1: write '{plain}%' for a share of the "
            f"reference cost, or '{plain} MBOP' (any unit) for an amount"
        )
    raise BudgetError(
        f"budget {shown} is above 100% of the reference cost, so it bounds nothing; "
        "write a share up to '100%'"
    )


def _absolute(value: Fraction, unit: Any, shown: str) -> Limit:
    if value <= 0:
        raise BudgetError(f"budget {shown} must be above zero; {_WAYS}")
    return Limit(value=value, unit=unit.symbol)


def _limit_json(limit: Limit) -> dict[str, str]:
    if limit.share is not None:
        return {"share": str(limit.share)}
    return {"value": str(limit.value), "unit": str(limit.unit)}


def _limit_from(item: Mapping[str, str]) -> Limit:
    if "share" in item:
        return _share(Fraction(item["share"]), item["share"], bare=False)
    value, unit = Fraction(item["value"]), parse_unit(item["unit"])
    return _absolute(value, unit, f"{item['value']} {item['unit']}")
