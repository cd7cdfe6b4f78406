"""Predicts the time of operations that were not timed from those that were.

The model is a sum of what an operation costs in any case and what each MAC, element and weight
adds, none of it negative: the least squares of *relative* errors. Every subset of these terms is
tried, and the one that best predicts operations which it did not see (leave one out) is kept.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cgmq_fx.cost.attributes import operation_variables
from cgmq_fx.cost.expression import Expression
from cgmq_fx.cost.operation import Operation

#: Terms besides the constant, as formulas of a cost table.
TERMS = ("macs", "output_elements", "input_elements", "weights")
#: Terms for convolutions besides: elements of the matrix of patches that a kernel of more than one
#: element is multiplied with.
PATCHES = "macs / out_channels"
#: Operations faster than this share of the mean count as if they took as long: they do not matter.
_NEGLIGIBLE = 0.1
_DIGITS = 4

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Fitted:
    """Time as a formula.

    Attributes:
        coefficients: of each term, "1" for the constant.
        error: sum of the absolute errors at operations that were left out, over the sum of times.
    """

    coefficients: Mapping[str, float]
    error: float

    @property
    def formula(self) -> str:
        """The formula, in the terms of a cost table."""
        parts = [
            f"{value:.{_DIGITS}g}" if term == "1" else f"{value:.{_DIGITS}g} * {term}"
            for term, value in self.coefficients.items()
            if value > 0
        ]
        return " + ".join(parts) or "0"


def fit(operations: Sequence[Operation], times: Sequence[float]) -> Fitted:
    """Return the formula that predicts `times` best.

    Args:
        operations: what was timed; all of them have the same variables.
        times: of each; zeros are allowed.
    """
    measured = np.asarray(times, dtype=np.float64)
    if not measured.any():
        return Fitted({}, 0.0)
    names = ("1", *_terms(operations[0]))
    columns = np.array([[_value(term, item) for term in names] for item in operations])
    floor = _NEGLIGIBLE * measured.mean()
    weights = 1 / np.maximum(measured, floor)
    # Every term counts at most half as often as there are operations: the rest tells them apart.
    most = max(1, min(len(names), len(operations) // 2))
    found: list[tuple[float, int, tuple[int, ...]]] = []
    for size in range(1, most + 1):
        for chosen in itertools.combinations(range(len(names)), size):
            error = _left_out_error(columns[:, list(chosen)], measured, weights)
            if error is not None:
                found.append((error, size, chosen))
    error, _, chosen = min(found)
    solved = _solve(columns[:, list(chosen)], measured, weights)
    assert solved is not None
    pairs = zip((names[index] for index in chosen), map(float, solved), strict=True)
    return Fitted(dict(pairs), error)


def _terms(operation: Operation) -> tuple[str, ...]:
    variables = operation_variables(operation)
    patches = (PATCHES,) if "out_channels" in variables and operation.macs else ()
    return *(term for term in TERMS if variables[term]), *patches


def _value(term: str, operation: Operation) -> float:
    return (
        1.0 if term == "1" else float(Expression.parse(term).number(operation_variables(operation)))
    )


def _solve(columns: Vector, times: Vector, weights: Vector) -> Vector | None:
    """Return the coefficients, None where a term is negative or cannot be told from others."""
    scale = np.abs(columns).max(axis=0)
    if not scale.all():
        return None
    scaled = columns / scale * weights[:, None]
    solved, _, rank, _ = np.linalg.lstsq(scaled, times * weights, rcond=None)
    if rank < columns.shape[1] or (solved < 0).any():
        return None
    result: Vector = solved / scale
    return result


def _left_out_error(columns: Vector, times: Vector, weights: Vector) -> float | None:
    """Return the error of predictions of operations from the others; None where none are made."""
    if _solve(columns, times, weights) is None:
        return None
    if len(times) == 1:
        return 1.0  # nothing tells how far it carries
    total = 0.0
    for index in range(len(times)):
        kept = np.arange(len(times)) != index
        solved = _solve(columns[kept], times[kept], weights[kept])
        if solved is None:
            return None
        total += abs(float(columns[index] @ solved) - float(times[index]))
    return total / float(times.sum())
