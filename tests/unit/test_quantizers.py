"""Quantizers as modules: calibration, widths, state, messages; and the set that holds them."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from cgmq_fx.errors import TrainingError, UsageError
from cgmq_fx.quantizer_spec import integer_grid
from cgmq_fx.quantizers import Quantizer, QuantizerSet, QuantizerSpec

ACTIVATION = QuantizerSpec("activation", "unsigned")
AFFINE = QuantizerSpec("activation", "affine")
WEIGHT = QuantizerSpec("weight", "symmetric", 0, 4)


def quantizer_at(bit_width, spec=ACTIVATION, x=None):
    quantizer = Quantizer(spec, "conv1_input")
    quantizer.calibrate(torch.rand(64) if x is None else x)
    quantizer.set_bit_width(bit_width)
    return quantizer


class TestCalibration:
    def test_the_first_forward_calibrates_on_what_it_sees(self):
        quantizer = Quantizer(ACTIVATION)
        assert not quantizer.is_calibrated
        quantizer(torch.tensor([0.5, 3.0]))
        assert quantizer.is_calibrated
        assert float(quantizer.base) == 3.0
        quantizer(torch.tensor([70.0]))
        assert float(quantizer.base) == 3.0

    def test_a_lower_width_is_fitted_to_the_next_tensor_seen_in_training(self):
        quantizer = quantizer_at(2)
        assert quantizer.refit_pending
        x = torch.rand(1000) * 50
        quantizer(x)
        assert not quantizer.refit_pending
        assert float(quantizer.base) > 25

    def test_in_evaluation_it_is_fitted_to_the_sample_that_was_kept(self):
        quantizer = quantizer_at(2).eval()
        quantizer(torch.rand(1000) * 50)
        assert not quantizer.refit_pending
        assert float(quantizer.base) < 1.5

    def test_a_weight_is_fitted_to_itself_even_in_evaluation(self):
        quantizer = quantizer_at(2, WEIGHT, torch.randn(4, 100)).eval()
        quantizer(torch.randn(4, 100) * 50)
        assert float(quantizer.base.min()) > 25

    def test_heavy_tails_are_clipped_at_two_bits(self):
        x = torch.cat((torch.rand(4000), torch.tensor([10.0])))
        quantizer = quantizer_at(16, x=x)
        quantizer.set_bit_width(2)
        quantizer.refit()
        assert 0.7 < float(quantizer.base) < 3
        noise = float((quantizer(x.clamp(max=1)) - x.clamp(max=1)).detach().square().mean())
        assert noise < 1 / 12  # nothing but zeros would lose 1/3

    @pytest.mark.parametrize(
        "x",
        [
            torch.zeros(5),
            torch.full((5,), -3.0),
            torch.full((5,), 7.0),
            torch.tensor([0.25]),
            torch.tensor(-2.0),
            torch.tensor([1e-45, 0.0]),
            torch.tensor([3e38, -3e38]),
            torch.tensor([1e-30, -1e-30]),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("scheme", ["symmetric", "unsigned", "affine"])
    @pytest.mark.parametrize("bit_width", [2, 16, 32])
    @pytest.mark.parametrize("role", ["weight", "activation"])
    def test_any_finite_tensor_gives_finite_results_and_gradients(self, x, scheme, bit_width, role):
        quantizer = Quantizer(QuantizerSpec(role, scheme))
        quantizer.set_bit_width(bit_width)
        leaf = x.clone().requires_grad_()
        result = quantizer(leaf)
        result.backward(torch.ones_like(result))
        assert result.isfinite().all()
        assert leaf.grad.isfinite().all()
        assert quantizer.probe.grad.isfinite().all()
        if bit_width != 32:
            scale = quantizer.qparams().scale
            assert scale.isfinite()
            assert scale > torch.finfo(torch.float32).tiny
            overflows = x.abs().max() > 1e35  # the gradient of a range is as large as the range
            assert overflows or quantizer.multiplier.grad.isfinite().all()

    def test_a_channel_of_zeros_has_the_range_of_the_widest(self):
        quantizer = Quantizer(WEIGHT)
        quantizer.calibrate(torch.tensor([[0.0, 0.0], [1.0, -2.0], [0.5, 0.1], [0.0, 0.0]]))
        assert quantizer.base.tolist() == [2.0, 2.0, 0.5, 2.0]

    @pytest.mark.parametrize("axis", [1, -2])
    def test_a_large_activation_is_sampled_in_every_channel(self, axis):
        quantizer = Quantizer(QuantizerSpec("activation", "symmetric", axis, 3))
        x = torch.randn(64, 3, 1024) * torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1)
        quantizer.calibrate(x)
        quantizer.set_bit_width(4)
        quantizer.refit(x)
        ratio = quantizer.base[1:] / quantizer.base[:-1]
        assert ((ratio > 8) & (ratio < 12)).all()
        assert quantizer.mean_abs == pytest.approx(float(x.abs().mean()), rel=0.1)

    def test_the_stride_of_the_sample_meets_every_column(self):
        quantizer = Quantizer(ACTIVATION)
        x = torch.zeros(64, 16, 32, 32)
        x[..., 31] = 1.0
        quantizer.calibrate(x)
        assert quantizer.mean_abs == pytest.approx(1 / 32, rel=0.05)


class TestForward:
    @pytest.mark.parametrize("x", [torch.arange(4), torch.tensor([True]), torch.empty(0, 3)])
    def test_what_is_not_quantized_comes_back_itself(self, x):
        quantizer = Quantizer(ACTIVATION)
        assert quantizer(x) is x
        assert not quantizer.is_calibrated

    @pytest.mark.parametrize("bit_width", [4, 32])
    def test_the_result_can_be_modified_in_place(self, bit_width):
        quantizer = quantizer_at(bit_width)
        x = torch.rand(64, requires_grad=True)
        quantizer(x).add_(1).sum().backward()
        assert x.grad is not None

    @pytest.mark.parametrize("bit_width", [4, 32])
    def test_channels_last_and_expanded_gradients(self, bit_width):
        x = torch.randn(2, 4, 3, 3)
        quantizer = quantizer_at(bit_width, AFFINE, x)
        quantizer(x)
        grads = []
        for layout in (torch.contiguous_format, torch.channels_last):
            quantizer.zero_grad()
            leaf = x.clone(memory_format=layout).requires_grad_()
            result = quantizer(leaf)
            assert result.is_contiguous(memory_format=layout)
            result.sum().backward()
            grads.append((leaf.grad.contiguous(), quantizer.probe.grad))
        torch.testing.assert_close(grads[0], grads[1])

    def test_nothing_is_recorded_without_gradients(self):
        quantizer = quantizer_at(4)
        with torch.no_grad():
            assert not quantizer(torch.rand(3, requires_grad=True)).requires_grad

    def test_a_fixed_input_still_teaches_the_range(self):
        quantizer = quantizer_at(4)
        quantizer(torch.rand(64) * 2).sum().backward()
        assert quantizer.multiplier.grad.abs() > 0

    def test_probe_gradients_do_not_disturb_clipping_by_norm(self):
        quantizer = quantizer_at(32)
        x = torch.rand(64, requires_grad=True)
        quantizer(x).backward(torch.full((64,), 100.0))
        with_probe = nn.utils.get_total_norm([x.grad, quantizer.probe.grad])
        assert with_probe == nn.utils.get_total_norm([x.grad])

    def test_learning_the_range_lowers_the_error(self):
        x = torch.rand(512) * 10
        quantizer = quantizer_at(4, AFFINE, x)
        quantizer(x)
        with torch.no_grad():
            quantizer.multiplier.mul_(0.3)
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.01)
        errors = []
        for _ in range(100):
            optimizer.zero_grad()
            error = (quantizer(x) - x).square().sum()
            error.backward()
            optimizer.step()
            errors.append(float(error.detach()))
        assert errors[-1] < errors[0] / 20


class TestWidths:
    def test_it_starts_at_the_highest(self):
        assert Quantizer(ACTIVATION).bit_width == 32
        assert (
            Quantizer(QuantizerSpec("input", "affine", widths=(8,), learned=False)).bit_width == 8
        )

    def test_a_moved_gate_takes_effect_when_told(self):
        quantizer = quantizer_at(8)
        quantizer(torch.rand(9))
        quantizer.gate.fill_(0.7)
        assert quantizer.bit_width == 8
        assert quantizer.update_from_gate()
        assert quantizer.bit_width == 2
        assert quantizer.refit_pending
        assert not quantizer.update_from_gate()

    def test_the_same_width_again_asks_for_no_fit(self):
        quantizer = quantizer_at(8)
        quantizer(torch.rand(9))
        quantizer.set_bit_width(8)
        assert not quantizer.refit_pending

    def test_back_at_32_bits_nothing_is_left_to_fit(self):
        quantizer = quantizer_at(8)
        quantizer.set_bit_width(32)
        assert not quantizer.refit_pending

    @pytest.mark.parametrize("scheme", ["symmetric", "unsigned", "affine"])
    def test_expected_noise_falls_with_the_width_and_is_what_a_fit_gives(self, scheme):
        x = torch.rand(3000)
        quantizer = quantizer_at(4, QuantizerSpec("activation", scheme), x)
        noises = [quantizer.expected_noise(bits) for bits in (2, 3, 4, 8, 16, 32)]
        assert noises == sorted(noises, reverse=True)
        assert noises[-1] == 0.0
        noise = float((quantizer(x) - x).detach().square().mean())
        assert noise == pytest.approx(noises[2], rel=1e-4)
        assert quantizer.expected_noise(4, x * 10) == pytest.approx(100 * noises[2], rel=0.05)


class TestQParams:
    def test_by_hand(self):
        quantizer = quantizer_at(8, AFFINE)
        quantizer.refit(torch.rand(8))
        with torch.no_grad():
            quantizer.base.copy_(torch.tensor([[0.0], [4.0]]))
            quantizer.multiplier.copy_(torch.tensor([[1.25], [0.75]]))  # from -1 to 3
        qparams = quantizer.qparams()
        assert float(qparams.scale) == pytest.approx(4 / 255)
        assert int(qparams.zero_point) == 64
        assert qparams[2:] == (0, 255, 8)
        assert quantizer.quantize(torch.tensor([-9.0, 0.0, 3.0])).tolist() == [0, 64, 255]

    def test_one_range_has_shape_empty_and_channels_a_vector(self):
        per_tensor, per_channel = quantizer_at(4), quantizer_at(4, WEIGHT, torch.randn(4, 3))
        assert (per_tensor.qparams().scale.shape, per_channel.qparams().scale.shape) == ((), (4,))
        assert per_channel.qparams().zero_point.tolist() == [0] * 4
        assert per_channel.qparams().zero_point.dtype == torch.int32

    def test_grids(self):
        assert integer_grid("symmetric", 8) == (-127, 127)
        assert integer_grid("unsigned", 16) == (0, 65535)
        assert integer_grid("affine", 3) == (0, 7)


class TestState:
    def test_a_load_brings_back_width_range_and_flags(self):
        x = torch.randn(4, 50)
        old = quantizer_at(2, WEIGHT, x)
        expected = copy.deepcopy(old)(x)
        new = Quantizer(WEIGHT)
        new.load_state_dict(old.state_dict())
        assert (new.bit_width, new.is_calibrated, new.refit_pending) == (2, True, True)
        assert torch.equal(new(x), expected)
        assert not new.refit_pending
        resumed = Quantizer(WEIGHT)
        resumed.load_state_dict(new.state_dict())
        assert torch.equal(resumed(x), expected)
        assert not resumed.refit_pending

    def test_a_loaded_quantizer_samples_the_next_tensor(self):
        new = Quantizer(ACTIVATION)
        new.load_state_dict(quantizer_at(32).state_dict())
        with pytest.raises(TrainingError, match="no sample is kept"):
            new.mean_abs  # noqa: B018
        new(torch.full((10,), 3.0))
        assert new.mean_abs == 3.0

    def test_a_deep_copy_goes_its_own_way(self):
        quantizer = quantizer_at(8)
        other = copy.deepcopy(quantizer)
        other.set_bit_width(2)
        other(torch.rand(50) * 9)
        assert quantizer.bit_width == 8
        assert int(quantizer.quant_max) == 255
        assert float(quantizer.base) <= 1.0

    def test_the_grid_stays_exact_when_the_module_turns_to_half_precision(self):
        quantizer = quantizer_at(16).bfloat16()
        quantizer(torch.rand(50))
        assert quantizer.qparams().quant_max == int(quantizer.quant_max) == 65535
        assert quantizer.qparams().scale.dtype == torch.float32


class TestCompiled:
    def test_one_graph_serves_every_width_forward_and_backward(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        x = torch.randn(32)
        eager = quantizer_at(32, AFFINE, x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, from tracing an autograd function
            compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
            for bit_width in (32, 8, 2, 32, 4):
                eager.set_bit_width(bit_width)
                eager.refit()
                results = []
                for run in (compiled, eager):
                    eager.zero_grad()
                    leaf = x.clone().requires_grad_()
                    result = run(leaf)
                    result.square().sum().backward()
                    grad = eager.multiplier.grad
                    grad = torch.zeros(2, 1) if grad is None else grad
                    results.append((result.detach(), leaf.grad, grad, eager.probe.grad))
                torch.testing.assert_close(results[0], results[1])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class TestMessages:
    def test_a_width_that_is_not_allowed(self):
        with pytest.raises(UsageError, match=r"'conv1_input'.*bit_width=3 .*2, 4, 8, 16, 32"):
            quantizer_at(8).set_bit_width(3)
        with pytest.raises(UsageError, match=r"'conv1_input'.*bit_width=17 "):
            quantizer_at(8).expected_noise(17)

    @pytest.mark.parametrize("bit_width", [2, 32])
    def test_values_that_are_not_finite(self, bit_width):
        quantizer = Quantizer(ACTIVATION, "conv1_input")
        quantizer.set_bit_width(bit_width)
        x = torch.tensor([1.0, math.nan, math.inf, -math.inf])
        with pytest.raises(TrainingError, match=r"'conv1_input'.*1 of 4 .* NaN and 2 are infinite"):
            quantizer(x)
        assert not quantizer.is_calibrated

    def test_a_shape_without_its_channels(self):
        with pytest.raises(UsageError, match=r"'w'.*\(3, 4\).* 4 channels on axis 0"):
            Quantizer(WEIGHT, "w").calibrate(torch.ones(3, 4))
        with pytest.raises(UsageError, match=r"shape \(\) .*axis 0"):
            Quantizer(WEIGHT, "w").calibrate(torch.tensor(1.0))

    def test_an_empty_tensor(self):
        with pytest.raises(TrainingError, match=r"'w'.*\(4, 0\) has no values"):
            Quantizer(WEIGHT, "w").calibrate(torch.empty(4, 0))

    def test_no_grid(self):
        with pytest.raises(UsageError, match="'conv1_input': at 32 bits"):
            quantizer_at(32).qparams()
        quantizer = Quantizer(ACTIVATION, "conv1_input")
        quantizer.set_bit_width(8)
        with pytest.raises(TrainingError, match="'conv1_input': it never saw a tensor"):
            quantizer.quantize(torch.rand(3))
        with pytest.raises(UsageError, match="bit_width=32 has no integer grid"):
            integer_grid("affine", 32)

    def test_a_spec_names_all_faults_at_once(self):
        with pytest.raises(UsageError) as error:
            QuantizerSpec("bias", "log", None, 3, widths=(8, 17))
        for part in ("role='bias'", "scheme='log'", "has 17,", "num_channels=3 needs"):
            assert part in str(error.value)

    @pytest.mark.parametrize(
        ("widths", "message"),
        [((), "is empty"), ((8, 4), r"use \(4, 8\)"), ((4, 4), r"use \(4,\)"), ((8.0,), "has 8.0")],
    )
    def test_widths_that_make_no_sense(self, widths, message):
        with pytest.raises(UsageError, match=message):
            QuantizerSpec("weight", "symmetric", widths=widths)


class Prepared(nn.Module):
    """A layer with its two quantizers, as a prepared model has them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.quantizers = QuantizerSet()
        self.quantizers.add("layer_weight", Quantizer(WEIGHT))
        self.quantizers.add("layer_input", Quantizer(AFFINE))

    def forward(self, x):
        weight = self.quantizers["layer_weight"](self.layer.weight)
        return nn.functional.linear(self.quantizers["layer_input"](x), weight, self.layer.bias)


class TestQuantizerSet:
    def test_it_reads_like_a_dict(self):
        quantizers = Prepared().quantizers
        assert list(quantizers) == quantizers.names() == ["layer_weight", "layer_input"]
        assert len(quantizers) == 2
        assert "layer_weight" in quantizers
        assert "layer" not in quantizers
        assert quantizers["layer_input"] is quantizers.layer_input is quantizers.values()[1]
        assert dict(quantizers.items())["layer_input"].name == "layer_input"

    def test_sites_that_do_not_fit(self):
        quantizers = Prepared().quantizers
        with pytest.raises(UsageError, match="'layer_input' is taken"):
            quantizers.add("layer_input", Quantizer(ACTIVATION))
        with pytest.raises(UsageError, match=r"'a\.b' is empty or has a dot.*'a_b_input'"):
            quantizers.add("a.b", Quantizer(ACTIVATION))
        with pytest.raises(UsageError, match="'nope'; the sites are layer_weight, layer_input"):
            quantizers["nope"]

    def test_a_float_checkpoint_loads_and_its_weights_find_their_range(self):
        prepared, x = Prepared(), torch.randn(3, 5)
        prepared(x)
        for quantizer in prepared.quantizers.values():
            quantizer.set_bit_width(4)
        prepared(x)
        before = copy.deepcopy(prepared.quantizers.state_dict())
        checkpoint = {"layer.weight": torch.randn(4, 5) * 100, "layer.bias": torch.zeros(4)}
        prepared.load_state_dict(checkpoint)
        assert list(checkpoint) == ["layer.weight", "layer.bias"]
        weight, activation = prepared.quantizers.values()
        assert (weight.is_calibrated, activation.is_calibrated) == (False, True)
        after = prepared.quantizers.state_dict()
        changed = {key for key in after if not torch.equal(after[key], before[key])}
        assert changed == {"layer_weight.calibrated"}
        prepared(x)
        assert weight.bit_width == 4
        assert (weight.base > 10).all()

    def test_its_own_checkpoint_loads_with_other_widths(self):
        old, new, x = Prepared(), Prepared(), torch.randn(3, 5)
        old(x)
        old.quantizers["layer_weight"].set_bit_width(2)
        expected = old(x)
        new.load_state_dict(old.state_dict())
        assert [quantizer.bit_width for quantizer in new.quantizers.values()] == [2, 32]
        assert torch.equal(new(x), expected)

    def test_a_checkpoint_with_some_of_the_keys_is_refused(self):
        state = Prepared().state_dict()
        del state["quantizers.layer_input.gate"]
        with pytest.raises(RuntimeError, match=r"quantizers\.layer_input\.gate"):
            Prepared().load_state_dict(state)


def test_no_gradient_flows_back_to_an_input_of_given_bits():
    """The first layer then computes none for it, as in the float model."""
    spec = QuantizerSpec("input", "affine", widths=(8, 32), learned=False)
    quantizer = Quantizer(spec, "x")
    quantizer.set_bit_width(8)
    assert not quantizer(torch.randn(4, 3)).requires_grad
    assert quantizer(torch.randn(4, 3, requires_grad=True)).requires_grad
    learned = Quantizer(QuantizerSpec("input", "affine"), "x")
    learned.set_bit_width(8)
    assert learned(torch.randn(4, 3)).requires_grad
