"""What `prepare` promises, on generated models and on the zoo."""

import copy
import inspect
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from cgmq_fx.errors import BudgetError
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule
from graph_zoo import ZOO, ZooCase
from strategies import Drawn, convolutional_models, language_models, models

GRAPHS = pytest.mark.parametrize("zoo_case", ZOO, ids=lambda item: item.id)
# Layers whose products torch's counter does not see.
COUNTED_BY_HAND = {"recurrent": 5 * 2 * (16 * 7 + 16 * 12) + 16, "bilinear": 4 * (9 + 3)}


def prepared_of(drawn: Drawn | ZooCase, **options: Any) -> tuple[nn.Module, Any, PreparedModule]:
    model, inputs = drawn.build()
    options.setdefault("budget", "100%")
    options.setdefault("batch_axis", getattr(drawn, "batch_axis", 0))
    return model, inputs, prepare(model, example_inputs=inputs, **options)


def widen(prepared: PreparedModule) -> None:
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(FLOAT_WIDTH)


def run(module: nn.Module, inputs: tuple[Any, ...], *, training: bool) -> Any:
    """Outputs with fixed random numbers, and what became of the inputs."""
    own = copy.deepcopy(inputs)
    module.train(training)
    torch.manual_seed(3)
    return module(*own), own


def assert_same(left: Any, right: Any) -> None:
    assert pytree.tree_structure(left) == pytree.tree_structure(right)
    for a, b in zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


def snapshot(model: nn.Module) -> list[Any]:
    """All that a user could see change: layers, options, modes, hooks, tensors, identities."""
    return [
        (
            *(name, str(type(module)), module.extra_repr(), module.training, sorted(vars(module))),
            *(len(module._forward_hooks), len(module._forward_pre_hooks)),
            [(n, id(t), t._version, t.clone()) for n, t in module.named_parameters(recurse=False)],
            [(n, id(t), t._version, t.clone()) for n, t in module.named_buffers(recurse=False)],
        )
        for name, module in model.named_modules()
    ]


def check_untouched(drawn: Drawn | ZooCase) -> None:
    """Law 1."""
    model, inputs = drawn.build()
    before, kept = snapshot(model), copy.deepcopy(inputs)
    prepared = prepare(
        model, "100%", example_inputs=inputs, batch_axis=getattr(drawn, "batch_axis", 0)
    )
    assert_same(before, snapshot(model))
    assert_same(inputs, kept)
    names = [str(n.target) for n in prepared.graph.nodes if n.op == "placeholder"]
    assert names == list(inspect.signature(model.forward).parameters)
    for node in prepared.graph.nodes:
        if node.op == "call_module" and not str(node.target).startswith(("quantizers", "training")):
            mine, theirs = prepared.get_submodule(node.target), model.get_submodule(node.target)
            assert mine.extra_repr() == theirs.extra_repr()
            assert mine.training == theirs.training


def check_state(drawn: Drawn | ZooCase) -> None:
    """Law 2: same keys with the same tensors, and a float checkpoint loads."""
    model, inputs, prepared = prepared_of(drawn)
    state, own = model.state_dict(), prepared.state_dict()
    assert set(state) <= set(own)
    assert_same(dict(state), {key: own[key] for key in state})
    extra = {key.partition(".")[0] for key in set(own) - set(state)}
    assert extra <= {"quantizers", "plan"}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    prepared.load_state_dict(other.state_dict())
    widen(prepared)
    assert_same(run(prepared, inputs, training=False), run(other, inputs, training=False))


def check_exact(drawn: Drawn | ZooCase, **options: Any) -> None:
    """Law 3, with what it leaves in buffers and gradients; also for copies."""
    model, inputs, prepared = prepared_of(drawn, **options)
    widen(prepared)
    for training in (True, False):
        expected = run(model, inputs, training=training)
        assert_same(run(prepared, inputs, training=training), expected)
    assert_same(run(copy.deepcopy(prepared), inputs, training=False), expected)
    for name, buffer in model.named_buffers():
        assert_same(buffer, prepared.get_buffer(name))


def check_covered(drawn: Drawn | ZooCase) -> None:
    """Law 4: what computes has quantizers on its operands, or a reason in the ledger."""
    _, _, prepared = prepared_of(drawn, learn_input_bits=True)
    accounting = prepared.plan.accounting
    ledger = {entry.name: entry for entry in accounting.ledger}
    assert len(ledger) == len(accounting.operations)
    for bound in accounting.operations:
        entry = ledger[bound.operation.name]
        has_sites = [source.site is not None for source in bound.sources]
        if bound.operation.op == "embedding":
            has_sites = has_sites[:1]
        assert (entry.status == "quantized") == (bool(has_sites) and all(has_sites))
        assert entry.status == "quantized" or entry.reason
        assert bound.operation.macs == 0 or entry.prices, "silently free"
        assert bound.operation.macs == 0 or entry.status != "free"
    by_hand = COUNTED_BY_HAND.get(getattr(drawn, "id", ""))
    counted = sum(bound.operation.macs for bound in accounting.operations)
    assert counted == (by_hand if by_hand is not None else independent_macs(drawn))


def independent_macs(drawn: Drawn | ZooCase) -> int:
    """Half of what torch's counter says of the float model, for one of its two samples."""
    model, inputs = drawn.build()
    model.eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    flops = counter.get_total_flops()
    assert flops % 4 == 0
    return flops // 4


def check_totals(drawn: Drawn | ZooCase, choose: Any) -> None:
    """Law 5, with prices worked out here from MACs and bit-widths."""
    _, _, prepared = prepared_of(drawn, budget={"bops": "100%", "weight_memory": "100%"})
    accounting = prepared.plan.accounting
    low = [choose(site.allowed) for site in accounting.sites]
    high = [choose([w for w in site.allowed if w >= b]) for site, b in zip(accounting.sites, low)]  # noqa: B905
    index = accounting.index(low)
    for name, resource in accounting.resources.items():
        assert sum(resource.costs(index), Fraction(0)) == accounting.totals(low)[name]
        assert accounting.totals(low)[name] <= accounting.totals(high)[name]
    by_hand = 0
    for bound in accounting.operations:
        widths = [low[s.site] if s.site is not None else s.bits for s in bound.sources] or [32, 32]
        by_hand += bound.operation.macs * widths[0] * widths[1]
    assert accounting.totals(low)["bops"] == by_hand


def check_tied(drawn: Drawn | ZooCase) -> None:
    """Law 6: each tensor has one quantizer, is counted once as memory, and priced at each use."""
    model, _, prepared = prepared_of(drawn, budget={"bops": "100%", "weight_memory": "100%"})
    sites: dict[object, set[str]] = {}
    for node in prepared.graph.nodes:
        if str(node.target).startswith("quantizers.") and "_weights" not in str(node.target):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            stored = source.op == "get_attr"
            key = id(prepared.get_parameter(source.target)) if stored else source
            sites.setdefault(key, set()).add(str(node.target))
    assert all(len(names) == 1 for names in sites.values())
    memory = prepared.plan.accounting.resources["weight_memory"]
    assert memory.reference == 4 * stored_elements(model, prepared)


def stored_elements(model: nn.Module, prepared: PreparedModule) -> int:
    """Elements that inference reads: parameters, and buffers that a model reads by itself."""
    read = {str(n.target) for n in prepared.graph.nodes if n.op in ("get_attr", "call_module")}
    tensors = {id(p): p for p in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith("extra."):  # the classifier that only training computes
            tensors.pop(id(parameter))
    tensors |= {id(b): b for name, b in model.named_buffers() if name in read}
    folded = [  # what a batch norm without parameters becomes: a scale and a bias
        2 * module.num_features
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.affine
    ]
    return sum(tensor.numel() for tensor in tensors.values()) + sum(folded)


def check_feasibility(drawn: Drawn | ZooCase) -> None:
    """Law 8: at the floor a budget is accepted, a hair below it is refused with the figure."""
    model, inputs, prepared = prepared_of(drawn)
    accounting = prepared.plan.accounting
    floor = accounting.totals(accounting.lowest_bits())["bops"]
    if floor == 0:
        return
    options = {"example_inputs": inputs, "batch_axis": getattr(drawn, "batch_axis", 0)}
    prepare(model, f"{floor} BOP", **options)
    with pytest.raises(BudgetError, match=r"(?s)below the floor .*\nWays out") as caught:
        prepare(model, f"{float(floor) - 0.5} BOP", **options)
    dearest = max(accounting.operations, key=lambda bound: cost_at_floor(accounting, bound))
    assert dearest.operation.name in str(caught.value)


def cost_at_floor(accounting: Any, bound: Any) -> int:
    bits = accounting.lowest_bits()
    widths = [bits[s.site] if s.site is not None else s.bits for s in bound.sources] or [32, 32]
    return bound.operation.macs * widths[0] * widths[1]


@GRAPHS
def test_the_laws_hold_on_the_zoo(zoo_case):
    for check in (check_untouched, check_state, check_exact, check_covered, check_tied):
        check(zoo_case)
    check_totals(zoo_case, lambda widths: widths[len(widths) // 2])
    check_feasibility(zoo_case)


@given(models())
def test_law_1_the_model_is_left_untouched(drawn):
    check_untouched(drawn)


@given(models())
def test_law_2_checkpoints_load(drawn):
    check_state(drawn)


@given(models(), st.booleans())
def test_law_3_at_32_bits_nothing_changes(drawn, per_channel):
    check_exact(drawn, per_channel=per_channel)


@given(models())
def test_law_4_nothing_is_silently_free(drawn):
    check_covered(drawn)


@given(models(), st.data())
def test_law_5_the_total_is_the_sum_of_its_rows(drawn, data):
    check_totals(drawn, lambda widths: data.draw(st.sampled_from(widths)))


@given(language_models())
def test_law_6_tied_weights_are_one(drawn):
    check_tied(drawn)


@settings(max_examples=10)
@given(convolutional_models())
def test_law_8_infeasible_budgets_are_refused(drawn):
    check_feasibility(drawn)
