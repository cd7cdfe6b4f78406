"""`lower`: what comes out agrees with what went in, is within budget, and stands alone."""

import copy
import importlib
import random

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from cgmq_fx.errors import BudgetError, TrainingError, UsageError
from cgmq_fx.frozen import FrozenModule, FrozenWeight
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.lower import lower
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.passes.freeze_bit_widths import FreezeBitWidths
from cgmq_fx.prepare import prepare
from graph_zoo import ZOO, case
from torchvision_shim import torchvision

GRAPHS = pytest.mark.parametrize("zoo_case", ZOO, ids=lambda item: item.id)
IMAGES = (torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(3)),)


def conv_net():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        *(nn.Dropout(0.3), nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.BatchNorm1d(8)),
        *(nn.ReLU(), nn.Linear(8, 3)),
    )


def lively(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def prepared_for(model, inputs, budget="100%", batch_axis=0):
    prepared = prepare(lively(model), budget, example_inputs=inputs, batch_axis=batch_axis).eval()
    prepared(*copy.deepcopy(inputs))
    prepared.plan.steps += 1
    return prepared


def at_widths(prepared, choose):
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(choose(quantizer))
    return prepared


def weights_only(quantizer, bits=4):
    return bits if quantizer.spec.role == "weight" else FLOAT_WIDTH


def tensors(gm, inputs):
    with torch.no_grad():
        outputs = pytree.tree_leaves(gm(*copy.deepcopy(inputs)))
    return [leaf for leaf in outputs if isinstance(leaf, torch.Tensor)]


def assert_close(got, want):
    for new, old in zip(got, want, strict=True):
        size = float(old.abs().max()) if old.numel() else 0.0
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4 * size, equal_nan=True)


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(module, state):
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@GRAPHS
@pytest.mark.parametrize("budget", ["100%", {"bops": "100%", "weight_memory": "100%"}], ids=str)
def test_lowered_agrees_with_prepared(zoo_case, budget):
    model, inputs = zoo_case.build()
    prepared = prepared_for(model, inputs, budget, zoo_case.batch_axis)
    at_widths(prepared, lambda q: random.choice(q.spec.widths))
    state, widths = snapshot(prepared), prepared.bit_widths
    fixed = lower(prepared)
    assert fixed.bit_widths == widths == prepared.bit_widths
    assert_same_state(prepared, state)
    assert_close(tensors(fixed, inputs), tensors(prepared, inputs))
    assert fixed.plan.accounting.is_satisfied(list(fixed.bit_widths.values()))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_batch_norms_fold_and_codes_stay(bits):
    prepared = prepared_for(conv_net(), IMAGES)
    at_widths(prepared, lambda q: weights_only(q, bits))
    want = tensors(prepared, IMAGES)
    frozen = copy.deepcopy(prepared)
    FreezeBitWidths().run(frozen)
    fixed = lower(prepared)
    assert_close(tensors(fixed, IMAGES), want)
    kinds = {type(module) for module in fixed.modules()}
    assert not kinds & {nn.BatchNorm2d, nn.BatchNorm1d, nn.Dropout}
    codes = [name for name in frozen.state_dict() if name.endswith(".packed")]
    assert len(codes) == 4
    assert all(torch.equal(frozen.state_dict()[name], fixed.state_dict()[name]) for name in codes)
    assert {name for name in fixed.state_dict() if not name.startswith(("frozen.", "plan."))} == {
        *("0.bias", "4.bias", "9.bias", "12.bias"),
    }


def test_resnet18():
    inputs = (torch.randn(2, 3, 32, 32),)
    prepared = prepared_for(torchvision.models.resnet18(num_classes=10), inputs)
    at_widths(prepared, weights_only)
    fixed = lower(prepared)
    assert_close(tensors(fixed, inputs), tensors(prepared, inputs))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fixed.modules())
    assert not [name for name in fixed.state_dict() if name.endswith(("weight", "running_mean"))]


def test_auxiliary_heads_are_not_in_the_state():
    inputs = (torch.randn(2, 3, 64, 64),)
    model = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    prepared = prepared_for(model, inputs)
    at_widths(prepared, weights_only)
    fixed = lower(prepared)
    assert any(name.startswith("aux1") for name in prepared.state_dict())
    assert not [name for name in fixed.state_dict() if "aux" in name]
    assert_close(tensors(fixed, inputs), tensors(prepared, inputs))


def test_drop_path_of_a_transformer_is_gone():
    inputs = (torch.randn(1, 3, 32, 32),)
    prepared = prepared_for(torchvision.models.convnext_tiny(num_classes=2), inputs)
    fixed = lower(at_widths(prepared, lambda q: weights_only(q, 8)))
    assert "StochasticDepth" not in {type(module).__name__ for module in fixed.modules()}
    assert_close(tensors(fixed, inputs), tensors(prepared, inputs))


class TestBudget:
    def test_training_that_stopped_early_is_lowered_to_the_budget(self):
        prepared = prepared_for(conv_net(), IMAGES, {"bops": "2%", "weight_memory": "30%"})
        state = snapshot(prepared)
        assert not prepared.plan.accounting.is_satisfied(list(prepared.bit_widths.values()))
        fixed = lower(prepared)
        assert prepared.plan.accounting.is_satisfied(list(fixed.bit_widths.values()))
        assert set(prepared.bit_widths.values()) == {8, 32}
        assert_same_state(prepared, state)

    def test_weight_memory_holds_on_the_stored_tensors(self):
        prepared = prepared_for(*case("tied").build(), {"weight_memory": "30%"})
        fixed = lower(prepared)
        frozen = {m.site: m for m in fixed.modules() if isinstance(m, FrozenWeight)}
        bits = sum(m.codes.numel() * m.bit_width for m in frozen.values())
        bits += sum(32 * parameter.numel() for parameter in fixed.parameters())
        total = sum(32 * parameter.numel() for parameter in case("tied").build()[0].parameters())
        assert bits <= 0.3 * total

    def test_every_random_budget_is_met(self):
        floor = 100 * self.floor_share()
        for _ in range(8):
            share = random.uniform(floor * 1.01, 100)
            prepared = prepared_for(conv_net(), IMAGES, f"{share:.4f}%")
            fixed = lower(prepared)
            accounting = fixed.plan.accounting
            bits = [fixed.bit_widths[name] for name in accounting.site_names]
            assert accounting.totals(bits)["bops"] <= accounting.limits["bops"]

    def floor_share(self):
        accounting = prepared_for(conv_net(), IMAGES).plan.accounting
        bops = accounting.resources["bops"]
        return float(accounting.totals(accounting.lowest_bits())["bops"] / bops.reference)

    def test_an_allocation_over_budget_is_refused(self, monkeypatch):
        module = importlib.import_module("cgmq_fx.lower")  # the package has a function so called
        monkeypatch.setattr(module, "lower_to_budget", lambda prepared: None)
        prepared = prepared_for(conv_net(), IMAGES, "2%")
        with pytest.raises(BudgetError, match=r"exceed the budget bops by \S+ .* above \S+ "):
            lower(prepared)

    def test_a_lowered_graph_over_budget_is_refused(self, monkeypatch):
        """A pass that would leave a tensor in float is found by reading the graph itself."""
        prepared = prepared_for(conv_net(), IMAGES, "2%")

        def forgetful(self, node, quantizer):
            return node.args[0]

        monkeypatch.setattr("cgmq_fx.passes.freeze_bit_widths._Freezer._weight", forgetful)
        with pytest.raises(BudgetError, match=r"'0_weight_': 32.* exceed the budget bops"):
            lower(prepared)


def test_a_model_inside_its_wrappers():
    prepared = prepared_for(conv_net(), IMAGES)
    expected = lower(prepared)(*IMAGES)
    for wrapped in (nn.DataParallel(prepared), torch.compile(prepared, backend="eager")):
        assert torch.equal(lower(wrapped)(*IMAGES), expected)


class TestRefusals:
    def test_a_lowered_module(self):
        fixed = lower(prepared_for(conv_net(), IMAGES))
        with pytest.raises(
            UsageError, match=r"Sequential is lowered already, to \{.*'input_1': 8,"
        ):
            lower(fixed)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (conv_net(), "lower got Sequential, a float model; it takes what"),
            ("resnet", "lower got str, not a model; it takes what"),
        ],
        ids=["float", "no model"],
    )
    def test_what_is_not_prepared(self, given, message):
        with pytest.raises(UsageError, match=message):
            lower(given)

    def test_a_model_that_saw_no_batch(self):
        with pytest.raises(TrainingError, match="has seen no batch"):
            lower(prepare(conv_net(), "100%"))

    def test_all_that_is_missing_is_named_at_once(self):
        prepared = prepare(conv_net(), "100%", example_inputs=IMAGES)
        message = r"Sequential cannot be lowered: it was trained for 0 steps.*allow_untrained=True"
        with pytest.raises(TrainingError, match=rf"{message}.*; and its quantizers \['input_1', "):
            lower(prepared)
        with pytest.raises(
            TrainingError, match=r"lowered: its quantizers \['input_1', .* never saw"
        ):
            lower(prepared, allow_untrained=True)

    def test_a_model_that_was_not_trained(self):
        prepared = prepared_for(conv_net(), IMAGES)
        prepared.plan.steps.zero_()
        with pytest.raises(TrainingError, match=r"trained for 0 steps"):
            lower(prepared)
        assert isinstance(lower(prepared, allow_untrained=True), LoweredModule)

    def test_a_width_that_changed_after_loading(self):
        trained = prepared_for(conv_net(), IMAGES)
        prepared = prepare(lively(conv_net()), "100%", example_inputs=IMAGES)
        prepared.load_state_dict(trained.state_dict())
        assert isinstance(lower(prepared), LoweredModule)
        at_widths(prepared, lambda q: q.spec.widths[0])
        with pytest.raises(TrainingError, match=r"Sequential .* of \['_3', '_8', '_11'\] changed"):
            lower(prepared)

    def test_weights_alone_need_no_batch(self):
        prepared = prepare(lively(conv_net()), {"weight_memory": "50%"}, example_inputs=IMAGES)
        fixed = lower(prepared, allow_untrained=True)
        assert isinstance(fixed, LoweredModule)


class TestLoweredModule:
    @pytest.fixture
    def fixed(self):
        prepared = prepared_for(conv_net(), IMAGES)
        return lower(at_widths(prepared, lambda q: q.spec.widths[min(1, len(q.spec.widths) - 2)]))

    def test_it_stays_in_evaluation_mode(self, fixed):
        assert fixed.train() is fixed
        assert not any(module.training for module in fixed.modules())

    def test_nothing_in_it_is_trained(self, fixed):
        assert not any(parameter.requires_grad for parameter in fixed.parameters())
        assert not fixed(*IMAGES).requires_grad

    def test_a_copy_stands_alone(self, fixed):
        twin, want = copy.deepcopy(fixed), tensors(fixed, IMAGES)
        assert isinstance(twin, LoweredModule)
        assert type(twin).__name__ == "Sequential"
        assert twin.bit_widths == fixed.bit_widths
        assert twin.plan.accounting is fixed.plan.accounting
        for buffer in fixed.buffers():
            buffer.zero_()
        assert all(map(torch.equal, tensors(twin, IMAGES), want))

    def test_its_state_dict_loads(self, fixed):
        other = conv_net()
        other[0].weight.data.mul_(3)
        prepared = prepared_for(other, IMAGES)
        at_widths(prepared, lambda q: q.spec.widths[min(1, len(q.spec.widths) - 2)])
        twin = lower(prepared)
        twin.load_state_dict(fixed.state_dict())
        assert all(map(torch.equal, tensors(twin, IMAGES), tensors(fixed, IMAGES)))

    def test_it_refuses_other_types(self, fixed):
        with pytest.raises(UsageError, match=r"Sequential .* torch.float32, .* torch.float64"):
            fixed.double()
        with pytest.raises(UsageError, match=r"become torch.float16"):
            fixed.half()
        assert fixed.float().to("cpu") is fixed
        meta = copy.deepcopy(fixed).to("meta")
        assert {buffer.device.type for buffer in meta.buffers()} == {"meta"}

    def test_every_frozen_module_says_what_it_is(self, fixed):
        found = [module for module in fixed.modules() if isinstance(module, FrozenModule)]
        assert {module.role for module in found} == {"input", "weight", "activation"}
        assert all(fixed.bit_widths[module.site] == module.bit_width for module in found)

    def test_buffers_that_are_not_saved_stay_so(self):
        fixed = lower(prepared_for(*case("functionals").build()))
        assert "shift" not in fixed.state_dict()
        assert "shift" in dict(fixed.named_buffers())
        assert "shift" not in copy.deepcopy(fixed).state_dict()


def test_prepared_trains_on_after_lowering():
    prepared = prepared_for(conv_net(), IMAGES)
    lower(prepared)
    prepared.train()
    prepared(*IMAGES).sum().backward()
    assert prepared.get_submodule("0").weight.grad is not None
