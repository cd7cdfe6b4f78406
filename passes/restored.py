"""Leaves a model as it was before its forward ran."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# What holds a module's children and tensors: tracing may add constants there.
_CONTENTS = frozenset({"_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"})
_CONTAINERS = (dict, OrderedDict, list, set)


def _is_tensor(name: str, value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@contextmanager
def attributes_restored(
    model: nn.Module, keeps: Callable[[str, Any], bool] = _is_tensor
) -> Iterator[None]:
    """Undo what a forward does to attributes and hooks of the modules of `model`.

    A model may install hooks when it first runs, or remember what it computed. While it is recorded
    that would be a proxy or a tensor without data, and the next recording would see it.

    Args:
        model: the module.
        keeps: tells by name and value which new attributes stay, as constants of the recorded
            graph do; by default tensors.
    """
    before = {module: _state(module) for module in model.modules()}
    try:
        yield
    finally:
        for module, state in before.items():
            _restore(module, state, keeps)


def _state(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return the attributes, each with a copy of its content where that is a plain container."""
    return {
        name: (value, value.copy() if type(value) in _CONTAINERS else None)
        for name, value in vars(module).items()
        if name not in _CONTENTS
    }


def _restore(
    module: nn.Module, state: dict[str, tuple[Any, Any]], keeps: Callable[[str, Any], bool]
) -> None:
    own = vars(module)
    for name, value in [*own.items()]:
        if name not in state and name not in _CONTENTS and not keeps(name, value):
            del own[name]
    for name, (value, content) in state.items():
        own[name] = value
        if content is None:
            continue
        value.clear()
        if isinstance(value, list):
            value.extend(content)
        else:
            value.update(content)
