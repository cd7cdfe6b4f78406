"""Layers with parameters become functions; layers with a state of their own stay."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

from cgmq_fx.passes.functionalize import Functionalize, make_tuple
from cgmq_fx.passes.meta import MODULE_PATH
from cgmq_fx.passes.pipeline import run_pass
from cgmq_fx.passes.trace import trace
from graph_zoo import Calls, CrossAttention, SelfAttention


def opened(model):
    gm = trace(model)
    run_pass(Functionalize(), gm)
    return gm


def calls(gm, op):
    return [node.target for node in gm.graph.nodes if node.op == op]


OPENED = {
    "linear": (nn.Linear(4, 3), F.linear, (2, 4)),
    "conv2d": (nn.Conv2d(4, 2, 3, stride=2, groups=2), F.conv2d, (2, 4, 5, 5)),
    "transposed": (nn.ConvTranspose1d(4, 2, 3, stride=2), F.conv_transpose1d, (2, 4, 5)),
    "layer norm": (nn.LayerNorm(4, 1e-3), F.layer_norm, (2, 4)),
    "group norm": (nn.GroupNorm(2, 4, 1e-3), F.group_norm, (2, 4, 3)),
    "prelu": (nn.PReLU(), torch.prelu, (2, 4)),
    "bilinear": (nn.Bilinear(4, 4, 2), F.bilinear, (2, 4)),
}


@pytest.mark.parametrize("name", OPENED)
def test_a_layer_becomes_its_function(name):
    layer, function, shape = OPENED[name]
    both = isinstance(layer, nn.Bilinear)
    model = Calls(lambda self, x: self.layer(x, x) if both else self.layer(x), layer=layer)
    gm = opened(model)
    assert calls(gm, "call_module") == []
    assert calls(gm, "call_function") == [function]
    read = {f"layer.{name}" for name, _ in layer.named_parameters()}
    assert set(calls(gm, "get_attr")) == read
    x = torch.randn(shape)
    assert torch.equal(gm(x), model(x))
    (node,) = gm.graph.find_nodes(op="call_function", target=function)
    assert MODULE_PATH.get(node) == "layer"


class OwnLinear(nn.Linear):
    """A layer of the user's, derived from one of torch's."""

    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU()])
def test_a_layer_with_a_mode_or_without_parameters_stays(layer):
    gm = opened(Calls(lambda self, x: self.layer(x), layer=layer))
    assert calls(gm, "call_module") == ["layer"]


def test_a_hooked_layer_stays_and_its_hook_runs():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    model = Calls(lambda self, x: self.layer(x), layer=layer)
    gm = opened(model)
    assert calls(gm, "call_module") == ["layer"]
    x = torch.randn(2, 4)
    assert torch.equal(gm(x), model(x))


def test_a_parametrized_layer_is_opened_with_its_parametrization():
    model = Calls(
        lambda self, x: self.layer(x), layer=parametrizations.weight_norm(nn.Linear(4, 3))
    )
    gm, x = opened(model), torch.randn(2, 4)
    assert F.linear in calls(gm, "call_function")
    assert torch.equal(gm(x), model(x))
    assert set(model.state_dict()) == set(gm.state_dict())


def test_a_layer_derived_from_one_of_torch_is_opened_too():
    model = Calls(lambda self, x: self.layer(x), layer=OwnLinear(4, 3))
    gm, x = opened(model), torch.randn(2, 4)
    assert F.linear in calls(gm, "call_function")
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("size", [(9,), (10,)])
def test_an_output_size_is_found_when_the_graph_runs(size):
    layer = nn.ConvTranspose1d(3, 2, 3, stride=2, padding=1)
    model = Calls(lambda self, x: self.layer(x, output_size=size), layer=layer)
    gm, x = opened(model), torch.randn(1, 3, 5)
    assert F.conv_transpose1d in calls(gm, "call_function")
    assert gm(x).shape[-1] == size[0]
    assert torch.equal(gm(x), model(x))


def test_an_embedding_that_renormalises_itself_stays():
    model = Calls(lambda self, x: self.layer(x), layer=nn.Embedding(5, 3, max_norm=1.0))
    assert calls(opened(model), "call_module") == ["layer"]


# -- attention ---------------------------------------------------------------------------------


def masks(batch, heads, target, source):
    causal = torch.ones(target, source, dtype=torch.bool).triu(1)
    padding = torch.zeros(batch, source, dtype=torch.bool)
    padding[0, -1] = True
    return {
        "none": {},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(target, source)},
        "per head": {"attn_mask": torch.randn(batch * heads, target, source)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
    }


@pytest.mark.parametrize("mask", masks(2, 2, 4, 4))
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_with_every_mask(mask, need_weights, bias):
    attention = nn.MultiheadAttention(8, 2, dropout=0.2, bias=bias, batch_first=True)
    options = {**masks(2, 2, 4, 4)[mask], "need_weights": need_weights}
    model = Calls(lambda self, x: self.attention(x, x, x, **options)[0], attention=attention)
    gm, x = opened(model), torch.randn(2, 4, 8)
    assert calls(gm, "call_module") in (["attention.training_mode"], [])
    for training in (True, False):
        outputs = []
        for module in (model, gm):
            torch.manual_seed(2)
            outputs.append(module.train(training)(x))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("average", [True, False])
def test_attention_weights_may_be_kept_by_head(average):
    attention = nn.MultiheadAttention(8, 2)
    model = Calls(
        lambda self, x: self.attention(x, x.flip(0), x, average_attn_weights=average),
        attention=attention,
    )
    gm, x = opened(model), torch.randn(4, 3, 8)
    for mine, theirs in zip(gm(x), model(x), strict=True):
        assert torch.equal(mine, theirs)


def test_attention_between_widths_has_three_weights():
    gm = opened(CrossAttention())
    names = {str(target).rpartition(".")[2] for target in calls(gm, "get_attr")}
    assert {"q_proj_weight", "k_proj_weight", "v_proj_weight"} <= names


def test_attention_with_options_that_are_not_covered_stays():
    attention = nn.MultiheadAttention(8, 2, add_zero_attn=True)
    model = Calls(lambda self, x: self.attention(x, x, x)[0], attention=attention)
    gm, x = opened(model), torch.randn(4, 3, 8)
    assert calls(gm, "call_module") == ["attention"]
    assert torch.equal(gm(x), model(x))


def test_dropout_of_attention_follows_the_mode():
    model = SelfAttention(need_weights=False)
    gm, x = opened(model), torch.randn(2, 3, 8)
    assert torch.equal(gm.eval()(x), gm(x))
    assert not torch.equal(gm.train()(x), gm(x))


class Attended(nn.Module):
    def __init__(self, pick):
        super().__init__()
        self.attention, self.pick = nn.MultiheadAttention(4, 2, batch_first=True), pick

    def forward(self, x):
        found = self.attention(x, x, x)
        return found[0] if self.pick == "value" else found


@pytest.mark.parametrize("pick", ["value", "both"])
def test_attention_weights_that_nobody_reads_are_not_computed(pick):
    model = Attended(pick).eval()
    gm = opened(model)
    targets = [node.target for node in gm.graph.nodes]
    assert ("mean" in targets) == (make_tuple in targets) == (pick == "both")
    x = torch.randn(2, 5, 4)
    for found, wanted in zip(tree_leaves(gm(x)), tree_leaves(model(x)), strict=True):
        assert torch.equal(found, wanted)
