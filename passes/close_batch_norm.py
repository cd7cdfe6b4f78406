"""Puts a batch norm that a model writes out with functions back into the layer that owns it."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.guards import TrainingMode, write_in_training

_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TENSORS = ("running_mean", "running_var", "weight", "bias")
_SIGNATURE = inspect.signature(F.batch_norm)


@final
@dataclass(frozen=True)
class CloseBatchNorm(GraphPass):
    """Replace what a subclass of a batch norm does in its own words by a call of the batch norm.

    A layer that inherits from `nn.BatchNorm2d`, say, to add an activation, calls `F.batch_norm`
    with its own parameters and counts its batches itself. Where these calls are those of the
    inherited layer, the module at that path becomes a plain one, with the same parameters, buffers,
    settings and children, and one call of it takes their place; what the subclass does besides
    stays in the graph. So such a layer folds, and follows the mode, as any batch norm does.

    Numerics: exact.
    """

    name: ClassVar[str] = "close-batch-norm"

    def run(self, gm: fx.GraphModule) -> bool:
        """Close every batch norm that is written out; see `GraphPass.run`."""
        counts = _counting(gm.graph)
        changed = False
        for node in list(gm.graph.nodes):
            if node.target is F.batch_norm:
                changed |= _close(gm, node, counts)
        return changed


def _close(gm: fx.GraphModule, node: fx.Node, counts: Mapping[str, list[fx.Node]]) -> bool:
    given = _SIGNATURE.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    path = _owner(given.arguments["running_mean"])
    owner = None if path is None else gm.get_submodule(path)
    if path is None or not isinstance(owner, _LAYERS):
        return False
    counting = counts.get(f"{path}.num_batches_tracked", [])
    if not _is_the_same(gm, given.arguments, owner, path) or not counting:
        return False
    if type(owner) is not _plain(owner):
        if gm.graph.find_nodes(op="call_module", target=path):
            return False  # elsewhere it is called as it is
        gm.set_submodule(path, _plain_twin(owner))
    with gm.graph.inserting_before(node):
        closed = gm.graph.call_module(path, (given.arguments["input"],))
    closed.meta = dict(node.meta)
    node.replace_all_uses_with(closed)
    gm.graph.erase_node(node)
    _erase_with_sources(gm.graph, counting.pop(0))
    return True


def _counting(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Return the updates that add one to a buffer in training, by the buffer's name, in order."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=write_in_training):
        buffer, value = node.args[1], node.args[2]
        if node.users:
            continue
        is_count = isinstance(value, fx.Node) and value.target in ("add_", "add")
        if is_count and value.args[1:] == (1,) and not value.kwargs:
            found.setdefault(str(buffer.target), []).append(node)
    return found


def _is_the_same(
    gm: fx.GraphModule, given: Mapping[str, Any], owner: _BatchNorm, path: str
) -> bool:
    """Tell whether a call of `F.batch_norm` is the one that its owner would make."""
    for name in _TENSORS:
        own = f"{path}.{name}" if getattr(owner, name) is not None else None
        value = given[name]
        if (str(value.target) if isinstance(value, fx.Node) else value) != own:
            return False
    mode = given["training"]
    follows = isinstance(mode, fx.Node) and mode.op == "call_module"
    if not follows or not isinstance(gm.get_submodule(str(mode.target)), TrainingMode):
        return False
    settings = (given["momentum"], given["eps"]) == (owner.momentum, owner.eps)
    return settings and bool(owner.track_running_stats) and owner.running_mean is not None


def _owner(value: object) -> str | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    return str(value.target).rpartition(".")[0]


def _plain(owner: nn.Module) -> type[nn.Module]:
    return next(layer for layer in _LAYERS if isinstance(owner, layer))


def _plain_twin(owner: nn.Module) -> nn.Module:
    """Return the batch norm that `owner` is a subclass of, with everything that it holds."""
    twin = copy.copy(owner)
    for kind in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[kind] = dict(owner.__dict__[kind])
    twin.__class__ = _plain(owner)
    return twin


def _erase_with_sources(graph: fx.Graph, update: fx.Node) -> None:
    """Erase an update and the changed copy that it wrote."""
    changed: Any = update.args[2]
    graph.erase_node(update)
    while not changed.users and changed.op == "call_method":
        source = changed.args[0]
        graph.erase_node(changed)
        changed = source
