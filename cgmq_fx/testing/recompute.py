"""The cost of a lowered module, found by running it: nothing of the library's accounting is used.

A tensor has the bit-width of the frozen module that returned it, as long as nothing writes to it;
any other tensor has 32 bits. MACs are what `cgmq_fx.testing.counting` sees. What is read of the
library are the attributes of its frozen modules, and these are checked against the numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from cgmq_fx.testing.counting import Watch, any_batch

FLOAT_BITS = 32

# Where the two operands of a product stand among the tensors that a function is given.
_OPERANDS: Mapping[Callable[..., Any], tuple[int, int]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, F.linear), (0, 1)),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), (0, 1)),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), (0, 1)),
    **dict.fromkeys((torch.matmul, torch.bmm, torch.mm, torch.einsum), (0, 1)),
    **dict.fromkeys((torch.mv, torch.dot, torch.vdot, torch.inner, torch.tensordot), (0, 1)),
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm), (0, 1)),
    **dict.fromkeys((Tensor.mv, Tensor.dot, Tensor.vdot, Tensor.inner), (0, 1)),
    **dict.fromkeys((torch.baddbmm, torch.addbmm, torch.addmm, torch.addmv), (1, 2)),
    **dict.fromkeys((Tensor.baddbmm, Tensor.addbmm, Tensor.addmm, Tensor.addmv), (1, 2)),
}


# Kernels that compute all products of a recurrent layer, or of one step of it.
_LAYERS = {torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu}
_CELLS = {
    *(torch._VF.lstm_cell, torch._VF.gru_cell),
    *(torch._VF.rnn_tanh_cell, torch._VF.rnn_relu_cell),
}


@dataclass(frozen=True)
class Product:
    """One multiplication of two tensors that was run.

    Attributes:
        name: the function.
        macs: its multiply-accumulates.
        bits: bit-widths of the two tensors.
    """

    name: str
    macs: int
    bits: tuple[int, int]

    @property
    def bops(self) -> int:
        """Bit operations."""
        return self.macs * self.bits[0] * self.bits[1]


def products_of(fixed: nn.Module, inputs: Sequence[Any]) -> list[Product]:
    """Return every product that `fixed` computes on `inputs`, one sample."""
    tracker = _Tracker()
    with torch.no_grad(), any_batch(), _following(fixed, tracker), tracker:
        fixed(*inputs)
    return tracker.products


def relative_bops(fixed: nn.Module, inputs: Sequence[Any]) -> Fraction:
    """Return the bit operations of `fixed` as a share of those at 32 x 32 bits."""
    products = products_of(fixed, inputs)
    macs = sum(product.macs for product in products)
    return Fraction(sum(product.bops for product in products), macs * FLOAT_BITS**2)


def memory_bytes(fixed: nn.Module) -> Fraction:
    """Return the bytes of packed weights and of all parameters, each stored tensor once."""
    weights: list[Any] = [module for module in fixed.modules() if _is_frozen_weight(module)]
    for module in weights:
        _check_codes(module)
    packed = sum(module.codes.numel() * module.bit_width for module in weights)
    floats = sum(parameter.numel() for parameter in fixed.parameters())
    return Fraction(packed + FLOAT_BITS * floats, 8)


def _is_frozen_weight(module: nn.Module) -> bool:
    return hasattr(module, "bit_width") and hasattr(module, "codes")


@contextmanager
def _following(fixed: nn.Module, tracker: "_Tracker") -> Iterator[None]:
    handles = []
    for module in fixed.modules():
        if hasattr(module, "bit_width"):
            handles.append(module.register_forward_pre_hook(tracker.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(tracker.leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Tracker(TorchFunctionMode):
    """Sees every function of a forward, and what frozen modules return."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []
        self._bits: dict[int, tuple[Tensor, int]] = {}  # the tensor: so that its id stays taken
        self._inside: nn.Module | None = None

    # -- frozen modules --------------------------------------------------------------------------

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._inside is None
        self._inside = module
        if len(args) > 1:  # attention: its weights are quantized between the two products
            self._attention(args, kwargs, module.bit_width)

    def leave(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        self._inside = None
        if len(args) > 1 or not output.is_floating_point():
            return
        if _is_frozen_weight(module):
            _check_codes(module)
        else:
            _check_levels(output, module)
        self._bits[id(output)] = output, module.bit_width

    # -- functions -------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside is not None:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._attention(args, kwargs, FLOAT_BITS)
            return func(*args, **kwargs)
        if func in _LAYERS:
            data, _, weights, _, layers, _, _, bidirectional = args[:8]
            self._recurrent(data, weights, layers * (2 if bidirectional else 1), layers)
            return func(*args, **kwargs)
        if func in _CELLS:
            self._recurrent(args[0], args[2:], 1, 1)
            return func(*args, **kwargs)
        with FlopCounterMode(display=False) as counter, Watch() as watch:
            result = func(*args, **kwargs)
        macs = watch.macs(counter, str(resolve_name(func)))
        if macs:
            self._product(func, args, kwargs, macs)
        self._forget_written(func, args)
        return result

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: Any, macs: int) -> None:
        # What is not known here counts as float: were it quantized, the sums would differ.
        first, second = FLOAT_BITS, FLOAT_BITS
        if func in _OPERANDS:
            tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
            first, second = (self._bits_of(tensors[place]) for place in _OPERANDS[func])
        self.products.append(Product(str(resolve_name(func)), macs, (first, second)))

    def _attention(self, args: tuple[Any, ...], kwargs: Any, weight_bits: int) -> None:
        query, key, value = args[:3]
        *heads, targets, width = query.shape
        batch, sources = torch.Size(heads).numel(), key.shape[-2]
        scores = bmm_flop((batch, targets, width), (batch, width, sources))
        mixed = bmm_flop((batch, targets, sources), (batch, sources, value.shape[-1]))
        bits = [self._bits_of(tensor) for tensor in (query, key, value)]
        self.products.append(Product("attention qk", _half(scores), (bits[0], bits[1])))
        self.products.append(Product("attention wv", _half(mixed), (weight_bits, bits[2])))

    def _recurrent(self, data: Tensor, weights: Sequence[Any], runs: int, layers: int) -> None:
        """Note the products of a fused kernel, whose inner tensors are float."""
        steps = data.shape[:-1].numel()
        count = len(weights) // runs
        for place, weight in enumerate(weights):
            if weight is None or weight.dim() == 1:  # a bias
                continue
            reads_data = place % count == 0 and place < len(weights) // layers
            bits = self._bits_of(data) if reads_data else FLOAT_BITS
            macs = steps * weight.numel()
            self.products.append(Product("recurrent", macs, (bits, self._bits_of(weight))))

    def _bits_of(self, tensor: Tensor) -> int:
        return self._bits[id(tensor)][1] if id(tensor) in self._bits else FLOAT_BITS

    def _forget_written(self, func: Any, args: tuple[Any, ...]) -> None:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property, such as a shape
            return
        if name.endswith("_") and args and isinstance(args[0], Tensor):
            storage = args[0].untyped_storage().data_ptr()
            self._bits = {
                key: (tensor, bits)
                for key, (tensor, bits) in self._bits.items()
                if tensor.untyped_storage().data_ptr() != storage
            }


def _half(flops: int) -> int:
    assert flops % 2 == 0
    return flops // 2


def _check_codes(module: Any) -> None:
    """Fail where the codes of a weight do not fit the bits that it claims."""
    if module.codes.numel():
        low, high = (int(end) for end in module.codes.aminmax())
        assert high - low < 2**module.bit_width, f"{module}: codes from {low} to {high}"


def _check_levels(output: Tensor, module: Any) -> None:
    """Fail where a tensor has more different values than the bits of its quantizer can tell."""
    axis = getattr(module, "channel_axis", None)
    rows = [output] if axis is None else output.unbind(axis)
    for row in rows:
        levels = row.unique().numel()  # type: ignore[no-untyped-call]
        assert levels <= 2**module.bit_width, f"{module}: too many levels"
