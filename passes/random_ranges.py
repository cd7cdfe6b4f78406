"""Comparisons of random numbers that their range decides."""

import operator

import torch
from torch import fx

_UNIFORM = frozenset({torch.rand, torch.rand_like})
# What a number in [0, 1) answers, where the bound decides: below zero or at it, at one or above.
_DECIDED = {
    operator.lt: (False, True),
    operator.ge: (True, False),
    operator.le: (None, True),
    operator.gt: (None, False),
}


def decide_by_range(node: fx.Node) -> bool | None:
    """Return what the truth of `node` is for every random number, None where chance decides.

    A layer is dropped where ``torch.rand([]) < probability``; with a probability of zero it never
    is.
    """
    answers = _DECIDED.get(node.target)  # type: ignore[arg-type]
    if answers is None or len(node.args) != 2:
        return None
    drawn, bound = node.args
    is_uniform = isinstance(drawn, fx.Node) and drawn.target in _UNIFORM
    if not is_uniform or not isinstance(bound, int | float):
        return None
    at_zero, at_one = answers
    if bound < 0 and node.target in (operator.le, operator.gt):
        return node.target is operator.gt
    return at_zero if bound <= 0 else at_one if bound >= 1 else None
