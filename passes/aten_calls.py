"""What ATen operators are called at the level of torch: one function for each way to be called.

Each function takes the arguments of the operator by name, as its schema has them, and returns what
to call instead: a function or the name of a method, positional and keyword arguments; None where
the arguments have no such form.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._ops import OpOverload

from cgmq_fx.passes.meta import EXPORTED

Call = tuple[Callable[..., Any] | str, tuple[Any, ...], dict[str, Any]]
Maker = Callable[[dict[str, Any]], Call | None]
_END = 2**63 - 1


def arguments_of(node: fx.Node, target: OpOverload) -> dict[str, Any]:
    """Return the arguments of a call by name, those that are not given at their default."""
    given = {
        argument.name: argument.default_value if argument.has_default_value() else None
        for argument in target._schema.arguments
    }
    given.update(zip(given, node.args, strict=False))
    given.update(node.kwargs)
    return given


def _to(function: Any, *names: str, **keywords: str) -> Maker:
    """Call `function` with the named arguments, by place and by keyword."""

    def make(given: dict[str, Any]) -> Call:
        args = tuple(_plain(given[name]) for name in names)
        return function, args, {key: _plain(given[name]) for key, name in keywords.items()}

    return make


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) and not _holds_node(value) else value


def _holds_node(value: list[Any]) -> bool:
    return any(isinstance(item, fx.Node | list) for item in value)


def _in_place(function: Any, *names: str) -> Maker:
    """Call `function` with the named arguments and ``inplace=True``."""

    def make(given: dict[str, Any]) -> Call:
        return function, tuple(given[name] for name in names), {"inplace": True}

    return make


def _operator(function: Callable[[Any, Any], Any], *, swapped: bool = False) -> Maker:
    """Call a Python operator; a factor on the second operand has none."""

    def make(given: dict[str, Any]) -> Call | None:
        if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
            return None
        pair = (given["self"], given["other"])
        return function, pair[::-1] if swapped else pair, {}

    return make


def _conv(function: Any) -> Maker:
    return _to(function, "input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _conv_transpose(function: Any) -> Maker:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    return _to(function, *names)


def _pool(function: Any, *names: str) -> Maker:
    def make(given: dict[str, Any]) -> Call:
        stride = given["stride"] or None  # an empty list is the kernel's size
        rest = tuple(_plain(given[name]) for name in names)
        return function, (given["self"], _plain(given["kernel_size"]), _plain(stride), *rest), {}

    return make


def _max_pool(function: Any) -> Maker:
    return _pool(function, "padding", "dilation", "ceil_mode")


def _embedding(given: dict[str, Any]) -> Call:
    padding = None if given["padding_idx"] == -1 else given["padding_idx"]
    keywords = {"scale_grad_by_freq": given["scale_grad_by_freq"], "sparse": given["sparse"]}
    keywords = {key: value for key, value in keywords.items() if value}
    return F.embedding, (given["indices"], given["weight"], padding), keywords


def _attention(given: dict[str, Any]) -> Call:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    keywords = {"scale": given["scale"], "enable_gqa": given["enable_gqa"]}
    keywords = {key: value for key, value in keywords.items() if value not in (None, False)}
    return F.scaled_dot_product_attention, tuple(given[name] for name in names), keywords


def _einsum(given: dict[str, Any]) -> Call | None:
    if given["path"] is not None:
        return None
    return torch.einsum, (given["equation"], *given["tensors"]), {}


def _tensordot(given: dict[str, Any]) -> Call | None:
    dims = (tuple(given["dims_self"]), tuple(given["dims_other"]))
    return torch.tensordot, (given["self"], given["other"], dims), {}


def _elu(given: dict[str, Any]) -> Call | None:
    if (given["scale"], given["input_scale"]) != (1, 1):
        return None
    return F.elu, (given["self"], given["alpha"]), {}


def _slice(given: dict[str, Any]) -> Call | None:
    start, end = given["start"], given["end"]
    start = None if isinstance(start, int) and start == 0 else start
    end = None if isinstance(end, int) and end >= _END else end
    step = None if given["step"] == 1 else given["step"]
    return _item(given, slice(start, end, step))


def _select(given: dict[str, Any]) -> Call | None:
    return _item(given, given["index"])


def _item(given: dict[str, Any], index: Any) -> Call | None:
    exported = EXPORTED.find(given["self"])
    if exported is None:
        return None
    axis = given["dim"] % exported.rank
    return operator.getitem, (given["self"], (*[slice(None)] * axis, index)), {}


def _index(given: dict[str, Any]) -> Call:
    indices = tuple(slice(None) if item is None else item for item in given["indices"])
    return operator.getitem, (given["self"], indices), {}


def _converted(given: dict[str, Any]) -> Call | None:
    """Convert to a type; where the tensor lives is the business of whoever moves the model."""
    exported = EXPORTED.find(given["self"])
    moved = exported is None or given.get("device") not in (None, exported.device)
    keeps_layout = given.get("layout") in (None, torch.strided)
    if moved or given.get("memory_format") is not None or not keeps_layout:
        return None
    dtype = given.get("dtype") or exported.dtype if exported is not None else None
    return "to", (given["self"], dtype), {"copy": True} if given.get("copy") else {}


def _clone(given: dict[str, Any]) -> Call:
    layout = given["memory_format"]
    return torch.clone, (given["self"],), {} if layout is None else {"memory_format": layout}


def _dropout(function: Any, *, inplace: bool = False) -> Maker:
    def make(given: dict[str, Any]) -> Call:
        args = (given.get("input", given.get("self")), given["p"], given["train"])
        return function, args, {"inplace": True} if inplace else {}

    return make


def _pad(mode: str) -> Maker:
    def make(given: dict[str, Any]) -> Call:
        value = (given["value"],) if "value" in given else ()
        padding = given["padding"] if "padding" in given else given["pad"]
        return F.pad, (given["self"], _plain(padding), mode, *value), {}

    return make


def _any_pad(given: dict[str, Any]) -> Call:
    rest = () if given["value"] is None else (given["value"],)
    return F.pad, (given["self"], _plain(given["pad"]), given["mode"], *rest), {}


def _method(name: str, *names: str) -> Maker:
    def make(given: dict[str, Any]) -> Call:
        return name, (given["self"], *(given[item] for item in names)), {}

    return make


#: Operators by name and overload, or by name where all overloads are called alike.
CALLS: Mapping[str, Maker] = {
    "conv1d": _conv(F.conv1d),
    "conv2d": _conv(F.conv2d),
    "conv3d": _conv(F.conv3d),
    "conv_transpose1d": _conv_transpose(F.conv_transpose1d),
    "conv_transpose2d": _conv_transpose(F.conv_transpose2d),
    "conv_transpose3d": _conv_transpose(F.conv_transpose3d),
    "linear": _to(F.linear, "input", "weight", "bias"),
    "bilinear": _to(F.bilinear, "input1", "input2", "weight", "bias"),
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    "tensordot": _tensordot,
    "layer_norm": _to(F.layer_norm, "input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": _to(F.group_norm, "input", "num_groups", "weight", "bias", "eps"),
    "rms_norm": _to(F.rms_norm, "input", "normalized_shape", "weight", "eps"),
    "batch_norm": _to(
        F.batch_norm,
        *("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    ),
    "instance_norm": _to(
        F.instance_norm,
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("use_input_stats", "momentum", "eps"),
    ),
    "dropout": _dropout(F.dropout),
    "dropout_": _dropout(F.dropout, inplace=True),
    "alpha_dropout": _dropout(F.alpha_dropout),
    "feature_dropout": _dropout(torch.feature_dropout),
    "feature_alpha_dropout": _dropout(F.feature_alpha_dropout),
    "softmax.int": _to(F.softmax, "self", "dim", dtype="dtype"),
    "log_softmax.int": _to(F.log_softmax, "self", "dim", dtype="dtype"),
    "max_pool1d": _max_pool(F.max_pool1d),
    "max_pool2d": _max_pool(F.max_pool2d),
    "max_pool3d": _max_pool(F.max_pool3d),
    "avg_pool1d": _pool(F.avg_pool1d, "padding", "ceil_mode", "count_include_pad"),
    "avg_pool2d": _pool(
        F.avg_pool2d, "padding", "ceil_mode", "count_include_pad", "divisor_override"
    ),
    "avg_pool3d": _pool(
        F.avg_pool3d, "padding", "ceil_mode", "count_include_pad", "divisor_override"
    ),
    "adaptive_avg_pool1d": _to(F.adaptive_avg_pool1d, "self", "output_size"),
    "adaptive_avg_pool2d": _to(F.adaptive_avg_pool2d, "self", "output_size"),
    "adaptive_avg_pool3d": _to(F.adaptive_avg_pool3d, "self", "output_size"),
    "relu": _to(torch.relu, "self"),
    "relu_": _to(torch.relu_, "self"),
    "relu6": _to(F.relu6, "self"),
    "relu6_": _in_place(F.relu6, "self"),
    "gelu": _to(F.gelu, "self", approximate="approximate"),
    "silu": _to(F.silu, "self"),
    "silu_": _in_place(F.silu, "self"),
    "mish": _to(F.mish, "self"),
    "mish_": _in_place(F.mish, "self"),
    "hardswish": _to(F.hardswish, "self"),
    "hardswish_": _in_place(F.hardswish, "self"),
    "hardsigmoid": _to(F.hardsigmoid, "self"),
    "hardsigmoid_": _in_place(F.hardsigmoid, "self"),
    "hardtanh": _to(F.hardtanh, "self", "min_val", "max_val"),
    "hardtanh_": _in_place(F.hardtanh, "self", "min_val", "max_val"),
    "leaky_relu": _to(F.leaky_relu, "self", "negative_slope"),
    "leaky_relu_": _in_place(F.leaky_relu, "self", "negative_slope"),
    "elu": _elu,
    "selu": _to(F.selu, "self"),
    "celu": _to(F.celu, "self", "alpha"),
    "softplus": _to(F.softplus, "self", "beta", "threshold"),
    "prelu": _to(F.prelu, "self", "weight"),
    "glu": _to(F.glu, "self", "dim"),
    "log_sigmoid": _to(F.logsigmoid, "self"),
    "threshold": _to(F.threshold, "self", "threshold", "value"),
    "sigmoid": _to(torch.sigmoid, "self"),
    "tanh": _to(torch.tanh, "self"),
    "add": _operator(operator.add),
    "sub": _operator(operator.sub),
    "rsub": _operator(operator.sub, swapped=True),
    "mul": _operator(operator.mul),
    "div": _operator(operator.truediv),
    "cat": _to(torch.cat, "tensors", "dim"),
    "stack": _to(torch.stack, "tensors", "dim"),
    "pad": _any_pad,
    "constant_pad_nd": _pad("constant"),
    "reflection_pad1d": _pad("reflect"),
    "reflection_pad2d": _pad("reflect"),
    "reflection_pad3d": _pad("reflect"),
    "replication_pad1d": _pad("replicate"),
    "replication_pad2d": _pad("replicate"),
    "replication_pad3d": _pad("replicate"),
    "pixel_shuffle": _to(F.pixel_shuffle, "self", "upscale_factor"),
    "pixel_unshuffle": _to(F.pixel_unshuffle, "self", "downscale_factor"),
    "slice.Tensor": _slice,
    "select.int": _select,
    "index.Tensor": _index,
    "view.default": _method("view", "size"),
    "expand": _method("expand", "size"),
    "repeat": _method("repeat", "repeats"),
    "detach": _method("detach"),
    "to.dtype": _converted,
    "to.device": _converted,
    "to.dtype_layout": _converted,
    "clone": _clone,
    "lift_fresh_copy": _to(torch.clone, "self"),
    "sym_size.int": _method("size", "dim"),
    "sym_numel": _method("numel"),
    "split_with_sizes": _to(torch.split, "self", "split_sizes", "dim"),
}
