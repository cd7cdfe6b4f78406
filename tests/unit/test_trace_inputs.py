"""What a model's forward may take and return: stars, decorators, dicts, dataclasses, None."""

import functools
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Result:
    logits: Tensor
    hidden: Any = None


@dataclass
class Fields(OrderedDict):
    """A dataclass that is a dict of its fields apart from None, as transformers returns them."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        super().update({k: v for k, v in vars(self).items() if v is not None})


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `forward` as decorators do, with a signature of its own."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


def stars(self, *terms):
    return self.head(torch.relu(self.body(sum(terms))))


def keywords(self, x, *, shift=None, **more):
    hidden = torch.relu(self.body(x))
    if more.pop("twice", False):
        hidden = hidden * 2
    if more.get("mask") is not None:
        hidden = hidden * more["mask"]
    return self.head(hidden if shift is None else hidden + shift)


def from_dict(self, batch):
    hidden = self.body(batch["x"])
    return {"logits": self.head(hidden * batch["mask"] if "mask" in batch else hidden)}


def returning(make: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    def forward(self, x):
        hidden = self.body(x)
        return make(hidden, self.head(hidden))

    return forward


def model(forward: Callable[..., Any]) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

    Model.forward = forward
    torch.manual_seed(0)
    return Model()


def call(module: nn.Module, inputs: Any) -> Any:
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def leaves(output: Any) -> list[Any]:
    if isinstance(output, dict):
        return [*output.items()]
    if isinstance(output, Result):
        return [*vars(output).items()]
    return [*output] if isinstance(output, tuple) else [output]


def assert_same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict | tuple | Result):
        ours, theirs = leaves(found), leaves(wanted)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert found == wanted


def full_width(prepared: PreparedModule) -> PreparedModule:
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(32)
    return prepared


CASES = {
    "no-stars-given": (keywords, {"x": X}),
    "keyword-only": (keywords, {"x": X, "shift": X}),
    "keyword-tensor": (keywords, {"x": X, "mask": X}),
    "keyword-flag": (keywords, {"x": X, "twice": True}),
    "three-terms": (stars, (X, X, X)),
    "dict": (from_dict, ({"x": X, "mask": X},)),
    "dict-without-mask": (from_dict, ({"x": X},)),
    "dataclass": (returning(lambda h, o: Result(o)), (X,)),
    "dataclass-dict": (returning(lambda h, o: Fields(logits=o)), (X,)),
    "dataclass-nested": (returning(lambda h, o: Result(o, (h, None, "name"))), (X,)),
    "namedtuple": (returning(lambda h, o: Pair(o, None)), (X,)),
    "none-in-dict": (returning(lambda h, o: {"logits": o, "cache": None}), (X,)),
}


@pytest.mark.parametrize("wrap", [lambda forward: forward, decorated], ids=["plain", "decorated"])
@pytest.mark.parametrize(("forward", "inputs"), CASES.values(), ids=CASES)
def test_the_graph_takes_and_returns_what_the_model_does(forward, inputs, wrap):
    original = model(wrap(forward))
    prepared = full_width(prepare(original, "50%", example_inputs=inputs))
    assert_same(call(prepared, inputs), call(original, inputs))


@pytest.mark.parametrize(
    "inputs", [{"x": X, "mask": X}, ({"x": X, "mask": X},)], ids=["keywords", "dict"]
)
def test_costs_are_for_one_sample_of_tensors_in_a_mapping(inputs):
    forward = keywords if isinstance(inputs, dict) else from_dict
    prepared = prepare(model(forward), "50%", example_inputs=inputs)
    found = {entry.name: entry.macs for entry in prepared.plan.accounting.ledger if entry.macs}
    assert found == {"body": 36, "head": 18}


def test_an_argument_that_was_not_traced_is_refused_by_name():
    prepared = prepare(model(decorated(keywords)), "50%", example_inputs={"x": X, "twice": True})
    with pytest.raises(UnsupportedModelError, match=r"input '\*\*more', 'twice'.*now has False"):
        prepared(X, twice=False)
    with pytest.raises(UnsupportedModelError, match=r"input '\*\*more'.*\['mask', 'twice'\]"):
        prepared(X, twice=True, mask=X)


def test_another_number_of_arguments_is_refused():
    prepared = prepare(model(stars), "50%", example_inputs=(X, X))
    with pytest.raises(UnsupportedModelError, match=r"input '\*terms'.*now has 3"):
        prepared(X, X, X)


def test_the_first_batch_may_leave_the_stars_out():
    original = model(keywords)
    prepared = prepare(original, "50%")
    prepared(X)
    assert prepared.plan.is_priced
    assert torch.equal(full_width(prepared)(X), original(X))


def test_an_unknown_keyword_is_named_on_the_first_batch():
    prepared = prepare(model(returning(lambda h, o: o)), "50%")
    with pytest.raises(UnsupportedModelError, match=r"inputs \['x'\].*'mask'"):
        prepared(X, mask=X)


ACTIVATIONS = {"gelu": nn.GELU(), "dropout": nn.Dropout(0.9).eval()}


def test_an_activation_that_is_no_submodule_is_a_function():
    original = model(lambda self, x: self.head(ACTIVATIONS["gelu"](self.body(x))))
    prepared = full_width(prepare(original, "50%", example_inputs=(X,)))
    assert torch.equal(prepared(X), original(X))
    entries = [entry.op for entry in prepared.plan.accounting.ledger]
    assert entries == ["linear", "activation", "linear"]


def test_a_mode_that_the_model_does_not_set_stays_what_it_is():
    original = model(lambda self, x: ACTIVATIONS["dropout"](self.body(x)))
    prepared = full_width(prepare(original, "50%", example_inputs=(X,)))
    assert torch.equal(prepared.train()(X), original.train()(X))


def masked(self, x):
    scores = self.body(x)
    return self.head(scores.masked_fill(x < 0, torch.finfo(scores.dtype).min / 1e38))


def test_the_limits_of_a_traced_dtype_are_known():
    original = model(masked)
    prepared = full_width(prepare(original, "50%", example_inputs=(X,)))
    assert torch.equal(prepared(X), original(X))
    assert torch.finfo(torch.half).bits == 16
    with pytest.raises(UnsupportedModelError, match=r"test_trace_inputs.*torch\.float32.*float64"):
        prepared.double()(X.double())


def test_a_constant_of_the_forward_is_in_no_checkpoint():
    original = model(lambda self, x: self.head(self.body(x) * torch.tensor([0.5] * 6)))
    prepared = full_width(prepare(original, "50%", example_inputs=(X,)))
    prepared.load_state_dict(original.state_dict(), strict=True)
    assert torch.equal(prepared(X), original(X))


class Cache:
    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


def test_an_object_that_no_graph_can_hold_is_refused_by_its_class():
    returns_cache = model(returning(lambda h, o: (o, Cache(h))))
    with pytest.raises(UnsupportedModelError, match=r"hands over Cache.*switch that output off"):
        prepare(returns_cache, "50%", example_inputs=(X,), front_end="fx")


def test_the_other_front_end_holds_such_an_object():
    original = model(returning(lambda h, o: (o, Cache(h))))
    prepared = full_width(prepare(original, "50%", example_inputs=(X,)))
    assert prepared.plan.settings.front_end == "export"
    for batch in (X, torch.cat((X, X + 1))):
        (out, cache), (expected, expected_cache) = prepared(batch), original(batch)
        assert torch.equal(out, expected)
        assert type(cache) is Cache
        assert torch.equal(cache.keys, expected_cache.keys)
