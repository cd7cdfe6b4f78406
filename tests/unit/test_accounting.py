"""The accounting against figures worked out elsewhere: LeNet-5 and its table of relative costs."""

import copy
import random
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cgmq_fx.errors import BudgetError, TrainingError
from cgmq_fx.prepare import prepare
from graph_zoo import Auxiliary, Calls, TiedLanguageModel, case

# MACs: 24*24*32*25, 8*8*64*25*32, 1024*512, 512*10.
MACS = {"conv1": 460_800, "conv2": 3_276_800, "fc1": 524_288, "fc2": 5_120}
# Relative bit-operations in percent, with the image at 8 bits, by weight and activation bits.
TABLE = {(8, 8): 6.25, (4, 4): 1.7312, (2, 8): 1.5625, (2, 4): 0.8656, (2, 2): 0.5172}


class LeNet(nn.Module):
    """32C5-MP2-64C5-MP2-FC512-FC10, without padding."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 5), nn.Conv2d(32, 64, 5)
        self.fc1, self.fc2 = nn.Linear(1024, 512), nn.Linear(512, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


@pytest.fixture(scope="module")
def images():
    return torch.zeros(3, 1, 28, 28)


def lenet(images, budget="100%", **options):
    return prepare(LeNet(), budget, example_inputs=(images,), **options)


def bits_of(accounting, weight, activation):
    return [
        site.allowed[0] if not site.learned else weight if site.role == "weight" else activation
        for site in accounting.sites
    ]


def share(accounting, bits):
    return accounting.totals(bits)["bops"] / accounting.resources["bops"].reference


def test_macs_are_those_of_the_table(images):
    accounting = lenet(images).plan.accounting
    assert {b.operation.name: b.operation.macs for b in accounting.operations if b.sources} == MACS
    assert accounting.resources["bops"].reference == 1024 * sum(MACS.values())
    assert {site.role: site.allowed for site in accounting.sites}["input"] == (8,)


@pytest.mark.parametrize("widths", TABLE, ids=lambda widths: "{}/{}".format(*widths))
def test_relative_costs_are_those_of_the_table(widths, images):
    accounting = lenet(images).plan.accounting
    found = share(accounting, bits_of(accounting, *widths))
    assert round(float(100 * found), 4) == TABLE[widths]
    image = MACS["conv1"] * widths[0] * 8
    rest = (sum(MACS.values()) - MACS["conv1"]) * widths[0] * widths[1]
    assert found == Fraction(image + rest, 1024 * sum(MACS.values()))


@pytest.mark.parametrize(
    ("learned", "floor", "enough", "conv1"),
    [(False, "0.5172", "0.5172", "32.6"), (True, "0.3906", "0.3907", "10.8")],
    ids=["image at 8 bits", "image learned"],
)
def test_the_floor_and_what_makes_it(learned, floor, enough, conv1, images):
    with pytest.raises(BudgetError) as caught:
        lenet(images, "0.39%", learn_input_bits=learned)
    message = str(caught.value)
    assert "budget bops = 17.0407 MBOP" in message
    assert f"({floor} % of the reference)" in message
    assert f"conv1 ({conv1} % of the floor" in message
    assert "conv2_weight at 2 bits" in message
    assert ("learn_input_bits=True" in message) is not learned
    assert f"a budget of at least {enough} %" in message
    lenet(images, f"{enough}%", learn_input_bits=learned)


def test_totals_are_the_sum_of_the_rows_at_any_widths(images):
    accounting = lenet(images, {"bops": "100%", "weight_memory": "100%"}).plan.accounting
    chance = random.Random(1)
    for _ in range(50):
        bits = [chance.choice(site.allowed) for site in accounting.sites]
        for name, total in accounting.totals(bits).items():
            assert total == sum(accounting.resources[name].costs(accounting.index(bits)))
        named = dict(zip(accounting.site_names, bits, strict=True))
        assert accounting.totals(bits)["bops"] == (
            MACS["conv1"] * named["conv1_weight"] * 8
            + MACS["conv2"] * named["conv2_weight"] * named["max_pool2d"]
            + MACS["fc1"] * named["fc1_weight"] * named["flatten"]
            + MACS["fc2"] * named["fc2_weight"] * named["relu_2"]
        )
        weights = {"conv1": 800, "conv2": 51_200, "fc1": 524_288, "fc2": 5_120}
        stored = sum(named[f"{layer}_weight"] * count for layer, count in weights.items())
        assert accounting.totals(bits)["weight_memory"] == Fraction(stored + 32 * 618, 8)


def test_random_budgets_are_judged_exactly(images):
    accounting = lenet(images).plan.accounting
    floor = share(accounting, accounting.lowest_bits())
    chance = random.Random(2)
    for _ in range(20):
        budget = floor + (1 - floor) * Fraction(chance.random())
        bounded = lenet(images, budget).plan.accounting
        bits = [chance.choice(site.allowed) for site in bounded.sites]
        assert bounded.is_satisfied(bits) == (share(bounded, bits) <= budget)
        assert bounded.is_satisfied(bounded.lowest_bits())
    with pytest.raises(BudgetError, match="below the floor"):
        lenet(images, floor - Fraction(1, 10**12))
    lenet(images, floor)


def test_two_budgets_that_only_together_are_too_much():
    table = {
        **{"schema": 1, "name": "other", "unit": "cycle", "source": "made up"},
        "reference": {"weight": 32, "activation": 32},
        "row": [
            {"op": "linear", "per": "mac", "cost": {"formula": "64 - weight_bits"}},
        ],
    }
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4)
    with pytest.warns(UserWarning, match="falls"):
        prepare(model, {"other": "100%"}, cost_table=[table, "bops"], example_inputs=x)
    budget = {"other": f"{16 * 33} cycle", "bops": f"{16 * 2 * 8} BOP"}
    with (
        pytest.warns(UserWarning, match="falls"),
        pytest.raises(BudgetError, match=r"met alone.* all at once: .*other"),
    ):
        prepare(model, budget, cost_table=[table, "bops"], example_inputs=x)


def test_a_tied_weight_is_stored_once_and_priced_at_each_use():
    budget = {"bops": "100%", "weight_memory": "100%"}
    prepared = prepare(
        TiedLanguageModel(), budget, example_inputs=(torch.zeros(2, 4, dtype=torch.int64),)
    )
    accounting = prepared.plan.accounting
    uses = [bound.operation.op for bound in accounting.operations if bound.sources]
    assert uses == ["embedding", "linear", "linear"]
    memory = accounting.resources["weight_memory"]
    # The tied weight, the mixing layer, its bias, and the norm.
    assert memory.reference == 4 * (11 * 6 + 6 * 6 + 6 + 12)
    index = accounting.site_names.index("embed_weight")
    bits = [32] * len(accounting.sites)
    bits[index] = 2
    saved = Fraction(11 * 6 * 30, 8)
    assert accounting.totals(bits)["weight_memory"] == memory.reference - saved
    assert accounting.totals([32] * len(bits))["bops"] - accounting.totals(bits)["bops"] == (
        4 * 11 * 6 * 32 * 30
    )


def test_a_weight_that_is_computed_is_stored_once():
    model = Calls(lambda self, x: x @ self.layer.weight.t(), layer=nn.Linear(4, 3, bias=False))
    prepared = prepare(model, {"weight_memory": "100%"}, example_inputs=torch.zeros(1, 4))
    assert prepared.plan.accounting.resources["weight_memory"].reference == 4 * 12


def test_a_learned_attention_bias_is_stored_in_float():
    model = Calls(
        lambda self, x: F.scaled_dot_product_attention(
            self.layer(x), x, x, attn_mask=self.bias[None].tanh()
        ),
        layer=nn.Linear(4, 4, bias=False),
        bias=nn.Parameter(torch.zeros(3, 3)),
    )
    budget = {"bops": "100%", "weight_memory": "100%"}
    prepared = prepare(model, budget, example_inputs=torch.zeros(1, 3, 4))
    accounting = prepared.plan.accounting
    assert accounting.resources["weight_memory"].reference == 4 * (4 * 4 + 3 * 3)
    narrow = accounting.totals([site.allowed[0] for site in accounting.sites])
    assert narrow["weight_memory"] == 4 * 3 * 3 + Fraction(2 * 4 * 4, 8)


def test_what_training_alone_computes_costs_nothing():
    prepared = prepare(Auxiliary(), "100%", example_inputs=torch.zeros(2, 6))
    accounting = prepared.plan.accounting
    assert [bound.operation.name for bound in accounting.operations if bound.sources] == [
        "body",
        "head",
    ]
    assert not any("extra" in name for name in accounting.site_names)


def test_costs_are_for_one_sample_unless_the_inputs_have_no_batch():
    model, (x,) = case("plain").build()
    per_sample, whole = (
        prepare(model, "100%", example_inputs=x, batch_axis=axis).plan.accounting
        for axis in (0, None)
    )
    assert whole.resources["bops"].reference == 2 * per_sample.resources["bops"].reference


def test_the_first_batch_prices_what_no_example_did(images):
    prepared = prepare(LeNet(), "0.6%")
    with pytest.raises(TrainingError, match=r"seen no batch.* example_inputs"):
        _ = prepared.plan.accounting
    twin = copy.deepcopy(prepared)
    prepared(images)
    late, early = prepared.plan.accounting, lenet(images, "0.6%").plan.accounting
    assert (late.sites, late.operations, late.limits) == (
        early.sites,
        early.operations,
        early.limits,
    )
    assert not twin.plan.is_priced
    twin(images)
    assert twin.plan.is_priced


def test_the_first_batch_refuses_an_infeasible_budget(images):
    with pytest.raises(BudgetError, match=r"0\.5172 % of the reference"):
        prepare(LeNet(), "0.4%")(images)
