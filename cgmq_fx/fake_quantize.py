"""Fake quantization with a learned range, as one autograd function.

The numerics of the whole library are fixed here: codes are

    clamp(round(x / scale) + zero_point, quant_min, quant_max)

with a true division (not a product with 1 / scale) and rounding half to even, as QuantizeLinear of
ONNX defines them. Everything that needs codes or scales calls `grid_of` and `to_steps`.

Widths enter as tensors, never as Python constants: a change of width changes what they hold, so a
compiled graph stays valid.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgmq_fx.native_fake_quantize import native_backward, native_call, native_forward

PROBE_SCALE = 2.0**-40
"""What the statistics in a probe's gradient are multiplied by, exactly undone by dividing.

It makes them vanish beside any real gradient, so that clipping by the norm over all parameters
leaves a step as it would be without them.
"""

RANGE_MIN, RANGE_MAX = 2.0**-100, 2.0**126
"""Bounds of a range in real units: every scale up to 16 bits is finite and no subnormal number."""


RELATIVE_FLOOR, ABSOLUTE_FLOOR = 2.0**-3, 2.0**-10
"""What a weight's range counts for at least in `range_gain`: a share of the largest; real units."""

BOUNDS = (RANGE_MIN, RANGE_MAX, RELATIVE_FLOOR, ABSOLUTE_FLOOR, PROBE_SCALE)
"""What the kernels have to know of these constants."""

# Steps from end to end of a binary grid; others have 2^b - 1, 2^b - 2, or none.
_BINARY_SPAN = 4

BLOCK_VALUES = 2**17
"""Values of a large tensor worked on at a time: temporaries of this size fit a CPU's cache."""


class Grid(NamedTuple):
    """Where the representable values lie: k * scale for the integers k from low to high.

    scale, zero_point, low and high are float tensors of shape (ranges,); zero_point, low and high
    hold integers, and may have shape () where all ranges share them. A code is k + zero_point.
    Binary grids have the values -scale and scale, and reach from -2 to 2 steps, as no other does.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def together(self) -> "Grid":
        """Return the grid as rows of one tensor.

        A compiler for CPUs computes that once. It would compute the fields again in every loop that
        reads them, and as they come from many tensors, keep results of the loops in memory instead.
        """
        return Grid(*torch.stack([field.expand_as(self.scale) for field in self]).unbind())

    def along(self, axis: int | None, ndim: int) -> "Grid":
        """Return the grid with its ranges along `axis` of tensors with `ndim` dimensions."""
        return Grid(*(_along(field, axis, ndim) for field in self))


def _along(per_range: Tensor, axis: int | None, ndim: int) -> Tensor:
    if per_range.ndim == 0:
        return per_range
    if axis is None:
        return per_range.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return per_range.view(shape)


def widen(x: Tensor) -> Tensor:
    """Return x in the precision of the arithmetic here: float32, or float64 where it is that."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def span_of(ends: Tensor) -> Tensor:
    """Return the unit in which the ends of each range move, shape (ranges,): their sum."""
    return ends.sum(0) if ends.ndim == 2 else ends


def ends_of(multiplier: Tensor, base: Tensor) -> Tensor:
    """Return the distances from 0 to the ends of the range, in real units, signed.

    Shape (ranges,): the range reaches up to the end (and down to its negative where symmetric).
    Shape (2, ranges), affine: from minus the first row to the second, each of which a multiplier
    moves by shares of the whole span, so that an end at 0 can move too. An end that an optimizer's
    step carried below 0 counts by its size.
    """
    multiplier, base = widen(multiplier), widen(base)
    return multiplier * base if base.ndim == 1 else base + (multiplier - 1) * span_of(base)


def grid_of(ends: Tensor, quant_min: Tensor, quant_max: Tensor) -> Grid:
    """Return the grid on which codes from quant_min to quant_max span the range with these ends.

    A positive quant_min makes it binary: the range is cut into two halves, each of which has its
    middle for a value. At 0 bits, where both are 0, every scale will do.
    """
    ends = ends.abs()
    low, high = quant_min.to(ends.dtype), quant_max.to(ends.dtype)
    if ends.ndim == 1:
        is_binary = low > 0
        high = torch.where(is_binary, 2 * high, high)
        low = torch.where(is_binary, -high, low)
        scale = ends.clamp(RANGE_MIN, RANGE_MAX) / high.clamp(min=1)
        return Grid(scale, torch.zeros_like(high), low, high)
    ends = ends.clamp(max=RANGE_MAX)
    scale = ends.sum(0).clamp(min=RANGE_MIN) / (high - low).clamp(min=1)
    zero_point = (ends[0] / scale).round().clamp(low, high)
    return Grid(scale, zero_point, low - zero_point, high - zero_point)


def to_steps(x: Tensor, grid: Grid, *, is_binary: Tensor | bool = False) -> Tensor:
    """Return codes - zero_point as a float tensor, for x already wide and a grid along its axis.

    `is_binary` says whether the grid is; a tensor says it where that is to be read late.
    """
    steps = (x / grid.scale).clamp_max_(grid.high).clamp_min_(grid.low)
    return rounded(steps, is_binary)


def rounded(steps: Tensor, is_binary: Tensor | bool) -> Tensor:
    """Return the nearest codes - zero_point; of a binary grid -1 below 0, else 1."""
    if is_binary is False:
        return steps.round()
    ones = torch.ones((), dtype=steps.dtype, device=steps.device)
    # -0.0 + 0.0 is 0.0; the product with 0 keeps what is not a number.
    signs = torch.copysign(ones, steps + 0.0) + steps * 0.0
    return signs if is_binary is True else torch.where(is_binary, signs, steps.round())


def _is_binary(grid: Grid, *, is_weight: bool, affine: bool) -> Tensor | bool:
    """Return whether a grid is binary, as a tensor, where it could be."""
    return grid.high - grid.low == _BINARY_SPAN if is_weight and not affine else False


def fake_quantize(
    x: Tensor,
    multiplier: Tensor,
    base: Tensor,
    quant_min: Tensor,
    quant_max: Tensor,
    passthrough: Tensor,
    probe: Tensor,
    *,
    channel_axis: int | None,
    is_weight: bool,
    bypass: bool | None,
) -> Tensor:
    """Return x rounded to the grid and back, in its own dtype; x itself, copied, at 32 bits.

    Gradients:
        x: straight through inside the range, 0 outside.
        multiplier: the LSQ gradient (arXiv 1902.08153, eq. 3) times `range_gain`.
        probe: PROBE_SCALE * [mean of the output's gradient, sum of its squares], at 32 bits too.

    Args:
        x: any shape, floating.
        multiplier: (ranges,), or (2, ranges) for an affine range; see `ends_of`.
        base: the shape of multiplier, not negative: the ends where every multiplier is 1.
        quant_min: integer, shape (); with quant_max as `kernel_bounds` has them.
        quant_max: integer, shape ().
        passthrough: bool, shape (): True at 32 bits.
        probe: shape (2,); its values are never read.
        channel_axis: the axis of x that has the ranges, None for one range.
        is_weight: whether the range's gradient is scaled as a weight's.
        bypass: what passthrough holds, where the caller knows it without reading the tensor; None
            while a compiler traces: both results are then computed and the tensor selects.
    """
    if bypass and not torch.is_grad_enabled():
        # No copy: by whether a weight requires a gradient torch chooses kernels, which round apart.
        return x
    apply = cast(Callable[..., Tensor], _FakeQuantize.apply)  # torch leaves it untyped
    tensors = (x, multiplier, base, quant_min, quant_max, passthrough, probe)
    return apply(*tensors, channel_axis, is_weight, bypass)


def range_gain(numel: float, quant_max: Tensor, base: Tensor, *, is_weight: bool) -> Tensor:
    """Return what the gradient of a multiplier is multiplied by, per range.

    It makes one learning rate suit every range under plain SGD (Adam does not see it), by the rule
    of LSQ (arXiv 1902.08153, section 2.2): a range moves by the same share of itself as the weights
    do of themselves. For the multiplier of a weight's range r, with numel values in it, that is
    1 / (sqrt(numel) r^2), as the weights' own relative step goes with 1 / r^2; an activation has no
    step of its own to match, and r drops out. LSQ's growth with quant_max (to the 3/2 in these
    units) assumes ranges that grow with the width as well; the square root lies between what the
    rounded values ask for (1) and the clipped ones (0).

    A multiplier's plain gradient times LSQ's 1 / sqrt(numel * quant_max) stands still instead: a
    small LeNet-5 without batch norm on 8,000 MNIST images at 2 bits, SGD, mean of 3 seeds, reached
    91.5 % with ranges held, 91.8 % so and 93.6 % with this rule.
    """
    gain = (widen(quant_max) / numel).sqrt()
    if not is_weight:
        return gain
    # Training leaves dead channels with weights near 1e-20; what they get must stay finite.
    span = span_of(widen(base))
    floor = (span.amax() * RELATIVE_FLOOR).clamp(min=ABSOLUTE_FLOOR)
    return gain / torch.maximum(span, floor).square()


def copy_as_laid_out(x: Tensor) -> Tensor:
    """Return a copy of x with its strides, gaps and repetitions included.

    `Tensor.clone` packs a slice or an expanded tensor; a product then takes another kernel, which
    rounds apart.
    """
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if stride == 0 and size > 1:
            return copy_as_laid_out(x.narrow(dim, 0, 1)).expand_as(x)
    copied = x.clone()
    if copied.stride() == x.stride() or _overlaps(x):
        return copied
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _overlaps(x: Tensor) -> bool:
    """Tell whether two elements of x may have one place in memory, as in sliding windows."""
    reached = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reached:
                return True
            reached += stride * (size - 1)
    return False


class _FakeQuantize(torch.autograd.Function):
    """The function of `fake_quantize`; saves x and small tensors, recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        multiplier: Tensor,
        base: Tensor,
        quant_min: Tensor,
        quant_max: Tensor,
        passthrough: Tensor,
        probe: Tensor,
        channel_axis: int | None,
        is_weight: bool,
        bypass: bool | None,
    ) -> Tensor:
        ctx.channel_axis, ctx.is_weight, ctx.bypass = channel_axis, is_weight, bypass
        if bypass:
            # A copy: autograd forbids in-place operations on an input that is returned as it is.
            return copy_as_laid_out(x)
        tensors = (x, multiplier, base)
        ctx.call = (
            None if bypass is None else native_call(*tensors, channel_axis, is_weight=is_weight)
        )
        if ctx.call is not None:
            ends = (multiplier, base, quant_min, quant_max)
            out, qparams = native_forward(ctx.call, x, ends, BOUNDS)
            ctx.save_for_backward(x, base, quant_max, qparams)
            return out
        reach = ends_of(multiplier, base)
        grid = grid_of(reach, quant_min, quant_max)
        if bypass is None:
            grid = grid.together()
        ctx.save_for_backward(x, base, quant_max, passthrough, reach, *grid)
        inner = grid.along(channel_axis, x.ndim)
        is_binary = _is_binary(inner, is_weight=is_weight, affine=base.ndim == 2)
        out = to_steps(widen(x), inner, is_binary=is_binary).mul_(inner.scale).to(x.dtype)
        return torch.where(passthrough, x, out) if bypass is None else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_multiplier, needs_probe = (ctx.needs_input_grad[i] for i in (0, 1, 6))
        if not ctx.bypass and ctx.call is not None:
            x, *saved = ctx.saved_tensors
            found = native_backward(ctx.call, x, grad_out, saved, BOUNDS)
            needed = (needs_x, needs_multiplier, needs_probe)
            return _gradients(*(g if n else None for g, n in zip(found, needed, strict=True)))
        grad_probe = statistics_of(widen(grad_out)) if needs_probe else None
        if ctx.bypass:
            return _gradients(grad_out if needs_x else None, None, grad_probe)
        x, base, quant_max, passthrough, ends, *fields = ctx.saved_tensors
        grid = Grid(*fields)
        inner = grid.along(ctx.channel_axis, x.ndim)
        axis, affine = ctx.channel_axis, ends.ndim == 2
        is_binary = _is_binary(inner, is_weight=ctx.is_weight, affine=affine)
        kind = (affine, is_binary)
        if ctx.bypass is not None and _fits_blocks(x, grad_out, axis):
            grad_x, sums = _backpropagate_in_blocks(x, grad_out, inner, kind)
        else:
            grad_x, sums = _backpropagate(x, grad_out, inner, axis, kind)
        grad_multiplier = None
        if needs_multiplier:
            grad_ends = _grad_ends(sums, ends, grid)
            numel = x.numel() / sums.shape[1]
            gain = range_gain(numel, quant_max, base, is_weight=ctx.is_weight)
            grad_multiplier = grad_ends * torch.copysign(span_of(widen(base)) * gain, ends)
            grad_multiplier = grad_multiplier.to(base.dtype)
        if ctx.bypass is None:
            grad_x = torch.where(passthrough, grad_out, grad_x)
            if grad_multiplier is not None:
                grad_multiplier = torch.where(passthrough, 0.0, grad_multiplier)
        return _gradients(grad_x if needs_x else None, grad_multiplier, grad_probe)


def _gradients(
    x: Tensor | None, multiplier: Tensor | None, probe: Tensor | None
) -> tuple[Tensor | None, ...]:
    return x, multiplier, None, None, None, None, probe, None, None, None


def _backpropagate(
    x: Tensor,
    grad_out: Tensor,
    grid: Grid,
    axis: int | None,
    kind: tuple[bool, Tensor | bool],
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and sums per range in rows; `kind`: is it affine, is it binary?

    The first is the gradient of the scale where zero_point is held; the second, for affine ranges,
    the sum of the gradients that meet clipped values.
    """
    grad = widen(grad_out)
    steps = widen(x) / grid.scale
    clipped = steps.clamp_max(grid.high).clamp_min_(grid.low)
    inside = steps.eq_(clipped)  # 1.0 or 0.0: several times faster on CPU than a bool mask
    grad_x = grad * inside
    # d out / d scale: the rounding error inside the range, the end of the grid outside.
    affine, is_binary = kind
    slope = rounded(clipped, is_binary).sub_(clipped.mul_(inside)).mul_(grad)
    sums = [_per_range(slope, axis)]
    if affine:
        sums.append(_per_range(grad - grad_x, axis))
    return grad_x.to(grad_out.dtype), torch.stack(sums)


def _backpropagate_in_blocks(
    x: Tensor, grad_out: Tensor, grid: Grid, kind: tuple[bool, Tensor | bool]
) -> tuple[Tensor, Tensor]:
    """Do the same for one range, in pieces that stay in the cache.

    Fresh temporaries of the size of a large activation cost more than all arithmetic on them.
    """
    grad_x, sums = grad_out.new_empty(grad_out.shape), []
    blocks = zip(*(_blocks(tensor) for tensor in (x, grad_out, grad_x)), strict=True)
    for block, grad, target in blocks:
        result, block_sums = _backpropagate(block, grad, grid, None, kind)
        target.copy_(result)
        sums.append(block_sums)
    return grad_x, torch.stack(sums).sum(0)


def _fits_blocks(x: Tensor, grad_out: Tensor, axis: int | None) -> bool:
    if axis is not None or x.numel() <= BLOCK_VALUES or x.device.type != "cpu":
        return False
    return x.is_contiguous() and grad_out.is_contiguous()


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.view(-1), BLOCK_VALUES)


def statistics_of(grad: Tensor) -> Tensor:
    """Return the gradient of a probe, from that of the output in a wide type; shape (2,)."""
    if torch.compiler.is_compiling():
        mean, squares = _total(grad) / max(grad.numel(), 1), _total(grad * grad)
    else:
        mean = grad.sum() / max(grad.numel(), 1)
        squares = torch.linalg.vector_norm(grad).square()
    return torch.stack((mean, squares)) * PROBE_SCALE


def _total(values: Tensor) -> Tensor:
    """Return the sum of all values.

    It goes over channels first, so that a compiler does it in the loop that has the sums of the
    batch norm before the quantizer.
    """
    if values.ndim < 4:
        return values.sum()
    others = [dim for dim in range(values.ndim) if dim != 1]
    return values.sum(others).sum()


def _per_range(values: Tensor, axis: int | None) -> Tensor:
    """Return the sums of `values` over each range, shape (ranges,)."""
    if axis is None:
        total = _total(values) if torch.compiler.is_compiling() else values.sum()
        return total.reshape(1)
    others = [dim for dim in range(values.ndim) if dim != axis % values.ndim]
    return values.sum(others) if others else values


def _grad_ends(sums: Tensor, ends: Tensor, grid: Grid) -> Tensor:
    """Return the gradient with respect to the size of `ends` from the sums of `_backpropagate`.

    In an affine range zero_point follows both ends, straight through its rounding, and moves every
    clipped value.
    """
    if ends.ndim == 1:
        return sums[0] / grid.high.clamp(min=1)
    of_scale, of_clipped = sums
    steps = (grid.high - grid.low).clamp(min=1)
    of_scale = of_scale + of_clipped * ends[0].abs() / grid.scale
    return torch.stack((of_scale / steps - of_clipped, of_scale / steps))
