"""The compiled kernels for weights whose units differ in bit-width, called on tensors."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from cgmq_fx.native_fake_quantize import (
    Call,
    Gradients,
    floats,
    kernel_named,
    laid_out_as,
    native_call,
    pointer,
)


class _Units(ctypes.Structure):
    """Where the numbers of units lie, as the kernels take them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("multiplier", "range", "high")),
        ("by_element", ctypes.c_int32),
    )


class Units(NamedTuple):
    """The units of one weight.

    Attributes:
        multiplier: of each channel, broadcasts with the weight.
        range: of each unit where every multiplier is 1.
        high: the greatest code of each unit; -1 says that its codes are -1 and 1.
    """

    multiplier: Tensor
    range: Tensor
    high: Tensor


def native_units_call(x: Tensor, units: Units) -> Call | None:
    """Return how the kernels see a weight, or None where plain PyTorch must do.

    Beside what `native_call` asks for, the weight must be contiguous.
    """
    varying = [dim for dim, size in enumerate(units.multiplier.shape) if size > 1]
    is_known = units.range.numel() in (x.numel(), units.multiplier.numel())
    if len(varying) > 1 or not is_known or not x.is_contiguous():
        return None
    if not all(part.is_contiguous() for part in units):
        return None
    axis = varying[0] if varying else None
    call = native_call(x, units.multiplier, units.range, axis, is_weight=True)
    if call is not None and axis is not None and call.shape.ranges != units.multiplier.numel():
        return None
    return call


def native_units_forward(call: Call, x: Tensor, units: Units, bounds: tuple[float, ...]) -> Tensor:
    """Return the weight with each unit on its grid."""
    out = torch.empty_like(x)
    kernel = kernel_named(f"units_forward_{call.element}", 5)
    shape, held = ctypes.byref(call.shape), _units(call, units)
    kernel(shape, ctypes.byref(held), floats(bounds), pointer(x), pointer(out))
    return out


def native_units_backward(
    call: Call, x: Tensor, grad_out: Tensor, units: Units, bounds: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the weight, of the multiplier and of the probe."""
    grad_out, grad_x = laid_out_as(x, grad_out), torch.empty_like(x)
    grad_multiplier, grad_probe = torch.empty_like(units.multiplier), torch.empty(2)
    kernel = kernel_named(f"units_backward_{call.element}", 7)
    failed = kernel(
        ctypes.byref(call.shape),
        ctypes.byref(_units(call, units)),
        floats(bounds),
        *map(pointer, (x, grad_out, grad_x)),
        ctypes.byref(Gradients(grad_multiplier.data_ptr(), grad_probe.data_ptr())),
    )
    if failed:
        raise MemoryError(f"no memory for the sums over {x.numel()} gradients")
    return grad_x, grad_multiplier, grad_probe


def _units(call: Call, units: Units) -> _Units:
    by_element = units.range.numel() > call.shape.ranges
    return _Units(*map(Tensor.data_ptr, units), by_element)
