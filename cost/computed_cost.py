"""Costs that a Python function computes, for what no formula or grid can say."""

from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

from cgmq_fx.cost.operation import Operation
from cgmq_fx.errors import CostTableError, UsageError
from cgmq_fx.units import exact

#: Operation, first and second bit-width (weight and activation, or rhs and lhs) -> cost.
CostFunction = Callable[[Operation, int, int], int | Fraction | Decimal]
_MAX_KNOWN = 100_000


@dataclass(frozen=True)
class ComputedCost:
    """A function that gives the cost of one piece of work; asked once for equal operations.

    Attributes:
        name: module and qualified name of the function; with `version` its whole identity.
        version: changes whenever the function's results do.
        function: the function; the same arguments must always give the same result.
    """

    name: str
    version: str
    function: CostFunction = field(compare=False, repr=False)
    _known: dict[Any, Fraction] = field(default_factory=dict, compare=False, repr=False, init=False)

    @property
    def text(self) -> str:
        """What people read instead of a formula."""
        return f"computed by {self.name} (version {self.version})"

    def cost(self, operation: Operation, weight_bits: int, activation_bits: int) -> Fraction:
        """Return the cost of one piece of work.

        Raises:
            CostTableError: the function raised, or gave what is no cost.
        """
        key = (
            operation.name, operation.op, operation.target, operation.operands, operation.macs,
            operation.output_elements, operation.input_elements, operation.weights,
            tuple(sorted(operation.attributes.items())), weight_bits, activation_bits,
        )  # fmt: skip
        if key not in self._known:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            try:
                found = self.function(operation, weight_bits, activation_bits)
            except Exception as error:  # whatever a user's function does
                raise CostTableError(
                    f"{self.text} raised {type(error).__name__}: {error}; correct the function, or "
                    "keep such operations from it by 'where'"
                ) from error
            self._known[key] = self._checked(found)
        return self._known[key]

    def _checked(self, found: object) -> Fraction:
        if isinstance(found, float):
            raise CostTableError(
                f"{self.text} gives the float {found!r}, and floats carry rounding of their own; "
                "return an int, a Fraction or a Decimal, such as Fraction(5, 8)"
            )
        if isinstance(found, bool) or not isinstance(found, (int, Fraction, Decimal)):
            raise CostTableError(
                f"{self.text} gives {found!r} of type {type(found).__name__}; return an int, a "
                "Fraction or a Decimal"
            )
        try:
            number = exact(found)
        except UsageError as error:
            raise CostTableError(f"{self.text} gives no cost: {error}") from error
        if number < 0:
            raise CostTableError(f"{self.text} gives {number}; a cost is never negative")
        return number


def computed(function: CostFunction, version: str) -> ComputedCost:
    """Return `function` as a cost."""
    name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"
    return ComputedCost(name, version, function)
