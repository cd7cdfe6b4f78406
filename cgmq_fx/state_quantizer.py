"""The quantizer of a state that a recurrent layer reads one step at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from cgmq_fx.quantizers import Quantizer


class StateQuantizer(Quantizer):
    """Quantizes the states of all steps of one call as if they were one tensor.

    Its range is found on the states of a whole sequence: the first alone is often zero.
    """

    @property
    def is_due(self) -> bool:
        """Whether `settle` has something to do before the next sequence is quantized."""
        if not self.is_calibrated or self.tap is not None:
            return True
        return not torch.compiler.is_compiling() and (self.refit_pending or not self.has_sample)

    def settle(self, states: Tensor) -> None:
        """Find the range, fit it after a change of width, or keep a sample, where that is due.

        Args:
            states: those of a sequence, of any shape.

        Raises:
            TrainingError: a range has to be found and the states are not finite.
        """
        if states.numel():
            self._find_range(states)

    def over(self, steps: int) -> Callable[[Tensor], Tensor]:
        """Return what quantizes the state at each of so many steps.

        The gradients of the steps add up to what quantizing one tensor of all states would give:
        `fake_quantize.range_gain` goes with the root of the number of values, the mean in the
        probe with its inverse.
        """
        multiplier = _with_gradient_times(self.multiplier, steps**-0.5)
        probe = _with_gradient_times(self.probe, self.probe.new_tensor([1.0 / steps, 1.0]))

        def quantize(x: Tensor) -> Tensor:
            return self._round(x, multiplier, probe) if x.numel() else x

        return quantize


def _with_gradient_times(x: Tensor, factor: Tensor | float) -> Tensor:
    """Return the values of x, exactly, with its gradient multiplied."""
    fixed = x.detach()
    return fixed + (x - fixed) * factor
