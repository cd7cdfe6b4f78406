"""Lazily initialised layers get their parameters from the example inputs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.prepare import prepare

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def lazy():
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)
    )


def test_the_copy_is_initialised_and_the_model_is_not():
    model = lazy()
    state = torch.get_rng_state()
    prepared = prepare(model, "100%", example_inputs=IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(is_lazy(model.get_parameter(name)) for name in ("1.weight", "2.weight", "4.weight"))
    assert prepared.get_parameter("4.weight").shape == (3, 64)
    assert prepared.training
    for name in ("0.running_mean", "2.running_mean"):
        assert not prepared.get_buffer(name).any(), "statistics moved"
    copy.deepcopy(prepared)(IMAGES)


def test_without_inputs_it_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"'1.weight'.* or give example_inputs"):
        prepare(lazy(), "100%")


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(UnsupportedModelError, match="to initialise them failed"):
        prepare(lazy(), "100%", example_inputs=torch.randn(2, 5))


def test_a_layer_that_forward_skips_stays_lazy_and_is_refused():
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].spare = nn.LazyLinear(3)
    with pytest.raises(UnsupportedModelError, match=r"\['0.spare.weight', '0.spare.bias'\]"):
        prepare(model, "100%", example_inputs=torch.randn(2, 4))
