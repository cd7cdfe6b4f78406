"""A lowered module goes through torch.export, copies and moves."""

import copy

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.utils import _pytree as pytree

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.frozen import FrozenWeight
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from cgmq_fx.testing import models
from graph_zoo import case


def lowered(model, inputs, bits=4, **options):
    prepared = prepare(model, "100%", example_inputs=inputs, **options).eval()
    prepared(*copy.deepcopy(inputs))
    sites = prepared.plan.accounting.sites
    prepared.set_bit_widths([bits if bits in site.allowed else site.allowed[0] for site in sites])
    prepared(*copy.deepcopy(inputs))
    return lower(prepared, allow_untrained=True)


def leaves(value):
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def assert_same(one, two):
    for wanted, found in zip(leaves(one), leaves(two), strict=True):
        assert torch.equal(wanted, found)


EXPORTED = ("lenet", "unet", "attention", "tied", "recurrent relu", "other products")


@pytest.mark.parametrize("zoo_case", [*map(case, EXPORTED)], ids=EXPORTED)
def test_exported_programs_compute_the_same(zoo_case):
    model, inputs = zoo_case.build()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    fixed = lowered(model, inputs)
    with torch.no_grad():
        program = torch.export.export(fixed, copy.deepcopy(inputs)).module()
        assert_same(fixed(*copy.deepcopy(inputs)), program(*copy.deepcopy(inputs)))


@settings(max_examples=6)
@given(models(exclude={"dataclass_output"}))
def test_the_batch_may_stay_open(drawn):
    axis, inputs = drawn.batch_axis, drawn.inputs()
    try:
        fixed = lowered(drawn.model(), inputs, batch_axis=axis)
    except UnsupportedModelError:
        return
    shapes = tuple(
        {axis: torch.export.Dim.DYNAMIC} if isinstance(item, torch.Tensor) else None
        for item in inputs
    )
    wide = tuple(
        torch.cat((item, item), axis) if isinstance(item, torch.Tensor) else item for item in inputs
    )
    with torch.no_grad():
        program = torch.export.export(fixed, inputs, dynamic_shapes=shapes).module()
        assert_same(fixed(*copy.deepcopy(wide)), program(*copy.deepcopy(wide)))


def test_packed_codes_stay_packed_in_the_program():
    fixed = lowered(nn.Sequential(nn.Linear(64, 64)), (torch.randn(2, 64),), bits=2)
    program = torch.export.export(fixed, (torch.randn(2, 64),))
    sizes = {name: value.numel() for name, value in program.state_dict.items()}
    assert sizes["frozen.0_weight_.packed"] == 64 * 64 // 4
    assert not [name for name, size in sizes.items() if size >= 64 * 64]


def test_a_copy_has_codes_of_its_own():
    x = torch.randn(2, 6)
    fixed = lowered(nn.Sequential(nn.Linear(6, 4)), (x,))
    before, twin = fixed(x), copy.deepcopy(fixed)
    assert torch.equal(twin(x), before)
    twin.get_submodule("frozen.0_weight_").packed.zero_()
    assert torch.equal(fixed(x), before)
    assert not torch.equal(twin(x), before)


def test_it_moves_between_devices():
    inputs = (torch.randn(2, 3, 8, 8),)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    fixed = lowered(net.eval(), inputs)
    wanted = fixed(*inputs)
    moved = copy.deepcopy(fixed).to("meta")
    held = [*moved.parameters(), *moved.buffers()]
    assert {tensor.device.type for tensor in held} == {"meta"}
    found = moved(inputs[0].to("meta"))
    assert (found.shape, found.dtype, found.device.type) == (wanted.shape, wanted.dtype, "meta")
    back = moved.to_empty(device="cpu")
    back.load_state_dict(fixed.state_dict())
    assert torch.equal(back(*inputs), wanted)
    weights = [module for module in back.modules() if isinstance(module, FrozenWeight)]
    assert [weight.packed.dtype for weight in weights] == [torch.uint8] * 2
