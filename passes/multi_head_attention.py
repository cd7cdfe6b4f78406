"""`nn.MultiheadAttention` as projections and attention, so that each product is an operation.

Follows `torch.nn.functional.multi_head_attention_forward` step by step: the same operations in the
same order give the same numbers. Batched inputs only.
"""

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cgmq_fx.passes.guards import check_same


def can_open(attention: nn.MultiheadAttention) -> bool:
    """Tell whether `open_attention` covers the options of `attention`."""
    return attention.bias_k is None and attention.bias_v is None and not attention.add_zero_attn


def merge_masks(
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    query: torch.Tensor,
    num_heads: int,
    per_head: bool,
) -> torch.Tensor | None:
    """Merge the two masks of attention into one additive mask.

    Args:
        attn_mask: ``(target, source)`` or ``(batch * heads, target, source)``; bool or float.
        key_padding_mask: ``(batch, source)``; bool or float.
        query: ``(target, batch, embedding)``, for its dtype and batch.
        num_heads: heads of the attention.
        per_head: the result has separate batch and head axes.
    """
    batch = query.shape[1]
    masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
    padding, attention = (
        F._canonical_mask(
            mask=mask,
            mask_name=name,
            other_type=None,
            other_name="",
            target_type=query.dtype,
            check_other=False,
        )
        for name, mask in masks.items()
    )
    if attention is not None and attention.dim() == 2:
        attention = attention.unsqueeze(0)
    if padding is not None:
        source = padding.shape[1]
        padding = padding.view(batch, 1, 1, source).expand(-1, num_heads, -1, -1)
        padding = padding.reshape(batch * num_heads, 1, source)
        attention = padding if attention is None else attention + padding
    if attention is None or not per_head:
        return attention
    if attention.size(0) == 1:
        return attention.unsqueeze(0)
    return attention.view(batch, num_heads, -1, attention.shape[-1])


def open_attention(
    attention: Any,
    mode: Any,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """Compute what ``attention(query, key, value, ...)`` does; called with proxies.

    Args:
        attention: the module, with proxies in place of its parameters.
        mode: the proxy of the training mode.
        query: ``(batch, target, embedding)`` where ``batch_first``, else ``(target, batch,
            embedding)``.
        key: likewise, with the length of the source.
        value: likewise.
        key_padding_mask: as in `nn.MultiheadAttention`.
        need_weights: as in `nn.MultiheadAttention`.
        attn_mask: as in `nn.MultiheadAttention`.
        average_attn_weights: as in `nn.MultiheadAttention`.
        is_causal: as in `nn.MultiheadAttention`.
    """
    query.tracer.create_proxy(
        "call_function",
        check_same,
        (query.dim(), 3, "nn.MultiheadAttention without a batch axis"),
        {},
    )
    if attention.batch_first:
        query, key, value = _batch_second(query, key, value)
    heads = attention.num_heads
    q, k, v = _project(attention, query, key, value)
    target, batch, embedding = query.shape[0], query.shape[1], query.shape[2]
    head_dim = attention.embed_dim // heads
    q = q.view(target, batch * heads, head_dim).transpose(0, 1)
    k = k.view(k.shape[0], batch * heads, head_dim).transpose(0, 1)
    v = v.view(v.shape[0], batch * heads, head_dim).transpose(0, 1)
    source = k.size(1)
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None
    if not causal and (attn_mask is not None or key_padding_mask is not None):
        arguments = (attn_mask, key_padding_mask, query, heads, not need_weights)
        mask = query.tracer.create_proxy("call_function", merge_masks, arguments, {})
    dropout = attention.dropout
    if need_weights:
        weights = _attention_weights(q, k, mask, head_dim)
        weights = F.dropout(weights, p=dropout, training=mode) if dropout > 0.0 else weights
        output = torch.bmm(weights, v).transpose(0, 1).reshape(target * batch, embedding)
    else:
        q = q.view(batch, heads, target, head_dim)
        k, v = k.view(batch, heads, source, head_dim), v.view(batch, heads, source, head_dim)
        probability = dropout
        if dropout > 0.0:
            probability = query.tracer.create_proxy(
                "call_function", operator.mul, (mode, dropout), {}
            )
        output = F.scaled_dot_product_attention(q, k, v, mask, probability, causal)
        output = output.permute(2, 0, 1, 3).reshape(batch * target, embedding)
    output = F.linear(output, attention.out_proj.weight, attention.out_proj.bias)
    output = output.view(target, batch, attention.embed_dim)
    output = output.transpose(1, 0) if attention.batch_first else output
    if not need_weights:
        return output, None
    weights = weights.view(batch, heads, target, source)
    return output, weights.mean(dim=1) if average_attn_weights else weights


def _batch_second(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    if key.node is value.node:
        if query.node is key.node:
            both = query.transpose(1, 0)
            return both, both, both
        query, key = query.transpose(1, 0), key.transpose(1, 0)
        return query, key, key
    return query.transpose(1, 0), key.transpose(1, 0), value.transpose(1, 0)


def _attention_weights(q: Any, k: Any, mask: Any, head_dim: int) -> Any:
    scaled = q * math.sqrt(1.0 / float(head_dim))
    transposed = k.transpose(-2, -1)
    if mask is None:
        return F.softmax(torch.bmm(scaled, transposed), dim=-1)
    return F.softmax(torch.baddbmm(mask, scaled, transposed), dim=-1)


def _project(attention: Any, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    bias, size = attention.in_proj_bias, attention.embed_dim
    biases = (None, None, None) if bias is None else bias.chunk(3)
    if not attention._qkv_same_embed_dim:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        return _linears((query, key, value), weights, biases)
    weight = attention.in_proj_weight
    if key.node is not value.node:
        return _linears((query, key, value), weight.chunk(3), biases)
    if query.node is key.node:
        q, k, v = _split_packed(F.linear(query, weight, bias), 3, size)
        return q, k, v
    weights = weight.split([size, size * 2])
    biases = (None, None) if bias is None else bias.split([size, size * 2])
    k, v = _split_packed(F.linear(key, weights[1], biases[1]), 2, size)
    return F.linear(query, weights[0], biases[0]), k, v


def _linears(inputs: Any, weights: Any, biases: Any) -> tuple[Any, Any, Any]:
    q, k, v = (F.linear(inputs[i], weights[i], biases[i]) for i in range(3))
    return q, k, v


def _split_packed(projected: Any, count: int, size: int) -> tuple[Any, ...]:
    projected = projected.unflatten(-1, (count, size)).unsqueeze(0).transpose(0, -2).squeeze(-2)
    projected = projected.contiguous()
    return tuple(projected[index] for index in range(count))
