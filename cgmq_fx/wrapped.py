"""Prepared models inside of what trains them: DistributedDataParallel, torch.compile, FSDP2."""

import copy
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from cgmq_fx.errors import UsageError
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.ranks import is_sharded, whole

_INSIDE = ("module", "_orig_mod")

# What torch.distributed.fsdp leaves on a module, besides its hooks.
_OF_FULLY_SHARD = ("__composable_api_state_key_", "_is_fsdp_managed_module", "_fsdp_use_orig")


def unwrapped(model: object) -> object:
    """Return the prepared model in `model`, or `model` itself where there is none."""
    inner = model
    while not isinstance(inner, PreparedModule) and isinstance(inner, nn.Module):
        inside = (inner._modules.get(name) for name in _INSIDE)
        found = next((module for module in inside if module is not None), None)
        if found is None:
            return model
        inner = found
    return inner


def is_model_sharded(prepared: PreparedModule) -> bool:
    """Tell whether each rank has a part of the parameters only."""
    return any(is_sharded(parameter) for parameter in prepared.parameters())


def check_sharding(prepared: PreparedModule, caller: str) -> None:
    """Refuse a model of which a part alone is sharded.

    The graph reads the weights of its layers itself, while ``fully_shard`` gathers those of a layer
    only where that is called.

    Raises:
        UsageError: a submodule is sharded by itself; the message names `caller`.
    """
    inner = [name for name, module in prepared.named_modules() if name and _is_fsdp(module)]
    if inner:
        listed = ", ".join(map(repr, inner[:5])) + (", ..." if len(inner) > 5 else "")
        raise UsageError(
            f"{caller}: fully_shard was applied to the submodule(s) {listed} of the prepared "
            f"model, whose graph reads their weights without calling them; call "
            f"fully_shard(prepared) once, on the whole"
        )


def gathered(prepared: PreparedModule) -> PreparedModule:
    """Return a view of a sharded model with whole tensors; all ranks have to call it.

    What is not sharded is shared with `prepared`. A model that is not sharded is returned as it is.
    """
    if not is_model_sharded(prepared):
        return prepared
    made: dict[int, Any] = {}
    view = _plain(prepared, made)
    assert isinstance(view, PreparedModule)
    return view


def _plain(module: nn.Module, made: dict[int, Any]) -> nn.Module:
    """Return a module like this one, without what ``fully_shard`` made of it and its parts."""
    if id(module) in made:
        found: nn.Module = made[id(module)]
        return found
    kind: type[nn.Module] = type(module)
    if _is_fsdp(module):
        kind = kind.__mro__[2]  # (FSDPX, FSDPModule, X, ...)
    plain = kind.__new__(kind)
    made[id(module)] = plain
    plain.__dict__.update(
        (name, value)
        for name, value in module.__dict__.items()
        if not name.startswith(_OF_FULLY_SHARD) and not isinstance(value, RemovableHandle)
    )
    for hooks in ("_forward_pre_hooks", "_forward_hooks"):
        own = copy.copy(module.__dict__[hooks])
        for key, hook in list(own.items()):
            if "fsdp" in type(getattr(hook, "__self__", None)).__module__:
                del own[key]
        plain.__dict__[hooks] = own
    plain.__dict__["_parameters"] = {
        name: _whole_parameter(parameter, made) for name, parameter in module._parameters.items()
    }
    plain.__dict__["_modules"] = {
        name: None if child is None else _plain(child, made)
        for name, child in module._modules.items()
    }
    return plain


def _whole_parameter(parameter: nn.Parameter | None, made: dict[int, Any]) -> nn.Parameter | None:
    if parameter is None or not is_sharded(parameter):
        return parameter
    if id(parameter) not in made:
        made[id(parameter)] = nn.Parameter(
            whole(parameter).detach(), requires_grad=parameter.requires_grad
        )
    found: nn.Parameter = made[id(parameter)]
    return found


def _is_fsdp(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
