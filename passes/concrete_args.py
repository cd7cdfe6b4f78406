"""Arguments of a forward that are fixed while it is traced."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cgmq_fx.errors import UsageError

_STARS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def checked_concrete(model: nn.Module, values: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return `values`, arguments of the model's forward that are no tensors.

    Raises:
        UsageError: a name is no argument of forward, or a value holds a tensor.
    """
    if not values:
        return {}
    if not isinstance(values, Mapping):
        raise UsageError(
            f"concrete_args is {type(values).__name__}; give a dict of arguments of forward, such "
            f"as {{'return_dict': False}}"
        )
    parameters = inspect.signature(model.forward).parameters
    known = [name for name, parameter in parameters.items() if parameter.kind not in _STARS]
    faults = [f"'{name}' is no argument" for name in values if name not in known]
    faults += [
        f"'{name}' holds a tensor, which is an input and cannot be fixed"
        for name, value in values.items()
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
    ]
    if faults:
        raise UsageError(
            f"concrete_args: {'; '.join(faults)}; {type(model).__name__}.forward takes {known}"
        )
    return dict(values)


def bind_with(
    signature: inspect.Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    fixed: Mapping[str, Any],
) -> inspect.BoundArguments:
    """Return the arguments of a call, of which `fixed` ones may be left out.

    Raises:
        TypeError: the arguments do not fit.
        UsageError: an argument is given another value than the fixed one.
    """
    bound = signature.bind_partial(*args, **kwargs)
    given = bound.arguments
    other = [
        f"'{name}' is {given[name]!r} and {value!r}"
        for name, value in fixed.items()
        if name in given and (isinstance(given[name], Tensor) or given[name] != value)
    ]
    if other:
        raise UsageError(
            f"example_inputs and concrete_args differ: {'; '.join(other)}; give one value"
        )
    names = [*signature.parameters]
    ordered = {**given, **fixed}
    bound.arguments = {name: ordered[name] for name in names if name in ordered}
    return signature.bind(*bound.args, **bound.kwargs)
