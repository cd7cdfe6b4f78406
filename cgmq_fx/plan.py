"""What a prepared graph remembers: budget, cost tables, and the accounting once it is known."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cgmq_fx.accounting import Accounting
from cgmq_fx.budget import Budget, Limit
from cgmq_fx.choices import Choices
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import TrainingError
from cgmq_fx.unit_bits import Granularity


@dataclass(frozen=True)
class Settings:
    """The arguments of `prepare`, checked.

    Attributes:
        budget: as given.
        tables: cost tables by name; the first one is the call's own.
        limits: bounds by resource name.
        widths: allowed bit-widths of learned quantizers.
        input_bits: bit-width of what arrives from outside; None where it is learned.
        per_channel: weights have a range for each output channel.
        batch_axis: the axis of the inputs that counts samples; None: costs are of the whole input.
        choices: what stays float, what differs and what shares a quantizer.
        front_end: what recorded the graph, ``"fx"`` or ``"export"``.
        granularity: what of a weight has a bit-width of its own.
    """

    budget: Budget
    tables: Mapping[str, CostTable]
    limits: Mapping[str, Limit]
    widths: tuple[int, ...]
    input_bits: int | None
    per_channel: bool
    batch_axis: int | None
    choices: Choices = field(default_factory=Choices)
    front_end: str = "fx"
    granularity: Granularity = "layer"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Settings":
        return self


class Plan(nn.Module):
    """A submodule of every prepared graph; deep copies and moves with it.

    Attributes:
        settings: the arguments of `prepare`.
        steps: optimizer steps taken under a guide; a buffer, shape ().
        inputs: the forms of the inputs that it was priced for, as `cgmq_fx.input_shapes.describe`
            returns them; None where they cannot be described or no shapes are known.
        calibrated_on: batches on which `cgmq_fx.calibrate` found the ranges; 0 before.
        statistics: what the guide knows of each site's gradient, a running mean over steps of its
            mean and of its sum of squares; a buffer, shape ``(sites, 2)``.
    """

    steps: torch.Tensor
    statistics: torch.Tensor

    def __init__(self, settings: Settings, num_sites: int) -> None:
        super().__init__()
        self.settings = settings
        self._accounting: Accounting | None = None
        self.inputs: list[Any] | None = None
        self.calibrated_on = 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("statistics", torch.zeros(num_sites, 2, dtype=torch.float64))

    @property
    def is_priced(self) -> bool:
        """Whether shapes are known, and with them costs."""
        return self._accounting is not None

    @property
    def accounting(self) -> Accounting:
        """The accounting.

        Raises:
            TrainingError: no shapes are known yet.
        """
        if self._accounting is None:
            raise TrainingError(
                "this prepared model has seen no batch, so that shapes and costs are not known; "
                "run it once on a batch, or call prepare with example_inputs=(...)"
            )
        return self._accounting

    @accounting.setter
    def accounting(self, accounting: Accounting) -> None:
        self._accounting = accounting

    def forget_accounting(self) -> None:
        """Know no shapes and costs, as before the first batch."""
        self._accounting = self.inputs = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A float checkpoint knows nothing of the plan.
        for name, buffer in self.named_buffers():
            state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *rest)
