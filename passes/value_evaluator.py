"""What the values of a graph under construction look like, by running it on fake tensors."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from torch import fx, nn
from torch.utils import _pytree as pytree

from cgmq_fx.passes.random_data import may_read_data, run_on_random_data
from cgmq_fx.passes.values import execute, fake_mode, to_fake, without_data

UNKNOWN: Final = object()


class ValueEvaluator:
    """Computes, on demand and once, the value of each node of a graph that is being traced.

    A value is a fake tensor, or whatever Python value the node produces; `UNKNOWN` where that
    depends on the data in a tensor. `running` is true while a value is computed, when calls must
    not be traced.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = inputs
        self.module: nn.Module | None = None
        self.running = False
        self._mode = fake_mode()
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """Return the value of `node`."""
        wanted = [node]
        while wanted:
            last = wanted[-1]
            missing = [arg for arg in last.all_input_nodes if arg not in self._values]
            if missing and last not in self._values:
                wanted.extend(missing)
                continue
            wanted.pop()
            if last not in self._values:
                self._values[last] = self._compute(last)
        return self._values[node]

    def assume(self, node: fx.Node, value: Any) -> None:
        """Take `value` for what `node` produces."""
        self._values[node] = value

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        args = fx.node.map_arg(node.args, self._values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self._values.__getitem__)
        if any(value is UNKNOWN for value in pytree.tree_leaves((args, kwargs))):
            return UNKNOWN
        assert self.module is not None
        self.running = True
        try:
            with without_data(self._mode):
                return execute(self.module, node, args, kwargs, self._mode)
        except Exception:  # what cannot run without data is unknown, and refused when asked for
            if may_read_data(node) and node.op != "call_method":
                with suppress(Exception):
                    return run_on_random_data(self.module, node, args, kwargs, self._mode)
            return UNKNOWN
        finally:
            self.running = False

    def _placeholder(self, node: fx.Node) -> Any:
        given = self.inputs.get(str(node.target).lstrip("*"), UNKNOWN)
        self.running = True
        try:
            return to_fake(self._mode, given)
        finally:
            self.running = False
