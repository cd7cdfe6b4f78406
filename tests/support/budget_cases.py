"""Small accountings with random terms, for tests of what chooses bit-widths."""

import itertools
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

from cgmq_fx.accounting import Accounting, Site
from cgmq_fx.cost.terms import Term
from cgmq_fx.cost.totals import SumResource

WIDTHS = (2, 4, 8, 16, 32)
Cost = Callable[[int, int], int]


def term(name: str, first: int | None, second: int | None, cost: Cost) -> Term:
    """Return an addend that costs ``cost(first bits, second bits)``; 8 bits where there is no "
    "site."""
    firsts = (8,) if first is None else WIDTHS
    seconds = (8,) if second is None else WIDTHS
    costs = tuple(tuple(cost(a, b) for b in seconds) for a in firsts)
    return Term(name, (first, second), costs)


def product(macs: int) -> Cost:
    """Return the cost of bit operations."""
    return lambda first, second: macs * first * second


def resource(name: str, num_sites: int, terms: Sequence[Term]) -> SumResource:
    """Return a resource in whole units; 100 % is every term at its dearest."""
    reference = Fraction(sum(addend.most for addend in terms))
    return SumResource(name, "BOP", WIDTHS, num_sites, terms, 1, reference)


def sites(allowed: Sequence[Sequence[int]]) -> tuple[Site, ...]:
    """Return one learned site for each set of widths; one with a single width is not learned."""
    return tuple(
        Site(f"s{place}", "weight", tuple(widths), len(widths) > 1, 10)
        for place, widths in enumerate(allowed)
    )


def accounting(
    allowed: Sequence[Sequence[int]],
    resources: Sequence[SumResource],
    limits: Sequence[Fraction | int],
) -> Accounting:
    """Return an accounting with one limit for each resource."""
    named = {item.name: item for item in resources}
    bounds = {item.name: Fraction(limit) for item, limit in zip(resources, limits, strict=True)}
    return Accounting(sites(allowed), (), named, bounds, (), WIDTHS)


def chain(num_sites: int, macs: Sequence[int]) -> SumResource:
    """Return the bit operations of layers of which each reads what the one before it made."""
    terms = [
        term(f"layer {place}", place, place + 1, product(count))
        for place, count in enumerate(macs[: num_sites - 1])
    ]
    return resource("bops", num_sites, terms)


def losses(
    allowed: Sequence[Sequence[int]], sensitivities: Sequence[float]
) -> list[dict[int, float]]:
    """Return losses that fall by a factor of four with each bit, as rounding errors do."""
    return [
        {bits: 0.0 if bits == 32 else weight * 4.0**-bits for bits in widths}
        for widths, weight in zip(allowed, sensitivities, strict=True)
    ]


def total_loss(predicted: Sequence[dict[int, float]], bits: Sequence[int]) -> float:
    """Return the predicted loss of a choice."""
    return sum(loss[width] for loss, width in zip(predicted, bits, strict=True))


def best_loss(found: Accounting, predicted: Sequence[dict[int, float]]) -> float | None:
    """Return the least loss of all choices within the limits, or None where there is none."""
    choices = itertools.product(*(site.allowed for site in found.sites))
    return min(
        (total_loss(predicted, bits) for bits in choices if found.is_satisfied(bits)),
        default=None,
    )


def random_network(
    rng: random.Random, num_sites: int, num_resources: int
) -> tuple[Accounting, list[dict[int, float]]]:
    """Return a network of bit operations with feasible limits, and predicted losses."""
    allowed = [tuple(sorted(rng.sample(WIDTHS, rng.randint(2, 5)))) for _ in range(num_sites)]
    resources, limits = [], []
    for number in range(num_resources):
        terms = []
        for count in range(rng.randint(num_sites // 2 + 1, 2 * num_sites)):
            first = rng.randrange(num_sites)
            second = rng.choice([None, *range(num_sites)])
            macs = round(10 ** rng.uniform(1, 5))
            terms.append(term(f"t{count}", first, second, product(macs)))
        resources.append(resource(f"r{number}", num_sites, terms))
        floor = resources[-1].floor(allowed)
        most = resources[-1].total([WIDTHS.index(widths[-1]) for widths in allowed])
        limits.append(max(floor, floor * Fraction(float(most / floor) ** rng.random())))
    sensitivities = [10 ** rng.uniform(-2, 2) for _ in allowed]
    return accounting(allowed, resources, limits), losses(allowed, sensitivities)
