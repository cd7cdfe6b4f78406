"""The quantizer of one tensor: learned range, bit-width from a gate.

It owns all state that must last: its state dict carries gate, range and whether that is fitted, and
what follows from them (the integer grid) is recomputed after a load.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cgmq_fx.calibration import (
    condensed,
    least_squares_ends,
    observed_ends,
    rows_of,
    squared_error,
    subsample,
)
from cgmq_fx.errors import TrainingError, UsageError
from cgmq_fx.fake_quantize import Grid, ends_of, fake_quantize, grid_of, to_steps, widen
from cgmq_fx.gates import (
    BINARY_WIDTH,
    FLOAT_WIDTH,
    MAX_INTEGER_WIDTH,
    WIDTHS_TEXT,
    bit_width_of,
    gate_for,
    is_width,
)
from cgmq_fx.observers import Observer, ends_by
from cgmq_fx.quantizer_spec import QuantizerSpec, integer_grid, kernel_bounds

FIT_VALUES = {"weight": 2**20, "activation": 2**14, "input": 2**14}
"""How many values of a tensor a range is fitted on; its extremes are those of all values."""
SAMPLE_VALUES, SAMPLE_VALUES_PER_RANGE = 4096, 64
"""Size of the sample kept for later: the first in all, or the second per range if that is more."""


class QParams(NamedTuple):
    """The numbers of a grid: real = (code - zero_point) * scale.

    scale and zero_point (int32) have shape () for one range, else (channels,).
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    bit_width: int


class Quantizer(nn.Module):
    """Fake-quantizes one tensor at the width that its gate selects.

    The range is `base * multiplier`: base, a buffer, comes from data, and multiplier, a parameter
    near 1, is learned, so that a step of an optimizer is relative to the range, whatever its size
    (the two ends of an affine range: `fake_quantize.ends_of`).
    At 32 bits the tensor passes through bit for bit. A first forward calibrates; in eager mode a
    forward after a change of width fits the range anew, in training on what it sees, in evaluation
    on the kept sample. Compiled code does not: call `refit` after a change of width there.
    One that several tensors share sees all of them before it does so: they pass through unchanged
    until the last calibrates, and keep the old range while a new one is gathered in training.

    `probe` is a parameter whose values are never used. Its gradient brings out of the backward pass
    `fake_quantize.PROBE_SCALE` times [mean of the gradient of the output, sum of its squares].

    Args:
        spec: role, scheme, axis and allowed widths.
        name: what messages call this quantizer.
    """

    gate: Tensor
    base: Tensor
    calibrated: Tensor
    refit_due: Tensor
    quant_min: Tensor
    quant_max: Tensor
    passthrough: Tensor

    def __init__(self, spec: QuantizerSpec, name: str = "") -> None:
        super().__init__()
        self.spec, self.name = spec, name
        rows = (2,) if spec.scheme == "affine" else ()
        self.multiplier = nn.Parameter(torch.ones(*rows, spec.num_channels))
        self.probe = nn.Parameter(torch.zeros(2))
        if spec.role == "input" and not spec.learned:
            # What arrives from outside is as it is: its range comes from data, and no gradient has
            # to flow back to it through the first layer, where the float model needs none.
            self.multiplier.requires_grad_(False)
            self.probe.requires_grad_(False)
        self.register_buffer("gate", torch.tensor(gate_for(spec.widths[-1], spec.widths)))
        self.register_buffer("base", torch.ones(*rows, spec.num_channels))
        # What persists of the two flags, and their mirrors, which forward reads without a sync.
        self.register_buffer("calibrated", torch.tensor(False))
        self.register_buffer("refit_due", torch.tensor(False))
        self._calibrated = self._refit_due = False
        for buffer in ("quant_min", "quant_max"):
            self.register_buffer(buffer, torch.tensor(0, dtype=torch.int32), persistent=False)
        self.register_buffer("passthrough", torch.tensor(False), persistent=False)
        self._sample: Tensor | None = None
        self._gathered: list[Tensor] = []
        self._sample_is_new = False
        #: Set where a range or a sample is found; who shares them with others clears it.
        self.has_news = False
        #: The rule by which ranges are found from data.
        self.observer: Observer = "mse"
        #: Sees every tensor, which then passes unchanged at any width; None: they are quantized.
        self.tap: Callable[[Tensor], None] | None = None
        self._bit_width = 0
        self._follow_gate()

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized, in its own dtype; integers, bools and empty tensors unchanged.

        So is a Python number, for which a graph traced without shapes may have a quantizer.

        Raises:
            TrainingError: a range has to be found and x holds NaN or infinite values.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
            return x
        if not self._find_range(x):
            return x.clone()  # as at 32 bits: what reads it may change it in place
        return self._round(x, self.multiplier, self.probe)

    def _find_range(self, x: Tensor) -> bool:
        """Find the range or fit it where that is due; False where x is to pass unchanged."""
        if self.tap is not None:
            self.tap(x)
            return False
        if not self._calibrated:
            return self._calibrate_on_all(x)
        if not torch.compiler.is_compiling():
            self._catch_up(x)
        return True

    def _round(self, x: Tensor, multiplier: Tensor, probe: Tensor) -> Tensor:
        """Return x fake-quantized; gradients of the range and the probe go to what is given."""
        if self.tap is not None:
            return x
        traced = torch.compiler.is_compiling()
        return fake_quantize(
            x,
            multiplier,
            self.base,
            self.quant_min,
            self.quant_max,
            self.passthrough,
            probe,
            channel_axis=self.spec.channel_axis,
            is_weight=self.spec.role == "weight",
            bypass=None if traced else self._bit_width == FLOAT_WIDTH,
        )

    @property
    def bit_width(self) -> int:
        """The current width."""
        return self._bit_width

    @property
    def is_calibrated(self) -> bool:
        """Whether a range was found, from data or a state dict."""
        return self._calibrated

    @property
    def refit_pending(self) -> bool:
        """Whether the width changed and the range has not been fitted to it yet."""
        return self._refit_due

    @property
    def is_behind(self) -> bool:
        """Whether a fit is pending that an eager forward would have done."""
        return self._refit_due and self.spec.num_tensors == 1

    @property
    def has_sample(self) -> bool:
        """Whether values of the tensor are kept, for `refit` and `expected_noise` without it."""
        return self._sample is not None

    @property
    def is_due(self) -> bool:
        """Whether the next tensor is looked at first: for a range, its fit, or a sample."""
        is_known = self._calibrated and not self._refit_due and self._sample is not None
        return not is_known or self.tap is not None

    @property
    def mean_abs(self) -> float:
        """The mean size of the last sample's values.

        Raises:
            TrainingError: there is no sample.
        """
        return float(self._kept_sample().abs().mean())

    def set_bit_width(self, bit_width: int) -> None:
        """Put the gate in the middle of the band of `bit_width` and take that width.

        Raises:
            UsageError: the width is not one of the quantizer's.
        """
        if bit_width not in self.spec.widths:
            raise UsageError(
                f"quantizer {self.name!r}: bit_width={bit_width!r} is not allowed here; "
                f"choose one of {', '.join(map(str, self.spec.widths))}, "
                "or give its operation a row with this width in the cost table"
            )
        self.gate.fill_(gate_for(bit_width, self.spec.widths))
        self.update_from_gate()

    def update_from_gate(self) -> bool:
        """Take the width that the gate selects; return whether that changed it."""
        if not self._follow_gate():
            return False
        self._set_flags(refit_due=self._calibrated and self._bit_width != FLOAT_WIDTH)
        return True

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the range from x: what it spans, below 32 bits fitted to the width by `refit`.

        Raises:
            TrainingError: x is empty or holds NaN or infinite values.
            UsageError: the shape of x does not have the quantizer's channels.
        """
        self._fit(self.rows(x))

    @torch.no_grad()
    def calibrate_on(self, rows: Tensor, observer: Observer) -> None:
        """Set the range from gathered rows, by an observer that later fits keep to.

        Args:
            rows: (ranges, values), of `rows` or several of these side by side.
            observer: the rule.
        """
        self.observer = observer
        self._fit(rows)
        self._sample = condensed(rows, FIT_VALUES[self.spec.role])

    @torch.no_grad()
    def refit(self, x: Tensor | None = None) -> None:
        """Set the range to the one of least squared error on x at the current width.

        Args:
            x: the tensor to fit; None: the sample kept of the last one.

        Raises:
            TrainingError: as `calibrate`, or x is None and there is no sample.
            UsageError: as `calibrate`.
        """
        self._fit(self._kept_sample() if x is None else self.rows(x))

    @torch.no_grad()
    def reset_multiplier(self) -> None:
        """Let the range be what was found from data."""
        self.multiplier.fill_(1)

    def qparams(self) -> QParams:
        """Return the numbers of the current grid, detached.

        Raises:
            UsageError: the width is 32 bits, where there is no grid.
            TrainingError: the range was never found.
        """
        grid = self._grid()
        shape = () if self.spec.channel_axis is None else (self.spec.num_channels,)
        zero_point = grid.zero_point.expand(self.spec.num_channels).reshape(shape).to(torch.int32)
        bounds = integer_grid(self.spec.scheme, self._bit_width)
        return QParams(grid.scale.reshape(shape), zero_point, *bounds, self._bit_width)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Tensor:
        """Return the codes of x as int32. Raises as `qparams`."""
        grid = self._grid().along(self.spec.channel_axis, x.ndim)
        is_binary = self._bit_width == BINARY_WIDTH and self.spec.scheme == "symmetric"
        return (to_steps(widen(x), grid, is_binary=is_binary) + grid.zero_point).to(torch.int32)

    @torch.no_grad()
    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values of codes; of `quantize(x)` those of forward, in x's dtype if given.

        Raises as `qparams`.
        """
        grid = self._grid().along(self.spec.channel_axis, codes.ndim)
        wide = dtype if dtype == torch.float64 else torch.float32
        return (codes.to(wide) - grid.zero_point).mul_(grid.scale).to(dtype)

    @torch.no_grad()
    def expected_noise(self, bit_width: int, x: Tensor | None = None) -> float:
        """Return the mean squared error per element at a width, in the range best for that width.

        Args:
            bit_width: 0 to 16, or 32 (0.0); it need not be one of the allowed widths.
            x: the tensor to quantize; None: the sample kept of the last one.

        Raises:
            UsageError: the width is none that a quantizer has.
            TrainingError: x is empty or not finite, or x is None and there is no sample.
        """
        if not is_width(bit_width):
            raise UsageError(
                f"quantizer {self.name!r}: bit_width={bit_width!r} is not a width; "
                f"use {WIDTHS_TEXT}"
            )
        rows = self._kept_sample() if x is None else self.rows(x)
        if bit_width == FLOAT_WIDTH:
            return 0.0
        ends = observed_ends(rows, self.spec.scheme)
        rows = subsample(rows, FIT_VALUES[self.spec.role])
        ends = least_squares_ends(rows, ends, self.spec.scheme, bit_width)
        error = squared_error(rows, ends, *kernel_bounds(self.spec.scheme, bit_width))
        return float(error.sum()) / rows.numel()

    def extra_repr(self) -> str:
        """Return role, scheme, axis and current width for the printed module."""
        axis = "" if self.spec.channel_axis is None else f", channel_axis={self.spec.channel_axis}"
        fitted = "" if self._calibrated else ", not calibrated"
        return f"{self.spec.role}, {self.spec.scheme}{axis}, bit_width={self._bit_width}{fitted}"

    def _catch_up(self, x: Tensor) -> None:
        """Fit the range where a width changed; have a sample where there is none, after a load."""
        if self.spec.num_tensors > 1:
            self._catch_up_shared(x)
        elif self._refit_due:
            seen = self.training or self.spec.role == "weight" or self._sample is None
            self.refit(x if seen else None)
        elif self._sample is None:
            self._keep_sample(rows_of(x, self.spec.channel_axis))

    @torch.no_grad()
    def _calibrate_on_all(self, x: Tensor) -> bool:
        """Calibrate once every tensor of a forward was seen; return whether that is now."""
        rows = self._gather(self.rows(x))
        if rows is not None:
            self._fit(rows)
        return rows is not None

    @torch.no_grad()
    def _catch_up_shared(self, x: Tensor) -> None:
        """Do the same for several tensors; the range never changes between two of one forward.

        Autograd would refuse that. In training a new sample is gathered first, and fitted in the
        next forward.
        """
        wants_new = self._refit_due and self.training and not self._sample_is_new
        if self._refit_due and self._sample is not None and not wants_new:
            self.refit()
            self._sample_is_new = False
        elif self._sample is None or wants_new:
            rows = self._gather(self.rows(x))
            if rows is not None:
                self._sample, self._sample_is_new, self.has_news = rows, True, True

    def _gather(self, rows: Tensor) -> Tensor | None:
        """Return rows with values of all tensors of a forward once each was seen, else None."""
        if self.spec.num_tensors == 1:
            return rows
        limit = FIT_VALUES[self.spec.role] // self.spec.num_tensors
        self._gathered.append(condensed(rows, limit))
        if len(self._gathered) < self.spec.num_tensors:
            return None
        joined = torch.cat(self._gathered, dim=1)
        self._gathered = []
        return joined

    def _fit(self, rows: Tensor) -> None:
        ends = observed_ends(rows, self.spec.scheme)
        if self._bit_width != FLOAT_WIDTH:
            is_rank = self.observer in ("percentile", "entropy")  # of these every value counts
            fitted = rows if is_rank else subsample(rows, FIT_VALUES[self.spec.role])
            ends = ends_by(self.observer, fitted, ends, self.spec.scheme, self._bit_width)
        # Only the buffer depends on data: distributed training pools it over the ranks.
        self.base.copy_(ends)
        self.reset_multiplier()
        self._keep_sample(rows)
        self._set_flags(calibrated=True, refit_due=False)

    def rows(self, x: Tensor) -> Tensor:
        """Return x as (ranges, values). Raises as `calibrate`."""
        axis = self.spec.channel_axis
        fits = axis is None or (
            -x.ndim <= axis < x.ndim and x.shape[axis] == self.spec.num_channels
        )
        if not fits:
            raise UsageError(
                f"quantizer {self.name!r}: a tensor of shape {tuple(x.shape)} does not have its "
                f"{self.spec.num_channels} channels on axis {axis}; give it the tensor it was "
                "prepared for"
            )
        if x.numel() == 0:
            raise TrainingError(
                f"quantizer {self.name!r}: a tensor of shape {tuple(x.shape)} has no values to "
                "find a range from; run a batch that is not empty"
            )
        rows = rows_of(x, axis)
        if not torch.stack(rows.aminmax()).isfinite().all():
            raise TrainingError(
                f"quantizer {self.name!r}: no range can be found, {int(rows.isnan().sum())} of "
                f"{rows.numel()} values are NaN and {int(rows.isinf().sum())} are infinite; check "
                "that the float model gives finite results on this batch, or lower the learning "
                "rate and go back to an earlier state if training diverged"
            )
        return rows

    def _kept_sample(self) -> Tensor:
        if self._sample is None:
            raise TrainingError(
                f"quantizer {self.name!r}: no sample is kept, it saw no tensor since it was made "
                "or loaded; run a batch through the prepared model, or call calibrate(x)"
            )
        return self._sample.to(self.base.device)

    def _keep_sample(self, rows: Tensor) -> None:
        limit = max(SAMPLE_VALUES, SAMPLE_VALUES_PER_RANGE * rows.shape[0])
        self._sample, self.has_news = subsample(rows, limit).clone(), True

    def _grid(self) -> Grid:
        if self._bit_width == FLOAT_WIDTH:
            raise UsageError(
                f"quantizer {self.name!r}: at {FLOAT_WIDTH} bits the tensor stays float and has "
                "no codes; check bit_width first, or set_bit_width to a lower one"
            )
        if not self._calibrated:
            raise TrainingError(
                f"quantizer {self.name!r}: it never saw a tensor, so its range is unknown; "
                "run a batch through the prepared model, or call calibrate(x)"
            )
        ends = ends_of(self.multiplier.detach(), self.base)
        return grid_of(ends, self.quant_min, self.quant_max)

    def _set_flags(self, *, refit_due: bool, calibrated: bool | None = None) -> None:
        self._refit_due = refit_due
        self.refit_due.fill_(refit_due)
        if calibrated is not None:
            self._calibrated = calibrated
            self.calibrated.fill_(calibrated)

    def _follow_gate(self) -> bool:
        """Make the width and the tensors of the grid follow the gate; return whether it changed."""
        bit_width = bit_width_of(float(self.gate), self.spec.widths)
        changed, self._bit_width = bit_width != self._bit_width, bit_width
        if changed:
            # At 32 bits compiled code computes both results: any valid grid serves.
            bounds = kernel_bounds(self.spec.scheme, min(bit_width, MAX_INTEGER_WIDTH))
            self.quant_min.fill_(bounds[0])
            self.quant_max.fill_(bounds[1])
            self.passthrough.fill_(bit_width == FLOAT_WIDTH)
        return changed

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._calibrated, self._refit_due = bool(self.calibrated), bool(self.refit_due)
        self._sample = None
        self._gathered = []
        self._sample_is_new = False
        self._follow_gate()
