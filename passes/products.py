"""Products that are no plain `torch.matmul`: where their factors stand, and what they come to."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

_Shape = Sequence[int]
Extents = dict[str, int]
_Place = tuple[int, str]


def _inner(_: fx.Node, lhs: _Shape, rhs: _Shape) -> Extents:
    k = lhs[-1]
    return {"batch": 1, "m": math.prod(lhs) // k, "n": math.prod(rhs) // k, "k": k}


def _dot(_: fx.Node, lhs: _Shape, rhs: _Shape) -> Extents:
    return {"batch": 1, "m": 1, "n": 1, "k": lhs[0]}


def _rows(node: fx.Node, lhs: _Shape, rhs: _Shape) -> Extents:
    dim: Any = node.kwargs.get("dim", -1)
    k = lhs[dim]
    return {"batch": max(math.prod(lhs), math.prod(rhs)) // k, "m": 1, "n": 1, "k": k}


def _added_batch(_: fx.Node, lhs: _Shape, rhs: _Shape) -> Extents:
    return {"batch": lhs[0], "m": lhs[1], "n": rhs[2], "k": lhs[2]}


def _added_vector(_: fx.Node, lhs: _Shape, rhs: _Shape) -> Extents:
    return {"batch": 1, "m": lhs[0], "n": 1, "k": lhs[1]}


def _tensordot(node: fx.Node, lhs: _Shape, rhs: _Shape) -> Extents:
    dims: Any = node.kwargs.get("dims", node.args[2] if len(node.args) > 2 else 2)
    count = dims if isinstance(dims, int) else 0
    axes = range(len(lhs) - count, len(lhs)) if count else () if dims == 0 else dims[0]
    k = math.prod(lhs[axis] for axis in axes)
    return {"batch": 1, "m": math.prod(lhs) // k, "n": math.prod(rhs) // k, "k": k}


_Measure = Callable[[fx.Node, _Shape, _Shape], Extents]
_SECOND: tuple[_Place, _Place] = ((0, "input"), (1, "other"))
_KINDS: tuple[tuple[tuple[Any, ...], tuple[_Place, _Place], _Measure], ...] = (
    ((torch.inner, "inner"), _SECOND, _inner),
    ((torch.dot, torch.vdot, "dot", "vdot"), ((0, "input"), (1, "tensor")), _dot),
    ((torch.linalg.vecdot,), ((0, "x"), (1, "y")), _rows),
    ((torch.addbmm, "addbmm"), ((1, "batch1"), (2, "batch2")), _added_batch),
    ((torch.addmv, "addmv"), ((1, "mat"), (2, "vec")), _added_vector),
    ((torch.tensordot,), ((0, "a"), (1, "b")), _tensordot),
)

_MEASURES: Mapping[Any, _Measure] = {t: m for ts, _, m in _KINDS for t in ts}
#: The functions among the targets, and the names of the methods.
FUNCTIONS: tuple[Any, ...] = tuple(t for t in _MEASURES if not isinstance(t, str))
METHODS: tuple[str, ...] = tuple(t for t in _MEASURES if isinstance(t, str))
# Where the two factors stand, and the keywords that the signature gives them, by target.
_FACTORS: Mapping[Any, tuple[_Place, _Place]] = {
    **dict.fromkeys((torch.bmm, torch.mm, "bmm", "mm"), ((0, "input"), (1, "mat2"))),
    **dict.fromkeys((torch.mv, "mv"), ((0, "input"), (1, "vec"))),
    **dict.fromkeys((torch.addmm, "addmm"), ((1, "mat1"), (2, "mat2"))),
    **dict.fromkeys((torch.baddbmm, "baddbmm"), ((1, "batch1"), (2, "batch2"))),
    torch.einsum: ((1, "operands"), (2, "operands")),
    **{target: factors for targets, factors, _ in _KINDS for target in targets},
}


def factors_of(target: Any) -> tuple[_Place, _Place]:
    """Return where the two factors of a product of class ``matmul`` stand among its arguments.

    Args:
        target: a function, a method of a tensor, or the name of one.
    """
    return _FACTORS.get(target, _FACTORS.get(getattr(target, "__name__", ""), _SECOND))


def product_extents(node: fx.Node, lhs: _Shape, rhs: _Shape) -> Extents | None:
    """Return ``batch``, ``m``, ``n`` and ``k`` of the product that `node` is, None for others.

    Its multiply-accumulates are what these multiply to.
    """
    measure = _MEASURES.get(node.target)
    return None if measure is None else measure(node, lhs, rhs)
