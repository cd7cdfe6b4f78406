"""Running the nodes of a graph on fake tensors, which have shapes and no data."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree


def fake_mode() -> FakeTensorMode:
    """Return a mode in which operations compute shapes and dtypes, and no numbers."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def without_data(mode: FakeTensorMode) -> Iterator[None]:
    """Run operations on tensors without data; failures raise, and are not logged as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled = logger.disabled
    logger.disabled = True
    try:
        with mode, torch.no_grad():
            yield
    finally:
        logger.disabled = disabled


def to_fake(mode: FakeTensorMode, tree: Any) -> Any:
    """Replace every tensor in `tree` by a fake one of the same shape, dtype and device."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, FakeTensor) and leaf.fake_mode is not mode:
            with mode:
                return torch.empty_strided(
                    leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device
                )
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
            return mode.from_tensor(leaf, static_shapes=True)
        return leaf

    return pytree.tree_map(convert, tree)


def map_tensors(function: Callable[[torch.Tensor], Any], values: Iterable[Any]) -> tuple[Any, ...]:
    """Apply `function` to every tensor of `values` that stands alone or in a dict."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(member) for key, member in value.items()}
        return function(value) if isinstance(value, torch.Tensor) else value

    return tuple(map(convert, values))


def find_attribute(module: nn.Module, path: str) -> Any:
    """Return the attribute at a dotted path, as `get_attr` nodes spell it."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def execute(module: nn.Module, node: fx.Node, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """Return what `node` computes from the given values, with parameters as fake tensors."""
    match node.op:
        case "get_attr":
            return to_fake(mode, find_attribute(module, str(node.target)))
        case "call_function":
            assert callable(node.target)
            args, kwargs = _mutable(args), _mutable(kwargs)
            return node.target(*args, **kwargs)
        case "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        case _:
            called = module.get_submodule(str(node.target))
            if isinstance(called, _BatchNorm) and len(args) == 1 and not kwargs:
                return _normalized(called, args[0])
            buffers = {name: to_fake(mode, buffer) for name, buffer in called.named_buffers()}
            if not buffers:
                return called(*args, **kwargs)
            # Written to in place, a buffer that is not without data would change.
            return torch.func.functional_call(called, buffers, args, kwargs)


def _normalized(batch_norm: _BatchNorm, data: torch.Tensor) -> torch.Tensor:
    """Return what `batch_norm` makes of fake data; torch would take a dozen operations for it."""
    batch_norm._check_input_dim(data)  # type: ignore[no-untyped-call]
    if data.shape[1] != batch_norm.num_features:
        raise ValueError(f"{batch_norm.num_features} channels expected, found {data.shape[1]}")
    return torch.empty_like(data)


def _mutable(value: Any) -> Any:
    """Return containers of torch.fx as plain ones: a closed function may change its arguments."""
    if isinstance(value, list):
        return [_mutable(item) for item in value]
    if isinstance(value, dict):
        return {key: _mutable(item) for key, item in value.items()}
    return tuple(map(_mutable, value)) if type(value) is tuple else value
