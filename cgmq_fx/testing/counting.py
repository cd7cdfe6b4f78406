"""Counters that share nothing with the library's own sums: they watch the calls of ATen.

All runs are on tensors without data, with attention written out as its two products. MACs are
counted twice, by formulas that stand here and by `torch.utils.flop_counter`; where torch's counter
knows every operation that went by, the two must agree.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
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
from cgmq_fx.passes.recurrent import INSIDE, is_recurrent
from cgmq_fx.passes.trace import fast_path_off
from cgmq_fx.passes.values import find_attribute
from cgmq_fx.quantizers import Quantizer
from cgmq_fx.testing.compare import Inputs, bound_inputs, split_inputs, tensors_of
from cgmq_fx.testing.law_error import LawError
from cgmq_fx.testing.snapshot import named_tensors

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
        "select_scatter", "is_same_size", "repeat", "eye", "im2col", "masked_fill", "masked_fill_",
        "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
        "replication_pad2d", "replication_pad3d",
    }
)  # fmt: skip


@dataclass(frozen=True)
class FloatCount:
    """What one sample costs the float model, without what it computes and does not return.

    Attributes:
        macs: multiply-accumulates.
        parameters: elements of each parameter that is read, by its first name; also of each
            constant table, a floating buffer that is no running statistic of a normalisation.
        named: the names of all parameters and buffers.
    """

    macs: int
    parameters: Mapping[str, int]
    named: frozenset[str]


# -- multiply-accumulates --------------------------------------------------------------------------


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    """Each output element, or each input element if transposed, meets one filter."""
    transposed = bool(rest[4])
    return (x if transposed else out).numel() * weight[0].numel()


def _product(out: Tensor, left: Tensor, right: Tensor, *_: Any) -> int:
    return left.numel() * right.shape[-1]


def _added_product(out: Tensor, added: Tensor, left: Tensor, right: Tensor, *_: Any) -> int:
    return left.numel() * right.shape[-1]


def _with_vector(out: Tensor, matrix: Tensor, vector: Tensor, *_: Any) -> int:
    return matrix.numel()


def _added_with_vector(out: Tensor, added: Tensor, matrix: Tensor, *_: Any) -> int:
    return matrix.numel()


def _trilinear(out: Tensor, left: Tensor, weight: Tensor, right: Tensor, *_: Any) -> int:
    outputs, first, second = weight.shape
    return math.prod(left.shape[:-1]) * outputs * (first * second + second)


def _recurrent(out: Any, x: Tensor, of_input: Tensor, of_hidden: Tensor, *_: Any) -> int:
    return math.prod(x.shape[:-1]) * (of_input.numel() + of_hidden.numel())


_KNOWN_TO_TORCH: Mapping[str, Callable[..., int]] = {
    "convolution": _convolution,
    "mm": _product,
    "bmm": _product,
    "addmm": _added_product,
    "baddbmm": _added_product,
}
_OMITTED_BY_TORCH: Mapping[str, Callable[..., int]] = {
    "addbmm": _added_product,
    "mv": _with_vector,
    "dot": _with_vector,
    "vdot": _with_vector,
    "addmv": _added_with_vector,
    "_trilinear": _trilinear,
    "mkldnn_rnn_layer": _recurrent,
}


@dataclass(frozen=True)
class _Call:
    """One call of ATen: its MACs, the tensors it is given, the storages it reads and writes."""

    macs: int
    given: tuple[Tensor, ...]
    reads: frozenset[int]
    writes: frozenset[int]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the calls that went by, which of them compute, and counts their MACs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computing: list[str] = []
        self._calls: list[_Call] = []
        self._kept: list[Any] = []  # so that no storage is used twice
        self._omitted = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "prim" and name not in _MOVING and not name.startswith("sym_"):
            self.computing.append(name)
        out = func(*args, **(kwargs or {}))
        self._omitted |= name in _OMITTED_BY_TORCH
        count = _KNOWN_TO_TORCH.get(name) or _OMITTED_BY_TORCH.get(name)
        given = tensors_of((args, kwargs or {}))
        made = tensors_of(out)
        if name.endswith("_") and given:
            made = (*made, given[0])
        macs = count(out, *args) if count else 0
        self._calls.append(_Call(macs, given, _storages(given), _storages(made)))
        self._kept.append(made)
        return out

    def macs(self, counter: FlopCounterMode, place: str) -> int:
        """Return the MACs, after a look at what torch's counter says of the same run."""
        flops, macs = counter.get_total_flops(), sum(call.macs for call in self._calls)
        if not self._omitted and flops != 2 * macs:
            fault = f"counted {macs} MACs, torch.utils.flop_counter has {flops} flops"
            raise LawError("counters agree", place, (fault,))
        return macs

    def needed(self, outputs: Any) -> tuple[int, set[int]]:
        """Return MACs and identities of tensors of the calls whose results reach `outputs`."""
        live = set(_storages(tensors_of(outputs)))
        macs, read = 0, set[int]()
        for call in reversed(self._calls):
            if call.writes & live:
                live |= call.reads
                macs += call.macs
                read.update(map(id, call.given))
        return macs, read


def _storages(tensors: tuple[Tensor, ...]) -> frozenset[int]:
    return frozenset(tensor.untyped_storage()._cdata for tensor in tensors)


# -- running without data --------------------------------------------------------------------------


@contextmanager
def attention_as_products() -> Iterator[None]:
    """Turn off the fused attention kernels, whose products a counter would not see."""
    with fast_path_off(), sdpa_kernel(SDPBackend.MATH):
        yield


def run_fake(
    model: nn.Module, inputs: Inputs, *watching: AbstractContextManager[Any]
) -> tuple[Any, dict[str, Tensor]]:
    """Run the model in its present mode on fake tensors; return its outputs and its state.

    It is a copy that runs, with the same tensors: a model may keep what it computes.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for _, tensor in named})
    state: dict[str, Tensor] = {name: _fake(mode, tensor) for name, tensor in named}
    args, kwargs = _fake(mode, split_inputs(inputs))
    with ExitStack() as stack:
        contexts: list[AbstractContextManager[Any]] = [attention_as_products(), any_batch()]
        for context in (*contexts, fake_errors_silent(), mode, *watching):
            stack.enter_context(context)
        return torch.func.functional_call(twin, state, args, kwargs), state


@contextmanager
def any_batch() -> Iterator[None]:
    """Let layers that normalise by the batch take one sample: their cost is the same."""
    checks = {name: getattr(F, name) for name in ("_verify_batch_size", "_verify_spatial_size")}
    for name in checks:
        setattr(F, name, lambda size: None)
    try:
        yield
    finally:
        for name, check in checks.items():
            setattr(F, name, check)


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    def fake(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor.detach(), static_shapes=True)

    return pytree.tree_map_only(Tensor, fake, value)


def count_float(model: nn.Module, inputs: Inputs) -> FloatCount:
    """Run the float model in evaluation on fake tensors and return what it did.

    Raises:
        LawError: the two counters of MACs disagree.
    """
    model.eval()
    watch, counter = Watch(), FlopCounterMode(display=False)
    with torch.no_grad():
        _run_copy(model, inputs)
        outputs, state = run_fake(model, inputs, counter, watch)
    watch.macs(counter, type(model).__name__)
    macs, seen = watch.needed(outputs)
    tables = [
        (name, buffer)
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and "running_" not in name
    ]
    read = {
        name: tensor.numel()
        for name, tensor in [*model.named_parameters(), *tables]
        if id(state[name]) in seen
    }
    return FloatCount(macs, read, frozenset(name for name, _ in named_tensors(model)))


def _run_copy(model: nn.Module, inputs: Inputs) -> None:
    """Run a copy, so that caches of the model's functions hold tensors with data, not fake ones."""
    tensors = {id(tensor): tensor for tensor in model.parameters()}
    args, kwargs = split_inputs(inputs)
    with any_batch():
        copy.deepcopy(model, tensors)(*copy.deepcopy(args), **copy.deepcopy(kwargs))


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


def count_nodes(gm: fx.GraphModule, inputs: Inputs) -> dict[fx.Node, NodeCount]:
    """Run a prepared graph in evaluation node by node; quantizers pass their tensor through.

    Raises:
        LawError: the two counters of MACs disagree.
    """
    args, kwargs = split_inputs(inputs)
    given = bound_inputs(gm, *args, **kwargs).arguments
    values: dict[fx.Node, Any] = {}
    counts: dict[fx.Node, NodeCount] = {}
    runner = _Runner(gm)
    with runner.running():
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = _fake(runner.mode, given[str(node.target).lstrip("*")])
                continue
            watch, counter = Watch(), FlopCounterMode(display=False)
            with counter, watch:
                values[node] = runner.run(node, values)
            macs = watch.macs(counter, node.format_node() or node.name)
            counts[node] = NodeCount(macs, tuple(watch.computing))
    return counts


def constants(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """Return the values, without data, that a prepared graph computes from its state alone.

    What a quantizer returns is not followed further.
    """
    values: dict[fx.Node, Any] = {}
    runner = _Runner(gm)
    with runner.running():
        for node in gm.graph.nodes:
            reads = node.all_input_nodes
            computed = bool(reads) and node.op.startswith("call") and {*reads} <= {*values}
            if node.op == "get_attr" or (computed and not is_quantizer(gm, node)):
                values[node] = runner.run(node, values)
    return values


def is_quantizer(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node calls a quantizer."""
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), Quantizer)


class _Runner:
    """Runs the nodes of a prepared graph on fake tensors."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.mode = gm, FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.mode, torch.no_grad(), attention_as_products(), any_batch():
            yield

    def run(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        given: Any = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = given
        target = str(node.target)
        if node.op == "output":
            return args[0]
        if node.op == "get_attr":
            return _fake(self.mode, find_attribute(self.gm, target))
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "call_function":
            if is_recurrent(node):  # what is quantized inside passes through as well
                kwargs = {**kwargs, INSIDE: None}
            return node.target(*args, **kwargs)  # type: ignore[operator]
        module = self.gm.get_submodule(target)
        if isinstance(module, AttentionQuantizer):
            return F.scaled_dot_product_attention(*args, **kwargs)
        return args[0] if isinstance(module, Quantizer) else module(*args, **kwargs)
