"""What a quantizer is for and which integer grids it may use, as a frozen value."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from cgmq_fx.errors import UsageError
from cgmq_fx.gates import (
    BINARY_WIDTH,
    DEFAULT_WIDTHS,
    FLOAT_WIDTH,
    PRUNED_WIDTH,
    WIDTHS_TEXT,
    is_width,
)

Role = Literal["weight", "activation", "input"]
Scheme = Literal["symmetric", "unsigned", "affine"]


@dataclass(frozen=True)
class QuantizerSpec:
    """How one tensor is quantized.

    Args:
        role: what the tensor is: a weight, the result of an operation, or what comes from outside.
        scheme: symmetric: real values in [-r, r], zero_point 0. unsigned: [0, r], zero_point 0.
            affine: [low, high] around 0, with a zero_point that represents 0.0 exactly.
        channel_axis: the axis along which each index has a range of its own; None: one range.
        num_channels: the size of that axis; 1 where channel_axis is None.
        widths: the allowed bit-widths, rising: 0 (the tensor is 0), 1 to 16, and 32 for a tensor
            left in float. A symmetric grid of 1 bit, -r / 2 and r / 2, is for weights alone.
        learned: False where nothing but `Quantizer.set_bit_width` moves the width, as for an image
            whose 8 bits the cost table fixes.
        num_tensors: how many tensors of one forward it quantizes, one after the other.
        chosen_by: what messages call the selectors of an override that speaks here; "" for none.
        unit_shape: shape of the gates, which broadcasts with the tensor: () for one. Of a symmetric
            weight each index of channel_axis can have one, (channels, 1, 1, 1), or each element.

    Raises:
        UsageError: fields out of these bounds, all named at once.
    """

    role: Role
    scheme: Scheme
    channel_axis: int | None = None
    num_channels: int = 1
    widths: tuple[int, ...] = DEFAULT_WIDTHS
    learned: bool = True
    num_tensors: int = 1
    chosen_by: str = ""
    unit_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        faults = [*self._option_faults(), *self._width_faults(), *self._channel_faults()]
        faults += self._unit_faults()
        if faults:
            raise UsageError("QuantizerSpec: " + "; ".join(faults))

    def _option_faults(self) -> list[str]:
        allowed = {
            "role": (self.role, get_args(Role)),
            "scheme": (self.scheme, get_args(Scheme)),
        }
        return [
            f"{field}={value!r} is unknown, use one of {', '.join(map(repr, options))}"
            for field, (value, options) in allowed.items()
            if value not in options
        ]

    def _width_faults(self) -> list[str]:
        wrong = [width for width in self.widths if not is_width(width)]
        if wrong:
            yours = ", ".join(map(repr, wrong))
            return [f"widths={self.widths!r} has {yours}, use widths from {WIDTHS_TEXT}"]
        if not self.widths:
            return [f"widths=() is empty, allow at least one, such as {DEFAULT_WIDTHS!r}"]
        if list(self.widths) != sorted(set(self.widths)):
            fixed = tuple(sorted(set(self.widths)))
            return [f"widths={self.widths!r} must rise without repeats, use {fixed!r}"]
        if BINARY_WIDTH in self.widths and self.scheme == "symmetric" and self.role != "weight":
            return [
                f"widths={self.widths!r} has {BINARY_WIDTH} on a symmetric grid of an activation, "
                f"which would not hold 0; take an affine one, or leave {BINARY_WIDTH} out"
            ]
        return []

    def _channel_faults(self) -> list[str]:
        if self.num_tensors < 1:
            return [f"num_tensors={self.num_tensors} must be at least 1"]
        if self.num_channels < 1:
            return [f"num_channels={self.num_channels} must be at least 1"]
        if self.channel_axis is None and self.num_channels != 1:
            return [
                f"num_channels={self.num_channels} needs a channel_axis, "
                "use num_channels=1 for one range per tensor"
            ]
        return []

    def _unit_faults(self) -> list[str]:
        if not self.unit_shape:
            return []
        if self.role != "weight" or self.scheme != "symmetric":
            return [
                f"unit_shape={self.unit_shape} is for symmetric weights, not for the {self.scheme} "
                f"grid of the role {self.role}"
            ]
        axis = self.channel_axis
        sizes = 1 if axis is None else self.unit_shape[axis]
        if min(self.unit_shape) < 1 or sizes != self.num_channels:
            return [
                f"unit_shape={self.unit_shape} must have the {self.num_channels} channels on the "
                f"axis {axis} and no axis of 0"
            ]
        return []

    @property
    def num_units(self) -> int:
        """How many gates there are."""
        return math.prod(self.unit_shape)


def integer_grid(scheme: Scheme, bit_width: int) -> tuple[int, int]:
    """Return the least and the greatest code of a scheme at a width from 0 to 16.

    Symmetric grids are narrow, so that 2 bits are ternary and -x is on the grid where x is. Of 1
    bit they have the codes -1 and 1 alone; at 0 bits there is only 0.

    Raises:
        UsageError: 32 bits, where there is no grid, or a width that no quantizer has.

    >>> integer_grid("symmetric", 2), integer_grid("unsigned", 2), integer_grid("affine", 8)
    ((-1, 1), (0, 3), (0, 255))
    >>> integer_grid("symmetric", 1), integer_grid("unsigned", 1), integer_grid("affine", 0)
    ((-1, 1), (0, 1), (0, 0))
    """
    if not is_width(bit_width) or bit_width == FLOAT_WIDTH:
        raise UsageError(
            f"bit_width={bit_width!r} has no integer grid; grids exist from {PRUNED_WIDTH} to "
            f"16 bits"
        )
    if scheme != "symmetric" or bit_width == PRUNED_WIDTH:
        return 0, 2**bit_width - 1
    quant_max = max(2 ** (bit_width - 1) - 1, 1)
    return -quant_max, quant_max


def kernel_bounds(scheme: Scheme, bit_width: int) -> tuple[int, int]:
    """Return `integer_grid` as `fake_quantize` takes it: (1, 1) says that the codes are -1 and 1.

    Raises:
        UsageError: as `integer_grid`.
    """
    is_binary = scheme == "symmetric" and bit_width == BINARY_WIDTH
    return (1, 1) if is_binary else integer_grid(scheme, bit_width)
