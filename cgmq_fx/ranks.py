"""The processes of a distributed run: what has to be the same on all of them is made so here.

Each rank trains on its own part of every batch. What decides bit-widths and ranges is made of all
parts: gradients are averaged by the wrapper that trains the model; samples and ranges, which every
quantizer takes of what it sees, are exchanged here.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cgmq_fx.calibration import least_squares_ends, subsample
from cgmq_fx.errors import UsageError
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.quantizer import FIT_VALUES
from cgmq_fx.quantizer_memory import sample_of, set_sample
from cgmq_fx.quantizers import Quantizer


class Ranks:
    """The ranks that train one model together; a single one outside of a distributed run.

    Args:
        group: the process group; None: the default group, once there is one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    @property
    def size(self) -> int:
        """How many they are."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return max(1, dist.get_world_size(self._group))

    def check_same(self, what: str, own: Any) -> None:
        """Refuse that ranks have different settings, which would let them wait for each other.

        Raises:
            UsageError: they have; on every rank.
        """
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, self._group)
        if any(other != found[0] for other in found):
            listed = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(found))
            raise UsageError(
                f"{what} differ between the {self.size} ranks of the distributed run ({listed}); "
                f"give every rank the same arguments, or a process_group of the ranks that train "
                f"one model"
            )

    def pool(self, quantizers: Sequence[Quantizer]) -> None:
        """Give every rank the same ranges and samples, made of those that any rank has found anew.

        A range at 32 bits spans what any rank saw; below it is fitted to the samples of all.
        """
        if self.size == 1 or not quantizers:
            return
        all_bases = self._gather([_news(item, item.base) for item in quantizers])
        all_samples = self._gather([_news(item, sample_of(item)) for item in quantizers])
        for place, quantizer in enumerate(quantizers):
            bases = [rank[place] for rank in all_bases if rank[place].numel()]
            samples = [rank[place] for rank in all_samples if rank[place].numel()]
            if bases and samples:
                rows = [sample.reshape(quantizer.spec.num_channels, -1) for sample in samples]
                _take(quantizer, torch.stack(bases), torch.cat(rows, dim=1))

    def _gather(self, own: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return for each rank its list of flat tensors; they may differ in length."""
        device = own[0].device
        lengths = torch.tensor([len(x) for x in own], device=device)
        all_lengths = [torch.empty_like(lengths) for _ in range(self.size)]
        dist.all_gather(all_lengths, lengths, self._group)
        longest = max(int(each.sum()) for each in all_lengths)
        flat = torch.zeros(longest, dtype=torch.float64, device=device)
        joined = torch.cat(list(own)).to(torch.float64)
        flat[: len(joined)] = joined
        everything = [torch.empty_like(flat) for _ in range(self.size)]
        dist.all_gather(everything, flat, self._group)
        return [
            list(torch.split(values[: int(each.sum())], each.tolist()))
            for values, each in zip(everything, all_lengths, strict=True)
        ]


def _news(quantizer: Quantizer, found: Tensor) -> Tensor:
    return (found if quantizer.has_news else found[..., :0]).flatten()


def _take(quantizer: Quantizer, bases: Tensor, rows: Tensor) -> None:
    """Give a quantizer the range and the sample of several, by rows."""
    ends = bases.amax(0).reshape(quantizer.base.shape)
    spec, bits = quantizer.spec, quantizer.bit_width
    is_fitted = bits != FLOAT_WIDTH and not quantizer.refit_pending
    if is_fitted and not bool((bases == bases[0]).all()):
        ends = least_squares_ends(subsample(rows, FIT_VALUES[spec.role]), ends, spec.scheme, bits)
    quantizer.base.copy_(ends)
    set_sample(quantizer, rows)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return the stack of tensors that every rank has as a whole, or of which each has a part."""
    if all(is_sharded(tensor) for tensor in tensors):
        return whole(torch.stack(list(tensors)))  # one exchange for all of them
    return torch.stack([whole(tensor) for tensor in tensors])


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as every rank would have it without sharding; all ranks have to call this."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether each rank has a part of `tensor` only, as after ``fully_shard``."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes long to import
