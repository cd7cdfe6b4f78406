import re

import pytest
import torch
from torch import nn

import cgmq_fx
from cgmq_fx import BudgetError, TrainingError, UsageError
from cgmq_fx.calibration import observed_ends
from cgmq_fx.measured_loss import measured_loss
from cgmq_fx.observers import OBSERVERS, ends_by


def network(seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 10)]
    model = nn.Sequential(*body)
    model(torch.randn(64, 1, 12, 12) * 2 + 1)  # running statistics that are not those of the start
    return model.eval()


def batches(count=4, size=64):
    """Return inputs whose neighbours are alike, as those of images are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, size, 1, 14, 14, generator=generator)
    smooth = nn.functional.avg_pool2d(x.flatten(0, 1), 3, 1) * 3
    return list(smooth.unflatten(0, (count, size)))


def prepared(bits=None, budget="100%", **options):
    made = cgmq_fx.prepare(network(), budget, example_inputs=(batches(1)[0],), **options)
    if bits is not None:
        made.set_bit_widths([bits if site.learned else 8 for site in made.plan.accounting.sites])
    return made


def error(fixed):
    """Return how far a module is off the float one, on inputs that nothing was fitted on."""
    x = batches(6)[-1]
    with torch.no_grad():
        wanted = network()(x)
        return float((fixed(x) - wanted).square().mean() / wanted.square().mean())


# -- calibrate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", OBSERVERS)
def test_calibrated_models_lower_without_labels(observer):
    made = prepared(8)
    cgmq_fx.calibrate(made, batches(), observer=observer)
    fixed = cgmq_fx.lower(made)
    assert error(fixed) < 1e-3
    assert set(fixed.bit_widths.values()) == {8}


def test_ranges_come_from_all_batches_and_the_float_model():
    data = batches(3)
    data[1][0, 0, 0, 0] = 50.0
    made = prepared(2)
    cgmq_fx.calibrate(made, data, observer="minmax")
    assert float(made.quantizers["input_1"].base.max()) == 50.0
    relu = network()[:3](torch.cat(data)).detach()
    assert float(made.quantizers["_3"].base) == pytest.approx(float(relu.max()), rel=1e-5)
    cgmq_fx.calibrate(made, data, observer="minmax", batches=1)
    assert float(made.quantizers["input_1"].base.max()) < 50.0


def test_observers_differ_where_there_are_outliers():
    torch.manual_seed(0)
    rows = torch.randn(1, 200_000)
    rows[0, 0] = 60.0
    ends = observed_ends(rows, "symmetric")
    found = {name: float(ends_by(name, rows, ends, "symmetric", 4)) for name in OBSERVERS}
    assert found["minmax"] == 60.0
    assert 3.5 < found["percentile"] < 4.5  # 99.99 % of a normal distribution lie within 3.9
    assert 2.0 < found["mse"] < 3.5
    assert 1.5 < found["entropy"] < 8.0


@pytest.mark.parametrize("scheme", ["symmetric", "unsigned", "affine"])
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("bits", [0, 1, 2, 8, 16])
def test_observers_stay_within_what_was_seen(scheme, observer, bits):
    if scheme != "symmetric" and observer == "minmax" and bits == 0:
        bits = 2
    torch.manual_seed(0)
    rows = torch.randn(3, 500).abs() if scheme == "unsigned" else torch.randn(3, 500) + 0.3
    ends = observed_ends(rows, scheme)
    found = ends_by(observer, rows, ends, scheme, bits)
    assert found.shape == ends.shape
    most = 1.4 if observer == "mse" else 1.0001  # a wider range may round with a smaller error
    assert bool((found <= ends * most).all())
    assert bool((found.sum(0) if found.ndim == 2 else found).gt(0).all())


def test_a_later_width_is_fitted_by_the_same_observer():
    made = prepared(8)
    cgmq_fx.calibrate(made, batches(), observer="minmax")
    before = float(made.quantizers["_3"].base)
    made.set_bit_widths([2 if site.learned else 8 for site in made.plan.accounting.sites])
    made.eval()(batches(1)[0])
    assert float(made.quantizers["_3"].base) == before
    cgmq_fx.calibrate(made, batches(), observer="mse")
    assert float(made.quantizers["_3"].base) < before


def test_batches_may_have_labels_and_names():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x, y, scale=None):
            return self.linear(x + y) if scale is None else self.linear(x + y) * scale

    torch.manual_seed(0)
    x, y, labels = torch.randn(8, 4), torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    found = []
    for batch in ((x, y, labels), {"y": y, "labels": labels, "x": x}, [x, y]):
        made = cgmq_fx.prepare(Two(), "100%", example_inputs=(x, y))
        cgmq_fx.calibrate(made, [batch])
        found.append(float(made.quantizers["add_"].base.sum()))
    assert found[0] == found[1] == found[2] != 2.0


def test_bad_arguments_are_refused_and_change_nothing():
    made = prepared(8)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    nan = batches()
    nan[2][0] = torch.nan
    cases = [
        (
            {"observer": "max"},
            batches(),
            UsageError,
            "observer='max' is unknown, use one of 'minm",
        ),
        ({"batches": 0}, batches(), UsageError, "batches=0 must be at least 1, or None"),
        ({}, [], UsageError, "the loader gave no batch"),
        ({}, batches(1)[0], UsageError, "got the loader Tensor; give a DataLoader, or a list"),
        ({}, [3], UsageError, "batch 1 is int; give a tensor, a sequence"),
        ({}, [{"image": 1}], UsageError, r"has the keys \['image'\], and the model takes \['input"),
        ({}, nan, TrainingError, r"calibrate, batch 3: quantizer 'input_1'.* NaN"),
    ]
    for options, loader, kind, message in cases:
        with pytest.raises(kind, match=message):
            cgmq_fx.calibrate(made, loader, **options)
        assert made.plan.calibrated_on == 0
        assert all(quantizer.tap is None for quantizer in made.quantizers.values())
        for name, value in made.state_dict().items():
            assert torch.equal(value, before[name]) or name.endswith(("calibrated", "base")), name
    with pytest.raises(UsageError, match="calibrate got Linear, which prepare did not return"):
        cgmq_fx.calibrate(nn.Linear(2, 2), batches())


def test_recurrent_and_attention_layers_are_calibrated():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    for layer in (nn.GRU(8, 8, batch_first=True), nn.TransformerEncoderLayer(8, 2, 16)):
        made = cgmq_fx.prepare(layer.eval(), "100%", example_inputs=(x,), widths=(8, 32))
        made.set_bit_widths([site.allowed[0] for site in made.plan.accounting.sites])
        cgmq_fx.calibrate(made, [x, x * 2])
        assert all(quantizer.is_calibrated for quantizer in made.quantizers.values())
        with torch.no_grad():
            found, wanted = cgmq_fx.lower(made)(x), layer(x)
        found, wanted = (y[0] if isinstance(y, tuple) else y for y in (found, wanted))
        assert 0 < float((found - wanted).abs().max()) < 0.2


# -- solve --------------------------------------------------------------------------------------


def test_solve_meets_every_budget_and_beats_uniform_widths():
    budget = {"bops": "3%", "weight_memory": "20%"}
    made = prepared(budget=budget)
    cgmq_fx.calibrate(made, batches())
    found = cgmq_fx.solve(made, batches(2))
    assert found.is_optimal
    assert tuple(made.bit_widths.values()) == found.bits
    fixed = cgmq_fx.lower(made)
    assert cgmq_fx.report(fixed).satisfied
    uniform = prepared(4)
    cgmq_fx.calibrate(uniform, batches())
    assert error(fixed) < error(cgmq_fx.lower(uniform))


def test_solve_without_a_loader_uses_what_is_known():
    made = prepared(budget="3%")
    cgmq_fx.calibrate(made, batches())
    assert cgmq_fx.solve(made).is_optimal
    assert cgmq_fx.report(cgmq_fx.lower(made)).satisfied


def test_solve_needs_ranges_and_scipy(monkeypatch):
    with pytest.raises(TrainingError, match=r"never saw a tensor.*call cgmq_fx\.calibrate\(prep"):
        cgmq_fx.solve(prepared(), batches())
    made = prepared()
    cgmq_fx.calibrate(made, batches())
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    before = made.bit_widths
    with pytest.raises(UsageError, match=r"needs scipy; install it with pip install 'cgmq-fx\[so"):
        cgmq_fx.solve(made, batches(1))
    assert made.bit_widths == before


def test_measuring_leaves_the_model_as_it_was():
    made = prepared(4)
    cgmq_fx.calibrate(made, batches())
    x = batches(1)[0]
    made.eval()
    before = made(x)
    losses = measured_loss(made, [(x,)])
    assert torch.equal(made(x), before)
    for site, loss in zip(made.plan.accounting.sites, losses, strict=True):
        assert set(loss) == set(site.allowed)
        if len(loss) > 1:
            assert loss[2] > loss[8] > loss[32] == 0


# -- rounding and biases ------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("per_channel", [True, False])
def test_rounding_lowers_the_error_of_the_outputs(bits, per_channel):
    made = prepared(bits, widths=(bits, 8), per_channel=per_channel)
    cgmq_fx.calibrate(made, batches())
    nearest = error(cgmq_fx.lower(made))
    shares = cgmq_fx.round_weights(made, batches())
    assert set(shares) == {"0_weight_", "4_weight_", "7_weight_"}
    assert max(shares.values()) <= 1
    fixed = cgmq_fx.lower(made)
    assert error(fixed) < 0.9 * nearest
    assert cgmq_fx.round_weights(made, batches())["0_weight_"] == pytest.approx(1, abs=0.02)


def test_rounding_finds_the_best_codes_of_a_small_layer():
    """Against trying them all: it ends in a minimum that no single code can lower."""
    torch.manual_seed(3)
    x = torch.randn(200, 4) @ torch.randn(4, 4)
    layer = nn.Linear(4, 3)
    made = cgmq_fx.prepare(layer, "100%", example_inputs=(x,), widths=(2, 32))
    made.set_bit_widths([2 if site.role == "weight" else 8 for site in made.plan.accounting.sites])
    cgmq_fx.calibrate(made, [x])
    quantizer = made.quantizers["weight"]
    cgmq_fx.round_weights(made, [x])
    rounded = made.weight.detach().clone()

    @torch.no_grad()
    def loss(weight):
        wanted = layer(x)
        given = made.quantizers["input_1"](x)
        return float((nn.functional.linear(given, weight, layer.bias) - wanted).square().sum())

    qparams = quantizer.qparams()
    codes = quantizer.quantize(rounded)
    best = loss(rounded)
    for row in range(3):
        for column in range(4):
            for code in range(qparams.quant_min, qparams.quant_max + 1):
                other = codes.clone()
                other[row, column] = code
                assert loss(quantizer.dequantize(other)) >= best * 0.98  # the damping's share


def test_what_is_read_twice_is_not_rounded():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return self.linear(x) + nn.functional.linear(x, self.weight) + self.weight.sum()

    torch.manual_seed(0)
    x = torch.randn(30, 6)
    made = cgmq_fx.prepare(Tied(), "100%", example_inputs=(x,), widths=(3, 32))
    made.set_bit_widths([site.allowed[0] for site in made.plan.accounting.sites])
    cgmq_fx.calibrate(made, [x])
    before = made.weight.clone()
    assert set(cgmq_fx.round_weights(made, [x])) == {"linear_weight"}
    assert torch.equal(made.weight, before)


def test_correct_bias_makes_means_those_of_the_float_model():
    made = prepared(3, widths=(3, 8))
    cgmq_fx.calibrate(made, batches())
    x, model = torch.cat(batches()), network()
    with torch.no_grad():
        shift = (made.eval()(x) - model(x)).mean(0)
        assert set(cgmq_fx.correct_bias(made, batches())) == {
            "1.running_mean", "4.bias", "7.bias"
        }  # fmt: skip
        after = (made(x) - model(x)).mean(0)
    assert float(shift.abs().max()) > 1e-2
    assert float(after.abs().max()) < 1e-4


def test_rounding_needs_a_calibrated_model():
    with pytest.raises(TrainingError, match=r"round_weights: the quantizer '0_weight_' never saw"):
        cgmq_fx.round_weights(prepared(4), batches())


# -- presets ------------------------------------------------------------------------------------


def test_presets():
    model, data = network(), batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dynamic = cgmq_fx.quantize(model, data, preset="dynamic_range")
    assert set(dynamic.bit_widths.values()) == {8, 32}
    assert all((bits == 8) == ("weight" in name) for name, bits in dynamic.bit_widths.items())
    integer = cgmq_fx.quantize(model, iter(data))
    assert set(integer.bit_widths.values()) == {8}
    mixed = cgmq_fx.quantize(model, data, preset="mixed", budget="2%")
    assert cgmq_fx.report(mixed).satisfied
    assert error(dynamic) < error(integer) < 1e-3
    assert error(integer) < error(mixed) < 0.2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_presets_take_overrides_and_are_checked():
    data = batches(2)
    fixed = cgmq_fx.quantize(network(), data, overrides={"7": cgmq_fx.Override(bit_width=16)})
    assert fixed.bit_widths["7_weight_"] == 16
    for options, message in (
        ({"preset": "int8"}, "preset='int8' is unknown, use one of 'dynamic_range', 'full"),
        ({"preset": "mixed"}, r"chooses bit-widths within a budget; give one, such as budget='3%"),
    ):
        with pytest.raises(UsageError, match=message):
            cgmq_fx.quantize(network(), data, **options)
    with pytest.raises(UsageError, match="quantize got the loader Tensor; give a DataLoader"):
        cgmq_fx.quantize(network(), data[0])
    with pytest.raises(BudgetError, match="below the floor"):
        cgmq_fx.quantize(network(), data, budget="1%", example_inputs=(data[0],))


# -- pareto -------------------------------------------------------------------------------------


def train(made):
    """Train for a few steps, and give none back: `pareto` lowers it."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
    guide = cgmq_fx.attach(made, optimizer, total_steps=12)
    for x in batches(4, 16) * 3:
        optimizer.zero_grad()
        made(x).square().mean().backward()
        optimizer.step()
    guide.detach()


def test_pareto_walks_down_the_budgets():
    def tune(made):
        cgmq_fx.calibrate(made, batches(2))
        cgmq_fx.solve(made, batches(1))

    x = (batches(1)[0],)
    found = cgmq_fx.pareto(
        network(),
        ["1.2%", "6%", "2%"],
        tune,
        evaluate=lambda fixed: -error(fixed),
        example_inputs=x,
    )
    assert [point.budget for point in found.points] == ["6%", "2%", "1.2%"]
    for point in found.points:
        share = float(point.budget.rstrip("%")) / 100
        assert point.shares["bops"] <= share
        assert cgmq_fx.report(point.fixed).satisfied
    shares, metrics = found.curve()
    assert shares == sorted(shares, reverse=True)
    assert metrics == sorted(metrics, reverse=True)
    assert found.front() == found.points
    assert re.match(r"budget +bops +metric\n6% +746\.5 kBOP \([0-9.]+ %\) +-0\.00", str(found))
    lines = found.to_csv().splitlines()
    assert lines[0] == "budget,metric,bops (BOP),bops share"
    assert len(lines) == 4


def test_pareto_goes_on_with_what_was_trained():
    starts = []

    def tune(made):
        starts.append(made.get_parameter("0.weight").detach().clone())
        train(made)

    x = (batches(1)[0],)
    found = cgmq_fx.pareto(network(), ["3%", "2%"], tune, example_inputs=x)
    assert not torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], network().get_parameter("0.weight"))
    assert [cgmq_fx.report(point.fixed).satisfied for point in found.points] == [True, True]


def test_pareto_checks_budgets_before_it_runs():
    x, ran = (batches(1)[0],), []
    cases = [
        ([], UsageError, r"budgets=\[\] must be a list of at least one"),
        (["5%", "0.01%"], BudgetError, r"pareto, budget '0\.01%': "),
        (["5%", {"weight_memory": "50%"}], UsageError, "bound different resources"),
    ]
    for budgets, kind, message in cases:
        with pytest.raises(kind, match=message):
            cgmq_fx.pareto(network(), budgets, ran.append, example_inputs=x)
    with pytest.raises(UsageError, match="needs shapes; give example_inputs"):
        cgmq_fx.pareto(network(), ["5%"], ran.append)
    assert not ran
    wide = prepared(8)
    cgmq_fx.calibrate(wide, batches(1))
    with pytest.raises(BudgetError, match="tune returned a module that exceeds it in bops"):
        cgmq_fx.pareto(network(), ["2%"], lambda _: cgmq_fx.lower(wide), example_inputs=x)
