"""Arguments of forward that are fixed while it is traced."""

import inspect

import pytest
import torch
from torch import nn

from cgmq_fx.errors import UnsupportedModelError, UsageError
from cgmq_fx.prepare import prepare

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Switched(nn.Module):
    """A flag without a default, and two with one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, twice, scale=2.0, *, mask=None):
        if twice:
            x = x * scale
        return self.layer(x) if mask is None else self.layer(x) * mask


@pytest.mark.parametrize("inputs", [None, X, (X,), {"x": X}, (X, True)])
def test_a_fixed_argument_keeps_its_place(inputs):
    model = Switched()
    prepared = prepare(model, "100%", example_inputs=inputs, concrete_args={"twice": True})
    names = [node.target for node in prepared.graph.nodes if node.op == "placeholder"]
    assert names == list(inspect.signature(model.forward).parameters)
    prepared(X, True)
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(32)
    torch.testing.assert_close(prepared(X, True)[:, 0], model(X, True)[:, 0], rtol=0.1, atol=0.1)
    with pytest.raises(UnsupportedModelError, match=r"'twice' was fixed to True .* now False"):
        prepared(X, False)
    with pytest.raises(UnsupportedModelError, match=r"'twice' was fixed to True .* a tensor"):
        prepared(X, torch.ones(()))


def test_a_default_may_be_fixed_to_another_value():
    prepared = prepare(Switched(), "100%", concrete_args={"twice": True, "scale": 3.0})
    with pytest.raises(UnsupportedModelError, match=r"'scale' was fixed to 3.0 .* now 2.0"):
        prepared(X, True)
    assert prepared(X, True, 3.0).shape == (2, 4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"twise": True}, r"'twise' is no argument; .*\['x', 'twice', 'scale', 'mask'\]"),
        ({"mask": X, "y": 1}, r"'y' is no argument; 'mask' holds a tensor"),
        ([("twice", True)], r"concrete_args is list; give a dict"),
    ],
)
def test_what_forward_does_not_take_is_refused(values, words):
    with pytest.raises(UsageError, match=words):
        prepare(Switched(), "100%", concrete_args=values)


def test_two_values_for_one_argument_are_refused():
    with pytest.raises(UsageError, match=r"'twice' is False and True"):
        prepare(Switched(), "100%", example_inputs=(X, False), concrete_args={"twice": True})
