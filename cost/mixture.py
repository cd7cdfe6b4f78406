"""Operands whose elements differ in bit-width."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Mixture:
    """How the elements of one operand are spread over bit-widths.

    Attributes:
        counts: pairs of the index of a width and how many units of the operand have it.
    """

    counts: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, counts: Mapping[int, int], place: Mapping[int, int]) -> "Mixture":
        """Return the mixture of counts by bit-width, given the index of each width."""
        return cls(tuple((place[bits], count) for bits, count in counts.items()))

    @property
    def widest(self) -> int:
        """The largest of the indices."""
        return max(index for index, _ in self.counts)

    @property
    def total(self) -> int:
        """Number of units."""
        return sum(count for _, count in self.counts)


#: The bit-width of a site: the index of one width, or several.
WidthIndex = int | Mixture


def has_mixture(width_index: object) -> bool:
    """Tell whether some operand of a network is a mixture; tensors of indices hold none."""
    return isinstance(width_index, Sequence) and any(
        isinstance(item, Mixture) for item in width_index
    )


def shares(item: WidthIndex | None) -> Iterator[tuple[int, Fraction]]:
    """Yield the index of each width of an operand, and the part of its elements that have it.

    None stands for an operand of one fixed width.
    """
    if isinstance(item, Mixture):
        total = item.total
        yield from ((index, Fraction(count, total)) for index, count in item.counts)
    else:
        yield 0 if item is None else item, Fraction(1)
