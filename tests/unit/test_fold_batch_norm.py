"""Batch norms fold into what is in front of them, and only where that is right."""

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from cgmq_fx.frozen import FrozenWeight
from cgmq_fx.passes.annotate_operations import AnnotateOperations
from cgmq_fx.passes.annotate_shapes import AnnotateShapes
from cgmq_fx.passes.fold_batch_norm import FoldBatchNorm, _Layer
from cgmq_fx.passes.freeze_bit_widths import FreezeBitWidths
from cgmq_fx.passes.functionalize import Functionalize
from cgmq_fx.passes.pipeline import Pipeline, run_pass
from cgmq_fx.passes.trace import trace
from cgmq_fx.prepare import prepare
from cgmq_fx.quantizer_spec import integer_grid
from cgmq_fx.quantizers import QParams

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {
    False: {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d},
    True: {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d},
}


@dataclass(frozen=True)
class Case:
    """A convolution with a batch norm behind it."""

    dims: int
    transposed: bool
    groups: int
    bias: bool

    @property
    def id(self) -> str:
        kind = "transposed" if self.transposed else "regular"
        return f"{self.dims}d-{kind}-{self.groups}-{'bias' if self.bias else 'plain'}"

    def build(self) -> tuple[nn.Module, torch.Tensor]:
        conv = CONVS[self.transposed][self.dims]
        layer = conv(6, 12, 3, stride=2, padding=1, groups=self.groups, bias=self.bias)
        return nn.Sequential(layer, lively(NORMS[self.dims](12))).eval(), self.inputs()

    def inputs(self) -> torch.Tensor:
        return torch.randn(2, 6, *(5, 6, 7)[: self.dims])


CASES = [
    Case(*options)
    for options in itertools.product((1, 2, 3), (False, True), (1, 2, 3, 6), (False, True))
]
PARAMETRIZED = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def lively(norm: nn.Module) -> nn.Module:
    """Give every number of a batch norm a value of its own, factors of either sign among them."""
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        if tensor is not None:
            nn.init.normal_(tensor)
    if norm.running_var is not None:
        nn.init.uniform_(norm.running_var, 0.3, 3)
    return norm


def norms_left(gm: fx.GraphModule) -> int:
    called = [n for n in gm.graph.nodes if n.op == "call_module"]
    modules = [gm.get_submodule(node.target) for node in called]
    functions = [n for n in gm.graph.nodes if n.target is F.batch_norm]
    kinds = tuple(NORMS.values())
    return sum(isinstance(module, kinds) for module in modules) + len(functions)


def assert_folds(gm: fx.GraphModule, x: torch.Tensor, *, left: int = 0) -> None:
    want, before = gm(x).detach(), norms_left(gm)
    assert run_pass(FoldBatchNorm(), gm) is (before > left)
    assert norms_left(gm) == left
    torch.testing.assert_close(gm(x).detach(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert run_pass(FoldBatchNorm(), gm) is False


@PARAMETRIZED
def test_float_modules(case):
    model, x = case.build()
    gm = fx.symbolic_trace(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    want = model(x)
    assert_folds(gm, x)
    assert [type(module) for module in gm.children()] == [type(model[0])]
    assert set(gm.state_dict()) == {"0.weight", "0.bias"}
    assert torch.equal(model(x), want), "the traced model itself changed"
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@PARAMETRIZED
def test_float_functions(case):
    model, x = case.build()
    gm = trace(model)
    run_pass(Functionalize(), gm)
    assert_folds(gm, x)
    assert set(gm.state_dict()) == {"0.weight", "0.bias"}


@PARAMETRIZED
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_integer_codes_stay_and_the_scale_takes_the_factor(case, per_channel):
    model, x = case.build()
    assert model[1].weight.sign().unique().tolist() == [-1, 1]
    prepared = prepare(model, "100%", example_inputs=(x,), per_channel=per_channel).eval()
    prepared(x)
    prepared.quantizers["0_weight_"].set_bit_width(4)
    prepared(x)
    run_pass(FreezeBitWidths(), prepared)
    frozen = prepared.get_submodule("frozen.0_weight_")
    assert isinstance(frozen, FrozenWeight)
    codes, value = frozen.codes.clone(), frozen()
    norm = model[1]
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert_folds(prepared, x)
    signs = scaled_by_output_channel(codes, factor.sign().to(torch.int8), case)
    assert torch.equal(frozen.codes, signs), "mirrored where the factor is negative"
    assert frozen.codes.dtype == torch.int8
    assert (frozen.scale > 0).all()
    want = scaled_by_output_channel(value, factor.detach(), case)
    torch.testing.assert_close(frozen(), want, rtol=1e-5, atol=0)
    fixed_shape = (6, 12 // case.groups, *[1] * case.dims)
    grouped = case.transposed and case.groups > 1
    assert frozen.scale.shape == (fixed_shape if grouped else (12,))


def scaled_by_output_channel(weight, factor, case):
    """Scale one output channel at a time, as the definition of the layer has them."""
    weight = weight.clone()
    for channel in range(12):
        if not case.transposed:
            weight[channel] *= factor[channel]
            continue
        per_group = 12 // case.groups
        group, inner = divmod(channel, per_group)
        rows = 6 // case.groups
        weight[group * rows : (group + 1) * rows, inner] *= factor[channel]
    return weight


def grid_weight(scheme, codes, zero_point):
    qparams = QParams(torch.tensor(0.5), torch.tensor(zero_point), *integer_grid(scheme, 4), 4)
    return FrozenWeight("w", qparams, torch.tensor(codes), None, torch.float32)


@pytest.mark.parametrize(
    ("scheme", "codes", "zero_point"),
    [
        ("symmetric", [[-7, 0], [3, 7]], 0),
        ("affine", [[0, 5], [15, 3]], 5),
        ("affine", [[0, 1], [15, 3]], 0),
    ],
)
def test_negative_and_vanishing_factors_leave_positive_scales(scheme, codes, zero_point):
    weight = grid_weight(scheme, codes, zero_point)
    value = weight()
    weight.rescale(torch.tensor([[-2.0], [3.0]], dtype=torch.float64), 0)
    assert torch.equal(weight(), value * torch.tensor([[-2.0], [3.0]]))
    assert weight.scale.tolist() == [1.0, 1.5]
    weight.rescale(torch.tensor([[1e-300], [-1.0]], dtype=torch.float64), 0)
    assert torch.equal(weight(), value * torch.tensor([[0.0], [-3.0]]))
    assert weight.scale.tolist() == [1.0, 1.5]
    assert int(weight.steps()[0].abs().max()) == 0


def test_a_wrong_order_of_groups_would_be_seen(monkeypatch):
    def ungrouped(self, factor):
        rows = factor.reshape(self.groups, -1).repeat(self.shape[0] // self.groups, 1)
        return rows.reshape(self.shape[0], -1, 1, 1)

    model, x = Case(2, transposed=True, groups=3, bias=True).build()
    monkeypatch.setattr(_Layer, "along_weight", ungrouped)
    with pytest.raises(AssertionError, match="not close"):
        assert_folds(fx.symbolic_trace(model), x)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.3])
def test_options_of_the_norm(affine, momentum):
    norm = lively(nn.BatchNorm2d(4, eps=0.1, momentum=momentum, affine=affine))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), norm)
    assert_folds(fx.symbolic_trace(model.eval()), torch.randn(2, 3, 6, 6))


def test_two_norms_in_a_row_both_fold():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *(lively(nn.BatchNorm2d(4)) for _ in range(2)))
    assert_folds(fx.symbolic_trace(model.eval()), torch.randn(2, 3, 6, 6))


def test_one_norm_behind_two_layers_folds_into_both():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
            self.norm = lively(nn.BatchNorm2d(4))

        def forward(self, x):
            return self.norm(self.a(x)) + self.norm(self.b(x))

    assert_folds(fx.symbolic_trace(Net().eval()), torch.randn(2, 3, 6, 6))


def test_functional_batch_norm():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), lively(nn.BatchNorm2d(4))

        def forward(self, x):
            norm = self.norm
            mean, var = norm.running_mean, norm.running_var
            return F.batch_norm(self.conv(x), mean, var, norm.weight, bias=norm.bias, eps=1e-2)

    gm = trace(Net().eval())
    assert_folds(gm, torch.randn(2, 3, 6, 6))
    assert set(gm.state_dict()) == {"conv.weight", "conv.bias", "norm.num_batches_tracked"}


class Reused(nn.Module):
    def __init__(self, layer, norms):
        super().__init__()
        self.layer, self.norms = layer, nn.ModuleList(norms)

    def forward(self, x):
        for norm in self.norms:
            x = norm(self.layer(x))
        return x


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), lively(nn.BatchNorm2d(3))

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


def tied():
    model = nn.Sequential(
        *(nn.Conv2d(3, 3, 1), lively(nn.BatchNorm2d(3))),
        *(nn.Conv2d(3, 3, 1), lively(nn.BatchNorm2d(3))),
    )
    model[2].weight = model[0].weight
    return model


STAYING = {
    "batch statistics": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 1), lively(nn.BatchNorm2d(3, track_running_stats=False))
    ),
    "nothing in front": lambda: nn.Sequential(lively(nn.BatchNorm2d(3))),
    "an activation between": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.ReLU(), lively(nn.BatchNorm2d(3))
    ),
    "layer called twice": lambda: Reused(
        nn.Conv2d(3, 3, 1), [lively(nn.BatchNorm2d(3)) for _ in range(2)]
    ),
    "layer read twice": ReadTwice,
    "tied weights": tied,
}


@pytest.mark.parametrize("functional", [False, True], ids=["modules", "functions"])
@pytest.mark.parametrize("make", STAYING.values(), ids=STAYING)
def test_norms_that_stay(make, functional):
    gm = trace(make().eval())
    if functional:
        run_pass(Functionalize(), gm)
    state = copy.deepcopy(gm.state_dict())
    assert_folds(gm, torch.randn(2, 3, 4, 4), left=norms_left(gm))
    assert all(torch.equal(state[name], value) for name, value in gm.state_dict().items())


def test_a_frozen_weight_of_two_layers_keeps_its_norms():
    model, x = tied().eval(), torch.randn(2, 3, 4, 4)
    prepared = prepare(model, "100%", example_inputs=(x,)).eval()
    prepared(x)
    prepared.quantizers["0_weight_"].set_bit_width(8)
    prepared(x)
    run_pass(FreezeBitWidths(), prepared)
    assert_folds(prepared, x, left=2)


def test_in_training_nothing_folds():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), lively(nn.BatchNorm2d(3)))
    assert run_pass(FoldBatchNorm(), fx.symbolic_trace(model.train())) is False


@pytest.mark.parametrize("functional", [False, True], ids=["module", "function"])
@pytest.mark.parametrize(
    ("shape", "left"), [((4, 5), 0), ((4, 6, 5), 1)], ids=["two axes", "three axes"]
)
def test_linear_folds_where_channels_are_the_last_axis(functional, shape, left):
    # Over three axes batch norm normalises along the middle one, here of the same extent.
    model = nn.Sequential(nn.Linear(5, 6), lively(nn.BatchNorm1d(6))).eval()
    gm, x = trace(model), torch.randn(shape)
    passes = [Functionalize()] if functional else []
    Pipeline([*passes, AnnotateOperations(), AnnotateShapes((x,))]).run(gm)
    assert_folds(gm, x, left=left)


def test_linear_of_unknown_shape_stays():
    model = nn.Sequential(nn.Linear(5, 6), lively(nn.BatchNorm1d(6))).eval()
    assert_folds(fx.symbolic_trace(model), torch.randn(4, 5), left=1)


def test_a_bias_that_others_read_is_left_to_them():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), lively(nn.BatchNorm2d(3)), nn.Conv2d(3, 3, 1)).eval()
    model[2].bias = model[0].bias
    for functional in (False, True):
        gm = trace(copy.deepcopy(model))
        if functional:
            run_pass(Functionalize(), gm)
        assert_folds(gm, torch.randn(2, 3, 4, 4))


def test_a_subclass_of_a_norm_is_left_alone():
    class Louder(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return True

    model = nn.Sequential(nn.Conv2d(3, 3, 1), lively(Louder(3))).eval()
    gm = fx.GraphModule(model, Tracer().trace(model))
    assert_folds(gm, torch.randn(2, 3, 4, 4), left=1)
