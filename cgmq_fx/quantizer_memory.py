"""What a quantizer remembers besides its state dict: the sample it kept, and what it gathers.

Refits and the predicted loss of bit-widths are computed from these values, so that a run that goes
on without them takes another course.
"""

from typing import Any

from torch import Tensor, nn

from cgmq_fx.quantizers import Quantizer


def quantizers_of(model: nn.Module) -> dict[str, Quantizer]:
    """Return every quantizer in `model` by its path."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Quantizer)}


def memory_of(quantizer: Quantizer) -> dict[str, Any]:
    """Return what `restore_memory` takes, with the quantizer's own tensors."""
    return {
        "sample": quantizer._sample,
        "gathered": list(quantizer._gathered),
        "sample_is_new": quantizer._sample_is_new,
        "observer": quantizer.observer,
    }


def restore_memory(quantizer: Quantizer, memory: dict[str, Any]) -> None:
    """Remember `memory` again, on the quantizer's device; after its state dict was loaded."""
    device, sample = quantizer.base.device, memory["sample"]
    quantizer._sample = None if sample is None else sample.to(device)
    quantizer._gathered = [rows.to(device) for rows in memory["gathered"]]
    quantizer._sample_is_new = memory["sample_is_new"]
    quantizer.observer = memory["observer"]


def sample_of(quantizer: Quantizer) -> Tensor:
    """Return the sample, ``(ranges, values)``; without values where there is none."""
    sample = quantizer._sample
    return quantizer.base.new_empty(quantizer.spec.num_channels, 0) if sample is None else sample


def set_sample(quantizer: Quantizer, rows: Tensor) -> None:
    """Remember some of `rows`, ``(ranges, values)``, as the quantizer's sample."""
    quantizer._keep_sample(rows.to(sample_of(quantizer).dtype))
