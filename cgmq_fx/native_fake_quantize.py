"""The compiled kernels of fake quantization, called on tensors."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from cgmq_fx.native_library import load_library

# Rows of qparams; see native/fake_quantize.c.
_FIELDS = 5
_ELEMENTS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_PLAIN = (Tensor, torch.nn.Parameter)
# A thread more for each so many values; with fewer it costs more than it saves.
_VALUES_PER_THREAD = 2**15


class _Shape(ctypes.Structure):
    """How a tensor lies, [outer][ranges][inner], and what its ranges are."""

    _fields_ = (
        ("outer", ctypes.c_ssize_t),
        ("ranges", ctypes.c_ssize_t),
        ("inner", ctypes.c_ssize_t),
        ("affine", ctypes.c_int32),
        ("is_weight", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class _Range(ctypes.Structure):
    """Where the tensors of a range lie, as the kernels take them."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("multiplier", "base", "quant_min", "quant_max")
    )


class Gradients(ctypes.Structure):
    """Where the gradients of a range go."""

    _fields_ = (("multiplier", ctypes.c_void_p), ("probe", ctypes.c_void_p))


class Call(NamedTuple):
    """One tensor as the kernels see it; with gaps or repetitions it is packed for them first."""

    shape: _Shape
    element: str
    packs: bool


def native_call(
    x: Tensor, multiplier: Tensor, base: Tensor, channel_axis: int | None, *, is_weight: bool
) -> Call | None:
    """Return how the kernels see `x`, or None where plain PyTorch must do.

    They take float32 and bfloat16 tensors of the CPU, with float32 ranges, outside of any
    dispatch mode; there must be a compiler.
    """
    element = _ELEMENTS.get(x.dtype)
    if element is None or type(x) not in _PLAIN or x.device.type != "cpu":
        return None
    if multiplier.dtype != torch.float32 or base.dtype != torch.float32:
        return None
    if _python_dispatch._get_current_dispatch_mode() is not None or load_library() is None:
        return None
    layout = layout_of(x, channel_axis)
    packs = layout is None
    if packs:
        layout = layout_of(torch.empty_like(x, device="meta"), channel_axis)
    if layout is None:
        return None
    threads = min(torch.get_num_threads(), 1 + x.numel() // _VALUES_PER_THREAD)
    return Call(_Shape(*layout, base.ndim == 2, is_weight, threads), element, packs)


def layout_of(x: Tensor, axis: int | None) -> tuple[int, int, int] | None:
    """Return the sizes [outer][ranges][inner] in which `x` lies; None where it is not dense.

    >>> layout_of(torch.empty(8, 4, 3, 3), 0), layout_of(torch.empty(8, 4, 3, 3), 1)
    ((1, 8, 36), (8, 4, 9))
    >>> layout_of(torch.empty(8, 4, 3, 3).to(memory_format=torch.channels_last), 1)
    (72, 4, 1)
    """
    if axis is None and x.is_contiguous():
        return 1, 1, x.numel()
    sizes, strides = x.shape, x.stride()
    expected, outer, ranges, inner = 1, 1, 1, 1
    axis = None if axis is None else axis % x.ndim
    passed = axis is None
    for dim in sorted(range(x.ndim), key=lambda dim: (strides[dim], sizes[dim])):
        if sizes[dim] != 1 and strides[dim] != expected:
            return None
        expected *= sizes[dim]
        if dim == axis:
            ranges, passed = sizes[dim], True
        elif passed and axis is not None:
            outer *= sizes[dim]
        else:
            inner *= sizes[dim]
    return outer, ranges, inner


def native_forward(
    call: Call, x: Tensor, ends: tuple[Tensor, ...], bounds: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Return x on its grid, and qparams, which `native_backward` needs.

    Args:
        call: what `native_call` returned.
        x: the tensor it was asked about.
        ends: multiplier, base, quant_min and quant_max, as `fake_quantize` has them.
        bounds: the constants that the kernels share with plain PyTorch, in their order.
    """
    x = _packed(call, x)
    out = torch.empty_like(x)
    return out, _run_forward("forward", call, (x, out), ends, bounds)


def native_rectified_forward(
    call: Call,
    x: Tensor,
    rectified: Tensor | None,
    ends: tuple[Tensor, ...],
    bounds: tuple[float, ...],
    top: float,
) -> tuple[Tensor, Tensor]:
    """Return what `native_forward` makes of x clamped to [0, top]; that goes to `rectified`."""
    x = _packed(call, x)
    out = torch.empty_like(x)
    tensors = (x, out, rectified)
    return out, _run_forward("rectified_forward", call, tensors, ends, bounds, floats((top,)))


def _run_forward(
    name: str,
    call: Call,
    tensors: tuple[Tensor | None, ...],
    ends: tuple[Tensor, ...],
    bounds: tuple[float, ...],
    *more: Any,
) -> Tensor:
    qparams = torch.empty(_FIELDS * call.shape.ranges)
    kernel = kernel_named(f"{name}_{call.element}", 4 + len(tensors) + len(more))
    kernel(
        ctypes.byref(call.shape),
        ctypes.byref(_Range(*map(Tensor.data_ptr, ends))),
        floats(bounds),
        qparams.data_ptr(),
        *map(pointer, tensors),
        *more,
    )
    return qparams


def native_backward(
    call: Call,
    x: Tensor,
    grad_out: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the multiplier and of the probe.

    `saved` are base, quant_max and qparams.
    """
    return _run_backward("backward", call, x, grad_out, saved, bounds)


def native_rectified_backward(
    call: Call,
    x: Tensor,
    grad_out: Tensor,
    grad_rectified: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[float, ...],
    top: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `native_backward` does, for x that was clamped to [0, top] before.

    `grad_rectified` came back to what was clamped.
    """
    x = _packed(call, x)
    beside = None if grad_rectified is None else laid_out_as(x, grad_rectified)
    more = (pointer(beside), floats((top,)))
    return _run_backward("rectified_backward", call, x, grad_out, saved, bounds, *more)


def _run_backward(
    name: str,
    call: Call,
    x: Tensor,
    grad_out: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[float, ...],
    *more: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    base, quant_max, qparams = saved
    x = _packed(call, x)
    grad_out, grad_x = laid_out_as(x, grad_out), _empty_like(x)
    grad_multiplier, grad_probe = torch.empty_like(base), torch.empty(2)
    kernel = kernel_named(f"{name}_{call.element}", 8 + len(more))
    failed = kernel(
        ctypes.byref(call.shape),
        ctypes.byref(_Range(None, base.data_ptr(), None, quant_max.data_ptr())),
        floats(bounds),
        *(qparams.data_ptr(), x.data_ptr(), grad_out.data_ptr(), grad_x.data_ptr()),
        ctypes.byref(Gradients(grad_multiplier.data_ptr(), grad_probe.data_ptr())),
        *more,
    )
    if failed:
        raise MemoryError(f"no memory for the sums over {x.numel()} gradients")
    return grad_x, grad_multiplier, grad_probe


def _packed(call: Call, x: Tensor) -> Tensor:
    """Return x, or a dense copy with its order of axes, as torch's operators give results."""
    return torch.empty_like(x).copy_(x) if call.packs and layout_of(x, None) is None else x


def laid_out_as(x: Tensor, grad: Tensor) -> Tensor:
    """Return a gradient in the layout and the type of x."""
    if grad.stride() == x.stride() and grad.dtype == x.dtype:
        return grad
    return torch.empty_like(x).copy_(grad)


def pointer(tensor: Tensor | None) -> int | None:
    """Return where a tensor lies, as kernels take it; None for NULL."""
    return None if tensor is None else tensor.data_ptr()


def _empty_like(x: Tensor) -> Tensor:
    """Return a tensor with the strides of torch's product of two tensors like x.

    An axis of one element may have any stride; where x counts as contiguous, the product has those
    of a contiguous tensor, and convolutions choose their kernels by them.
    """
    return x.new_empty(x.shape) if x.is_contiguous() else torch.empty_like(x)


@cache
def kernel_named(name: str, num_pointers: int) -> Callable[..., Any]:
    """Return the kernel ``cgmq_<name>``, which takes so many pointers."""
    function: Any = getattr(load_library(), f"cgmq_{name}")
    function.argtypes = [ctypes.c_void_p] * num_pointers
    function.restype = ctypes.c_int if "backward" in name else None
    found: Callable[..., Any] = function
    return found


@cache
def floats(values: tuple[float, ...]) -> Any:
    """Return numbers as a C array."""
    return (ctypes.c_float * len(values))(*values)
