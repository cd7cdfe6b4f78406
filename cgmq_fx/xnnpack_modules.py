"""Frozen grids as ExecuTorch takes them: int8 for XNNPACK, wider integers, or real values."""

import torch
from torch import Tensor, nn

from cgmq_fx.errors import UsageError
from cgmq_fx.frozen import FrozenModule, FrozenQuantizer, FrozenWeight
from cgmq_fx.standard_modules import StandardQuantizer, StandardWeight

_INT8, _INT16 = torch.iinfo(torch.int8), torch.iinfo(torch.int16)
_TINY = torch.finfo(torch.float32).tiny


def is_eight_bit(frozen: FrozenModule) -> bool:
    """Tell whether XNNPACK's int8 tensors hold the grid of a weight or of an activation."""
    is_normal = frozen.scale.isfinite() & (frozen.scale >= _INT8.max * _TINY)
    if frozen.scale.dtype != torch.float32 or not bool(is_normal.all()):
        return False
    if isinstance(frozen, FrozenWeight):
        in_range = _INT8.min <= frozen.quant_min and frozen.quant_max <= _INT8.max
        return in_range and frozen.zero_point is None and frozen.dtype == torch.float32
    assert isinstance(frozen, FrozenQuantizer)
    if frozen.is_binary or frozen.channel_axis is not None or frozen.scale.numel() != 1:
        return False
    shift = int8_shift(frozen)
    numbers = (frozen.quant_min, frozen.quant_max, int(frozen.zero_point))
    in_range = all(_INT8.min <= number - shift <= _INT8.max for number in numbers)
    return in_range and frozen.quant_min < frozen.quant_max


def int8_shift(frozen: FrozenQuantizer) -> int:
    """Return what is taken from the codes of an activation, and its zero_point, to make them int8.

    That is 128 where no code is negative, else 0.
    """
    return -_INT8.min if frozen.quant_min >= 0 else 0


def clamps(frozen: FrozenQuantizer) -> bool:
    """Tell whether an activation has fewer codes than int8."""
    return frozen.quant_max - frozen.quant_min < _INT8.max - _INT8.min


def fineness(frozen: FrozenWeight) -> int:
    """Return the power of two that int8 has room for: codes times it, scale divided by it.

    The value is the same, and XNNPACK rounds biases to a finer grid: that of codes of 8 bits.
    """
    largest = max(abs(frozen.quant_min), abs(frozen.quant_max), 1)
    return 1 << ((_INT8.max // largest).bit_length() - 1)


class XnnpackWeight(StandardWeight):
    """A weight of up to 8 bits: int8 codes, `fineness` times the weight's, and their operator.

    It has the ends of int8: at those of 4 bits XNNPACK would take the codes for others.
    """

    def __init__(self, frozen: FrozenWeight, axis: int) -> None:
        super().__init__(frozen, axis)
        self.quant_min, self.quant_max, self.code_type = _INT8.min, _INT8.max, torch.int8
        self.codes = int8_codes(frozen)
        self.scale = self.scale / fineness(frozen)


def int8_codes(frozen: FrozenWeight) -> Tensor:
    """Return the codes of a weight as XNNPACK has them."""
    return (frozen.codes.to(torch.int32) * fineness(frozen)).to(torch.int8).contiguous()


class ValueWeight(nn.Module):
    """A weight as real values on its grid; called without arguments it returns them.

    Raises:
        UsageError: they are not of float32.
    """

    value: Tensor

    def __init__(self, frozen: FrozenWeight) -> None:
        super().__init__()
        if frozen.dtype != torch.float32:
            raise UsageError(
                f"the weight {frozen.site!r} is of {frozen.dtype}, and .pte holds weights of "
                f"{torch.float32}; prepare the model in float32, or export it to .safetensors"
            )
        self.register_buffer("value", frozen().contiguous())

    def forward(self) -> Tensor:
        """Return the weight."""
        return self.value


class WideQuantizer(StandardQuantizer):
    """A quantizer that XNNPACK has no type for: ExecuTorch's own kernels compute it.

    Its codes are int16 or int32, which keeps XNNPACK from taking them for int8.
    """

    def __init__(self, frozen: FrozenQuantizer) -> None:
        super().__init__(frozen)
        in_range = _INT16.min <= self.quant_min and self.quant_max <= _INT16.max
        self.code_type, self.clamp = torch.int16 if in_range else torch.int32, None
