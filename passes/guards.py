"""Functions that a traced graph calls to keep what tracing assumed true."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx.node import has_side_effect

from cgmq_fx.errors import UnsupportedModelError


@has_side_effect
def check_same(value: object, traced: object, where: str) -> None:
    """Refuse inputs for which the model would take another path than the traced one.

    Raises:
        UnsupportedModelError: `value` differs from what it was while tracing.
    """
    if isinstance(value, torch.Tensor) != isinstance(traced, torch.Tensor) or value != traced:
        raise UnsupportedModelError(
            f"{where}: the model took the path for {traced!r} when it was traced, and now has "
            f"{_short(value)}; call prepare again with example_inputs of this shape"
        )


@has_side_effect
def check_concrete(value: object, traced: object, name: str) -> None:
    """Refuse another value for an argument that `prepare` was told to fix.

    Raises:
        UnsupportedModelError: `value` is not the one that was given.
    """
    if isinstance(value, torch.Tensor) or value != traced:
        raise UnsupportedModelError(
            f"input '{name}' was fixed to {traced!r} by concrete_args, and is now {_short(value)}; "
            f"call the model with {name}={traced!r}, or prepare it again for the other value"
        )


def kind_of(value: object) -> str:
    """Return ``Tensor``, or the name of another type: what decides a type check."""
    return "Tensor" if isinstance(value, torch.Tensor) else type(value).__qualname__


@has_side_effect
def check_mode(training: bool, expected: bool, path: str, where: str) -> None:
    """Refuse a submodule whose mode is not that of the model, where it branches on it.

    Raises:
        UnsupportedModelError: the modes differ.
    """
    if training != expected:
        names = {True: "training", False: "evaluation"}
        raise UnsupportedModelError(
            f"{where}: the module '{path}' is in {names[training]} mode, the model is in "
            f"{names[expected]} mode, and the module branches on it; keep it closed with "
            f"leaf_modules=['{path}'], or give both one mode"
        )


@has_side_effect
def set_gradients(enabled: bool) -> bool:
    """Turn gradients on or off, and return whether they were on."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(bool(enabled))
    return before


@has_side_effect
def set_autocast(device: str, enabled: bool) -> bool:
    """Turn autocast on or off for a kind of device, and return whether it was on."""
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, enabled)
    return before


def _short(value: object) -> str:
    return "a tensor" if isinstance(value, torch.Tensor) else repr(value)


class TrainingMode(nn.Module):
    """A node's answer to ``self.training``: follows `train()` and `eval()` of the whole graph."""

    def forward(self) -> bool:
        """Return the current mode."""
        return self.training


def select_mode(training: bool, in_training: object, in_evaluation: object) -> object:
    """Return the value that belongs to the current mode."""
    return in_training if training else in_evaluation


@has_side_effect
def change_in_mode_(
    tensor: Any,
    training: bool,
    wanted: bool,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Change `tensor` in place in one mode alone, and return it as it then is.

    Args:
        tensor: what `function` changes, its first argument.
        training: the current mode.
        wanted: the mode in which `function` runs.
        function: an operation in place.
        args: its other arguments.
        kwargs: its keyword arguments.
    """
    return function(tensor, *args, **kwargs) if training == wanted else tensor


def write_in_training(training: bool, buffer: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Write `value` into `buffer` in training mode, and return the buffer."""
    if training:
        buffer.copy_(value)
    return buffer
