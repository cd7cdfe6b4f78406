"""Bit-widths for each channel or element, from `prepare` to a file."""

import json
import runpy
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import cgmq_fx
from cgmq_fx.choose_bits import choose_bits
from cgmq_fx.frozen import FrozenWeight
from cgmq_fx.sensitivity import predicted_loss
from cgmq_fx.unit_bits import UnitBits, bits_of
from cgmq_fx.unit_quantizer import UnitQuantizer

X = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 4),
    )


def prepared_net(granularity, budget="1%", **options):
    prepared = cgmq_fx.prepare(
        net(), budget, example_inputs=(X[:1],), granularity=granularity, **options
    )
    prepared(X)
    return prepared


def train(prepared, steps, total):
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-3)
    guide = cgmq_fx.attach(prepared, optimizer, total_steps=total)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(prepared(X), Y).backward()
        optimizer.step()
    return guide


@pytest.mark.parametrize("granularity", ["channel", "element"])
def test_training_meets_the_budget_with_bit_widths_that_differ(granularity):
    prepared = prepared_net(granularity, "0.9%")
    guide = train(prepared, 60, 60)
    assert guide.is_satisfied
    mixed = [bits for bits in prepared.bit_widths.values() if isinstance(bits, UnitBits)]
    assert mixed
    fixed = cgmq_fx.lower(prepared)
    assert cgmq_fx.report(fixed).satisfied
    assert fixed.bit_widths == prepared.bit_widths
    assert torch.allclose(fixed(X), prepared.eval()(X), atol=1e-5)


def test_without_a_batch_norm_lowered_and_prepared_are_equal_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    for granularity in ("channel", "element"):
        prepared = cgmq_fx.prepare(
            model, "1%", example_inputs=(X[:1],), granularity=granularity, widths=(0, 1, 2, 4, 8)
        )
        train(prepared, 30, 30)
        fixed = cgmq_fx.lower(prepared)
        with torch.no_grad():
            assert torch.equal(fixed(X), prepared.eval()(X))


@pytest.mark.parametrize("granularity", ["channel", "element"])
def test_a_network_that_was_stopped_early_is_lowered_within_its_budget(granularity):
    prepared = prepared_net(granularity, "0.7%")
    train(prepared, 5, 1000)
    assert not prepared.plan.accounting.is_satisfied(list(prepared.bit_widths.values()))
    assert cgmq_fx.report(cgmq_fx.lower(prepared)).satisfied


def test_costs_are_those_of_every_channel():
    prepared = prepared_net("channel", "100%", widths=(0, 2, 4, 8))
    name = next(name for name, q in prepared.quantizers.items() if q.spec.num_units == 8)
    prepared.set_bit_widths(
        [bits_of(bytes([0, 0, 2, 2, 4, 4, 8, 8])) if site == name else bits
         for site, bits in prepared.bit_widths.items()]
    )  # fmt: skip
    row = cgmq_fx.report(prepared).rows[0]
    assert row.macs == 8 * 9 * 64
    assert row.cost["bops"] == sum(bits * 8 * 9 * 64 for bits in (0, 0, 2, 2, 4, 4, 8, 8))
    written = json.loads(cgmq_fx.report(prepared).to_json())["rows"][0]["weight_bits"]
    assert written == {
        "mean": "7/2", "mean_float": 3.5, "units": {"0": 2, "2": 2, "4": 2, "8": 2},
    }  # fmt: skip
    assert "w3.50 a8" in str(cgmq_fx.report(prepared))


def test_weight_memory_counts_the_map_of_bit_widths():
    budget = {"bops": "100%", "weight_memory": "100%"}
    prepared = prepared_net("element", budget, widths=(2, 4, 8))
    quantizer = next(q for q in prepared.quantizers.values() if q.spec.num_units == 72)
    before = cgmq_fx.report(prepared).totals["weight_memory"]
    quantizer.set_bit_width(8)
    at_8 = cgmq_fx.report(prepared).totals["weight_memory"]
    assert before - at_8 == Fraction(72 * 24, 8)
    quantizer.set_bit_width(bits_of(bytes([2, 4] * 36)))
    mixed = cgmq_fx.report(prepared).totals["weight_memory"]
    # Of three widths two bits say which an element has.
    assert at_8 - mixed == Fraction(72 * 8 - 72 * 3 - 72 * 2, 8)


@pytest.mark.parametrize("granularity", ["channel", "element"])
def test_more_gates_are_predicted_to_lose_less(granularity):
    losses = {}
    for kind in ("layer", granularity):
        prepared = prepared_net(kind, "0.8%")
        train(prepared, 3, 1000)
        bits = choose_bits(prepared)
        assert prepared.plan.accounting.is_satisfied(bits)
        losses[kind] = _loss(prepared, bits)
    assert losses[granularity] < losses["layer"]


def _loss(prepared, bits):
    total = 0.0
    predicted = predicted_loss(prepared)
    weights = dict(prepared.named_parameters())
    for site, width, losses in zip(prepared.plan.accounting.sites, bits, predicted, strict=True):
        if not isinstance(width, UnitBits):
            total += losses[width]
            continue
        quantizer = prepared.quantizers[site.name]
        weight = next(w for w in weights.values() if w.numel() == site.elements)
        errors = quantizer.unit_errors(weight).flatten(1).sum(1) / site.elements
        scale = losses[2] / float(errors[quantizer.grid_widths.index(2)])
        place = [quantizer.grid_widths.index(b) for b in width.units]
        chosen = quantizer.unit_errors(weight).flatten(1)[place, range(len(place))]
        total += scale * float(chosen.sum()) / site.elements
    return total


def test_an_override_chooses_the_granularity_of_one_weight():
    prepared = cgmq_fx.prepare(
        net(), "1%", example_inputs=(X[:1],), overrides={"3": {"granularity": "element"}}
    )
    several = {n: q for n, q in prepared.quantizers.items() if isinstance(q, UnitQuantizer)}
    assert [q.spec.unit_shape for q in several.values()] == [(8, 4, 3, 3)]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: prepared_net("row"), "granularity='row' is unknown; give one of 'layer'"),
        (lambda: cgmq_fx.Override(granularity="row"), "granularity='row' is unknown"),
        (
            lambda: cgmq_fx.Override(granularity="element", role="input"),
            "concerns weights, and role='input' leaves them out",
        ),
        (
            lambda: cgmq_fx.attach(
                (p := prepared_net("channel")), torch.optim.SGD(p.parameters(), 0.1),
                direction="dir_1",
            ),
            "moves one gate of a tensor",
        ),
        (lambda: bits_of(bytes([4, 32])), "a tensor is float as a whole"),
        (lambda: bits_of(bytes([4, 17])), r"bit-widths \[17\] of units are none"),
        (
            lambda: next(iter(prepared_net("channel").quantizers.values())).set_bit_width(
                bits_of(bytes([3, 2] * 4))
            ),
            r"has \[3\]; give one of 2, 4, 8, 16, 32 for each of its 8 units",
        ),
        (
            lambda: next(iter(prepared_net("channel").quantizers.values())).set_bit_width(
                bits_of(bytes([4, 2]))
            ),
            "is of 2 units",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call, told):
    with pytest.raises(cgmq_fx.UsageError, match=told):
        call()


@pytest.mark.parametrize("granularity", ["channel", "element"])
def test_a_checkpoint_brings_the_bit_widths_of_units_back(granularity, tmp_path):
    prepared = prepared_net(granularity)
    train(prepared, 20, 20)
    cgmq_fx.save_checkpoint(tmp_path / "run.ckpt", prepared)
    again = cgmq_fx.prepare(net(), "1%", example_inputs=(X[:1],), granularity=granularity)
    cgmq_fx.resume(tmp_path / "run.ckpt", again, model_only=True)
    assert again.bit_widths == prepared.bit_widths
    assert torch.equal(again.eval()(X), prepared.eval()(X))
    other = cgmq_fx.prepare(net(), "1%", example_inputs=(X[:1],))
    with pytest.raises(cgmq_fx.UsageError, match="granularity"):
        cgmq_fx.resume(tmp_path / "run.ckpt", other, model_only=True)


def test_state_of_other_bit_widths_is_not_loaded_into_a_lowered_module():
    prepared = prepared_net("channel", "100%")
    bits = list(prepared.bit_widths.values())
    states = []
    for units in ([2, 8] * 4, [8, 2] * 4):
        bits[0] = bits_of(bytes(units))
        prepared.set_bit_widths(bits)
        states.append(cgmq_fx.lower(prepared, allow_untrained=True))
    with pytest.raises(cgmq_fx.UsageError, match="codes of 8 bits are not loaded"):
        states[0].load_state_dict(states[1].state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("granularity", ["channel", "element"])
def test_a_change_of_widths_compiles_nothing_anew(granularity):
    torch._dynamo.reset()
    prepared = prepared_net(granularity, "100%")
    compiled = torch.compile(prepared, fullgraph=True)
    generator = np.random.default_rng(0)
    compiled(X).sum().backward()
    counters.clear()
    for _ in range(3):
        bits = [
            bits_of(generator.choice([2, 4, 8], q.spec.num_units).astype(np.uint8).tobytes())
            if q.spec.unit_shape
            else b
            for q, b in zip(prepared.quantizers.values(), prepared.bit_widths.values(), strict=True)
        ]
        prepared.set_bit_widths(bits)
        found = compiled(X)
        found.sum().backward()
        assert torch.allclose(found, prepared(X), atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 0


def test_post_training_chooses_and_rounds_units():
    for granularity in ("channel", "element"):
        prepared = cgmq_fx.prepare(net(), "1%", example_inputs=(X[:1],), granularity=granularity)
        cgmq_fx.calibrate(prepared, [X])
        found = cgmq_fx.solve(prepared, [X])
        assert prepared.plan.accounting.is_satisfied(found.bits)
        assert tuple(prepared.bit_widths.values()) == found.bits
        shares = cgmq_fx.round_weights(prepared, [X])
        assert all(share <= 1 for share in shares.values())
        assert bool(shares) == (granularity == "channel")
        assert cgmq_fx.report(cgmq_fx.lower(prepared)).satisfied


@pytest.mark.parametrize("granularity", ["channel", "element"])
def test_the_reader_of_the_page_reads_units(granularity, tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs" / "formats" / "safetensors.md"
    source = page.read_text().partition("```python reader.py\n")[2].partition("```")[0]
    (tmp_path / "reader.py").write_text(source)
    prepared = prepared_net(granularity, widths=(0, 1, 2, 4, 8))
    train(prepared, 10, 10)
    fixed = cgmq_fx.lower(prepared)
    path = cgmq_fx.export(fixed, tmp_path / "model.safetensors")
    _, found = runpy.run_path(str(tmp_path / "reader.py"))["read"](path)
    weights = {n: m for n, m in fixed.named_modules() if isinstance(m, FrozenWeight)}
    assert any(module.unit_bits is not None for module in weights.values())
    for name, module in weights.items():
        assert (found[name] == module().numpy()).all()


def test_elements_of_several_scales_are_refused_by_formats_of_runtimes(tmp_path):
    prepared = prepared_net("element")
    train(prepared, 10, 10)
    fixed = cgmq_fx.lower(prepared)
    for suffix in (".onnx", ".qonnx.onnx", ".pt2", ".pte"):
        with pytest.raises(cgmq_fx.UsageError, match=r"export to \.safetensors, or prepare"):
            cgmq_fx.export(fixed, tmp_path / f"model{suffix}", example_inputs=(X,))
    assert not list(tmp_path.iterdir())
