"""Rules by which a range is found from what was observed of a tensor.

Data here has the shape (ranges, values), as in `cgmq_fx.calibration`.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from cgmq_fx.calibration import least_squares_ends
from cgmq_fx.fake_quantize import grid_of, span_of
from cgmq_fx.quantizer_spec import Scheme, kernel_bounds

Observer = Literal["minmax", "percentile", "mse", "entropy"]
OBSERVERS: tuple[Observer, ...] = get_args(Observer)

#: The share of values, by size, that the range of ``percentile`` holds; of two ends each.
PERCENTILE = 0.9999
#: Bins of the histogram of ``entropy`` (TensorRT's calibration: 2,048). Finer grids than a quarter
#: of it lose nothing that a histogram would show.
BINS = 2048
_CANDIDATES = tuple(2.0 ** (-step / 8) for step in range(41))
_TINY = 1e-12


def ends_by(
    observer: Observer, rows: Tensor, ends: Tensor, scheme: Scheme, bit_width: int
) -> Tensor:
    """Return the ends that an observer finds, inside `ends`, which hold all that was seen.

    Args:
        observer: ``minmax``: `ends` themselves. ``percentile``: those that hold `PERCENTILE` of the
            values. ``mse``: those of the least squared error at this width. ``entropy``: those
            whose grid keeps most of the distribution, by the Kullback-Leibler divergence.
        rows: (ranges, values).
        ends: what was seen at the most, as `cgmq_fx.fake_quantize.ends_of` has it.
        scheme: of the grid.
        bit_width: of the grid; 0 to 16.
    """
    if observer == "minmax" or bit_width == 0:
        return ends
    if observer == "percentile":
        return _percentile_ends(rows, ends, scheme)
    if observer == "entropy":
        return _entropy_ends(rows, ends, scheme, bit_width)
    return least_squares_ends(rows, ends, scheme, bit_width)


def _percentile_ends(rows: Tensor, ends: Tensor, scheme: Scheme) -> Tensor:
    if scheme == "affine":
        tails = rows.new_tensor([1 - PERCENTILE, PERCENTILE])
        low, high = torch.quantile(rows, tails, dim=1)
        found = torch.stack((-low.clamp(max=0), high.clamp(min=0)))
    else:
        sizes = rows.abs() if scheme == "symmetric" else rows.clamp(min=0)
        found = torch.quantile(sizes, PERCENTILE, dim=1)
    found = torch.minimum(found, ends)
    return torch.where(span_of(found) > 0, found, ends)


def _entropy_ends(rows: Tensor, ends: Tensor, scheme: Scheme, bit_width: int) -> Tensor:
    if 4 * 2**bit_width > BINS:
        return ends
    trials = torch.stack([ends * factor for factor in _CANDIDATES])
    best = []
    for row in range(rows.shape[0]):
        divergences = [
            _divergence(rows[row], trial[..., row], scheme, bit_width) for trial in trials
        ]
        best.append(trials[int(torch.stack(divergences).argmin())][..., row])
    return torch.stack(best, dim=-1)


def _divergence(values: Tensor, ends: Tensor, scheme: Scheme, bit_width: int) -> Tensor:
    """Return how much of the distribution the grid of some ends loses, in nats.

    Values beyond the ends count as the outermost inside. The grid spreads the values of a code
    evenly over the bins from which some came.
    """
    quant_min, quant_max = kernel_bounds(scheme, bit_width)
    bounds = values.new_tensor([quant_min, quant_max])
    grid = grid_of(ends.reshape(*ends.shape, 1), bounds[0], bounds[1])
    low, high = float(grid.low * grid.scale), float(grid.high * grid.scale)
    if not high > low:
        return values.new_tensor(torch.inf)
    inside = torch.histc(values, BINS, low, high)
    seen = torch.histc(values.clamp(low, high), BINS, low, high)
    centers = low + (torch.arange(BINS, device=values.device) + 0.5) * ((high - low) / BINS)
    codes = (centers / grid.scale).round().long()
    codes -= codes.amin()
    size = int(codes.amax()) + 1
    mass = torch.zeros(size, device=values.device).index_add_(0, codes, inside)
    filled = torch.zeros(size, device=values.device).index_add_(0, codes, (inside > 0).float())
    spread = torch.where(inside > 0, (mass / filled.clamp(min=1))[codes], 0.0)
    p, q = seen / seen.sum(), spread / spread.sum().clamp(min=_TINY)
    return torch.where(p > 0, p * ((p + _TINY) / (q + _TINY)).log(), 0.0).sum()
