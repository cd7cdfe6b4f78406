import random
import statistics
import time
from fractions import Fraction

import pytest
import torch
from torch import nn

from budget_cases import (
    WIDTHS,
    accounting,
    best_loss,
    chain,
    losses,
    product,
    random_network,
    resource,
    term,
    total_loss,
)
from cgmq_fx.allocate import allocate
from cgmq_fx.choose_bits import lower_to_budget
from cgmq_fx.errors import BudgetError
from cgmq_fx.explain_budget import check_feasible
from cgmq_fx.prepare import prepare
from cgmq_fx.tally import Tally

ALL = [WIDTHS] * 3


def two_layers(limit):
    """100 and 900 MACs, each with a weight of its own and an input at 8 bits."""
    terms = [term("a", 0, None, product(100)), term("b", 1, None, product(900))]
    return accounting([WIDTHS, WIDTHS], [resource("bops", 2, terms)], [limit])


def test_the_site_that_saves_more_or_matters_less_gives_way():
    saves_more = two_layers(8 * (100 * 32 + 900 * 8))
    assert allocate(saves_more, losses([WIDTHS] * 2, [1.0, 1.0])) == (32, 8)
    matters_less = two_layers(8 * (100 * 2 + 900 * 32))
    assert allocate(matters_less, losses([WIDTHS] * 2, [1e-30, 1e9])) == (2, 32)


def test_everything_at_the_floor_budget():
    assert allocate(two_layers(2 * 8 * 1000), losses([WIDTHS] * 2, [1.0, 9.0])) == (2, 2)


def test_nothing_moves_within_the_budget():
    assert allocate(two_layers(32 * 8 * 1000), losses([WIDTHS] * 2, [1.0, 9.0])) == (32, 32)


def test_fill_gives_slack_back():
    """Going down b must fall to 16 bits or less; what that leaves of the limit is worth 8 bits of "
    "a."""
    limit = 8 * (900 * 16 + 100 * 8)
    found = two_layers(limit)
    chosen = allocate(found, losses([WIDTHS] * 2, [1e-9, 1.0]))
    assert chosen == (8, 16)
    assert found.totals(chosen)["bops"] == limit


def test_no_single_site_could_be_wider():
    rng = random.Random(5)
    for _ in range(20):
        found, predicted = random_network(rng, 8, 2)
        chosen = allocate(found, predicted)
        for place, site in enumerate(found.sites):
            for bits in site.allowed:
                wider = [*chosen[:place], bits, *chosen[place + 1 :]]
                gains = predicted[place][bits] < predicted[place][chosen[place]]
                assert not (gains and bits > chosen[place] and found.is_satisfied(wider))


def test_start_is_a_ceiling():
    start = [4, 8]
    chosen = allocate(two_layers(10**9), losses([WIDTHS] * 2, [1.0, 1.0]), start=start)
    assert chosen == (4, 8)
    chosen = allocate(two_layers(8 * 4 * 1000), losses([WIDTHS] * 2, [1e9, 1.0]), start=start)
    assert chosen[0] <= 4
    assert chosen[1] <= 8


def test_other_limits_than_the_budgets():
    found = two_layers(10**9)
    predicted = losses([WIDTHS] * 2, [1.0, 1.0])
    limits = {"bops": Fraction(8 * 4 * 1000)}
    assert found.totals(allocate(found, predicted, limits=limits))["bops"] <= limits["bops"]
    assert allocate(two_layers(16_000), predicted, limits={}) == (32, 32)


def test_one_limit_does_not_hide_another():
    """The second resource sees only the site that the first does not need to move."""
    first = resource("first", 2, [term("a", 0, None, product(100))])
    second = resource("second", 2, [term("b", 1, None, product(7))])
    found = accounting([WIDTHS, WIDTHS], [first, second], [100 * 8 * 4, 7 * 8 * 8])
    assert allocate(found, losses([WIDTHS] * 2, [1.0, 1.0])) == (4, 8)


def test_an_impossible_limit():
    with pytest.raises(BudgetError, match=r"nearest exceeds bops; raise these budgets"):
        allocate(two_layers(15_999), losses([WIDTHS] * 2, [1.0, 1.0]))


def falling(limit):
    """16 bits cost less than any other width, as where the hardware has lanes for these alone."""
    prices = {2: 50, 4: 40, 8: 30, 16: 10, 32: 60}
    terms = [term("a", 0, None, lambda bits, _: prices[bits])]
    return accounting([WIDTHS], [resource("cycles", 1, terms)], [limit])


def test_costs_that_fall_with_the_bits():
    found = falling(25)
    check_feasible(found)
    predicted = losses([WIDTHS], [1.0])
    assert allocate(found, predicted) == (16,)
    assert allocate(found, predicted, start=[8]) == (16,)  # nothing at or below 8 bits fits
    assert allocate(falling(30), predicted, start=[8]) == (8,)


def test_the_floor_of_costs_that_fall_with_the_bits():
    with pytest.raises(
        BudgetError, match=r"(?s)floor 10 BOP.*a \(100.0 % of the floor, s0 at 16 bits"
    ):
        check_feasible(falling(9))


def test_budgets_that_exclude_each_other():
    """One resource is met at 2 bits alone, the other at 32 alone."""
    up = resource("up", 1, [term("a", 0, None, lambda bits, _: bits)])
    down = resource("down", 1, [term("a", 0, None, lambda bits, _: 40 - bits)])
    found = accounting([WIDTHS], [up, down], [2, 8])
    with pytest.raises(
        BudgetError, match=r"(?s)no bit-widths were found that meet all.*exceed down"
    ):
        check_feasible(found)


@pytest.mark.parametrize("num_resources", [1, 2, 3])
def test_near_the_optimum(num_resources):
    """Measured on 450 such networks: the optimum in 95 % of them, mean excess 5 %, once 780 %."""
    rng = random.Random(num_resources)
    excess = []
    for _ in range(60):
        found, predicted = random_network(rng, rng.randint(2, 5), num_resources)
        best = best_loss(found, predicted)
        chosen = allocate(found, predicted)
        assert best is not None
        assert found.is_satisfied(chosen)
        excess.append((total_loss(predicted, chosen) + 1e-12) / (best + 1e-12) - 1)
    assert min(excess) > -1e-9
    assert statistics.mean(excess) < 0.15


def test_ten_thousand_sites():
    rng = random.Random(0)
    num_sites = 10_000
    layers = chain(num_sites, [rng.randint(1, 10**6) for _ in range(num_sites)])
    allowed = [WIDTHS] * num_sites
    found = accounting(allowed, [layers], [layers.reference / 100])
    predicted = losses(allowed, [10 ** rng.uniform(-3, 3) for _ in allowed])
    started = time.process_time()
    chosen = allocate(found, predicted)
    assert time.process_time() - started < 20
    used = found.totals(chosen)["bops"] / found.limits["bops"]
    assert Fraction(999, 1000) < used <= 1


def test_a_site_that_all_operations_read_costs_no_square():
    num_sites = 2000
    hub = [term(f"t{place}", 0, place, product(1000)) for place in range(1, num_sites)]
    star = resource("bops", num_sites, hub)
    allowed = [WIDTHS] * num_sites
    found = accounting(allowed, [star], [star.reference / 100])
    rng = random.Random(0)
    predicted = losses(allowed, [10 ** rng.uniform(-3, 3) for _ in allowed])
    started = time.process_time()
    assert found.is_satisfied(allocate(found, predicted))
    assert time.process_time() - started < 10


def test_a_tally_follows_moves_exactly():
    rng = random.Random(3)
    found, _ = random_network(rng, 6, 2)
    tally = Tally(found, [site.allowed[-1] for site in found.sites])
    for _ in range(50):
        place = rng.randrange(6)
        to = WIDTHS.index(rng.choice(found.sites[place].allowed))
        deltas = tally.deltas(place, to)
        room = tally.has_room(deltas)
        tally.move(place, to, deltas)
        totals = found.totals(tally.bits)
        assert [bound.total for bound in tally.bounds] == list(totals.values())
        assert room == found.is_satisfied(tally.bits) == (not tally.exceeded)


def test_lower_to_budget_lowers_only_what_is_too_wide():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(4, 8)
    prepared = prepare(model, "2%", example_inputs=(x,))
    prepared(x)
    accounts = prepared.plan.accounting
    lower_to_budget(prepared)
    met = prepared.bit_widths
    assert accounts.is_satisfied(list(met.values()))
    lower_to_budget(prepared)
    assert prepared.bit_widths == met
    names = list(met)
    prepared.set_bit_widths([site.allowed[0] for site in accounts.sites])
    lower_to_budget(prepared)
    assert prepared.bit_widths == dict(zip(names, accounts.lowest_bits(), strict=True))
