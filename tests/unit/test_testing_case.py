"""A case of a user's own model, and what every case promises."""

import pytest
import torch
from torch import fx, nn

from cgmq_fx.errors import UsageError
from cgmq_fx.testing import Case

SOURCE = """
import torch
from torch import nn


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3))


def make_inputs():
    return (torch.randn(3, 2),)


def make_kwargs():
    return {}
"""


def test_a_case_of_a_model_works_on_copies():
    model = nn.Linear(2, 2)
    case = Case.of(model, torch.ones(1, 2))
    expected = model(torch.ones(1, 2))
    with torch.no_grad():
        model.weight.zero_()
        case.model().weight.zero_()
        case.inputs()[0].zero_()
    assert torch.equal(case.model()(*case.inputs()), expected)
    assert case.source == repr(model)


def test_a_graph_module_is_taken_as_it_is():
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    case = Case.of(gm, (torch.ones(1, 2),))
    assert case.source == gm.code
    assert case.graph_module() is not gm
    assert [n.name for n in case.graph_module().graph.nodes] == [n.name for n in gm.graph.nodes]


def test_keyword_inputs_are_kept():
    case = Case.of(nn.Bilinear(2, 2, 1), [torch.ones(1, 2)], {"input2": torch.ones(1, 2)})
    assert case.model()(*case.inputs(), **case.kwargs()).shape == (1, 1)


def test_the_repr_is_a_script(tmp_path):
    case = Case(SOURCE, frozenset({"linear", "dropout"}))
    assert repr(case).startswith("# Case: dropout, linear\n")
    assert Case(repr(case)).model()[1].p == 0.3
    assert case.write(tmp_path / "case.py").read_text() == SOURCE
    assert case == Case(SOURCE, frozenset({"dropout", "linear"}))
    assert case.kwargs() == {}


def test_an_odd_batch_axis_is_left_open_in_an_export():
    case = Case.of(nn.ReLU(), torch.ones(2, 3), batch_axis=1)
    assert case.exported().module()(torch.ones(2, 7)).shape == (2, 7)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (torch.relu, (torch.ones(1),), "model is builtin_function_or_method, not an nn.Module"),
        (nn.ReLU(), "x", "inputs is str; give a tuple"),
        (nn.ReLU(), 3, "inputs is int; give a tuple"),
    ],
)
def test_what_is_no_case_is_refused(model, inputs, message):
    with pytest.raises(UsageError, match=message):
        Case.of(model, inputs)


def test_a_users_model_has_no_source_to_write(tmp_path):
    with pytest.raises(UsageError, match="your own Linear"):
        Case.of(nn.Linear(1, 1), torch.ones(1, 1)).write(tmp_path / "case.py")
