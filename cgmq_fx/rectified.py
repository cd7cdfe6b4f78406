"""A ReLU and the quantizer behind it in one pass over memory, where kernels can do both.

Everywhere else the two run one after the other, so that this is an order of work and no arithmetic
of its own: values and gradients of tensors are the same bits.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as nn_module

from cgmq_fx.fake_quantize import BOUNDS
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.native_fake_quantize import (
    Call,
    native_call,
    native_rectified_backward,
    native_rectified_forward,
)
from cgmq_fx.quantizers import Quantizer

#: What a plain ReLU and a ReLU6 clamp to.
NO_TOP, TOP_OF_RELU6 = math.inf, 6.0


def quantize_rectified(
    quantizer: Quantizer, rectifier: nn.Module | None, top: float, x: Tensor
) -> Tensor:
    """Return ``quantizer(rectifier(x))``.

    Args:
        quantizer: of one tensor.
        rectifier: the ReLU where that is a module, with hooks that may have been added to it.
        top: what it clamps to besides 0: `NO_TOP` or `TOP_OF_RELU6`.
        x: of any shape; a rectifier that works in place may write to it.
    """
    call = _call(quantizer, rectifier, x)
    if call is None:
        return cast(Tensor, quantizer(_rectified(rectifier, top, x)))
    return _apply(quantizer, call, top, x, keeps=False)[0]


def rectify_and_quantize(
    quantizer: Quantizer, rectifier: nn.Module | None, top: float, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the ReLU makes of x, and what the quantizer makes of that.

    The arguments are those of `quantize_rectified`.
    """
    call = _call(quantizer, rectifier, x)
    if call is None:
        rectified = _rectified(rectifier, top, x)
        return rectified, cast(Tensor, quantizer(rectified))
    quantized, rectified = _apply(quantizer, call, top, x, keeps=True)
    return rectified, quantized


def _rectified(rectifier: nn.Module | None, top: float, x: Tensor) -> Tensor:
    if rectifier is not None:
        return cast(Tensor, rectifier(x))
    return F.relu(x) if top == NO_TOP else F.relu6(x)


def _call(quantizer: Quantizer, rectifier: nn.Module | None, x: Tensor) -> Call | None:
    """Return how the kernels see x, or None where the two must run one after the other.

    That is so while a compiler traces, which fuses them itself, and where anybody could tell the
    difference: hooks, modes that see every call, a quantizer that has to look at the tensor first.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.numel() == 0:
        return None
    if quantizer.is_due or quantizer.bit_width == FLOAT_WIDTH or _is_watched(quantizer):
        return None
    if rectifier is not None and _is_watched(rectifier):
        return None
    if quantizer.spec.channel_axis is not None or torch._C._len_torch_function_stack() > 0:
        return None
    return native_call(x, quantizer.multiplier, quantizer.base, None, is_weight=False)


def _is_watched(module: nn.Module) -> bool:
    """Tell whether calling a module does more than its forward."""
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
        *(nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks),
        *(nn_module._global_backward_hooks, nn_module._global_backward_pre_hooks),
    )
    return any(hooks) or "forward" in vars(module)


def _apply(
    quantizer: Quantizer, call: Call, top: float, x: Tensor, *, keeps: bool
) -> tuple[Tensor, Tensor]:
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _RectifiedFakeQuantize.apply)
    return apply(
        x,
        quantizer.multiplier,
        quantizer.base,
        quantizer.quant_min,
        quantizer.quant_max,
        quantizer.probe,
        call,
        top,
        keeps,
    )


class _RectifiedFakeQuantize(torch.autograd.Function):
    """The two together; saves what is rectified where that is kept, else x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        multiplier: Tensor,
        base: Tensor,
        quant_min: Tensor,
        quant_max: Tensor,
        probe: Tensor,
        call: Call,
        top: float,
        keeps: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.top = call, top
        rectified = torch.empty_like(x) if keeps else None
        ends = (multiplier, base, quant_min, quant_max)
        out, qparams = native_rectified_forward(call, x, rectified, ends, BOUNDS, top)
        ctx.save_for_backward(x if rectified is None else rectified, base, quant_max, qparams)
        return out, rectified

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_rectified: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        needs_x, needs_multiplier, needs_probe = (ctx.needs_input_grad[i] for i in (0, 1, 5))
        if grad_out is None:
            grad_out = torch.zeros_like(x)
        grad_x, grad_ranges, grad_probe = native_rectified_backward(
            ctx.call, x, grad_out, grad_rectified, saved, BOUNDS, ctx.top
        )
        return (
            grad_x if needs_x else None,
            grad_ranges if needs_multiplier else None,
            *(None, None, None),
            grad_probe if needs_probe else None,
            *(None, None, None),
        )
