"""Products of two tensors of codes: exact accumulators, and what they come to in real numbers.

A value on a grid is ``steps * scale`` with integers ``steps = code - zero_point``. A product of two
such tensors is a sum of products of steps, an integer, times the product of the scales; the integer
is the accumulator. Float kernels compute it exactly as long as no partial sum, in whatever order,
is larger than the integers that the type holds. `kernel_type` sees to that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cgmq_fx.passes.op_classes import class_of_function, class_of_method
from cgmq_fx.passes.products import factors_of

Kernels = Literal["int64", "float"]

FLOAT32_INTEGERS, FLOAT64_INTEGERS = 2**24, 2**53
"""Up to here every integer is a float32, or a float64."""

_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
_LAYERS = _TRANSPOSED | {"conv1d", "conv2d", "conv3d", "linear"}
#: Classes of operations that multiply two tensors and sum; those of the two that have grids.
PRODUCT_CLASSES = _LAYERS | {"matmul"}
# Functions that add a tensor to the product, and those that sum over the last axis of the first.
_SUMS = frozenset({"addmm", "baddbmm", "addbmm", "addmv"})
_OVER_LAST = frozenset(
    {"matmul", "linalg_matmul", "bmm", "mm", "mv", "dot", "vdot", "inner", "addmm", "baddbmm"}
)

_Place = tuple[int, str]
_BIAS, _ADDED, _GROUPS = (2, "bias"), (0, "input"), (6, "groups")


@dataclass(frozen=True)
class Steps:
    """A tensor on a grid.

    Attributes:
        value: the real values.
        steps: integers, in a float tensor of the same shape.
        scale: broadcasts with `steps`.
        limit: no step is larger in size.
        label: the part of an operation that multiplies by it, where an operation has several.
    """

    value: Tensor
    steps: Tensor
    scale: Tensor
    limit: int
    label: str = ""


@dataclass(frozen=True)
class Accumulation:
    """A product that was computed on steps.

    Attributes:
        values: the accumulators, in the type of the kernel.
        scale: what one unit of them is, float64; broadcasts with them.
        bound: no partial sum is larger in size, whatever the inputs are.
        result: what the operation returns.
    """

    values: Tensor
    scale: Tensor
    bound: int
    result: Tensor


def accumulate(
    product: "Product", lhs: Steps, rhs: Steps, kernels: Kernels, *, integer_bias: bool = False
) -> Accumulation | None:
    """Compute a product on the steps of its factors.

    Behind the accumulator all is float64, rounded once to the type of the factors.

    Args:
        product: the call.
        lhs: its first factor.
        rhs: its second factor.
        kernels: as in `kernel_type`.
        integer_bias: add a bias as `bias_codes`.

    Returns:
        None where scales vary along an axis that is summed over: no integer is the sum then.
    """
    scale = _result_scale(product, lhs, rhs)
    if scale is None:
        return None
    bound = _bound(product, lhs, rhs)
    dtype, device = kernel_type(bound, lhs.steps.device, kernels)
    values = product.of(lhs.steps.to(device, dtype), rhs.steps.to(device, dtype))
    values = values.to(lhs.steps.device)
    real = values.to(torch.float64) * scale
    added = product.added(real)
    if added is not None and integer_bias and product.op in _LAYERS:
        added = bias_codes(added, scale) * scale
    result = real * product.factor if added is None else real * product.factor + added
    return Accumulation(values, scale, bound, result.to(lhs.value.dtype))


def bias_codes(bias: Tensor, scale: Tensor) -> Tensor:
    """Return a bias as integers on the grid of the accumulators that it is added to, int64.

    That is what integer-only runtimes add. Each is off by half of `scale` at most; runtimes whose
    accumulators are int32 need them to fit.

    Args:
        bias: for each output channel.
        scale: one unit of the accumulators; broadcasts with the bias.
    """
    return (bias.to(torch.float64) / scale).round().to(torch.int64)


def kernel_type(
    bound: int, device: torch.device, kernels: Kernels
) -> tuple[torch.dtype, torch.device]:
    """Return in which type, and where, sums of integers up to `bound` are exact.

    Convolutions in float32 on other devices than a CPU may not be plain sums of products (TF32,
    Winograd), and there are no integer products.
    """
    cpu = torch.device("cpu")
    if kernels == "float" and bound <= FLOAT32_INTEGERS and device == cpu and _keeps_all_bits():
        return torch.float32, device
    if kernels == "float" and bound <= FLOAT64_INTEGERS:
        return torch.float64, device
    return torch.int64, cpu


def _keeps_all_bits() -> bool:
    """Tell whether float32 products on a CPU are in float32, as they are unless torch was told."""
    mkldnn: Any = torch.backends.mkldnn  # the module's properties are not in its annotations
    return {mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision} <= {"none", "ieee"}


@dataclass(frozen=True)
class Product:
    """A call of a function that multiplies two tensors and sums.

    Attributes:
        op: its operation class.
        function: the function or method, as torch hands it to ``__torch_function__``.
        args: of the call.
        kwargs: likewise.
    """

    op: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the function."""
        return str(getattr(self.function, "__name__", ""))

    @property
    def factors(self) -> tuple[_Place, _Place]:
        """Where the two factors stand; of a layer the second is the weight."""
        return ((0, "input"), (1, "weight")) if self.op in _LAYERS else factors_of(self.function)

    def given(self, place: _Place, default: Any = None) -> Any:
        """Return the argument that stands at `place`."""
        index, keyword = place
        return self.args[index] if index < len(self.args) else self.kwargs.get(keyword, default)

    def of(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        """Return the bare product of two other factors of one type, with nothing added to it."""
        if self.name == "linalg_vecdot":  # it takes no integers
            return (lhs * rhs).sum(self.kwargs.get("dim", -1))
        first, second = self.factors
        swapped: dict[_Place, Tensor | None] = {first: lhs, second: rhs}
        if self.op in _LAYERS:
            swapped[_BIAS] = None
        if self.name in _SUMS:
            swapped[_ADDED] = lhs.new_zeros(1)
        args = list(self.args)
        kwargs = {key: item for key, item in self.kwargs.items() if key not in ("alpha", "beta")}
        for (index, keyword), item in swapped.items():
            if index < len(args):
                args[index] = item
            else:
                kwargs[keyword] = item
        result: Tensor = self.function(*args, **kwargs)
        return result

    @property
    def factor(self) -> float:
        """What the product is multiplied by."""
        factor: float = self.kwargs.get("alpha", 1)
        return factor

    def added(self, like: Tensor) -> Tensor | None:
        """Return what is added to the product, in the type of a tensor; None: nothing is."""
        if self.name in _SUMS:
            tensor, beta = self.given(_ADDED), self.kwargs.get("beta", 1)
            return torch.mul(tensor.to(like), beta)
        bias: Tensor | None = self.given(_BIAS) if self.op in _LAYERS else None
        return None if bias is None else self.along_channels(bias.to(like))

    def along_channels(self, per_channel: Tensor) -> Tensor:
        """Return numbers for each output channel of a layer in a shape that fits its output."""
        return per_channel.view(-1, *[1] * (self.given(self.factors[1]).ndim - 2))


def product_of(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Product | None:
    """Return a call as a product of two tensors, None where it is something else."""
    op = class_of_function(function)
    if op == "other":
        op = class_of_method(getattr(function, "__name__", ""))
    return Product(op, function, args, kwargs) if op in PRODUCT_CLASSES else None


def _result_scale(product: Product, lhs: Steps, rhs: Steps) -> Tensor | None:
    left, right = lhs.scale.to(torch.float64), rhs.scale.to(torch.float64)
    if left.numel() > 1:
        return None
    if right.numel() == 1:
        return left.view(()) * right.view(())
    if product.op not in _LAYERS:
        return None
    weight = rhs.steps.shape
    if product.op in _TRANSPOSED:  # all rows of a group go to its output channels
        groups = product.given(_GROUPS, 1)
        rows = right.expand(*weight[:2], *right.shape[2:])
        right, channels = rows[:: weight[0] // groups], weight[1] * groups
    else:
        channels = weight[0]
    if right.numel() != channels:
        return None
    return product.along_channels(left.view(()) * right.reshape(-1))


def _bound(product: Product, lhs: Steps, rhs: Steps) -> int:
    """Return the sum of the sizes of all terms of an accumulator, at most."""
    if product.op not in _LAYERS:
        return terms_of(product, lhs, rhs) * lhs.limit * rhs.limit
    sizes = rhs.steps.abs().to(torch.float64)
    if product.op in _TRANSPOSED:
        groups = product.given(_GROUPS, 1)
        sizes = sizes.reshape(groups, -1, *sizes.shape[1:]).transpose(1, 2).flatten(0, 1)
    per_channel = sizes.reshape(1 if sizes.ndim == 1 else sizes.shape[0], -1)
    return int(per_channel.sum(1).amax()) * lhs.limit


def terms_of(product: Product, lhs: Steps, rhs: Steps) -> int:
    """Return how many products an accumulator sums, at most."""
    if product.op in _TRANSPOSED:
        groups: int = product.given(_GROUPS, 1)
        return rhs.steps[:, 0].numel() // groups
    if product.op in _LAYERS:
        return rhs.steps[0].numel() if rhs.steps.ndim > 1 else rhs.steps.numel()
    if product.name in _OVER_LAST:
        return lhs.steps.shape[-1]
    ones = (torch.ones(item.steps.shape, dtype=torch.int64) for item in (lhs, rhs))
    return int(product.of(*ones).amax())
