"""Grids: costs listed by pairs of bit-widths, and what a pair that is not listed costs."""

import bisect
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

Axes = tuple[str, str]

#: The two operands that a grid may list, first axis first.
WEIGHT_AXES: Axes = ("weight", "activation")
PAIR_AXES: Axes = ("lhs", "rhs")


@dataclass(frozen=True, order=True)
class GridEntry:
    """The cost of one pair of bit-widths.

    Attributes:
        first: bit-width on the grid's first axis.
        second: bit-width on its second axis.
        cost: cost of one piece of work, in the table's unit.
        source: where this number comes from, if not from the row's source.
        error: relative uncertainty, 0.05 for 5 %, or None where it is not known.
    """

    first: int
    second: int
    cost: Fraction
    source: str = ""
    error: Fraction | None = None

    def contains(self, first: int, second: int) -> bool:
        """Tell whether operands of these widths fit into this entry's lanes."""
        return self.first >= first and self.second >= second


@dataclass(frozen=True)
class Grid:
    """Costs by pairs of bit-widths; no pair twice, sorted.

    A pair that is not listed costs what the smallest listed pair that contains it costs: a 3-bit
    weight runs in a 4-bit lane. Of several smallest pairs of which none contains another, such as
    (4, 8) and (8, 4) for (3, 3), the cheapest is taken: the hardware's compiler has the choice.
    """

    axes: Axes
    entries: tuple[GridEntry, ...]

    @cached_property
    def _columns(self) -> tuple[list[int], list[tuple[list[int], list[GridEntry]]]]:
        """The first widths, and the second widths and entries of each of them; all rising."""
        found: dict[int, tuple[list[int], list[GridEntry]]] = {}
        for entry in self.entries:
            seconds, entries = found.setdefault(entry.first, ([], []))
            seconds.append(entry.second)
            entries.append(entry)
        return list(found), list(found.values())

    def entry(self, first: int, second: int) -> GridEntry | None:
        """Return the entry that prices a pair, or None where no listed pair contains it."""
        smallest: list[GridEntry] = []
        firsts, columns = self._columns
        for seconds, entries in columns[bisect.bisect_left(firsts, first) :]:
            # First widths rise: a pair is smallest where its second width is below all before.
            at = bisect.bisect_left(seconds, second)
            if at < len(seconds) and (not smallest or seconds[at] < smallest[-1].second):
                smallest.append(entries[at])
                if seconds[at] == second:
                    break
        return min(smallest, key=lambda entry: (entry.cost, entry), default=None)

    def widths(self, axis: int) -> frozenset[int]:
        """Return the bit-widths listed on an axis: those that the hardware has."""
        return frozenset((entry.first, entry.second)[axis] for entry in self.entries)

    def widest(self) -> GridEntry:
        """Return the entry of the widest pair, which contains every other."""
        return max(self.entries, key=lambda entry: (entry.first, entry.second))

    def missing_corner(self) -> tuple[int, int] | None:
        """Return the pair of the widest listed widths if it is not listed.

        Tensors choose their widths one by one, so every combination of listed widths must have a
        price; it has one exactly when this pair is listed.
        """
        corner = max(self.widths(0)), max(self.widths(1))
        return None if self.entry(*corner) else corner
