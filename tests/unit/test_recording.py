"""What a forward does that reads no proxy: it is in the graph, or refused where it stands."""

import copy
import inspect
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.trace import trace
from cgmq_fx.prepare import prepare
from exactness import assert_exact, at_32_bits
from graph_zoo import Calls

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def calls(forward):
    return Calls(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4))


def check(forward):
    """With example inputs, and without."""
    model = calls(forward)
    assert_exact(model, at_32_bits(model, X), X)
    assert_exact(model, trace(copy.deepcopy(model)), X)


# -- gradients and autocast --------------------------------------------------------------------


def without_gradients(self, x):
    with torch.no_grad():
        frozen = self.first(x)
    return frozen * 2 + self.second(x)


def one_weight_in_and_out(self, x):
    before = self.first(x)
    with torch.no_grad():
        frozen = self.first(x).relu()
    return before + frozen + self.first(frozen)


@torch.no_grad()
def frozen_first(module, x):
    return module.first(x)


def by_decorator(self, x):
    return frozen_first(self, x) + self.second(x)


def nested(self, x):
    with torch.set_grad_enabled(False):
        frozen = self.first(x)
        with torch.enable_grad():
            trained = self.second(x)
    return frozen + trained


def in_training_alone(self, x):
    with torch.set_grad_enabled(self.training):
        return self.first(x)


def without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.first(x)


@pytest.mark.parametrize(
    "forward",
    [without_gradients, one_weight_in_and_out, by_decorator, nested, without_autocast],
    ids=lambda forward: forward.__name__,
)
def test_gradient_modes_are_kept(forward):
    check(forward)


def test_the_mode_of_the_caller_comes_back():
    prepared = at_32_bits(calls(without_gradients), X)
    with torch.no_grad():
        assert not prepared(X).requires_grad
        assert not torch.is_grad_enabled()
    assert prepared(X).requires_grad


def test_the_mode_of_the_model_may_switch_gradients():
    model = calls(in_training_alone)
    assert_exact(model, at_32_bits(model, X), X)


def with_autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.first(x)


def with_inference_mode(self, x):
    with torch.inference_mode():
        return self.first(x)


def switched_for_good(self, x):
    torch.set_grad_enabled(False)
    return self.first(x)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (with_autocast, r"turns on autocast.* around the call of the model"),
        (with_inference_mode, r"torch.inference_mode\(\).* use torch.no_grad"),
    ],
)
def test_a_mode_that_no_graph_keeps_is_refused_where_it_stands(forward, words):
    with pytest.raises(UnsupportedModelError, match=f"(?s){words}") as caught:
        prepare(calls(forward), "100%")
    assert f"{__file__}:{inspect.getsourcelines(forward)[1] + 1}" in str(caught.value)


def test_a_switch_without_an_end_is_refused():
    with pytest.raises(UnsupportedModelError, match="switches gradients and not back"):
        prepare(calls(switched_for_good), "100%")
    assert torch.is_grad_enabled()


# -- random numbers and tensors made from numbers ----------------------------------------------


def drawing(self, x):
    return self.first(x) * torch.rand(1) + torch.randn(x.shape[0], 4) + torch.rand_like(x)


def permuting(self, x):
    return self.first(x)[:, torch.randperm(4)]


def filling(self, x):
    out = torch.zeros(2, 4)
    out[:, 0] = x[:, 0]
    return self.first(out * 2)


def summing(self, x):
    return torch.zeros(x.shape[0], 4).add_(self.first(x)) + torch.arange(4)


@pytest.mark.parametrize(
    "forward", [drawing, permuting, filling, summing], ids=lambda forward: forward.__name__
)
def test_made_tensors_are_made_at_each_call(forward):
    check(forward)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_random_numbers_of_others_are_refused(draw):
    with pytest.raises(UnsupportedModelError, match=r"outside of torch.* torch.rand"):
        prepare(calls(lambda self, x: self.first(x) * draw()), "100%")


def dropping(probability):
    def forward(self, x):
        if self.training and torch.rand([]) < probability:
            return x
        return self.first(x)

    return forward


def test_a_layer_that_is_never_dropped_stays():
    check(dropping(0.0))


def test_a_layer_that_chance_drops_is_refused():
    with pytest.raises(UnsupportedModelError, match="truth value of a tensor's data"):
        prepare(calls(dropping(0.1)), "100%", example_inputs=X)


# -- checks of type, and errors that are caught ------------------------------------------------


def check_of_type(self, x):
    return self.first(x) if isinstance(x, Tensor) else self.second(x)


def check_of_container(self, x):
    return self.first(x[0]) if isinstance(x, list | tuple) else self.second(x)


def check_by_torch(self, x):
    return self.first(x) if torch.is_tensor(x) else self.second(x)


def check_of_parameter(self, x):
    return x * 2 if isinstance(self.first.weight, nn.Parameter) else self.first(x)


@pytest.mark.parametrize(
    "forward",
    [check_of_type, check_of_container, check_by_torch, check_of_parameter],
    ids=lambda forward: forward.__name__,
)
def test_a_check_of_type_is_answered(forward):
    check(forward)


def test_another_type_than_the_supposed_one_is_refused():
    gm = trace(calls(check_of_container))
    with pytest.raises(UnsupportedModelError, match=r"path for 'Tensor' .* now has 'tuple'"):
        gm((X,))


def catching(self, x):
    try:
        factor = 2 if x.sum() > 0 else 3
    except Exception:
        factor = 5
    return self.first(x) * factor


def test_a_question_whose_refusal_the_model_hides_is_refused():
    with pytest.raises(UnsupportedModelError, match="caught this error, and went on"):
        prepare(calls(catching), "100%", example_inputs=X, front_end="fx")


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def test_a_gradient_of_the_users_own_is_kept():
    check(lambda self, x: Reversed.apply(self.first(x)) + self.second(x))


# -- state -------------------------------------------------------------------------------------


class Averaging(nn.Module):
    def __init__(self, update):
        super().__init__()
        self.layer, self.update = nn.Linear(4, 4), update
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        y = self.layer(x)
        self.update(self, y.detach().mean(0))
        return y - self.mean


def assigned(self, value):
    old = self.mean
    self.mean = 0.9 * old + 0.1 * value
    self.last = old


def added(self, value):
    self.mean += value


def assigned_in_training(self, value):
    if self.training:
        self.mean = 0.9 * self.mean + 0.1 * value


@pytest.mark.parametrize(
    "update", [assigned, added, assigned_in_training], ids=lambda update: update.__name__
)
def test_buffers_change_as_in_the_model(update):
    model = Averaging(update)
    prepared = at_32_bits(model, X)
    for _ in range(2):
        assert_exact(model, prepared, X)
    assert not hasattr(prepared, "last")


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return F.dropout(self.layer(x), 0.5, self.training)


class Branching(Own):
    def forward(self, x):
        return self.layer(x) * 2 if self.training else self.layer(x)


def test_a_submodule_has_a_mode_of_its_own():
    model = nn.Sequential(Own(), nn.Linear(4, 2))
    prepared = at_32_bits(model, X)
    for module in (model, prepared):
        module.train()
        module.get_submodule("0").eval()
    torch.testing.assert_close(prepared(X), model(X), rtol=0, atol=0)


def test_a_submodule_that_branches_must_have_the_mode_of_the_model():
    prepared = at_32_bits(nn.Sequential(Branching(), nn.Linear(4, 2)), X)
    prepared.train().get_submodule("0").eval()
    with pytest.raises(UnsupportedModelError, match=r"'0' is in evaluation.* leaf_modules=\['0'\]"):
        prepared(X)


# -- hooks and forwards of instances -----------------------------------------------------------


def test_hooks_of_the_model_itself_are_traced():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model.register_forward_hook(lambda module, args, output: output + 1)
    assert_exact(model, at_32_bits(model, X), X)


def test_backward_hooks_are_refused():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    model[0].register_full_backward_hook(lambda module, before, after: None)
    with pytest.raises(UnsupportedModelError, match=r"'0' has backward hooks.* leaf_modules"):
        prepare(model, "100%")


@pytest.mark.parametrize("path", ["", "0", "0.0"])
def test_a_forward_put_on_an_instance_is_the_one_that_runs(path):
    def doubled(self, x):
        return type(self).forward(self, x) * 2

    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    module = model.get_submodule(path)
    module.forward = doubled.__get__(module)
    assert_exact(model, at_32_bits(model, X), X)


def test_a_forward_that_is_no_method_of_the_instance_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model.forward = lambda x: x * 2
    with pytest.raises(UnsupportedModelError, match="no method bound to it"):
        prepare(model, "100%")


def test_scripted_modules_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model.add_module("scripted", torch.jit.ScriptModule())
    with pytest.raises(UnsupportedModelError, match=r"\['scripted'\], whose copies"):
        prepare(model, "100%")


def test_nothing_is_left_patched():
    before = (torch.rand, torch.no_grad.__enter__, torch.is_tensor, nn.Module.__setattr__)
    with pytest.raises(UnsupportedModelError):
        prepare(calls(catching), "100%")
    prepare(calls(drawing), "100%")
    assert (torch.rand, torch.no_grad.__enter__, torch.is_tensor, nn.Module.__setattr__) == before
    assert "isinstance" not in globals()
