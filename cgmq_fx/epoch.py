"""What one epoch of guided training came to, in memory and as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """What one epoch of guided training came to.

    Attributes:
        epoch: its number, from 1.
        train_loss: mean loss over its batches.
        val_metric: mean metric over the validation samples, higher is better; None without
            a loader.
        satisfied: whether every budget was met at its end.
        totals: the cost of each resource at its end, in its unit.
        bit_widths: the bit-width of each quantizer at its end.
    """

    epoch: int
    train_loss: float
    val_metric: float | None
    satisfied: bool
    totals: dict[str, Fraction]
    bit_widths: dict[str, int]

    def to_plain(self) -> dict[str, Any]:
        """Return it as plain data; fractions are text."""
        return {**asdict(self), "totals": {name: str(x) for name, x in self.totals.items()}}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> "Epoch":
        """Return what `to_plain` was called on."""
        totals = {name: Fraction(text) for name, text in data["totals"].items()}
        return cls(**{**data, "totals": totals})
