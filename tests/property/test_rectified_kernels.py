"""A ReLU and the quantizer behind it in one kernel are the two one after the other."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cgmq_fx import rectified as module
from cgmq_fx.native_library import load_library
from cgmq_fx.quantizers import Quantizer, QuantizerSpec
from cgmq_fx.rectified import NO_TOP, TOP_OF_RELU6, quantize_rectified, rectify_and_quantize

pytestmark = pytest.mark.skipif(load_library() is None, reason="there is no C compiler")


@st.composite
def cases(draw: st.DrawFn) -> dict:
    return {
        "shape": tuple(draw(st.lists(st.integers(1, 6), min_size=4, max_size=4))),
        "long": draw(st.sampled_from((1, 1, 40, 900))),
        "scheme": draw(st.sampled_from(("symmetric", "unsigned", "affine"))),
        "bits": draw(st.sampled_from((2, 3, 4, 8, 16))),
        "dtype": draw(st.sampled_from((torch.float32, torch.bfloat16))),
        "format": draw(st.sampled_from((torch.contiguous_format, torch.channels_last))),
        "top": draw(st.sampled_from((NO_TOP, TOP_OF_RELU6))),
        "keeps": draw(st.booleans()),
        "special": draw(st.sampled_from((0.0, -0.0, 6.0, 7.0, math.nan, math.inf, -math.inf))),
        "threads": draw(st.sampled_from((1, 2, 3))),
        "seed": draw(st.integers(0, 2**16)),
    }


def quantizer_of(case: dict) -> Quantizer:
    quantizer = Quantizer(QuantizerSpec("activation", case["scheme"], widths=(2, 3, 4, 8, 16)))
    quantizer.set_bit_width(case["bits"])
    quantizer.calibrate(torch.linspace(0, 4, 100))
    return quantizer


def tensors_of(case: dict) -> list[Tensor]:
    """Return a tensor, and gradients of what is quantized and of what is rectified."""
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (*case["shape"][:-1], case["shape"][-1] * case["long"])
    made = [torch.randn(shape, generator=generator) * 3 for _ in range(3)]
    made[0].view(-1)[-1] = case["special"]
    return [x.to(case["dtype"]).contiguous(memory_format=case["format"]) for x in made]


def run(case: dict, *, fused: bool) -> list[Tensor]:
    """Return outputs, and gradients of x, the range and the probe."""
    quantizer, (x, *grads) = quantizer_of(case), tensors_of(case)
    x = x.requires_grad_()
    if fused:
        assert module._call(quantizer, None, x) is not None
        relu: nn.Module | None = nn.ReLU() if case["top"] == NO_TOP else nn.ReLU6()
        if case["keeps"]:
            outputs = rectify_and_quantize(quantizer, relu, case["top"], x)[::-1]
        else:
            outputs = (quantize_rectified(quantizer, None, case["top"], x),)
    else:
        rectified = F.relu(x) if case["top"] == NO_TOP else F.relu6(x)
        outputs = (quantizer(rectified), rectified)[: 2 if case["keeps"] else 1]
    torch.autograd.backward(outputs, grads[: len(outputs)])
    if (
        case["top"] == TOP_OF_RELU6
    ):  # torch lets a gradient pass at NaN in some loops and not in others
        x.grad[x.isnan()] = 0
    return [*outputs, x.grad, quantizer.multiplier.grad, quantizer.probe.grad]


@given(cases())
def test_values_and_gradients_are_those_of_the_two(case: dict):
    threads = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        found, expected = run(case, fused=True), run(case, fused=False)
    finally:
        torch.set_num_threads(threads)
    for mine, theirs in zip(found[:-2], expected[:-2], strict=True):
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    if math.isfinite(case["special"]):
        for mine, theirs in zip(found[-2:], expected[-2:], strict=True):
            scale = float(theirs.abs().amax())
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=scale * 2e-5)


@given(cases())
def test_the_sums_do_not_depend_on_the_number_of_threads(case: dict):
    case = {**case, "special": 0.0, "long": 900}
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run(case, fused=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
