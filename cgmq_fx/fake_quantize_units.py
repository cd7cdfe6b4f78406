"""Fake quantization of a weight whose channels or elements differ in bit-width.

Of each unit the arithmetic is that of `cgmq_fx.fake_quantize` on a symmetric grid at the unit's
width. Widths enter as tensors here too, so that a change of widths compiles nothing anew.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgmq_fx.fake_quantize import (
    ABSOLUTE_FLOOR,
    BOUNDS,
    RANGE_MAX,
    RANGE_MIN,
    RELATIVE_FLOOR,
    copy_as_laid_out,
    rounded,
    statistics_of,
    widen,
)
from cgmq_fx.native_units import (
    Units,
    native_units_backward,
    native_units_call,
    native_units_forward,
)


class UnitGrid(NamedTuple):
    """The grids of the units of one tensor; all fields broadcast with it.

    Attributes:
        scale: step of each unit.
        high: the greatest step; 0 where the unit is pruned.
        binary: whether a unit has the steps -1 and 1 alone, which reach from -2 to 2; False where
            none can.
    """

    scale: Tensor
    high: Tensor
    binary: Tensor | bool


def unit_grid(
    multiplier: Tensor, unit_range: Tensor, unit_high: Tensor, *, has_binary: bool
) -> UnitGrid:
    """Return the grids of units whose ranges are `multiplier` times `unit_range`.

    Args:
        multiplier: broadcasts with the other two.
        unit_range: the range of each unit where every multiplier is 1, not negative.
        unit_high: the greatest code of each unit; -1 says that its codes are -1 and 1.
        has_binary: whether some unit can have these.
    """
    binary = unit_high < 0 if has_binary else False
    high = torch.where(unit_high < 0, 2.0, unit_high) if has_binary else unit_high
    ends = (widen(multiplier) * unit_range).abs().clamp(RANGE_MIN, RANGE_MAX)
    return UnitGrid(ends / high.clamp(min=1), high, binary)


def unit_steps(x: Tensor, grid: UnitGrid) -> Tensor:
    """Return the codes of x, already wide, as a float tensor."""
    return rounded((x / grid.scale).clamp_max(grid.high).clamp_min(-grid.high), grid.binary)


def fake_quantize_units(
    x: Tensor,
    multiplier: Tensor,
    unit_range: Tensor,
    unit_high: Tensor,
    passthrough: Tensor,
    probe: Tensor,
    *,
    has_binary: bool,
    bypass: bool | None,
) -> Tensor:
    """Return a weight with each unit rounded to its grid and back, in its own dtype.

    Gradients of x, of the multiplier and of the probe are those of `fake_quantize.fake_quantize`;
    of the gain of a range's gradient each unit has a part, by its own width.

    Args:
        x: the weight.
        multiplier: (1,) or, along one axis of x, (channels,), with as many dimensions as x.
        unit_range: broadcasts with x: the range of each unit where every multiplier is 1.
        unit_high: as unit_range, float: see `unit_grid`.
        passthrough: bool, shape (): True where the whole weight is at 32 bits.
        probe: shape (2,).
        has_binary: whether a unit can have 1 bit.
        bypass: what passthrough holds, where the caller knows; None while a compiler traces.
    """
    if bypass and not torch.is_grad_enabled():
        return x  # as `fake_quantize` does, and for the same reason
    apply = cast(Callable[..., Tensor], _FakeQuantizeUnits.apply)  # torch leaves it untyped
    return apply(x, multiplier, unit_range, unit_high, passthrough, probe, has_binary, bypass)


class _FakeQuantizeUnits(torch.autograd.Function):
    """The function of `fake_quantize_units`; saves what it is given and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        multiplier: Tensor,
        unit_range: Tensor,
        unit_high: Tensor,
        passthrough: Tensor,
        probe: Tensor,
        has_binary: bool,
        bypass: bool | None,
    ) -> Tensor:
        ctx.has_binary, ctx.bypass = has_binary, bypass
        if bypass:
            return copy_as_laid_out(x)
        ctx.save_for_backward(x, multiplier, unit_range, unit_high, passthrough)
        units = Units(multiplier, unit_range, unit_high)
        ctx.call = None if bypass is None else native_units_call(x, units)
        if ctx.call is not None:
            return native_units_forward(ctx.call, x, units, BOUNDS)
        grid = unit_grid(multiplier, unit_range, unit_high, has_binary=has_binary)
        out = (unit_steps(widen(x), grid) * grid.scale).to(x.dtype)
        return torch.where(passthrough, x, out) if bypass is None else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_multiplier, needs_probe = (ctx.needs_input_grad[i] for i in (0, 1, 5))
        if not ctx.bypass and ctx.call is not None:
            x, *parts, _ = ctx.saved_tensors
            found = native_units_backward(ctx.call, x, grad_out, Units(*parts), BOUNDS)
            needed = (needs_x, needs_multiplier, needs_probe)
            return _gradients(*(g if n else None for g, n in zip(found, needed, strict=True)))
        grad = widen(grad_out)
        grad_probe = statistics_of(grad) if needs_probe else None
        if ctx.bypass:
            return _gradients(grad_out if needs_x else None, None, grad_probe)
        x, multiplier, unit_range, unit_high, passthrough = ctx.saved_tensors
        grid = unit_grid(multiplier, unit_range, unit_high, has_binary=ctx.has_binary)
        steps = widen(x) / grid.scale
        clipped = steps.clamp_max(grid.high).clamp_min_(-grid.high)
        inside = steps.eq_(clipped)
        grad_x = (grad * inside).to(x.dtype)
        grad_multiplier = None
        if needs_multiplier:
            slope = (rounded(clipped, grid.binary) - clipped * inside).mul_(grad)
            of_end = slope / grid.high.clamp(min=1)
            gain = _unit_gain(x, multiplier, unit_range, unit_high)
            towards = torch.copysign(unit_range * gain, multiplier)
            grad_multiplier = _sum_to(of_end * towards, multiplier)
        if ctx.bypass is None:
            grad_x = torch.where(passthrough, grad_out, grad_x)
            if grad_multiplier is not None:
                grad_multiplier = torch.where(passthrough, 0.0, grad_multiplier)
        return _gradients(grad_x if needs_x else None, grad_multiplier, grad_probe)


def _gradients(
    x: Tensor | None, multiplier: Tensor | None, probe: Tensor | None
) -> tuple[Tensor | None, ...]:
    return x, multiplier, None, None, None, probe, None, None


def _unit_gain(x: Tensor, multiplier: Tensor, unit_range: Tensor, unit_high: Tensor) -> Tensor:
    """Return `fake_quantize.range_gain` of each unit, by its own width and range."""
    values = x.numel() / multiplier.numel()
    floor = (unit_range.amax() * RELATIVE_FLOOR).clamp(min=ABSOLUTE_FLOOR)
    span = torch.maximum(unit_range, floor)
    return (unit_high.abs() / values).sqrt() / span.square()


def _sum_to(values: Tensor, like: Tensor) -> Tensor:
    others = [dim for dim in range(values.ndim) if like.shape[dim] == 1]
    return values.sum(others, keepdim=True).to(like.dtype) if others else values.to(like.dtype)
