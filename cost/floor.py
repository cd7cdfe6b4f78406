"""The smallest total that any choice of allowed bit-widths reaches.

Where every term is smallest at the lowest widths, as in any table whose costs rise with the bits,
the lowest widths are the answer. Otherwise the minimum is found exactly by eliminating one site
after the other, fewest neighbours first (dynamic programming over the graph whose edges are the
terms). Only where that graph is so dense that an intermediate table would pass `MAX_CELLS` is a
figure returned that is reached but may not be the smallest: coordinate descent from the lowest
widths. It is never below what can be reached, so a budget above it is feasible for certain.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cgmq_fx.cost.terms import Term, no_price
from cgmq_fx.errors import CostTableError

MAX_CELLS = 100_000

_Table = dict[tuple[int, ...], int]
_Factor = tuple[tuple[int, ...], _Table]
_Choices = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Lowest:
    """The smallest total found.

    Attributes:
        scaled: the total, in whole numbers of the resource's resolution.
        width_index: index of the width of each site that reaches it.
        exact: whether no choice costs less; False only in the dense case that the module describes.
    """

    scaled: int
    width_index: tuple[int, ...]
    exact: bool


def lowest_total(terms: Sequence[Term], allowed: _Choices) -> Lowest:
    """Return the smallest total of `terms`.

    Args:
        terms: addends of the total.
        allowed: for each site the indices of its allowed widths, rising.

    Raises:
        CostTableError: some term has no price at some allowed widths.
    """
    start = [choices[0] for choices in allowed]
    if all(_smallest_at_start(term, allowed) for term in terms):
        return _lowest(terms, start, exact=True)
    found = _eliminate(terms, allowed)
    if found is not None:
        return _lowest(terms, found, exact=True)
    return _lowest(terms, _descend(terms, allowed, start), exact=False)


def _lowest(terms: Sequence[Term], chosen: Sequence[int], *, exact: bool) -> Lowest:
    return Lowest(sum(term.cost(chosen) for term in terms), tuple(chosen), exact)


def _table(term: Term, allowed: _Choices) -> _Factor:
    """Return the costs of a term by the widths of its distinct sites."""
    sites = tuple(sorted({site for site in term.sites if site is not None}))
    table: _Table = {}
    for choice in itertools.product(*(allowed[site] for site in sites)):
        at = dict(zip(sites, choice, strict=True))
        first, second = (0 if site is None else at[site] for site in term.sites)
        cost = term.costs[first][second]
        if cost is None:
            raise CostTableError(no_price([term.name]))
        table[choice] = cost
    return sites, table


def _smallest_at_start(term: Term, allowed: _Choices) -> bool:
    sites, table = _table(term, allowed)
    return table[tuple(allowed[site][0] for site in sites)] == min(table.values())


def _eliminate(terms: Sequence[Term], allowed: _Choices) -> list[int] | None:
    """Return the widths of the exact minimum, or None where a table would grow too large."""
    factors: list[set[int]] = [
        set() for _ in allowed
    ]  # per site: numbers of the live factors on it
    live: dict[int, _Factor] = {}
    numbers = itertools.count()

    def add(factor: _Factor) -> None:
        number = next(numbers)
        live[number] = factor
        for site in factor[0]:
            factors[site].add(number)

    for term in terms:
        add(_table(term, allowed))
    order = [(len(factors[site]), site) for site in range(len(allowed))]
    heapq.heapify(order)
    decisions: list[tuple[int, tuple[int, ...], dict[tuple[int, ...], int]]] = []
    done: set[int] = set()
    while order:
        degree, site = heapq.heappop(order)
        involved = [live[number] for number in factors[site]] if site not in done else []
        if site in done or degree != len(involved):
            continue
        neighbours = tuple(sorted({other for sites, _ in involved for other in sites} - {site}))
        if math.prod(len(allowed[other]) for other in (*neighbours, site)) > MAX_CELLS:
            return None
        table, choice_of = _minimise(site, neighbours, involved, allowed)
        decisions.append((site, neighbours, choice_of))
        done.add(site)
        for number in tuple(factors[site]):
            for other in live.pop(number)[0]:
                factors[other].discard(number)
        add((neighbours, table))
        for other in neighbours:
            heapq.heappush(order, (len(factors[other]), other))
    return _look_up(decisions, allowed)


def _minimise(
    site: int, neighbours: tuple[int, ...], involved: Sequence[_Factor], allowed: _Choices
) -> tuple[_Table, dict[tuple[int, ...], int]]:
    """Return the best cost, and the width of `site` that reaches it, by the neighbours' widths."""
    table: _Table = {}
    choice_of: dict[tuple[int, ...], int] = {}
    for choice in itertools.product(*(allowed[other] for other in neighbours)):
        at = dict(zip(neighbours, choice, strict=True))
        costs = []
        for width in allowed[site]:
            at[site] = width
            costs.append(sum(costs_of[tuple(at[s] for s in sites)] for sites, costs_of in involved))
        table[choice] = min(costs)
        choice_of[choice] = allowed[site][costs.index(table[choice])]
    return table, choice_of


def _look_up(
    decisions: Sequence[tuple[int, tuple[int, ...], dict[tuple[int, ...], int]]], allowed: _Choices
) -> list[int]:
    chosen = [choices[0] for choices in allowed]
    for site, neighbours, choice_of in reversed(decisions):
        chosen[site] = choice_of[tuple(chosen[other] for other in neighbours)]
    return chosen


def _descend(terms: Sequence[Term], allowed: _Choices, start: Sequence[int]) -> list[int]:
    """Return widths from which no single site can lower the total."""
    chosen = list(start)
    touching: list[list[Term]] = [[] for _ in allowed]
    for term in terms:
        for site in {site for site in term.sites if site is not None}:
            touching[site].append(term)
    improved = True
    while improved:
        improved = False
        for site, choices in enumerate(allowed):
            costs = []
            for width in choices:
                tried = [*chosen[:site], width, *chosen[site + 1 :]]
                costs.append(sum(term.cost(tried) for term in touching[site]))
            best = choices[costs.index(min(costs))]
            if min(costs) < costs[choices.index(chosen[site])]:
                chosen[site], improved = best, True
    return chosen
