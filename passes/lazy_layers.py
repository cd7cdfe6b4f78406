"""Gives lazily initialised layers their parameters, by one run."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer as LazyBuffer
from torch.nn.parameter import is_lazy

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.root_call import call_bound


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy of `model`, which may have lazy layers."""
    # A lazy buffer, unlike a lazy parameter, cannot be copied.
    lazy = {id(buffer): buffer for buffer in model.buffers() if isinstance(buffer, LazyBuffer)}
    make: Any = LazyBuffer  # its stub lacks the device and the dtype
    memo = {
        key: make(buffer.requires_grad, device=buffer.device, dtype=buffer.dtype)
        for key, buffer in lazy.items()
    }
    return copy.deepcopy(model, memo)


def initialize_lazy(model: nn.Module, inputs: Sequence[Any]) -> bool:
    """Run `model` once in evaluation mode if it has lazy layers, and return whether it has.

    Modes, buffers and the state of random numbers are afterwards as they were.

    Args:
        model: the model, changed in place.
        inputs: one value for each argument of its forward.

    Raises:
        UnsupportedModelError: the inputs do not fit, or leave a layer uninitialised.
    """
    if not _lazy(model):
        return False
    modes = {module: module.training for module in model.modules()}
    kept = {name: b.clone() for name, b in model.named_buffers() if not is_lazy(b)}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            call_bound(model, copy.deepcopy(inputs))
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has lazy layers, and running it on example_inputs to "
            f"initialise them failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    for name, buffer in model.named_buffers():
        if name in kept:
            buffer.copy_(kept[name])
    if left := _lazy(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has the lazy parameters {left}, which a run on example_inputs "
            f"does not initialise; remove the layers that forward does not use"
        )
    return True


def _lazy(model: nn.Module) -> list[str]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if is_lazy(tensor)]
