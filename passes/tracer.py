"""The tracer behind `cgmq_fx.passes.trace`: what becomes a node, and who answers its questions."""

import copy
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.fx.node import Argument
from torch.fx.proxy import TraceError
from torch.nn.utils import parametrize

from cgmq_fx.passes.deployed import IN_PLACE, is_writing
from cgmq_fx.passes.einsum import spelled_out
from cgmq_fx.passes.guards import check_same, kind_of
from cgmq_fx.passes.meta import KEPT_CLOSED, MODULE_PATH
from cgmq_fx.passes.placeholders import take_input
from cgmq_fx.passes.proxies import TracedValue
from cgmq_fx.passes.random_ranges import decide_by_range
from cgmq_fx.passes.recording import ConstantWrittenError, recording
from cgmq_fx.passes.root_call import (
    call_with_hooks,
    check_no_backward_hooks,
    own_forward,
    positional_call,
)
from cgmq_fx.passes.state import assign_
from cgmq_fx.passes.trace_options import TraceOptions
from cgmq_fx.passes.training_mode import ModeAttribute, mode_target
from cgmq_fx.passes.user_code import user_place
from cgmq_fx.passes.value_evaluator import UNKNOWN, ValueEvaluator

# Composite layers of torch.nn whose work is in their children.
_OPENED = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)

# Packages whose functions are operations, not user code to open.
_CLOSED_PACKAGES = frozenset({"torch", "math", "operator", "_operator", "builtins", "cgmq_fx"})


class _ModeBranchError(Exception):
    """A branch on the training mode in a place that can stay closed."""


class ModelTracer(fx.Tracer):
    """Traces a module; see the module's docstring for what it adds to `torch.fx.Tracer`.

    Args:
        evaluator: answers what shapes decide; None when no example inputs are known.
        training: what a branch on the training mode is taken to be.
        options: what the user and earlier attempts ask for.

    Attributes:
        branched_on_mode: the modules that branch on their mode, and the place where each does.
        refused: questions that were not answered; a model may hide one by an except clause.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        evaluator: ValueEvaluator | None = None,
        training: bool = False,
        options: TraceOptions | None = None,
    ) -> None:
        super().__init__()
        self.evaluator = evaluator
        self.assumed_training = training
        self.options = options or TraceOptions()
        self.branched_on_mode: dict[str, str] = {}
        self.refused: list[str] = []
        self._attributes: dict[str, torch.Tensor] = {}
        self._attribute_names: dict[int, str] = {}
        self._submodules: set[nn.Module] = set()
        self._attribute_proxies: dict[str, fx.Proxy] = {}
        self._assigned: dict[str, fx.Proxy] = {}
        self._modes: dict[str, fx.Proxy] = {}
        self._closable_depth = 0
        self._opening: list[Any] = []

    # -- what becomes a node ---------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep layers of torch.nn closed, apart from composites and parametrized layers."""
        if module_qualified_name in self.options.leaves:
            return True
        if isinstance(m, _OPENED) or parametrize.is_parametrized(m):
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap `node` in a proxy that keeps in-place semantics."""
        return TracedValue(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Turn a parameter or buffer into one `get_attr` node, and leave other attributes alone."""
        if self.evaluator is not None and self.evaluator.running:
            return attr_val
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self._attribute_names.get(id(attr_val))
        if name is None:
            return attr_val
        known = self._attribute_proxies.get(name)
        if known is None or known.node._erased:
            known = self.create_proxy("get_attr", name, (), {})
            self._attribute_proxies[name] = known
        return known

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace into `m` or record a call; a closable module that asks for the mode is recorded."""
        if self.evaluator is not None and self.evaluator.running:
            return forward(*args, **kwargs)
        if self._is_function(m):
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            result = super().call_module(m, forward, args, kwargs)
            if path in self.options.leaves:
                KEPT_CLOSED.set(result.node, True)
                return self._result_of_closed(result)
            return result
        check_no_backward_hooks(m, path)
        closable = next(m.parameters(), None) is None and next(m.buffers(), None) is None
        marker, stack = self._last_node(), copy.copy(self.module_stack)
        self._closable_depth += closable
        try:
            with self._mode_of(m, path):
                return super().call_module(m, forward, args, kwargs)
        except _ModeBranchError:
            if not closable or self._closable_depth > 1:
                raise
            self._roll_back(marker, stack)
            return self._result_of_closed(self.create_proxy("call_module", path, args, kwargs))
        finally:
            self._closable_depth -= closable

    def _result_of_closed(self, proxy: fx.Proxy) -> fx.Proxy | None:
        """Return what a closed module returns: None where it does, which the caller may ask."""
        is_none = self.evaluator is not None and self.evaluator.value(proxy.node) is None
        return None if is_none else proxy

    def _is_function(self, m: nn.Module) -> bool:
        """Tell whether `m`, such as an activation in a table, holds nothing and is of no model."""
        if m in self._submodules:
            return False
        return next(m.parameters(), None) is None and next(m.buffers(), None) is None

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *rest: Any,
        **more: Any,
    ) -> fx.Proxy:
        """Record a node, or open the Python function that it would call."""
        if target is torch.einsum:
            args = spelled_out(args)
        if args and isinstance(args[0], torch.Tensor) and is_writing(kind, target):
            self._check_writable(args[0])
        if kind == "call_function" and self._can_open(target):
            marker, stack = self._last_node(), copy.copy(self.module_stack)
            refused = len(self.refused)
            self._opening.append(target)
            self._closable_depth += 1
            try:
                return self._as_proxy(target(*args, **kwargs))
            except Exception:  # any failure inside means: keep the call closed
                self._roll_back(marker, stack)
                del self.refused[refused:]
            finally:
                self._closable_depth -= 1
                self._opening.pop()
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if self.module_stack:
            MODULE_PATH.set(proxy.node, next(reversed(self.module_stack.values()))[0])
        return proxy

    def _can_open(self, target: Any) -> bool:
        return (
            isinstance(target, types.FunctionType)
            and target.__module__ is not None
            and target.__module__.partition(".")[0] not in _CLOSED_PACKAGES
            and target not in self._opening
        )

    def _as_proxy(self, result: Any) -> fx.Proxy:
        """Return what an opened function returned as one proxy, as torch.fx expects of a call."""
        if isinstance(result, fx.Proxy):
            return result
        if not isinstance(result, tuple | list) or hasattr(result, "_fields"):
            raise TraceError(f"a function that returns {type(result).__name__} stays closed")
        return super().create_proxy("call_function", type(result), (result,), {})

    def create_arg(self, a: Any) -> Argument:
        """Return `a` as an argument of a node; a subclass of dict keeps its type."""
        if not isinstance(a, dict) or type(a) in (dict, immutable_dict):
            try:
                return super().create_arg(a)
            except NotImplementedError as error:
                raise TraceError(
                    f"the model returns or hands over {type(a).__qualname__}, which a graph cannot "
                    f"hold; use tensors, numbers, strings, tuples, lists, dicts or dataclasses, or "
                    f"switch that output off"
                ) from error
        if is_dataclass(a):
            given = {key: self.create_arg(value) for key, value in a.items()}
            return self.create_node("call_function", type(a), (), given)
        if type(a) is not OrderedDict:
            raise TraceError(f"the model makes a {type(a).__qualname__}; make a dict instead")
        return self.create_node("call_function", OrderedDict, (self.create_arg([*a.items()]),), {})

    def _last_node(self) -> fx.Node:
        return self.graph._root.prev

    def _roll_back(self, marker: fx.Node, stack: Any) -> None:
        while self.graph._root.prev is not marker:
            self.graph.erase_node(self.graph._root.prev)
        self.module_stack = stack

    # -- the training mode -----------------------------------------------------------------------

    def _mode_of(self, module: nn.Module, path: str) -> ModeAttribute:
        mode = self._modes.get(path)
        if mode is None or mode.node._erased:
            mode = super().create_proxy("call_module", mode_target(path), (), {})
            self._modes[path] = mode
            if self.evaluator is not None:
                self.evaluator.assume(mode.node, self.assumed_training)
        return ModeAttribute(module, mode)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide a branch by the training mode or by shapes; refuse one that data decides."""
        for path, mode in self._modes.items():
            if obj.node is not mode.node:
                continue
            if self._closable_depth:
                raise _ModeBranchError
            self.branched_on_mode.setdefault(path, self.place())
            return self.assumed_training
        decided = decide_by_range(obj.node)
        if decided is not None:
            return decided
        return bool(self.python_value(obj, "a truth value"))

    def python_value(self, proxy: fx.Proxy, question: str) -> Any:
        """Return the Python value of `proxy` as shapes decide it, and guard it in the graph.

        Raises:
            TraceError: there are no example inputs, or the values of a tensor would decide.
        """
        where = self.place()
        if self.evaluator is None:
            raise self._refusal(
                f"{where}: the model asks for {question} of a traced value; give prepare "
                f"example_inputs=(...), so that shapes can decide",
                question,
            )
        value = self.evaluator.value(proxy.node)
        if value is UNKNOWN or isinstance(value, torch.Tensor):
            raise self._refusal(
                f"{where}: the model asks for {question} of a tensor's data, which is known only "
                f"when it runs; write it with torch.where, or move it into a module or function of "
                f"its own",
                question,
            )
        guard = (proxy, value, where)
        super().create_proxy("call_function", check_same, guard, {})
        return value

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over a traced value whose length shapes decide."""
        length = int(super().create_proxy("call_function", len, (obj,), {}))  # type: ignore[call-overload]
        return (obj[index] for index in range(length))  # type: ignore[index]

    def _refusal(self, message: str, question: str = "") -> TraceError:
        if question != "an index":  # torch asks for one to see whether a proxy can be an argument
            self.refused.append(message)
        return TraceError(message)

    @property
    def is_evaluating(self) -> bool:
        """Tell whether calls run for their value, not for the graph."""
        return self.evaluator is not None and self.evaluator.running

    @property
    def creations(self) -> bool:
        """Tell whether tensors that the forward makes from numbers are made by the graph."""
        return self.options.creations

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any = None) -> fx.Proxy:
        """Record a call of `function`, which reads no proxy or is not to be opened."""
        proxy = super().create_proxy("call_function", function, tuple(args), kwargs or {})
        if self.module_stack:
            MODULE_PATH.set(proxy.node, next(reversed(self.module_stack.values()))[0])
        return proxy

    def _check_writable(self, tensor: torch.Tensor) -> None:
        if id(tensor) in self._attribute_names:
            return
        if not self.options.creations:
            raise ConstantWrittenError
        raise self._refusal(
            f"{self.place()}: the model writes into a tensor that it made from numbers, which "
            f"would be one tensor for all calls of a graph; make it with torch.zeros, torch.full "
            f"or torch.empty, or from an input, as with x.new_zeros(...)"
        )

    def assign(self, module: nn.Module, name: str, value: fx.Proxy) -> bool:
        """Take `value` for the buffer `name` of `module` from now on; False if it is none."""
        buffer = module._buffers.get(name)
        path = None if buffer is None else self._attribute_names.get(id(buffer))
        if path is None:
            return False
        self._assigned.setdefault(path, self.getattr(name, buffer, {}))
        self._attribute_proxies[path] = value
        return True

    def _store_buffers(self) -> None:
        """Write what was assigned to buffers at the end, when no one reads the old values."""
        output = next(iter(self.graph.find_nodes(op="output")), None)
        for path, buffer in self._assigned.items():
            value = self._attribute_proxies[path]
            if value.node.target in IN_PLACE and value.node.args[0] is buffer.node:
                continue
            assert output is not None
            with self.graph.inserting_before(output):
                self.graph.call_function(assign_, (buffer.node, value.node))

    def is_of(self, proxy: fx.Proxy, kinds: Any) -> bool:
        """Answer an `isinstance` check: what shapes do not decide is a tensor, and guarded."""
        if proxy.node.op == "get_attr":
            return isinstance(self._attributes[str(proxy.node.target)], kinds)
        value = UNKNOWN if self.evaluator is None else self.evaluator.value(proxy.node)
        if value is UNKNOWN or isinstance(value, torch.Tensor):
            value = torch.empty(0)
        kind = super().create_proxy("call_function", kind_of, (proxy,), {})
        super().create_proxy("call_function", check_same, (kind, kind_of(value), self.place()), {})
        return isinstance(value, kinds)

    def place(self) -> str:
        """Return the user's file and line that is being traced."""
        return user_place()

    # -- entry -----------------------------------------------------------------------------------

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace `root`, a module in which the name `TRAINING_MODE` is free."""
        named = [*root.named_parameters(), *root.named_buffers()]
        self._attributes = dict(named)
        self._attribute_names = {id(tensor): name for name, tensor in reversed(named)}
        self._submodules = {*root.modules()}
        if self.evaluator is not None:
            self.evaluator.module = root
        with recording(self, root):
            graph = super().trace(root, concrete_args)
        self._store_buffers()
        if self.refused:
            raise TraceError(f"{self.refused[0]} (the model caught this error, and went on)")
        for mode in self._modes.values():
            if not mode.node._erased and not mode.node.users:
                graph.erase_node(mode.node)
        for node in graph.nodes:
            # torch.fx marks the result of an opened function as a wrapped call, and would then
            # generate a `wrap` statement for it.
            node.meta.pop("is_wrapped", None)
        return graph

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Create the placeholders, then the node that reads the mode, then enter the root."""
        root_fn = own_forward(self.root, root_fn)
        check_no_backward_hooks(self.root, "")
        parameters = [*inspect.signature(root_fn).parameters.values()][1:]
        fn = positional_call(root_fn, parameters)
        known = {} if self.evaluator is None else self.evaluator.inputs
        args = [self.root, *(take_input(self, item, known) for item in parameters)]

        def with_mode(*inputs):  # type: ignore[no-untyped-def]  # noqa: ANN002, ANN202
            with self._mode_of(self.root, ""):
                return call_with_hooks(self.root, fn, inputs[1:])

        return with_mode, args
