"""Einstein sums: one spelling of their arguments, and the work of one of two tensors."""

import math
import string
from collections.abc import Sequence
from typing import Any

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


def spelled_out(args: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments of `torch.einsum` as an equation and one argument for each tensor.

    Tensors may be given as one list, or each with the list of its indices; torch itself makes
    these an equation in the same way.

    >>> spelled_out(("ij,jk", ["A", "B"]))
    ('ij,jk', 'A', 'B')
    >>> spelled_out(("A", [0, 1], "B", [1, 30], [0, 30]))
    ('AB,Be->Ae', 'A', 'B')
    """
    if args and isinstance(args[0], str) and not _is_indices(args, 1):
        tensors = args[1:]
        one_list = len(tensors) == 1 and isinstance(tensors[0], list | tuple)
        return (args[0], *(tensors[0] if one_list else tensors))
    pairs = len(args) // 2
    equation = ",".join(map(_term, args[1 : 2 * pairs : 2]))
    if len(args) % 2:
        equation += f"->{_term(args[-1])}"
    return (equation, *args[: 2 * pairs : 2])


def _is_indices(args: Sequence[Any], place: int) -> bool:
    found = args[place] if place < len(args) else None
    return isinstance(found, list | tuple) and all(
        index is Ellipsis or isinstance(index, int) for index in found
    )


def _term(indices: Sequence[Any]) -> str:
    letters = string.ascii_uppercase + string.ascii_lowercase
    return "".join("..." if index is Ellipsis else letters[index] for index in indices)
