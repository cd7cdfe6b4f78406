"""How much the outputs change when one tensor is quantized: sensitivities without labels."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cgmq_fx.allocate import PredictedLoss
from cgmq_fx.calibrate import evaluating, passing
from cgmq_fx.calibration_data import Inputs, run
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.sensitivity import cuts

_TINY = 1e-30


def measured_loss(prepared: PreparedModule, batches: Sequence[Inputs]) -> PredictedLoss:
    """Return for each site how far the outputs are off when it alone has a bit-width.

    That is the mean squared error of each output tensor over its mean square, summed over outputs;
    0 where a tensor stays float, infinite where an output is a constant. Sites whose bit-width is
    fixed are quantized throughout, so that it says what more is lost. The model runs once for each
    bit-width of each site and batch.

    Args:
        prepared: a calibrated model, left as it is.
        batches: the inputs of calls.
    """
    sites = prepared.plan.accounting.sites
    prepared = copy.deepcopy(prepared)
    learned = [prepared.quantizers[site.name] for site in sites if len(site.allowed) > 1]
    losses: list[dict[int, float]] = []
    with evaluating(prepared), passing(learned):
        wanted = [_outputs(prepared, inputs) for inputs in batches]
        for site in sites:
            quantizer = prepared.quantizers[site.name]
            loss = dict.fromkeys(site.allowed, 0.0)
            losses.append(loss)
            if len(site.allowed) == 1:
                continue
            tap, quantizer.tap = quantizer.tap, None
            for bits in site.allowed:
                if cuts(site, bits):
                    loss[bits] = math.inf
                elif bits != FLOAT_WIDTH:
                    quantizer.set_bit_width(bits)
                    loss[bits] = _distance(prepared, batches, wanted)
            quantizer.tap = tap
    return losses


def _distance(
    prepared: PreparedModule, batches: Sequence[Inputs], wanted: Sequence[Sequence[Tensor]]
) -> float:
    total = 0.0
    for inputs, outputs in zip(batches, wanted, strict=True):
        for found, output in zip(_outputs(prepared, inputs), outputs, strict=True):
            error = (found - output).double().square().mean()
            total += float(error / output.double().square().mean().clamp(min=_TINY))
    return total / len(batches)


def _outputs(prepared: PreparedModule, inputs: Inputs) -> list[Tensor]:
    """Return the tensors of floats, with values, that a call returns."""
    leaves: list[Any] = torch.utils._pytree.tree_leaves(run(prepared, inputs))
    return [
        leaf.detach().clone()
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()
    ]
