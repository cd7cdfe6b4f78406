"""Keeps layers with a train/eval mode closed while `torch.export` runs through a model.

Export writes the mode of the moment into the program: batch norm would update its statistics for
ever, or never. A closed layer is recorded as one call of an operator that knows its number;
`RestoreModules` turns each of them into a call of the layer again.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

_NAMESPACE = "cgmq_fx"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("closed_layer(int call, Tensor[] tensors) -> Tensor[]")  # type: ignore[no-untyped-call]
#: The operator that stands for a closed layer: the number of the call, its tensors.
CLOSED_LAYER = torch.ops.cgmq_fx.closed_layer.default

_SAME_SHAPE = (_BatchNorm, _InstanceNorm, _DropoutNd)
_CLOSED = (*_SAME_SHAPE, nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class ClosedCall:
    """One call of a closed layer.

    Attributes:
        path: the layer.
        leaves: the arguments, flattened; None stands where a tensor does.
        is_tensor: which of them are tensors.
        structure: what ``(args, kwargs)`` looks like.
        places: where each tensor stands in what the layer returns, as indices from outside in.
    """

    path: str
    leaves: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    structure: pytree.TreeSpec
    places: tuple[tuple[int, ...], ...]

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return args and kwargs of the call, with `tensors` in the places of tensors."""
        given = iter(tensors)
        leaves = [
            next(given) if tensor else leaf
            for leaf, tensor in zip(self.leaves, self.is_tensor, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return tuple(args), dict(kwargs)


class ClosedLayers:
    """The closed layers of a model that is being exported, and their calls in order."""

    def __init__(self, model: nn.Module, leaves: Collection[str] = ()) -> None:
        self.calls: list[ClosedCall] = []
        self._pending: dict[int, Callable[[Sequence[Tensor]], list[Tensor]]] = {}
        self._layers = {
            path: module
            for path, module in model.named_modules()
            if not any(path.startswith(f"{leaf}.") for leaf in leaves)
            and (path in leaves or (path and is_closed(module) and "forward" not in vars(module)))
        }

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record calls of the closed layers in place of what they do."""
        previous = _ACTIVE[-1:]
        _ACTIVE.append(self)
        try:
            for path, module in self._layers.items():
                module.__dict__["forward"] = self._recording(path, module)
            yield
        finally:
            for module in self._layers.values():
                module.__dict__.pop("forward", None)
            del _ACTIVE[len(previous) :]

    def _recording(self, path: str, module: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = pytree.tree_flatten((args, kwargs))
            is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
            kept = tuple(
                None if tensor else leaf for leaf, tensor in zip(leaves, is_tensor, strict=True)
            )
            number, found = len(self.calls), []

            def shapes(tensors: Sequence[Tensor]) -> list[Tensor]:
                given = iter(tensors)
                filled = [
                    next(given) if tensor else leaf
                    for leaf, tensor in zip(kept, is_tensor, strict=True)
                ]
                own_args, own_kwargs = pytree.tree_unflatten(filled, structure)
                result = _without_data(module, own_args, own_kwargs)
                found.append(result)
                return pytree.tree_leaves(result)

            self._pending[number] = shapes
            self.calls.append(ClosedCall(path, kept, is_tensor, structure, ()))
            tensors = [leaf for leaf, tensor in zip(leaves, is_tensor, strict=True) if tensor]
            flat = CLOSED_LAYER(number, tensors)
            with_places, result = pytree.tree_flatten_with_path(found[-1])
            places = tuple(tuple(_index(key) for key in place) for place, _ in with_places)
            self.calls[number] = replace(self.calls[number], places=places)
            return pytree.tree_unflatten(flat, result)

        return forward

    def shapes_of(self, number: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return what call `number` makes of tensors without data."""
        return self._pending[number](tensors)


_ACTIVE: list[ClosedLayers] = []


def is_closed(module: nn.Module) -> bool:
    """Tell whether `module` is a layer of torch whose forward the mode or a state decides."""
    if isinstance(module, _DropoutNd) and module.inplace:
        return False  # it changes its operand, which the stand-in cannot
    return (
        isinstance(module, _CLOSED)
        and type(module).__module__.startswith("torch.nn.")
        and not parametrize.is_parametrized(module)
    )


def _index(key: Any) -> int:
    """Return where an item stands in a tuple or list: layers of torch return nothing else."""
    index: int = key.idx
    return index


def _without_data(module: nn.Module, args: Any, kwargs: Any) -> Any:
    if isinstance(module, _SAME_SHAPE):
        data = args[0] if args else kwargs["input"]
        check = getattr(module, "_check_input_dim", None)
        if check is not None:
            check(data)
        return torch.empty_like(data)
    with torch.no_grad():
        return type(module).forward(module, *args, **kwargs)


def _shapes(call: int, tensors: list[Tensor]) -> list[Tensor]:
    return _ACTIVE[-1].shapes_of(call, tensors)


torch.library.register_fake(f"{_NAMESPACE}::closed_layer", _shapes, lib=_LIBRARY)
