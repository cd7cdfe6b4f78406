"""The bit-widths of a tensor that has several gates, as one value."""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from cgmq_fx.errors import UsageError
from cgmq_fx.gates import FLOAT_WIDTH, WIDTHS_TEXT, is_width

#: What has a gate, and with it a bit-width, of its own: a tensor, each of its output channels, or
#: each of its elements.
Granularity = Literal["layer", "channel", "element"]


class UnitBits(int):
    """The bit-widths of the units of one tensor, channels or elements; as a number the widest.

    As text the mean. It never changes, and none of it is 32: a tensor is float as a whole. Two are
    equal where every unit has the same bit-width. Where all units have one bit-width that is a
    plain number: see `bits_of`.

    Attributes:
        units: the bit-width of each unit, a byte each, in the order of the tensor.
    """

    units: bytes

    def __new__(cls, units: bytes) -> Self:
        """Make one of the bytes of its units."""
        made = super().__new__(cls, max(units))
        made.units = units
        return made

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The bit-width of each unit, shape (units,)."""
        return np.frombuffer(self.units, np.uint8)

    @property
    def counts(self) -> Mapping[int, int]:
        """How many units have each bit-width, by rising bit-width."""
        found = np.bincount(self.array)
        return MappingProxyType({int(bits): int(found[bits]) for bits in found.nonzero()[0]})

    @property
    def mean(self) -> Fraction:
        """The mean bit-width."""
        return Fraction(int(self.array.sum(dtype=np.int64)), len(self.units))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnitBits) and self.units == other.units

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.units)

    def __str__(self) -> str:
        """Return the mean with two digits."""
        return f"{float(self.mean):.2f}"

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,} at {bits}" for bits, count in self.counts.items())
        return f"{self} bits ({counts})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.units,)


def bits_of(units: bytes) -> int:
    """Return the bit-widths of units: a plain number where all have the same.

    Raises:
        UsageError: there are none, or some are not widths that units can have.

    >>> bits_of(bytes([4, 4])), bits_of(bytes([2, 8, 2, 0]))
    (4, 3.00 bits (1 at 0, 2 at 2, 1 at 8))
    """
    present = set(units)
    wrong = sorted(bits for bits in present if not is_width(bits))
    if wrong or not present:
        raise UsageError(f"bit-widths {wrong} of units are none; use {WIDTHS_TEXT}")
    if len(present) == 1:
        return units[0]
    if FLOAT_WIDTH in present:
        raise UsageError(
            f"some units have {FLOAT_WIDTH} bits and others {min(present)}; a tensor is float as a "
            f"whole: give all of them {FLOAT_WIDTH}, or none"
        )
    return UnitBits(units)


def counts_of(bits: int) -> Mapping[int, int]:
    """Return how many units have each bit-width; of a tensor with one, a single unit."""
    return bits.counts if isinstance(bits, UnitBits) else {bits: 1}


def mean_bits(bits: int) -> Fraction:
    """Return the mean bit-width of a tensor's elements."""
    return bits.mean if isinstance(bits, UnitBits) else Fraction(bits)


def map_bits(num_units: int, widths: Iterable[int]) -> int:
    """Return how many bits say which of the allowed bit-widths each unit of a tensor has.

    >>> map_bits(100, (0, 2, 4, 8, 32))
    200
    """
    choices = sum(1 for bits in widths if bits != FLOAT_WIDTH)
    return num_units * max(1, (choices - 1).bit_length())
