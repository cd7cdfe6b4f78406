"""Which operation class of cgmq_fx a call in a graph belongs to.

The classes are the vocabulary of cost tables, reports and the coverage ledger. A call that is not
listed is ``other``: it is never quantized, and its work is counted by running it.
"""

import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload

from cgmq_fx.attention import AttentionQuantizer
from cgmq_fx.frozen import FrozenAttention, FrozenQuantizer, FrozenWeight
from cgmq_fx.passes.export_inputs import BuildOutput, InputStructure
from cgmq_fx.passes.functionalize import find_output_padding, make_tuple
from cgmq_fx.passes.guards import (
    TrainingMode,
    change_in_mode_,
    check_concrete,
    check_mode,
    check_same,
    kind_of,
    select_mode,
    set_autocast,
    set_gradients,
    write_in_training,
)
from cgmq_fx.passes.multi_head_attention import merge_masks
from cgmq_fx.passes.products import FUNCTIONS, METHODS
from cgmq_fx.passes.shape_guard import ShapeGuard
from cgmq_fx.passes.state import assign_
from cgmq_fx.quantizers import Quantizer
from cgmq_fx.recurrent import CELL_KERNELS, LAYER_KERNELS, recurrent, recurrent_cell

#: Operations whose output holds elements of their input, rearranged: they compute nothing.
REARRANGING = "reshape"

_FUNCTIONS: Mapping[str, tuple[Any, ...]] = {
    "conv1d": (F.conv1d,),
    "conv2d": (F.conv2d,),
    "conv3d": (F.conv3d,),
    "conv_transpose1d": (F.conv_transpose1d,),
    "conv_transpose2d": (F.conv_transpose2d,),
    "conv_transpose3d": (F.conv_transpose3d,),
    "linear": (F.linear, recurrent, recurrent_cell),
    "bilinear": (F.bilinear,),
    "rnn": (*LAYER_KERNELS.values(), *CELL_KERNELS.values()),
    "matmul": (
        torch.matmul, torch.bmm, torch.mm, torch.mv, operator.matmul, torch.baddbmm, torch.addmm,
        torch.einsum, torch.linalg.matmul, *FUNCTIONS,
    ),
    "attention": (F.scaled_dot_product_attention,),
    "embedding": (F.embedding, F.embedding_bag),
    "add": (operator.add, operator.iadd, torch.add),
    "sub": (operator.sub, operator.isub, torch.sub, torch.subtract),
    "mul": (operator.mul, operator.imul, torch.mul, torch.multiply),
    "div": (operator.truediv, operator.itruediv, torch.div, torch.true_divide),
    "cat": (torch.cat, torch.concat, torch.concatenate, torch.stack),
    "max_pool": (
        F.max_pool1d, F.max_pool2d, F.max_pool3d,
        F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
        torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    ),
    "avg_pool": (
        F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
        F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    ),
    "activation": (
        F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.gelu, F.silu, F.hardswish,
        F.hardsigmoid, F.hardtanh, F.leaky_relu, F.elu, F.selu, F.celu, F.mish, F.softplus,
        F.sigmoid, torch.sigmoid, F.tanh, torch.tanh, F.prelu, F.glu, F.logsigmoid, F.softsign,
        F.threshold,
    ),
    "softmax": (F.softmax, torch.softmax, F.log_softmax, torch.log_softmax, F.softmin),
    "batch_norm": (F.batch_norm,),
    "layer_norm": (F.layer_norm,),
    "group_norm": (F.group_norm,),
    "instance_norm": (F.instance_norm,),
    "rms_norm": (F.rms_norm,),
    "dropout": (
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
        torch.feature_dropout,
    ),
    "interpolate": (F.interpolate, F.upsample, F.grid_sample),
    "reduce": (
        F.fold,  # adds up what overlaps
        torch.mean, torch.sum, torch.amax, torch.amin, torch.max, torch.min, torch.prod, torch.norm,
    ),
    "elementwise": (
        F.normalize, torch.exp, torch.log, torch.sqrt, torch.rsqrt, torch.pow, torch.abs,
        torch.clamp, torch.neg, operator.neg, operator.pow, torch.maximum, torch.minimum,
        torch.where, torch.square, operator.floordiv, operator.mod, torch.sin, torch.cos,
        torch.masked_fill,
    ),
    REARRANGING: (
        operator.getitem, operator.setitem, getattr, len, torch.flatten, torch.reshape,
        torch.permute, torch.transpose, torch.chunk, torch.split, torch.unbind, torch.squeeze,
        torch.unsqueeze, torch.roll, torch.swapaxes, torch.movedim, torch.unflatten, F.pad,
        F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, F.unfold, torch.tile,
        torch.index_select, torch.broadcast_to, torch.clone, torch.arange, torch.zeros, torch.ones,
        torch.full, torch.zeros_like, torch.ones_like, torch._assert, make_tuple, tuple, list,
        OrderedDict, find_output_padding, check_same, select_mode, merge_masks, torch.flip,
        torch.narrow, change_in_mode_,
        OrderedDict, find_output_padding, check_same, kind_of, check_mode, check_concrete,
        set_gradients, set_autocast, assign_, select_mode, write_in_training,
        merge_masks, torch.flip, torch.narrow,
    ),
}  # fmt: skip

_METHODS: Mapping[str, tuple[str, ...]] = {
    "matmul": ("matmul", "bmm", "mm", "mv", "__matmul__", "baddbmm", "addmm", *METHODS),
    "add": ("add", "add_", "__add__", "__radd__"),
    "sub": ("sub", "sub_", "subtract"),
    "mul": ("mul", "mul_", "multiply"),
    "div": ("div", "div_", "true_divide"),
    "activation": ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_"),
    "softmax": ("softmax", "log_softmax"),
    "reduce": ("mean", "sum", "amax", "amin", "max", "min", "prod", "norm", "var", "std"),
    "elementwise": (
        "exp", "log", "sqrt", "rsqrt", "pow", "abs", "clamp", "neg", "masked_fill", "square",
        "clamp_", "masked_fill_", "__neg__",
    ),
    REARRANGING: (
        "view", "reshape", "flatten", "permute", "transpose", "contiguous", "chunk", "split",
        "unbind", "squeeze", "unsqueeze", "size", "dim", "expand", "expand_as", "repeat", "to",
        "type_as", "float", "clone", "detach", "unflatten", "view_as", "reshape_as", "narrow",
        "index_select", "roll", "flip", "new_zeros", "new_ones", "new_full", "t", "numel",
        "movedim", "swapaxes", "type", "unfold",
    ),
}  # fmt: skip

_MODULES: Mapping[str, tuple[type[nn.Module], ...]] = {
    "batch_norm": (nn.modules.batchnorm._BatchNorm,),
    "instance_norm": (nn.modules.instancenorm._InstanceNorm,),
    "layer_norm": (nn.LayerNorm,),
    "group_norm": (nn.GroupNorm,),
    "rms_norm": (nn.RMSNorm,),
    "dropout": (nn.modules.dropout._DropoutNd,),
    "max_pool": (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
    "avg_pool": (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd),
    "softmax": (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin),
    "activation": (
        nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
        nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.PReLU,
        nn.GLU, nn.LogSigmoid, nn.Softsign, nn.Threshold,
    ),
    "interpolate": (nn.Upsample,),
    "reduce": (nn.Fold,),
    "rnn": (nn.RNNBase, nn.RNNCellBase),
    "attention": (AttentionQuantizer, FrozenAttention),
    REARRANGING: (
        nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle,
        nn.ChannelShuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
        nn.modules.padding._ConstantPadNd, nn.Unfold, nn.modules.padding._ReflectionPadNd,
        nn.modules.padding._ReplicationPadNd, TrainingMode, Quantizer, FrozenWeight,
        FrozenQuantizer, BuildOutput, InputStructure, ShapeGuard,
    ),
}  # fmt: skip

_CLASS_OF_FUNCTION: Mapping[Any, str] = {f: op for op, fs in _FUNCTIONS.items() for f in fs}
_CLASS_OF_METHOD: Mapping[str, str] = {m: op for op, ms in _METHODS.items() for m in ms}
# ATen operators, as torch.export records them, where their names are not those of a function.
_OPERATORS: Mapping[str, tuple[str, ...]] = {
    "max_pool": ("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    "interpolate": ("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"),
    "reduce": ("mean", "sum", "amax", "amin", "prod", "var", "std", "linalg_vector_norm"),
    "rnn": (
        "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
        "rnn_relu_cell",
    ),
    REARRANGING: (
        "slice", "select", "index", "alias", "lift_fresh_copy", "sym_size", "sym_numel",
        "sym_stride", "sym_storage_offset", "_assert_scalar", "_assert_async",
        "_assert_tensor_metadata", "mT", "mH", "numpy_T", "adjoint", "sym_constrain_range",
        "sym_constrain_range_for_size", "diagonal", "view_as_real", "view_as_complex", "empty",
        "unsafe_split", "unsafe_chunk", "constant_pad_nd", "detach_copy", "new_empty", "empty_like",
        "copy_", "fill_", "zero_",
    ),
}  # fmt: skip
_CLASS_OF_OPERATOR: Mapping[str, str] = {o: op for op, os in _OPERATORS.items() for o in os}


def class_of_function(function: Callable[..., Any]) -> str:
    """Return the operation class of a function, or ``other``."""
    if isinstance(function, OpOverload):
        return _class_of_operator(function._opname)
    return _CLASS_OF_FUNCTION.get(function, "other")


def _class_of_operator(name: str) -> str:
    if name in _CLASS_OF_OPERATOR:
        return _CLASS_OF_OPERATOR[name]
    if name.startswith(("upsample_", "_upsample_")):
        return "interpolate"
    plain = name.removesuffix("_")
    for place in (torch, F):
        found = _CLASS_OF_FUNCTION.get(getattr(place, plain, None))
        if found is not None:
            return found
    return class_of_method(name)


def class_of_method(method: str) -> str:
    """Return the operation class of a tensor method, or ``other``."""
    found = _CLASS_OF_METHOD.get(method)
    return found or _CLASS_OF_METHOD.get(method.removesuffix("_"), "other")


def class_of_module(module: nn.Module) -> str:
    """Return the operation class of a module, or ``other``."""
    for op, types in _MODULES.items():
        if isinstance(module, types):
            return op
    return "other"
