"""How much the loss rises when a tensor is quantized more coarsely."""

import math

from cgmq_fx.accounting import Site
from cgmq_fx.gates import FLOAT_WIDTH, PRUNED_WIDTH
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.quantizers import Quantizer

MEAN, SQUARES = 0, 1
"""Columns of ``plan.statistics``."""

_TINY = 1e-30


def predicted_loss(prepared: PreparedModule) -> list[dict[int, float]]:
    """Return for each site the predicted rise of the loss at each of its allowed bit-widths.

    Second-order Taylor expansion with the empirical Fisher information on the diagonal: the rise is
    proportional to the sum of squared gradients times the mean squared error of the rounding.
    It is infinite where an output would be a constant.
    Before any gradient is known every tensor counts the same, by its error relative to its size.
    """
    squares = prepared.plan.statistics[:, SQUARES].tolist()
    known = any(square > 0 for square in squares)
    losses = []
    for site, square in zip(prepared.plan.accounting.sites, squares, strict=True):
        quantizer = prepared.quantizers[site.name]
        weight = square if known else 1.0 / max(mean_size(quantizer) ** 2, _TINY)
        losses.append(
            {
                bits: math.inf if cuts(site, bits) else weight * rounding_error(quantizer, bits)
                for bits in site.allowed
            }
        )
    return losses


def cuts(site: Site, bits: int) -> bool:
    """Return whether a bit-width leaves an output that no longer depends on the inputs.

    No expansion about the float model sees that, since all other tensors then cost nothing more.
    """
    return site.decisive and bits == PRUNED_WIDTH


def mean_gradients(prepared: PreparedModule) -> list[float]:
    """Return for each site the size of the mean gradient of its tensor."""
    means: list[float] = prepared.plan.statistics[:, MEAN].abs().tolist()
    return means


def mean_size(quantizer: Quantizer) -> float:
    """Return the mean size of a tensor's elements; half its range where no sample of it is kept."""
    if quantizer.has_sample:
        return quantizer.mean_abs
    return _range(quantizer) / 2


def rounding_error(quantizer: Quantizer, bits: int) -> float:
    """Return the mean squared rounding error of a tensor's elements at a bit-width.

    Where no sample of the tensor is kept, that of values spread evenly over its range.
    """
    if bits == FLOAT_WIDTH:
        return 0.0
    if quantizer.has_sample:
        return quantizer.expected_noise(bits)
    return float((_range(quantizer) / 2 ** (bits - 1)) ** 2 / 12)


def _range(quantizer: Quantizer) -> float:
    return float(quantizer.base.mean())
