from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.prepare import prepare


class Forward(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self._forward(self, x)


@fx.wrap
def fit_sizes(x: Tensor, sizes: list[int]) -> tuple[list[int], Tensor]:
    for axis in range(len(sizes)):
        if sizes[axis] > x.shape[axis]:
            sizes[axis] = x.shape[axis]
    return sizes, x[:, : sizes[1]]


def fitted(module, x):
    sizes, narrow = fit_sizes(x, [9, 4])
    return module.layer(narrow) * sizes[1]


def at_32_bits(model, x, **options):
    prepared = prepare(model, "100%", learn_input_bits=True, **options)
    prepared.eval()(x)
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(32)
    return prepared


def test_an_ordered_dict_stays_one():
    model = Forward(
        lambda self, x: OrderedDict(out=self.layer(x), aux=F.relu(x)), layer=nn.Linear(4, 3)
    )
    x = torch.randn(2, 4)
    prepared = at_32_bits(model, x)
    assert type(prepared(x)) is OrderedDict
    assert list(prepared(x)) == ["out", "aux"]
    assert torch.equal(prepared(x)["out"], model(x)["out"])


def test_another_subclass_of_dict_is_refused_by_name():
    class Own(dict):
        pass

    model = Forward(lambda self, x: Own(out=self.layer(x)), layer=nn.Linear(4, 3))
    with pytest.raises(UnsupportedModelError, match=r"makes a .*Own; make a dict instead"):
        prepare(model, "100%")


def test_a_wrapped_function_that_returns_a_tuple_is_opened():
    model, x = Forward(fitted, layer=nn.Linear(4, 3)), torch.randn(2, 6)
    prepared = at_32_bits(model, x, example_inputs=(x,))
    assert not any(node.target is fit_sizes for node in prepared.graph.nodes)
    assert torch.equal(prepared(x), model(x))


def test_a_closed_function_may_change_the_list_that_it_is_given():
    model, x = Forward(fitted, layer=nn.Linear(4, 3)), torch.randn(2, 6)
    prepared = at_32_bits(model, x)
    assert any(node.target is fit_sizes for node in prepared.graph.nodes)
    assert torch.equal(prepared(x), model(x))


def test_a_sum_that_is_quantized_gets_no_name_that_is_taken():
    model = Forward(lambda self, x: self.layer(F.relu(x) + x), layer=nn.Linear(4, 2))
    prepared = at_32_bits(model, torch.randn(2, 4))
    assert "add_" in prepared.quantizers


def test_without_gradients_the_numbers_are_those_of_the_model():
    attention = nn.MultiheadAttention(768, 12, batch_first=True)
    model = Forward(
        lambda self, x: self.attention(x, x, x, need_weights=False)[0], attention=attention
    )
    x = torch.randn(2, 50, 768)
    prepared = at_32_bits(model, x)
    with torch.no_grad():
        assert torch.equal(prepared(x), model(x))


def test_batch_norm_that_does_not_fit_its_input_is_refused():
    model = Forward(lambda self, x: self.norm(x), norm=nn.BatchNorm1d(5))
    with pytest.raises(UnsupportedModelError, match=r"5 channels expected, found 4"):
        prepare(model, "100%", example_inputs=(torch.randn(2, 4),))
