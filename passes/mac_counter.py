"""Counts multiply-accumulates by running, for what is not computed from shapes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_Shape = Sequence[int]


def mac_counter() -> FlopCounterMode:
    """Return a mode that counts two for each MAC, also where torch's own counter omits them."""
    return FlopCounterMode(display=False, custom_mapping=dict(_OMITTED))


def counted_macs(counter: FlopCounterMode) -> int:
    """Return the MACs that `counter` saw."""
    return counter.get_total_flops() // 2


def _product_with_vector(matrix: _Shape, vector: _Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _added_product_with_vector(
    bias: _Shape, matrix: _Shape, vector: _Shape, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(matrix)


def _added_batch_of_products(bias: _Shape, lhs: _Shape, rhs: _Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(lhs) * rhs[-1]


def _bilinear(lhs: _Shape, weight: _Shape, rhs: _Shape, *_: Any, **__: Any) -> int:
    outputs, first, second = weight
    return 2 * math.prod(lhs[:-1]) * outputs * (first * second + second)


def _recurrent_layer(
    data: _Shape, input_weight: _Shape, hidden_weight: _Shape, *_: Any, **__: Any
) -> int:
    steps = math.prod(data[:-1])
    return 2 * steps * (math.prod(input_weight) + math.prod(hidden_weight))


def _attention(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _convolution_tbc(data: _Shape, weight: _Shape, *_: Any, out_shape: _Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape[:2]) * math.prod(weight)


def _distances(lhs: _Shape, rhs: _Shape, *_: Any, out_shape: _Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) * lhs[-1]


_ATEN = torch.ops.aten
_OMITTED: Mapping[Any, Callable[..., int]] = {
    _ATEN.mv: _product_with_vector,
    _ATEN.dot: _product_with_vector,
    _ATEN.vdot: _product_with_vector,
    _ATEN.addmv: _added_product_with_vector,
    _ATEN.addbmm: _added_batch_of_products,
    _ATEN._trilinear: _bilinear,
    _ATEN.mkldnn_rnn_layer: _recurrent_layer,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN.conv_tbc: _convolution_tbc,
    _ATEN._cdist_forward: _distances,
    _ATEN._euclidean_dist: _distances,
}
