"""The bit-widths of least predicted loss within every budget, by an integer program.

One variable for each bit-width of each site says whether it is chosen. What an operation of two
sites costs is linear in one more for each pair of their bit-widths; these need not be integer:
with chosen bit-widths they are. Peak memory is a bound for every moment. HiGHS, through scipy,
solves it to the proven optimum; every comparison with a budget is then made again, exactly.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from cgmq_fx.accounting import Accounting
from cgmq_fx.allocate import PredictedLoss, allocate
from cgmq_fx.cost.peak_memory import PeakMemory
from cgmq_fx.cost.terms import Term
from cgmq_fx.cost.totals import Resource
from cgmq_fx.errors import UsageError

#: Seconds after which the best found so far is taken.
TIME_LIMIT = 60.0
# The solver takes rows that are exceeded by so much, as a share of the budget, for met.
_SLACK = 1e-6
_TRIES = 4
_TINY = 1e-30

Cell = tuple[int, int]
Row = dict[int, float]


@dataclass(frozen=True)
class Allocation:
    """Bit-widths within every budget.

    Attributes:
        bits: one for each site, in the order of the accounting.
        loss: what they are predicted to cost.
        is_optimal: whether no others within the budgets are predicted to cost less; False where the
            solver's time was up.
    """

    bits: tuple[int, ...]
    loss: float
    is_optimal: bool


def allocate_exactly(
    accounting: Accounting,
    predicted: PredictedLoss,
    *,
    limits: Mapping[str, Fraction] | None = None,
    time_limit: float = TIME_LIMIT,
) -> Allocation:
    """Return the bit-widths of least predicted loss within every limit.

    Args:
        accounting: sites and exact costs.
        predicted: how much the loss rises at each allowed bit-width of each site; where that is
            infinite, only if nothing else is within the limits.
        limits: bounds by resource; by default the budgets.
        time_limit: seconds, after which the best found so far is taken.

    Raises:
        BudgetError: no bit-widths within every limit were found.
        UsageError: scipy is not installed.
    """
    limits = accounting.limits if limits is None else limits
    greedy = allocate(accounting, predicted, limits=limits)
    best = Allocation(greedy, _loss(accounting, predicted, greedy), is_optimal=False)
    room = 1.0
    for _ in range(_TRIES):
        solved = _Program(accounting, predicted, limits, room).solve(time_limit)
        if solved is None:
            return best
        bits, is_optimal = solved
        index = accounting.index(bits)
        if all(accounting.resources[name].total(index) <= limits[name] for name in limits):
            loss = _loss(accounting, predicted, bits)
            # Both are within the budgets; the greedy one may be better where the time was up, or by
            # less than the solver tells apart.
            better = Allocation(bits, loss, is_optimal)
            return better if loss <= best.loss else replace(best, is_optimal=is_optimal)
        room -= _SLACK
    return best


def _loss(accounting: Accounting, predicted: PredictedLoss, bits: Sequence[int]) -> float:
    return math.fsum(predicted[site][width] for site, width in enumerate(bits))


class _Program:
    """The integer program of one allocation.

    Args:
        accounting: sites and exact costs.
        predicted: the objective.
        limits: bounds by resource.
        room: the share of each limit that may be used.
    """

    def __init__(
        self,
        accounting: Accounting,
        predicted: PredictedLoss,
        limits: Mapping[str, Fraction],
        room: float,
    ) -> None:
        self._sites = accounting.sites
        place = {width: position for position, width in enumerate(accounting.widths)}
        self._widths = accounting.widths
        self._choices = [
            tuple(place[width] for width in site.allowed if loss[width] < math.inf)
            for site, loss in zip(self._sites, predicted, strict=True)
        ]
        self._columns: list[float] = []  # of the objective
        self._chosen = [
            {index: self._column(predicted[number][accounting.widths[index]]) for index in choices}
            for number, choices in enumerate(self._choices)
        ]
        self._count_chosen = len(self._columns)
        self._pairs: dict[tuple[int, int], dict[Cell, int]] = {}
        self._rows: list[tuple[Row, float, float]] = []
        for chosen in self._chosen:
            self._rows.append((dict.fromkeys(chosen.values(), 1.0), 1.0, 1.0))
        for name, limit in limits.items():
            self._bound(accounting.resources[name], limit, room)

    def solve(self, time_limit: float) -> tuple[tuple[int, ...], bool] | None:
        """Return bit-widths and whether they are proven best; None where there are none."""
        milp, constraints, integrality = self._assembled()
        import numpy as np

        largest = max(map(abs, self._columns), default=0.0)
        found = milp(
            np.array(self._columns) / max(largest, _TINY),
            constraints=constraints,
            integrality=integrality,
            bounds=(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": time_limit},
        )
        if found.x is None:
            return None
        bits = [
            self._widths[max(chosen, key=lambda index: found.x[chosen[index]])]
            for chosen in self._chosen
        ]
        return tuple(bits), found.status == 0

    def _assembled(self) -> tuple[Any, Any, Any]:
        try:
            from scipy.optimize import LinearConstraint, milp
            from scipy.sparse import coo_array
        except ImportError as error:
            raise UsageError(
                "the exact allocation of bit-widths needs scipy; install it with "
                "pip install 'cgmq-fx[solve]'"
            ) from error
        import numpy as np

        cells = [
            (number, column, value)
            for number, (row, _, _) in enumerate(self._rows)
            for column, value in row.items()
        ]
        rows, columns, values = zip(*cells, strict=True)
        shape = (len(self._rows), len(self._columns))
        matrix = coo_array((values, (rows, columns)), shape=shape).tocsr()
        lower, upper = ([row[end] for row in self._rows] for end in (1, 2))
        integrality = np.zeros(len(self._columns))
        integrality[: self._count_chosen] = 1
        return milp, LinearConstraint(matrix, lower, upper), integrality

    def _column(self, objective: float) -> int:
        self._columns.append(objective)
        return len(self._columns) - 1

    # -- bounds ----------------------------------------------------------------------------------

    def _bound(self, resource: Resource, limit: Fraction, room: float) -> None:
        unit = max(1, resource.bound_scaled(limit))
        for terms in _sums(resource):
            row: Row = {}
            for term in terms:
                for column, cost in self._cells(term):
                    if cost is None:  # the hardware does not have this pair of bit-widths
                        self._rows.append(({column: 1.0}, 0.0, 0.0))
                        continue
                    row[column] = row.get(column, 0.0) + cost / unit
            fixed = row.pop(-1, 0.0)
            if row:
                self._rows.append((row, -math.inf, room - fixed))

    def _cells(self, term: Term) -> Iterator[tuple[int, int | None]]:
        """Yield the columns that a term's cost is linear in, -1 for what is always there."""
        first, second = term.sites
        if first is None and second is None:
            yield -1, term.cost(())
        elif first is None or second is None or first == second:
            site = second if first is None else first
            assert site is not None
            for index, column in self._chosen[site].items():
                yield column, _cost(term, index, index)
        else:
            for (index, other), column in self._pair(first, second).items():
                yield column, _cost(term, index, other)

    def _pair(self, first: int, second: int) -> Mapping[Cell, int]:
        """Return the columns of two sites' pairs of bit-widths, with what ties them to the sites.

        They are a table whose rows and columns add up to what is chosen of either site.
        """
        if (first, second) in self._pairs:
            return self._pairs[first, second]
        if (second, first) in self._pairs:
            turned = self._pairs[second, first]
            return {(b, a): column for (a, b), column in turned.items()}
        cells = {
            (a, b): self._column(0.0) for a in self._choices[first] for b in self._choices[second]
        }
        self._pairs[first, second] = cells
        for side, site in enumerate((first, second)):
            for index, column in self._chosen[site].items():
                row: Row = {cells[cell]: 1.0 for cell in cells if cell[side] == index}
                self._rows.append(({**row, column: -1.0}, 0.0, 0.0))
        return cells


def _sums(resource: Resource) -> Iterator[Sequence[Term]]:
    """Yield the sums of terms that a bound holds for: all, or those of each moment of a peak."""
    if not isinstance(resource, PeakMemory):
        yield resource.terms
        return
    pairs = list(zip(resource.buffers, resource.terms, strict=True))
    for moment in sorted({buffer.first for buffer in resource.buffers}):
        yield [term for buffer, term in pairs if buffer.first <= moment <= buffer.last]


def _cost(term: Term, first: int, second: int) -> int | None:
    row = term.costs[first if len(term.costs) > 1 else 0]
    return row[second if len(row) > 1 else 0]
