"""The inputs of a traced model: placeholders, and guards on what is no tensor."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from cgmq_fx.passes.guards import check_concrete, check_same
from cgmq_fx.passes.root_call import spelled
from cgmq_fx.passes.value_evaluator import UNKNOWN


def take_input(tracer: Any, parameter: inspect.Parameter, known: Mapping[str, Any]) -> Any:
    """Create a placeholder; an argument that is no tensor is taken as it is, and guarded.

    Args:
        tracer: a `ModelTracer`.
        parameter: an argument of the forward.
        known: values of arguments by name, as far as example inputs tell.
    """
    name, default = parameter.name, parameter.default
    has_default = default is not inspect.Parameter.empty
    target = spelled(parameter)
    proxy = tracer.create_proxy("placeholder", target, (default,) if has_default else (), {})
    if name in tracer.options.concrete:
        given = tracer.options.concrete[name]
        tracer.record(check_concrete, (proxy, given, name))
        return given
    match parameter.kind:
        case inspect.Parameter.VAR_POSITIONAL:
            return _members(tracer, proxy, known.get(name, ()))
        case inspect.Parameter.VAR_KEYWORD:
            return _members(tracer, proxy, known.get(name, {}))
    given = known.get(name, default if has_default else UNKNOWN)
    return _as_given(tracer, proxy, given, f"input '{name}'")


def _as_given(tracer: Any, proxy: fx.Proxy, given: Any, where: str) -> Any:
    """Return `proxy` where a tensor was given; anything else as it is, guarded."""
    if given is UNKNOWN or _holds_tensor(given):
        return proxy
    tracer.record(check_same, (proxy, given, where))
    return given


def _members(tracer: Any, proxy: Any, given: Any) -> Any:
    """Return what was given for ``*args`` or ``**kwargs``, member by member; guard the keys."""
    keys, describe = (sorted(given), sorted) if isinstance(given, dict) else (len(given), len)
    where = f"input '{proxy.node.target}'"
    found = tracer.record(describe, (proxy,))
    tracer.record(check_same, (found, keys, where))
    if not isinstance(given, dict):
        return [_as_given(tracer, proxy[i], value, where) for i, value in enumerate(given)]
    return {k: _as_given(tracer, proxy[k], given[k], f"{where}, '{k}'") for k in given}


def _holds_tensor(value: Any) -> bool:
    if is_dataclass(value) and not isinstance(value, type):
        return any(_holds_tensor(getattr(value, item.name)) for item in fields(value))
    return any(
        isinstance(leaf, torch.Tensor) or (is_dataclass(leaf) and _holds_tensor(leaf))
        for leaf in pytree.tree_leaves(value)
    )
