"""The laws of the kit: each sees its fault, names the place, and lets what is sound pass."""

import copy
import importlib
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from cgmq_fx.cost.load import get_table
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import BudgetError, UsageError
from cgmq_fx.passes.base import Numerics
from cgmq_fx.prepare import prepare
from cgmq_fx.testing import (
    Case,
    LawError,
    check_cost_table,
    check_lowering,
    check_pass,
    check_prepare,
)
from cgmq_fx.testing.compare import output_faults
from cgmq_fx.testing.counting import count_float
from cgmq_fx.testing.formula_evaluator import evaluate
from graph_zoo import Calls

X = (torch.linspace(-1, 2, 24).reshape(4, 6),)
IMAGE = (torch.linspace(-1, 1, 2 * 4 * 25).reshape(2, 4, 5, 5),)


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Linear(6, 4), nn.BatchNorm1d(4, 1e-2), nn.ReLU(), nn.Dropout(0.3), nn.Linear(4, 4)),
        nn.Flatten(1, -1),
    )


def traced(model=None):
    return fx.symbolic_trace(network() if model is None else model)


def nothing(gm):
    return gm


def law_of(pass_, case=None, **options):
    with pytest.raises(LawError) as caught:
        check_pass(pass_, (traced(), X) if case is None else case, **options)
    return caught.value


class TestForms:
    """All that a pass may return."""

    @pytest.mark.parametrize(
        "pass_",
        [
            nothing,
            lambda gm: None,
            lambda gm: False,
            lambda gm: (gm, False),
            lambda gm: PassResult(gm, False),
            copy.deepcopy,
            lambda gm: fx.Transformer(gm).transform(),
            lambda gm: fx.symbolic_trace(gm),
        ],
    )
    @pytest.mark.parametrize("numerics", [None, Numerics.EXACT, Numerics.CHANGES])
    def test_what_changes_nothing_is_sound(self, pass_, numerics):
        check_pass(pass_, (traced(), X), numerics=numerics)

    def test_a_graph_module_with_inputs_apart(self):
        check_pass(nothing, traced(), inputs=X)
        check_pass(nothing, Case.of(network(), X), inputs=X[0])

    def test_other_results_and_cases_are_refused(self):
        with pytest.raises(UsageError, match=r"<lambda> returned int; a pass returns a GraphMod"):
            check_pass(lambda gm: 1, (traced(), X))
        with pytest.raises(UsageError, match=r"case is Linear; give a Case, \(graph_module"):
            check_pass(nothing, nn.Linear(2, 2))

    def test_the_users_module_is_left_alone(self):
        gm = traced()
        before = gm.code, {name: value.clone() for name, value in gm.state_dict().items()}
        law_of(lambda given: given.get_submodule("0").weight.data.mul_(2) is None, (gm, X))
        assert gm.code == before[0]
        assert all(torch.equal(value, before[1][name]) for name, value in gm.state_dict().items())


def without_recompile(gm):
    relu = gm.graph.find_nodes(op="call_module", target="2")[0]
    with gm.graph.inserting_after(relu):
        new = gm.graph.call_function(F.relu, relu.args)
    relu.replace_all_uses_with(new)
    gm.graph.erase_node(relu)


def unlinted(gm):
    gm.graph.find_nodes(op="call_module", target="0")[0].target = "missing"


def rescaled(gm):
    with torch.no_grad():
        gm.get_submodule("0").weight.mul_(1.01)


def negated_output(gm):
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(torch.neg, output.args),)
    gm.recompile()


def literal_changed(gm):
    node = gm.graph.find_nodes(op="call_function", target=torch.flatten)[0]
    node.args = (node.args[0], 0)
    gm.recompile()


def flatten_call():
    return traced(Calls(lambda self, x: torch.flatten(self.layer(x), 1), layer=nn.Linear(6, 4)))


def momentum_changed(gm):
    gm.get_submodule("1").momentum = 0.9


def statistics_dropped(gm):
    norm = gm.get_submodule("1")
    norm.register_buffer("running_mean", None)


def broken(gm):
    layer = gm.get_submodule("0")
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous())
    gm.get_submodule("4").bias = None


def reshaped(gm):
    node = gm.graph.find_nodes(op="call_module", target="4")[0]
    with gm.graph.inserting_before(node):
        node.args = (gm.graph.call_method("reshape", (*node.args, 2, 8)),)
    gm.recompile()


def stored_twice(gm):
    gm.register_parameter("copy", nn.Parameter(gm.get_submodule("0").weight.detach().clone()))


def frozen_weight(gm):
    layer = gm.get_submodule("0")
    weight = layer.weight
    del layer.weight
    layer.register_buffer("weight", weight.detach())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def untied(gm):
    gm.get_submodule("two").weight = nn.Parameter(gm.get_submodule("one").weight.detach().clone())


def lying(gm):
    gm.get_submodule("3").p = 0.5
    return False


def restless(gm):
    negated_output(gm)
    negated_output(gm)


class TestFaultsOfPasses:
    @pytest.mark.parametrize(
        ("pass_", "law", "text"),
        [
            (without_recompile, "well-formed", "call recompile"),
            (unlinted, "well-formed", "missing"),
            (lambda gm: True, "truthful flag", "nothing is different"),
            (lying, "truthful flag", r"module '3': p was 0.3, is 0.5"),
            (momentum_changed, "settings", r"module '1' \(BatchNorm1d\): momentum was 0.1"),
            (statistics_dropped, "state", "the buffer '1.running_mean' is gone, and '1' is still"),
            (broken, "state", r"'0.weight' was .*\(4, 6\)\) and is .*\(6, 4\)\)"),
            (reshaped, "runs", "the result fails: RuntimeError: mat1 and mat2 shapes"),
            (stored_twice, "stored once", r"stored 2 times, as \['copy', '0.weight'\]"),
            (frozen_weight, "state", "'0.weight' was a parameter and is a buffer"),
            (rescaled, "numerics", r"in evaluation: output 0 differs by up to 0\.\d+; .* allowed"),
            (negated_output, "numerics", "in evaluation: output 0 differs"),
            (restless, "idempotent", "run again right away"),
        ],
    )
    def test_it_is_seen(self, pass_, law, text):
        error = law_of(pass_)
        assert error.law == law
        assert error.args[0].startswith(f"{pass_.__qualname__} breaks the law '{law}':\n  - ")
        with pytest.raises(AssertionError, match=text):
            raise error

    def test_a_literal_argument(self):
        error = law_of(literal_changed, (flatten_call(), X), numerics=Numerics.CHANGES)
        assert error.law in ("literals", "signature")
        assert "argument 1 was 1 and is 0" in str(error)

    def test_a_tied_weight_that_became_two(self):
        error = law_of(untied, (traced(Tied()), X))
        assert error.faults == ("'two.weight' and 'one.weight' were one tensor and are two",)

    def test_exact_means_bit_for_bit_and_in_training_too(self):
        def reordered(gm: fx.GraphModule) -> None:
            with torch.no_grad():
                gm.get_submodule("0").weight.mul_(1 + 1e-6)

        check_pass_ = law_of(reordered, numerics=Numerics.EXACT)
        assert check_pass_.law == "state"

        def dropping(gm: fx.GraphModule) -> None:
            for node in gm.graph.find_nodes(op="call_module", target="3"):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
            gm.delete_all_unused_submodules()
            gm.recompile()

        check_pass(dropping, (traced(), X))
        error = law_of(dropping, numerics=Numerics.EXACT)
        assert error.law == "numerics"
        assert all(fault.startswith("in training: ") for fault in error.faults)

    def test_meta_that_copies_share(self):
        def counting(gm: fx.GraphModule) -> None:
            for node in gm.graph.nodes:
                node.meta.setdefault("seen", []).append(1)

        error = law_of(counting)
        assert error.law == "deep copies"
        assert "node 'input_1': meta['seen'] was" in str(error)

    def test_the_source_of_a_case_is_in_the_message(self):
        source = (
            "import torch\nfrom torch import nn\n"
            "def make_model():\n    return nn.BatchNorm1d(3, 0.1)\n"
            "def make_inputs():\n    return (torch.eye(3),)\n"
        )

        def default_eps(gm: fx.GraphModule) -> None:
            for module in gm.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.eps = 1e-5

        wrapped = source.replace("nn.BatchNorm1d(3, 0.1)", "nn.Sequential(nn.BatchNorm1d(3, 0.1))")
        error = law_of(default_eps, Case(wrapped))
        assert error.law == "settings"
        assert str(error).endswith(f"The case:\n{wrapped}")

    def test_at_most_ten_faults_are_listed(self):
        model = nn.Sequential(*(nn.Dropout(0.2) for _ in range(15)))

        def overwritten(gm: fx.GraphModule) -> None:
            for module in gm.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.5

        assert len(law_of(overwritten, (traced(model), X)).faults) == 10


class Pair(NamedTuple):
    left: Tensor
    right: Any


class TestOutputs:
    @pytest.mark.parametrize(
        ("wanted", "found", "text"),
        [
            (torch.ones(2), torch.ones(2, dtype=torch.float64), "is torch.float64 of shape"),
            (torch.ones(2), torch.tensor([1.0, 1.5]), "differs by up to 0.5; they must be equal"),
            (torch.tensor([1, 2]), torch.tensor([1, 3]), "differs in 1 of 2 elements"),
            ([torch.ones(1)], (torch.ones(1),), "the output is tuple, not list"),
            ({"a": 1}, {"a": 2}, "output 0 is 2, not 1"),
            (Pair(torch.ones(1), 1), Pair(torch.zeros(1), 1), "output 0 differs"),
        ],
    )
    def test_differences(self, wanted, found, text):
        assert list(output_faults(wanted, wanted)) == []
        (fault,) = output_faults(wanted, found)
        assert text in fault

    def test_tolerance_is_relative_to_the_largest_element(self):
        wanted, found = torch.tensor([100.0, 0.0]), torch.tensor([100.0, 0.005])
        assert list(output_faults(wanted, found, 1e-4)) == []
        assert len(list(output_faults(wanted, found, 1e-5))) == 1


class TestCounting:
    def test_what_is_computed_and_not_returned_does_not_count(self):
        model = Calls(
            lambda self, x: (self.used(x), self.idle(x))[0],
            used=nn.Linear(6, 2),
            idle=nn.Linear(6, 9),
        )
        counted = count_float(model, X)
        assert counted.macs == 4 * 6 * 2
        assert set(counted.parameters) == {"used.weight", "used.bias"}

    def test_a_tensor_changed_in_place_is_needed(self):
        def forward(self: Any, x: Tensor) -> Tensor:
            y = torch.zeros(4, 2)
            y.view(-1).add_(self.layer(x).view(-1))
            return y

        assert count_float(Calls(forward, layer=nn.Linear(6, 2)), X).macs == 4 * 6 * 2

    def test_grouped_and_transposed_convolutions(self):
        model = nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.Conv2d(6, 9, 2, groups=3)
        )
        # Each of 2 * 4 * 25 inputs meets 3 * 9 weights; each of 2 * 9 * 100 outputs 2 * 4.
        assert count_float(model, IMAGE).macs == 2 * 4 * 25 * 3 * 9 + 2 * 9 * 100 * 2 * 4


class TestPrepare:
    def test_it_returns_what_prepare_does(self):
        model = network()
        prepared = check_prepare(model, X, "10%", widths=(4, 8), seed=3)
        assert prepared.plan.accounting.limits["bops"] > 0
        assert model.training

    def test_a_refused_budget_is_raised_as_suggested(self):
        prepared = check_prepare(network(), X, {"bops": "0.001%", "weight_memory": "100%"})
        accounting = prepared.plan.accounting
        assert accounting.is_satisfied(accounting.lowest_bits())

    def test_a_malformed_budget_is_the_callers_matter(self):
        with pytest.raises(BudgetError, match="5 horses"):
            check_prepare(network(), X, "5 horses")

    def test_inputs_that_only_keywords_give_are_refused(self):
        class Keyed(nn.Module):
            def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
                return x + y

        with pytest.raises(UsageError, match=r"inputs that only keywords can give, \['y'\]"):
            check_prepare(Case.of(Keyed(), X, {"y": X[0]}))

    def test_a_wrong_floor_is_seen(self, monkeypatch):
        monkeypatch.setattr("cgmq_fx.prepared.check_feasible", lambda *args: None)
        with pytest.raises(LawError, match=r"'floor':\n  - bops a hair below its floor \d+ is acc"):
            check_prepare(network(), X, "100%")


def lowered_case():
    model = nn.Sequential(
        *(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(
            nn.ConvTranspose2d(6, 4, 3, groups=2),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(100, 3),
        ),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return prepare(model, {"bops": "100%", "weight_memory": "100%"}, example_inputs=IMAGE)


class TestLowering:
    @pytest.mark.parametrize("bits", [2, 4, 8, 16])
    def test_a_sound_module(self, bits):
        prepared = lowered_case()
        sites = prepared.plan.accounting.sites
        fixed = check_lowering(
            prepared, IMAGE, bits={site.name: bits for site in sites if site.learned}
        )
        assert {fixed.bit_widths[site.name] for site in sites if site.learned} == {bits}
        assert set(prepared.bit_widths.values()) == {8, 32}

    def test_bits_by_position(self):
        prepared = lowered_case()
        bits = [site.allowed[0] for site in prepared.plan.accounting.sites]
        assert list(check_lowering(prepared, IMAGE[0], bits=bits).bit_widths.values()) == bits

    @pytest.mark.parametrize(
        ("target", "wrong", "law"),
        [
            (
                "cgmq_fx.frozen.FrozenWeight.forward",
                lambda self: self.codes * self.broadcast_scale() * 1.001,
                "freezing is exact",
            ),
            (
                "cgmq_fx.passes.fold_batch_norm._Layer.along_weight",
                lambda self, factor: factor.mean().reshape([1] * len(self.shape)),
                "folding is rounding",
            ),
        ],
    )
    def test_planted_faults(self, target, wrong, law, monkeypatch):
        prepared = lowered_case()
        bits = {site.name: 8 for site in prepared.plan.accounting.sites if site.learned}
        monkeypatch.setattr(target, wrong)
        with pytest.raises(LawError, match=f"breaks the law '{law}'"):
            check_lowering(prepared, IMAGE, bits=bits)

    @pytest.mark.parametrize(
        ("target", "wrong", "message"),
        [
            (
                "integer_products.kernel_type",
                lambda _, device, kernels: (
                    torch.int64 if kernels == "int64" else torch.float32, device
                ),
                r"\d+ sums of '.*' in torch.float32 are not the integers",
            ),
            ("integer_products._bound", lambda *_: 1, r"a sum of '.*' is \d+, above its bound 1"),
            (
                "integer_products.Product.added",
                lambda self, like: None,
                r"'.*' in float is off by .* times what roundings allow",
            ),
            (
                "integer_reference.operation_names",
                lambda _: {},
                r"'.*' has codes on both sides and no sum of integers",
            ),
        ],
    )  # fmt: skip
    def test_planted_faults_of_integers(self, target, wrong, message, monkeypatch):
        prepared = lowered_case()
        bits = {site.name: 16 for site in prepared.plan.accounting.sites if site.learned}
        monkeypatch.setattr(f"cgmq_fx.{target}", wrong)
        with pytest.raises(LawError, match=f"(?s)breaks the law 'integers'.*{message}"):
            check_lowering(prepared, IMAGE, bits=bits)

    def test_a_total_that_a_run_does_not_have_is_seen(self, monkeypatch):
        prepared = lowered_case()
        bits = {site.name: 8 for site in prepared.plan.accounting.sites if site.learned}
        honest = check_lowering(prepared, IMAGE, bits=bits)
        module = importlib.import_module("cgmq_fx.testing.check_lowering")  # also a function's name
        monkeypatch.setattr(module, "products_of", lambda *args: [])
        with pytest.raises(LawError, match=r"'budget':\n  - bops is \d+, a run of .* has 0"):
            check_lowering(prepared, IMAGE, bits=honest.bit_widths)


class TestCostTable:
    @pytest.mark.parametrize("name", ["bops", "mpic", "energy_45nm", "vnni"])
    def test_built_in_tables(self, name):
        assert check_cost_table(name) is get_table(name)

    def test_a_wrong_evaluation_is_seen(self, monkeypatch):
        honest = Row.unit_cost
        monkeypatch.setattr(Row, "unit_cost", lambda *args: honest(*args) * 2)
        with pytest.raises(LawError, match=r"'prices':\n.* at 2 and 2 bits costs 9216, .* 4608"):
            check_cost_table("bops")

    def test_a_price_that_is_missing_is_seen(self, monkeypatch):
        grid = [{"weight": bits, "activation": 8, "cost": 1} for bits in (4, 8)]
        table = CostTable("t", "cycle", (Row(op="linear", per="mac", grid=grid),))
        monkeypatch.setattr(Row, "unit_cost", lambda *args: None)
        with pytest.raises(LawError, match=r"linear .* at 4 and 8 bits has no price: cost table"):
            check_cost_table(table)

    def test_a_falling_cost_that_nobody_warned_of_is_seen(self, monkeypatch):
        monkeypatch.setattr("cgmq_fx.testing.accounting_laws.row_falls", lambda row: None)
        falling = {
            "name": "t",
            "unit": "cycle",
            "row": [{"op": "linear", "per": "mac", "cost": {"formula": "64 / weight_bits"}}],
        }
        with pytest.raises(LawError, match=r"'rising':\n.*\(2, 2\) bits cost 36864, \(3, 2\) bits"):
            check_cost_table(falling)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("ceil(w / 3) * max(a, 4) - 0.1", 2 * 8 - 0.1),
            ("w ** 2 // 3 + -a % 3", 8 + 1),
            ("groups == 1 and not (w in (2, 4)) or true", 1),
            ("1 < w <= 4", 0),
        ],
    )
    def test_the_evaluator(self, text, value):
        assert float(evaluate(text, {"w": 5, "a": 8, "groups": 1})) == pytest.approx(value)
