"""Specialising to evaluation and freezing widths change no bit of what a network computes."""

import copy
import operator
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from cgmq_fx.errors import TrainingError, UsageError
from cgmq_fx.fake_quantize import to_steps
from cgmq_fx.frozen import FrozenAttention, FrozenModule, FrozenQuantizer, FrozenWeight
from cgmq_fx.passes.constants import constant_value
from cgmq_fx.passes.deployed import written_nodes
from cgmq_fx.passes.freeze_bit_widths import FreezeBitWidths
from cgmq_fx.passes.functionalize import Functionalize
from cgmq_fx.passes.pipeline import run_pass
from cgmq_fx.passes.specialize_evaluation import SpecializeEvaluation
from cgmq_fx.passes.trace import trace
from cgmq_fx.passes.values import find_attribute
from cgmq_fx.prepare import prepare
from cgmq_fx.quantizers import QParams, Quantizer
from graph_zoo import ZOO, Calls, case

BOTH = {"bops": "100%", "weight_memory": "100%"}
GRAPHS = pytest.mark.parametrize("zoo_case", ZOO, ids=lambda item: item.id)


def prepared_at(model, inputs, choose, budget="100%", batch_axis=0):
    """Prepare in evaluation mode, calibrate, and give each quantizer the width that is chosen."""
    prepared = prepare(model.eval(), budget, example_inputs=inputs, batch_axis=batch_axis)
    prepared(*copy.deepcopy(inputs))
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(choose(quantizer))
    return prepared


def tensors(gm, inputs):
    with torch.no_grad():  # torch multiplies in another order when gradients are wanted
        outputs = pytree.tree_leaves(gm(*copy.deepcopy(inputs)))
    return [leaf for leaf in outputs if isinstance(leaf, torch.Tensor)]


def assert_equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def freeze(prepared):
    """Return the frozen copy of a prepared module, which stays as it is."""
    twin = copy.deepcopy(prepared)
    assert run_pass(FreezeBitWidths(), twin) is True
    assert run_pass(FreezeBitWidths(), twin) is False
    return twin


def frozen_modules(gm):
    read = [node.target for node in gm.graph.nodes if node.op in ("call_module", "get_attr")]
    modules = {target: find_attribute(gm, target) for target in read}
    return {name: item for name, item in modules.items() if isinstance(item, FrozenModule)}


@GRAPHS
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", ["100%", BOTH], ids=["bops", "memory too"])
def test_random_widths_freeze_exactly(zoo_case, seed, budget):
    model, inputs = zoo_case.build()
    rng = random.Random(seed)
    prepared = prepared_at(
        model, inputs, lambda q: rng.choice(q.spec.widths), budget, zoo_case.batch_axis
    )
    frozen = copy.deepcopy(prepared)  # before the widths' ranges are fitted
    want = tensors(prepared, inputs)
    for pass_ in (SpecializeEvaluation(), FreezeBitWidths()):
        run_pass(pass_, frozen)
        assert_equal(tensors(frozen, inputs), want)
        assert run_pass(pass_, frozen) is False
    assert not any(isinstance(module, Quantizer) for module in frozen.modules())
    widths = {item.site: item.bit_width for item in frozen_modules(frozen).values()}
    assert widths == {site: bits for site, bits in prepared.bit_widths.items() if bits < 32}
    assert not any(list(item.parameters()) for item in frozen_modules(frozen).values())


def linear_net():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


INPUTS = (torch.linspace(-2, 3, 24).reshape(4, 6),)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 9, 16])
def test_a_weight_becomes_codes_of_its_width(bits):
    model = linear_net().eval()
    prepared = prepare(model, "100%", example_inputs=INPUTS, widths=(bits, 32))
    prepared(*INPUTS)
    prepared.quantizers["0_weight_"].set_bit_width(bits)
    want = tensors(prepared, INPUTS)
    frozen = freeze(prepared)
    weight = frozen.get_submodule("frozen.0_weight_")
    assert isinstance(weight, FrozenWeight)
    assert (weight.site, weight.role, weight.bit_width) == ("0_weight_", "weight", bits)
    assert weight.codes.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert int(weight.codes.abs().max()) == 2 ** (bits - 1) - 1
    assert (weight.scale.shape, weight.channel_axis) == ((5,), 0)
    quantizer = prepared.quantizers["0_weight_"]
    assert torch.equal(weight(), quantizer(prepared.get_submodule("0").weight))
    assert "0.weight" not in frozen.state_dict()
    assert "2.weight" in frozen.state_dict()
    assert_equal(tensors(frozen, INPUTS), want)


def test_an_activation_keeps_its_grid():
    prepared = prepared_at(linear_net(), INPUTS, lambda q: 4 if 4 in q.spec.widths else 8)
    want = tensors(prepared, INPUTS)
    frozen = freeze(prepared)
    by_role = {item.role: item for item in frozen_modules(frozen).values()}
    image = by_role["input"]
    assert isinstance(image, FrozenQuantizer)
    qparams = prepared.quantizers[image.site].qparams()
    assert (image.quant_min, image.quant_max, image.bit_width) == (0, 255, 8)
    assert torch.equal(image.scale, qparams.scale)
    assert torch.equal(image.zero_point, qparams.zero_point)
    assert int(image.zero_point) > 0
    tokens = torch.arange(3)
    assert image(tokens) is tokens
    assert_equal(tensors(frozen, INPUTS), want)


def test_float_sites_vanish():
    prepared = prepared_at(linear_net(), INPUTS, lambda q: q.spec.widths[-1])
    frozen = freeze(prepared)
    assert frozen_modules(frozen) == {}
    assert set(frozen.state_dict()) >= {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_tied_weight_is_stored_once():
    model, inputs = case("tied").build()
    prepared = prepared_at(model, inputs, lambda q: 4, BOTH)
    want = tensors(prepared, inputs)
    frozen = freeze(prepared)
    assert_equal(tensors(frozen, inputs), want)
    assert not {"embed.weight", "out.weight"} & set(frozen.state_dict())
    held = [node for node in frozen.graph.nodes if "embed_weight" in str(node.target)]
    assert len(held) == 1
    assert len(held[0].users) == 2
    assert sum("embed_weight.packed" in key for key in frozen.state_dict()) == 1


def test_a_parameter_that_is_read_raw_too_stays():
    model = Calls(lambda self, x: self.layer(x) + self.layer.weight.sum(), layer=nn.Linear(6, 5))
    prepared = prepared_at(model, INPUTS, lambda q: 4 if 4 in q.spec.widths else 8)
    want = tensors(prepared, INPUTS)
    frozen = freeze(prepared)
    assert {"layer.weight", "frozen.layer_weight.packed"} <= set(frozen.state_dict())
    assert_equal(tensors(frozen, INPUTS), want)


def standardised(self, x):
    weight = self.conv.weight
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    return F.conv2d(x, centred / centred.std((1, 2, 3), keepdim=True), self.conv.bias)


def test_a_weight_computed_from_parameters_becomes_codes():
    inputs = (torch.randn(2, 3, 5, 5),)
    model = Calls(standardised, conv=nn.Conv2d(3, 4, 3))
    prepared = prepared_at(model, inputs, lambda q: 4 if 4 in q.spec.widths else 8)
    want = tensors(prepared, inputs)
    frozen = freeze(prepared)
    kinds = {type(item) for item in frozen_modules(frozen).values()}
    assert kinds == {FrozenWeight, FrozenQuantizer}
    assert "conv.weight" not in frozen.state_dict()
    assert not any(node.target == "mean" for node in frozen.graph.nodes)
    assert_equal(tensors(frozen, inputs), want)


@pytest.mark.parametrize("counting", [False, True], ids=["constant", "counting"])
def test_a_weight_that_each_call_changes_is_no_constant(counting):
    def forward(self, x):
        if counting:
            self.steps.add_(1.0)
        return F.linear(x, self.layer.weight * self.steps)

    model = Calls(forward, layer=nn.Linear(6, 5))
    model.register_buffer("steps", torch.full((), 2.0))
    gm = trace(model, INPUTS)
    product = gm.graph.find_nodes(op="call_function", target=operator.mul)[0]
    value = constant_value(gm, product, written_nodes(gm.graph))
    assert (value is None) is counting
    assert counting or torch.equal(value, model.layer.weight * 2)


def test_chance_and_inputs_are_no_constants():
    model = Calls(lambda self, x: torch.rand_like(self.layer.weight) * x, layer=nn.Linear(3, 2))
    gm = trace(model)
    for node in gm.graph.nodes:
        assert (constant_value(gm, node, frozenset()) is None) is (node.op != "get_attr")


@pytest.mark.parametrize("bits", [4, 32])
def test_attention(bits):
    model, inputs = case("sdpa").build()
    prepared = prepared_at(model, inputs, lambda q: bits if bits in q.spec.widths else 8)
    want = tensors(prepared, inputs)
    frozen = freeze(prepared)
    plain = [n for n in frozen.graph.nodes if n.target is F.scaled_dot_product_attention]
    held = [m for m in frozen_modules(frozen).values() if isinstance(m, FrozenAttention)]
    assert (len(held), len(plain)) == ((0, 1) if bits == 32 else (1, 0))
    assert_equal(tensors(frozen, inputs), want)


def test_a_grid_that_is_off_by_one_would_be_seen(monkeypatch):
    monkeypatch.setattr(
        "cgmq_fx.frozen.to_steps", lambda x, grid, **kind: to_steps(x, grid, **kind).add_(1)
    )
    prepared = prepared_at(linear_net(), INPUTS, lambda q: 4 if 4 in q.spec.widths else 8)
    want = tensors(prepared, INPUTS)
    with pytest.raises(AssertionError):
        assert_equal(tensors(freeze(prepared), INPUTS), want)


def test_an_activation_that_never_saw_a_tensor_is_refused():
    prepared = prepare(linear_net(), "100%", example_inputs=INPUTS)
    prepared.quantizers["0_weight_"].set_bit_width(4)
    with pytest.raises(TrainingError, match=r"quantizer 'input_1'.*never saw a tensor"):
        run_pass(FreezeBitWidths(), prepared)


def frozen_weight(bits=4):
    top = 2 ** (bits - 1) - 1
    qparams = QParams(torch.tensor(0.5), torch.tensor(0), -top, top, bits)
    return FrozenWeight("conv_weight", qparams, torch.tensor([[-top, top]]), None, torch.float32)


@pytest.mark.parametrize("bits", [2, 8])
def test_codes_of_another_width_are_not_loaded(bits):
    weight = frozen_weight(4)
    message = rf"'conv_weight': codes of {bits} bits are not loaded where it has 4; load the state"
    with pytest.raises(UsageError, match=message):
        weight.load_state_dict(frozen_weight(bits).state_dict())
    assert weight.codes.tolist() == [[-7, 7]]


def test_codes_off_the_grid_are_not_loaded():
    weight = frozen_weight(4)
    state = weight.state_dict()
    state["packed"] = torch.tensor([0x78], dtype=torch.uint8)  # 7 in the high bits, -8 in the low
    message = r"'conv_weight': codes from -8 to 7 do not fit its 4 bits, which hold -7 to 7"
    with pytest.raises(UsageError, match=message):
        weight.load_state_dict(state)
    assert weight.codes.tolist() == [[-7, 7]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 9, 16])
def test_codes_take_their_true_width_in_memory(bits):
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (7, 5, 3))
    qparams = QParams(torch.tensor(0.5), torch.tensor(0), -top, top, bits)
    weight = FrozenWeight("w", qparams, codes, None, torch.float32)
    assert (weight.packed.dtype, weight.packed.numel()) == (torch.uint8, -(-7 * 5 * 3 * bits // 8))
    held = sum(t.numel() * t.element_size() for t in (*weight.buffers(), *weight.parameters()))
    assert held == weight.packed.numel() + 4  # and a scale
    assert torch.equal(weight.codes.long(), codes)
    assert torch.equal(weight(), codes * 0.5)
    weight.codes = codes.clamp(0, 1)
    assert torch.equal(copy.deepcopy(weight)(), codes.clamp(0, 1) * 0.5)


class TestSpecializing:
    def names(self, gm):
        return [str(node.target) for node in gm.graph.nodes]

    def specialised(self, model, inputs):
        gm = trace(model, inputs)
        run_pass(Functionalize(), gm)
        gm.eval()
        want = tensors(gm, inputs)
        assert run_pass(SpecializeEvaluation(), gm) is True
        assert_equal(tensors(gm, inputs), want)
        assert run_pass(SpecializeEvaluation(), gm) is False
        return gm

    def test_a_branch_of_training_goes_with_its_layers(self):
        gm = self.specialised(*case("auxiliary").build())
        assert not [key for key in gm.state_dict() if key.startswith("extra")]
        assert "training_mode" not in dict(gm.named_modules())

    def test_dropout_goes_in_every_form(self):
        def dropping(self, x):
            x = F.dropout(self.drop(x), 0.5, self.training)
            return F.alpha_dropout(self.layer(x), p=0.5, training=False)

        model = Calls(dropping, drop=nn.Dropout(), layer=nn.Linear(6, 5))
        gm = self.specialised(model, INPUTS)
        assert [n.op for n in gm.graph.nodes].count("call_function") == 1
        assert "drop" not in dict(gm.named_modules())

    def test_dropout_that_is_always_on_stays(self):
        model = Calls(lambda self, x: F.dropout(self.layer(x), 0.5), layer=nn.Linear(6, 5))
        gm = trace(model, INPUTS)
        run_pass(SpecializeEvaluation(), gm)
        assert F.dropout in [node.target for node in gm.graph.nodes]

    def test_a_drop_path_is_opened(self):
        gm = self.specialised(*case("drop path").build())
        assert {node.op for node in gm.graph.nodes} == {
            *("placeholder", "get_attr", "call_function", "output"),
        }

    def test_dropout_of_attention_becomes_a_number(self):
        gm = self.specialised(*case("attention").build())
        attention = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
        assert attention[0].args[4] == 0.0

    def test_writes_whose_result_is_not_read_stay(self):
        def writing(self, x):
            y = self.drop(self.layer(x))
            y.view(-1).add_(1)
            y[:, :1] = 0
            F.relu(y, inplace=True)
            return y

        model = Calls(writing, drop=nn.Dropout(), layer=nn.Linear(6, 5))
        gm = self.specialised(model, INPUTS)
        out = tensors(gm, INPUTS)[0]
        assert float(out.min()) == 0
        assert not out[:, 0].any()

    def test_a_write_in_a_branch_of_training_goes(self):
        def branching(self, x):
            y = self.layer(x)
            if self.training:
                extra = self.extra(y)
                extra.mul_(2)
                return y, extra
            return y

        model = Calls(branching, layer=nn.Linear(6, 5), extra=nn.Linear(5, 2))
        gm = self.specialised(model, INPUTS)
        assert not [key for key in gm.state_dict() if key.startswith("extra")]

    def test_a_guard_on_inputs_stays(self):
        model, inputs = case("loop on shape").build()
        gm = trace(model, inputs)
        before = self.names(gm)
        run_pass(SpecializeEvaluation(), gm)
        assert self.names(gm) == before


def test_a_weight_computed_from_parameters_is_stored_in_their_place_at_32_bits():
    """Weight norm has a length and a direction; memory is priced for the weight they make."""
    inputs = (torch.randn(2, 3, 5, 5),)
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, bias=False))
    prepared = prepared_at(layer, inputs, lambda q: q.spec.widths[-1], BOTH)
    want = tensors(prepared, inputs)
    frozen = freeze(prepared)
    assert [tuple(value.shape) for value in frozen.parameters() if value.ndim > 3] == [(4, 3, 3, 3)]
    assert_equal(tensors(frozen, inputs), want)
    held = sum(value.numel() for name, value in frozen.named_parameters() if "quant" not in name)
    accounting = prepared.plan.accounting
    assert 4 * held == accounting.totals(list(prepared.bit_widths.values()))["weight_memory"]
