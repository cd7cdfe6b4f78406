import itertools
import random
from fractions import Fraction

import pytest
import torch

from cgmq_fx.cost import floor as floor_module
from cgmq_fx.cost.load import get_table
from cgmq_fx.cost.monotone import CostTableWarning
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.cost.terms import Term
from cgmq_fx.cost.totals import SumResource, price, weight_memory
from cgmq_fx.errors import CostTableError, UsageError
from cost_cases import LENET_MACS, LENET_NUMELS, WIDTHS, bind, conv, lenet, linear, matmul, plain


def at(*bits):
    return torch.tensor([WIDTHS.index(width) for width in bits])


def table(*rows, **fields):
    return CostTable(**{"name": "t", "unit": "cycle", "rows": rows, **fields})


@pytest.mark.parametrize(
    ("weight", "activation", "percent"),
    [(8, 8, "6.2500"), (4, 4, "1.7312"), (2, 8, "1.5625"), (2, 4, "0.8656"), (2, 2, "0.5172")],
)
def test_lenet_by_hand(weight, activation, percent):
    """First layer: image at 8 bits; the others at the activations' width."""
    lenet5 = price(lenet(), get_table("bops"), 7, WIDTHS)
    total = lenet5.total(at(*[weight] * 4, *[activation] * 3))
    assert total == weight * (8 * LENET_MACS[0] + activation * sum(LENET_MACS[1:]))
    assert lenet5.reference == 1024 * 4_267_008
    assert f"{float(100 * total / lenet5.reference):.4f}" == percent


def test_floor_of_lenet():
    lenet5 = price(lenet(), get_table("bops"), 7, WIDTHS)
    lowest = lenet5.lowest([WIDTHS] * 7)
    assert lenet5.floor([WIDTHS] * 7) == Fraction(lowest.scaled) == 16 * 460_800 + 4 * 3_806_208
    assert lowest.exact
    assert lowest.width_index == (0,) * 7
    assert lenet5.floor([(8,)] * 7) == 64 * 4_267_008


def test_total_is_the_sum_of_the_rows():
    lenet5 = price(lenet(), get_table("bops"), 7, WIDTHS)
    index = at(2, 4, 8, 16, 32, 2, 4)
    costs = lenet5.costs(index)
    assert costs == [
        2 * 8 * LENET_MACS[0],
        4 * 32 * LENET_MACS[1],
        8 * 2 * LENET_MACS[2],
        16 * 4 * LENET_MACS[3],
    ]
    assert lenet5.total(index) == lenet5.total(index.tolist()) == sum(costs)


def test_delta_is_the_change_of_the_total():
    lenet5 = price(lenet(), get_table("bops"), 7, WIDTHS)
    index = [0, 1, 2, 3, 4, 0, 1]
    for site, to in itertools.product(range(7), range(5)):
        moved = [*index[:site], to, *index[site + 1 :]]
        change = lenet5.total(moved) - lenet5.total(index)
        assert lenet5.delta(site, to, index) == change


def test_one_site_on_both_sides():
    squared = price([bind(matmul(macs=10), "s0", "s0")], get_table("bops"), 1, WIDTHS)
    assert [squared.total(at(width)) for width in WIDTHS] == [10 * width**2 for width in WIDTHS]
    assert squared.delta(0, 2, [1]) == 10 * (64 - 16)
    assert squared.floor([(4, 8)]) == 160


def test_fractions_are_exact():
    third = table(
        Row(op="conv2d", per="mac", cost={"formula": "weight_bits / 3"}),
        Row(op="linear", per="mac", cost={"formula": "activation_bits / 7"}),
    )
    priced = price(
        [bind(conv(macs=1), "s0", "8"), bind(linear(macs=1), "8", "s1")], third, 2, WIDTHS
    )
    assert priced.scale == 21
    assert priced.total(at(2, 4)) == Fraction(2, 3) + Fraction(4, 7)
    assert priced.bound_scaled(Fraction(1, 2)) == 10
    assert priced.total_scaled(at(2, 4)) == 26


def test_fixed_and_free_operations():
    operations = [
        bind(plain("opened", "opaque", macs=3)),
        bind(plain("relu", "activation")),
        bind(conv(macs=2), "4", "8"),
        bind(conv("c2", macs=2), "s0", "8"),
    ]
    priced = price(operations, get_table("bops"), 1, WIDTHS)
    assert priced.costs(at(2)) == [3072, 0, 64, 32]
    assert priced.total(at(2)) == 3168
    assert [operation.name for operation in priced.without_row] == ["relu"]
    assert priced.unpriced == ()
    none_learned = price(operations[:3], get_table("bops"), 0, WIDTHS)
    assert none_learned.total(torch.empty(0, dtype=torch.int64)) == none_learned.floor([]) == 3136


def test_unpriced_operations():
    rows = [Row(op="conv2d", per="mac", cost=1)]
    operations = [
        bind(conv(), "s0", "8"),
        bind(linear("fc"), "s1", "s0"),
        bind(matmul("m"), "s0", "s1"),
    ]
    with pytest.raises(CostTableError, match=r"no row for 2 operations with 2,000 MACs: 'fc'.*'m'"):
        price(operations, table(*rows), 2, WIDTHS)
    priced = price(operations, table(*rows, unpriced="zero"), 2, WIDTHS)
    assert [operation.name for operation in priced.unpriced] == ["fc", "m"]
    assert priced.total(at(2, 2)) == 1000


def test_sums_beyond_int64():
    huge = [bind(conv(f"c{i}", macs=2**58), f"s{i}", "8") for i in range(3)]
    priced = price(huge, get_table("bops"), 3, WIDTHS)
    assert priced.total(at(32, 32, 16)) == 2**58 * 8 * 80
    assert priced.delta(0, 0, [4, 4, 3]) == -(2**58) * 8 * 30


GRID = [
    {"weight": 4, "activation": 8, "cost": 1},
    {"weight": 8, "activation": 8, "cost": 2},
]


def test_supported_widths():
    grids = table(Row(op="conv2d", per="mac", grid=GRID), Row(op="linear", per="mac", cost=1))
    operations = [bind(conv(), "s0", "s1"), bind(linear(), "s2", "s1")]
    priced = price(operations, grids, 3, WIDTHS)
    assert priced.supported == ((4, 8), (8,), WIDTHS)
    assert priced.total(at(4, 8, 2)) == 2000
    with pytest.raises(CostTableError, match="no price at these bit-widths for 'conv'"):
        priced.total(at(16, 8, 2))
    with pytest.raises(CostTableError, match="no price at these bit-widths for 'conv'"):
        priced.delta(0, 4, [1, 2, 0])
    with pytest.raises(CostTableError, match="no price at these bit-widths for 'conv'"):
        priced.floor([(4, 16), (8,), (2,)])


def test_nothing_in_common():
    grids = table(
        Row(op="conv2d", per="mac", grid=[{"weight": 8, "activation": 4, "cost": 1}]),
        Row(op="linear", per="mac", grid=[{"weight": 8, "activation": 8, "cost": 1}]),
    )
    operations = [bind(conv(), "s0", "s1"), bind(linear("fc"), "s2", "s1")]
    with pytest.raises(CostTableError, match=r"site 1 serves 'conv': \[4\], 'fc': \[8\]"):
        price(operations, grids, 3, WIDTHS)


def test_fixed_width_that_does_not_fit():
    grids = table(Row(op="conv2d", per="mac", grid=GRID))
    operations = [
        bind(conv("a"), "s0", "32"),
        bind(conv("b"), "s0", "8"),
        bind(conv("c"), "16", "s1"),
    ]
    with pytest.raises(CostTableError, match=r"'a' .* activation_bits = 32 .*; .*'c' .*_bits = 16"):
        price(operations, grids, 2, WIDTHS)


def test_formula_with_attributes_is_priced_per_operation():
    per_group = table(Row(op="conv2d", per="mac", cost={"formula": "groups * weight_bits"}))
    operations = [bind(conv("a", macs=1, groups=n), "s0", "8") for n in (1, 4)]
    assert price(operations, per_group, 1, WIDTHS).costs(at(2)) == [2, 8]


def test_wrong_number_of_sources():
    with pytest.raises(CostTableError, match="'conv' has 2 bit-widths, 1 sources were given"):
        price([bind(conv(), "s0")], get_table("bops"), 1, WIDTHS)


def test_falling_formula_with_attributes_warns_once():
    falling = table(Row(op="conv2d", per="mac", cost={"formula": "groups * 64 / weight_bits"}))
    operations = [bind(conv(), "s0", "8"), bind(conv("d"), "s1", "8")]
    message = "'conv': the cost falls when bits rise: weight 2, activation 8 costs 32, but weight 4"
    with pytest.warns(CostTableWarning, match=message) as caught:
        priced = price(operations, falling, 2, WIDTHS)
    assert len(caught) == 1
    assert priced.floor([WIDTHS] * 2) == 2 * 2 * 1000
    strict = table(*falling.rows, strict=True)
    with pytest.raises(CostTableError, match=r"costs 32, but weight 4.*; correct the formula"):
        price(operations, strict, 2, WIDTHS)


def test_weight_memory_of_lenet():
    """582,624 weights and 618 biases: at 2 bits 145,656 byte, biases 2,472 byte."""
    memory = weight_memory(range(4), LENET_NUMELS, fixed_bits=618 * 32, num_sites=7, widths=WIDTHS)
    assert (memory.name, memory.unit) == ("weight_memory", "byte")
    assert sum(LENET_NUMELS) == 581_408
    assert memory.reference == 4 * (581_408 + 618)
    assert memory.total(at(2, 2, 2, 2, 32, 32, 32)) == Fraction(581_408, 4) + 2472
    assert memory.floor([WIDTHS] * 7) == 145_352 + 2472
    assert memory.delta(0, 1, [0] * 7) == 200
    assert memory.costs(at(2, 2, 2, 2, 2, 2, 2))[-1] == 2472
    assert memory.bound_scaled(Fraction(64 * 1024)) == 64 * 1024 * 8


def test_wrong_use_is_refused():
    lenet5 = price(lenet(), get_table("bops"), 7, WIDTHS)
    with pytest.raises(UsageError, match="'bops' has 7 sites, widths were given for 2"):
        lenet5.total([0, 0])
    with pytest.raises(UsageError, match="bit-width 3 is not among"):
        lenet5.floor([(3,)] * 7)
    with pytest.raises(UsageError, match=r"sites \[2\] have no allowed bit-width"):
        lenet5.floor([(2,), (2,), (), (2,), (2,), (2,), (2,)])
    for widths in ((), (4, 2), (2, 2), (-1, 2)):
        with pytest.raises(UsageError, match="must be whole, rising"):
            price(lenet(), get_table("bops"), 7, widths)


def random_terms(rng, num_sites, num_terms, widths=3):
    terms = []
    for number in range(num_terms):
        sites = [rng.choice([None, *range(num_sites)]) for _ in range(2)]
        shape = [1 if site is None else widths for site in sites]
        costs = tuple(tuple(rng.randrange(100) for _ in range(shape[1])) for _ in range(shape[0]))
        terms.append(Term(f"t{number}", (sites[0], sites[1]), costs))
    return terms


@pytest.mark.parametrize("seed", range(20))
def test_floor_equals_brute_force(seed, monkeypatch):
    rng = random.Random(seed)
    num_sites = rng.randrange(1, 6)
    terms = random_terms(rng, num_sites, rng.randrange(1, 9))
    resource = SumResource("r", "BOP", (2, 4, 8), num_sites, terms, 1, Fraction(1))
    best = min(
        sum(term.cost(choice) for term in terms)
        for choice in itertools.product(range(3), repeat=num_sites)
    )
    lowest = resource.lowest([(2, 4, 8)] * num_sites)
    assert (lowest.scaled, lowest.exact) == (best, True)
    assert resource.total_scaled(lowest.width_index) == best
    monkeypatch.setattr(floor_module, "MAX_CELLS", 3)
    reached = resource.lowest([(2, 4, 8)] * num_sites)
    assert resource.total_scaled(reached.width_index) == reached.scaled >= best


def test_ten_thousand_operations_in_a_millisecond():
    """The limit is generous, since other work may share the core; benchmarks measure the figure."""
    import time

    rng = random.Random(0)
    operations = [
        bind(conv(f"c{i}", macs=rng.randrange(1, 10**6)), f"s{i}", f"s{10_000 + i // 2}")
        for i in range(10_000)
    ]
    priced = price(operations, get_table("bops"), 15_000, WIDTHS)
    index = torch.randint(0, 5, (15_000,))
    times = []
    for _ in range(30):
        start = time.perf_counter()
        priced.total_scaled(index)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3
    assert priced.total(index) == sum(priced.costs(index))
