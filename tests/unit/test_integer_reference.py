"""The integer reference: sums of products of codes against loops over Python integers."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import cgmq_fx
from cgmq_fx.frozen import FrozenQuantizer, FrozenWeight
from cgmq_fx.integer_products import bias_codes, kernel_type
from cgmq_fx.prepare import prepare
from graph_zoo import ZOO

CPU = torch.device("cpu")


def lowered(model, inputs, bits=4, **options):
    """Lower with every quantizer at `bits`, or at the narrowest width above that it has."""
    if not isinstance(bits, dict):
        options.setdefault("widths", (bits, 32))
    prepared = prepare(
        model.eval(), "100%", example_inputs=inputs, learn_input_bits=True, **options
    )
    prepared.eval()(*copy.deepcopy(inputs))
    chosen = bits if isinstance(bits, dict) else dict.fromkeys(prepared.bit_widths, bits)
    prepared.set_bit_widths([chosen.get(site, 32) for site in prepared.bit_widths])
    prepared(*copy.deepcopy(inputs))
    return cgmq_fx.lower(prepared, allow_untrained=True)


def module(forward, **layers):
    """Return a module whose forward is a function of it and its inputs."""
    made = type("Net", (nn.Module,), {"forward": forward})()
    for name, layer in layers.items():
        setattr(made, name, layer)
    return made


def steps_of(fixed, x):
    """Return the integers of the one quantizer on x, and of the one weight."""
    (quantizer,) = (m for m in fixed.modules() if isinstance(m, FrozenQuantizer))
    (weight,) = (m for m in fixed.modules() if isinstance(m, FrozenWeight))
    codes = torch.round(quantizer(x) / quantizer.scale).to(torch.int64)
    zero = 0 if weight.zero_point is None else weight.zero_point
    return codes, (weight.codes.to(torch.int64) - zero)


def leaves(value):
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def convolved(x, w, stride, padding, dilation, groups):
    """Return a two-dimensional convolution as its definition has it, in Python integers."""
    batch, out_channels = x.shape[0], w.shape[0]
    x = F.pad(x, (padding,) * 4)
    sizes = [
        (n - dilation * (k - 1) - 1) // stride + 1
        for n, k in zip(x.shape[2:], w.shape[2:], strict=True)
    ]
    out = torch.zeros(batch, out_channels, *sizes, dtype=torch.int64)
    per_group = out_channels // groups
    for n, o, i, j in itertools.product(*map(range, out.shape)):
        start = o // per_group * w.shape[1]
        out[n, o, i, j] = sum(
            int(x[n, start + c, i * stride + p * dilation, j * stride + q * dilation])
            * int(w[o, c, p, q])
            for c, p, q in itertools.product(*map(range, w.shape[1:]))
        )
    return out


@pytest.mark.parametrize("kernels", ["int64", "float"])
@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 2), (1, 2, 2, 4)]
)
def test_a_convolution(stride, padding, dilation, groups, bits, kernels):
    conv = nn.Conv2d(4, 8, 3, stride, padding, dilation, groups)
    x = torch.randn(2, 4, 7, 6)
    fixed = lowered(nn.Sequential(conv), (x,), bits)
    _, accumulators = fixed.integer_reference(x, kernels=kernels, accumulators=True)
    wanted = convolved(*steps_of(fixed, x), stride, padding, dilation, groups)
    assert torch.equal(accumulators["0"], wanted)


@pytest.mark.parametrize("kernels", ["int64", "float"])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_a_linear_layer_and_what_follows_its_sums(bits, kernels):
    linear, x = nn.Linear(300, 5), torch.randn(3, 300)
    fixed = lowered(nn.Sequential(linear), (x,), bits)
    result, accumulators = fixed.integer_reference(x, kernels=kernels, accumulators=True)
    codes, weights = steps_of(fixed, x)
    wanted = [
        [sum(a * w for a, w in zip(row, column, strict=True)) for column in weights.tolist()]
        for row in codes.tolist()
    ]
    assert accumulators["0"].tolist() == wanted
    (quantizer,) = (m for m in fixed.modules() if isinstance(m, FrozenQuantizer))
    (weight,) = (m for m in fixed.modules() if isinstance(m, FrozenWeight))
    scale = float(quantizer.scale) * weight.scale.double()
    exact = torch.tensor(wanted, dtype=torch.float64) * scale + linear.bias.detach().double()
    assert torch.equal(result, exact.float())


@pytest.mark.parametrize("bits", [2, 8])
def test_a_bias_as_integers_moves_a_result_by_half_a_unit_at_most(bits):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 6, 6)
    fixed = lowered(layers, (x,), bits)
    result, sums = fixed.integer_reference(x, accumulators=True)
    moved, same_sums = fixed.integer_reference(x, accumulators=True, integer_bias=True)
    assert torch.equal(sums["0"], same_sums["0"])
    (quantizer,) = (m for m in fixed.modules() if isinstance(m, FrozenQuantizer))
    (weight,) = (m for m in fixed.modules() if isinstance(m, FrozenWeight))
    unit = (quantizer.scale.double() * weight.scale.double()).view(-1, 1, 1)
    whole = moved.double() / unit
    assert (whole - whole.round()).abs().max() < 1e-2
    assert 0 < ((moved.double() - result.double()).abs() / unit).max() < 0.5 + 1e-2
    codes = bias_codes(layers[0].bias, unit[:, 0, 0])
    assert torch.equal(whole.round().long(), sums["0"] + codes.view(-1, 1, 1))


@pytest.mark.parametrize("zoo_case", ZOO, ids=lambda item: item.id)
@pytest.mark.parametrize("bits", [2, 16])
def test_both_kernels_give_the_same_bits_and_all_products_of_codes_are_summed(zoo_case, bits):
    model, inputs = zoo_case.build()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    fixed = lowered(model, inputs, bits)
    results = [
        fixed.integer_reference(*copy.deepcopy(inputs), kernels=kernels, accumulators=True)
        for kernels in ("int64", "float")
    ]
    (outputs, sums), (others, other_sums) = results
    assert all(map(torch.equal, leaves(outputs), leaves(others)))
    assert sums.keys() == other_sums.keys()
    assert all(torch.equal(sums[name], other_sums[name]) for name in sums)
    assert all(item.dtype == torch.int64 for item in sums.values())
    assert set(sums) == with_codes(fixed)


def with_codes(fixed):
    """Return the operations that multiply two tensors below 32 bits, as the plan has them."""
    return {
        bound.operation.name
        for bound in fixed.plan.accounting.operations
        if bound.operation.op in ("linear", "matmul", "attention")
        or bound.operation.op.startswith("conv")
        if all(source.site is not None for source in bound.sources)
    }


def test_float32_holds_2_to_the_24_and_float64_2_to_the_53():
    assert kernel_type(2**24, CPU, "float") == (torch.float32, CPU)
    assert kernel_type(2**24 + 1, CPU, "float") == (torch.float64, CPU)
    assert kernel_type(2**24, torch.device("cuda"), "float") == (
        *(torch.float64, torch.device("cuda")),
    )
    assert kernel_type(2**53, CPU, "float") == (torch.float64, CPU)
    assert kernel_type(2**53 + 1, torch.device("cuda"), "float") == (torch.int64, CPU)
    assert kernel_type(1, torch.device("cuda"), "int64") == (torch.int64, CPU)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_float32_is_not_used_where_torch_may_drop_bits(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert kernel_type(1, CPU, "float") == (torch.float64, CPU)
    finally:
        torch.set_float32_matmul_precision(before)
    assert kernel_type(1, CPU, "float") == (torch.float32, CPU)


def test_float32_alone_would_not_be_exact(monkeypatch):
    x = torch.rand(4, 2048)
    fixed = lowered(nn.Sequential(nn.Linear(2048, 8)), (x,), 16)
    _, wanted = fixed.integer_reference(x, accumulators=True)
    assert int(wanted["0"].abs().max()) > 2**24
    monkeypatch.setattr("cgmq_fx.integer_products.kernel_type", lambda *_: (torch.float32, CPU))
    _, found = fixed.integer_reference(x, kernels="float", accumulators=True)
    assert not torch.equal(found["0"], wanted["0"])


class TestScales:
    """Scales that vary along an axis, and numbers that follow the sum."""

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_folded_transposed_convolutions(self, dims, groups):
        conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](6)
        nn.init.normal_(norm.weight)
        nn.init.uniform_(norm.running_var, 0.3, 3)
        x = torch.randn(2, 4, *(5, 4, 3)[:dims])
        fixed = lowered(nn.Sequential(conv(4, 6, 3, 2, groups=groups), norm), (x,), 8)
        result, accumulators = fixed.integer_reference(x, accumulators=True)
        assert set(accumulators) == {"0"}
        torch.testing.assert_close(result, fixed(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["addmm", "baddbmm", "addbmm", "addmv"])
    @pytest.mark.parametrize("as_method", [False, True])
    def test_what_is_added_to_a_product_is_not_in_the_sum(self, name, as_method):
        shapes = {
            "addmm": ((2, 5), (2, 3), (3, 5)),
            "baddbmm": ((4, 2, 5), (4, 2, 3), (4, 3, 5)),
            "addbmm": ((2, 5), (4, 2, 3), (4, 3, 5)),
            "addmv": ((2,), (2, 3), (3,)),
        }[name]

        def call(self, c, a, b):
            return getattr(torch, name)(c, a, b, beta=0.5, alpha=2.0)

        def call_method(self, c, a, b):
            return getattr(c, name)(a, b, beta=0.5, alpha=2.0)

        inputs = tuple(torch.randn(shape) for shape in shapes)
        fixed = lowered(module(call_method if as_method else call), inputs, 8, batch_axis=None)
        result, accumulators = fixed.integer_reference(*inputs, accumulators=True)
        (total,) = accumulators.values()
        assert total.shape == result.shape
        torch.testing.assert_close(result, fixed(*inputs), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_float_types(self, dtype):
        x = torch.randn(3, 6, dtype=dtype)
        fixed = lowered(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype), (x,))
        result = fixed.integer_reference(x)
        assert result.dtype == dtype
        torch.testing.assert_close(result, fixed(x), rtol=0.1, atol=0.1)


def test_float_operands_are_multiplied_as_the_module_does():
    x = torch.randn(3, 6)
    fixed = lowered(nn.Sequential(nn.Linear(6, 4)), (x,), {"0_weight_": 4}, widths=(4, 32))
    result, accumulators = fixed.integer_reference(x, accumulators=True)
    assert accumulators == {}
    assert torch.equal(result, fixed(x))


def test_the_first_product_of_attention_alone():
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = tuple(torch.randn(2, 3, 5, 4) for _ in range(3))
    bits = dict.fromkeys(("q", "k", "v"), 8)
    fixed = lowered(module(attend), inputs, bits, widths=(8, 32))
    result, accumulators = fixed.integer_reference(*inputs, accumulators=True)
    assert list(accumulators) == ["scaled_dot_product_attention.qk"]
    torch.testing.assert_close(result, fixed(*inputs))


def test_steps_of_a_recurrent_layer_are_stacked():
    x = torch.randn(7, 2, 3)
    fixed = lowered(nn.LSTM(3, 5), (x,), 8, batch_axis=1)
    _, accumulators = fixed.integer_reference(x, accumulators=True)
    shapes = {name.rpartition(".")[2]: tuple(item.shape) for name, item in accumulators.items()}
    assert shapes == {"input_l0": (7, 2, 20), "hidden_l0": (7, 2, 20)}


def test_keyword_inputs_and_defaults():
    model = module(lambda self, x, y=None: self.layer(x) + y, layer=nn.Linear(6, 4))
    x, y = torch.randn(3, 6), torch.randn(3, 4)
    fixed = lowered(model, (x, y))
    assert torch.equal(fixed.integer_reference(y=y, x=x), fixed.integer_reference(x, y))


def test_it_leaves_the_module_as_it_was():
    x = torch.randn(3, 6)
    fixed = lowered(nn.Sequential(nn.Linear(6, 4)), (x,))
    before, code = fixed(x), fixed.code
    fixed.integer_reference(x)
    assert torch.equal(fixed(x), before)
    assert fixed.code == code
    assert math.isfinite(float(copy.deepcopy(fixed).integer_reference(x).sum()))
