"""What a guide reads of every step, without making an accelerator wait.

On a CPU a number may be read at any time. On an accelerator reading one stops the host until all
that was queued is done; so numbers that decide something are copied to the host beside the work,
and read when they have arrived, as a rule before the next step.
"""

from typing import Any

import torch
from torch import Tensor


class HostCount:
    """The value of a counter tensor, read again only where somebody else wrote to it."""

    def __init__(self) -> None:
        self._seen: tuple[int, int] | None = None
        self._value = 0

    def of(self, counter: Tensor) -> int:
        """Return what `counter`, shape (), holds."""
        if self._seen != (id(counter), counter._version):
            self._value = int(counter)
            self._seen = id(counter), counter._version
        return self._value

    def add_one(self, counter: Tensor) -> int:
        """Add 1 to `counter` and return what it holds then."""
        value = self.of(counter) + 1
        counter += 1
        self._value, self._seen = value, (id(counter), counter._version)
        return value


class FiniteWatch:
    """Tells when statistics of gradients are not finite: on a CPU at once, else with a delay."""

    def __init__(self) -> None:
        self._waiting: tuple[Tensor, Any] | None = None

    def not_finite(self, statistics: Tensor) -> Tensor | None:
        """Return statistics, of this step or of an earlier one, that are not finite, if known."""
        if statistics.device.type == "cpu":
            return None if _is_finite(statistics) else statistics
        arrived = None
        if self._waiting is not None and self._waiting[1].query():
            arrived, self._waiting = self._waiting[0], None
        if self._waiting is None:
            self._waiting = copy_beside(statistics)
        return None if arrived is None or _is_finite(arrived) else arrived


def _is_finite(statistics: Tensor) -> bool:
    return bool(torch.isfinite(statistics).all())


def copy_beside(statistics: Tensor) -> tuple[Tensor, Any]:
    """Start copying `statistics` to the host.

    Returns:
        The copy, and an event whose `query` tells whether it is there.
    """
    host = torch.empty(statistics.shape, dtype=statistics.dtype, pin_memory=True)
    host.copy_(statistics, non_blocking=True)
    event = torch.get_device_module(statistics.device).Event()
    event.record()
    return host, event
