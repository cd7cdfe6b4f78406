"""Every bad argument of `prepare` is refused with place, value, rule and way out."""

import inspect
import math
import re

import pytest
import torch
from torch import nn

from cgmq_fx.errors import BudgetError, CgmqError, CostTableError, UnsupportedModelError, UsageError
from cgmq_fx.prepare import prepare
from graph_zoo import Calls, TwoInputs

X = torch.zeros(2, 4)
ROW = '[[row]]\nop = "linear"\nper = "mac"\ncost = 1\n'
HEAD = """schema = 1
name = "board"
unit = "cycle"
source = "measured"
reference = { weight = 32, activation = 32 }
unpriced = "error"
"""


def model():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


@pytest.fixture
def write(tmp_path):
    def write(text, name="board.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# -- budgets -------------------------------------------------------------------------------------

BUDGETS = {
    "percent as a number": (40, "'40%' for a share", "'40 MBOP'"),
    "a number above one": (1.5, "1.5 is a bare number above 1", "'1.5%'"),
    "unknown unit": ("12 MFOO", "'12 MFOO'", "MFOO"),
    "negative": (-0.5, "-0.5 must be above zero", "'0.5%'"),
    "zero": ("0%", "'0%' must be above zero", "'0.5%'"),
    "above all": ("120%", "'120%' is above 100%", "'100%'"),
    "nan": (math.nan, "nan is not a finite number", "'0.5%'"),
    "infinite": (math.inf, "inf is not a finite number", "'0.5%'"),
    "a list": ([0.5], "[0.5] is of type list", "'0.5%'"),
    "true": (True, "True is of type bool", "'0.5%'"),
    "empty": ({}, "the budget is empty", "'0.5%'"),
    "words": ("half", "'half' cannot be read", "'0.5%'"),
    "unknown resource": (
        {"bobs": "1%"},
        "unknown resource 'bobs' (did you mean 'bops'?)",
        "'bops'",
    ),
    "twice": ({"bops": "1%", "bit operations": "1%"}, "'bit operations'", "known"),
    "wrong unit": ("3 ms", "'3 ms'", "'BOP'"),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_malformed_budget_is_refused(name):
    budget, *parts = BUDGETS[name]
    with pytest.raises(BudgetError) as caught:
        prepare(model(), budget, example_inputs=X)
    for part in parts:
        assert part in str(caught.value)


def test_all_faults_of_a_budget_are_listed():
    with pytest.raises(BudgetError, match=r"'bops'.*'x%'.*'weight_memory'.*-1"):
        prepare(model(), {"bops": "x%", "weight_memory": -1})


@pytest.mark.parametrize("inputs", [{"example_inputs": X}, {}], ids=["example", "first batch"])
def test_a_budget_below_the_floor_names_floor_operations_and_ways_out(inputs):
    with pytest.raises(BudgetError) as caught:
        prepare(model(), "50 BOP", **inputs)(X)
    # Image at 8 bits: 12 MACs x 2 x 8; then 6 MACs x 2 x 2.
    message = str(caught.value)
    assert "budget bops = 50 BOP is below the floor 216 BOP (1.1719 % of the reference)" in message
    assert "0 (88.9 % of the floor, 0_weight_ at 2 bits" in message
    assert "at least 1.1719 %" in message
    assert "prepare(learn_input_bits=True)" in message


def test_several_budgets_below_their_floors_are_all_named():
    budget = {"bops": "50 BOP", "weight_memory": "2 byte"}
    with pytest.raises(BudgetError, match=r"(?s)budget bops = .*budget weight_memory = "):
        prepare(model(), budget, example_inputs=X)


def test_narrower_widths_unlock_a_budget_and_are_named():
    with pytest.raises(BudgetError, match="narrower bit-widths than 8"):
        prepare(model(), "2%", widths=(8, 16), example_inputs=X)
    prepare(model(), "2%", widths=(2, 8), example_inputs=X)


# -- cost tables ---------------------------------------------------------------------------------

TABLES = {
    "bad toml": (HEAD + "[[row]\n", ["board.toml", "TOML", "line 7"]),
    "duplicate row": (HEAD + ROW + ROW, ["board.toml", "row 2", "row 1"]),
    "unknown operation": (HEAD + ROW.replace("linear", "linaer"), ["'linaer'", "'linear'", ":8"]),
    "unknown unit": (HEAD.replace("cycle", "parsnip") + ROW, ["parsnip", "board.toml:3"]),
    "no rows": (HEAD, ["row", "add at least one"]),
    "bad formula": (
        HEAD + ROW.replace("cost = 1", 'cost = { formula = "weight_bits *" }'),
        ["board.toml:10", "weight_bits *"],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_malformed_table_is_refused_with_its_line(name, write):
    text, parts = TABLES[name]
    with pytest.raises(CostTableError) as caught:
        prepare(model(), "50%", cost_table=write(text))
    for part in parts:
        assert part in str(caught.value)


def test_a_table_without_a_row_for_an_operation_names_it(write):
    table = write(HEAD + ROW.replace("linear", "conv2d"))
    with pytest.raises(CostTableError) as caught:
        prepare(model(), "50%", cost_table=table, example_inputs=X)
    message = str(caught.value)
    assert "'board'" in message
    assert "'0'" in message
    assert "'2'" in message
    assert "linear" in message
    assert "unpriced" in message


def test_a_tie_between_rows_names_both(write):
    rows = ROW.replace("cost", 'where = "macs > 1"\ncost')
    rows += ROW.replace("cost", 'where = "macs > 2"\ncost')
    with pytest.raises(CostTableError, match=r"board\.toml:7.*board\.toml:12"):
        prepare(model(), "50%", cost_table=write(HEAD + rows), example_inputs=X)


def test_a_table_that_does_not_exist_names_those_that_do():
    with pytest.raises(CostTableError, match=r"'bobs' \(did you mean 'bops'\?\)"):
        prepare(model(), "50%", cost_table="bobs")


@pytest.mark.parametrize("tables", [[], ["bops", "bops"]])
def test_tables_have_names_of_their_own(tables):
    with pytest.raises(UsageError, match=re.escape(f"{tables}")):
        prepare(model(), "50%", cost_table=tables)


def test_widths_that_no_table_has_are_refused(write):
    row = ROW.replace("cost = 1\n", "grid = [{ weight = 8, activation = 8, cost = 1 }]\n")
    table = write(HEAD.replace("32, activation = 32", "8, activation = 8") + row)
    prepared = prepare(model(), "100%", cost_table=table, example_inputs=X, learn_input_bits=True)
    assert set(prepared.bit_widths.values()) == {8}
    with pytest.raises(CostTableError, match=r"\[8\]"):
        prepare(
            model(), "100%", cost_table=table, example_inputs=X, widths=(4,), learn_input_bits=True
        )


# -- models --------------------------------------------------------------------------------------


def branch(self, x):
    if x.sum() > 0:
        return self.layer(x)
    return x


def test_an_untraceable_model_is_refused_at_the_users_line():
    with pytest.raises(UnsupportedModelError) as caught:
        prepare(Calls(branch, layer=nn.Linear(4, 4)), "50%", example_inputs=X)
    line = inspect.getsourcelines(branch)[1] + 1
    message = str(caught.value)
    assert f"{__file__}:{line}" in message
    assert "if x.sum() > 0:" in message
    for way in ("leaf_modules=", "concrete_args=", "torch.fx.wrap", "front_end="):
        assert way in message


@pytest.mark.parametrize("thing", [len, "resnet18", {"weight": X}, nn.Linear], ids=repr)
def test_what_is_no_module_is_refused(thing):
    with pytest.raises(UsageError, match=rf"model is {type(thing).__name__}, not an nn\.Module"):
        prepare(thing, "50%")


def test_a_prepared_model_is_refused():
    prepared = prepare(model(), "50%", example_inputs=X)
    with pytest.raises(UsageError, match=r"prepared already.*cgmq_fx\.attach"):
        prepare(prepared, "50%")


def test_lazy_parameters_are_refused_by_name():
    lazy = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with pytest.raises(UnsupportedModelError, match=r"lazy parameters \['0.weight', '0.bias'\]"):
        prepare(lazy, "50%")


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("a socket is no tensor")


def test_a_model_that_cannot_be_copied_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"a socket is no tensor.*copy\.deepcopy"):
        prepare(Uncopyable(2, 2), "50%")


# -- inputs --------------------------------------------------------------------------------------


def test_an_example_of_the_wrong_shape_names_operation_and_shapes():
    with pytest.raises(UnsupportedModelError) as caught:
        prepare(model(), "50%", example_inputs=torch.zeros(2, 5))
    message = str(caught.value)
    assert "'linear'" in message
    assert "(1, 5)" in message or "(2, 5)" in message
    assert "Give inputs that the float model accepts" in message


def test_a_first_batch_of_the_wrong_shape_is_refused_alike():
    with pytest.raises(UnsupportedModelError, match=r"'linear'"):
        prepare(model(), "50%")(torch.zeros(2, 5))


@pytest.mark.parametrize("inputs", [(), 3, "x", {}], ids=repr)
def test_an_example_that_is_none_is_refused(inputs):
    with pytest.raises(UsageError, match=rf"example_inputs is {type(inputs).__name__}; give"):
        prepare(model(), "50%", example_inputs=inputs)


@pytest.mark.parametrize("inputs", [(X, X), {"y": X}], ids=["too many", "unknown name"])
def test_an_example_that_does_not_fit_the_signature_is_refused(inputs):
    with pytest.raises(UnsupportedModelError, match=r"Sequential\.forward\(input\)"):
        prepare(model(), "50%", example_inputs=inputs)


def test_a_missing_input_is_named():
    with pytest.raises(UnsupportedModelError, match=r"TwoInputs\.forward.*'b'"):
        prepare(TwoInputs(), "50%", example_inputs=(torch.zeros(2, 6),))
    with pytest.raises(UnsupportedModelError, match=r"missing a required argument: 'b'"):
        prepare(TwoInputs(), "50%")(torch.zeros(2, 6))


@pytest.mark.parametrize("widths", [(), (2, 3.5), (-1, 8), (17,)], ids=repr)
def test_impossible_widths_are_refused(widths):
    with pytest.raises(UsageError, match=re.escape(f"widths={widths!r}")):
        prepare(model(), "50%", widths=widths)


def test_a_refused_model_is_left_as_it_was():
    mine = Calls(branch, layer=nn.Linear(4, 4)).train()
    before = {name: id(value) for name, value in mine.named_modules()}
    for budget, options in (("50%", {}), ("1 BOP", {"example_inputs": X}), ("x", {})):
        with pytest.raises(CgmqError):
            prepare(mine, budget, **options)
    assert {name: id(value) for name, value in mine.named_modules()} == before
    assert mine.training
    assert mine.layer.training
