"""What holds whatever is skipped, overridden or shared, on generated models."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from cgmq_fx.errors import UsageError
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.lower import lower
from cgmq_fx.passes.meta import IS_NONNEGATIVE, MODULE_PATH, OP_INFO
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule, one_sample
from cgmq_fx.testing import Case, models
from cgmq_fx.testing.compare import output_faults, persistent, positional_inputs, run
from cgmq_fx.testing.recompute import products_of
from graph_zoo import Calls

# Everything that this table prices is quantized, additions and concatenations too.
PRICED = {
    "name": "npu",
    "unit": "cycle",
    "unpriced": "zero",
    "row": [
        {
            "op": [
                *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"),
                *("conv_transpose3d", "linear", "embedding"),
            ],
            "per": "mac",
            "cost": {"formula": "weight_bits * activation_bits"},
        },
        {"op": ["matmul", "attention"], "per": "mac", "cost": {"formula": "lhs_bits * rhs_bits"}},
        {
            "op": ["add", "sub", "mul"],
            "per": "output_element",
            "cost": {"formula": "lhs_bits + rhs_bits"},
        },
    ],
}


def inputs_of(drawn: Case) -> tuple[Any, ...]:
    return positional_inputs(drawn.model(), *drawn.inputs(), **drawn.kwargs())


def prepared_of(drawn: Case, **options: Any) -> PreparedModule:
    options = {"budget": "100%", "example_inputs": inputs_of(drawn), **options}
    return prepare(drawn.model(), learn_input_bits=True, **options)


def is_quantized(module: PreparedModule, node: object) -> bool:
    return isinstance(node, fx.Node) and str(node.target).startswith("quantizers.")


def names_of(operation: str) -> set[str]:
    """Names of an operation; the two products of attention are one."""
    stem, _, part = operation.rpartition(".")
    return {operation, stem} if part in ("qk", "pv") else {operation}


def is_below(operation: str, layer: str) -> bool:
    """Tell whether an operation is of a layer; a layer's product has the layer's name."""
    return operation.partition(":")[0] == layer or operation.startswith(f"{layer}.")


def path_of(prepared: PreparedModule, operation: str) -> str:
    """The layer of an operation that is called after its node, as a product inside attention is."""
    nodes = [node for node in prepared.graph.nodes if node.name == operation]
    return (MODULE_PATH.find(nodes[0]) or "") if nodes else ""


def skip_some(drawn: Case, data: st.DataObject) -> tuple[list[str], PreparedModule] | None:
    """A prepared model with some operations skipped; None where a shared weight forbids that."""
    ledger = prepared_of(drawn).plan.accounting.ledger
    names = [entry.name for entry in ledger if entry.status == "quantized"]
    skip = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    try:
        return skip, prepared_of(drawn, skip=skip)
    except UsageError as error:
        if "a shared weight is stored once" not in str(error):
            raise
        return None


@given(models(), st.data())
def test_what_is_skipped_is_float_and_the_rest_is_not(drawn, data):
    """Laws 3 and 4: also where a skipped operation reads what another one quantizes."""
    found = skip_some(drawn, data)
    if found is None:
        return
    skip, prepared = found
    before = {e.name: e for e in prepared_of(drawn).plan.accounting.ledger}
    after = prepared.plan.accounting
    for entry, bound in zip(after.ledger, after.operations, strict=True):
        names = names_of(entry.name)
        paths = (entry.name, path_of(prepared, entry.name))
        chosen = [
            name
            for name in skip
            if names & names_of(name) or any(is_below(path, name) for path in paths)
        ]
        if chosen:
            assert entry.status == ("float" if entry.macs else "free")
            assert all(source.site is None for source in bound.sources)
            assert not entry.macs or any(f"skip={name!r}" in entry.reason for name in chosen)
            assert not entry.macs or entry.reason.endswith("; priced at 32 bits")
        elif entry.op != "embedding":  # a look-up follows what reads its weight
            assert entry.status == before[entry.name].status
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(FLOAT_WIDTH)
    assert not list(persistent(lambda: changes(drawn, prepared)))


def changes(drawn: Case, prepared: PreparedModule) -> Iterator[str]:
    """Yield where a prepared model computes something else than the float model."""
    wanted, found = (
        run(module, inputs_of(drawn), training=False)[0] for module in (drawn.model(), prepared)
    )
    yield from output_faults(wanted, found)


@settings(max_examples=15)
@given(models(require={"conv"}), st.data())
def test_the_total_with_skips_is_that_of_the_lowered_module(drawn, data):
    """Law 5, by code that shares nothing with the accounting."""
    found = skip_some(drawn, data)
    if found is None:
        return
    _, prepared = found
    accounting = prepared.plan.accounting
    rng = random.Random(len(accounting.sites))
    bits = [rng.choice(site.allowed) for site in accounting.sites]
    inputs = inputs_of(drawn)
    with torch.no_grad():
        prepared(*inputs)
        prepared.set_bit_widths(bits)
        prepared(*inputs)
        prepared(*inputs)
    fixed = lower(prepared, allow_untrained=True)
    run = products_of(fixed, one_sample(inputs, 0))
    assert sum(product.bops for product in run) == accounting.totals(bits)["bops"]


@settings(max_examples=15)
@given(models(), st.lists(st.sampled_from(("add", "sub")), unique=True))
def test_operands_that_must_share_have_one_quantizer(drawn, share):
    check_shared(drawn, share)


def check_shared(drawn: Case, share: list[str]) -> None:
    """Each rule holds, adds no quantizer, and every shared one sees all its tensors."""
    prepared = prepared_of(drawn, cost_table=PRICED, share=share)
    apart = prepared_of(drawn, cost_table=PRICED, share=())
    for node in prepared.graph.nodes:
        if OP_INFO.has(node) and OP_INFO.get(node).op in share:
            sites = {
                str(arg.target)
                for arg in node.all_input_nodes
                if is_quantized(prepared, arg)
                and prepared.get_submodule(str(arg.target)).spec.role != "weight"
            }
            assert len(sites) <= 1, f"{node.format_node()} reads {sites}"
    calls = Counter(str(n.target) for n in prepared.graph.nodes if is_quantized(prepared, n))
    for site, quantizer in prepared.quantizers.items():
        assert quantizer.spec.num_tensors == calls[f"quantizers.{site}"]
    # The same tensors are quantized, by no more quantizers.
    assert sum(calls.values()) == sum(is_quantized(apart, n) for n in apart.graph.nodes)
    assert len(prepared.quantizers) <= len(apart.quantizers)
    if not share:
        assert list(prepared.quantizers) == list(apart.quantizers)
    prepared(*inputs_of(drawn))
    assert all(quantizer.is_calibrated for quantizer in prepared.quantizers.values())
    check_signs(prepared)


def check_signs(prepared: PreparedModule) -> None:
    """An unsigned grid is given to none but tensors that cannot be negative."""
    for node in prepared.graph.nodes:
        if is_quantized(prepared, node) and len(node.args) == 1:
            spec = prepared.get_submodule(str(node.target)).spec
            (tensor,) = node.all_input_nodes
            if spec.scheme == "unsigned" and IS_NONNEGATIVE.has(tensor):
                assert IS_NONNEGATIVE.get(tensor)


@given(models(), st.data())
def test_an_override_says_what_its_sites_may_have(drawn, data):
    plain = prepared_of(drawn)
    names = list(plain.quantizers)
    # A quantizer may have the name of an operation, which then names all operands of that too.
    taken = {name for entry in plain.plan.accounting.ledger for name in names_of(entry.name)}
    alone = [name for name in names if name not in taken]
    chosen = data.draw(st.lists(st.sampled_from(alone), unique=True)) if alone else []
    widths = data.draw(st.sets(st.sampled_from((2, 3, 4, 5, 8, 16, 32)), min_size=1))
    affine = data.draw(st.booleans())
    override = {"widths": sorted(widths), "affine": affine}
    prepared = prepared_of(drawn, overrides=dict.fromkeys(chosen, override))
    assert list(prepared.quantizers) == names
    for site in prepared.plan.accounting.sites:
        spec, usual = (module.quantizers[site.name].spec for module in (prepared, plain))
        if site.name not in chosen:
            assert spec == usual
            continue
        assert site.allowed == tuple(sorted(widths))
        assert prepared.bit_widths[site.name] == max(widths)
        signed = "symmetric" if usual.scheme != "unsigned" else "unsigned"
        assert spec.scheme == ("affine" if affine else signed)


def test_a_planted_fault_is_seen(monkeypatch):
    """A rule that joins nothing is caught by the law above."""
    model = Calls(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    drawn = Case.of(model, torch.randn(2, 3))
    check_shared(drawn, ["add"])
    monkeypatch.setattr("cgmq_fx.passes.share_quantizers.itertools.pairwise", lambda items: [])
    with pytest.raises(AssertionError, match="reads"):
        check_shared(drawn, ["add"])
