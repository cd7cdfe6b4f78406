"""Recurrent layers and cells of torch.nn in a graph: opening them, and what their products read."""

import inspect
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import fx, nn
from torch.nn.utils.rnn import PackedSequence

from cgmq_fx.cost.operation import Operation
from cgmq_fx.passes.meta import IS_CONSTANT, OP_INFO, VALUE, WORK, OperandRef, OpInfo, TensorInfo
from cgmq_fx.passes.record import Recorder
from cgmq_fx.recurrence import CELL_PRODUCTS, Product, Recurrence
from cgmq_fx.recurrent import CELL_KERNELS, LAYER_KERNELS, recurrent, recurrent_cell

_LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
_CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
#: Functions that open to these layers and cells.
FUNCTIONS: frozenset[Any] = frozenset({recurrent, recurrent_cell})
#: Keyword of these functions for what quantizes the tensors inside, by name.
INSIDE = "quantizers"

_DATA, _WEIGHTS = (0, "data"), (2, "weights")
_OPTIONS = tuple(Recurrence.__dataclass_fields__)
_CELL_MODES: Mapping[Any, str] = MappingProxyType({nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"})
_MODE_OF_LAYER: Mapping[Any, str] = {kernel: mode for mode, kernel in LAYER_KERNELS.items()}
_MODE_OF_CELL: Mapping[Any, str] = {kernel: mode for mode, kernel in CELL_KERNELS.items()}
_LAYER_ARGUMENTS = 9
_PACKED = "its input is a packed sequence, whose batch changes with time"


def why_closed(gm: fx.GraphModule, node: fx.Node) -> str:
    """Return why a recurrent layer or cell is not opened; empty where it can be."""
    if node.op == "call_function":
        return "" if is_open_kernel(node) else _PACKED
    module = gm.get_submodule(str(node.target))
    why = ""
    if type(module) not in (*_LAYERS, *_CELLS) or "forward" in vars(module):
        why = f"its forward may be any, that of {type(module).__qualname__} is not one of torch.nn"
    elif module._forward_hooks or module._forward_pre_hooks:
        why = "it has hooks"
    elif module._backward_hooks or module._backward_pre_hooks:
        why = "it has hooks on its gradients"
    elif _reads_packed(node):
        why = _PACKED
    return why and f"the layer '{node.target}' is not opened: {why}"


def _reads_packed(node: fx.Node) -> bool:
    data = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(data, fx.Node):
        return True
    name = getattr(data.target, "__name__", "")
    return data.target is PackedSequence or name in ("pack_padded_sequence", "pack_sequence")


def open_recurrent(
    twin: Any, mode: fx.Proxy, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> fx.Proxy:
    """Record what a recurrent layer or cell does, as one call that is given its weights.

    Args:
        twin: the module, with proxies in place of its parameters.
        mode: the proxy of the training mode.
        args: of the module's call, with proxies.
        kwargs: likewise.
    """
    bound = inspect.signature(type(twin).forward).bind(twin, *args, **kwargs)
    data, hx = bound.arguments["input"], bound.arguments.get("hx")
    create = mode.tracer.create_proxy
    if isinstance(twin, nn.RNNBase):
        options = {name: getattr(twin, name) for name in _OPTIONS if name != "projects"}
        options["projects"] = twin.proj_size > 0
        weights = [getattr(twin, name) for name in twin._flat_weights_names]
        return create(
            "call_function", recurrent, (data, hx, weights), {"training": mode, **options}
        )
    cell_mode = _CELL_MODES.get(type(twin)) or f"RNN_{twin.nonlinearity.upper()}"
    weights = [twin.weight_ih, twin.weight_hh, *((twin.bias_ih, twin.bias_hh) if twin.bias else ())]
    return create("call_function", recurrent_cell, (data, hx, weights), {"mode": cell_mode})


def is_open_kernel(node: fx.Node) -> bool:
    """Tell whether `node` calls a recurrent kernel of torch in a way that `open_kernel` covers.

    It does in a layer that is derived from one of torch's, or that is parametrized.
    """
    if node.op != "call_function" or node.kwargs:
        return False
    if node.target in _MODE_OF_CELL:
        weights: Any = [item for item in node.args[2:] if item is not None]
        return len(weights) in (2, 4) and _are_nodes((node.args[0], *weights))
    if node.target not in _MODE_OF_LAYER or len(node.args) != _LAYER_ARGUMENTS:
        return False
    data, _, weights, *options = node.args
    is_padded = isinstance(weights, list | tuple) and _are_nodes((data, *weights))
    return is_padded and not any(isinstance(options[place], fx.Node) for place in (0, 1, 2, 4, 5))


def _are_nodes(items: Iterable[Any]) -> bool:
    return all(isinstance(item, fx.Node) for item in items)


def open_kernel(node: fx.Node, recorder: Recorder) -> Any:
    """Record what a call of a kernel does, for which `is_open_kernel`."""
    args: Any = fx.node.map_arg(node.args, recorder.proxy)  # type: ignore[arg-type]
    if node.target in _MODE_OF_CELL:
        given = (*args[:2], [item for item in args[2:] if item is not None])
        options = {"mode": _MODE_OF_CELL[node.target]}
        return recorder.create_proxy("call_function", recurrent_cell, given, options)
    bias, num_layers, dropout, training, bidirectional, batch_first = args[3:]
    per_direction = len(args[2]) // (num_layers * (2 if bidirectional else 1))
    mode = _MODE_OF_LAYER[node.target]
    options = {
        "training": training,
        "mode": mode,
        "num_layers": num_layers,
        "bias": bias,
        "batch_first": batch_first,
        "dropout": dropout,
        "bidirectional": bidirectional,
        "projects": per_direction % 2 == 1,
    }
    result: Any = recorder.create_proxy("call_function", recurrent, args[:3], options)
    return (result[0], result[1][0], result[1][1]) if mode == "LSTM" else result


def is_recurrent(node: fx.Node) -> bool:
    """Tell whether `node` calls an opened recurrent layer or cell."""
    return node.op == "call_function" and node.target in FUNCTIONS


def products_of(node: fx.Node) -> tuple[Product, ...]:
    """Return the products of an opened recurrent layer or cell, in the order of its operations."""
    if node.target is recurrent_cell:
        return CELL_PRODUCTS
    options: dict[str, Any] = {name: node.kwargs[name] for name in _OPTIONS}
    return Recurrence(**options).products


def recurrent_refs(node: fx.Node) -> tuple[OperandRef, ...]:
    """Return the operands that stand outside: the input and every weight."""
    data = node.args[0]
    assert isinstance(data, fx.Node)
    given: Any = node.args[2]
    places = dict.fromkeys(product.weight for product in products_of(node))
    weights = (
        OperandRef(*_WEIGHTS, is_weight=IS_CONSTANT.get(given[place]), element=place)
        for place in places
    )
    return OperandRef(*_DATA, is_weight=IS_CONSTANT.get(data)), *weights


def product_operands(node: fx.Node) -> tuple[tuple[fx.Node, fx.Node | None], ...]:
    """Return the weight of each product, and its tensor or the quantizer inside; None: no such."""
    weights: Any = node.args[2]
    inside: Any = node.kwargs.get(INSIDE, {})
    data: Any = node.args[0]
    return tuple(
        (weights[item.weight], data if item.operand is None else inside.get(item.operand))
        for item in products_of(node)
    )


def elements_inside(node: fx.Node) -> dict[str, int]:
    """Return by site how many elements each tensor inside has, over all steps."""
    if OP_INFO.get(node).operands == "none":
        return {}
    operands = zip(products_of(node), product_operands(node), WORK.get(node), strict=True)
    return {
        str(read.target).rpartition(".")[2]: operation.input_elements
        for product, (_, read), operation in operands
        if product.operand is not None and read is not None
    }


def recurrent_work(node: fx.Node, info: OpInfo, name: str) -> tuple[Operation, ...]:
    """Return one operation of class ``linear`` for each product, over all steps of time."""
    given: Any = node.args[2]
    data, *weights = (_shape(item) for item in (node.args[0], *given))
    steps = math.prod(data[:-1])
    bias = node.kwargs.get("bias", len(weights) > len(CELL_PRODUCTS))
    operations = []
    for product in products_of(node):
        out_features, in_features = weights[product.weight]
        attributes = {
            "in_features": in_features,
            "out_features": out_features,
            "bias": bias is True and not product.name.startswith("projection"),
        }
        operations.append(
            Operation(
                f"{name}.{product.name}",
                "linear",
                info.target,
                "weight",
                steps * in_features * out_features,
                steps * out_features,
                steps * in_features,
                in_features * out_features,
                MappingProxyType(attributes),
            )
        )
    return tuple(operations)


def _shape(node: Any) -> tuple[int, ...]:
    value = VALUE.get(node)
    assert isinstance(value, TensorInfo)
    return value.shape
