"""One graph for two modes: what is shared, what is picked, what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.align import align
from cgmq_fx.passes.close_batch_norm import CloseBatchNorm
from cgmq_fx.passes.guards import select_mode, write_in_training
from cgmq_fx.passes.trace import trace
from cgmq_fx.prepare import prepare
from graph_zoo import Calls


def same_in_both_modes(model, gm, *inputs):
    for training in (True, False, True):
        results = []
        for module in (model, gm):
            module.train(training)
            torch.manual_seed(1)
            results.append(module(*(item.clone() for item in inputs)))
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(gm.get_buffer(name), buffer, rtol=0, atol=0)


def traced(model):
    return trace(copy.deepcopy(model))


def count(gm, target):
    return sum(node.target is target for node in gm.graph.nodes)


# -- what both modes call ----------------------------------------------------------------------


def two_views(self, x):
    """The same call twice, before and behind a branch: their results must not be mixed up."""
    first, second = x.shape[0], x.shape[0]
    p = 0.5 if self.training else 0.0
    y = F.dropout(x.reshape(second, -1), p) * first
    return self.layer(y) + x.shape[1]


def test_an_argument_that_differs_is_picked_by_the_mode():
    model = Calls(two_views, layer=nn.Linear(6, 2))
    gm = traced(model)
    assert [count(gm, select_mode), count(gm, F.dropout)] == [1, 1]
    assert [str(node.target) for node in gm.graph.nodes].count("layer") == 1
    same_in_both_modes(model, gm, torch.randn(4, 6))


def other_tensor(self, x):
    y = x * 2 if self.training else x + 3
    return self.norm(self.layer(y))


def test_a_tensor_that_differs_is_picked_before_layers_that_hold_state():
    model = Calls(other_tensor, layer=nn.Linear(6, 3), norm=nn.BatchNorm1d(3))
    gm = traced(model)
    assert [str(node.target) for node in gm.graph.nodes].count("norm") == 1
    same_in_both_modes(model, gm, torch.randn(4, 6))


def one_output_differs(self, x):
    y = self.layer(x)
    return y, (y.relu() if self.training else y.sigmoid())


def test_outputs_that_the_modes_share_are_not_picked():
    gm = traced(Calls(one_output_differs, layer=nn.Linear(3, 3)))
    output = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    assert [node.target for node in output] == ["layer", select_mode]
    same_in_both_modes(Calls(one_output_differs, layer=gm.layer), gm, torch.randn(2, 3))


# -- what one mode calls -----------------------------------------------------------------------


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = self.layer(x)
        if self.training:
            self.steps.add_(1)
            self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return y - self.mean


def test_what_training_writes_into_a_buffer_is_written_in_training_alone():
    model = Counted()
    gm = traced(model)
    assert count(gm, write_in_training) == 3
    same_in_both_modes(model, gm, torch.randn(5, 3))
    assert gm.steps == 2


def writes_to_its_input(self, x):
    if self.training:
        x.mul_(2)
    return self.layer(x)


def writes_through_a_view(self, x):
    y = self.layer(x)
    if self.training:
        y.view(-1).clamp_(max=0)
    return y


@pytest.mark.parametrize("body", [writes_to_its_input, writes_through_a_view])
def test_another_write_of_one_mode_is_refused(body):
    with pytest.raises(UnsupportedModelError, match="only in training mode") as caught:
        traced(Calls(body, layer=nn.Linear(3, 3)))
    assert __file__ in str(caught.value)


def asks_in_training(self, x):
    if self.training:
        torch._assert(x.shape[0] > 1, "more than one sample")
    return x * 2


def test_a_guard_of_one_mode_passes_in_the_other():
    gm = traced(Calls(asks_in_training))
    assert gm.eval()(torch.ones(1, 2)).tolist() == [[2, 2]]
    with pytest.raises(AssertionError, match="more than one sample"):
        gm.train()(torch.ones(1, 2))


def draws_in_evaluation(self, x):
    return x if self.training else x + torch.rand_like(x)


def test_random_numbers_of_evaluation_alone_are_refused():
    with pytest.raises(UnsupportedModelError, match="only in evaluation mode"):
        traced(Calls(draws_in_evaluation))


# -- side by side ------------------------------------------------------------------------------


def graph_of(*names):
    graph = fx.Graph()
    value = graph.placeholder("x")
    for name in names:
        value = graph.call_method(name, (value,))
    return list(graph.nodes)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("abc", "abc", ["aa", "bb", "cc"]),
        ("abc", "ac", ["aa", "b-", "cc"]),
        ("ac", "abc", ["aa", "-b", "cc"]),
        ("axyc", "azc", ["aa", "x-", "y-", "-z", "cc"]),
        ("ab", "", ["a-", "b-"]),
        ("aaab", "aab", ["aa", "aa", "a-", "bb"]),
    ],
)
def test_traces_are_laid_side_by_side(first, second, expected):
    pairs = align(graph_of(*first), graph_of(*second))[1:]
    found = ["".join("-" if node is None else node.target for node in pair) for pair in pairs]
    assert found == expected


# -- a batch norm in its own words -------------------------------------------------------------


class BatchNormRelu(nn.BatchNorm2d):
    """Batch norm and activation in one layer, with a forward of its own."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-3, momentum=0.3)
        self.act = nn.ReLU()

    def forward(self, x):
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        kept = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if kept else (None, None)
        y = F.batch_norm(
            x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(y)


class OtherMomentum(BatchNormRelu):
    def forward(self, x):
        self.momentum, momentum = 0.5, self.momentum
        try:
            return super().forward(x)
        finally:
            self.momentum = momentum


@pytest.mark.parametrize(("layer", "closed"), [(BatchNormRelu, True), (OtherMomentum, False)])
def test_a_batch_norm_that_is_written_out_becomes_the_layer_again(layer, closed):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer(4), nn.Conv2d(4, 2, 1))
    prepared = prepare(model, "20%", example_inputs=torch.randn(1, 3, 8, 8))
    kinds = [type(module) for _, module in prepared.named_modules()]
    assert (nn.BatchNorm2d in kinds) is closed
    assert count(prepared, F.batch_norm) == (not closed)
    assert {*model.state_dict()} <= {*prepared.state_dict()}
    assert type(model[1]) is layer
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(32)
    same_in_both_modes(model, prepared, torch.randn(2, 3, 8, 8))


def test_a_batch_norm_called_twice_counts_twice():
    model = Calls(lambda self, x: self.norm(self.norm(x)), norm=BatchNormRelu(3))
    prepared = prepare(model, "50%", example_inputs=torch.randn(2, 3, 4, 4))
    assert [str(node.target) for node in prepared.graph.nodes].count("norm") == 2
    same_in_both_modes(model, prepared, torch.randn(2, 3, 4, 4))
    assert prepared.norm.num_batches_tracked == 4


def autocast_off(self, x):
    with torch.autocast(device_type=x.device.type, enabled=False):
        return self.layer(x)


def test_autocast_may_be_turned_off_for_the_device_of_a_tensor():
    model = Calls(autocast_off, layer=nn.Linear(3, 2))
    same_in_both_modes(model, traced(model), torch.randn(2, 3))


def on_a_grid(self, x):
    grid = torch.zeros(x.shape[0], x.shape[1]) + torch.tensor(x.shape[1]) ** 0.5
    return self.layer(x + grid)


def test_a_tensor_made_from_a_shape_follows_the_batch():
    model = Calls(on_a_grid, layer=nn.Linear(3, 2))
    gm = trace(copy.deepcopy(model), (torch.randn(2, 3),))
    for batch in (1, 2, 5):
        same_in_both_modes(model, gm, torch.randn(batch, 3))


def test_a_closed_batch_norm_is_left_alone():
    gm = traced(nn.Sequential(BatchNormRelu(3)))
    assert CloseBatchNorm().run(gm)
    assert not CloseBatchNorm().run(gm)
    gm.graph.lint()
