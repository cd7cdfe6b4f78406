"""Counters for the sweep that share nothing with the library: they watch the calls of ATen.

All runs are on tensors without data, with attention written out as its two products.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cgmq_fx.attention import AttentionQuantizer
from cgmq_fx.quantizers import Quantizer

# What moves, makes or describes tensors and computes nothing.
_MOVING = frozenset(
    {
        "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "arange", "as_strided", "cat",
        "chunk", "clone", "constant_pad_nd", "contiguous", "copy_", "detach", "empty",
        "expand", "full", "full_like", "index", "index_select", "lift_fresh",
        "lift_fresh_copy", "new_empty", "new_full", "new_ones", "new_zeros", "ones",
        "ones_like", "permute", "roll", "scalar_tensor", "select", "slice", "split",
        "split_with_sizes", "squeeze", "stack", "sym_size", "t", "transpose", "unbind",
        "unsqueeze", "unfold", "view", "zeros", "zeros_like", "fill_", "flip", "slice_scatter",
        "select_scatter", "is_same_size", "repeat", "eye",
    }
)  # fmt: skip


@dataclass(frozen=True)
class FloatCount:
    """What one sample costs the float model.

    Attributes:
        macs: multiply-accumulates, half of what `torch.utils.flop_counter` says.
        parameters: elements of each parameter that the run reads, by its first name; also of each
            constant table, a floating buffer that is no running statistic of a normalisation.
    """

    macs: int
    parameters: Mapping[str, int]


class _Watch(TorchDispatchMode):
    """Remembers which tensors and which computing operations went by."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()
        self.computing: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read.update(id(leaf) for leaf in pytree.tree_leaves((args, kwargs or {})))
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "prim" and name not in _MOVING and not name.startswith("sym_"):
            self.computing.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def attention_as_products() -> Iterator[None]:
    """Turn off the fused attention kernels, whose products a counter would not see."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def run_fake(
    model: nn.Module, inputs: tuple[Any, ...], *watching: AbstractContextManager[Any]
) -> dict[str, Tensor]:
    """Run the model in its present mode on fake tensors, and return those of its state."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    state: dict[str, Tensor] = {
        name: mode.from_tensor(tensor, static_shapes=True) for name, tensor in named
    }
    fake = tuple(mode.from_tensor(value, static_shapes=True) for value in inputs)
    with ExitStack() as stack:
        for context in (attention_as_products(), fake_errors_silent(), mode, *watching):
            stack.enter_context(context)
        torch.func.functional_call(model, state, fake)
    return state


def count_float(model: nn.Module, inputs: tuple[Any, ...]) -> FloatCount:
    """Run the float model in evaluation on fake tensors and return what it did."""
    model.eval()
    watch, counter = _Watch(), FlopCounterMode(display=False)
    with torch.no_grad():
        state = run_fake(model, inputs, counter, watch)
    tables = [
        (name, buffer)
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and "running_" not in name
    ]
    read = {
        name: tensor.numel()
        for name, tensor in [*model.named_parameters(), *tables]
        if id(state[name]) in watch.read
    }
    return FloatCount(counter.get_total_flops() // 2, read)


@contextmanager
def fake_errors_silent() -> Iterator[None]:
    """Keep fake tensors from logging an error that is an answer here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


@dataclass(frozen=True)
class NodeCount:
    """What one node of a graph does: its multiply-accumulates and its computing operations."""

    macs: int
    computing: tuple[str, ...]


def count_nodes(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[fx.Node, NodeCount]:
    """Run a prepared graph in evaluation node by node; quantizers pass their tensor through."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = iter(inputs)
    values: dict[fx.Node, Any] = {}
    counts: dict[fx.Node, NodeCount] = {}
    runner = _Runner(gm, mode)
    with mode, torch.no_grad(), attention_as_products():
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = mode.from_tensor(next(given), static_shapes=True)
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            watch, counter = _Watch(), FlopCounterMode(display=False)
            with counter, watch:
                values[node] = runner.run(node, args, kwargs)
            counts[node] = NodeCount(counter.get_total_flops() // 2, tuple(watch.computing))
    return counts


class _Runner:
    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        self.gm, self.mode = gm, mode

    def run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target = str(node.target)
        if node.op == "output":
            return args[0]
        if node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            tensor = getattr(self.gm.get_submodule(owner), name)
            return self.mode.from_tensor(tensor, static_shapes=True)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        module = self.gm.get_submodule(target)
        if isinstance(module, AttentionQuantizer):
            return F.scaled_dot_product_attention(*args, **kwargs)
        return args[0] if isinstance(module, Quantizer) else module(*args, **kwargs)
