"""Runs on random data, for calls that read the data of their tensors."""

import copy
import types
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from cgmq_fx.passes.values import to_fake

#: What running without data raises where data decides.
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
_READING = frozenset({"item", "tolist"})


def may_read_data(node: fx.Node) -> bool:
    """Tell whether `node` is a closed call of the user's code, or reads a number."""
    if node.op == "call_method":
        return node.target in _READING
    return node.op == "call_module" or is_user_function(node)


def is_user_function(node: fx.Node) -> bool:
    """Tell whether `node` calls a function that is written in Python, outside of torch."""
    if node.op != "call_function" or not isinstance(node.target, types.FunctionType):
        return False
    return str(node.target.__module__).partition(".")[0] != "torch"


def run_on_random_data(
    root: nn.Module, node: fx.Node, args: Any, kwargs: Any, mode: FakeTensorMode
) -> Any:
    """Return what `node` computes in evaluation mode for random data, without that data.

    Floating-point tensors are drawn from a normal distribution, integers are zero, bools are true.
    The state of random numbers and of modules stays.

    Args:
        root: the module that holds what `node` calls.
        node: a call.
        args: its arguments, with fake tensors.
        kwargs: likewise.
        mode: the mode of the fake tensors.
    """
    with torch.random.fork_rng():
        args, kwargs = pytree.tree_map_only(Tensor, _drawn, (args, kwargs))
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        called: Any = node.target
        if node.op == "call_module":
            called = copy.deepcopy(root.get_submodule(str(node.target))).eval()
        with torch.no_grad():
            result = called(*args, **kwargs)
    return to_fake(mode, result)


def _drawn(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    make = torch.ones if tensor.dtype is torch.bool else torch.zeros
    return make(tensor.shape, dtype=tensor.dtype, device=tensor.device)
