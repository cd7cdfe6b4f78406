"""What the passes for XNNPACK match, and what they leave alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cgmq_fx.frozen import FrozenQuantizer
from cgmq_fx.lower import lower
from cgmq_fx.passes.drop_rectifiers import DropRectifiers
from cgmq_fx.passes.pipeline import Pipeline
from cgmq_fx.passes.repeat_quantizers import RepeatQuantizers
from cgmq_fx.passes.xnnpack_quantization import XnnpackQuantization
from cgmq_fx.prepare import prepare
from cgmq_fx.xnnpack_modules import ValueWeight, WideQuantizer, XnnpackWeight

X = torch.linspace(-2, 2, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin()


class Net(nn.Module):
    """A convolution, something behind it, and a layer that has its result quantized."""

    def __init__(self, between, reader=None):
        super().__init__()
        self.conv, self.between = nn.Conv2d(3, 4, 3), between
        self.reader = reader or nn.LazyConv2d(2, 1)

    def forward(self, x):
        return self.reader(self.between(self.conv(x)))


def lowered(between, bits=8, reader=None):
    torch.manual_seed(0)
    model = Net(between, reader).eval()
    made = prepare(model, "100%", example_inputs=(X,), widths=(bits,)).eval()
    made(X)
    made.set_bit_widths([min(site.allowed) for site in made.plan.accounting.sites])
    made(X)
    return lower(made, allow_untrained=True)


def sources(fixed, module=FrozenQuantizer):
    """Return what each call of a quantizer reads, as the graph calls it."""
    return [
        str(node.args[0])
        for node in fixed.graph.nodes
        if node.op == "call_module" and isinstance(fixed.get_submodule(node.target), module)
    ]


@pytest.mark.parametrize("between", [nn.MaxPool2d(2), lambda x: x.permute(0, 1, 3, 2)])
def test_a_quantizer_is_repeated_in_front_of_what_moves_values(between):
    fixed = lowered(between)
    wanted = fixed(X)
    Pipeline((RepeatQuantizers(),)).run(fixed)
    assert "conv2d" in sources(fixed)
    assert torch.equal(fixed(X), wanted)


@pytest.mark.parametrize(
    "between",
    [nn.AvgPool2d(2), lambda x: F.max_pool2d(x, 2, return_indices=True)[0], nn.Sigmoid()],
)
def test_a_quantizer_stays_behind_what_computes_values(between):
    fixed = lowered(between)
    before = sources(fixed)
    Pipeline((RepeatQuantizers(),)).run(fixed)
    assert sources(fixed) == before


def test_a_quantizer_stays_behind_what_others_read_unrounded():
    class Both(nn.Module):
        def forward(self, x):
            pooled = F.max_pool2d(x, 2)
            return torch.cat((F.conv2d(pooled, torch.ones(2, 4, 1, 1)), pooled), 1)

    fixed = lowered(Both(), reader=nn.Identity())
    before = sources(fixed)
    Pipeline((RepeatQuantizers(),)).run(fixed)
    assert sources(fixed) == before


def test_wide_quantizers_are_not_repeated():
    fixed = lowered(nn.MaxPool2d(2), bits=12)
    before = sources(fixed)
    Pipeline((RepeatQuantizers(),)).run(fixed)
    assert sources(fixed) == before


def rectifiers(fixed):
    names = [str(node) for node in fixed.graph.nodes]
    return [name for name in names if name.startswith(("relu", "between"))]


@pytest.mark.parametrize(("between", "left"), [(nn.ReLU(), 0), (F.relu, 0), (nn.ReLU6(), 1)])
def test_a_relu_is_dropped_where_a_quantizer_clamps_at_zero(between, left):
    fixed = lowered(between)
    wanted = fixed(X)
    Pipeline((DropRectifiers(),)).run(fixed)
    assert len(rectifiers(fixed)) == left
    assert torch.equal(fixed(X), wanted)


def test_a_relu_stays_that_others_read():
    class Residual(nn.Module):
        def forward(self, x):
            y = F.relu(x)
            return y + F.conv2d(y, torch.ones(4, 4, 1, 1))

    fixed = lowered(Residual())
    wanted = fixed(X)
    Pipeline((DropRectifiers(),)).run(fixed)
    assert any(node.target is F.relu for node in fixed.graph.nodes)
    assert torch.equal(fixed(X), wanted)


def kind_of_weight(fixed, values=frozenset()):
    passes = (RepeatQuantizers(), DropRectifiers(), XnnpackQuantization(values))
    Pipeline(passes).run(fixed)
    return type(fixed.get_submodule("frozen.conv_weight"))


@pytest.mark.parametrize(
    ("between", "bits", "kind"),
    [
        (nn.Identity(), 8, XnnpackWeight),
        (nn.ReLU(), 4, XnnpackWeight),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), 2, XnnpackWeight),
        (nn.ReLU6(), 8, XnnpackWeight),
        (nn.ReLU6(), 4, ValueWeight),  # two activations: its own and the clamp of 4 bits
        (nn.AvgPool2d(2), 8, ValueWeight),  # its output is float
        (nn.Identity(), 12, ValueWeight),
    ],
)
def test_a_weight_stays_integers_between_grids_of_eight_bits(between, bits, kind):
    assert kind_of_weight(lowered(between, bits)) is kind


def test_a_named_weight_becomes_values():
    fixed = lowered(nn.Identity())
    assert kind_of_weight(fixed, frozenset({"frozen.conv_weight"})) is ValueWeight


def test_biases_that_int32_cannot_hold_become_float():
    fixed = lowered(nn.Identity())
    with torch.no_grad():
        fixed.conv.bias.fill_(1e9)
    assert kind_of_weight(fixed) is ValueWeight


def test_wide_quantizers_have_codes_that_xnnpack_does_not_take():
    fixed = lowered(nn.Identity(), bits=12)
    Pipeline((XnnpackQuantization(),)).run(fixed)
    kinds = {m.code_type for m in fixed.modules() if isinstance(m, WideQuantizer)}
    assert kinds == {torch.int16}
