"""Plain data: what a file can hold and give back without running code."""

from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from cgmq_fx.errors import UsageError

_SCALARS = (type(None), bool, int, float, str, bytes)
_DICTS = (dict, OrderedDict, Counter)
_RULE = (
    "a checkpoint holds None, bool, int, float, str, bytes, dense tensors, and lists, tuples and "
    "dicts of these with keys of str or int"
)
_WAY_OUT = "write numbers as float(x) or int(x), and objects as their state_dict()"


def plain(value: Any, place: str, *, copy: bool = False) -> Any:
    """Return `value` with new containers and detached tensors on the CPU.

    Args:
        value: None, bool, int, float, str, bytes, a dense tensor, or lists, tuples and dicts of
            these; of subclasses only `OrderedDict`, `Counter` and `nn.Parameter`.
        place: what messages call the value.
        copy: give every tensor memory of its own, so that later steps leave the result alone.

    Raises:
        UsageError: it holds something else; every place is named.
    """
    faults: list[str] = []
    made = _plain(value, place, copy, faults, ())
    if faults:
        listed = "; ".join(faults[:10]) + ("; ..." if len(faults) > 10 else "")
        raise UsageError(f"{listed}: {_RULE}; {_WAY_OUT}")
    return made


def _plain(value: Any, place: str, copy: bool, faults: list[str], inside: tuple[int, ...]) -> Any:
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind in (Tensor, nn.Parameter):
        return _tensor(value, place, copy, faults)
    if id(value) in inside:
        faults.append(f"{place} contains itself")
        return None
    inside = (*inside, id(value))
    if kind in (list, tuple):
        items = enumerate(value)
        return kind(_plain(v, f"{place}[{i}]", copy, faults, inside) for i, v in items)
    if kind in _DICTS:
        wrong = [key for key in value if type(key) not in (str, int)]
        faults.extend(f"{place} has the key {key!r} ({type(key).__name__})" for key in wrong)
        pairs = {k: _plain(v, f"{place}[{k!r}]", copy, faults, inside) for k, v in value.items()}
        return kind(pairs)
    faults.append(f"{place} is {kind.__module__}.{kind.__qualname__}")
    return None


def _tensor(value: Tensor, place: str, copy: bool, faults: list[str]) -> Tensor | None:
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        kind = "without data" if value.is_meta else f"of layout {value.layout}"
        faults.append(f"{place} is a tensor {kind}")
        return None
    data = value.detach().cpu()
    # A file would hold the whole storage that a small view is of.
    is_part = data.untyped_storage().nbytes() > data.numel() * data.element_size()
    return data.clone() if copy or is_part else data
