"""What quantizers become when a network is lowered: fixed grids without anything to learn.

The arithmetic is that of `cgmq_fx.fake_quantize`, so that values are equal bit for bit.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cgmq_fx.attention import attention_weights, weighted_values
from cgmq_fx.errors import UsageError
from cgmq_fx.fake_quantize import Grid, to_steps, widen
from cgmq_fx.quantizers import QParams


class FrozenModule(nn.Module):
    """Base of the modules that stand where quantizers were.

    Attributes:
        site: the name that the quantizer had.
        role: ``weight``, ``activation`` or ``input``.
        bit_width: bits of each of its codes, 2 to 16.
        quant_min: smallest code.
        quant_max: largest code.
    """

    scale: Tensor

    def __init__(self, site: str, role: str, qparams: QParams) -> None:
        super().__init__()
        self.site, self.role = site, role
        self.bit_width = qparams.bit_width
        self.quant_min, self.quant_max = qparams.quant_min, qparams.quant_max
        self.register_buffer("scale", qparams.scale.detach().clone())

    def extra_repr(self) -> str:
        """Return site, role and width for the printed module."""
        return f"{self.site}, {self.role}, bit_width={self.bit_width}"


class FrozenWeight(FrozenModule):
    """A weight stored as integer codes; called without arguments it returns the real values.

    Its value is ``codes * scale``, in `dtype`: zero_point is 0.

    Args:
        site: the name that its quantizer had.
        qparams: the grid, with zero_point 0.
        codes: integers of any type on that grid; stored in the narrowest type that holds it.
        channel_axis: the axis of the codes that scale runs along where it has shape (channels,).
            None: scale has shape () or broadcasts with the codes.
        dtype: of the value.
    """

    codes: Tensor

    def __init__(
        self,
        site: str,
        qparams: QParams,
        codes: Tensor,
        channel_axis: int | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(site, "weight", qparams)
        self.channel_axis, self.dtype = channel_axis, dtype
        self.register_buffer("codes", codes.to(_storage_type(qparams)))
        self._check(self.codes)

    def forward(self) -> Tensor:
        """Return the weight."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return (self.codes.to(wide) * self.broadcast_scale()).to(self.dtype)

    def broadcast_scale(self) -> Tensor:
        """Return the scale in a shape that broadcasts with the codes."""
        if self.channel_axis is None:
            return self.scale
        shape = [1] * self.codes.ndim
        shape[self.channel_axis] = -1
        return self.scale.view(shape)

    @torch.no_grad()
    def rescale(self, factor: Tensor, axis: int) -> None:
        """Multiply the value by `factor`; the codes stay.

        Args:
            factor: float64, with as many axes as the codes, broadcasts with them.
            axis: the scale gets shape (channels,) along this axis where it varies along no other.
        """
        scale = (self.broadcast_scale().to(factor) * factor).to(self.scale)
        one_axis = scale.numel() == scale.shape[axis] == self.codes.shape[axis]
        self.scale = scale.reshape(-1) if one_axis else scale
        self.channel_axis = axis if one_axis else None

    def _check(self, codes: Tensor) -> None:
        if codes.numel() == 0:
            return
        low, high = (int(end) for end in codes.aminmax())
        if low < self.quant_min or high > self.quant_max:
            raise UsageError(
                f"frozen weight {self.site!r}: codes from {low} to {high} do not fit its "
                f"{self.bit_width} bits, which hold {self.quant_min} to {self.quant_max}; load the "
                f"state of a module that was lowered to the same bit-widths"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        loaded = state_dict.get(f"{prefix}codes")
        if loaded is not None:
            self._check(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _storage_type(qparams: QParams) -> torch.dtype:
    for dtype in (torch.int8, torch.int16):
        limits = torch.iinfo(dtype)
        if limits.min <= qparams.quant_min and qparams.quant_max <= limits.max:
            return dtype
    return torch.int32


class FrozenQuantizer(FrozenModule):
    """Rounds a tensor to a fixed grid and back.

    Args:
        site: the name that the quantizer had.
        role: ``activation`` or ``input``; ``weight`` where a weight is computed from the inputs.
        qparams: the grid.
        channel_axis: the axis of the tensor that has a range for each index; None: one range.
    """

    zero_point: Tensor

    def __init__(self, site: str, role: str, qparams: QParams, channel_axis: int | None) -> None:
        super().__init__(site, role, qparams)
        self.channel_axis = channel_axis
        self.register_buffer("zero_point", qparams.zero_point.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid, in its own dtype; integers, bools and empty tensors unchanged."""
        if not x.is_floating_point() or x.numel() == 0:
            return x
        return self._fake_quantize(x)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        zero_point = self.zero_point.to(self.scale.dtype)
        low, high = self.quant_min - zero_point, self.quant_max - zero_point
        grid = Grid(self.scale, zero_point, low, high).along(self.channel_axis, x.ndim)
        return to_steps(widen(x), grid).mul_(grid.scale).to(x.dtype)


class FrozenAttention(FrozenQuantizer):
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
