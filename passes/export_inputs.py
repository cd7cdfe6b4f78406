"""A model as a function of tensors alone, and the way back to its own inputs and outputs."""

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.guards import check_same

#: Name of the submodule of an exported graph that holds its guards, constants and output.
PARTS = "exported"

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_PLAIN = (tuple, list, dict)


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a structure."""

    index: int


def map_leaves(
    function: Callable[[Any], Any], tree: Any, opened: frozenset[int] = frozenset()
) -> Any:
    """Return `tree` with every leaf mapped; an object that pytree does not know is opened too.

    Args:
        function: maps a leaf.
        tree: containers, dataclasses and other objects with attributes.
        opened: identities of the objects around `tree`, which are leaves in it.
    """

    def visit(leaf: Any) -> Any:
        names = () if id(leaf) in opened else _attributes(leaf)
        if not names:
            return function(leaf)
        changed: list[Any] = []

        def noting(item: Any) -> Any:
            mapped = function(item)
            changed.extend([mapped] if mapped is not item else ())
            return mapped

        inner = opened | {id(leaf)}
        values = {name: map_leaves(noting, getattr(leaf, name), inner) for name in names}
        if not changed:
            return leaf
        twin = copy.copy(leaf)
        for name, value in values.items():
            object.__setattr__(twin, name, value)
        return twin

    return pytree.tree_map(visit, tree)


def _attributes(value: Any) -> tuple[str, ...]:
    """Return the names of the attributes of an object that may hold tensors."""
    closed = (Tensor, Slot, nn.Module, Enum, *_SYMBOLIC)
    if isinstance(value, closed) or callable(value):
        return ()
    if is_dataclass(value):
        return tuple(field.name for field in fields(value))
    return tuple(getattr(value, "__dict__", ()))


def with_data(tensor: Tensor) -> Tensor:
    """Return a tensor with data, zeros where it has none; export takes no other."""
    if isinstance(tensor, FakeTensor):
        return torch.zeros(tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)
    return tensor


def with_slots(tree: Any, first: int = 0) -> tuple[Any, list[Any]]:
    """Return `tree` with a `Slot` for each tensor or symbolic number, and these in order."""
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        if not isinstance(leaf, (Tensor, *_SYMBOLIC)):
            return leaf
        found.append(leaf)
        return Slot(first + len(found) - 1)

    return map_leaves(note, tree), found


def fill_slots(tree: Any, values: Sequence[Any]) -> Any:
    """Return `tree` with ``values[i]`` for ``Slot(i)``."""
    return map_leaves(lambda leaf: values[leaf.index] if isinstance(leaf, Slot) else leaf, tree)


def is_same_structure(left: Any, right: Any) -> bool:
    """Tell whether two structures with slots are equal: types, keys and all that is no tensor."""
    left_leaves, left_structure = pytree.tree_flatten(left)
    right_leaves, right_structure = pytree.tree_flatten(right)
    if left_structure != right_structure:
        return False
    return all(_is_same_leaf(a, b) for a, b in zip(left_leaves, right_leaves, strict=True))


def _is_same_leaf(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    names = _attributes(left)
    if names:
        return left is right or (
            names == _attributes(right)
            and all(is_same_structure(getattr(left, n), getattr(right, n)) for n in names)
        )
    return bool(left == right)


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield module, name, buffer


def _keep_assignment(module: nn.Module, name: str, buffer: Tensor) -> None:
    """Write what the model assigned to a buffer into it: export loses a new tensor in its place."""
    assigned = module._buffers[name]
    if assigned is buffer:
        return
    if assigned is None or assigned.shape != buffer.shape or assigned.dtype != buffer.dtype:
        raise UnsupportedModelError(
            f"{type(module).__name__} assigns to its buffer '{name}' a value of another shape or "
            f"dtype than it has, {tuple(buffer.shape)} {buffer.dtype}; keep both, or keep such a "
            f"value out of the buffers"
        )
    with torch.no_grad():
        buffer.copy_(assigned)
    module._buffers[name] = buffer


class BuildOutput(nn.Module):
    """Makes the output of the model, of any type, from the tensors in it."""

    def __init__(self, structure: Any) -> None:
        super().__init__()
        self.structure = structure

    def forward(self, values: Sequence[Any]) -> Any:
        """Return the structure with `values` in its slots."""
        return fill_slots(self.structure, values)


class InputStructure(nn.Module):
    """Refuses an input that holds other things than the one with which the model was exported."""

    _is_impure = True  # a guard has no readers

    def __init__(self, structure: Any, name: str) -> None:
        super().__init__()
        self.structure, self.name = structure, name

    def forward(self, value: Any) -> None:
        """Check `value`.

        Raises:
            UnsupportedModelError: it has another structure, or another value that is no tensor.
        """
        found, _ = with_slots(value)
        if not is_same_structure(found, self.structure):
            raise UnsupportedModelError(
                f"input '{self.name}' was {self.structure!r} when the model was exported, and is "
                f"{found!r} now; call prepare again with example_inputs of this structure"
            )


class Returned:
    """What a model returned when it ran last, with slots: export resets plain attributes."""

    structure: Any = None


class ModelCall(nn.Module):
    """Calls a model on the tensors among its inputs; the other inputs are what they were.

    Args:
        model: the model.
        inputs: one value for each parameter of its forward.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.model = model
        self.parameters_of_forward = tuple(inspect.signature(model.forward).parameters.values())
        self.values = tuple(inputs)
        self.structures, self.tensors = with_slots(list(inputs))
        self.returned = Returned()

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        """Return the tensors and symbolic numbers in what the model returns."""
        args, kwargs = self.arguments(fill_slots(self.structures, tensors))
        buffers = list(_buffers(self.model))
        output, leaves = with_slots(self.model(*args, **kwargs))
        for module, name, buffer in buffers:
            _keep_assignment(module, name, buffer)
        self.returned.structure = output
        return tuple(leaves)

    def arguments(self, values: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return what a user would write: defaults are left out, by place as far as that goes."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        is_gap = False
        for parameter, value in zip(self.parameters_of_forward, values, strict=False):
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                kwargs.update(value)
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                args.extend(value)
            elif value is parameter.default:
                is_gap = True
            elif is_gap or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                kwargs[parameter.name] = value
            else:
                args.append(value)
        return args, kwargs

    def add_inputs(self, graph: fx.Graph, parts: nn.Module) -> list[fx.Node]:
        """Add the placeholders of the model and guards on them; return the tensors' nodes.

        Args:
            graph: an empty graph.
            parts: the module at `PARTS`, which gets the guards that need one.
        """
        placeholders = [_placeholder(graph, item) for item in self.parameters_of_forward]
        nodes: list[fx.Node] = []
        given = zip(placeholders, self.parameters_of_forward, self.values, strict=False)
        for placeholder, parameter, value in given:
            structure, tensors = with_slots(value)
            if isinstance(structure, Slot):
                nodes.append(placeholder)
                continue
            if not tensors and _is_plain_constant(value):
                where = f"input '{parameter.name}'"
                graph.call_function(check_same, (placeholder, value, where))
                continue
            name = f"check_input_{parameter.name}"
            parts.add_module(name, InputStructure(structure, parameter.name))
            graph.call_module(f"{PARTS}.{name}", (placeholder,))
            paths = list(_tensor_paths(value))
            nodes.extend(_at(graph, placeholder, path) for path in paths)
        return nodes


def _placeholder(graph: fx.Graph, parameter: inspect.Parameter) -> fx.Node:
    stars: dict[object, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    name = stars.get(parameter.kind, "") + parameter.name
    return graph.placeholder(name, default_value=parameter.default)


def _is_plain_constant(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    plain = isinstance(value, (*_PLAIN, type(None), bool, int, float, complex, str))
    return plain and all(
        isinstance(leaf, type(None) | bool | int | float | complex | str | torch.dtype)
        for leaf in leaves
    )


def _tensor_paths(value: Any) -> Iterator[tuple[tuple[Any, Any], ...]]:
    """Yield for each tensor in `value` the steps from outside in: a function and its argument."""
    if isinstance(value, Tensor):
        yield ()
        return
    steps: list[tuple[Any, Any, Any]] = []
    if isinstance(value, Mapping):
        steps = [(operator.getitem, key, item) for key, item in value.items()]
    elif isinstance(value, tuple | list):
        steps = [(operator.getitem, index, item) for index, item in enumerate(value)]
    else:
        steps = [
            (getattr, attribute, getattr(value, attribute)) for attribute in _attributes(value)
        ]
    for function, argument, item in steps:
        for path in _tensor_paths(item):
            yield ((function, argument), *path)


def _at(graph: fx.Graph, node: fx.Node, path: tuple[tuple[Any, Any], ...]) -> fx.Node:
    for function, argument in path:
        node = graph.call_function(function, (node, argument))
    return node


def add_output(graph: fx.Graph, parts: nn.Module, structure: Any, values: Sequence[Any]) -> Any:
    """Return `structure` with `values` in its slots, as an argument of the output node."""
    if _is_plain(structure):
        return fill_slots(structure, values)
    name = f"build_output_{len(parts._modules)}"
    parts.add_module(name, BuildOutput(structure))
    return graph.call_module(f"{PARTS}.{name}", (list(values),))


def _is_plain(structure: Any) -> bool:
    if type(structure) is dict:
        return all(isinstance(key, str | int) for key in structure) and all(
            map(_is_plain, structure.values())
        )
    if type(structure) in (tuple, list):
        return all(map(_is_plain, structure))
    return isinstance(structure, Slot | type(None) | bool | int | float | str)
