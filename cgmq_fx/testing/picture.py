"""What a graph module is, as plain values: to tell whether a pass changed it, and what."""

import dataclasses
import enum
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from cgmq_fx.testing.compare import digest
from cgmq_fx.testing.snapshot import named_tensors, settings_of

# Annotations that say where a node came from; every tool writes its own on the nodes it makes.
_PROVENANCE = frozenset({"stack_trace", "from_node", "original_aten"})
_MAX_DEPTH = 12


@dataclass(frozen=True)
class TensorPicture:
    """One parameter or buffer under one name.

    Attributes:
        kind: ``parameter``, ``buffer`` or ``buffer that is not saved``.
        form: dtype, shape and whether it requires a gradient.
        content: digest of its elements.
        first_name: the first name of the same tensor; its own name where it is not tied.
    """

    kind: str
    form: tuple[object, ...]
    content: str
    first_name: str


@dataclass(frozen=True)
class Picture:
    """A graph module at one moment.

    Attributes:
        nodes: op, target and arguments of each node, which refer to others by their place.
        modules: type and settings of each submodule, training mode included.
        tensors: parameters and buffers.
    """

    nodes: tuple[str, ...]
    modules: Mapping[str, tuple[type[nn.Module], Mapping[str, object]]]
    tensors: Mapping[str, TensorPicture]

    @staticmethod
    def of(gm: fx.GraphModule) -> "Picture":
        """Return what `gm` is now."""
        place = {node: f"%{index}" for index, node in enumerate(gm.graph.nodes)}
        nodes = [
            f"{n.op} {n.target} {fx.node.map_arg((n.args, n.kwargs), place.__getitem__)}"
            for n in gm.graph.nodes
        ]
        modules = {
            path: (type(module), settings_of(module)) for path, module in gm.named_modules() if path
        }
        return Picture(tuple(nodes), modules, dict(_tensors(gm)))

    def changes(self, now: "Picture") -> Iterator[str]:
        """Yield what is different in `now`."""
        if self.nodes != now.nodes:
            yield from _line_changes(self.nodes, now.nodes)
        for kind in ("modules", "tensors"):
            before, after = getattr(self, kind), getattr(now, kind)
            for name in sorted({*before, *after}):
                if before.get(name) != after.get(name):
                    yield f"{kind[:-1]} '{name}': {_shown(before.get(name), after.get(name))}"


def _tensors(gm: fx.GraphModule) -> Iterator[tuple[str, TensorPicture]]:
    firsts: dict[int, str] = {}
    saved = gm.state_dict(keep_vars=True).keys()
    for name, tensor in named_tensors(gm):
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        kind = kind if name in saved else f"{kind} that is not saved"
        form = (tensor.dtype, tuple(tensor.shape), tensor.requires_grad)
        first = firsts.setdefault(id(tensor), name)
        yield name, TensorPicture(kind, form, digest(tensor), first)


def _line_changes(before: tuple[str, ...], after: tuple[str, ...]) -> Iterator[str]:
    if len(before) != len(after):
        yield f"the graph had {len(before)} nodes and has {len(after)}"
        return
    for old, new in zip(before, after, strict=True):
        if old != new:
            yield f"the node '{old}' is '{new}'"


def _shown(before: Any, after: Any) -> str:
    if before is None or after is None:
        return "it is new" if before is None else "it is gone"
    if isinstance(before, TensorPicture):
        return "another tensor, or other elements" if before.form == after.form else (
            f"was {before.kind} {before.form}, is {after.kind} {after.form}"
        )  # fmt: skip
    (old_type, old), (new_type, new) = before, after
    if old_type is not new_type:
        return f"was {old_type.__name__}, is {new_type.__name__}"
    names = [name for name in {*old, *new} if old.get(name) != new.get(name)]
    return ", ".join(f"{n} was {old.get(n)!r}, is {new.get(n)!r}" for n in sorted(names))


# -- annotations -----------------------------------------------------------------------------------


def annotations(gm: fx.GraphModule) -> dict[str, dict[str, object]]:
    """Return by node what its meta says, with values described so that a change in place shows."""
    return {
        node.name: {
            str(key): _described(value)
            for key, value in node.meta.items()
            if key not in _PROVENANCE
        }
        for node in gm.graph.nodes
    }


def annotation_faults(
    before: Mapping[str, Mapping[str, object]], now: Mapping[str, Mapping[str, object]]
) -> Iterator[str]:
    """Yield the values that are different now, by node and key."""
    for name in sorted({*before, *now}):
        old, new = before.get(name, {}), now.get(name, {})
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                yield f"node '{name}': meta['{key}'] was {old.get(key)!r} and is {new.get(key)!r}"


def _described(value: Any, depth: int = 0) -> object:
    if isinstance(value, Tensor):
        return "tensor", id(value), tuple(value.shape), value._version
    if isinstance(value, fx.Node):
        return "node", value.name
    if depth > _MAX_DEPTH or value is None or isinstance(value, str | int | float | type):
        return value if depth <= _MAX_DEPTH else id(value)
    if isinstance(value, Mapping):
        return type(value), [(str(k), _described(v, depth + 1)) for k, v in value.items()]
    if isinstance(value, set | frozenset):
        return type(value), sorted(repr(item) for item in value)
    if isinstance(value, list | tuple):
        return type(value), [_described(item, depth + 1) for item in value]
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return type(value), [_described(getattr(value, f.name), depth + 1) for f in fields]
    return type(value), id(value)


def is_frozen(value: object) -> bool:
    """Tell whether nothing can change `value` in place, so that copies of a graph may share it."""
    if isinstance(value, tuple | frozenset):
        return all(map(is_frozen, value))
    if isinstance(value, types.MappingProxyType):
        return all(map(is_frozen, value.values()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parameters = type(value).__dataclass_params__  # type: ignore[attr-defined]
        fields = (getattr(value, field.name) for field in dataclasses.fields(value))
        return bool(parameters.frozen) and all(map(is_frozen, fields))
    plain = str | int | float | complex | bytes | type | enum.Enum | torch.dtype | torch.device
    return value is None or isinstance(value, plain)
