"""Recurrent layers as functions: torch's numbers bit for bit, opened ones within rounding."""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree

from cgmq_fx.errors import TrainingError, UnsupportedModelError
from cgmq_fx.quantizer_spec import QuantizerSpec
from cgmq_fx.quantizers import Quantizer
from cgmq_fx.recurrence import Recurrence
from cgmq_fx.recurrent import recurrent, recurrent_cell
from cgmq_fx.state_quantizer import StateQuantizer

# torch's own word that projections take another kernel on CPUs
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
STEPS, BATCH = 6, 3


@dataclass(frozen=True)
class Variant:
    """A layer with its arguments; made anew, and alike, at every call."""

    id: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (STEPS, BATCH, 5)
    state: tuple[tuple[int, ...], ...] = ()

    def build(self) -> tuple[nn.Module, torch.Tensor, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            state = [torch.randn(shape).tanh() for shape in self.state]
            hx = None if not state else (state[0] if len(state) == 1 else tuple(state))
            return self.make(), torch.randn(self.shape), hx


LAYERS = (
    Variant("lstm", lambda: nn.LSTM(5, 4)),
    Variant("lstm without bias", lambda: nn.LSTM(5, 4, bias=False)),
    Variant("lstm stack", lambda: nn.LSTM(5, 4, 3, dropout=0.4, bidirectional=True)),
    Variant("batch first", lambda: nn.LSTM(5, 4, 2, batch_first=True), (BATCH, STEPS, 5)),
    Variant("lstm with state", lambda: nn.LSTM(5, 4, 2), state=((2, BATCH, 4), (2, BATCH, 4))),
    Variant("projected", lambda: nn.LSTM(5, 4, 2, proj_size=3, bidirectional=True)),
    Variant(
        "projected without bias",
        lambda: nn.LSTM(5, 4, proj_size=2, bias=False),
        state=((1, BATCH, 2), (1, BATCH, 4)),
    ),
    Variant("unbatched", lambda: nn.LSTM(5, 4, batch_first=True), (STEPS, 5), ((1, 4), (1, 4))),
    Variant("gru", lambda: nn.GRU(5, 4, 2, dropout=0.2)),
    Variant("gru both ways", lambda: nn.GRU(5, 4, bidirectional=True), state=((2, BATCH, 4),)),
    Variant("gru without bias", lambda: nn.GRU(5, 4, bias=False, batch_first=True), (3, 6, 5)),
    Variant("gru unbatched", lambda: nn.GRU(5, 4), (STEPS, 5)),
    Variant("rnn tanh", lambda: nn.RNN(5, 4, 2, bidirectional=True)),
    Variant("rnn relu", lambda: nn.RNN(5, 4, nonlinearity="relu"), state=((1, BATCH, 4),)),
)
CELLS = (
    Variant("lstm cell", lambda: nn.LSTMCell(5, 4), (BATCH, 5), ((BATCH, 4), (BATCH, 4))),
    Variant("lstm cell from zero", lambda: nn.LSTMCell(5, 4, bias=False), (BATCH, 5)),
    Variant("lstm cell unbatched", lambda: nn.LSTMCell(5, 4), (5,), ((4,), (4,))),
    Variant("gru cell", lambda: nn.GRUCell(5, 4), (BATCH, 5), ((BATCH, 4),)),
    Variant("gru cell from zero", lambda: nn.GRUCell(5, 4, bias=False), (5,)),
    Variant("rnn cell", lambda: nn.RNNCell(5, 4), (BATCH, 5), ((BATCH, 4),)),
    Variant("relu cell", lambda: nn.RNNCell(5, 4, nonlinearity="relu"), (BATCH, 5)),
)
VARIANTS = pytest.mark.parametrize("variant", LAYERS + CELLS, ids=lambda item: item.id)


def options_of(module: nn.RNNBase) -> dict[str, Any]:
    names = (field.name for field in fields(Recurrence) if field.name != "projects")
    return {**{name: getattr(module, name) for name in names}, "projects": module.proj_size > 0}


def called(module: nn.Module, data: Any, hx: Any, quantizers: Any = None) -> Any:
    """Call the function that stands for a module, with the module's weights."""
    if isinstance(module, nn.RNNBase):
        weights = [getattr(module, name) for name in module._flat_weights_names]
        training = module.training
        return recurrent(data, hx, weights, quantizers, training=training, **options_of(module))
    weights = list(module.parameters())
    mode = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}.get(type(module))
    mode = mode or f"RNN_{module.nonlinearity.upper()}"
    return recurrent_cell(data, hx, weights, quantizers, mode=mode)


def names_inside(module: nn.Module) -> list[str]:
    if not isinstance(module, nn.RNNBase):
        return ["hidden"]
    products = Recurrence(**options_of(module)).products
    return list(dict.fromkeys(p.operand for p in products if p.operand is not None))


def quantizers_of(module: nn.Module) -> dict[str, Quantizer]:
    spec = QuantizerSpec("activation", "affine")
    kinds = {
        name: Quantizer if name.startswith("input") else StateQuantizer
        for name in names_inside(module)
    }
    return {name: kind(spec, name).train(module.training) for name, kind in kinds.items()}


def outputs(function: Callable[..., Any], *args: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Run with fixed random numbers; return the results and the next random numbers."""
    torch.manual_seed(9)
    return pytree.tree_leaves(function(*args)), torch.rand(3)


def assert_exact(left: Any, right: Any) -> None:
    (mine, my_chance), (theirs, their_chance) = left, right
    assert torch.equal(my_chance, their_chance)
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


def opened(module: nn.Module, data: Any, hx: Any) -> Any:
    """Step through time, with a stand-in that rounds nothing."""
    return called(module, data, hx, {"hidden_l0": nn.Identity(), "hidden": nn.Identity()})


@VARIANTS
@pytest.mark.parametrize("training", [True, False])
def test_torchs_numbers_while_no_quantizer_rounds(variant, training):
    module, data, hx = variant.build()
    module.train(training)
    want = outputs(module, data, hx)
    assert_exact(outputs(lambda: called(module, data, hx)), want)
    held = quantizers_of(module)
    for _ in range(2):  # the first run calibrates
        assert_exact(outputs(lambda: called(module, data, hx, held)), want)
    assert all(quantizer.is_calibrated and quantizer.has_sample for quantizer in held.values())
    with torch.no_grad():
        held = quantizers_of(module)
        want = outputs(module, data, hx)
        assert_exact(outputs(lambda: called(module, data, hx, held)), want)
    assert all(quantizer.is_calibrated for quantizer in held.values())


def check_opened(variant: Variant) -> None:
    module, data, hx = variant.build()
    module.eval()
    want, got = (pytree.tree_leaves(f(module, data, hx)) for f in (nn.Module.__call__, opened))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    seeds = [torch.randn_like(item) for item in want]
    theirs = torch.autograd.grad(want, list(module.parameters()), seeds)
    ours = torch.autograd.grad(got, list(module.parameters()), seeds)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@VARIANTS
def test_an_opened_layer_computes_what_torch_does(variant):
    check_opened(variant)


@VARIANTS
@torch.no_grad()
def test_sixteen_bits_are_near_and_two_are_not(variant):
    module, data, hx = variant.build()
    module.eval()
    held = quantizers_of(module)
    want = pytree.tree_leaves(module(data, hx))
    errors = {}
    for bits in (16, 2):
        for quantizer in held.values():
            quantizer.set_bit_width(bits)
        got = pytree.tree_leaves(called(module, data, hx, held))
        errors[bits] = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
    assert errors[16] < 1e-4
    if hx is not None or isinstance(module, nn.RNNBase):  # a state of zeros is on every grid
        assert errors[2] > 30 * errors[16] > 0


def test_dropout_between_layers_when_opened():
    module, data, _ = Variant("", lambda: nn.LSTM(5, 4, 2, dropout=0.5)).build()
    first, second = (outputs(opened, module, data, None)[0] for _ in range(2))
    assert_exact((first, torch.zeros(1)), (second, torch.zeros(1)))
    assert not torch.equal(first[0], opened(module.eval(), data, None)[0])
    torch.testing.assert_close(opened(module, data, None)[0], module(data)[0])


def _reset_after(mode, from_input, from_hidden, state):
    """The gated unit of the first paper: the reset gate before the product."""
    ours, theirs = from_input.chunk(3, -1), from_hidden.chunk(3, -1)
    reset, update = (torch.sigmoid(ours[i] + theirs[i]) for i in (0, 1))
    return (torch.tanh(ours[2] + theirs[2]).lerp(reset * state[0], update),)


def _two_gates_swapped(mode, from_input, from_hidden, state):
    i, f, g, o = (from_input + from_hidden).chunk(4, -1)
    return NEXT_STATE(mode, torch.cat((f, i, g, o), -1), torch.zeros(()), state)


NEXT_STATE = sys.modules[recurrent.__module__]._next_state
FAULTS = {_reset_after: "gru", _two_gates_swapped: "lstm"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_in_the_equations_is_seen(fault, monkeypatch):
    monkeypatch.setattr("cgmq_fx.recurrent._next_state", fault)
    with pytest.raises(AssertionError, match="not close"):
        check_opened(next(item for item in LAYERS if item.id == FAULTS[fault]))


@pytest.mark.parametrize("kind", ["hidden_l0_reverse", "projection_l1", "input_l1"])
def test_each_quantizer_stands_where_its_name_says(kind):
    """Its tensor is the one that a hook on torch's own arithmetic would see."""
    module, data, _ = next(item for item in LAYERS if item.id == "projected").build()
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    called(module.eval(), data, None, {kind: Spy()})
    assert [tuple(item.shape) for item in seen] == (
        [(STEPS, BATCH, 6)] if kind == "input_l1" else [(BATCH, 3 if "h" in kind[0] else 4)] * STEPS
    )
    if kind == "input_l1":
        alone = nn.LSTM(5, 4, proj_size=3, bidirectional=True)
        state = {name: value for name, value in module.state_dict().items() if "l0" in name}
        alone.load_state_dict(state)
        torch.testing.assert_close(seen[0], alone(data)[0])


# -- gradients -----------------------------------------------------------------------------------


@VARIANTS
def test_at_32_bits_gradients_are_torchs_and_the_probes_have_theirs(variant):
    module, data, hx = variant.build()
    held = quantizers_of(module)
    wants = []
    for run in (module, lambda *args: called(module, *args, held)):
        module.zero_grad()
        found, _ = outputs(run, data, hx)
        torch.autograd.backward(sum(item.square().sum() for item in found))
        wants.append([parameter.grad.clone() for parameter in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*wants, strict=True))
    squares = {name: float(quantizer.probe.grad[1]) for name, quantizer in held.items()}
    assert min(squares.values()) > 0
    assert all(quantizer.multiplier.grad is None for quantizer in held.values())


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_steps_add_up_to_one_tensor(scheme):
    """Gradient of the range, mean and squares of the probe: those of all states at once."""
    torch.manual_seed(0)
    states, grad = torch.randn(7, 3, 4), torch.randn(7, 3, 4)
    whole, stepped = (StateQuantizer(QuantizerSpec("activation", scheme)) for _ in range(2))
    for quantizer in (whole, stepped):
        quantizer.calibrate(states * 0.7)
        quantizer.set_bit_width(4)
        quantizer.refit(states * 0.7)
    want = whole(states)
    over = stepped.over(len(states))
    got = torch.stack([over(state) for state in states])
    assert torch.equal(got, want)
    torch.autograd.backward((want * grad).sum())
    torch.autograd.backward((got * grad).sum())
    torch.testing.assert_close(stepped.multiplier.grad, whole.multiplier.grad)
    torch.testing.assert_close(stepped.probe.grad, whole.probe.grad, rtol=1e-4, atol=0)


# -- ranges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_range_is_found_on_the_states_of_all_steps(training):
    module, data, _ = LAYERS[0].build()
    held = quantizers_of(module.train(training))
    quantizer = held["hidden_l0"]
    quantizer.set_bit_width(8)
    called(module, data, None, held)
    states = module(data)[0].detach()
    qparams = quantizer.qparams()
    low = (qparams.quant_min - qparams.zero_point) * qparams.scale
    high = (qparams.quant_max - qparams.zero_point) * qparams.scale
    assert float(low) == pytest.approx(float(states.min()), rel=0.05)
    assert float(high) == pytest.approx(float(states.max()), rel=0.05)
    assert quantizer.mean_abs > 0.01


@torch.no_grad()
def test_a_call_of_one_step_leaves_room_for_the_state_of_the_next():
    """Its own product reads zeros; who feeds a stream step by step hands the result back."""
    module, data, _ = LAYERS[0].build()
    held = quantizers_of(module.eval())  # so that it fits to what it kept
    _, state = called(module, data[:1], None, held)
    held["hidden_l0"].set_bit_width(16)
    got = called(module, data[1:2], state, held)[0]
    torch.testing.assert_close(got, module(data[1:2], state)[0], rtol=0, atol=1e-4)


def test_a_narrower_width_is_fitted_to_before_it_rounds():
    module, data, _ = LAYERS[0].build()
    held = quantizers_of(module)
    called(module, data, None, held)
    held["hidden_l0"].set_bit_width(2)
    assert held["hidden_l0"].refit_pending
    called(module, data, None, held)
    assert not held["hidden_l0"].refit_pending
    loaded = quantizers_of(module)
    loaded["hidden_l0"].load_state_dict(held["hidden_l0"].state_dict())
    want = called(module, data, None, held)[0]
    assert torch.equal(called(module.eval(), data, None, loaded)[0], want)
    assert loaded["hidden_l0"].mean_abs > 0.01, "the sample is the zeros of the first step"


def test_states_that_are_not_finite_are_refused_by_name():
    module, data, _ = LAYERS[0].build()
    held = quantizers_of(module)
    held["hidden_l0"].set_bit_width(4)
    with pytest.raises(TrainingError, match=r"'hidden_l0': .* NaN"):
        called(module, data * torch.nan, None, held)


# -- refusals ------------------------------------------------------------------------------------


def test_a_packed_sequence_is_refused():
    module = nn.GRU(5, 4)
    packed = pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])
    with pytest.raises(UnsupportedModelError, match=r"\(GRU\) got a PackedSequence.*subclass"):
        called(module, packed, None)


def test_functions_can_be_copied_with_their_quantizers():
    module, data, _ = LAYERS[2].build()
    held = quantizers_of(module.eval())
    for quantizer in held.values():
        quantizer.set_bit_width(4)
    want = called(module, data, None, held)[0]
    other, twins = copy.deepcopy((module, held))
    assert torch.equal(called(other, data, None, twins)[0], want)
