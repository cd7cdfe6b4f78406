"""The compiled kernels and plain PyTorch are one function, up to the rounding of sums."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cgmq_fx import fake_quantize as module
from cgmq_fx.fake_quantize import PROBE_SCALE, fake_quantize
from cgmq_fx.native_fake_quantize import layout_of, native_call
from cgmq_fx.native_library import load_library
from cgmq_fx.quantizer_spec import kernel_bounds

pytestmark = pytest.mark.skipif(load_library() is None, reason="there is no C compiler")
SCHEMES = ("symmetric", "unsigned", "affine")
LAYOUTS = ("contiguous", "channels last", "transposed", "sliced", "repeated")


@st.composite
def cases(draw: st.DrawFn) -> dict:
    ndim = draw(st.integers(1, 5))
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=ndim, max_size=ndim)))
    # Beyond a few million values plain PyTorch's sums in float32 are too far off to compare with.
    lengths = (1, 1, 1, 40, 3000) if math.prod(shape) <= 400 else (1, 40)
    scheme, bits = draw(st.sampled_from(SCHEMES)), draw(st.integers(0, 16))
    is_binary = scheme == "symmetric" and bits == 1  # of weights alone
    return {
        "shape": shape,
        "long": draw(st.sampled_from(lengths)),
        "axis": draw(st.none() | st.integers(-ndim, ndim - 1)),
        "scheme": scheme,
        "bits": bits,
        "dtype": draw(st.sampled_from((torch.float32, torch.bfloat16))),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "odd_gradient": draw(st.booleans()),
        "is_weight": is_binary or draw(st.booleans()),
        "special": draw(st.sampled_from((0.0, math.nan, math.inf, -math.inf, 1e30, 1e-30))),
        "threads": draw(st.sampled_from((1, 2, 3))),
        "seed": draw(st.integers(0, 2**16)),
    }


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last" and x.ndim == 4:
        return x.to(memory_format=torch.channels_last)
    if layout == "sliced":  # as query, key and value of one product are
        return torch.stack((x, x), -2).select(-2, 0)
    if layout == "repeated":
        return x.narrow(0, 0, 1).expand(x.shape)
    return x.transpose(0, -1).contiguous().transpose(0, -1) if layout == "transposed" else x


def tensors_of(case: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (*case["shape"][:-1], case["shape"][-1] * case["long"])
    x = torch.randn(shape, generator=generator) * 2
    x.view(-1)[-1] = case["special"]
    x = laid_out(x.to(case["dtype"]), case["layout"])
    ranges = 1 if case["axis"] is None else shape[case["axis"]]
    rows = (2, ranges) if case["scheme"] == "affine" else (ranges,)
    base = torch.rand(rows, generator=generator) + 0.1
    multiplier = 1 + 0.3 * torch.randn(rows, generator=generator)
    grad = laid_out(torch.randn(shape, generator=generator).to(x.dtype), case["layout"])
    return x, base, multiplier, grad.contiguous() if case["odd_gradient"] else grad


def run(case: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, base, multiplier, grad = tensors_of(case)
    x, multiplier = x.requires_grad_(), multiplier.requires_grad_()
    bounds = [
        torch.tensor(n, dtype=torch.int32) for n in kernel_bounds(case["scheme"], case["bits"])
    ]
    probe = torch.zeros(2, requires_grad=True)
    out = fake_quantize(
        *(x, multiplier, base, *bounds, torch.tensor(False), probe),
        channel_axis=case["axis"],
        is_weight=case["is_weight"],
        bypass=False,
    )
    out.backward(grad)
    assert x.grad is not None
    assert multiplier.grad is not None
    assert probe.grad is not None
    return out.detach(), x.grad, multiplier.grad, probe.grad


def plain_run(case: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "native_call", lambda *_, **__: None)
        return run(case)


@given(cases())
def test_values_and_gradients_are_those_of_plain_pytorch(case: dict):
    threads = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        found, expected = run(case), plain_run(case)
    finally:
        torch.set_num_threads(threads)
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        assert mine.stride() == theirs.stride()
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    if math.isfinite(case["special"]) and abs(case["special"]) < 1e20:
        scale = expected[2].abs().amax()
        torch.testing.assert_close(found[2], expected[2], rtol=2e-4, atol=float(scale) * 2e-5)
    # Here the kernels are closer to the exact sums than plain PyTorch, which adds in float32.
    grad = tensors_of(case)[3].double()
    exact = torch.stack((grad.mean(), grad.square().sum()))
    size = torch.stack((grad.abs().mean(), grad.square().sum()))
    assert ((found[3].double() / PROBE_SCALE - exact).abs() <= 1e-6 * size).all()
    assert ((expected[3].double() / PROBE_SCALE - exact).abs() <= 1e-3 * size).all()


@given(cases())
def test_the_sums_do_not_depend_on_the_number_of_threads(case: dict):
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run({**case, "special": 0.0, "long": 3000}))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs)


@given(cases())
def test_a_layout_covers_every_value_once(case: dict):
    x = torch.empty_like(tensors_of(case)[0])  # dense, as all that kernels are given
    layout = layout_of(x, case["axis"])
    assert layout is not None
    outer, ranges, inner = layout
    assert outer * ranges * inner == x.numel()
    if case["axis"] is None:
        assert ranges == 1
        return
    # Which range each place in memory belongs to, by the layout and by the tensor itself.
    place = torch.arange(x.numel()).view(outer, ranges, inner)
    by_layout = (place * 0 + torch.arange(ranges).view(1, -1, 1)).flatten()
    index = torch.arange(ranges).view(
        [-1 if d == case["axis"] % x.ndim else 1 for d in range(x.ndim)]
    )
    by_tensor = torch.empty_like(x, dtype=torch.int64).copy_(index.expand(x.shape))
    assert torch.equal(by_layout, torch.as_strided(by_tensor, (x.numel(),), (1,)))


def test_what_the_kernels_do_not_take_is_left_to_pytorch():
    x, base = torch.randn(4, 6), torch.ones(1)
    assert native_call(x, base, base, None, is_weight=False) is not None
    refused = [
        (x.double(), base),
        (x.half(), base),
        (x, base.bfloat16()),
        (x.to("meta"), base),
    ]
    for tensor, ranges in refused:
        assert native_call(tensor, ranges, ranges, None, is_weight=False) is None


def test_under_a_dispatch_mode_pytorch_does_it():
    from torch._subclasses import FakeTensorMode

    x, base = torch.randn(4), torch.ones(1)
    with FakeTensorMode():
        assert native_call(x, base, base, None, is_weight=False) is None
