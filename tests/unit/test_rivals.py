"""The penalty that the default is compared with, and what the table of rivals says of rows."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmark_scripts import script
from cgmq_fx.lower import lower
from small_training import small_data, small_prepared

penalty = script("accuracy/penalty")
rivals = script("accuracy/rivals_page")


def in_percent(prepared):
    (name,) = prepared.plan.accounting.limits
    cost = prepared.plan.accounting.resources[name]
    bits = list(prepared.bit_widths.values())
    return float(100 * prepared.plan.accounting.totals(bits)[name] / cost.reference)


def soft(factor=1.0):
    torch.manual_seed(0)
    prepared = small_prepared("100%")
    return prepared, penalty.Penalty(prepared, factor)


def test_at_whole_places_the_term_is_the_cost():
    prepared, term = soft(factor=0.5)
    for step, between in enumerate(term._between.values()):
        between.place.data.fill_(step % len(between.widths))
    found = float(term.term().detach())
    prepared(small_data()[0])
    term.settle()
    assert found == pytest.approx(0.5 * in_percent(prepared), rel=1e-5)


def test_between_two_bit_widths_it_costs_and_rounds_in_between():
    prepared, term = soft()
    between = term._between["0_weight_"]
    weight = prepared.state_dict()["0.weight"]
    between.place.data.fill_(1.25)
    assert float(between.bits().detach()) == pytest.approx(0.75 * 4 + 0.25 * 8)
    wanted = 0.75 * between.at[1](weight) + 0.25 * between.at[2](weight)
    torch.testing.assert_close(between(weight), wanted)
    assert not torch.equal(wanted, weight)


def test_it_lowers_bit_widths_and_what_it_leaves_can_be_lowered():
    costs = []
    for factor in (0.0, 10.0):
        prepared, term = soft(factor)
        optimizer = torch.optim.Adam([*prepared.parameters(), *term.ranges()], 1e-3)
        optimizer.add_param_group({"params": term.places(), "lr": 0.1})
        x, y = small_data()
        for _ in range(30):
            optimizer.zero_grad()
            (F.cross_entropy(prepared(x), y) + term.term()).backward()
            optimizer.step()
        term.settle()
        assert not term.term().isnan()
        costs.append(in_percent(lower(prepared, allow_untrained=True)))
    assert costs[1] < costs[0] / 2


def test_the_learned_range_stays_with_its_bit_width():
    prepared, term = soft()
    prepared(small_data()[0])
    site, between = next(iter(term._between.items()))
    with torch.no_grad():
        between.at[between.nearest()].multiplier.fill_(1.5)
    wanted = between.widths[between.nearest()]
    term.settle()
    quantizer = prepared.quantizers[site]
    assert quantizer.bit_width == wanted
    assert (quantizer.multiplier == 1.5).all()
    assert "forward" not in vars(quantizer)


ROW = rivals.Row("net", rivals.DEFAULT, "1%", 0.0, 0, 90.0, 0.9, 60.0)


def rows(**accuracies):
    """Return rows of two seeds, by way."""
    return [
        replace(ROW, way=way.replace("_first", " first"), seed=seed, accuracy=value)
        for way, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


def test_the_default_is_best_or_within_the_spread():
    assert rivals.is_best(rows(default=(90, 91), uniform=(89, 90)), "net", "1%")
    assert rivals.is_best(rows(default=(90, 91), solved_first=(91, 92)), "net", "1%")
    assert not rivals.is_best(rows(default=(90, 90), solved_first=(91, 91)), "net", "1%")
    assert not rivals.is_best(rows(solved_first=(91, 91)), "net", "1%")


def test_of_the_factors_the_best_that_meets_the_budget_counts():
    factors = [
        replace(ROW, way=rivals.PENALTY, budget="", factor=factor, share=share, accuracy=value)
        for factor, share, value in ((0.03, 2.5, 95.0), (0.1, 0.9, 91.0), (0.3, 0.5, 88.0))
    ]
    assert rivals.found(factors, "net", "1%", rivals.PENALTY) == [91.0]
    assert rivals.found(factors, "net", "0.6%", rivals.PENALTY) == [88.0]
    assert rivals.found(factors[:1], "net", "1%", rivals.PENALTY) == []
    assert not rivals.is_best([*rows(default=(90, 90)), *factors], "net", "1%")


def test_the_page_has_a_line_for_each_budget():
    text = rivals.page(rows(default=(90, 91), dir_1=(85, 85)), {"net": 93.0}, "command", "Sizes.")
    line = "| net | 93.00 | 1% | - | 85.00 (85.00 to 85.00) |"
    assert line in text
    assert "| 90.50 (90.00 to 91.00) | yes |" in text
    assert "4 trainings, 4 minutes" in text


def test_a_run_that_was_cut_has_every_key_once():
    keys = list(rivals.wanted(["net", "other"], [0, 1]))
    assert len(keys) == len(set(keys)) == 2 * 2 * (3 * 6 + len(rivals.FACTORS))
