"""Scaled dot-product attention with its weights quantized between the two products."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.quantizers import Quantizer


class AttentionQuantizer(Quantizer):
    """A quantizer for attention weights, called like `F.scaled_dot_product_attention`.

    At 32 bits it is that function, bit for bit. Below, the attention weights are computed,
    quantized and multiplied with the values.
    """

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Return the attention output, ``(..., target, value_width)``.

        Args:
            query: ``(..., heads, target, width)``.
            key: ``(..., heads, source, width)``.
            value: ``(..., heads, source, value_width)``.
            attn_mask: bool or additive mask that broadcasts to ``(..., heads, target, source)``.
            dropout_p: probability of dropping an attention weight; 0 means none.
            is_causal: mask out sources after the target.
            scale: factor on the scores; by default ``1 / sqrt(width)``.
            enable_gqa: several query heads share a key and value head.
        """
        if self.bit_width == FLOAT_WIDTH and self.tap is None:
            if not self.is_calibrated:
                self.calibrate(
                    attention_weights(query, key, attn_mask, is_causal, scale, enable_gqa)
                )
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        weights = attention_weights(query, key, attn_mask, is_causal, scale, enable_gqa)
        return weighted_values(super().forward(weights), query, value, dropout_p, enable_gqa)


def weighted_values(
    weights: Tensor, query: Tensor, value: Tensor, dropout_p: float, enable_gqa: bool
) -> Tensor:
    """Return the second product of attention, ``(..., target, value_width)``.

    Args:
        weights: ``(..., heads, target, source)``.
        query: for its number of heads, with which `value` is shared where `enable_gqa`.
        value: ``(..., heads, source, value_width)``.
        dropout_p: probability of dropping an attention weight; 0 means none.
        enable_gqa: several query heads share a value head.
    """
    if dropout_p > 0.0:
        weights = F.dropout(weights, p=dropout_p)
    if enable_gqa:
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    return weights @ value


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Return the softmax of the masked scores, ``(..., heads, target, source)``."""
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
    factor = 1.0 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        shape = scores.shape[-2:]
        allowed = torch.ones(shape, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    return F.softmax(scores, dim=-1)
