"""How much the loss rises when a tensor is quantized more coarsely."""

from cgmq_fx.errors import TrainingError
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.quantizers import Quantizer

MEAN, SQUARES = 0, 1
"""Columns of ``plan.statistics``."""


def predicted_loss(prepared: PreparedModule) -> list[dict[int, float]]:
    """Return for each site the predicted rise of the loss at each of its allowed bit-widths.

    Second-order Taylor expansion with the empirical Fisher information on the diagonal: the rise is
    proportional to the sum of squared gradients times the mean squared error of the rounding. Before any
    gradient is known every tensor counts the same, by its error relative to its size.
    """
    statistics = prepared.plan.statistics.tolist()
    known = any(row[SQUARES] > 0 for row in statistics)
    losses = []
    for site, row in zip(prepared.plan.accounting.sites, statistics, strict=True):
        quantizer = prepared.quantizers[site.name]
        weight = row[SQUARES] if known else 1.0 / max(_mean_square(quantizer), 1e-30)
        losses.append({bits: weight * rounding_error(quantizer, bits) for bits in site.allowed})
    return losses


def rounding_error(quantizer: Quantizer, bits: int) -> float:
    """Return the mean squared rounding error of a tensor's elements at a bit-width."""
    if bits == FLOAT_WIDTH:
        return 0.0
    try:
        return quantizer.expected_noise(bits)
    except TrainingError:  # no sample of the tensor is kept: uniform rounding error over the range
        reach = float(quantizer.base.detach().abs().mean())
        return (reach / 2 ** (bits - 1)) ** 2 / 12


def _mean_square(quantizer: Quantizer) -> float:
    try:
        return quantizer.mean_abs**2
    except TrainingError:
        return float(quantizer.base.detach().abs().mean()) ** 2
