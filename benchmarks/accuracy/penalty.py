"""The usual way to a budget, for comparison: a factor times the cost, added to the loss.

Every quantizer gets a bit-width between two of its own, learned with the weights: its output lies
between those at the two (arXiv 2007.02017 does so). The cost of a product is that of the bit-widths
in between. After a part of the training each takes the nearest one of its own, and the rest adapts
the weights to these. What it costs in the end depends on the factor, so that a budget takes several
runs.
"""

import copy

import torch
from torch import Tensor, nn

from cgmq_fx.cost.operation import BitSource
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.quantizers import Quantizer

#: The bit-widths that it starts from, and the learning rate of those.
START, RATE = 8, 5e-2


class Between:
    """One quantizer at a learned place between its bit-widths; takes the place of its forward.

    Attributes:
        place: the position among `widths`, a parameter of shape ().
        at: a quantizer for each of `widths`, each with a range of its own.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        widths = quantizer.spec.widths
        self.widths = tuple(bits for bits in widths if bits != FLOAT_WIDTH) or widths
        self.place = nn.Parameter(torch.tensor(float(self.widths.index(START))))
        self.at = [copy.deepcopy(quantizer) for _ in self.widths]
        for bits, own in zip(self.widths, self.at, strict=True):
            own.set_bit_width(bits)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x between what the two nearest bit-widths make of it."""
        if len(self.widths) == 1:
            return self.at[0](x)
        below, part = self._below()
        return torch.lerp(self.at[below](x), self.at[below + 1](x), part)

    def bits(self) -> Tensor:
        """Return the bit-width in between, shape ()."""
        if len(self.widths) == 1:
            return torch.tensor(float(self.widths[0]))
        below, part = self._below()
        return self.widths[below] + part * (self.widths[below + 1] - self.widths[below])

    def nearest(self) -> int:
        """Return the position of the nearest bit-width."""
        return min(max(round(float(self.place.detach())), 0), len(self.widths) - 1)

    def _below(self) -> tuple[int, Tensor]:
        place = self.place.clamp(0, len(self.widths) - 1)
        below = min(int(place.detach()), len(self.widths) - 2)
        return below, place - below


class Penalty:
    """The penalty on a prepared model: the term to add to the loss, and the end of the learning."""

    def __init__(self, prepared: PreparedModule, factor: float) -> None:
        self._prepared, self._factor = prepared, factor
        self._between = {site: Between(own) for site, own in prepared.quantizers.items()}
        for site, own in prepared.quantizers.items():
            own.forward = self._between[site]  # type: ignore[method-assign]

    def ranges(self) -> list[nn.Parameter]:
        """Return the ranges to be learned, of all bit-widths."""
        found = [own.multiplier for between in self._between.values() for own in between.at]
        return [parameter for parameter in found if parameter.requires_grad]

    def places(self) -> list[nn.Parameter]:
        """Return the places alone."""
        return [between.place for between in self._between.values()]

    def term(self) -> Tensor:
        """Return the factor times the bit operations, in percent of those in float."""
        accounting = self._prepared.plan.accounting
        sites = list(self._between.values())
        products, reference = torch.zeros(()), 0
        for bound in accounting.operations:
            macs = bound.operation.macs
            if macs:
                first, second = (_bits(sites, source) for source in bound.sources)
                products = products + macs * first * second
                reference += macs * FLOAT_WIDTH**2
        return self._factor * 100 * products / reference

    def settle(self) -> None:
        """Give every quantizer its nearest bit-width and the range learned there."""
        for site, between in self._between.items():
            quantizer = self._prepared.quantizers[site]
            del quantizer.forward
            own = between.at[between.nearest()]
            quantizer.load_state_dict(own.state_dict())


def _bits(sites: list[Between], source: BitSource) -> Tensor:
    return (
        torch.tensor(float(source.bits or 0)) if source.site is None else sites[source.site].bits()
    )
