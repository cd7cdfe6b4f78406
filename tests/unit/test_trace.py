"""The front end: what it keeps of a model's meaning, and what it refuses."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.trace import trace
from graph_zoo import Auxiliary, Calls, DropPath, TwoInputs

THIS_FILE = __file__


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.op.startswith("call")]


def same_numbers(model, gm, *inputs):
    for training in (True, False):
        model.train(training)
        gm.train(training)
        torch.manual_seed(1)
        expected = model(*(item.clone() for item in inputs))
        torch.manual_seed(1)
        torch.testing.assert_close(gm(*(item.clone() for item in inputs)), expected, rtol=0, atol=0)


# -- in-place operations -----------------------------------------------------------------------


def write_through_alias(self, x):
    alias = x.view(-1)
    x += 1
    x[0] *= 2
    x[1] = -7
    x.clamp_(max=3)
    return alias


def rebind(self, x):
    y = x
    y = y + 1
    return x * y


@pytest.mark.parametrize("body", [write_through_alias, rebind], ids=lambda body: body.__name__)
def test_a_tensor_with_two_names_keeps_both(body):
    model = Calls(body)
    same_numbers(model, trace(model), torch.randn(3, 2))


def test_the_caller_sees_what_is_written_to_his_tensor():
    gm, x = trace(Calls(write_through_alias)), torch.zeros(2, 2)
    gm(x)
    assert x.tolist() == [[2, 2], [-7, -7]]


# -- shapes ------------------------------------------------------------------------------------


def branch_on_shape(self, x):
    if x.shape[-1] > 3:
        return x.sum(-1)
    return x.mean(-1)


def test_a_branch_on_a_shape_needs_an_example():
    with pytest.raises(UnsupportedModelError) as caught:
        trace(Calls(branch_on_shape))
    line = inspect.getsourcelines(branch_on_shape)[1] + 1
    assert f"{THIS_FILE}:{line}" in str(caught.value)
    assert "example_inputs" in str(caught.value)


@pytest.mark.parametrize("width", [2, 5])
def test_an_example_decides_a_branch_on_its_shape(width):
    model = Calls(branch_on_shape)
    gm = trace(model, (torch.randn(2, width),))
    same_numbers(model, gm, torch.randn(7, width))


def test_a_shape_that_would_branch_otherwise_is_refused():
    gm = trace(Calls(branch_on_shape), (torch.randn(2, 5),))
    with pytest.raises(UnsupportedModelError, match=r"path for True .* now has False"):
        gm(torch.randn(2, 3))


def test_a_length_is_guarded():
    model = Calls(lambda self, x: sum(x[:, index] for index in range(len(x[0]))))
    gm = trace(model, (torch.randn(2, 3),))
    same_numbers(model, gm, torch.randn(4, 3))
    with pytest.raises(UnsupportedModelError, match=r"path for 3 .* now has 4"):
        gm(torch.randn(2, 4))


def test_a_batch_of_one_does_not_decide():
    model = Calls(lambda self, x: x if x.shape[0] > 1 else x * 2)
    gm = trace(model, (torch.randn(1, 3),))
    same_numbers(model, gm, torch.randn(2, 3))


# -- data --------------------------------------------------------------------------------------


def branch_on_data(self, x):
    if x.sum() > 0:
        return x
    return -x


@pytest.mark.parametrize("inputs", [None, (torch.randn(2, 3),)], ids=["no example", "example"])
def test_a_branch_on_data_is_refused_where_it_stands(inputs):
    with pytest.raises(UnsupportedModelError) as caught:
        trace(Calls(branch_on_data), inputs)
    line = inspect.getsourcelines(branch_on_data)[1] + 1
    assert f"{THIS_FILE}:{line}" in str(caught.value)
    assert "torch.fx.wrap" in str(caught.value)


# -- the training mode -------------------------------------------------------------------------


def test_dropout_follows_the_mode():
    model = Calls(lambda self, x: F.dropout(x, 0.5, self.training) + F.dropout(x, 0.5))
    same_numbers(model, trace(model), torch.ones(40))


def test_a_drop_path_is_one_module():
    model = nn.Sequential(nn.Linear(3, 3), DropPath(), nn.Linear(3, 2))
    gm = trace(model)
    assert targets(gm) == ["0", "1", "2"]
    same_numbers(model, gm, torch.randn(6, 3))


def test_an_output_of_training_alone_stays_one():
    model = Auxiliary()
    gm = trace(model)
    x = torch.randn(4, 6)
    assert set(gm.train()(x)) == {"out", "aux"}
    assert set(gm.eval()(x)) == {"out"}
    for training in (True, False):
        model.train(training)
        gm.train(training)
        for key, value in model(x).items():
            assert torch.equal(gm(x)[key], value)


def test_layers_of_evaluation_alone_are_refused_with_the_place():
    def normalized_for_evaluation(self, x):
        if self.training:
            return x
        return self.norm(x)

    with pytest.raises(UnsupportedModelError, match="only in evaluation mode") as caught:
        trace(Calls(normalized_for_evaluation, norm=nn.BatchNorm1d(3)))
    line = inspect.getsourcelines(normalized_for_evaluation)[1] + 1
    assert f"{THIS_FILE}:{line}" in str(caught.value)


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_as_they_were(training):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train(training)
    model[1].eval()
    gm = trace(model)
    assert (gm.training, gm.get_submodule("0").training) == (training, training)
    assert gm.get_submodule("1").training is False


def test_a_container_that_walks_over_its_children_meets_only_its_own():
    model = Calls(lambda self, x: [child(x) for child in self.children()], a=nn.ReLU(), b=nn.Tanh())
    assert targets(trace(model)) == ["a", "b"]


# -- arguments ---------------------------------------------------------------------------------


def test_an_optional_argument_may_stay_none():
    model = TwoInputs()
    gm = trace(model)
    assert [node.args for node in gm.graph.nodes if node.op == "placeholder"] == [(), (), (None,)]
    a, b = torch.randn(2, 6), torch.randn(2, 4)
    assert torch.equal(gm(a, b)["sum"], model(a, b)["sum"])


def test_an_argument_that_was_none_is_guarded():
    gm = trace(TwoInputs())
    with pytest.raises(UnsupportedModelError, match="input 'scale'"):
        gm(torch.randn(2, 6), torch.randn(2, 4), torch.randn(2, 5))


def test_an_optional_tensor_that_is_given_is_an_input():
    model, inputs = TwoInputs(), (torch.randn(2, 6), torch.randn(2, 4), torch.randn(2, 5))
    gm = trace(model, inputs)
    assert torch.equal(gm(*inputs)["sum"], model(*inputs)["sum"])


# -- functions ---------------------------------------------------------------------------------


def transform(x):
    return torch.relu(x) * 2


def decide(x):
    return x if x.sum() > 0 else -x


fx.wrap("transform")
fx.wrap("decide")


def test_a_wrapped_function_is_opened():
    model = Calls(lambda self, x: transform(x))
    gm = trace(model)
    assert transform not in targets(gm)
    assert torch.relu in targets(gm)
    same_numbers(model, gm, torch.randn(5))


def test_a_wrapped_function_that_data_decides_stays_one_operation():
    model = Calls(lambda self, x: decide(x) + 1)
    gm = trace(model)
    assert decide in targets(gm)
    same_numbers(model, gm, torch.randn(5))


# -- state -------------------------------------------------------------------------------------


def test_all_state_stays_also_what_forward_does_not_read():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    model.spare = nn.Linear(2, 2)
    model.register_buffer("table", torch.ones(2), persistent=False)
    gm = trace(model)
    assert list(gm.state_dict()) == list(model.state_dict())
    assert torch.equal(gm.get_buffer("table"), torch.ones(2))
    assert gm.get_parameter("0.weight") is model[0].weight


@pytest.mark.parametrize("name", ["training_mode", "quantizers", "graph", "code"])
def test_a_name_that_a_graph_needs_is_refused(name):
    model = nn.Module()
    model.register_buffer(name, torch.ones(1))
    with pytest.raises(UnsupportedModelError, match=rf"\['{name}'\].* rename"):
        trace(model, reserved=("quantizers",))


def test_a_refusal_names_the_largest_part_which_can_be_prepared_alone():
    def kept_by_data(self, x):
        y = self.body(x)
        return self.head(y[y.sum(1) > 0]) if bool(y.sum() > 0) else y

    model = Calls(kept_by_data, body=nn.Linear(3, 8), head=nn.Linear(8, 1))
    with pytest.raises(UnsupportedModelError) as caught:
        trace(model, (torch.randn(2, 3),))
    assert "prepare(model.body, ...)" in str(caught.value)
    same_numbers(model.body, trace(model.body), torch.randn(2, 3))
