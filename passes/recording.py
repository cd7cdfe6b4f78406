"""What is recorded, not done, while a model is traced: gradient modes, random numbers, type checks.

`torch.fx` sees calls that read a proxy. What a forward does besides, such as entering
``torch.no_grad()`` or drawing ``torch.rand(4)``, happens once while tracing, and the graph would
silently lack it. Here it becomes a node, or a refusal that says where it stands.
"""

import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cgmq_fx.passes.guards import set_autocast, set_gradients
from cgmq_fx.passes.proxies import TracedValue
from cgmq_fx.passes.restored import attributes_restored

_RANDOM = frozenset(
    {
        torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli,
        torch.multinomial, torch.poisson, torch.rand_like, torch.randn_like, torch.randint_like,
    }
)  # fmt: skip
_RANDOM_WRITES = frozenset(
    {
        Tensor.uniform_, Tensor.normal_, Tensor.bernoulli_, Tensor.random_, Tensor.exponential_,
        Tensor.geometric_, Tensor.log_normal_, Tensor.cauchy_,
    }
)  # fmt: skip
# Attributes that torch.fx gives a root, for constants of the graph.
_MADE_BY_TRACING = ("_tensor_constant", "_tree_spec_constant", "_torchbind_obj", "_opaque_obj")
_CREATING = frozenset({torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.arange})


class ConstantWrittenError(Exception):
    """Traced data is written into a tensor that the forward made from numbers."""


class Recording(Protocol):
    """What recording asks of its tracer."""

    @property
    def creations(self) -> bool:
        """Tell whether tensors that the forward makes from numbers are made by the graph."""

    @property
    def is_evaluating(self) -> bool:
        """Tell whether calls run for their value, not for the graph."""

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any = ...) -> fx.Proxy:
        """Record a call of `function`."""

    def is_of(self, proxy: fx.Proxy, kinds: Any) -> bool:
        """Answer an `isinstance` check."""

    def assign(self, module: nn.Module, name: str, value: fx.Proxy) -> bool:
        """Record what is assigned to a buffer; False if it is none."""

    def place(self) -> str:
        """Return the user's file and line."""

    def python_value(self, proxy: fx.Proxy, question: str) -> Any:
        """Return the Python value of `proxy`, recording a guard on it."""


@contextmanager
def recording(tracer: Recording, root: nn.Module) -> Iterator[None]:
    """Record, while the context lasts, what a forward does that reads no proxy.

    Raises:
        TraceError: the forward enters a mode that is not left, or draws random numbers that are not
            torch's.
    """
    modes: list[fx.Proxy] = []
    before = _random_state()
    with ExitStack() as stack:
        # No later call of the graph assigns what the forward does.
        stack.enter_context(attributes_restored(root, _is_made_by_tracing))
        for owner, name, replacement in _replacements(tracer, root, modes):
            stack.enter_context(_patched(owner, name, replacement))
        stack.enter_context(_Factories(tracer))
        yield
    if modes:
        raise TraceError(
            f"the forward of {type(root).__name__} switches gradients and not back; write "
            f"'with torch.set_grad_enabled(...):'"
        )
    if _random_state() != before:
        raise TraceError(
            f"the forward of {type(root).__name__} draws random numbers outside of torch, which "
            f"would be the same at every call of a graph; draw them with torch.rand"
        )


class _Factories(TorchFunctionMode):
    """Records random tensors and, where they are written to, other tensors made from numbers."""

    def __init__(self, tracer: Recording) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.tracer.is_evaluating:
            return func(*args, **kwargs)
        if _has_proxy(args, kwargs):
            return func(*args, **kwargs)
        if func in _RANDOM or (self.tracer.creations and func in _CREATING):
            return self.tracer.record(func, args, kwargs)
        if func in _RANDOM_WRITES:
            raise ConstantWrittenError
        return func(*args, **kwargs)


def _has_proxy(*values: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(values))


def _sized(tracer: Recording, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which makes a tensor, for sizes that may be proxies."""

    def make(*args: Any, **kwargs: Any) -> Any:
        # Torch would ask a proxy for an integer, and the batch size would be that of the example.
        if _has_proxy(args, kwargs) and not tracer.is_evaluating:
            return tracer.record(function, args, kwargs)
        return function(*args, **kwargs)

    return make


def _replacements(
    tracer: Recording, root: nn.Module, modes: list[fx.Proxy]
) -> Iterator[tuple[Any, str, Any]]:
    """Yield what to put in which place: owner, name and value."""
    for owner, name, replacement in (*_gradient_modes(tracer, modes), *_autocast(tracer, modes)):
        yield owner, name, _while_tracing(tracer, vars(owner)[name], replacement)

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if _has_proxy(args, kwargs) and not tracer.is_evaluating:
            return tracer.record(_applied(cls), args, kwargs)
        return original_apply(cls, *args, **kwargs)

    original_apply = vars(torch.autograd.Function)["apply"].__func__
    yield torch.autograd.Function, "apply", classmethod(apply)

    def is_instance(value: Any, kinds: Any) -> bool:
        if isinstance(value, TracedValue) and not isinstance(value, kinds):
            return tracer.is_of(value, kinds)
        return isinstance(value, kinds)

    makers: Any = _RANDOM | _CREATING | {torch.tensor, torch.as_tensor}
    for function in makers:
        yield torch, function.__name__, _sized(tracer, function)
    yield nn.Module, "__setattr__", _recorded_assignment(tracer)
    yield torch, "is_tensor", lambda value: is_instance(value, Tensor)
    for name in ("finfo", "iinfo"):
        yield torch, name, _of_a_known_dtype(tracer, vars(torch)[name])
    for names in _user_namespaces(root):
        if "isinstance" not in names:
            yield names, "isinstance", is_instance


def _while_tracing(
    tracer: Recording, original: Callable[..., Any], replacement: Callable[..., Any]
) -> Callable[..., Any]:
    """Return `replacement`, which leaves what runs for its value to `original`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return (original if tracer.is_evaluating else replacement)(*args, **kwargs)

    return call


def _recorded_assignment(tracer: Recording) -> Callable[..., None]:
    original = nn.Module.__setattr__

    def assign(module: nn.Module, name: str, value: Any) -> None:
        is_traced = isinstance(value, fx.Proxy) and not tracer.is_evaluating
        if not is_traced or not tracer.assign(module, name, value):
            original(module, name, value)

    return assign


def _of_a_known_dtype(tracer: Recording, limits: Callable[..., Any]) -> Callable[..., Any]:
    """Return `torch.finfo` or `torch.iinfo` for a traced value's dtype, which is then guarded."""

    def limits_of(*dtypes: Any) -> Any:
        known = [
            tracer.python_value(dtype, "the dtype") if isinstance(dtype, fx.Proxy) else dtype
            for dtype in dtypes
        ]
        return limits(*known)

    return limits_of


def _gradient_modes(
    tracer: Recording, modes: list[fx.Proxy]
) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    def switch(enabled: Any) -> None:
        modes.append(tracer.record(set_gradients, (enabled,)))

    def restore(*_: object) -> None:
        tracer.record(set_gradients, (modes.pop(),))

    def refuse(_: object) -> None:
        raise TraceError(
            f"{tracer.place()}: the model enters torch.inference_mode(), whose tensors no "
            f"training may read; use torch.no_grad()"
        )

    def initialise(context: Any, mode: Any) -> None:
        context.mode = mode
        switch(mode)

    for cls, enabled in ((torch.no_grad, False), (torch.enable_grad, True)):
        yield cls, "__enter__", lambda _, enabled=enabled: switch(enabled)
        yield cls, "__exit__", restore
    yield torch.set_grad_enabled, "__init__", initialise
    yield torch.set_grad_enabled, "__enter__", lambda _: None
    yield torch.set_grad_enabled, "__exit__", restore
    yield torch.inference_mode, "__enter__", refuse


def _autocast(
    tracer: Recording, modes: list[fx.Proxy]
) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    create = torch.autocast.__init__

    def initialise(context: Any, device_type: Any, *args: Any, **kwargs: Any) -> None:
        is_traced = isinstance(device_type, fx.Proxy)
        create(context, "cpu" if is_traced else device_type, *args, **kwargs)
        if is_traced:  # it is asked of a tensor when the graph runs
            context.device = device_type

    def enter(context: Any) -> Any:
        if context._enabled:
            raise TraceError(
                f"{tracer.place()}: the model turns on autocast, under which the graph would have "
                f"other numbers; put 'with torch.autocast(...):' around the call of the model"
            )
        modes.append(tracer.record(set_autocast, (context.device, False)))
        return context

    def leave(context: Any, *_: object) -> None:
        tracer.record(set_autocast, (context.device, modes.pop()))

    yield torch.autocast, "__init__", initialise
    yield torch.autocast, "__enter__", enter
    yield torch.autocast, "__exit__", leave


def _applied(cls: Any) -> Callable[..., Any]:
    """Return ``cls.apply`` as a function that the code of a graph can name."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        return cls.apply(*args, **kwargs)

    apply.__name__ = apply.__qualname__ = cls.__name__
    apply.__module__ = "cgmq_fx.passes.recording"
    return apply


def _user_namespaces(root: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the globals of the packages in which the classes and functions of `root` stand."""
    classes = {cls for module in root.modules() for cls in type(module).__mro__}
    held = [value for module in root.modules() for value in vars(module).values()]
    functions = [value for value in held if isinstance(value, types.FunctionType)]
    packages = {item.__module__.partition(".")[0] for item in (*classes, *functions)}
    packages -= {"torch", "builtins", "cgmq_fx", "typing", "abc"}
    # The only namespaces of torch in which opened layers check types.
    yield vars(torch.nn.functional)
    yield vars(torch.nn.modules.transformer)
    for name, found in list(sys.modules.items()):
        if name.partition(".")[0] in packages and isinstance(found, types.ModuleType):
            yield vars(found)


def _is_made_by_tracing(name: str, value: Any) -> bool:
    return name.startswith(_MADE_BY_TRACING)


@contextmanager
def _patched(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    names: Mapping[str, Any] = owner if isinstance(owner, dict) else vars(owner)
    had, old = name in names, names.get(name)

    def put(value: Any) -> None:
        if isinstance(owner, dict):
            owner[name] = value
        else:
            setattr(owner, name, value)

    put(replacement)
    try:
        yield
    finally:
        if had:
            put(old)
        elif isinstance(owner, dict):
            del owner[name]
        else:
            delattr(owner, name)


def _random_state() -> tuple[object, ...]:
    numpy = sys.modules.get("numpy")
    drawn = None
    if numpy is not None:
        kind, keys, *position = numpy.random.get_state()
        drawn = (kind, keys.tobytes(), *position)
    return random.getstate(), drawn, torch.get_rng_state().numpy().tobytes()
