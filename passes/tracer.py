"""The tracer behind `cgmq_fx.passes.trace`: what becomes a node, and who answers its questions."""

import copy
import inspect
import traceback
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.fx.node import Argument
from torch.fx.proxy import TraceError
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.guards import check_same
from cgmq_fx.passes.meta import MODULE_PATH
from cgmq_fx.passes.proxies import TracedValue
from cgmq_fx.passes.values import UNKNOWN, ValueEvaluator

#: Name of the submodule that a graph asks for its mode.
TRAINING_MODE = "training_mode"

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
    """

    proxy_buffer_attributes = True

    def __init__(self, evaluator: ValueEvaluator | None = None, training: bool = False) -> None:
        super().__init__()
        self.evaluator = evaluator
        self.assumed_training = training
        self.branched_on_mode: list[str] = []
        self._attribute_names: dict[int, str] = {}
        self._attribute_proxies: dict[str, fx.Proxy] = {}
        self._mode: fx.Proxy | None = None
        self._closable_depth = 0
        self._opening: list[Any] = []

    # -- what becomes a node ---------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep layers of torch.nn closed, apart from composites and parametrized layers."""
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
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        closable = next(m.parameters(), None) is None and next(m.buffers(), None) is None
        marker, stack = self._last_node(), copy.copy(self.module_stack)
        self._closable_depth += closable
        try:
            with self._mode_of(m):
                return super().call_module(m, forward, args, kwargs)
        except _ModeBranchError:
            if not closable or self._closable_depth > 1:
                raise
            self._roll_back(marker, stack)
            return self.create_proxy("call_module", path, args, kwargs)
        finally:
            self._closable_depth -= closable

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
        if kind == "call_function" and self._can_open(target):
            marker, stack = self._last_node(), copy.copy(self.module_stack)
            self._opening.append(target)
            self._closable_depth += 1
            try:
                return self._as_proxy(target(*args, **kwargs))
            except Exception:  # any failure inside means: keep the call closed
                self._roll_back(marker, stack)
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
            return super().create_arg(a)
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

    def _mode_of(self, module: nn.Module) -> "_ModeAttribute":
        return _ModeAttribute(module, self._mode)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide a branch by the training mode or by shapes; refuse one that data decides."""
        if self._mode is not None and obj.node is self._mode.node:
            if self._closable_depth:
                raise _ModeBranchError
            self.branched_on_mode.append(self._where())
            return self.assumed_training
        return bool(self.python_value(obj, "a truth value"))

    def python_value(self, proxy: fx.Proxy, question: str) -> Any:
        """Return the Python value of `proxy` as shapes decide it, and guard it in the graph.

        Raises:
            TraceError: there are no example inputs, or the values of a tensor would decide.
        """
        where = self._where()
        if self.evaluator is None:
            raise TraceError(
                f"{where}: the model asks for {question} of a traced value; give prepare "
                f"example_inputs=(...), so that shapes can decide"
            )
        value = self.evaluator.value(proxy.node)
        if value is UNKNOWN or isinstance(value, torch.Tensor):
            raise TraceError(
                f"{where}: the model asks for {question} of a tensor's data, which is known only "
                f"when it runs; move the branch into a module or function of its own, or write it "
                f"with torch.where"
            )
        guard = (proxy, value, where)
        super().create_proxy("call_function", check_same, guard, {})
        return value

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over a traced value whose length shapes decide."""
        length = int(super().create_proxy("call_function", len, (obj,), {}))  # type: ignore[call-overload]
        return (obj[index] for index in range(length))  # type: ignore[index]

    def _where(self) -> str:
        for frame in reversed(traceback.extract_stack()):
            if not is_library(frame.filename):
                return f"{frame.filename}:{frame.lineno}"
        return "the model"

    def _proxy_placeholder(
        self, name: str, concrete_args: Any, sig: inspect.Signature, fn: Any
    ) -> Any:
        """Create a placeholder; an argument that is no tensor is taken as it is, and guarded."""
        if name.startswith("*"):
            return super()._proxy_placeholder(name, concrete_args, sig, fn)
        default = sig.parameters[name].default
        has_default = default is not inspect.Parameter.empty
        given = default if has_default else UNKNOWN
        if self.evaluator is not None:
            given = self.evaluator.inputs.get(name, given)
        proxy = super().create_proxy("placeholder", name, (default,) if has_default else (), {})
        if given is UNKNOWN or _holds_tensor(given):
            return proxy
        super().create_proxy("call_function", check_same, (proxy, given, f"input '{name}'"), {})
        return given

    # -- entry -----------------------------------------------------------------------------------

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace `root`, a module in which the name `TRAINING_MODE` is free."""
        named = [*root.named_parameters(), *root.named_buffers()]
        self._attribute_names = {id(tensor): name for name, tensor in reversed(named)}
        if self.evaluator is not None:
            self.evaluator.module = root
        graph = super().trace(root, concrete_args)
        if self._mode is not None and not self._mode.node.users:
            graph.erase_node(self._mode.node)
        for node in graph.nodes:
            # torch.fx marks the result of an opened function as a wrapped call, and would then
            # generate a `wrap` statement for it.
            node.meta.pop("is_wrapped", None)
        return graph

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Create the placeholders, then the node that reads the mode, then enter the root."""
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        self._mode = super().create_proxy("call_module", TRAINING_MODE, (), {})
        if self.evaluator is not None:
            self.evaluator.assume(self._mode.node, self.assumed_training)

        def with_mode(*inputs):  # type: ignore[no-untyped-def]  # noqa: ANN002, ANN202
            with self._mode_of(self.root):
                return fn(*inputs)

        return with_mode, args


class _ModeAttribute:
    """Makes ``module.training`` the mode's proxy for as long as the module's forward is traced."""

    def __init__(self, module: nn.Module, mode: fx.Proxy | None) -> None:
        self._module, self._mode = module, mode
        self._training = module.training

    def __enter__(self) -> None:
        if self._mode is not None:
            self._module.__dict__["training"] = self._mode

    def __exit__(self, *exc_info: object) -> None:
        self._module.__dict__["training"] = self._training


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def is_library(filename: str) -> bool:
    """Tell whether a frame is of torch or of this package, not of the user."""
    return filename.startswith(_LIBRARY_PATHS) or filename.startswith("<")


_LIBRARY_PATHS = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent),
    str(Path(inspect.getfile(UnsupportedModelError)).parent),
)
