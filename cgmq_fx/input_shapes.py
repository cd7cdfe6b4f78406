"""The shapes and dtypes of a model's inputs as plain data, to price a model again without them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_VALUES = (type(None), bool, int, float, str)


def describe(inputs: Sequence[Any]) -> list[Any] | None:
    """Return the form of `inputs` as plain data; None where they hold more than tensors and values.

    >>> describe((torch.zeros(2, 3), [None, 1]))
    [['tensor', 'float32', [2, 3]], ['list', [['value', None], ['value', 1]]]]
    """
    found = [_describe(item) for item in inputs]
    return None if None in found else found


def _describe(item: Any) -> list[Any] | None:
    if isinstance(item, Tensor):
        return ["tensor", str(item.dtype).removeprefix("torch."), list(item.shape)]
    if type(item) in _VALUES:
        return ["value", item]
    if type(item) in (list, tuple):
        parts = describe(item)
        return None if parts is None else [type(item).__name__, parts]
    if type(item) is dict and all(type(key) is str for key in item):
        parts = describe(list(item.values()))
        return None if parts is None else ["dict", list(item), parts]
    return None


def rebuild(form: Sequence[Any], device: torch.device) -> tuple[Any, ...]:
    """Return inputs of the form that `describe` returned; tensors hold zeros."""
    return tuple(_rebuild(item, device) for item in form)


def _rebuild(item: Sequence[Any], device: torch.device) -> Any:
    kind, *rest = item
    if kind == "tensor":
        return torch.zeros(rest[1], dtype=getattr(torch, rest[0]), device=device)
    if kind == "value":
        return rest[0]
    parts = rebuild(rest[-1], device)
    if kind == "dict":
        return dict(zip(rest[0], parts, strict=True))
    return list(parts) if kind == "list" else parts
