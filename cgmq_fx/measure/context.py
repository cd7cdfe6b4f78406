"""What whole networks take beside the sums of their operations, and what follows for the sums.

An operation between neighbours of a probe is not quite that of a network: caches hold other things,
and memory is reordered at other places. What is off in common to all operations of a class is a
factor on their costs; what is left after that is how far a table can be trusted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from cgmq_fx.cost.table import CostTable
from cgmq_fx.measure.fixing import prepared_for_timing, uniform_bits
from cgmq_fx.measure.rows import Measured, Pair

#: How strongly a factor is held at 1, against a network's relative error of one.
_HOLD = 0.02
#: Factors stay within this and its inverse.
_MOST = 4.0

#: Factor by pair of bit-widths and operation class.
Factors = Mapping[tuple[Pair, str], float]


@dataclass(frozen=True)
class NetworkCheck:
    """A whole network of those that a table is made from; all times in ms.

    Attributes:
        name: class of the model.
        pair: bit-widths of weights and activations.
        measured: its latency.
        sums: what its operations add up to, by class, as they were timed.
    """

    name: str
    pair: Pair
    measured: float
    sums: Mapping[str, float]

    def summed(self, factors: Factors | None = None) -> float:
        """Return what its operations add up to, each multiplied with the factor of its class."""
        known = factors or {}
        return sum(known.get((self.pair, op), 1.0) * cost for op, cost in self.sums.items())


def sums_by_class(
    model: nn.Module, inputs: Sequence[torch.Tensor], table: CostTable, pair: Pair
) -> dict[str, float]:
    """Return what the operations of `model` cost at a pair of bit-widths, by class.

    Raises:
        CgmqError: it cannot be prepared or priced.
    """
    accounting = prepared_for_timing(model, inputs, sorted(set(pair)), table).plan.accounting
    resource = accounting.resources[table.name]
    costs = resource.costs(accounting.index(uniform_bits(accounting, *pair)))
    sums: dict[str, Fraction] = {}
    for bound, cost in zip(accounting.operations, costs, strict=True):
        sums[bound.operation.op] = sums.get(bound.operation.op, Fraction(0)) + cost
    return {op: float(cost) for op, cost in sums.items() if cost}


def fit_factors(checks: Sequence[NetworkCheck]) -> dict[tuple[Pair, str], float]:
    """Return the factors that bring sums nearest to networks, by relative least squares.

    Each is held at 1: where few networks have operations of a class, or they take little of their
    time, it stays near.
    """
    factors: dict[tuple[Pair, str], float] = {}
    for pair in {check.pair for check in checks}:
        here = [check for check in checks if check.pair == pair]
        classes = sorted({op for check in here for op in check.sums})
        shares = np.array([[c.sums.get(op, 0.0) / c.measured for op in classes] for c in here])
        hold = np.sqrt(_HOLD) * np.eye(len(classes))
        goal = np.concatenate([np.ones(len(here)), hold.sum(axis=1)])
        solved = np.linalg.lstsq(np.vstack([shares, hold]), goal, rcond=None)[0]
        bounded = np.clip(solved, 1 / _MOST, _MOST)
        factors |= {(pair, op): float(f) for op, f in zip(classes, bounded, strict=True)}
    return factors


def trust(checks: Sequence[NetworkCheck], factors: Factors) -> float:
    """Return the largest relative error of a network that is left with `factors`."""
    return max(abs(check.summed(factors) / check.measured - 1) for check in checks)


def scaled(measured: Sequence[Measured], factors: Factors) -> list[Measured]:
    """Return what was measured, multiplied with the factors."""
    return [
        replace(item, cost=item.cost * factors.get((item.pair, item.operation.op), 1.0))
        for item in measured
    ]
