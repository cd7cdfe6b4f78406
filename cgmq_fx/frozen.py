"""What quantizers become when a network is lowered: fixed grids without anything to learn.

The arithmetic is that of `cgmq_fx.fake_quantize`, so that values are equal bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cgmq_fx.attention import attention_weights, weighted_values
from cgmq_fx.errors import UsageError
from cgmq_fx.fake_quantize import RANGE_MIN, Grid, to_steps, widen
from cgmq_fx.gates import BINARY_WIDTH
from cgmq_fx.packed_codes import (
    pack_codes,
    pack_unit_codes,
    storage_type,
    unpack_codes,
    unpack_unit_codes,
)
from cgmq_fx.quantizers import QParams
from cgmq_fx.unit_bits import UnitBits

_SAME_WIDTHS = "load the state of a module that was lowered to the same bit-widths"


class FrozenModule(nn.Module):
    """Base of the modules that stand where quantizers were.

    Attributes:
        site: the name that the quantizer had.
        role: ``weight``, ``activation`` or ``input``.
        bit_width: bits of each of its codes, 0 to 16; `UnitBits` where these differ.
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

    @property
    def is_binary(self) -> bool:
        """Whether the codes are -1 and 1 alone."""
        return self.bit_width == BINARY_WIDTH and self.quant_min < 0

    def extra_repr(self) -> str:
        """Return site, role and width for the printed module."""
        return f"{self.site}, {self.role}, bit_width={self.bit_width}"


class FrozenWeight(FrozenModule):
    """A weight stored as integer codes; called without arguments it returns the real values.

    Its value is ``(codes - zero_point) * scale``, in `dtype`; a zero_point of 0 is not stored.

    Args:
        site: the name that its quantizer had.
        qparams: the grid.
        codes: integers of any type on that grid.
        channel_axis: the axis of the codes that scale runs along where it has shape (channels,).
            None: scale has shape () or broadcasts with the codes.
        dtype: of the value.
        unit_shape: of what has a bit-width of its own, broadcasts with the codes, where the
            bit-widths of the grid are `UnitBits`.
        unit_widths: the bit-widths that these may have, rising. Where scale has one axis more than
            the codes it has a row for each of them.

    Attributes:
        packed: the codes at their true width, uint8 of shape ``(ceil(elements * bits / 8),)``, as
            `cgmq_fx.packing` lays them out.
        shape: of the codes, and of the value.
        unit_bits: where bit-widths differ that of each unit, uint8, in a shape that broadcasts with
            the codes; else None.

    Raises:
        UsageError: codes do not lie on the grid.
    """

    packed: Tensor
    zero_point: Tensor | None
    unit_bits: Tensor | None

    def __init__(
        self,
        site: str,
        qparams: QParams,
        codes: Tensor,
        channel_axis: int | None,
        dtype: torch.dtype,
        unit_shape: Sequence[int] = (),
        unit_widths: Sequence[int] = (),
    ) -> None:
        super().__init__(site, "weight", qparams)
        self.unit_widths = tuple(unit_widths)
        self.channel_axis, self.dtype, self.shape = channel_axis, dtype, codes.shape
        self.register_buffer("unit_bits", _unit_bits(qparams.bit_width, unit_shape, codes))
        self.register_buffer("packed", self._pack(codes))
        self.register_buffer("zero_point", self._zero_point(qparams))

    @property
    def codes(self) -> Tensor:
        """The codes, in the narrowest of int8, int16 and int32 that holds them."""
        return self._unpack(self.packed)

    @codes.setter
    def codes(self, codes: Tensor) -> None:
        self.packed.copy_(self._pack(codes))

    def steps(self) -> Tensor:
        """Return ``codes - zero_point``, integers in the float type that values are computed in."""
        steps = self.codes.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
        return steps if self.zero_point is None else steps - self.zero_point

    def forward(self) -> Tensor:
        """Return the weight."""
        return (self.steps() * self.broadcast_scale()).to(self.dtype)

    def _zero_point(self, qparams: QParams) -> Tensor | None:
        """Return zero_point in a shape that broadcasts with the codes; None where it is 0."""
        if not int(qparams.zero_point.count_nonzero()):
            return None
        return self._broadcast(qparams.zero_point.detach().clone())

    def broadcast_scale(self) -> Tensor:
        """Return the scale in a shape that broadcasts with the codes."""
        return self._of_units(self.scale) if self._is_by_width else self._broadcast(self.scale)

    @property
    def _is_by_width(self) -> bool:
        """Whether scale has a row for each of `unit_widths`."""
        return self.unit_bits is not None and self.scale.ndim > len(self.shape)

    def _of_units(self, rows: Tensor) -> Tensor:
        """Return of each unit what stands in the row of its width."""
        assert self.unit_bits is not None
        place = torch.zeros(max(self.unit_widths) + 1, dtype=torch.int64, device=rows.device)
        place[list(self.unit_widths)] = torch.arange(len(self.unit_widths), device=rows.device)
        index = place[self.unit_bits.long()].unsqueeze(0)
        rows, index = torch.broadcast_tensors(  # type: ignore[no-untyped-call]
            rows, index.expand(len(rows), *index.shape[1:])
        )
        return rows.gather(0, index[:1]).squeeze(0)

    def _broadcast(self, per_channel: Tensor) -> Tensor:
        if self.channel_axis is None:
            return per_channel
        shape = [1] * len(self.shape)
        shape[self.channel_axis] = -1
        return per_channel.view(shape)

    @torch.no_grad()
    def rescale(self, factor: Tensor, axis: int) -> None:
        """Multiply the value by `factor`; every scale stays positive.

        The codes stay where `factor` is positive. Where it is negative they are mirrored on their
        grid, with zero_point, which negates the value exactly. Where the new scale is 0 in its type
        the codes become zero_point, and the old scale stays; a binary grid, without 0, gets a scale
        that vanishes beside any other.

        Args:
            factor: float64, with as many axes as the codes, broadcasts with them.
            axis: the scale gets shape (channels,) along this axis where it varies along no other.
        """
        if self._is_by_width:
            self._rescale_rows(factor.unsqueeze(0))
            return
        old = self.broadcast_scale()
        scale = (old.to(factor) * factor).to(old)
        self._mirror(scale < 0)
        if self.is_binary:
            scale = torch.where(scale == 0, RANGE_MIN, scale)
        elif self.unit_bits is not None:
            scale = torch.where((scale == 0) & (self.unit_bits == BINARY_WIDTH), RANGE_MIN, scale)
        if bool((scale == 0).any()):
            zero = 0 if self.zero_point is None else self.zero_point
            self.codes = torch.where(scale == 0, zero, self.codes)
        scale = torch.where(scale == 0, old, scale.abs())
        one_axis = scale.numel() == scale.shape[axis] == self.shape[axis]
        self.scale = scale.reshape(-1) if one_axis else scale
        self.channel_axis = axis if one_axis else None

    def _rescale_rows(self, factor: Tensor) -> None:
        """Do the same for a scale with a row for each of `unit_widths`."""
        old = self.scale
        scale = (old.to(factor) * factor).to(old)
        self._mirror(self._of_units(scale) < 0)
        if BINARY_WIDTH in self.unit_widths:
            row = scale[self.unit_widths.index(BINARY_WIDTH)]
            row.copy_(torch.where(row == 0, RANGE_MIN, row))
        if bool((scale == 0).any()):
            self.codes = torch.where(self._of_units(scale) == 0, 0, self.codes)
        self.scale = torch.where(scale == 0, old, scale.abs())

    def _mirror(self, where: Tensor) -> None:
        """Negate the value in the places of a mask that broadcasts with the codes."""
        if not bool(where.any()):
            return
        ends = self.quant_min + self.quant_max
        zero = torch.zeros((), dtype=torch.int32, device=where.device)
        zero = zero if self.zero_point is None else self.zero_point
        zero = torch.where(where, ends - zero, zero)
        self.codes = torch.where(where, ends - self.codes, self.codes)
        self.zero_point = zero if int(zero.count_nonzero()) else None

    def _pack(self, codes: Tensor) -> Tensor:
        self._check(codes)
        if self.unit_bits is not None:
            return pack_unit_codes(codes, self.unit_bits, signed=self.quant_min < 0)
        return pack_codes(codes, self.bit_width, signed=self.quant_min < 0)

    def _unpack(self, packed: Tensor) -> Tensor:
        if self.unit_bits is not None:
            signed = self.quant_min < 0
            codes = unpack_unit_codes(packed, self.unit_bits, self.shape, signed=signed)
            return codes.to(storage_type(int(self.bit_width), signed=signed))
        return unpack_codes(packed, self.bit_width, self.shape, signed=self.quant_min < 0)

    def _check(self, codes: Tensor) -> None:
        if codes.numel() == 0:
            return
        low, high = (int(end) for end in codes.aminmax())
        if low < self.quant_min or high > self.quant_max:
            raise UsageError(
                f"frozen weight {self.site!r}: codes from {low} to {high} do not fit its "
                f"{self.bit_width} bits, which hold {self.quant_min} to {self.quant_max}; "
                f"{_SAME_WIDTHS}"
            )

    def get_extra_state(self) -> Tensor:
        """Return the bit-width, without which packed codes say nothing."""
        return torch.tensor(int(self.bit_width))

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: that the bit-width is the module's was checked before anything was loaded."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        bit_width = int(state_dict.get(f"{prefix}_extra_state", int(self.bit_width)))
        units = state_dict.get(f"{prefix}unit_bits", self.unit_bits)
        same = units is self.unit_bits or (
            units is not None and self.unit_bits is not None and _equal(units, self.unit_bits)
        )
        if bit_width != int(self.bit_width) or not same:
            raise UsageError(
                f"frozen weight {self.site!r}: codes of {bit_width} bits are not loaded where it "
                f"has {self.bit_width}; {_SAME_WIDTHS}"
            )
        loaded = state_dict.get(f"{prefix}packed")
        if loaded is not None and loaded.shape == self.packed.shape:
            self._check(self._unpack(loaded))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one.to(other.device) == other).all())


def _unit_bits(bit_width: int, unit_shape: Sequence[int], codes: Tensor) -> Tensor | None:
    if not isinstance(bit_width, UnitBits):
        return None
    units = torch.frombuffer(bytearray(bit_width.units), dtype=torch.uint8)
    return units.view(tuple(unit_shape)).to(codes.device)


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
        if not self.rounds(x):
            return x
        return self.steps(x).mul_(self.broadcast_scale(x.ndim)).to(x.dtype)

    @staticmethod
    def rounds(x: Tensor) -> bool:
        """Tell whether `forward` puts x on the grid."""
        return x.is_floating_point() and x.numel() > 0

    def steps(self, x: Tensor) -> Tensor:
        """Return ``codes - zero_point`` of x, integers in the float type that it computes in."""
        zero_point = self.zero_point.to(self.scale.dtype)
        low, high = self.quant_min - zero_point, self.quant_max - zero_point
        grid = Grid(self.scale, zero_point, low, high)
        if self.is_binary:  # the ends of its range, of which nothing but the signs matters here
            grid = Grid(self.scale, zero_point, 2 * low, 2 * high)
        inner = grid.along(self.channel_axis, x.ndim)
        return to_steps(widen(x), inner, is_binary=self.is_binary)

    def broadcast_scale(self, ndim: int) -> Tensor:
        """Return the scale in a shape that broadcasts with tensors of so many dimensions."""
        if self.channel_axis is None:
            return self.scale
        shape = [1] * ndim
        shape[self.channel_axis] = -1
        return self.scale.view(shape)


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
