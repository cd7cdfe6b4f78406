"""Weights rounded so that the results of layers change least, not each weight by itself.

What a layer's result is off is a quadratic function of the rounding errors of each row of its
weight (adaptive rounding: Nagel et al. 2020, arXiv 2004.10568; with the second moments of the
layer's input: Frantar et al. 2022, arXiv 2210.17323). It is lowered one weight at a time, in all
rows at once, from nearest rounding on: it never rises, and there is nothing to tune.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cgmq_fx.calibrate import evaluating
from cgmq_fx.calibration_data import Inputs, model_inputs
from cgmq_fx.errors import TrainingError
from cgmq_fx.gates import BINARY_WIDTH, MAX_INTEGER_WIDTH
from cgmq_fx.guide import check_prepared
from cgmq_fx.layer_values import Product, arguments_at, float_twin, products
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.passes.values import find_attribute
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.quantizer_spec import integer_grid
from cgmq_fx.quantizers import QParams, Quantizer
from cgmq_fx.unit_bits import UnitBits

#: Weight that stays near the float one, as a share of the mean second moment of the inputs: few
#: batches say little of directions that they hardly have. The damping of arXiv 2210.17323.
_DAMPING = 0.01
#: Positions of a batch that are looked at, evenly spaced.
_POSITIONS = 2**13
_SWEEPS = 20


@dataclass
class _Moments:
    """Second moments of a layer's input.

    Attributes:
        quantized: ``(groups, values, values)``, of the quantized network's.
        mixed: the same, of the quantized network's with the float network's.
        power: the sum of squares of the float network's results.
    """

    quantized: Tensor
    mixed: Tensor
    power: float = 0.0


def round_weights(
    prepared: PreparedModule, loader: Iterable[Any], *, batches: int | None = None
) -> dict[str, float]:
    """Round the weights of linear layers and convolutions so that their results change least.

    The weights of the model become those that its quantizers round to themselves, layer after
    layer, each with the layers before it quantized. Call it after the bit-widths are chosen: a
    later change of them rounds to the nearest again. Weights that are computed, that other
    operations read too, or that have 0, 1 or 32 bits, stay as they are, and so do those whose
    elements differ in bit-width.

    Args:
        prepared: a model after `cgmq_fx.calibrate`.
        loader: batches as `calibrate` takes them.
        batches: how many to take; None: all. Better more samples than a row has weights.

    Returns:
        By weight quantizer, what the squared error of the results is after it, as a share of that
        of nearest rounding, on the batches.

    Raises:
        TrainingError: the model was not calibrated.
        UsageError: an argument makes no sense, or the loader has no batch.
    """
    prepared = check_prepared(prepared, "round_weights")
    inputs = list(model_inputs(prepared, loader, batches, "round_weights"))
    with evaluating(prepared):
        twin = float_twin(prepared)
        found = {}
        for site, group in _roundable(prepared).items():
            found[site] = _round(prepared, twin, site, group, inputs)
    return found


def _roundable(prepared: PreparedModule) -> dict[str, list[Product]]:
    """Return by site the products of weights that can be rounded on their own."""
    found: dict[str, list[Product]] = {}
    for product in products(prepared):
        quantizer = prepared.quantizers[product.site]
        if not quantizer.is_calibrated:
            raise TrainingError(
                f"round_weights: the quantizer {product.site!r} never saw its weight; call "
                f"cgmq_fx.calibrate(prepared, loader) first"
            )
        if 1 < quantizer.bit_width <= MAX_INTEGER_WIDTH and _has_rows(quantizer):
            found.setdefault(product.site, []).append(product)
    return {site: group for site, group in found.items() if _stands_alone(prepared, site, group)}


def _has_rows(quantizer: Quantizer) -> bool:
    """Tell whether each row of the weight has one grid with more than two values."""
    if not isinstance(quantizer.bit_width, UnitBits):
        return True
    is_by_row = quantizer.spec.num_units == quantizer.spec.num_channels
    return is_by_row and BINARY_WIDTH not in quantizer.bit_width.counts


def _ends(quantizer: Quantizer, qparams: QParams, rows: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest code of each row."""
    bits = quantizer.bit_width
    if not isinstance(bits, UnitBits):
        ends = torch.tensor([[qparams.quant_min, qparams.quant_max]]).expand(rows, 2)
    else:
        ends = torch.tensor([integer_grid("symmetric", width) for width in bits.units])
    return ends[:, 0].contiguous(), ends[:, 1].contiguous()


def _stands_alone(prepared: PreparedModule, site: str, group: Sequence[Product]) -> bool:
    """Tell whether these products alone read the quantizer, and it alone the parameter."""
    calls = {product.operand("weight") for product in group}
    every = {
        node
        for node in prepared.graph.nodes
        if is_quantizer(prepared, node) and str(node.target).rpartition(".")[2] == site
    }
    readers = {user for call in every for user in call.users}
    sources = {call.args[0] for call in every}
    is_parameter = all(
        isinstance(source, fx.Node) and source.op == "get_attr" for source in sources
    )
    if every != calls or readers != {product.node for product in group} or not is_parameter:
        return False
    paths = {str(source.target) for source in sources}
    held = [node for node in prepared.graph.find_nodes(op="get_attr") if node.target in paths]
    others = {user for node in held for user in node.users} - every
    axis = prepared.quantizers[site].spec.channel_axis
    return not others and len(paths) == 1 and axis in (None, 0)


def _round(
    prepared: PreparedModule,
    twin: PreparedModule,
    site: str,
    group: Sequence[Product],
    inputs: Sequence[Inputs],
) -> float:
    quantizer = prepared.quantizers[site]
    weight = _parameter(prepared, group[0])
    moments = None
    for product in group:
        for given in inputs:
            moments = _added(moments, product, prepared, twin, given, weight)
    assert moments is not None
    rounder = _Rounder(quantizer, weight, moments)
    share = rounder.descend()
    weight.copy_(quantizer.dequantize(rounder.codes.reshape(weight.shape), weight.dtype))
    return share


def _parameter(prepared: PreparedModule, product: Product) -> Tensor:
    source: fx.Node = product.operand("weight").args[0]
    held: Tensor = find_attribute(prepared, str(source.target))
    return held


def _added(
    moments: _Moments | None,
    product: Product,
    prepared: PreparedModule,
    twin: PreparedModule,
    inputs: Inputs,
    weight: Tensor,
) -> _Moments:
    """Return the moments with those of a batch added."""
    ours = arguments_at(prepared, product.node, inputs)
    groups = _groups(product, ours, weight)
    quantized = _sampled(product.patches(*ours, groups))
    exact = _sampled(product.patches(*arguments_at(twin, product.node, inputs), groups))
    if moments is None:
        shape = (groups, quantized.shape[2], quantized.shape[2])
        moments = _Moments(weight.new_zeros(shape), weight.new_zeros(shape))
    moments.quantized += quantized.transpose(1, 2) @ quantized
    moments.mixed += quantized.transpose(1, 2) @ exact
    rows = weight.reshape(groups, -1, weight[0].numel())
    moments.power += float((exact @ rows.transpose(1, 2)).double().square().sum())
    return moments


def _groups(product: Product, given: tuple[Any, Any], weight: Tensor) -> int:
    if not product.is_convolution:
        return 1
    args, kwargs = given
    x = args[0] if args else kwargs["input"]
    return int(x.shape[product.channel_axis] // weight.shape[1])


def _sampled(patches: Tensor) -> Tensor:
    step = max(1, patches.shape[1] // _POSITIONS)
    return patches[:, ::step]


class _Rounder:
    """The codes of one weight, by group, row and value.

    Args:
        quantizer: of the weight.
        weight: the float weight, ``(rows, ...)``.
        moments: of its inputs.
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor, moments: _Moments) -> None:
        groups, values = moments.quantized.shape[:2]
        qparams = quantizer.qparams()
        rows = weight.shape[0]
        ends = _ends(quantizer, qparams, rows)
        self.low, self.high = (end.to(weight.device).reshape(groups, -1) for end in ends)
        self.scale = qparams.scale.expand(rows).reshape(groups, -1)
        self.zero_point = qparams.zero_point.expand(rows).reshape(groups, -1)
        self.codes = quantizer.quantize(weight).reshape(groups, -1, values)
        mean = moments.quantized.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
        damped = torch.eye(values, device=weight.device) * (_DAMPING * mean).reshape(-1, 1, 1)
        self.moments = moments.quantized + damped
        exact = weight.reshape(groups, -1, values)
        wanted = (moments.mixed + damped) @ exact.transpose(1, 2)
        self.slope = self._values() @ self.moments - wanted.transpose(1, 2)
        self._exact, self._plain = exact, moments

    def descend(self) -> float:
        """Lower the error until no weight can; return it as a share of what it was."""
        before = self._error()
        for _ in range(_SWEEPS):
            moved = 0
            for value in range(self.codes.shape[2]):
                moved += self._move(value)
            if not moved:
                break
        return self._error() / max(before, 1e-30)

    def _values(self) -> Tensor:
        steps = (self.codes - self.zero_point.unsqueeze(2)).to(self.scale.dtype)
        return steps * self.scale.unsqueeze(2)

    def _move(self, value: int) -> int:
        """Give one weight of every row its best code, all others as they are."""
        curvature = self.moments[:, value, value].unsqueeze(1)
        steps = -self.slope[:, :, value] / curvature / self.scale
        best = (self.codes[:, :, value] + steps).round().clamp(self.low, self.high)
        change = best.to(self.codes.dtype) - self.codes[:, :, value]
        if not bool(change.any()):
            return 0
        self.codes[:, :, value] += change
        shift = change.to(self.scale.dtype) * self.scale
        self.slope += shift.unsqueeze(2) * self.moments[:, value].unsqueeze(1)
        return int(change.count_nonzero())

    def _error(self) -> float:
        """Return the squared error of the results, summed over rows and positions."""
        ours, exact = self._values().double(), self._exact.double()
        quantized, mixed = self._plain.quantized.double(), self._plain.mixed.double()
        quadratic = ((ours @ quantized) * ours).sum()
        crossed = ((exact @ mixed.transpose(1, 2)) * ours).sum()
        return max(0.0, float(quadratic - 2 * crossed) + self._plain.power)
