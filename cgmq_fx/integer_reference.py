"""Runs a lowered graph with its products on integer codes, exactly."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from cgmq_fx.attention import attention_weights, weighted_values
from cgmq_fx.frozen import FrozenAttention, FrozenQuantizer, FrozenWeight
from cgmq_fx.integer_products import (
    PRODUCT_CLASSES,
    Accumulation,
    Kernels,
    Product,
    Steps,
    accumulate,
    product_of,
)
from cgmq_fx.passes.annotate_operations import AnnotateOperations
from cgmq_fx.passes.names import operation_names
from cgmq_fx.passes.op_classes import class_of_function, class_of_method
from cgmq_fx.passes.pipeline import run_pass
from cgmq_fx.passes.recurrent import FUNCTIONS, INSIDE, products_of

# What attention and recurrent layers do to a tensor on a grid on its way to a product.
_MOVES = frozenset({"transpose", "unsqueeze", "repeat_interleave"})


class IntegerInterpreter(fx.Interpreter):
    """Runs a lowered graph; products of two tensors on grids are computed on their steps.

    Everything else is what the graph computes. Layers that torch has fused kernels for are opened
    where a product in them has integer factors.

    Args:
        fixed: a lowered graph.
        kernels: ``int64``, on the CPU; ``float``: float32 or float64, whichever is exact, on the
            device of the tensors. Both give the same numbers, bit for bit.
        integer_bias: add biases as integers on the grid of the sums.
    """

    def __init__(
        self, fixed: fx.GraphModule, kernels: Kernels = "int64", *, integer_bias: bool = False
    ) -> None:
        super().__init__(fixed)
        self.kernels, self.integer_bias = kernels, integer_bias
        run_pass(AnnotateOperations(), fixed)
        self._names = operation_names(fixed)
        self._node: fx.Node | None = None

    def accumulated(
        self, name: str, product: Product, factors: tuple[Steps, Steps], found: Accumulation
    ) -> None:
        """Learn of a product; subclasses keep or compare what they want of it.

        Args:
            name: of the operation, as in the report.
            product: the call. Its arguments may be tensors of this module's own kind.
            factors: of the product.
            found: what was computed.
        """

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, knowing which."""
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a function on tensors with their grids where it may multiply, else on values."""
        if target in FUNCTIONS and _any_on_grid(args):
            args, kwargs = self._opened(args, kwargs)
        elif target is F.scaled_dot_product_attention and all(map(_is_on_grid, args[:2])):
            return self._attention(None, *args, **kwargs)
        elif class_of_function(target) not in PRODUCT_CLASSES:
            args, kwargs = values_of((args, kwargs))
        return values_of(super().call_function(target, args, kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Do the same for a method."""
        if class_of_method(target) not in PRODUCT_CLASSES:
            args, kwargs = values_of((args, kwargs))
        return super().call_method(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return what a frozen module returns with its grid; run others on values."""
        module = self.fetch_attr(target)
        if isinstance(module, FrozenWeight):
            return self._weight(module)
        if isinstance(module, FrozenAttention):
            return self._attention(module, *args, **kwargs)
        args, kwargs = values_of((args, kwargs))
        if isinstance(module, FrozenQuantizer):
            return self.rounded(module, *args, **kwargs)
        return super().call_module(target, args, kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return values."""
        return super().output(target, values_of(args), kwargs)

    def multiply(self, product: Product, lhs: Steps, rhs: Steps) -> Tensor | None:
        """Return a product on steps, None where its sum is no integer."""
        found = accumulate(product, lhs, rhs, self.kernels, integer_bias=self.integer_bias)
        if found is None:
            return None
        assert self._node is not None
        name = self._names.get(self._node, self._node.name)
        self.accumulated(f"{name}.{rhs.label}" if rhs.label else name, product, (lhs, rhs), found)
        return found.result

    # -- tensors on grids ------------------------------------------------------------------------

    def rounded(self, module: FrozenQuantizer, x: Tensor) -> Tensor:
        """Return x as a quantizer rounds it, with its grid."""
        if not module.rounds(x):
            return x
        steps, scale = module.steps(x), module.broadcast_scale(x.ndim)
        zero_point = module.zero_point.long()
        ends = torch.stack((module.quant_min - zero_point, module.quant_max - zero_point))
        limit = int(ends.abs().max())
        return OnGrid.of(Steps((steps * scale).to(x.dtype), steps, scale, limit), self.multiply)

    def _weight(self, module: FrozenWeight) -> Tensor:
        steps = module.steps()
        limit = int(steps.abs().max()) if steps.numel() else 0
        held = Steps(module(), steps, module.broadcast_scale(), limit)
        return OnGrid.of(held, self.multiply)

    # -- operations with products inside ---------------------------------------------------------

    def _attention(
        self,
        module: FrozenAttention | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Return the attention output; arguments as of `F.scaled_dot_product_attention`."""
        key, value = _labelled(key, "qk"), _labelled(value, "pv")
        weights = attention_weights(query, key, attn_mask, is_causal, scale, enable_gqa)
        if module is not None:
            weights = self.rounded(module, weights)
        return weighted_values(weights, query, value, dropout_p, enable_gqa)

    def _opened(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments of a recurrent layer, so that it opens and tells its products."""
        assert self._node is not None
        data, hx, given, *rest = args
        weights, inside = list(given), dict[str, nn.Module]()
        held = kwargs.get(INSIDE, {})
        for product in products_of(self._node):
            weights[product.weight] = _labelled(weights[product.weight], product.name)
            name = product.operand
            if name is not None:
                inside[name] = _Rounding(self, held[name]) if name in held else nn.Identity()
        return (data, values_of(hx), weights, *rest), {**kwargs, INSIDE: inside}


class AccumulatorRecorder(IntegerInterpreter):
    """Keeps the accumulators."""

    def __init__(
        self, fixed: fx.GraphModule, kernels: Kernels = "int64", *, integer_bias: bool = False
    ) -> None:
        super().__init__(fixed, kernels, integer_bias=integer_bias)
        self._sums: dict[str, list[Tensor]] = {}

    def accumulated(
        self, name: str, product: Product, factors: tuple[Steps, Steps], found: Accumulation
    ) -> None:
        """Keep the sums as integers."""
        self._sums.setdefault(name, []).append(found.values.to(torch.int64))

    @property
    def accumulators(self) -> dict[str, Tensor]:
        """By operation; those of several steps stacked along a new first axis."""
        return {
            name: torch.stack(sums) if len(sums) > 1 else sums[0]
            for name, sums in self._sums.items()
        }


class OnGrid(Tensor):
    """The values of a tensor that stands on a grid, and knows it.

    It multiplies on steps with its like, keeps them where it is moved or multiplied by a number,
    and is an ordinary tensor to every other function.
    """

    held: Steps
    on_steps: Callable[[Product, Steps, Steps], Tensor | None]

    @classmethod
    def of(
        cls, held: Steps, on_steps: Callable[[Product, Steps, Steps], Tensor | None]
    ) -> "OnGrid":
        """Return the values of `held`; `on_steps` computes their products."""
        result = held.value.as_subclass(cls)
        result.held, result.on_steps = held, on_steps
        return result

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`; see the class."""
        kwargs = kwargs or {}
        product = product_of(func, args, kwargs)
        if product is not None:
            lhs, rhs = map(product.given, product.factors)
            if isinstance(lhs, OnGrid) and isinstance(rhs, OnGrid):
                result = lhs.on_steps(product, lhs.held, rhs.held)
                if result is not None:
                    return result
        first = args[0] if args else None
        if isinstance(first, OnGrid):
            moved = _moved(func, first.held, args[1:], kwargs)
            if moved is not None:
                return cls.of(moved, first.on_steps)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*values_of(args), **values_of(kwargs))


class _Rounding(nn.Module):
    """A quantizer inside a recurrent layer, whose results know their grid."""

    def __init__(self, run: IntegerInterpreter, quantizer: FrozenQuantizer) -> None:
        super().__init__()
        self.run, self.quantizer = run, quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid."""
        return self.run.rounded(self.quantizer, x)


def _moved(func: Any, held: Steps, rest: Sequence[Any], kwargs: Any) -> Steps | None:
    """Return where a tensor is after `func`, None where it is no longer on a grid."""
    name = getattr(func, "__name__", "")
    if held.scale.numel() > 1:
        return None
    if name in _MOVES:
        value, steps = (func(tensor, *rest, **kwargs) for tensor in (held.value, held.steps))
        return replace(held, value=value, steps=steps)
    if name == "mul" and len(rest) == 1 and isinstance(rest[0], int | float):
        scale = held.scale.to(torch.float64) * rest[0]
        return replace(held, value=held.value * rest[0], scale=scale)
    return None


def _labelled(tensor: Any, label: str) -> Any:
    if not isinstance(tensor, OnGrid):
        return tensor
    return OnGrid.of(replace(tensor.held, label=label), tensor.on_steps)


def _is_on_grid(value: Any) -> bool:
    return isinstance(value, OnGrid)


def _any_on_grid(values: Any) -> bool:
    return any(map(_is_on_grid, pytree.tree_leaves(values)))


def values_of(tree: Any) -> Any:
    """Return what stands in nested containers with ordinary tensors for those on grids."""
    return pytree.tree_map(lambda leaf: leaf.held.value if _is_on_grid(leaf) else leaf, tree)
