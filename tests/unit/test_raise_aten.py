"""`RaiseAten`: what ATen operators become, with the same numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload

from cgmq_fx.passes import aten_calls
from cgmq_fx.passes.meta import EXPORTED, ExportedTensor
from cgmq_fx.passes.op_classes import class_of_function, class_of_method
from cgmq_fx.passes.pipeline import run_pass
from cgmq_fx.passes.raise_aten import RaiseAten

G = torch.Generator().manual_seed(0)
IMAGE = torch.randn(2, 4, 6, 6, generator=G)
TOKENS = torch.randn(2, 3, 4, generator=G)
WEIGHT = torch.randn(4, 2, 3, 3, generator=G)

CALLS = {
    "conv2d": lambda x: F.conv2d(x, WEIGHT, None, (2, 1), 1, 1, 2),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, WEIGHT, None, 2, 1, 1, 2, 2),
    "linear": lambda x: F.linear(x, torch.ones(3, 6)),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3),
    "layer_norm": lambda x: F.layer_norm(x, (6,), eps=1e-3),
    "group_norm": lambda x: F.group_norm(x, 2, eps=1e-3),
    "max_pool": lambda x: F.max_pool2d(x, 3, None, 1, 1, ceil_mode=True),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1, True, False, 5),
    "softmax": lambda x: F.log_softmax(x, 1),
    "add": lambda x: x + 2,
    "sub": lambda x: 3 - x,
    "mul": lambda x: 0.5 * x,
    "div": lambda x: x / 3,
    "cat": lambda x: torch.cat([x, x * 2], -1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear") * 2,
    "reduce": lambda x: x.sum((1, 2), keepdim=True),
    "activation": lambda x: F.gelu(x, approximate="tanh"),
}
REARRANGED = {
    "slices": lambda x: x[:, 1:, ::2, -1],
    "indices": lambda x: x[:, torch.tensor([2, 0]), :, torch.tensor([1, 1])],
    "views": lambda x: x.view(2, -1).unflatten(1, (4, 36)).permute(2, 0, 1),
    "types": lambda x: x.to(torch.float64),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "parts": lambda x: list(x.split([1, 3], 1)),
}


METADATA = torch.ops.aten._assert_tensor_metadata.default


class Calling(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def recorded(function, x):
    """The ATen calls that `function` makes, as a graph that nothing was done to."""
    program = torch.export.export(Calling(function), (x,), strict=False)
    gm = program.module(check_guards=False)
    graph, values = fx.Graph(), {}
    for node in gm.graph.nodes:
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], values.__getitem__))
        elif node.op != "call_module" and node.target is not METADATA:
            values[node] = graph.node_copy(node, values.__getitem__)
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                info = ExportedTensor(value.dim(), value.dtype, value.device)
                EXPORTED.set(values[node], info)
    return fx.GraphModule(gm, graph)


def check(function, x=IMAGE):
    gm = recorded(function, x)
    expected = gm(x.clone())
    expected = expected if isinstance(expected, list | tuple) else [expected]
    assert run_pass(RaiseAten(), gm)
    found = gm(x.clone())
    found = found if isinstance(found, list | tuple) else [found]
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    text = str(gm.graph)
    assert not run_pass(RaiseAten(), gm)
    assert str(gm.graph) == text
    return gm


def class_of(node):
    named = node.op == "call_method"
    return class_of_method(node.target) if named else class_of_function(node.target)


@pytest.mark.parametrize("op", CALLS)
def test_an_operation_keeps_its_numbers_and_has_its_class(op):
    gm = check(CALLS[op])
    assert op in {class_of(node) for node in gm.graph.nodes if node.op.startswith("call")}
    if op != "interpolate":
        assert not [n for n in gm.graph.nodes if isinstance(n.target, OpOverload)]


@pytest.mark.parametrize("name", REARRANGED)
def test_a_rearrangement_is_one_that_passes_know(name):
    gm = check(REARRANGED[name])
    calls = [node for node in gm.graph.nodes if node.op.startswith("call")]
    assert {class_of(node) for node in calls} == {"reshape"}


def test_changes_in_place_stay_in_place():
    def write(x):
        y = x.view(-1)
        y += 1
        y[3:5] = 7
        x.relu_().mul_(2)
        return y

    gm = check(write)
    x = IMAGE.clone()
    gm(x)
    assert torch.equal(x, write(IMAGE.clone()).view_as(x))


def test_an_operator_that_no_pass_knows_stays_and_is_classified_as_other():
    gm = check(lambda x: torch.cumsum(x, 1) + 0)
    (kept,) = [node for node in gm.graph.nodes if isinstance(node.target, OpOverload)]
    assert class_of(kept) == "other"


def test_new_tensors_are_made_where_the_inputs_are():
    gm = check(lambda x: x + torch.arange(6))
    twin = copy.deepcopy(gm).to("meta")
    assert twin(IMAGE.to("meta"))[0].device.type == "meta"


def test_a_wrong_order_of_arguments_is_seen(monkeypatch):
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    wrong = aten_calls._to(F.conv_transpose2d, *names)
    monkeypatch.setitem(aten_calls.CALLS, "conv_transpose2d", wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        check(CALLS["conv_transpose2d"])
