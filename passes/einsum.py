"""The work of an Einstein sum of two tensors."""

import math
from collections.abc import Sequence

# An index of an equation: a letter, or a place behind the dots, counted from the right.
_Index = str | int


def einsum_extents(equation: str, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """Return the extents of the product that a sum of two tensors comes to.

    Returns:
        ``batch``, ``m``, ``n`` and ``k``: `batch` products of (m, k) by (k, n). An index that one
        tensor alone has and the result has not is summed before the product, and counts in none.

    >>> einsum_extents("...ij,...jk", [(2, 3, 4), (2, 4, 5)])
    {'batch': 2, 'm': 3, 'n': 5, 'k': 4}
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    pairs = zip(inputs.split(","), shapes, strict=True)
    terms = [_indices(term, len(shape)) for term, shape in pairs]
    extents: dict[_Index, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for index, extent in zip(term, shape, strict=True):
            extents[index] = max(extents.get(index, 1), extent)
    lhs, rhs = map(set, terms)
    dots = {index for index in extents if isinstance(index, int)}
    letters = [index for term in terms for index in term if isinstance(index, str)]
    once = {letter for letter in letters if letters.count(letter) == 1}
    kept = set(output.replace("...", "")) if arrow else once
    result = kept | (dots if not arrow or "..." in output else set())
    groups = {
        "batch": lhs & rhs & result,
        "m": (lhs - rhs) & result,
        "n": (rhs - lhs) & result,
        "k": (lhs & rhs) - result,
    }
    return {name: math.prod(extents[index] for index in group) for name, group in groups.items()}


def _indices(term: str, rank: int) -> list[_Index]:
    before, dots, after = term.partition("...")
    hidden = range(rank - len(before) - len(after), 0, -1) if dots else ()
    return [*before, *hidden, *after]
