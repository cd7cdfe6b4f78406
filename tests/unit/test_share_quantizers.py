"""Operands that the hardware needs on one grid have one quantizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cgmq_fx.cost.load import load_table
from cgmq_fx.errors import CostTableError, UsageError
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from cgmq_fx.quantizer_spec import QuantizerSpec
from cgmq_fx.quantizers import Quantizer
from graph_zoo import Calls

FORMULA = {"formula": "weight_bits * activation_bits"}
X = torch.randn(2, 4)


def table(*, share=(), ops=("add", "sub", "cat")):
    rows = [
        {"op": "linear", "per": "mac", "cost": FORMULA},
        {"op": list(ops), "per": "output_element", "cost": {"formula": "lhs_bits + rhs_bits"}},
    ]
    extra = {"share": list(share)} if share else {}
    return {"name": "npu", "unit": "cycle", "row": rows, **extra}


def layers(*names):
    return {name: nn.Linear(4, 4) for name in names}


def chain(module, x):
    """Two additions that read one tensor: a + b, then that + c."""
    first = module.a(x) + module.b(x)
    return first + module.c(first)


def prepared(model, **options):
    options.setdefault("cost_table", table())
    return prepare(model, "100%", example_inputs=X, **options)


def sites_of(module, name):
    node = next(node for node in module.graph.nodes if node.name == name)
    return [str(arg.target).removeprefix("quantizers.") for arg in node.all_input_nodes]


def test_the_operands_of_an_addition_share():
    model = Calls(lambda m, x: m.a(x) + m.b(x), **layers("a", "b"))
    assert sites_of(prepared(model), "add") == ["linear", "linear_1"]
    assert sites_of(prepared(model, share=("add",)), "add") == ["linear", "linear"]


def test_sharing_runs_through_a_chain():
    model = Calls(chain, **layers("a", "b", "c"))
    module = prepared(model, share=("add",))
    assert sites_of(module, "add") == ["linear", "linear"]
    # The sum is another tensor than its operands; it shares with what it is added to.
    assert sites_of(module, "add_1") == ["add_", "add_"]
    reader = next(node for node in module.graph.nodes if node.name == "linear_2")
    assert str(reader.args[0].target) == "quantizers.add_"


def test_a_tensor_that_two_additions_read_joins_them():
    model = Calls(
        lambda m, x: (lambda a, b, c: (a + b) * (b + c))(m.a(x), m.b(x), m.c(x)),
        **layers("a", "b", "c"),
    )
    module = prepared(model, share=("add",))
    assert sites_of(module, "add") == sites_of(module, "add_1") == ["linear", "linear"]
    assert module.quantizers["linear"].spec.num_tensors == 3


def test_only_the_classes_that_are_named_share():
    model = Calls(lambda m, x: m.a(x) - m.b(x), **layers("a", "b"))
    assert sites_of(prepared(model, share=("add", "cat")), "sub") == ["linear", "linear_1"]
    assert sites_of(prepared(model, share=("sub",)), "sub") == ["linear", "linear"]


def test_a_rule_adds_no_quantizer():
    """What no table prices by its bits stays float, with the reason in the ledger."""
    model = Calls(lambda m, x: torch.cat((m.a(x), m.b(x)), 1), **layers("a", "b"))
    module = prepare(model, "100%", example_inputs=X, share=("add", "cat"))
    assert set(module.quantizers) == {"a_weight", "x", "b_weight"}
    stored = {"bops": "100%", "peak_activation_memory": "100%"}
    module = prepare(model, stored, example_inputs=X, share=("cat",))
    assert sites_of(module, "cat") == ["linear", "linear"]
    module = prepare(model, stored, example_inputs=X, share=())
    assert sites_of(module, "cat") == ["linear", "linear_1"]


def test_a_skipped_operation_joins_nothing():
    model = Calls(
        lambda m, x: (lambda a, b: (a + b) * m.c(a) * m.d(b))(m.a(x), m.b(x)),
        **layers("a", "b", "c", "d"),
    )
    assert sites_of(prepared(model, share=("add",)), "add") == ["linear", "linear"]
    module = prepared(model, share=("add",), skip="add")
    assert {"linear", "linear_1"} <= set(module.quantizers)


def test_a_weight_keeps_its_own_quantizer():
    model = Calls(lambda m, x: m.a(x) + m.shift, **layers("a"))
    model.shift = nn.Parameter(torch.randn(4))
    module = prepared(model, share=("add",))
    assert sites_of(module, "add") == ["linear", "shift"]
    assert module.quantizers["shift"].spec.role == "weight"


SIGNS = {
    "both": (lambda m, x: F.relu(m.a(x)) + F.relu(m.b(x)), "unsigned"),
    "one": (lambda m, x: F.relu(m.a(x)) + m.b(x), "affine"),
    "the other": (lambda m, x: m.a(x) + F.relu(m.b(x)), "affine"),
}


@pytest.mark.parametrize(("forward", "scheme"), SIGNS.values(), ids=SIGNS)
def test_the_scheme_holds_all_tensors(forward, scheme):
    module = prepared(Calls(forward, **layers("a", "b")), share=("add",))
    assert {module.quantizers[site].spec.scheme for site in sites_of(module, "add")} == {scheme}


def test_what_shares_with_an_input_has_its_bits():
    module = prepared(Calls(lambda m, x: x + m.a(x), **layers("a")), share=("add",))
    spec = module.quantizers["x"].spec
    assert (spec.role, spec.learned, spec.widths, spec.num_tensors) == ("input", False, (8, 32), 2)


def test_an_override_reaches_all_who_share():
    model = Calls(lambda m, x: m.a(x) + m.b(x), **layers("a", "b"))
    module = prepared(model, share=("add",), overrides={"linear_1": {"bit_width": 4}})
    assert module.bit_widths["linear"] == 4
    with pytest.raises(UsageError, match="quantizer 'linear', which serves linear, linear_1: "):
        prepared(
            model,
            share=("add",),
            overrides={"linear": {"bit_width": 8}, "linear_1": {"bit_width": 4}},
        )


# -- tables --------------------------------------------------------------------------------------


def test_the_table_asks_and_the_call_decides():
    model = Calls(lambda m, x: m.a(x) + m.b(x), **layers("a", "b"))
    asking = table(share=["add"])
    assert sites_of(prepared(model, cost_table=asking), "add") == ["linear", "linear"]
    assert sites_of(prepared(model, cost_table=asking, share=()), "add") == ["linear", "linear_1"]


def test_a_table_keeps_what_it_shares():
    asking = load_table(table(share=["cat", "add"]))
    assert asking.share == ("add", "cat")
    for again in (load_table(asking.to_json()), load_table(table(share=["add", "cat"]))):
        assert again.share == asking.share
        assert again.digest == asking.digest
    assert asking.digest != load_table(table()).digest
    assert "share" not in load_table(table()).to_json()


def test_a_table_file_keeps_what_it_shares(tmp_path):
    path = tmp_path / "npu.toml"
    path.write_text(load_table(table(share=["sub"])).to_toml(), encoding="utf-8")
    assert load_table(path).share == ("sub",)
    other = tmp_path / "board.toml"
    other.write_text('name = "board"\ninclude = "npu.toml"\n', encoding="utf-8")
    assert load_table(other).share == ("sub",)
    other.write_text('name = "board"\nshare = []\ninclude = "npu.toml"\n', encoding="utf-8")
    assert load_table(other).share == ()
    second = tmp_path / "second.toml"
    second.write_text(load_table({**table(), "name": "second"}).to_toml(), encoding="utf-8")
    other.write_text('name = "board"\ninclude = ["npu.toml", "second.toml"]\n', encoding="utf-8")
    with pytest.raises(CostTableError, match=r"differ in share.*say share here"):
        load_table(other)


BAD = {
    "unknown class": (["add", "mul"], r"share 2 = 'mul': must be one of add, sub, cat"),
    "near miss": (["cta"], r"share 1 = 'cta': must be one of add, sub, cat \(did you mean 'cat'"),
    "text": ("add", r"share = 'add': must be a list"),
    "number": ([3], r"share 1 = 3: must be one of"),
}


@pytest.mark.parametrize(("share", "message"), BAD.values(), ids=BAD)
def test_a_bad_rule_is_refused_with_its_place(share, message):
    with pytest.raises(CostTableError, match=message):
        load_table({**table(), "share": share})


# -- ranges --------------------------------------------------------------------------------------


def shared(num_tensors=2, scheme="affine", bits=8, **options):
    quantizer = Quantizer(QuantizerSpec("activation", scheme, num_tensors=num_tensors, **options))
    quantizer.set_bit_width(bits)
    return quantizer


SMALL, LARGE = torch.linspace(-1, 1, 101), torch.linspace(-3, 9, 101)


@pytest.mark.parametrize("order", [(SMALL, LARGE), (LARGE, SMALL)], ids=["rising", "falling"])
def test_a_range_is_found_from_all_tensors(order):
    quantizer = shared()
    first, second = order
    assert quantizer(first).equal(first)
    assert not quantizer.is_calibrated
    quantizer(second)
    together = shared(num_tensors=1)
    together.calibrate(torch.cat(order))
    for found, expected in zip(quantizer.qparams()[:2], together.qparams()[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=1.0)
    scale = float(quantizer.qparams().scale)
    for x in order:
        assert float((quantizer(x) - x).detach().abs().max()) <= scale


def test_extremes_count_however_many_values_there_are():
    quantizer = shared(bits=32)
    needle = torch.zeros(200_001)
    needle[77_777] = 50.0
    quantizer(needle)
    quantizer(SMALL)
    quantizer.set_bit_width(16)
    quantizer.eval()
    assert float(quantizer.base.max()) == 50.0


def test_a_new_width_is_fitted_to_all_tensors_between_two_steps():
    quantizer = shared(bits=32)
    for x in (SMALL, LARGE):
        quantizer(x)
    quantizer.set_bit_width(4)
    grown = [x.clone().mul_(4).requires_grad_() for x in (SMALL, LARGE)]
    before = quantizer.base.clone()
    sum(quantizer(x).square().sum() for x in grown).backward()
    assert quantizer.refit_pending
    assert quantizer.base.equal(before)
    sum(quantizer(x).square().sum() for x in grown).backward()
    assert not quantizer.refit_pending
    assert float(quantizer.qparams().scale) * 15 > 30


def test_in_evaluation_a_new_width_is_fitted_to_the_kept_sample():
    quantizer = shared(bits=32)
    for x in (SMALL, LARGE):
        quantizer(x)
    quantizer.set_bit_width(8)
    quantizer.eval()
    quantizer(SMALL)
    assert not quantizer.refit_pending
    assert 11 < float(quantizer.qparams().scale) * 255 < 13


def test_a_loaded_quantizer_sees_all_tensors_again():
    quantizer = shared(bits=32)
    for x in (SMALL, LARGE):
        quantizer(x)
    other = shared(bits=32)
    other.load_state_dict(quantizer.state_dict())
    other(SMALL)
    assert not other.has_sample
    other(LARGE)
    assert other.has_sample
    assert other.expected_noise(2) == pytest.approx(quantizer.expected_noise(2), rel=0.05)


def test_a_shared_quantizer_trains_and_lowers():
    torch.manual_seed(0)
    model = Calls(chain, **layers("a", "b", "c"))
    module = prepared(model, share=("add",), overrides={"*": {"bit_width": 4}})
    x = torch.randn(16, 4)
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    for _ in range(3):
        module(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    fixed = lower(module, allow_untrained=True)
    assert fixed(x).equal(copy.deepcopy(module).eval()(x))
    frozen = [name for name, _ in fixed.named_children() if name == "frozen"]
    assert frozen
    assert len({id(m) for n, m in fixed.named_modules() if n.endswith(".linear")}) == 1
