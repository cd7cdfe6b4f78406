"""Quantizers that have to look at their tensors, in a model that runs compiled.

They do so in the first batch and after a change of bit-width. Compiled code has no branch for that,
so that no change of a bit-width makes it anew: what is due is done before it runs.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from cgmq_fx.quantizers import QuantizerSet

#: What asks whether calls are being compiled; without a frame of its own, which would be compiled.
compiler_of_calls: Callable[[], object] = getattr(
    torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None
)

# The first shows the quantizers that serve several tensors all of them, the next is fitted to that.
_MOST_FORWARDS = 3


@torch.compiler.disable  # type: ignore[untyped-decorator]
def settle(
    model: nn.Module,
    quantizers: nn.Module | None,
    call: Callable[..., Any],
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Run a batch in eager mode for the quantizers alone, where one of them has to see it.

    Buffers of the model and the states of random generators are afterwards what they were.

    Args:
        model: what the quantizers are part of.
        quantizers: the `QuantizerSet`, or None where there is none yet.
        call: runs the model.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    if not isinstance(quantizers, QuantizerSet):
        return
    own = {id(buffer) for buffer in quantizers.buffers()}
    for _ in range(_MOST_FORWARDS):
        if not any(quantizer.is_due for quantizer in quantizers.values()):
            return
        kept = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in own]
        devices = {buffer.device for buffer in model.parameters() if buffer.device.type == "cuda"}
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            call(*args, **kwargs)
            for buffer, before in kept:
                buffer.copy_(before)
