"""The quantizer of a weight whose channels or elements have bit-widths of their own."""

from typing import Any

import torch
from torch import Tensor

from cgmq_fx.calibration import least_squares_ends, observed_ends, subsample
from cgmq_fx.errors import UsageError
from cgmq_fx.fake_quantize import widen
from cgmq_fx.fake_quantize_units import UnitGrid, fake_quantize_units, unit_grid, unit_steps
from cgmq_fx.gates import BINARY_WIDTH, FLOAT_WIDTH, gate_for, width_index
from cgmq_fx.quantizer import QParams, Quantizer
from cgmq_fx.quantizer_spec import QuantizerSpec, integer_grid
from cgmq_fx.unit_bits import UnitBits, bits_of

# How many values of the weight the ranges of all widths are fitted on; the second is per range.
_FIT_VALUES, _FIT_VALUES_PER_RANGE = 2**16, 256


class UnitQuantizer(Quantizer):
    """Fake-quantizes a weight, each of its channels or elements at the width its gate selects.

    Every width has a range of its own, fitted to the weight, for each output channel where the
    weight has these. One multiplier, learned, moves all ranges of a channel together.
    `bit_width` is a plain number where all units have one width, else `UnitBits`. At 32 bits the
    weight passes through as a whole.

    Args:
        spec: with a unit_shape.
        name: what messages call this quantizer.
    """

    ranges: Tensor
    unit_range: Tensor
    unit_high: Tensor

    def __init__(self, spec: QuantizerSpec, name: str = "") -> None:
        super().__init__(spec, name)
        widest = gate_for(spec.widths[-1], spec.widths)
        self.gate = torch.full(spec.unit_shape, widest)
        #: The allowed widths that have a grid, rising: what `ranges` and `unit_errors` are by.
        self.grid_widths = tuple(bits for bits in spec.widths if bits != FLOAT_WIDTH)
        self._has_binary = BINARY_WIDTH in spec.widths
        self.register_buffer("ranges", torch.ones(len(self.grid_widths), spec.num_channels))
        for buffer in ("unit_range", "unit_high"):
            self.register_buffer(buffer, torch.ones(spec.unit_shape), persistent=False)
        self._follow_gate()
        self._spread()

    def set_bit_width(self, bit_width: int) -> None:
        """Put the gates in the middle of the bands of `bit_width`, a number or `UnitBits`.

        Raises:
            UsageError: a width is not one of the quantizer's, or there are not as many as units.
        """
        if not isinstance(bit_width, UnitBits):
            super().set_bit_width(bit_width)
            return
        widths, units = self.spec.widths, bit_width.array
        wrong = sorted(set(bit_width.counts).difference(widths))
        if wrong or len(units) != self.spec.num_units:
            fault = f"has {wrong}" if wrong else f"is of {len(units):,} units"
            raise UsageError(
                f"quantizer {self.name!r}: bit_width={bit_width!r} {fault}; give one of "
                f"{', '.join(map(str, widths))} for each of its {self.spec.num_units:,} units"
            )
        middle = torch.zeros(max(widths) + 1)
        for bits in widths:
            middle[bits] = gate_for(bits, widths)
        gates = middle[torch.from_numpy(units.astype("int64"))]
        self.gate.copy_(gates.view(self.spec.unit_shape))
        self.update_from_gate()

    def qparams(self) -> QParams:
        """Return the numbers of the current grids, detached.

        quant_min and quant_max are those of the widest unit. Where the widths of elements differ
        scale has a row for each of `grid_widths`, and each row a shape that broadcasts with the
        weight.

        Raises:
            UsageError: the width is 32 bits, where there is no grid.
            TrainingError: the range was never found.
        """
        self._grid()  # refuses where there is none
        if isinstance(self._bit_width, UnitBits) and not self._is_by_channel:
            multiplier = self._along_channels(self.multiplier.detach())
            places = enumerate(self.grid_widths)
            scale = torch.stack([self._grid_at(*place, multiplier).scale for place in places])
        else:
            scale = self._of_channels(self._unit_grid().scale.detach())
        bounds = integer_grid(self.spec.scheme, int(self._bit_width))
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), *bounds, self._bit_width)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Tensor:
        """Return the codes of x as int32. Raises as `qparams`."""
        self._grid()
        return unit_steps(widen(x), self._unit_grid()).to(torch.int32)

    @torch.no_grad()
    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values of codes; of `quantize(x)` those of forward, in x's dtype if given.

        Raises as `qparams`.
        """
        self._grid()
        wide = dtype if dtype == torch.float64 else torch.float32
        return codes.to(wide).mul_(self._unit_grid().scale).to(dtype)

    @torch.no_grad()
    def unit_errors(self, x: Tensor) -> Tensor:
        """Return the squared rounding error of every unit at every width that has a grid.

        Args:
            x: the weight.

        Returns:
            Shape ``(len(grid_widths), *unit_shape)``: sums over the elements of a unit, with the
            ranges that were fitted to each width.

        Raises:
            TrainingError: the ranges were never found.
        """
        x = widen(x.detach())
        summed = [dim for dim, size in enumerate(self.spec.unit_shape) if size != x.shape[dim]]
        errors = []
        for place, bits in enumerate(self.grid_widths):
            grid = self._grid_at(place, bits)
            error = (unit_steps(x, grid) * grid.scale).sub_(x).square_()
            errors.append(error.sum(summed, keepdim=True) if summed else error)
        return torch.stack(errors)

    def _round(self, x: Tensor, multiplier: Tensor, probe: Tensor) -> Tensor:
        if self.tap is not None:
            return x
        traced = torch.compiler.is_compiling()
        return fake_quantize_units(
            x,
            self._along_channels(multiplier),
            self.unit_range,
            self.unit_high,
            self.passthrough,
            probe,
            has_binary=self._has_binary,
            bypass=None if traced else self._bit_width == FLOAT_WIDTH,
        )

    def _unit_grid(self) -> UnitGrid:
        multiplier = self._along_channels(self.multiplier.detach())
        return unit_grid(multiplier, self.unit_range, self.unit_high, has_binary=self._has_binary)

    def _grid_at(self, place: int, bits: int, multiplier: Tensor | None = None) -> UnitGrid:
        """Return the grids that all channels would have at one width."""
        ends = self._along_channels(self.ranges[place])
        high = torch.full_like(ends, _high(bits))
        factor = torch.ones_like(ends) if multiplier is None else multiplier
        return unit_grid(factor, ends, high, has_binary=bits == BINARY_WIDTH)

    @property
    def _is_by_channel(self) -> bool:
        """Whether each channel, and not each element, has a gate."""
        return self.spec.num_units == self.spec.num_channels

    def _along_channels(self, per_range: Tensor) -> Tensor:
        shape = [1] * len(self.spec.unit_shape)
        if self.spec.channel_axis is not None:
            shape[self.spec.channel_axis] = -1
        return per_range.view(shape)

    def _of_channels(self, scale: Tensor) -> Tensor:
        """Return a scale that varies along the channels alone as `QParams` has it."""
        axis = self.spec.channel_axis
        if axis is None:
            return scale.flatten()[0]
        return scale.movedim(axis, 0).flatten(1)[:, 0].contiguous()

    def _fit(self, rows: Tensor) -> None:
        ends = observed_ends(rows, self.spec.scheme)
        limit = max(_FIT_VALUES, _FIT_VALUES_PER_RANGE * rows.shape[0])
        fitted = subsample(rows, limit)
        for place, bits in enumerate(self.grid_widths):
            self.ranges[place] = least_squares_ends(fitted, ends, self.spec.scheme, bits)
        self.base.copy_(ends)
        self.reset_multiplier()
        self._keep_sample(rows)
        self._set_flags(calibrated=True, refit_due=False)
        self._spread()

    def _follow_gate(self) -> bool:
        if self.gate.ndim == 0:  # the parent's, before the gates of the units are there
            return super()._follow_gate()
        index = width_index(self.gate.detach(), len(self.spec.widths))
        widths = torch.tensor(self.spec.widths, dtype=torch.uint8)
        bit_width = bits_of(widths[index.cpu()].numpy().tobytes())
        changed, self._bit_width = bit_width != self._bit_width, bit_width
        if changed:
            self.passthrough.fill_(bit_width == FLOAT_WIDTH)
            self._spread()
        return changed

    @torch.no_grad()
    def _spread(self) -> None:
        """Give every unit the range and the greatest code of its width."""
        index = width_index(self.gate, len(self.spec.widths)).clamp_(max=len(self.grid_widths) - 1)
        shape = (len(self.grid_widths), *self.spec.unit_shape)
        ranges = torch.stack([self._along_channels(row) for row in self.ranges]).expand(shape)
        self.unit_range.copy_(ranges.gather(0, index.unsqueeze(0)).squeeze(0))
        highs = self.unit_high.new_tensor([_high(bits) for bits in self.grid_widths])
        self.unit_high.copy_(highs[index])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._spread()


def _high(bits: int) -> float:
    """Return the greatest code of a width; -1 where its codes are -1 and 1 alone."""
    return -1.0 if bits == BINARY_WIDTH else float(integer_grid("symmetric", bits)[1])
