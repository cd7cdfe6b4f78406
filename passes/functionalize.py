"""Opens layers with parameters, so that a weight is an edge of the graph like any other tensor."""

import copy
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.meta import KEPT_CLOSED, MODULE_PATH
from cgmq_fx.passes.multi_head_attention import can_open, open_attention
from cgmq_fx.passes.record import Recorder, erase_between
from cgmq_fx.passes.recurrent import is_open_kernel, open_kernel, open_recurrent, why_closed
from cgmq_fx.passes.training_mode import add_mode, mode_target

# Layers whose forward depends on the training mode or changes state stay modules.
_CLOSED = (_BatchNorm, _InstanceNorm)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@final
@dataclass(frozen=True)
class Functionalize(GraphPass):
    """Replace each call of a layer that owns parameters by the functions that it calls.

    The layer's parameters become `get_attr` nodes under their old names, so that every key of the
    state dict stays. Calls of torch's recurrent kernels become the functions that recurrent layers
    are opened to. Layers with a train/eval mode, with hooks, or whose forward cannot be recorded
    stay.

    Numerics: exact.
    """

    name: ClassVar[str] = "functionalize"

    def run(self, gm: fx.GraphModule) -> bool:
        """Open every layer that can be opened; see `GraphPass.run`."""
        opened = [_open_node(gm, node) for node in list(gm.graph.nodes)]
        return any(opened)


def _open_node(gm: fx.GraphModule, node: fx.Node) -> bool:
    if is_open_kernel(node):
        return _replace(node, lambda recorder: open_kernel(node, recorder))
    if node.op != "call_module" or KEPT_CLOSED.has(node):
        return False
    module = gm.get_submodule(str(node.target))
    if not _is_open(gm, module, node):
        return False
    return _replace(node, lambda recorder: _record(gm, module, node, recorder))


def _replace(node: fx.Node, record: Callable[[Recorder], Any]) -> bool:
    """Put what `record` records in place of `node`; return False where that fails."""
    graph, before = node.graph, node.prev
    try:
        with graph.inserting_before(node):
            replaced = _as_nodes(record(Recorder(graph)), graph)
    except Exception:  # a forward that cannot be recorded: the layer stays closed, and is priced so
        erase_between(before, node)
        return False
    node.replace_all_uses_with(replaced)
    graph.erase_node(node)
    name = str(node.target) if node.op == "call_module" else node.name
    path, opened = MODULE_PATH.find(node) or name, replaced
    while opened is not before:
        MODULE_PATH.set(opened, path)
        opened = opened.prev
        if opened.next.op == "get_attr" and not opened.next.users:
            graph.erase_node(opened.next)
    if replaced.target is make_tuple:
        _pick(replaced, before)
    return True


def _pick(made: fx.Node, before: fx.Node) -> None:
    """Let what takes single results out of `made` read them, and erase those that nothing reads.

    A result that only stands in a tuple, such as attention weights that nobody asks for, would be
    quantized and priced, and exporters would leave it out. What was recorded stands behind
    `before`.
    """
    for user in list(made.users):
        index = user.args[1] if user.target is operator.getitem else None
        item = made.args[index] if isinstance(index, int) else None
        if isinstance(item, fx.Node):
            user.replace_all_uses_with(item)
            made.graph.erase_node(user)
    unread = [] if made.users else [made]
    while unread:
        node = unread.pop()
        if not (node.users or node._erased or node <= before or _does_more(node)):
            unread.extend(node.all_input_nodes)
            made.graph.erase_node(node)


def _does_more(node: fx.Node) -> bool:
    """Tell whether a call that torch's own layers make does more than return something."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    return node.is_impure() or node.op == "call_module" or target.endswith("_")


def _is_open(gm: fx.GraphModule, module: nn.Module, node: fx.Node) -> bool:
    if isinstance(module, _RECURRENT):
        return not why_closed(gm, node)
    if isinstance(module, nn.MultiheadAttention):
        return can_open(module) and not _has_hooks(module)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return False  # renormalises its weight in place
    return (
        type(module).__module__.startswith("torch.nn")
        and bool(module._parameters)
        and not isinstance(module, _CLOSED)
        and not parametrize.is_parametrized(module)
        and not isinstance(module, nn.modules.lazy.LazyModuleMixin)
        and not _has_hooks(module)
        and "forward" not in vars(module)
    )


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any((*hooks, module._backward_hooks, module._backward_pre_hooks))


def _record(gm: fx.GraphModule, module: nn.Module, node: fx.Node, recorder: Recorder) -> Any:
    twin = _with_proxies(module, str(node.target), recorder)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), recorder.proxy)  # type: ignore[arg-type]
    if isinstance(module, _ConvTransposeNd) and _output_size(node) is not None:
        twin.__dict__["_output_padding"] = _recorded(recorder, find_output_padding)
    if isinstance(module, _RECURRENT):
        return open_recurrent(twin, _mode_node(gm, node, recorder), args, kwargs)
    if not isinstance(module, nn.MultiheadAttention):
        return twin.forward(*args, **kwargs)
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
    mode = _mode_node(gm, node, recorder) if module.dropout > 0.0 else None
    return open_attention(twin, mode, **arguments)


def _output_size(node: fx.Node) -> Any:
    return node.kwargs.get("output_size", node.args[1] if len(node.args) > 1 else None)


def _recorded(recorder: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    def record(*args: Any) -> fx.Proxy:
        return recorder.create_proxy("call_function", function, args, {})

    return record


def find_output_padding(data: torch.Tensor, output_size: Sequence[int], *geometry: Any) -> Any:
    """Return the `output_padding` with which a transposed convolution gives `output_size`."""
    # `self` is read only where no size is asked for.
    return _ConvTransposeNd._output_padding(cast(Any, None), data, list(output_size), *geometry)


def _mode_node(gm: fx.GraphModule, layer: fx.Node, recorder: Recorder) -> fx.Proxy:
    """Return the mode of the layer that `layer` calls."""
    target = mode_target(str(layer.target))
    for node in gm.graph.find_nodes(op="call_module", target=target):
        return recorder.proxy(node)
    add_mode(gm, str(layer.target))
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    with gm.graph.inserting_before(first):
        return recorder.proxy(gm.graph.call_module(target))


def _with_proxies(module: nn.Module, path: str, recorder: Recorder) -> nn.Module:
    """Return a shallow twin of `module` whose parameters and buffers are proxies."""
    twin = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        named = getattr(module, kind)
        proxies = {
            name: value
            if value is None
            else recorder.create_proxy("get_attr", f"{path}.{name}", (), {})
            for name, value in named.items()
        }
        twin.__dict__[kind] = proxies
    children = {
        name: child if child is None else _with_proxies(child, f"{path}.{name}", recorder)
        for name, child in module._modules.items()
    }
    twin.__dict__["_modules"] = children
    return twin


def _as_nodes(result: Any, graph: fx.Graph) -> fx.Node:
    if isinstance(result, fx.Proxy):
        return result.node
    items = tuple(item.node if isinstance(item, fx.Proxy) else item for item in result)
    return graph.call_function(make_tuple, items)


def make_tuple(*items: object) -> tuple[object, ...]:
    """Return `items` as one value, for layers that return several."""
    return items
