"""Finding a range from data: what was observed, and the range that loses least at a width.

Data here has the shape (ranges, values): one row for each range. Ends are those of
`cgmq_fx.fake_quantize.ends_of`.
"""

import math

import torch
from torch import Tensor

from cgmq_fx.fake_quantize import RANGE_MAX, RANGE_MIN, grid_of, span_of, to_steps, widen
from cgmq_fx.quantizer_spec import Scheme, kernel_bounds

# Clipping factors of the least-squares search: halves of octaves down to 1/64, where heavy tails
# have their optimum at 2 bits, then sixteenths of an octave around the best of them.
COARSE = tuple(2.0 ** (-step / 2) for step in range(1, 13))
FINE = tuple(2.0 ** (step / 16) for step in range(-7, 8) if step)


def rows_of(x: Tensor, channel_axis: int | None) -> Tensor:
    """Return x as (ranges, values), in the precision of the arithmetic; a view where possible."""
    x = widen(x.detach())
    if channel_axis is None:
        return x.reshape(1, -1)
    return x.movedim(channel_axis, 0).reshape(x.shape[channel_axis], -1)


def subsample(rows: Tensor, limit: int) -> Tensor:
    """Return about `limit` values in all, evenly spaced in each row; the same ones every time.

    The stride has no factor in common with the row's length: it walks through every index of every
    axis, where a stride of one image row would see one column only.
    """
    values = rows.shape[1]
    stride = math.ceil(values / max(limit // rows.shape[0], 1))
    while stride > 1 and math.gcd(stride, values) != 1:
        stride += 1
    return rows[:, ::stride]


def condensed(rows: Tensor, limit: int) -> Tensor:
    """Return about `limit` values of rows, and the least and the greatest of each; a copy."""
    extremes = torch.stack(rows.aminmax(dim=1), dim=1)
    return torch.cat((subsample(rows, limit), extremes), dim=1)


def observed_ends(rows: Tensor, scheme: Scheme) -> Tensor:
    """Return the ends that just hold every value, 0 included; NaN or infinite where a value is.

    A range that saw nothing but 0 gets the largest of the others, or 1: any is right, none tiny.
    """
    low, high = rows.aminmax(dim=1)
    if scheme == "affine":
        ends = torch.stack((-low.clamp(max=0), high.clamp(min=0)))
    else:
        ends = torch.maximum(-low, high) if scheme == "symmetric" else high.clamp(min=0)
    span = span_of(ends)
    top = torch.where(span.amax() > 0, span.amax(), 1.0)
    spare = top if ends.ndim == 1 else torch.stack((torch.zeros_like(top), top)).unsqueeze(1)
    return torch.where(span == 0, spare, ends).clamp(max=RANGE_MAX)


def squared_error(rows: Tensor, ends: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Return the sum over each row of the squared rounding and clipping error.

    The bounds are those of `kernel_bounds`.
    """
    bounds = rows.new_tensor([quant_min, quant_max])
    grid = grid_of(ends, bounds[0], bounds[1]).along(0, 2)
    return (
        to_steps(rows, grid, is_binary=quant_min > 0).mul_(grid.scale).sub_(rows).square_().sum(1)
    )


def least_squares_ends(rows: Tensor, ends: Tensor, scheme: Scheme, bit_width: int) -> Tensor:
    """Return the ends near `ends` with the least squared error at this width, row by row.

    Tries clipping factors of both ends together and, where the ends are two, of each alone. Never
    worse on these rows than `ends`.
    """
    quant_min, quant_max = kernel_bounds(scheme, bit_width)
    # In units of a power of two near the span, so that squares neither overflow nor vanish.
    unit = torch.exp2(span_of(ends).clamp(min=RANGE_MIN).log2().ceil())
    scaled, best = rows / unit.unsqueeze(1), ends / unit
    error = squared_error(scaled, best, quant_min, quant_max)
    movable = [(1, 1), (1, 0), (0, 1)] if ends.ndim == 2 else [(1,)]
    for rows_moved in movable:
        moved = rows.new_tensor(rows_moved).bool().reshape(-1, 1).expand(-1, rows.shape[0])
        for factors in (COARSE, FINE):
            start = best
            for factor in factors:
                trial = torch.where(moved.reshape(start.shape), start * factor, start)
                trial_error = squared_error(scaled, trial, quant_min, quant_max)
                better = trial_error < error
                best = torch.where(better, trial, best)
                error = torch.where(better, trial_error, error)
    return best * unit
