"""A refused budget comes with figures and changes that work: each one is used here."""

import itertools
import random
import warnings
from fractions import Fraction

import pytest
import torch
from torch import nn

from cgmq_fx.budget import Limit
from cgmq_fx.errors import BudgetError
from cgmq_fx.prepare import prepare
from cgmq_fx.units import amount_at_least, convert, number_at_least, parse_amount

UNITS = {"bops": "BOP", "npu": "cycle", "weight_memory": "byte", "peak_activation_memory": "byte"}


def network(rng):
    """A chain of linear layers and ReLUs, some of them used twice."""
    sizes = [rng.randint(2, 9) for _ in range(rng.randint(2, 4))]
    layers = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
        if rng.random() < 0.3:
            layers += [square := nn.Linear(after, after), nn.ReLU(), square]
    return nn.Sequential(*layers), torch.zeros(1, sizes[0])


def table(rng):
    """A price list: of grids, constants and formulas; some cost more at fewer bits."""
    kind = rng.choice(["grid", "grid", "constant", "formula", "falling"])
    widths = sorted({8, *rng.sample([2, 3, 4, 16], rng.randint(0, 2))})
    cells = [
        {"weight": w, "activation": a, "cost": Fraction(w * a + rng.randint(0, 9), 64)}
        for w in widths
        for a in ([8] if rng.random() < 0.5 else widths)
    ] + [
        {"weight": widths[-1], "activation": widths[-1], "cost": Fraction(widths[-1] ** 2 + 9, 64)}
    ]
    unique = {(cell["weight"], cell["activation"]): cell for cell in cells}
    prices = {
        "grid": {"grid": list(unique.values())},
        "constant": {"cost": Fraction(rng.randint(1, 50), 7)},
        "formula": {"cost": {"formula": "weight_bits * activation_bits / 64"}},
        "falling": {"cost": {"formula": "40 - weight_bits + activation_bits"}},
    }[kind]
    row = {"op": "linear", "per": "mac", **prices}
    return {"name": "npu", "unit": "cycle", "row": [row]}


def attempt(model, x, budget, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare(model, budget, example_inputs=x, **options)


def budgets(rng, model, x, options, names):
    """Budgets around their floors: each a share, or an amount."""
    everything = attempt(model, x, dict.fromkeys(names, "100%"), options).plan.accounting
    found = {}
    for name in names:
        resource = everything.resources[name]
        floor = resource.floor([site.allowed for site in everything.sites])
        amount = floor * Fraction(rng.randint(50, 130), 100)
        share = amount / resource.reference
        by_share = rng.random() < 0.5 and 0 < share <= 1
        found[name] = Limit(share=share) if by_share else Limit(value=amount, unit=UNITS[name])
    return found


@pytest.mark.parametrize("seed", range(60))
def test_what_a_refusal_proposes_works(seed):
    rng = random.Random(seed)
    model, x = network(rng)
    names = rng.sample(sorted(UNITS), rng.randint(1, 3))
    tables = [table(rng), "bops"] if "npu" in names else ["bops"]
    options = {"cost_table": tables, "learn_input_bits": rng.random() < 0.3}
    if rng.random() < 0.5:
        options["widths"] = rng.choice([(8,), (4, 8), (8, 16), (2, 8)])
    try:
        budget = budgets(rng, model, x, options, names)
    except BudgetError:
        return  # the table's 100 % is below what its narrowest pair costs
    try:
        attempt(model, x, budget, options)
    except BudgetError as error:
        refused = error
    else:
        return
    assert set(refused.floors) == set(refused.feasible) == set(budget)
    exact = {name: Limit(value=v, unit=UNITS[name]) for name, v in refused.feasible.items()}
    attempt(model, x, exact, options)
    attempt(model, x, {**budget, **refused.suggestion}, options)
    for change in refused.unlocks:
        attempt(model, x, budget, {**options, **change})
    if len(budget) == 1:
        ((name, figure),) = refused.feasible.items()
        assert figure == refused.floors[name]
        less = Limit(value=figure - Fraction(1, 10**9), unit=UNITS[name])
        with pytest.raises(BudgetError):
            attempt(model, x, {name: less}, options)


def test_the_cases_above_reach_every_kind_of_change():
    """Of the seeds of the property, each kind of change is claimed by some."""
    kinds = set()
    for seed in range(60):
        rng = random.Random(seed)
        model, x = network(rng)
        options = {"cost_table": [table(rng), "bops"]}
        try:
            attempt(model, x, budgets(rng, model, x, options, ["npu"]), options)
        except BudgetError as error:
            kinds |= {key for change in error.unlocks for key in change}
    assert {"learn_input_bits", "cost_table"} <= kinds


def test_learned_inputs_are_not_offered_where_they_do_not_help():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.zeros(1, 64)
    with pytest.raises(BudgetError) as caught:
        prepare(model, {"weight_memory": "1 KiB"}, example_inputs=x)
    assert "learn_input_bits" not in str(caught.value)
    assert caught.value.unlocks == ()
    # 2 weights of 64 x 64 at 2 bits, 128 biases at 32.
    assert caught.value.floors == {"weight_memory": 2 * 64 * 64 * 2 // 8 + 128 * 4}
    assert "0_weight_ (" in str(caught.value)
    assert "other parameters (20.0 % of the floor, whatever the bit-widths)" in str(caught.value)


def test_a_single_layer_whose_pair_is_too_wide():
    """16 MACs at 1 cycle are 16; half a cycle at a narrower pair makes 8."""
    grid = [{"weight": 8, "activation": 8, "cost": 1}]
    npu = {"name": "npu", "unit": "cycle", "row": [{"op": "linear", "per": "mac", "grid": grid}]}
    model, x = nn.Linear(4, 4), torch.zeros(1, 4)
    with pytest.raises(BudgetError) as caught:
        prepare(
            nn.Sequential(model),
            "8 cycle",
            example_inputs=x,
            cost_table=npu,
            learn_input_bits=True,
        )
    message = str(caught.value)
    assert "by cost table, row 1: weight 8 x activation 8)" in message
    assert "runs weight 4 x activation 4 for at most 0.5 cycle per mac" in message
    assert caught.value.feasible == {"npu": 16}
    assert caught.value.suggestion == {"npu": "16 cycle"}


def test_budgets_that_exclude_each_other_name_the_least_of_each():
    table = {
        "name": "other",
        "unit": "cycle",
        "row": [{"op": "linear", "per": "mac", "cost": {"formula": "64 - weight_bits"}}],
    }
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4)
    budget = {"other": f"{16 * 32} cycle", "bops": f"{16 * 2 * 8} BOP"}
    with pytest.warns(UserWarning, match="falls"), pytest.raises(BudgetError) as caught:
        prepare(model, budget, cost_table=[table, "bops"], example_inputs=x)
    assert "each budget can be met alone" in str(caught.value)
    # At 2 bits `other` costs 62 a MAC; at 32 bits `bops` costs 256.
    assert f"{16 * 62} cycle for other, the others as they are" in str(caught.value)
    assert "4.096 kBOP, for bops, the others as they are" in str(caught.value)


@pytest.mark.parametrize("seed", range(50))
def test_a_figure_that_is_shown_is_never_below(seed):
    rng = random.Random(seed)
    amount = Fraction(rng.randint(1, 10**9), rng.randint(1, 10 ** rng.randint(0, 9)))
    for unit in ("byte", "BOP", "uJ", "ms"):
        number, shown = parse_amount(amount_at_least(amount, unit, 6))
        back = convert(number, shown.symbol, unit)
        assert amount <= back <= amount * (1 + Fraction(1, 10**5))
    assert number_at_least(amount, 4).replace(".", "").isdecimal()


def test_a_suggestion_keeps_the_names_of_the_budget():
    model, x = torch.nn.Linear(8, 4), torch.randn(2, 8)
    budget = {"bops": "0.5%", "energy": "1 pJ"}
    with pytest.raises(BudgetError) as caught:
        prepare(model, budget, example_inputs=x)
    assert set(caught.value.suggestion) == set(budget)
    prepare(model, {**budget, **caught.value.suggestion}, example_inputs=x)
