"""Choosing bit-widths never exceeds a limit, whatever the network, the prices and the limits."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from budget_cases import WIDTHS, accounting, best_loss, resource, term
from cgmq_fx.allocate import allocate
from cgmq_fx.explain_budget import check_feasible

LOSS = st.floats(0, 1e6, allow_nan=False)


@st.composite
def rising_prices(draw):
    """A table of prices that never falls when the bits of an operand rise."""
    steps = [[draw(st.integers(0, 50)) for _ in WIDTHS] for _ in WIDTHS]
    prices = {}
    for row, first in enumerate(WIDTHS):
        for column, second in enumerate(WIDTHS):
            cells = [line[: column + 1] for line in steps[: row + 1]]
            prices[first, second] = 1 + sum(map(sum, cells))
    return lambda first, second: prices[first, second]


@st.composite
def networks(draw):
    """An accounting with limits between floor and maximum, and predicted losses."""
    num_sites = draw(st.integers(1, 4))
    allowed = [
        tuple(sorted(draw(st.sets(st.sampled_from(WIDTHS), min_size=1)))) for _ in range(num_sites)
    ]
    sites = st.one_of(st.none(), st.integers(0, num_sites - 1))
    resources, limits = [], []
    for number in range(draw(st.integers(1, 3))):
        prices = draw(rising_prices())
        terms = [
            term(f"t{count}", draw(sites), draw(sites), prices)
            for count in range(draw(st.integers(1, 5)))
        ]
        resources.append(resource(f"r{number}", num_sites, terms))
        floor = resources[-1].floor(allowed)
        most = resources[-1].total([WIDTHS.index(widths[-1]) for widths in allowed])
        limits.append(floor + (most - floor) * draw(st.fractions(0, 1)))
    predicted = [{bits: draw(LOSS) for bits in widths} for widths in allowed]
    return accounting(allowed, resources, limits), predicted


def check_choice(found, chosen):
    assert not found.violations(chosen)
    for site, bits in zip(found.sites, chosen, strict=True):
        assert bits in site.allowed


@given(networks())
def test_a_choice_is_within_every_limit(drawn):
    found, predicted = drawn
    check_feasible(found)
    assert best_loss(found, predicted) is not None
    check_choice(found, allocate(found, predicted))


@given(networks(), st.data())
def test_a_start_is_never_exceeded(drawn, data):
    found, predicted = drawn
    start = [data.draw(st.sampled_from(site.allowed)) for site in found.sites]
    chosen = allocate(found, predicted, start=start)
    check_choice(found, chosen)
    assert all(bits <= top for bits, top in zip(chosen, start, strict=True))


@given(networks(), st.fractions(0, 1))
def test_a_lower_limit_is_met_too(drawn, part):
    found, predicted = drawn
    lowest = found.totals(found.lowest_bits())
    limits = {
        name: lowest[name] + part * (limit - lowest[name]) for name, limit in found.limits.items()
    }
    chosen = allocate(found, predicted, limits=limits)
    assert all(found.totals(chosen)[name] <= limit for name, limit in limits.items())


@given(networks())
def test_the_same_question_has_the_same_answer(drawn):
    found, predicted = drawn
    assert allocate(found, predicted) == allocate(found, predicted)


@given(st.lists(st.integers(1, 10**30), min_size=1, max_size=4), st.integers(1, 10**6))
def test_totals_beyond_64_bits_are_exact(macs, parts):
    """The limit lies one unit below what the widest bit-widths cost, of numbers past int64."""
    terms = [
        term(f"t{place}", place, None, lambda a, b, count=count: count * a * b)
        for place, count in enumerate(macs)
    ]
    allowed = [WIDTHS] * len(macs)
    priced = resource("bops", len(macs), terms)
    limit = max(priced.floor(allowed), priced.reference - Fraction(1, parts))
    found = accounting(allowed, [priced], [limit])
    chosen = allocate(found, [{bits: 1.0 / bits for bits in WIDTHS}] * len(macs))
    assert priced.total([WIDTHS.index(bits) for bits in chosen]) <= limit
    assert 32 in chosen or len(macs) == 1
