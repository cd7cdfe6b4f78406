"""Laws of fake quantization, on any tensor, scheme, width and granularity."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from cgmq_fx import fake_quantize as fake_quantize_module
from cgmq_fx.calibration import observed_ends, rows_of, squared_error
from cgmq_fx.fake_quantize import PROBE_SCALE, range_gain
from cgmq_fx.quantizer_spec import kernel_bounds
from cgmq_fx.quantizers import Quantizer, QuantizerSpec

LOWER_WIDTHS = st.sampled_from(range(17))
WITH_STEPS = st.sampled_from(range(1, 17))
SCHEMES = st.sampled_from(["symmetric", "unsigned", "affine"])


@dataclass(frozen=True)
class Case:
    """A calibrated quantizer below 32 bits and a tensor for it, with gradients asked for."""

    quantizer: Quantizer
    x: Tensor

    @property
    def scale(self) -> Tensor:
        """The scale of each element."""
        return per_element(self.quantizer.qparams().scale, self)

    @property
    def is_binary(self) -> bool:
        """Whether the grid is without 0."""
        spec = self.quantizer.spec
        return spec.scheme == "symmetric" and spec.widths == (1,)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The ends of each element's range: values of it, but for a binary one."""
        qparams = self.quantizer.qparams()
        if self.is_binary:
            return -2 * self.scale, 2 * self.scale
        low = (qparams.quant_min - qparams.zero_point) * qparams.scale
        high = (qparams.quant_max - qparams.zero_point) * qparams.scale
        return per_element(low, self), per_element(high, self)


def per_element(per_range: Tensor, case: Case) -> Tensor:
    axis = case.quantizer.spec.channel_axis
    if axis is None:
        return per_range.expand(case.x.shape)
    shape = [1] * case.x.ndim
    shape[axis] = -1
    return per_range.reshape(shape).expand(case.x.shape)


@st.composite
def cases(draw, bit_widths=LOWER_WIDTHS, schemes=SCHEMES):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    axis = draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    size = 10.0 ** draw(st.integers(-12, 12))
    x = (torch.randn(shape) + draw(st.floats(-2, 2))) * size
    role, bit_width, scheme = (
        draw(st.sampled_from(["weight", "activation"])), draw(bit_widths), draw(schemes)
    )  # fmt: skip
    if bit_width == 1 and scheme == "symmetric":
        role = "weight"
    spec = QuantizerSpec(
        role, scheme, axis, 1 if axis is None else shape[axis], widths=(bit_width,)
    )
    quantizer = Quantizer(spec, "site")
    quantizer.calibrate(x)
    with torch.no_grad():  # somewhere a training would take it, some values clipped
        quantizer.multiplier.mul_(torch.empty_like(quantizer.multiplier).uniform_(0.3, 1.5))
    return Case(quantizer, x.requires_grad_())


@given(cases())
def test_results_are_on_the_grid_and_codes_within_their_bounds(case):
    qparams = case.quantizer.qparams()
    codes = case.quantizer.quantize(case.x)
    assert codes.dtype == torch.int32
    assert codes.min() >= qparams.quant_min
    assert codes.max() <= qparams.quant_max
    real = (codes - per_element(qparams.zero_point, case)) * case.scale
    assert torch.equal(case.quantizer(case.x), real)


@given(cases())
def test_codes_give_the_same_values_back(case):
    codes = case.quantizer.quantize(case.x)
    assert torch.equal(case.quantizer.dequantize(codes), case.quantizer(case.x))
    assert torch.equal(case.quantizer.quantize(case.quantizer.dequantize(codes)), codes)


@given(cases())
def test_idempotent(case):
    once = case.quantizer(case.x)
    assert torch.equal(case.quantizer(once), once)


@given(cases(), st.floats(0, 10))
def test_monotone(case, step):
    higher = case.x + step * case.scale
    assert (case.quantizer(higher) >= case.quantizer(case.x)).all()


@given(cases())
def test_the_error_is_at_most_half_a_step_inside_and_the_end_is_taken_outside(case):
    low, high = case.ends
    result = case.quantizer(case.x)
    slack = (1.0 if case.is_binary else 0.5) * case.scale + 2e-7 * case.x.abs()
    inside = (case.x >= low) & (case.x <= high)
    assert ((result - case.x).abs() <= slack)[inside].all()
    if case.is_binary:  # its values stand in the middles of the two halves
        low, high = low / 2, high / 2
    assert torch.equal(result[case.x > high], high[case.x > high])
    assert torch.equal(result[case.x < low], low[case.x < low])


@pytest.mark.parametrize("scheme", ["symmetric", "unsigned", "affine"])
def test_ties_round_to_even_before_the_zero_point_is_added(scheme):
    quantizer = Quantizer(QuantizerSpec("activation", scheme, widths=(8,)))
    quantizer.calibrate(torch.ones(1))
    with torch.no_grad():  # scale 2, and 3 as the zero point of the affine one
        ends = {"symmetric": [254.0], "unsigned": [510.0], "affine": [[6.0], [504.0]]}
        quantizer.base.copy_(torch.tensor(ends[scheme]))
    x = torch.tensor([1.0, 3.0, 5.0, 7.0])
    assert quantizer(x).tolist() == [0.0, 4.0, 4.0, 8.0]
    assert int(quantizer.qparams().zero_point) == (3 if scheme == "affine" else 0)


def test_values_are_divided_by_the_scale_not_multiplied_by_its_inverse():
    quantizer = Quantizer(QuantizerSpec("activation", "unsigned", widths=(8,)))
    quantizer.calibrate(torch.tensor([0.1]))
    scale = quantizer.qparams().scale
    x = (torch.arange(255) + 0.5) * scale
    divided, multiplied = (x / scale).round(), (x * (1 / scale)).round()
    assert not torch.equal(divided, multiplied)
    assert torch.equal(quantizer.quantize(x), divided.int())


@given(cases())
def test_zero_is_exact(case):
    result = case.quantizer(torch.zeros_like(case.x))
    assert torch.equal(result, case.scale if case.is_binary else torch.zeros_like(result))


@given(cases(bit_widths=st.just(32)))
def test_32_bits_pass_through_bit_for_bit_with_their_gradient(case):
    gradient = torch.randn_like(case.x)
    result = case.quantizer(case.x)
    result.backward(gradient)
    assert torch.equal(result.view(torch.int32), case.x.view(torch.int32))
    assert torch.equal(case.x.grad, gradient)
    assert case.quantizer.multiplier.grad is None


@given(cases())
def test_the_gradient_passes_inside_the_range_and_only_there(case):
    low, high = case.ends
    # Which side an end itself falls on is a matter of one rounding.
    assume(not torch.isclose(case.x, low, rtol=1e-5, atol=0).any())
    assume(not torch.isclose(case.x, high, rtol=1e-5, atol=0).any())
    gradient = torch.randn_like(case.x)
    case.quantizer(case.x).backward(gradient)
    inside = (case.x > low) & (case.x < high)
    assert torch.equal(case.x.grad, torch.where(inside, gradient, 0.0))


def plain(case: Case, multiplier: Tensor) -> Tensor:
    """The same function in plain operations that autograd differentiates by itself."""

    def rounded(value):
        return value + (value.round() - value).detach()

    spec, qparams = case.quantizer.spec, case.quantizer.qparams()
    base = case.quantizer.base
    if spec.scheme == "affine":
        ends = (base + (multiplier - 1) * (base[0] + base[1])).abs()
        scale = (ends[0] + ends[1]) / qparams.quant_max
        zero_point = rounded(ends[0] / scale)
    else:
        scale = (multiplier * base).abs() / (2 if case.is_binary else qparams.quant_max)
        zero_point = torch.zeros_like(scale)
    pick = 0 if spec.channel_axis is None else slice(None)
    scale, zero_point = per_element(scale[pick], case), per_element(zero_point[pick], case)
    low, high = qparams.quant_min - zero_point, qparams.quant_max - zero_point
    if case.is_binary:
        low, high = 2 * low, 2 * high
    steps = case.x / scale
    clamped = torch.where(steps > high, high, torch.where(steps < low, low, steps))
    if case.is_binary:
        signs = torch.where(clamped < 0, -1.0, 1.0)
        return (clamped + (signs - clamped).detach()) * scale
    return rounded(clamped) * scale


@given(cases(bit_widths=WITH_STEPS), st.sampled_from([1.0, -1.0]))
def test_gradients_are_those_of_autograd_through_the_plain_function(case, sign):
    # In float64, where both take the same side of every rounding.
    quantizer = case.quantizer.double()
    with torch.no_grad():
        quantizer.multiplier.mul_(sign)
    case = Case(quantizer, case.x.detach().double().requires_grad_())
    gradient = torch.randn_like(case.x)
    quantizer(case.x).backward(gradient)
    multiplier = quantizer.multiplier.detach().clone().requires_grad_()
    expected_x, expected = torch.autograd.grad(
        plain(case, multiplier), (case.x, multiplier), gradient
    )
    torch.testing.assert_close(case.x.grad, expected_x)
    gain = gain_of(quantizer, case.x)
    size = gradient.abs().sum() * quantizer.base.sum() * quantizer.qparams().quant_max
    error = (quantizer.multiplier.grad / gain - expected).abs()
    assert (error <= 1e-7 * expected.abs() + 1e-12 * size).all()  # the gain itself is a float32


def gain_of(quantizer: Quantizer, x: Tensor) -> Tensor:
    numel, is_weight = x.numel() / quantizer.spec.num_channels, quantizer.spec.role == "weight"
    return range_gain(numel, quantizer.quant_max, quantizer.base, is_weight=is_weight)


@given(cases(bit_widths=WITH_STEPS))
def test_per_channel_is_per_tensor_on_each_channel(case):
    spec = case.quantizer.spec
    assume(spec.channel_axis is not None)
    gradient = torch.randn_like(case.x)
    result = case.quantizer(case.x)
    result.backward(gradient)
    for channel in range(spec.num_channels):
        alone = Quantizer(QuantizerSpec(spec.role, spec.scheme, widths=spec.widths))
        x = case.x.detach().select(spec.channel_axis, channel).clone().requires_grad_()
        alone.calibrate(x)
        with torch.no_grad():
            alone.multiplier.copy_(case.quantizer.multiplier[..., channel : channel + 1])
            alone.base.copy_(case.quantizer.base[..., channel : channel + 1])
        single = alone(x)
        single.backward(gradient.select(spec.channel_axis, channel))
        assert torch.equal(single, result.select(spec.channel_axis, channel))
        assert torch.equal(x.grad, case.x.grad.select(spec.channel_axis, channel))
        expected = alone.multiplier.grad / gain_of(alone, x)
        actual = (case.quantizer.multiplier.grad / gain_of(case.quantizer, case.x))[..., channel]
        slack = float(expected.abs().max()) * 1e-3
        torch.testing.assert_close(actual, expected[..., 0], rtol=1e-3, atol=slack)


@given(cases(bit_widths=st.sampled_from([0, 1, 2, 8, 32])))
def test_the_probe_carries_the_statistics_of_the_gradient(case):
    gradient = torch.randn_like(case.x)
    case.quantizer(case.x).backward(gradient)
    mean, squares = case.quantizer.probe.grad.double() / PROBE_SCALE
    assert mean == pytest.approx(float(gradient.double().mean()), rel=1e-4, abs=1e-6)
    assert squares == pytest.approx(float(gradient.double().square().sum()), rel=1e-5)
    assert not case.quantizer.probe.any()


@given(cases())
def test_a_fitted_range_errs_no_more_than_the_observed_one(case):
    quantizer = case.quantizer
    rows = rows_of(case.x, quantizer.spec.channel_axis)
    quantizer.refit(case.x)
    fitted = rows_of(quantizer(case.x), quantizer.spec.channel_axis) - rows
    qparams = quantizer.qparams()
    ends = observed_ends(rows, quantizer.spec.scheme)
    bounds = kernel_bounds(quantizer.spec.scheme, qparams.bit_width)
    observed = squared_error(rows, ends, *bounds)
    assert (fitted.double().square().sum(1) <= observed * (1 + 1e-5)).all()


@given(cases(), st.integers(-80, 80))
def test_a_fit_scales_with_its_data(case, exponent):
    quantizer = case.quantizer
    x = torch.randn_like(case.x)
    quantizer.refit(x)
    expected = quantizer.base * 2.0**exponent
    quantizer.refit(x * 2.0**exponent)
    assert torch.equal(quantizer.base, expected) or (quantizer.base == 1).any()


@given(
    cases(bit_widths=st.sampled_from([0, 1, 2, 4, 8])),
    st.sampled_from([torch.bfloat16, torch.half]),
)
def test_half_precision_is_float32_rounded_at_the_end(case, dtype):
    case.quantizer.calibrate(torch.randn_like(case.x))
    x = torch.randn(case.x.shape).to(dtype).requires_grad_()
    result = case.quantizer(x)
    assert result.dtype == dtype
    assert torch.equal(result, case.quantizer(x.float()).to(dtype))
    result.backward(torch.ones_like(result))
    assert x.grad.dtype == dtype
    codes = case.quantizer.quantize(x)
    assert torch.equal(case.quantizer.dequantize(codes, dtype), result)


@given(st.integers(0, 2**16), SCHEMES, LOWER_WIDTHS)
def test_large_tensors_worked_on_in_blocks_give_the_same(seed, scheme, bit_width):
    torch.manual_seed(seed)
    role = "weight" if bit_width == 1 else "activation"
    quantizer = Quantizer(QuantizerSpec(role, scheme, widths=(bit_width,)))
    x, gradient = torch.randn(2, 1000), torch.randn(2, 1000)
    quantizer.calibrate(x * 0.5)

    def gradients():
        quantizer.zero_grad()
        leaf = x.clone().requires_grad_()
        quantizer(leaf).backward(gradient)
        return leaf.grad, quantizer.multiplier.grad

    with pytest.MonkeyPatch.context() as patch:
        whole = gradients()
        patch.setattr(fake_quantize_module, "BLOCK_VALUES", 333)
        blocks = gradients()
    assert torch.equal(whole[0], blocks[0])
    torch.testing.assert_close(whole[1], blocks[1], rtol=1e-3, atol=1e-4 * bit_width)


def test_the_gain_by_hand():
    quant_max, base = torch.tensor(7), torch.tensor([0.2, 0.1, 1e-20, 1.6])
    activation = range_gain(28, quant_max, base, is_weight=False)
    assert float(activation) == 0.5
    weight = range_gain(28, quant_max, base, is_weight=True)
    torch.testing.assert_close(weight, 0.5 / torch.tensor([0.2, 0.2, 0.2, 1.6]).square())
    tiny = range_gain(28, quant_max, base[2:3], is_weight=True)
    assert float(tiny) == 0.5 * 2**20
