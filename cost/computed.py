"""Rows whose cost a Python function computes."""

from collections.abc import Callable, Sequence
from fractions import Fraction

from cgmq_fx.cost.computed_cost import CostFunction, computed
from cgmq_fx.cost.row import Row


def computed_cost(
    op: str | Sequence[str],
    per: str,
    *,
    where: str | None = None,
    source: str = "",
    error: float | str | Fraction | None = None,
    version: str = "1",
) -> Callable[[CostFunction], Row]:
    """Make a row of a `CostTable` out of a function.

    The function is called with the operation, its weight width and its activation width (for two
    activations: the right-hand one, then the left-hand one) and returns the cost of one piece of
    work as an ``int``, a ``Fraction`` or a ``Decimal``. It is called once for equal arguments, at
    every width that is allowed. Such a table has a digest, made of the function's name and
    `version`, and no file: files hold no code.

    Args:
        op: operation classes or FX targets, as in a row.
        per: what one piece of work is, as in a row.
        where: condition on the operation's attributes.
        source: where the numbers come from.
        error: relative uncertainty, 0.05 or "5 %".
        version: raise it when the function's results change.

    Raises:
        CostTableError: some argument is malformed; the message lists every fault.

    >>> @computed_cost(op="conv2d", per="mac", source="two lanes of eight bits")
    ... def price(operation, weight_bits, activation_bits):
    ...     return Fraction(-(-weight_bits // 8) * -(-activation_bits // 8), 2)
    >>> price.per
    'mac'
    """

    def make(function: CostFunction) -> Row:
        # A row turns what it is given into the types that it shows.
        return Row(
            op=op,  # type: ignore[arg-type]
            per=per,
            cost=computed(function, version),
            where=where,  # type: ignore[arg-type]
            source=source,
            error=error,  # type: ignore[arg-type]
        )

    return make
