"""Which ReLUs run with the quantizer that reads them, and that nobody sees it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cgmq_fx
from cgmq_fx.native_library import load_library
from cgmq_fx.passes.fuse_rectifiers import FuseRectifiers
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.rectified import quantize_rectified, rectify_and_quantize

COMPILED = pytest.mark.skipif(load_library() is None, reason="there is no C compiler")
X = torch.linspace(-2, 2, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)


class Net(nn.Module):
    """Two convolutions with a function between them that the case chooses."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.relu, self.relu6 = nn.BatchNorm2d(3), nn.ReLU(), nn.ReLU6(inplace=True)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, self.norm(self.first(x)))


def prepared_of(between) -> PreparedModule:
    torch.manual_seed(0)
    prepared = cgmq_fx.prepare(Net(between), "100%", example_inputs=(X,))
    prepared.set_bit_widths([8 if 8 in q.spec.widths else 32 for q in prepared.quantizers.values()])
    prepared(X)
    return prepared


def written_then_read(net, y):
    z = F.relu(y)
    y += 1
    return net.second(z) + y


FUSED = {
    "module": lambda net, y: net.second(net.relu(y)),
    "module in place": lambda net, y: net.second(net.relu6(y)),
    "function": lambda net, y: net.second(F.relu(y)),
    "function in place": lambda net, y: net.second(F.relu(y, inplace=True)),
    "another function": lambda net, y: net.second(torch.relu(y)),
    "function with a top": lambda net, y: net.second(F.relu6(y)),
    "method": lambda net, y: net.second(y.relu()),
    "method in place": lambda net, y: net.second(y.relu_()),
    "also read by others": lambda net, y: net.second(z := F.relu(y)) + z,
}
ALONE = {
    "no ReLU": lambda net, y: net.second(F.gelu(y)),
    "no quantizer": lambda net, y: net.second(F.relu(y) * 2),
    "written to": written_then_read,
    "in place, and seen": lambda net, y: net.second(F.relu(y, inplace=True)) + y,
    "in place on a view": lambda net, y: net.second(F.relu(y[:, :], inplace=True)) + y,
}


@pytest.mark.parametrize("name", FUSED)
def test_a_relu_and_the_quantizer_that_reads_it_are_one_call(name):
    prepared = prepared_of(FUSED[name])
    assert "rectif" in prepared.code
    assert not any(node.target is quantize_rectified for node in prepared.graph.nodes)
    assert not any(node.target is rectify_and_quantize for node in prepared.graph.nodes)


@pytest.mark.parametrize("name", ALONE)
def test_what_somebody_could_see_is_left_alone(name):
    assert "rectif" not in prepared_of(ALONE[name]).code


def results(prepared: PreparedModule, run) -> list[Tensor]:
    prepared.zero_grad()
    x = X.clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in prepared.named_parameters() if p.grad is not None}
    return [out.detach(), x.grad, *(grads[name] for name in sorted(grads))]


@pytest.mark.parametrize("name", [*FUSED, *ALONE])
@pytest.mark.parametrize("training", [True, False])
def test_numbers_are_those_of_the_graph(name, training):
    prepared = prepared_of((FUSED | ALONE)[name]).train(training)
    state = copy.deepcopy(prepared.state_dict())
    fused = results(prepared, prepared)
    prepared.load_state_dict(state)
    plain = results(prepared, lambda x: torch.fx.Interpreter(prepared).run(x))
    for mine, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(fused[0], plain[0])


def calls_of(prepared: PreparedModule, run) -> list[str]:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        run(X)
    return seen


def test_a_mode_that_watches_sees_the_relu():
    prepared = prepared_of(FUSED["function"])
    assert "aten.relu.default" in calls_of(prepared, prepared)


@COMPILED
@pytest.mark.parametrize("place", ["relu", "quantizer"])
def test_hooks_see_what_they_would(place):
    prepared = prepared_of(FUSED["module"])
    module = prepared.relu if place == "relu" else prepared.quantizers["relu"]
    seen: list[Tensor] = []
    module.register_forward_hook(lambda module, args, out: seen.append(out))
    prepared(X)
    assert len(seen) == 1
    assert bool((seen[0] >= 0).all())


def test_at_32_bits_and_while_a_range_is_due_the_two_run_alone(monkeypatch):
    prepared = prepared_of(FUSED["function"])
    quantizer, x = prepared.quantizers["relu"], torch.randn(100)
    for bits in (32, 4):
        quantizer.set_bit_width(bits)
        expected = F.relu(x)
        out = quantize_rectified(quantizer, None, float("inf"), x)
        assert quantizer.refit_pending is False
        assert torch.equal(out, expected) == (bits == 32)


def test_a_second_run_of_the_pass_changes_nothing():
    prepared = prepared_of(FUSED["also read by others"])
    assert FuseRectifiers().run(prepared)
    assert not FuseRectifiers().run(prepared)
