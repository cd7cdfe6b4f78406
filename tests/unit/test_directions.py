import copy
import dataclasses
import time
from fractions import Fraction
from typing import Any

import pytest
import torch

from cgmq_fx.directions import direction_named
from cgmq_fx.errors import UsageError
from cgmq_fx.guide import attach
from cgmq_fx.prepare import prepare
from cgmq_fx.sensitivity import mean_size, predicted_loss, rounding_error
from small_training import small_data, small_prepared, train_step

GATED = ["dir_1", "dir_2", "dir_3"]
STEP = 0.5 * 0.25  # the stride of the median gate times the slowest pace


def ready(budget: Any = "3%", **options: Any):
    """Return a prepared model that knows its gradients, at its widest."""
    prepared = small_prepared(budget, **options)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.0)
    guide = attach(prepared, optimizer, direction="dir_1", total_steps=10**9)
    train_step(prepared, optimizer)
    guide.detach()
    return prepared


def gates_of(prepared):
    return {name: float(quantizer.gate) for name, quantizer in prepared.quantizers.items()}


def learned_of(prepared):
    return [site.name for site in prepared.plan.accounting.sites if site.learned]


def bound(prepared, limit):
    """Replace the one budget of a prepared model."""
    accounting = prepared.plan.accounting
    limits = dict.fromkeys(accounting.limits, limit)
    prepared.plan.accounting = dataclasses.replace(accounting, limits=limits)


def loosen(prepared):
    """Let every bit-width be met."""
    (name,) = prepared.plan.accounting.limits
    bound(prepared, prepared.plan.accounting.resources[name].reference)


def is_satisfied(prepared):
    return prepared.plan.accounting.is_satisfied(list(prepared.bit_widths.values()))


@pytest.mark.parametrize("name", GATED)
def test_while_unsatisfied_every_gate_falls(name):
    """The proof that a budget is met: by a fixed amount at each check, down to the lowest band."""
    prepared = ready("0.9%")
    rule, checks = direction_named(name), 0
    while not is_satisfied(prepared):
        before = gates_of(prepared)
        rule.update(prepared, 0.5)
        after = gates_of(prepared)
        for site in learned_of(prepared):
            assert after[site] <= max(before[site] - STEP, 0.5)
        checks += 1
        assert checks <= 4.0 / STEP + 1
    assert checks > 2


@pytest.mark.parametrize("name", GATED)
def test_once_satisfied_it_stays_so_and_gates_grow(name):
    prepared = ready("3%")
    rule = direction_named(name)
    while not is_satisfied(prepared):
        rule.update(prepared, 0.5)
    start = gates_of(prepared)
    for _ in range(60):
        before = gates_of(prepared)
        rule.update(prepared, 0.5)
        assert is_satisfied(prepared)
        after = gates_of(prepared)
        assert all(after[site] >= before[site] for site in before)
    assert any(after[site] > start[site] for site in start)
    assert [float(q.gate) for q in prepared.quantizers.values()] == list(after.values())


@pytest.mark.parametrize("name", GATED)
def test_blocked_growth_leaves_the_range_alone(name):
    """A gate that may not grow must not even for a moment: the range would be fitted anew."""
    prepared = ready("0.9%")
    accounting = prepared.plan.accounting
    prepared.set_bit_widths(accounting.lowest_bits())
    prepared(small_data()[0])
    bound(prepared, accounting.totals(accounting.lowest_bits())["bops"])
    for _ in range(10):
        direction_named(name).update(prepared, 0.5)
    assert tuple(prepared.bit_widths.values()) == accounting.lowest_bits()
    assert not any(quantizer.refit_pending for quantizer in prepared.quantizers.values())


@pytest.mark.parametrize("name", GATED)
def test_what_the_loss_cares_least_about_falls_fastest_and_grows_last(name):
    prepared = ready("0.9%")
    with torch.no_grad():
        prepared.plan.statistics[:, 0] = 1e-9
        order = learned_of(prepared)
        sites = [site.name for site in prepared.plan.accounting.sites]
        for rank, site in enumerate(order):
            prepared.plan.statistics[sites.index(site), 0] = 10.0**rank
            # One size for all tensors: dir_2 and dir_3 look at it too.
            prepared.quantizers[site]._sample = torch.ones(1, 1)
    before = gates_of(prepared)
    direction_named(name).update(prepared, 0.5)
    falls = [before[site] - gates_of(prepared)[site] for site in order]
    assert falls == sorted(falls, reverse=True)
    assert falls[0] > falls[-1]

    prepared.set_bit_widths(prepared.plan.accounting.lowest_bits())
    loosen(prepared)
    before = gates_of(prepared)
    direction_named(name).update(prepared, 0.5)
    grown = [gates_of(prepared)[site] - before[site] for site in order]
    assert grown == sorted(grown)
    assert grown[-1] == pytest.approx(0.5)


@pytest.mark.parametrize("name", [*GATED, "fisher"])
def test_fixed_sites_never_move(name):
    prepared = ready("1%")
    fixed = [site.name for site in prepared.plan.accounting.sites if not site.learned]
    assert fixed
    before = gates_of(prepared)
    for check in range(1, 20):
        direction_named(name).update(prepared, min(1.0, check / 10))
        assert all(gates_of(prepared)[site] == before[site] for site in fixed)
    assert any(gates_of(prepared)[site] != before[site] for site in before)


@pytest.mark.parametrize("name", [*GATED, "fisher"])
def test_nothing_learned_nothing_moves(name):
    prepared = ready("100%", widths=(32,))
    before = prepared.bit_widths
    direction_named(name).update(prepared, 1.0)
    assert prepared.bit_widths == before


@pytest.mark.parametrize("budget", ["0.9%", "3%", {"bops": "5%", "weight_memory": "20%"}])
def test_fisher_descends_to_the_budget(budget):
    prepared = ready(budget)
    accounting = prepared.plan.accounting
    rule, costs = direction_named("fisher"), []
    for check in range(1, 11):
        rule.update(prepared, check / 10)
        costs.append(accounting.totals(list(prepared.bit_widths.values()))["bops"])
    assert costs[:9] == sorted(costs[:9], reverse=True)
    assert costs[0] > costs[4] > costs[9]
    assert is_satisfied(prepared)
    limit = accounting.limits["bops"]
    widest = accounting.resources["bops"].reference
    for check, cost in enumerate(costs[:9], start=1):
        bound = limit * Fraction((float(widest / limit)) ** (1 - check / 10))
        assert cost <= bound


def test_fisher_gives_bits_to_what_the_loss_cares_about():
    prepared = ready("5%")
    sites = [site.name for site in prepared.plan.accounting.sites]
    bits = {}
    for favoured in ("0_weight_", "3_weight_"):
        twin = copy.deepcopy(prepared)
        twin.plan.statistics[:, 1] = 1.0
        twin.plan.statistics[sites.index(favoured), 1] = 1e6
        direction_named("fisher").update(twin, 1.0)
        bits[favoured] = twin.bit_widths
    assert bits["0_weight_"]["0_weight_"] > bits["3_weight_"]["0_weight_"]
    assert bits["3_weight_"]["3_weight_"] > bits["0_weight_"]["3_weight_"]


@pytest.mark.parametrize("name", [*GATED, "fisher"])
def test_same_seed_same_bits(name):
    def run():
        torch.manual_seed(3)
        prepared = small_prepared("2%")
        optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
        attach(prepared, optimizer, direction=name, total_steps=60)
        for _ in range(25):
            train_step(prepared, optimizer)
        return gates_of(prepared), prepared.state_dict()

    first, second = run(), run()
    assert first[0] == second[0]
    assert all(torch.equal(value, second[1][key]) for key, value in first[1].items())


@pytest.mark.parametrize("name", GATED)
def test_gates_cross_widths_that_the_hardware_lacks(name):
    """The table has 4, 8 and 32 bits; a gate that falls or grows never rests on 2 or 16."""
    grid = [
        {"weight": first, "activation": second, "cost": first * second}
        for first in (4, 8, 32)
        for second in (4, 8, 32)
    ]
    rows = [{"op": "linear", "per": "mac", "grid": grid}]
    table = {"schema": 1, "name": "npu", "unit": "cycle", "row": rows}
    prepared = ready("3%", cost_table=table)
    rule = direction_named(name)
    for bits in learned_of(prepared):
        assert prepared.quantizers[bits].spec.widths == (2, 4, 8, 16, 32)
    fallen = [rule.update(prepared, 0.5) or set(prepared.bit_widths.values()) for _ in range(20)]
    assert set.union(*fallen) <= {4, 8, 32}
    assert 4 in fallen[-1]
    loosen(prepared)
    grown = [rule.update(prepared, 0.5) or set(prepared.bit_widths.values()) for _ in range(20)]
    assert set.union(*grown) <= {4, 8, 32}
    assert 32 in grown[-1]
    assert is_satisfied(prepared)


def test_an_unknown_direction():
    with pytest.raises(UsageError, match=r"direction='dir_4' is unknown; .*'fisher'.*'dir_3'"):
        direction_named("dir_4")


def test_before_any_gradient_tensors_count_by_their_relative_error():
    prepared = small_prepared()
    prepared(small_data()[0])
    losses = predicted_loss(prepared)
    for site, loss in zip(prepared.plan.accounting.sites, losses, strict=True):
        quantizer = prepared.quantizers[site.name]
        assert list(loss) == list(site.allowed)
        for bits, value in loss.items():
            expected = rounding_error(quantizer, bits) / mean_size(quantizer) ** 2
            assert value == pytest.approx(expected)
        values = list(loss.values())
        assert values == sorted(values, reverse=True)


def test_without_a_sample_the_range_serves():
    prepared = small_prepared()
    prepared(small_data()[0])
    twin = copy.deepcopy(prepared)
    twin.load_state_dict(prepared.state_dict())
    for name, quantizer in twin.quantizers.items():
        assert not quantizer.has_sample
        assert rounding_error(quantizer, 32) == 0
        assert rounding_error(quantizer, 4) > rounding_error(quantizer, 8) > 0
        ratio = mean_size(quantizer) / mean_size(prepared.quantizers[name])
        assert 0.1 < ratio < 10
    direction_named("dir_2").update(twin, 0.5)


def test_a_check_of_many_sites_is_not_quadratic():
    """Two hundred layers: a check of every gate against the budget takes well under a second."""
    layers = [torch.nn.Linear(2, 2, bias=False) for _ in range(200)]
    model = torch.nn.Sequential(*layers)
    prepared = prepare(model, "50%", example_inputs=(torch.randn(2, 2),))
    prepared(torch.randn(2, 2))
    prepared.set_bit_widths(prepared.plan.accounting.lowest_bits())
    started = time.process_time()
    direction_named("dir_2").update(prepared, 0.5)
    assert time.process_time() - started < 2
