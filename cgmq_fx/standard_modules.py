"""Frozen grids as calls of PyTorch's standard operators, ``torch.ops.quantized_decomposed``.

They say in operators that compilers know what the modules of `cgmq_fx.frozen` compute. Two things
differ: an operator multiplies with ``1 / scale`` where a frozen grid divides by scale, so that a
value within rounding of the middle between two codes may get the other one; and codes lie in the
narrowest integer type that holds them, with the ends of their true width as ``quant_min`` and
``quant_max``.
"""

from typing import Any, Literal

import torch

# The operators are registered by this import.
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from cgmq_fx.attention import attention_weights, weighted_values
from cgmq_fx.errors import UnsupportedModelError, UsageError
from cgmq_fx.frozen import FrozenModule, FrozenQuantizer, FrozenWeight

#: Types that hold codes, the narrowest first; of two as wide, codes that are never negative take
#: the unsigned one.
CODE_TYPES = (torch.int8, torch.uint8, torch.int16, torch.int32)

Clamp = Literal["values", "codes"]


def code_type(quant_min: int, quant_max: int) -> torch.dtype:
    """Return the type that holds codes from `quant_min` to `quant_max`.

    >>> code_type(0, 15), code_type(-7, 7), code_type(0, 65535)
    (torch.uint8, torch.int8, torch.int32)
    """
    infos = [
        torch.iinfo(kind)
        for kind in CODE_TYPES
        if torch.iinfo(kind).min <= quant_min and quant_max <= torch.iinfo(kind).max
    ]
    best = min(infos, key=lambda info: (info.bits, (info.min < 0) == (quant_min >= 0)))
    return next(kind for kind in CODE_TYPES if torch.iinfo(kind) == best)


class StandardModule(nn.Module):
    """Base of the modules that stand where frozen modules were.

    Attributes:
        site: the name that the quantizer had.
        quant_min: smallest code.
        quant_max: largest code.
        code_type: of the codes.

    Raises:
        UsageError: the grid is computed in float64.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, frozen: FrozenModule) -> None:
        super().__init__()
        self.quant_min, self.quant_max = frozen.quant_min, frozen.quant_max
        self.code_type = code_type(frozen.quant_min, frozen.quant_max)
        self.site = frozen.site
        self._require_single(frozen.scale.dtype)

    def _require_single(self, dtype: torch.dtype) -> None:
        """Refuse types that the operators do not compute in; half precision is widened to theirs.

        Raises:
            UsageError: the type is float64.
        """
        if dtype is torch.float64:
            raise UsageError(
                f"the quantizer {self.site!r} computes in {dtype}, and PyTorch's "
                f"quantized_decomposed operators in {torch.float32} alone; prepare the model in "
                f"float32, or export it to .safetensors"
            )

    @property
    def ends(self) -> tuple[int, int, torch.dtype]:
        """What the operators call quant_min, quant_max and dtype."""
        return self.quant_min, self.quant_max, self.code_type


class StandardWeight(StandardModule):
    """A weight: a constant of integers behind a dequantize operator.

    Where scale varies along one axis at most, that operator does all. Where it varies along several
    (a grouped transposed convolution after a fold), a product with scale follows it.

    Args:
        frozen: the weight.
        axis: the axis that one scale for all is repeated along, as kernels want it.
    """

    codes: Tensor

    def __init__(self, frozen: FrozenWeight, axis: int) -> None:
        super().__init__(frozen)
        self._require_single(frozen.dtype)
        self.dtype, self.channel_axis = frozen.dtype, frozen.channel_axis
        zero_point = torch.zeros(()) if frozen.zero_point is None else frozen.zero_point
        scale = frozen.scale.detach().clone()
        if scale.numel() == 1 and len(frozen.shape) > 0:
            self.channel_axis = axis if frozen.channel_axis is None else frozen.channel_axis
            scale = scale.reshape(1).repeat(frozen.shape[self.channel_axis])
        if self.channel_axis is not None:
            self.channel_axis %= len(frozen.shape)
            zero_point = zero_point.reshape(-1).expand(scale.shape)
        self.register_buffer("codes", frozen.codes.to(self.code_type, copy=True).contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(torch.int64, copy=True))

    def forward(self) -> Tensor:
        """Return the weight."""
        ops: Any = torch.ops.quantized_decomposed
        if self.channel_axis is None:
            steps = ops.dequantize_per_tensor.default(self.codes, 1.0, 0, *self.ends)
            value: Tensor = (steps - self.zero_point) * self.scale
        else:
            value = ops.dequantize_per_channel.default(
                self.codes, self.scale, self.zero_point, self.channel_axis, *self.ends
            )
        return value if value.dtype == self.dtype else value.to(self.dtype)


class StandardQuantizer(StandardModule):
    """Rounds a tensor to a fixed grid and back: a quantize and a dequantize operator.

    Args:
        frozen: the quantizer.
        signed: codes of up to 8 bits are int8, those from 0 on shifted down by 128 with zero_point.
            Else they are as they were.
        clamp: what an operator of its own clamps, where the codes are fewer than their type holds:
            ``values`` before they are quantized, or ``codes`` after. It changes no number, and is
            for compilers that overlook ``quant_min`` and ``quant_max``. None: nothing, where the
            values are known to lie on the grid.
    """

    def __init__(
        self, frozen: FrozenQuantizer, *, signed: bool = False, clamp: Clamp | None = "codes"
    ) -> None:
        super().__init__(frozen)
        if frozen.is_binary:
            raise UnsupportedModelError(
                f"the quantizer {self.site!r} has 1 bit, -1 or 1, of a tensor that is computed "
                f"from the inputs, which PyTorch's quantized_decomposed operators have no form "
                f"for; export to .qonnx.onnx or .safetensors, or give it 2 bits"
            )
        self.channel_axis = frozen.channel_axis
        shift = 128 if signed and self.code_type is torch.uint8 else 0
        if shift:
            self.quant_min, self.quant_max = self.quant_min - shift, self.quant_max - shift
            self.code_type = torch.int8
        info = torch.iinfo(self.code_type)
        # No compiler has kernels for wider codes, which could overlook anything.
        overlooked = info.bits == 8 and (info.min, info.max) != self.ends[:2]
        self.clamp = clamp if overlooked else None
        if self.channel_axis is None:
            self._one = (float(frozen.scale), int(frozen.zero_point) - shift)
        else:
            size = frozen.scale.shape
            zero_point = frozen.zero_point.to(torch.int64, copy=True).expand(size) - shift
            self.register_buffer("scale", frozen.scale.detach().clone())
            self.register_buffer("zero_point", zero_point.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid, in its own dtype; integers and bools unchanged."""
        if not x.is_floating_point():
            return x
        self._require_single(x.dtype)
        ops: Any = torch.ops.quantized_decomposed
        if self.channel_axis is None:
            qparams = (*self._one, *self.ends)
            if self.clamp == "values":
                scale, zero_point = self._one
                low, high = ((end - zero_point) * scale for end in self.ends[:2])
                x = F.hardtanh(x, low, high)  # XNNPACK takes it for a part of the layer before
            codes = self._clamped(ops.quantize_per_tensor.default(x, *qparams))
            value: Tensor = ops.dequantize_per_tensor.default(codes, *qparams)
        else:
            places = (self.scale, self.zero_point, self.channel_axis % x.ndim, *self.ends)
            codes = self._clamped(ops.quantize_per_channel.default(x, *places))
            value = ops.dequantize_per_channel.default(codes, *places)
        return value if value.dtype == x.dtype else value.to(x.dtype)

    def _clamped(self, codes: Tensor) -> Tensor:
        """Return the codes, clamped where that is asked for.

        Inductor takes a clamp by both ends, or the lower one first, for a part of the convolution
        in front of the quantize operator.
        """
        if self.clamp != "codes":
            return codes
        info = torch.iinfo(self.code_type)
        if self.quant_max < info.max:
            codes = codes.clamp_max(self.quant_max)
        return codes.clamp_min(self.quant_min) if self.quant_min > info.min else codes


class StandardAttention(StandardQuantizer):
    """Scaled dot-product attention with its weights on a fixed grid between its products."""

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
        """Return the attention output; arguments as of `F.scaled_dot_product_attention`."""
        weights = attention_weights(query, key, attn_mask, is_causal, scale, enable_gqa)
        return weighted_values(super().forward(weights), query, value, dropout_p, enable_gqa)
