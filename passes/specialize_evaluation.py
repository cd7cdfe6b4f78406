"""Leaves in a graph what evaluation computes, and nothing else."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.deployed import deployed_nodes, is_write
from cgmq_fx.passes.guards import TrainingMode, change_in_mode_, select_mode
from cgmq_fx.passes.meta import KEPT_CLOSED
from cgmq_fx.passes.record import Recorder, erase_between
from cgmq_fx.passes.unused import delete_unread

_DROPOUTS = frozenset(
    {
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
        torch.feature_dropout,
    }
)  # fmt: skip
_UNDECIDED: Final = object()


@final
@dataclass(frozen=True)
class SpecializeEvaluation(GraphPass):
    """Take the training mode to be False, and delete what that makes unneeded.

    Dropout vanishes, a branch on the mode takes its evaluation side, and a layer without parameters
    that was kept closed because it branches (a drop-path) is opened. What the outputs do not need
    goes, apart from writes into tensors that they do need, and guards on them.

    Numerics: exact in evaluation mode.
    """

    name: ClassVar[str] = "specialize-evaluation"

    def run(self, gm: fx.GraphModule) -> bool:
        """Specialize `gm`; see `GraphPass.run`."""
        targets = [str(node.target) for node in gm.graph.nodes if node.op in _READING]
        changed = False
        for node in list(gm.graph.nodes):
            changed |= _open(gm, node)
        for node in list(gm.graph.nodes):
            value = _value_in_evaluation(gm, node)
            if value is not _UNDECIDED:
                _substitute(node, value)
                gm.graph.erase_node(node)
                changed = True
        needed = deployed_nodes(gm.graph)
        for node in reversed(list(gm.graph.nodes)):
            if node not in needed and node.op != "placeholder":
                gm.graph.erase_node(node)
                changed = True
        if changed:
            delete_unread(gm, targets)
        return changed


_READING = ("get_attr", "call_module")


def _open(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Put in place of a closed layer of the user what it does in evaluation mode."""
    if node.op != "call_module" or KEPT_CLOSED.has(node):
        return False
    module = gm.get_submodule(str(node.target))
    if not _can_open(module):
        return False
    before = node.prev
    try:
        with gm.graph.inserting_before(node):
            proxy: Callable[[fx.Node], Any] = Recorder(gm.graph).proxy
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), proxy)
            result = copy.deepcopy(module).eval().forward(*args, **kwargs).node
    except Exception:  # it cannot be recorded: it stays a module, which runs in evaluation mode
        erase_between(before, node)
        return False
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
    return True


def _can_open(module: nn.Module) -> bool:
    owner = type(module).__module__.partition(".")[0]
    state = (*module.parameters(), *module.buffers())
    hooked = module._forward_hooks or module._forward_pre_hooks
    return owner not in ("torch", "cgmq_fx") and not state and not hooked


def _value_in_evaluation(gm: fx.GraphModule, node: fx.Node) -> Any:
    """Return the node or value that stands for `node`, or `_UNDECIDED`."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, TrainingMode):
            return False
        return _operand(node) if isinstance(module, _DropoutNd) else _UNDECIDED
    if node.op != "call_function":
        return _UNDECIDED
    if node.target is select_mode:
        return node.args[2]
    if node.target is change_in_mode_:
        wanted = node.args[2]
        return node.args[0] if wanted else _UNDECIDED
    if node.target in _DROPOUTS:
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return _operand(node) if training is False else _UNDECIDED
    if getattr(node.target, "__module__", "") == "_operator" and not is_write(node):
        return _computed(node)
    return _UNDECIDED


def _operand(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs["input"]


def _computed(node: fx.Node) -> Any:
    """Return what an operator makes of Python values, such as the mode times a probability."""
    if node.all_input_nodes or node.kwargs:
        return _UNDECIDED
    assert callable(node.target)
    return node.target(*node.args)


def _substitute(node: fx.Node, value: Any) -> None:
    def replaced(arg: fx.Node) -> Any:
        return value if arg is node else arg

    for user in list(node.users):
        args, kwargs = fx.node.map_arg((user.args, user.kwargs), replaced)
        user.args, user.kwargs = args, kwargs
