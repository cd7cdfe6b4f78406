"""The state of an optimizer by the names of its parameters, as plain data."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from cgmq_fx.plain_data import plain


def optimizer_state(
    optimizer: Optimizer, model: nn.Module, place: str, *, copy: bool = False
) -> dict[str, Any]:
    """Return the class, the groups and the state of each parameter, all by name.

    Parameters that the model does not have (those of a loss) are in it with their values.

    Args:
        optimizer: the optimizer.
        model: whose parameters have names.
        place: what messages call the optimizer.
        copy: see `plain`.
    """
    names, found = _names(optimizer, model), optimizer.state_dict()
    flat = [name for group in names for name in group]
    own = dict(model.named_parameters(remove_duplicate=False))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    pairs = zip(flat, parameters, strict=True)
    whole = {
        "class": _class(optimizer),
        "names": names,
        "groups": [_settings(group) for group in found["param_groups"]],
        "state": {
            flat[key] if isinstance(key, int) else key: state
            for key, state in found["state"].items()
        },
        "others": {name: parameter for name, parameter in pairs if name not in own},
    }
    made: dict[str, Any] = plain(whole, place, copy=copy)
    return made


def restore_optimizer(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Put `optimizer` into the state that `optimizer_state` returned; see `optimizer_faults`."""
    names = _names(optimizer, model)
    place = {name: index for index, name in enumerate(name for group in names for name in group)}
    groups = [
        {**settings, "params": [place[name] for name in group]}
        for settings, group in zip(saved["groups"], names, strict=True)
    ]
    state = {place.get(name, name): entry for name, entry in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in saved["others"].items():
        parameters[place[name]].data.copy_(value)


def optimizer_faults(
    optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any], place: str
) -> list[str]:
    """Return why the state `saved` cannot be given to `optimizer`; empty where it can."""
    if _class(optimizer) != saved["class"]:
        return [f"{place} differs: saved {saved['class']}, given {_class(optimizer)}"]
    names = _names(optimizer, model)
    if len(names) != len(saved["names"]):
        return [f"{place} differs: saved {len(saved['names'])} groups, given {len(names)}"]
    faults = []
    for number, (old, new) in enumerate(zip(saved["names"], names, strict=True)):
        gone, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
        if gone or added:
            changes = [f"saved without {_listed(added)}"] if added else []
            changes += [f"given without {_listed(gone)}"] if gone else []
            faults.append(f"{place} differs in group {number}: {', '.join(changes)}")
        elif old != new and isinstance(optimizer, LBFGS):
            faults.append(f"{place} differs: LBFGS joins its parameters, and their order changed")
    return faults or _misshapen(optimizer, names, saved, place)


def _misshapen(
    optimizer: Optimizer, names: list[list[str]], saved: Mapping[str, Any], place: str
) -> list[str]:
    """Return which parameters that only the optimizer holds have another shape."""
    flat = [name for group in names for name in group]
    given: dict[str, Tensor] = dict(
        zip(flat, (p for group in optimizer.param_groups for p in group["params"]), strict=True)
    )
    return [
        f"{place} differs: {name} has the shape {tuple(given[name].shape)}, "
        f"saved {tuple(value.shape)}"
        for name, value in saved["others"].items()
        if given[name].shape != value.shape
    ]


def _names(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters, group by group; of others a number in their group."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [known.get(id(p), f"group {g}, parameter {i}") for i, p in enumerate(group["params"])]
        for g, group in enumerate(optimizer.param_groups)
    ]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _class(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
