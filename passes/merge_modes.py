"""One graph for a model that branches on its training mode.

The model is traced twice, once for each branch, and the traces are laid side by side. A call that
both make is one node, which picks by the mode what the traces give it differently: a dropout
probability, a flag, another tensor. A call that only one makes runs in both modes and is read in
its own. So it must not change anything: a guard of one mode passes in the other, an update of a
buffer in training happens in training alone, and the rest is refused. What evaluation alone
computes must not draw random numbers either; what training alone draws is drawn in both.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.align import align, structure
from cgmq_fx.passes.deployed import ALLOCATING, is_write
from cgmq_fx.passes.guards import (
    check_same,
    select_mode,
    write_in_training,
)
from cgmq_fx.passes.op_classes import class_of_function, class_of_method, class_of_module

# Layers of torch.nn that draw random numbers, or change state.
_CHANGING = (_BatchNorm, _InstanceNorm, _DropoutNd, nn.RReLU, nn.RNNBase)
_RANDOM = frozenset(
    {
        "alpha_dropout", "bernoulli", "dropout", "dropout1d", "dropout2d", "dropout3d",
        "feature_alpha_dropout", "multinomial", "normal", "poisson", "rand", "rand_like", "randint",
        "randint_like", "randn", "randn_like", "randperm", "rrelu",
    }
)  # fmt: skip
_GUARDS = frozenset({check_same, torch._assert})


def merge_modes(
    evaluation: fx.Graph,
    training: fx.Graph,
    mode_target: str,
    places: Sequence[str],
    root: nn.Module,
) -> fx.Graph:
    """Return `training`, extended in place to compute what `evaluation` does in that mode.

    Args:
        evaluation: the graph of the evaluation mode.
        training: the graph of the training mode.
        mode_target: the module that returns the mode.
        places: where the model branches, for the error.
        root: the model that both graphs call.

    Raises:
        UnsupportedModelError: one branch alone changes state or draws random numbers.
    """
    return _Merger(evaluation, training, mode_target, places, root).run()


class _Merger:
    def __init__(
        self,
        evaluation: fx.Graph,
        training: fx.Graph,
        mode_target: str,
        places: Sequence[str],
        root: nn.Module,
    ) -> None:
        self.evaluation, self.training = evaluation, training
        self.places, self.root = places, root
        self.merged: dict[fx.Node, fx.Node] = {}
        self.picks: dict[tuple[object, ...], fx.Node] = {}
        self.alone: set[fx.Node] = set()
        self.mode = self._mode_node(mode_target)
        self.modes = [self.mode]

    def _mode_node(self, target: str) -> fx.Node:
        """Return the one node of `training`, at its start, that reads a mode for both graphs."""
        first = next(node for node in self.training.nodes if node.op != "placeholder")
        with self.training.inserting_before(first):
            mode = self.training.call_module(target)
        for graph in (self.training, self.evaluation):
            for node in graph.find_nodes(op="call_module", target=target):
                self.merged[node] = mode
        for node in self.training.find_nodes(op="call_module", target=target):
            if node is not mode:
                node.replace_all_uses_with(mode)
                self.training.erase_node(node)
        return mode

    def run(self) -> fx.Graph:
        for graph in (self.training, self.evaluation):
            for node in list(graph.find_nodes(op="call_module")):
                if node not in self.merged and _reads_a_mode(node, str(self.mode.target)):
                    self.modes.append(self._mode_node(str(node.target)))
        own, other = (
            [node for node in graph.nodes if node.op != "output" and node not in self.merged]
            for graph in (self.training, self.evaluation)
        )
        output = next(node for node in self.training.nodes if node.op == "output")
        aligned = align(own, other)
        following = output
        places: list[fx.Node] = []
        for node, _ in reversed(aligned):
            following = node or following
            places.append(following)
        for (node, twin), place in zip(aligned, reversed(places), strict=True):
            with self.training.inserting_before(place):
                self._merge(node, twin)
        self._merge_outputs(output)
        for mode in self.modes:
            if not mode.users:
                self.training.erase_node(mode)
        return self.training

    def _merge(self, node: fx.Node | None, twin: fx.Node | None) -> None:
        if node is not None and twin is not None:
            self.merged[twin] = node
            node.args = self._picked(node.args, self._mapped(twin.args))
            node.kwargs = self._picked(node.kwargs, self._mapped(twin.kwargs))
        elif node is not None:
            self._keep_to_training(node)
        elif twin is not None:
            self._add(twin)

    def _mapped(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, self.merged.__getitem__)

    # -- what both modes call --------------------------------------------------------------------

    def _picked(self, own: Any, other: Any) -> Any:
        """Return `own` where the modes agree, and a choice where they do not."""
        if isinstance(own, tuple | list):
            return type(own)(map(self._picked, own, other))
        if isinstance(own, dict):
            return {key: self._picked(value, other[key]) for key, value in own.items()}
        if isinstance(own, slice):
            parts = ("start", "stop", "step")
            return slice(*(self._picked(getattr(own, p), getattr(other, p)) for p in parts))
        if own is other or (type(own) is type(other) and repr(own) == repr(other)):
            return own
        if own is True and other is False:
            return self.mode
        key = tuple(v if isinstance(v, fx.Node) else (type(v), repr(v)) for v in (own, other))
        if key not in self.picks:
            self.picks[key] = self._choice(own, other)
        return self.picks[key]

    def _choice(self, in_training: Any, in_evaluation: Any) -> fx.Node:
        return self.training.call_function(select_mode, (self.mode, in_training, in_evaluation))

    def _merge_outputs(self, output: fx.Node) -> None:
        own = output.args[0]
        other = self._mapped(_output(self.evaluation).args[0])
        if repr(own) == repr(other):
            return
        with self.training.inserting_before(output):
            alike = isinstance(own, tuple) and structure(own) == structure(other)
            picked = self._picked(own, other) if alike else self._choice(own, other)
        output.args = (picked,)

    # -- what one mode calls ---------------------------------------------------------------------

    def _keep_to_training(self, node: fx.Node) -> None:
        self.alone.add(node)
        if node.target in _GUARDS:
            self._relax(node, training=True)
        elif self._shows(node):
            self._update_in_training(node)

    def _update_in_training(self, node: fx.Node) -> None:
        """Change a copy of a buffer, and write that into the buffer in training alone."""
        buffer = node.args[0] if node.args else None
        while isinstance(buffer, fx.Node) and buffer.target is write_in_training:
            buffer = buffer.args[1]
        is_buffer = isinstance(buffer, fx.Node) and buffer.op == "get_attr"
        if not is_buffer or node.op == "call_module":
            self._refuse(node, "training")
        with self.training.inserting_before(node):
            copy = self.training.call_method("clone", (buffer,))
        node.args = (copy, *node.args[1:])
        with self.training.inserting_after(node):
            written = self.training.call_function(write_in_training, (self.mode, buffer, node))
        node.replace_all_uses_with(written, delete_user_cb=lambda user: user is not written)

    def _add(self, twin: fx.Node) -> None:
        """Add what evaluation alone computes."""
        if not self._is_pure(twin):
            self._refuse(twin, "evaluation")
        node = self.training.node_copy(twin, self.merged.__getitem__)
        self.merged[twin] = node
        self.alone |= {node, twin}
        if node.target in _GUARDS:
            self._relax(node, training=False)

    def _is_pure(self, node: fx.Node) -> bool:
        if node.target in _GUARDS:
            return True
        if node.op == "call_module":
            module = self._module(node)
            is_own = type(module).__module__.startswith("torch.nn.")
            return is_own and not isinstance(module, _CHANGING) and not self._shows(node)
        name = getattr(node.target, "__name__", node.target)
        return not node.is_impure() and name not in _RANDOM and not self._shows(node)

    def _shows(self, node: fx.Node) -> bool:
        """Tell whether `node` writes to memory that more than its own mode may read."""
        if node.op == "call_module":
            writes = bool(getattr(self._module(node), "inplace", False))
        else:
            writes = is_write(node)
        if not writes:
            return False
        written = node.all_input_nodes[0]
        return written not in self.alone or not self._allocates(written)

    def _allocates(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._module(node)
            if type(module).__module__.startswith("torch.nn.") and module._parameters:
                return True
        return self._op_class(node) in ALLOCATING

    def _module(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def _op_class(self, node: fx.Node) -> str:
        match node.op:
            case "call_function":
                assert callable(node.target)
                return class_of_function(node.target)
            case "call_method":
                return class_of_method(str(node.target))
            case "call_module":
                return class_of_module(self._module(node))
            case _:
                return "other"

    def _relax(self, guard: fx.Node, *, training: bool) -> None:
        """Let a guard of one mode pass in the other."""
        value, passing = guard.args[0], guard.args[1] if guard.target is check_same else True
        with self.training.inserting_before(guard):
            kept = self._choice(*((value, passing) if training else (passing, value)))
        guard.update_arg(0, kept)

    def _refuse(self, node: fx.Node, mode: str) -> None:
        raise UnsupportedModelError(
            f"the model computes '{node.format_node()}' only in {mode} mode (it branches on "
            f"self.training at {', '.join(dict.fromkeys(self.places))}), and that changes state or "
            f"draws random numbers; move the branch into a parameterless module, or prepare the "
            f"model without it"
        )


def _reads_a_mode(node: fx.Node, name: str) -> bool:
    return str(node.target).rpartition(".")[2] == name


def _output(graph: fx.Graph) -> fx.Node:
    found: fx.Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return found
