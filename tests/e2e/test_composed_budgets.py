"""Several budgets at once: all met by the lowered module, or refused with figures that are met."""

import random
from fractions import Fraction

import pytest
import torch

from cgmq_fx.budget import Limit
from cgmq_fx.errors import BudgetError
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from memory_models import ResNet20
from torchvision_shim import torchvision

UNITS = {
    "bops": "BOP",
    "weight_memory": "byte",
    "peak_activation_memory": "byte",
    "energy_45nm": "pJ",
}
COMBINATIONS = 50


def mobilenet_v2():
    return torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=10)


def prepared_for(model, limits, x):
    return prepare(model, limits, example_inputs=(x,), cost_table=["bops", "energy_45nm"])


def bounds_of(prepared) -> tuple[dict[str, Fraction], dict[str, Fraction]]:
    """Return for each resource its least and its reference."""
    accounting = prepared.plan.accounting
    allowed = [site.allowed for site in accounting.sites]
    floors = {name: item.floor(allowed) for name, item in accounting.resources.items()}
    return floors, {name: item.reference for name, item in accounting.resources.items()}


def drawn_limits(rng, floors, references) -> dict[str, Limit]:
    """Return limits from a little below the floor up to the reference, relative or absolute."""
    limits = {}
    for name, unit in UNITS.items():
        part = rng.uniform(-0.03, 1.0)
        spread = float(references[name] / floors[name])
        amount = floors[name] * Fraction(spread**part)
        share = amount / references[name]
        is_relative = rng.random() < 0.5 and share <= 1
        limits[name] = Limit(share=share) if is_relative else Limit(value=amount, unit=unit)
    return limits


def random_losses(rng):
    """Return a stand-in for the predicted loss: budgets must hold whatever the tensors deserve."""

    def predicted(prepared):
        sites = prepared.plan.accounting.sites
        weights = [10 ** rng.uniform(-3, 3) for _ in sites]
        return [
            {bits: 0.0 if bits == 32 else weight * 4.0**-bits for bits in site.allowed}
            for site, weight in zip(sites, weights, strict=True)
        ]

    return predicted


def lowered_totals(prepared, x):
    """Return the totals of the lowered module by the bit-widths of its own modules, and these."""
    with torch.no_grad():
        prepared(x)
    fixed = lower(prepared, allow_untrained=True)
    accounting = fixed.plan.accounting
    bits = tuple(fixed.bit_widths[name] for name in accounting.site_names)
    return accounting.totals(bits), bits


def amounts(limits, references):
    return {name: limit.amount(references[name], UNITS[name]) for name, limit in limits.items()}


@pytest.mark.slow
@pytest.mark.parametrize("make", [ResNet20, mobilenet_v2], ids=["resnet20", "mobilenet_v2"])
def test_fifty_combinations_of_four_budgets(make, monkeypatch):
    torch.manual_seed(0)
    rng = random.Random(3)
    monkeypatch.setattr("cgmq_fx.choose_bits.predicted_loss", random_losses(rng))
    model, x = make().eval(), torch.randn(1, 3, 32, 32)
    endless = {name: Limit(value=Fraction(10**15), unit=unit) for name, unit in UNITS.items()}
    floors, references = bounds_of(prepared_for(model, endless, x))
    refused = 0
    chosen = set()
    for _ in range(COMBINATIONS):
        limits = drawn_limits(rng, floors, references)
        below = {name for name, most in amounts(limits, references).items() if most < floors[name]}
        if below:
            refused += 1
            with pytest.raises(BudgetError) as caught:
                prepared_for(model, limits, x)
            assert all(name in str(caught.value) for name in below)
            feasible = caught.value.feasible
            limits |= {name: Limit(value=feasible[name], unit=UNITS[name]) for name in below}
        prepared = prepared_for(model, limits, x)
        totals, bits = lowered_totals(prepared, x)
        for name, most in amounts(limits, references).items():
            assert totals[name] <= most, name
        chosen.add(bits)
    assert COMBINATIONS // 10 <= refused <= COMBINATIONS * 9 // 10
    assert len(chosen) > COMBINATIONS // 2
