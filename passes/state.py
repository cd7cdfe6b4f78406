"""What a graph does to the buffers of its modules."""

import torch
from torch import Tensor

from cgmq_fx.errors import UnsupportedModelError


def assign_(buffer: Tensor, value: Tensor) -> Tensor:
    """Put `value` in place of what `buffer` holds, and return the buffer.

    Raises:
        UnsupportedModelError: the value has another shape or dtype.
    """
    if buffer.shape != value.shape or buffer.dtype != value.dtype:
        raise UnsupportedModelError(
            f"a buffer of {tuple(buffer.shape)} {buffer.dtype} is assigned a tensor of "
            f"{tuple(value.shape)} {value.dtype}; a graph keeps the shape and dtype of buffers"
        )
    with torch.no_grad():
        return buffer.copy_(value)
