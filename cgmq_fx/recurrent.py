"""Recurrent layers and cells as functions of their weights, with the state quantized inside.

`recurrent` is `nn.LSTM`, `nn.GRU` and `nn.RNN`; `recurrent_cell` is their cells. Where no quantizer
inside changes a number they call torch's fused kernels, bit for bit. Else they step through time by
the equations in torch's documentation. What the products read is quantized; what the gates read
element by element (the state that a GRU carries on, the cell of an LSTM) is not.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.quantizers import Quantizer
from cgmq_fx.recurrence import Recurrence, State, Weights, weights_of
from cgmq_fx.state_quantizer import StateQuantizer

Rounding = Callable[[Tensor], Tensor]

#: What computes a whole layer, by its mode.
LAYER_KERNELS: Mapping[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch._VF.lstm,
    "GRU": torch._VF.gru,
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
}
#: What computes one step, by its mode.
CELL_KERNELS: Mapping[str, Callable[..., Any]] = {
    "LSTM": torch._VF.lstm_cell,
    "GRU": torch._VF.gru_cell,
    "RNN_TANH": torch._VF.rnn_tanh_cell,
    "RNN_RELU": torch._VF.rnn_relu_cell,
}


def recurrent(
    data: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    quantizers: Mapping[str, nn.Module] | None = None,
    *,
    training: bool,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Return what a recurrent layer of torch.nn returns for ``(data, hx)``.

    Args:
        data: ``(batch, time, features)`` where ``batch_first``, else ``(time, batch, features)``;
            or ``(time, features)``.
        hx: the state before the first step, as the layer takes it; None: zeros.
        weights: the layer's, in the order of its ``_flat_weights_names``.
        training: its mode, for the dropout between layers.
        quantizers: by the operand of a `Product`: `Quantizer`, or what stands for one when frozen.
        options: the fields of `Recurrence`.

    Raises:
        UnsupportedModelError: `data` is a packed sequence.
    """
    shape = Recurrence(**options)
    if isinstance(data, PackedSequence):
        raise UnsupportedModelError(
            f"a recurrent layer ({shape.mode}) got a PackedSequence, whose batch changes with "
            f"time: a layer that is opened for quantization takes padded tensors; pad the input, "
            f"or keep the layer closed by a subclass of it"
        )
    batch_axis = 0 if shape.batch_first else 1
    is_batched = data.dim() == 3
    data = data if is_batched else data.unsqueeze(batch_axis)
    if hx is None:
        state = shape.first_state(data, data.shape[batch_axis], weights)
    else:
        state = tuple(hx) if shape.mode == "LSTM" else (hx,)
        state = state if is_batched else tuple(part.unsqueeze(1) for part in state)
    output, *final = _run_layers(shape, data, state, weights, training, quantizers or {})
    if not is_batched:
        output, final = output.squeeze(batch_axis), [part.squeeze(1) for part in final]
    return output, tuple(final) if shape.mode == "LSTM" else final[0]


def _run_layers(
    shape: Recurrence,
    data: Tensor,
    state: State,
    weights: Sequence[Tensor],
    training: bool,
    quantizers: Mapping[str, nn.Module],
) -> tuple[Tensor, ...]:
    """Return the output and the final state."""

    def opened(*given: Any) -> tuple[Tensor, ...]:
        return _open(shape, quantizers, *given)

    def exact() -> tuple[Tensor, ...]:
        options = (shape.bias, shape.num_layers, shape.dropout, training, shape.bidirectional)
        hx = state if shape.mode == "LSTM" else state[0]
        return LAYER_KERNELS[shape.mode](data, hx, list(weights), *options, shape.batch_first)

    return _choose(exact, opened, (data, state, weights, training), quantizers.values())


def recurrent_cell(
    data: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    quantizers: Mapping[str, nn.Module] | None = None,
    *,
    mode: str,
) -> Any:
    """Return what a recurrent cell of torch.nn returns for ``(data, hx)``.

    Args:
        data: ``(batch, features)`` or ``(features,)``.
        hx: the state before the step, as the cell takes it; None: zeros.
        weights: ``weight_ih``, ``weight_hh`` and, where it has them, both biases.
        quantizers: at most that of ``hidden``, as in `recurrent`.
        mode: as in `Recurrence`.
    """
    is_batched = data.dim() == 2
    data = data if is_batched else data.unsqueeze(0)
    if hx is None:
        zeros = data.new_zeros((data.shape[0], weights[1].shape[1]))
        state: State = (zeros, zeros) if mode == "LSTM" else (zeros,)
    else:
        state = tuple(hx) if mode == "LSTM" else (hx,)
        state = state if is_batched else tuple(part.unsqueeze(0) for part in state)
    held = dict(quantizers or {})

    def opened(data: Tensor, state: State, weights: Sequence[Tensor], _: bool = False) -> State:
        own = weights_of(weights)
        gates = F.linear(data, own.input, own.input_bias).unsqueeze(0)
        return _run_direction(mode, own, gates, state, held.get("hidden"), None)[1]

    def exact() -> State:
        hx = state if mode == "LSTM" else state[0]
        found = CELL_KERNELS[mode](data, hx, *weights_of(weights)[:4])
        return tuple(found) if mode == "LSTM" else (found,)

    final = _choose(exact, opened, (data, state, weights, False), held.values())
    final = final if is_batched else tuple(part.squeeze(0) for part in final)
    return final if mode == "LSTM" else final[0]


def _choose(
    exact: Callable[[], tuple[Tensor, ...]],
    opened: Callable[..., tuple[Tensor, ...]],
    given: tuple[Tensor, State, Sequence[Tensor], bool],
    quantizers: Collection[nn.Module],
) -> tuple[Tensor, ...]:
    """Return what torch's kernel computes, or the opened layer where a quantizer rounds.

    In training the kernel's result also carries gradients into an opened run on detached tensors:
    they leave every number and every other gradient as it is, and tell the probes how much the loss
    cares about what the kernel keeps inside.

    Args:
        exact: calls the kernel.
        opened: steps through time on what it is given.
        given: input, state before the first step, weights, and whether dropout is on.
        quantizers: of the tensors inside.
    """
    held = [item for item in quantizers if isinstance(item, Quantizer)]
    if len(held) < len(quantizers) or any(item.bit_width != FLOAT_WIDTH for item in held):
        return opened(*given)
    data, state, weights, _ = given
    # Without dropout, which would draw other random numbers than the float model does.
    plain = (data.detach(), _detached(state), _detached(weights), False)
    result = exact()
    if torch.is_grad_enabled() and any(_is_asked(item) for item in held):
        return tuple(map(_joined, result, opened(*plain)))
    if any(item.tap is not None or not item.is_calibrated for item in held):
        with torch.no_grad():
            opened(*plain)
    return result


def _is_asked(quantizer: Quantizer) -> bool:
    return quantizer.training and quantizer.probe.requires_grad


def _detached(tensors: Sequence[Tensor]) -> State:
    return tuple(tensor.detach() for tensor in tensors)


def _joined(value: Tensor, other: Tensor) -> Tensor:
    apply = cast(Callable[..., Tensor], _Joined.apply)  # torch leaves it untyped
    return apply(value, other)


class _Joined(torch.autograd.Function):
    """Returns its first argument; the gradient of the result goes to both."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def _open(
    shape: Recurrence,
    quantizers: Mapping[str, nn.Module],
    data: Tensor,
    state: State,
    weights: Sequence[Tensor],
    training: bool,
) -> tuple[Tensor, ...]:
    """Return the output and the final state, one step of time after the other."""
    finals: list[State] = []
    for layer in range(shape.num_layers):
        if layer:
            data = F.dropout(data, shape.dropout, training) if shape.dropout else data
            data = _rounding(quantizers.get(f"input_l{layer}"))(data)
        outputs = []
        for direction, suffix in enumerate(shape.suffixes):
            own = shape.weights_in(weights, layer, direction)
            gates = F.linear(data, own.input, own.input_bias)
            gates = gates.transpose(0, 1) if shape.batch_first and not layer else gates
            start = tuple(part[layer * len(shape.suffixes) + direction] for part in state)
            places = (f"{kind}_l{layer}{suffix}" for kind in ("hidden", "projection"))
            hidden, projection = (quantizers.get(place) for place in places)
            gates = gates.flip(0) if suffix else gates
            output, final = _run_direction(shape.mode, own, gates, start, hidden, projection)
            outputs.append(output.flip(0) if suffix else output)
            finals.append(final)
        data = torch.cat(outputs, -1) if shape.bidirectional else outputs[0]
    output = data.transpose(0, 1) if shape.batch_first else data
    return output, *(torch.stack(parts) for parts in zip(*finals, strict=True))


def _run_direction(
    mode: str,
    weights: Weights,
    gates: Tensor,
    state: State,
    hidden: nn.Module | None,
    projection: nn.Module | None,
) -> tuple[Tensor, State]:
    """Return the hidden states after every step, ``(time, batch, width)``, and the final state.

    Args:
        mode: as in `Recurrence`.
        weights: of this direction.
        gates: what the input adds to the gates, ``(time, batch, gates)``.
        state: before the first step.
        hidden: quantizes what the recurrent product reads.
        projection: quantizes what the projection reads.
    """
    inside = (hidden, projection)
    if any(isinstance(item, StateQuantizer) and item.is_due for item in inside):
        read: tuple[list[Tensor], list[Tensor]] = ([], [])
        with torch.no_grad():
            _, last = _scan(mode, weights, gates, state, _noting(read[0]), _noting(read[1]))
        read[0].append(last[0])  # what the first step of a next call may read
        for item, seen in zip(inside, read, strict=True):
            if isinstance(item, StateQuantizer):
                item.settle(torch.stack(seen))
    steps = len(gates)
    return _scan(mode, weights, gates, state, *(_rounding(item, steps) for item in inside))


def _scan(
    mode: str,
    weights: Weights,
    gates: Tensor,
    state: State,
    round_hidden: Rounding,
    round_projected: Rounding,
) -> tuple[Tensor, State]:
    outputs = []
    for from_input in gates.unbind(0):
        from_hidden = F.linear(round_hidden(state[0]), weights.hidden, weights.hidden_bias)
        state = _next_state(mode, from_input, from_hidden, state)
        if weights.projection is not None:
            state = (F.linear(round_projected(state[0]), weights.projection), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs), state


def _next_state(mode: str, from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    """Return the state after a step; equations as in the documentation of torch.nn."""
    if mode == "GRU":
        ours, theirs = from_input.chunk(3, -1), from_hidden.chunk(3, -1)
        reset = torch.sigmoid(ours[0] + theirs[0])
        update = torch.sigmoid(ours[1] + theirs[1])
        new = torch.tanh(ours[2] + reset * theirs[2])
        return (new + update * (state[0] - new),)
    gates = from_input + from_hidden
    if mode == "LSTM":
        enter, keep, new, leave = gates.chunk(4, -1)
        cell = torch.sigmoid(keep) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(leave) * torch.tanh(cell), cell
    return (torch.tanh(gates) if mode == "RNN_TANH" else torch.relu(gates),)


def _rounding(quantizer: nn.Module | None, steps: int = 1) -> Rounding:
    if quantizer is None:
        return lambda x: x
    return quantizer.over(steps) if isinstance(quantizer, StateQuantizer) else quantizer


def _noting(seen: list[Tensor]) -> Rounding:
    def note(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    return note
