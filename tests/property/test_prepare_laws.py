"""What `prepare` and `lower` promise, on generated models and on the zoo."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cgmq_fx.prepare import prepare
from cgmq_fx.testing import Case, check_lowering, check_prepare, models
from cgmq_fx.testing.compare import positional_inputs
from cgmq_fx.testing.counting import count_float
from graph_zoo import ZOO, case

GRAPHS = pytest.mark.parametrize("zoo_case", ZOO, ids=lambda item: item.id)
BUDGETS = ("100%", "2%", {"bops": "30%", "weight_memory": "20%"}, {"weight_memory": "100%"})


@GRAPHS
def test_the_laws_hold_on_the_zoo(zoo_case):
    model, inputs = zoo_case.build()
    check_prepare(Case.of(model, inputs, batch_axis=zoo_case.batch_axis))


@settings(max_examples=100)
@given(models(), st.sampled_from(BUDGETS), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_laws_hold_on_drawn_models(drawn, budget, per_channel, learn_input_bits, seed):
    options = {"per_channel": per_channel, "learn_input_bits": learn_input_bits}
    check_prepare(drawn, budget=budget, seed=seed, **options)


@pytest.mark.parametrize(
    ("name", "macs"),
    # By hand: two layers of two directions, five steps; every output meets every pair of inputs.
    [("recurrent", 5 * 2 * (16 * 7 + 16 * 12) + 16), ("bilinear", 4 * (9 + 3))],
)
def test_layers_that_torch_does_not_count(name, macs):
    model, inputs = case(name).build()
    assert count_float(model, tuple(value[:1] for value in inputs)).macs == macs


def test_a_checkpoint_of_another_training_computes_what_its_model_does():
    model, inputs = case("residual").build()
    prepared = prepare(model, "100%", example_inputs=inputs)
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    prepared.load_state_dict(other.state_dict())
    prepared.eval()
    prepared.set_bit_widths([32] * len(prepared.bit_widths))
    assert torch.equal(prepared(*inputs), other(*inputs))


@settings(max_examples=30)
@given(models(require={"conv_bn"}), st.data())
def test_folded_models_agree_at_any_bit_widths(drawn, data):
    inputs = positional_inputs(drawn.model(), *drawn.inputs(), **drawn.kwargs())
    prepared = prepare(drawn.model(), "100%", example_inputs=inputs)
    sites = prepared.plan.accounting.sites
    bits = [data.draw(st.sampled_from(site.allowed), label=site.name) for site in sites]
    check_lowering(prepared, inputs, bits=bits, source=drawn.source)
