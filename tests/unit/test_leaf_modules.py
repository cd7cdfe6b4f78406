"""Submodules that the user keeps closed."""

import pytest
import torch
from torch import nn

from cgmq_fx.errors import UnsupportedModelError, UsageError
from cgmq_fx.lower import lower
from cgmq_fx.passes.leaf_modules import match
from cgmq_fx.prepare import prepare
from exactness import assert_exact, at_32_bits
from graph_zoo import Calls

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Deciding(nn.Module):
    """Data decides what it computes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.first(x) if x.sum() > 1e6 else self.second(self.first(x))


def deciding():
    return Calls(
        lambda self, x: self.out(self.body(x).relu()), body=Deciding(), out=nn.Linear(4, 3)
    )


@pytest.mark.parametrize(
    "selector",
    ["body", "bod?", Deciding, lambda module: isinstance(module, Deciding), ["body", Deciding]],
    ids=["path", "glob", "class", "predicate", "several"],
)
def test_a_leaf_is_exact_and_stands_in_the_ledger(selector):
    model = deciding()
    prepared = at_32_bits(model, X, leaf_modules=selector)
    assert_exact(model, prepared, X)
    body, out = prepared.plan.accounting.ledger[0], prepared.plan.accounting.ledger[-1]
    assert (body.status, body.macs) == ("float", 32)
    assert "'body' is kept closed by leaf_modules" in body.reason
    assert (out.name, out.status) == ("out", "quantized")


def test_a_leaf_that_data_decides_is_priced_on_the_first_batch_too():
    model = deciding()
    prepared = prepare(model, "100%", leaf_modules="body")
    prepared(X)
    assert prepared.plan.accounting.ledger[0].macs == 32


def test_shapes_behind_a_leaf_decide_branches():
    model = Calls(
        lambda self, x: self.out(x) if self.body(x).shape[0] > 1 else x,
        body=Deciding(),
        out=nn.Linear(4, 3),
    )
    assert_exact(model, at_32_bits(model, X, leaf_modules="body"), X)


def test_pricing_a_leaf_draws_no_random_numbers_and_changes_no_state():
    model = Calls(lambda self, x: self.body(x), body=Deciding())
    model.body.register_buffer("seen", torch.zeros(()))
    model.body.register_forward_pre_hook(lambda module, args: module.seen.add_(1) and None)
    state = torch.get_rng_state()
    prepared = prepare(model, "100%", example_inputs=X, leaf_modules="body")
    assert torch.equal(torch.get_rng_state(), state)
    assert prepared.get_buffer("body.seen") == 0


def test_a_layer_of_torch_may_be_a_leaf():
    prepared = at_32_bits(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), X, leaf_modules="0")
    assert [entry.status for entry in prepared.plan.accounting.ledger] == ["float", "quantized"]
    prepared(X)
    assert lower(prepared, allow_untrained=True)(X).shape == (2, 2)


def test_a_path_names_what_is_inside_it():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU())
    assert match(model, "0", "leaf_modules") == {"0", "0.0", "0.1"}
    assert match(model, "*.1", "leaf_modules") == {"0.1"}
    assert match(model, nn.ReLU, "leaf_modules") == {"0.1", "1"}
    assert match(model, (), "leaf_modules") == frozenset()


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        ("bodi", r"'bodi' \(close: 'body'"),
        (["body", nn.Conv2d], r"Conv2d \(it has modules of Deciding, Linear\)"),
        (lambda module: False, r"<lambda> \(it has modules of"),
        ([3, torch.Tensor], r"leaf_modules has 3, <class 'torch.Tensor'>; name submodules by"),
    ],
)
def test_a_selector_that_names_nothing_is_refused(selector, words):
    with pytest.raises(UsageError, match=words):
        prepare(deciding(), "100%", leaf_modules=selector)


def test_without_it_the_message_names_the_layer_to_close():
    with pytest.raises(UnsupportedModelError) as caught:
        prepare(deciding(), "100%", example_inputs=X)
    for words in ("x.sum() > 1e6", "leaf_modules=['body']", "concrete_args", "front_end='export'"):
        assert words in str(caught.value)


class Checking(nn.Module):
    """Returns nothing, as a module does that checks or logs."""

    def forward(self, x):
        if x.sum() > 1e6:
            raise ValueError("too large")


def test_a_leaf_that_returns_none_is_none_for_the_caller():
    def forward(self, x):
        extra = self.check(x)
        return self.out(x if extra is None else x + extra)

    model = Calls(forward, check=Checking(), out=nn.Linear(4, 3))
    assert_exact(model, at_32_bits(model, X, leaf_modules="check"), X)


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_both_front_ends_keep_a_leaf_closed(front_end):
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.first(x)).relu()

    model = Calls(lambda self, x: self.out(self.body(x)), body=Body(), out=nn.Linear(4, 3))
    prepared = at_32_bits(model, X, leaf_modules="body", front_end=front_end)
    assert_exact(model, prepared, X)
    assert "'body' is kept closed by leaf_modules" in prepared.plan.accounting.ledger[0].reason
    assert list(prepared.quantizers) == ["out_weight", "body"]
