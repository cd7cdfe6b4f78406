"""What the values of a graph under construction look like, by running it on fake tensors."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

UNKNOWN: Final = object()


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
            return called(*args, **kwargs)


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


class ValueEvaluator:
    """Computes, on demand and once, the value of each node of a graph that is being traced.

    A value is a fake tensor, or whatever Python value the node produces; `UNKNOWN` where that
    depends on the data in a tensor. `running` is true while a value is computed, when calls must
    not be traced.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = inputs
        self.module: nn.Module | None = None
        self.running = False
        self._mode = fake_mode()
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """Return the value of `node`."""
        wanted = [node]
        while wanted:
            last = wanted[-1]
            missing = [arg for arg in last.all_input_nodes if arg not in self._values]
            if missing and last not in self._values:
                wanted.extend(missing)
                continue
            wanted.pop()
            if last not in self._values:
                self._values[last] = self._compute(last)
        return self._values[node]

    def assume(self, node: fx.Node, value: Any) -> None:
        """Take `value` for what `node` produces."""
        self._values[node] = value

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        args = fx.node.map_arg(node.args, self._values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self._values.__getitem__)
        if any(value is UNKNOWN for value in pytree.tree_leaves((args, kwargs))):
            return UNKNOWN
        self.running = True
        try:
            with without_data(self._mode):
                assert self.module is not None
                return execute(self.module, node, args, kwargs, self._mode)
        except Exception:  # what cannot run without data is unknown, and refused when asked for
            return UNKNOWN
        finally:
            self.running = False

    def _placeholder(self, node: fx.Node) -> Any:
        return to_fake(self._mode, self.inputs.get(str(node.target), UNKNOWN))
