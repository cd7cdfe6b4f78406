"""What the values of a graph under construction look like, by running it on fake tensors."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

UNKNOWN: Final = object()


def fake_mode() -> FakeTensorMode:
    """Return a mode in which operations compute shapes and dtypes, and no numbers."""
    return FakeTensorMode(allow_non_fake_inputs=True)


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
    """Return what `node` computes from the given values; parameters become fake tensors of `mode`."""
    match node.op:
        case "get_attr":
            return to_fake(mode, find_attribute(module, str(node.target)))
        case "call_function":
            assert callable(node.target)
            return node.target(*args, **kwargs)
        case "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        case _:
            return module.get_submodule(str(node.target))(*args, **kwargs)


class ValueEvaluator:
    """Computes, on demand and once, the value of each node of a graph that is being traced.

    A value is a fake tensor, or whatever Python value the node produces; `UNKNOWN` where that depends
    on the data in a tensor. `running` is true while a value is computed, when calls must not be traced.
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
            with self._mode, torch.no_grad():
                assert self.module is not None
                return execute(self.module, node, args, kwargs, self._mode)
        except Exception:  # what cannot run without data is unknown, and refused when asked for
            return UNKNOWN
        finally:
            self.running = False

    def _placeholder(self, node: fx.Node) -> Any:
        return to_fake(self._mode, self.inputs.get(str(node.target), UNKNOWN))
