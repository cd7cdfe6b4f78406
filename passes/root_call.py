"""Placeholders put where a root's forward takes them, also behind a decorator.

`torch.fx` opens ``*args`` and ``**kwargs`` by patching the code of forward, which fails on a
decorator's wrapper, and hands the names over as proxies, which nothing can unpack.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from cgmq_fx.errors import UnsupportedModelError

# Tracing replaces it on the class.
_call = nn.Module.__call__
_STARS: dict[object, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


def spelled(parameter: inspect.Parameter) -> str:
    """Return the parameter's name with its stars, as a placeholder is called."""
    return _STARS.get(parameter.kind, "") + parameter.name


def positional_call(
    function: Callable[..., Any], parameters: Sequence[inspect.Parameter]
) -> Callable[..., Any]:
    """Return `function` with one positional argument for itself and for each of `parameters`.

    ``*args`` is then given as a sequence and ``**kwargs`` as a mapping.
    """

    def call(root: Any, *values: Any) -> Any:
        positional: list[Any] = [root]
        keywords: dict[str, Any] = {}
        for parameter, value in zip(parameters, values, strict=True):
            match parameter.kind:
                case inspect.Parameter.VAR_POSITIONAL:
                    positional += value
                case inspect.Parameter.VAR_KEYWORD:
                    keywords |= value
                case inspect.Parameter.KEYWORD_ONLY:
                    keywords[parameter.name] = value
                case _:
                    positional.append(value)
        return function(*positional, **keywords)

    return call


def own_forward(root: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that calling `root` runs: that of its class, or one put on the instance.

    Raises:
        UnsupportedModelError: the one on the instance is not a method bound to it.
    """
    own = vars(root).get("forward")
    if own is None:
        return forward
    if inspect.ismethod(own) and own.__self__ is root:
        return own.__func__
    raise UnsupportedModelError(
        f"{type(root).__name__} has a forward of its own, {own!r}, which is no method bound to it, "
        f"so that a copy of the model would run on the original; set it with "
        f"types.MethodType(function, model), or subclass the model"
    )


def check_no_backward_hooks(module: nn.Module, path: str) -> None:
    """Refuse to open a module whose backward hooks a graph would not run.

    Raises:
        UnsupportedModelError: it has some.
    """
    owner = f"the module '{path}'" if path else type(module).__name__
    if module._backward_hooks or module._backward_pre_hooks:
        raise UnsupportedModelError(
            f"{owner} has backward hooks, which "
            f"a graph cannot run; remove them, or keep the module closed with leaf_modules=[...]"
        )


def call_with_hooks(root: nn.Module, forward: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Return what ``root(*inputs)`` computes, with its forward hooks."""
    if not root._forward_hooks and not root._forward_pre_hooks:
        return forward(root, *inputs)
    had = vars(root).get("forward")
    root.__dict__["forward"] = lambda *values: forward(root, *values)
    try:
        return _call(root, *inputs)
    finally:
        if had is None:
            del root.__dict__["forward"]
        else:
            root.__dict__["forward"] = had


def call_bound(root: nn.Module, inputs: Sequence[Any]) -> Any:
    """Return what `root` computes, given one value for each argument of its forward."""
    parameters = [*inspect.signature(root.forward).parameters.values()]
    return positional_call(lambda module, *args, **kwargs: module(*args, **kwargs), parameters)(
        root, *inputs
    )
